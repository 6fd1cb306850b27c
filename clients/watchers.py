"""A watcher of a poll: hears of every newer result, also across lost connections."""

import asyncio
from collections.abc import AsyncGenerator, Callable

import grpc
from google.protobuf.duration_pb2 import Duration
from tally.poll.v1.poll_pb2 import PollState, VotingMethod
from tally.query.v1.query_service_pb2 import GetPollRequest, Results, WatchResultsRequest

from clients.connection import Patience, QueryServer, is_transient

# A poll in one of these states takes no more votes.
ENDED = (PollState.POLL_STATE_CLOSED, PollState.POLL_STATE_CERTIFIED, PollState.POLL_STATE_CANCELLED)

# The stream is asked for anew this often, so that neither side keeps one for a peer that is gone.
_RENEWAL_SECONDS = 300.0
# A stream that brought results and lived for so long is no failure, however it ends.
_SETTLED_SECONDS = 10.0
_METHOD_SECONDS = 2.0


async def watch(
    queries: QueryServer,
    poll_id: str,
    *,
    min_interval: float | None = None,
    at_least_as_fresh: str = "",
    retry_for: float = 60.0,
    on_lost: Callable[[str], None] = lambda _: None,
    until: Callable[[Results], bool] = lambda results: results.state in ENDED,
) -> AsyncGenerator[Results, None]:
    """Yields the current results, then newer ones, up to those `until` which or the poll's last; versions only grow,
    and one comes again only where its counts were corrected.

    `min_interval`: seconds between two results at least. A lost connection is retried for `retry_for` seconds, and told
    to `on_lost` unless the first attempt succeeds. Raises Refused. To be closed by its caller (contextlib.aclosing).
    """
    request = WatchResultsRequest(poll_ids=[poll_id], at_least_as_fresh=at_least_as_fresh)
    if min_interval is not None:
        interval = Duration()
        interval.FromMilliseconds(round(min_interval * 1000))
        request.min_interval.CopyFrom(interval)
    patience = Patience(retry_for)
    newest = Results()
    clock = asyncio.get_running_loop().time
    while True:
        started, answered, newer = clock(), False, False
        call = queries.stub.WatchResults(request, timeout=_RENEWAL_SECONDS)
        try:
            async for response in call:
                answered = True
                results = response.results
                corrects = results.version == newest.version and results.counts != newest.counts
                if results.version > newest.version or corrects:
                    newest, newer = results, True
                    # Whichever server answers next shows nothing older.
                    request.at_least_as_fresh = results.consistency_token
                    yield results
                    if until(results):
                        return
            return
        except grpc.aio.AioRpcError as error:
            # Servers end connections now and then, so that clients spread: no trouble if the next one is there at once.
            # But one that answers and ends every stream at once is not asked for ever.
            settled = newer or (answered and clock() - started >= _SETTLED_SECONDS)
            if settled:
                patience.renew()
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and settled:
                continue
            trouble = queries.refused(error)
            pause = patience.pause(error) if is_transient(error) else None
        finally:
            call.cancel()
        if pause is None:
            raise trouble
        if not settled:
            on_lost(f"{trouble}; trying again")
        await asyncio.sleep(pause)


async def voting_method(queries: QueryServer, poll_id: str) -> "VotingMethod.ValueType":
    """How votes are marked; VOTING_METHOD_UNSPECIFIED where nobody tells, since counts are shown all the same."""
    try:
        return (await queries.stub.GetPoll(GetPollRequest(poll_id=poll_id), timeout=_METHOD_SECONDS)).poll.method
    except grpc.aio.AioRpcError:
        return VotingMethod.VOTING_METHOD_UNSPECIFIED
