"""The RPCs of QueryService: each handler reads its request, asks, and translates the answer."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

import grpc
from tally.poll.v1.error_reason_pb2 import ErrorReason
from tally.query.v1 import query_service_pb2 as pb
from tally.query.v1.query_service_pb2_grpc import QueryServiceServicer

from contracts.freshness import ANY_STATE, parse, token
from contracts.live import are_hidden
from contracts.log_epoch import NOWHERE, LogPosition
from contracts.read_database import DOCUMENTS, VIEWS
from contracts.refusals import ReadModelBehind, Refusal, invalid_request, poll_not_found, results_hidden
from contracts.voters import VoterKeys
from query_server.announcements import Announcements
from query_server.answered import Answered
from query_server.freshness import behind, caught_up, patience, retried, wanted
from query_server.live import LiveResults
from query_server.outgoing import Outgoing
from query_server.status import Status
from query_server.views import MAX_ANSWER_BYTES, Found, Views
from query_server.watchers import Watchers
from runtime.serving import check, checks_itself

Answer = TypeVar("Answer")

Context = grpc.aio.ServicerContext[Any, Any]


class QueryService(QueryServiceServicer):
    """Reads. See protos/tally/query/v1/query_service.proto for what each promises."""

    def __init__(
        self,
        views: Views,
        announcements: Announcements,
        live: LiveResults,
        watchers: Watchers,
        status: Status,
        voters: VoterKeys,
        answered: Answered,
    ) -> None:
        """`answered` is what is answered of results, also by `watchers`."""
        self._views = views
        self._announcements = announcements
        self._live = live
        self._watchers = watchers
        self._status = status
        self._voters = voters
        self._answered = answered
        self._outgoing = Outgoing()
        # Beside results, which have two stores, each read model has its own pace: who has seen a change in one of them
        # gives its token to see it in another.
        self._shown = {VIEWS: Answered(), DOCUMENTS: Answered()}

    async def GetPoll(self, request: pb.GetPollRequest, context: Context) -> pb.GetPollResponse:
        poll_id = UUID(request.poll_id)
        _, poll = await self._fresh(request, context, poll_id, lambda: self._views.poll(poll_id))
        if poll is None:
            raise poll_not_found(poll_id)
        await self._outgoing.send(context, poll.ByteSize())
        return pb.GetPollResponse(poll=poll)

    async def ListPolls(self, request: pb.ListPollsRequest, context: Context) -> pb.ListPollsResponse:
        async def read() -> pb.ListPollsResponse:
            page, positions = await self._views.polls(
                request.state, request.poll_id_prefix, request.page_size, request.page_token
            )
            self._show(positions)
            return page

        page = await retried(read, patience(context))
        await self._outgoing.send(context, page.ByteSize())
        return page

    @checks_itself
    async def GetResults(  # type: ignore[override]  # the bytes that the projector made
        self, request: pb.GetResultsRequest, context: Context
    ) -> bytes:
        found = None if request.at_least_as_fresh else self._watchers.current(request.poll_id)
        if found and found.results and not are_hidden(found.results):
            # The usual question, for a poll that is watched: so its id is one.
            await self._outgoing.send(context, len(found.results))
            return found.results
        check(request)
        poll_id = UUID(request.poll_id)
        fresh = wanted(request.at_least_as_fresh, [poll_id])
        answered = self._answered.position(poll_id)
        least = max(fresh.get(poll_id, NOWHERE), answered)
        found = self._watchers.current(poll_id)
        if found is None or found.position < least:
            found = await self._find(poll_id, answered, patience(context))
        if found and found.position < least:
            found = None
        if found is None:
            # It comes as soon as a store has it.
            async with self._watchers.watch([poll_id], {poll_id: least} if fresh else {}, patience(context)) as watcher:
                results = await watcher.next()
            await self._outgoing.send(context, len(results))
            return results
        self._watchers.learn(poll_id, found)
        if found.results is None:
            raise poll_not_found(poll_id)
        if are_hidden(found.results):
            raise results_hidden(poll_id)
        await self._outgoing.send(context, len(found.results))
        return found.results

    async def _find(self, poll_id: UUID, least: LogPosition, seconds: float) -> Found | None:
        """The results that a store has now, at `least` if one has them so far; None where none can tell."""
        with suppress(ReadModelBehind):
            async with asyncio.timeout(seconds):
                return (await self._live.find_all({poll_id: least}))[poll_id]
        return None

    async def WatchResults(  # type: ignore[override]  # it writes to its context
        self, request: pb.WatchResultsRequest, context: Context
    ) -> None:
        poll_ids = [UUID(poll_id) for poll_id in request.poll_ids]
        fresh = dict(wanted(request.at_least_as_fresh, poll_ids))
        for index, each in enumerate(request.at_least_as_fresh_each):
            for poll_id, least in wanted(each, poll_ids, f"at_least_as_fresh_each[{index}]").items():
                # The latest of each poll.
                fresh[poll_id] = max(least, fresh.get(poll_id, NOWHERE))
        min_interval = request.min_interval.ToTimedelta().total_seconds()
        async with self._watchers.watch(poll_ids, fresh, patience(context), min_interval) as watcher:
            await watcher.forward(context.write, partial(self._outgoing.room, context))

    # That a voter voted can be read, but not when: counts by version would tell what was chosen (docs/security.md).
    async def GetVote(self, request: pb.GetVoteRequest, context: Context) -> pb.GetVoteResponse:
        poll_id, voter_key = UUID(request.poll_id), self._voters.voter_key(request.voter_id)
        seen, receipt = await self._fresh(request, context, poll_id, lambda: self._views.vote(poll_id, voter_key))
        if not seen.version:
            raise poll_not_found(poll_id)
        if receipt is None:
            raise Refusal(ErrorReason.ERROR_REASON_VOTE_NOT_FOUND, "this voter has no vote in this poll")
        receipt.receipt_id = self._voters.receipt_id(poll_id, voter_key)
        return pb.GetVoteResponse(receipt=receipt)

    async def BatchGetResults(  # type: ignore[override]  # the bytes that the projector made
        self, request: pb.BatchGetResultsRequest, context: Context
    ) -> bytes:
        poll_ids = list(dict.fromkeys(UUID(poll_id) for poll_id in request.poll_ids))
        least = {poll_id: self._answered.position(poll_id) for poll_id in poll_ids}

        async def read() -> dict[UUID, Found]:
            found = await self._live.find_all(least, MAX_ANSWER_BYTES)
            for poll_id, (position, _) in found.items():
                if position < least[poll_id]:
                    raise behind(position, least[poll_id])
            return found

        async with self._outgoing.batch(patience(context)):
            found = await retried(read, patience(context))
            for poll_id in found:
                self._watchers.learn(poll_id, found[poll_id])
            answer = _batch(poll_ids, found)
            await self._outgoing.send(context, len(answer))
        return answer

    async def ListVoterVotes(self, request: pb.ListVoterVotesRequest, context: Context) -> pb.ListVoterVotesResponse:
        voter_key = self._voters.voter_key(request.voter_id)
        poll_id, version, log_epoch = parse(request.at_least_as_fresh) if request.at_least_as_fresh else ANY_STATE

        async def read() -> tuple[LogPosition, pb.ListVoterVotesResponse]:
            seen, page, positions = await self._views.voter_votes(
                voter_key, request.page_size, request.page_token, poll_id
            )
            self._show(positions)
            return seen, page

        least = LogPosition(log_epoch, version)
        _, page = await caught_up(self._announcements, VIEWS, poll_id, least, read, patience(context))
        for vote in page.votes:
            vote.receipt.receipt_id = self._voters.receipt_id(UUID(vote.receipt.poll_id), voter_key)
        await self._outgoing.send(context, page.ByteSize())
        return page

    async def GetTurnout(self, request: pb.GetTurnoutRequest, context: Context) -> pb.GetTurnoutResponse:
        poll_id = UUID(request.poll_id)
        _, turnout = await self._fresh(request, context, poll_id, lambda: self._views.turnout(request))
        if turnout is None:
            raise poll_not_found(poll_id)
        return turnout

    async def GetPollDocument(self, request: pb.GetPollDocumentRequest, context: Context) -> pb.GetPollDocumentResponse:
        poll_id = UUID(request.poll_id)
        seen, document = await self._fresh(request, context, poll_id, lambda: self._views.document(poll_id), DOCUMENTS)
        if document is None:
            raise poll_not_found(poll_id)
        response = pb.GetPollDocumentResponse(
            poll_id=str(poll_id),
            version=seen.version,
            document=document,
            consistency_token=token(poll_id, seen.version, seen.log_epoch),
        )
        await self._outgoing.send(context, response.ByteSize())
        return response

    async def GetReadModelStatus(
        self, request: pb.GetReadModelStatusRequest, context: Context
    ) -> pb.GetReadModelStatusResponse:
        return await self._status.read()

    def _show(self, positions: Mapping[UUID, LogPosition]) -> None:
        """Notes that these polls are answered from the views. Raises READ_MODEL_BEHIND where one was further before."""
        shown = self._shown[VIEWS]
        for poll_id, position in positions.items():
            if position < (least := shown.position(poll_id)):
                raise behind(position, least)
            shown.note(poll_id, position)

    async def _fresh(
        self,
        request: pb.GetPollRequest | pb.GetVoteRequest | pb.GetTurnoutRequest | pb.GetPollDocumentRequest,
        context: Context,
        poll_id: UUID,
        read: Callable[[], Awaitable[tuple[LogPosition, Answer]]],
        read_model: str = VIEWS,
    ) -> tuple[LogPosition, Answer]:
        """What `read` returns of the poll, once it shows the command that the request has a token of, and all that was
        answered from this read model before."""
        shown = self._shown[read_model]
        fresh = wanted(request.at_least_as_fresh, [poll_id]).get(poll_id, NOWHERE)
        least = max(fresh, shown.position(poll_id))
        seen, answer = await caught_up(self._announcements, read_model, poll_id, least, read, patience(context))
        shown.note(poll_id, seen)
        return seen, answer


def _batch(poll_ids: Sequence[UUID], found: Mapping[UUID, Found]) -> bytes:
    """A serialized BatchGetResultsResponse. Raises INVALID_REQUEST where it would be too large.

    Polls that are not among `found` were left out because those that are have more than fits already.
    """
    hidden, missing, shown = [], [], []
    for poll_id in poll_ids:
        results = found[poll_id].results if poll_id in found else b""
        if results is None:
            missing.append(str(poll_id))
        elif are_hidden(results):
            hidden.append(str(poll_id))
        else:
            # A GetResultsResponse has the same bytes as this response with one poll; repeated fields add up.
            shown.append(results)
    others = pb.BatchGetResultsResponse(missing_poll_ids=missing, hidden_poll_ids=hidden).SerializeToString()
    if sum(map(len, shown)) + len(others) > MAX_ANSWER_BYTES:
        raise invalid_request({"poll_ids": "have more options together than one answer can hold; ask for fewer"})
    return b"".join([*shown, others])
