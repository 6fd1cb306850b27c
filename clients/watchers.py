"""A watcher of a poll: hears of every newer result, also across lost connections."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import timedelta

import grpc
from google.protobuf.duration_pb2 import Duration
from tally.poll.v1.poll_pb2 import PollState
from tally.query.v1.query_service_pb2 import (
    GetPollRequest,
    GetTurnoutRequest,
    GetTurnoutResponse,
    Poll,
    Results,
    WatchResultsRequest,
)

from clients.connection import Patience, QueryServer, Refused, is_transient

# A poll in one of these states takes no more votes.
ENDED = (PollState.POLL_STATE_CLOSED, PollState.POLL_STATE_CERTIFIED, PollState.POLL_STATE_CANCELLED)

# The stream is asked for anew this often, so that neither side keeps one for a peer that is gone.
_RENEWAL_SECONDS = 300.0
# A stream that brought results and lived for so long is no failure, however it ends.
_SETTLED_SECONDS = 10.0
_DESCRIPTION_SECONDS = 2.0
# How often it is asked how many voted in a poll that hides its results.
_HIDDEN_SECONDS = 1.0
_LONGEST_BUCKET = timedelta(days=366)


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


async def watch_hidden(
    queries: QueryServer,
    poll_id: str,
    *,
    min_interval: float | None = None,
    at_least_as_fresh: str = "",
    retry_for: float = 60.0,
    on_lost: Callable[[str], None] = lambda _: None,
) -> AsyncGenerator[Results | GetTurnoutResponse, None]:
    """Like `watch`, and while the poll hides its results it yields how many voted instead, each time that changes. Ends
    with the poll's last results, or without any where it is cancelled and they stay hidden."""
    turnout = GetTurnoutRequest(poll_id=poll_id, at_least_as_fresh=at_least_as_fresh)
    # One number for all of the time is enough.
    turnout.bucket.FromTimedelta(_LONGEST_BUCKET)
    version = 0
    while True:
        changes = watch(
            queries,
            poll_id,
            min_interval=min_interval,
            at_least_as_fresh=at_least_as_fresh,
            retry_for=retry_for,
            on_lost=on_lost,
        )
        try:
            async with aclosing(changes):
                async for results in changes:
                    yield results
            return
        except Refused as refused:
            if refused.reason != "RESULTS_HIDDEN":
                raise
        voted = await queries.call(queries.stub.GetTurnout, turnout, retry_for=retry_for, on_lost=on_lost)
        if voted.version > version:
            version = voted.version
            yield voted
        request = GetPollRequest(poll_id=poll_id)
        poll = (await queries.call(queries.stub.GetPoll, request, retry_for=retry_for, on_lost=on_lost)).poll
        if poll.state == PollState.POLL_STATE_CANCELLED:
            return
        await asyncio.sleep(max(min_interval or 0.0, _HIDDEN_SECONDS))


async def describe(queries: QueryServer, poll_id: str, at_least_as_fresh: str = "") -> Poll:
    """The poll, for its title and method; empty where that cannot be told now, since counts are shown all the same."""
    request = GetPollRequest(poll_id=poll_id, at_least_as_fresh=at_least_as_fresh)
    try:
        return (await queries.stub.GetPoll(request, timeout=_DESCRIPTION_SECONDS)).poll
    except grpc.aio.AioRpcError:
        return Poll()
