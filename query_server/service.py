"""The RPCs of QueryService: each handler reads its request, asks, and translates the answer."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from uuid import UUID

import grpc
from tally.poll.v1.error_reason_pb2 import ErrorReason
from tally.query.v1 import query_service_pb2 as pb
from tally.query.v1.query_service_pb2_grpc import QueryServiceServicer

from contracts.freshness import ANY_STATE, parse, token
from contracts.live import are_hidden
from contracts.read_database import DOCUMENTS, VIEWS
from contracts.refusals import Refusal, invalid_request, poll_not_found, results_hidden
from contracts.voters import VoterKeys
from query_server.announcements import Announcements
from query_server.freshness import caught_up, patience, wanted
from query_server.live import LiveResults, version_of
from query_server.status import Status
from query_server.views import MAX_ANSWER_BYTES, Views
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
    ) -> None:
        self._views = views
        self._announcements = announcements
        self._live = live
        self._watchers = watchers
        self._status = status
        self._voters = voters

    async def GetPoll(self, request: pb.GetPollRequest, context: Context) -> pb.GetPollResponse:
        poll_id = UUID(request.poll_id)
        _, poll = await self._fresh(request, context, poll_id, lambda: self._views.poll(poll_id))
        if poll is None:
            raise poll_not_found(poll_id)
        return pb.GetPollResponse(poll=poll)

    async def ListPolls(self, request: pb.ListPollsRequest, context: Context) -> pb.ListPollsResponse:
        async with asyncio.timeout(patience(context)):
            return await self._views.polls(request.state, request.poll_id_prefix, request.page_size, request.page_token)

    @checks_itself
    async def GetResults(  # type: ignore[override]  # the bytes that the projector made
        self, request: pb.GetResultsRequest, context: Context
    ) -> bytes:
        results = None if request.at_least_as_fresh else self._watchers.current(request.poll_id)
        if results and not are_hidden(results):
            # The usual question, for a poll that is watched: so its id is one.
            return results
        check(request)
        poll_id = UUID(request.poll_id)
        fresh = wanted(request.at_least_as_fresh, [poll_id])
        results = self._watchers.current(poll_id)
        if results is None:
            async with asyncio.timeout(patience(context)):
                results = await self._live.find(poll_id)
        if fresh and (results is None or version_of(results) < fresh[poll_id]):
            async with self._watchers.watch([poll_id], fresh, patience(context)) as watcher:
                results = await watcher.next()
        if results is None:
            raise poll_not_found(poll_id)
        if are_hidden(results):
            raise results_hidden(poll_id)
        return results

    async def WatchResults(  # type: ignore[override]  # it writes to its context
        self, request: pb.WatchResultsRequest, context: Context
    ) -> None:
        poll_ids = [UUID(poll_id) for poll_id in request.poll_ids]
        fresh = Counter(wanted(request.at_least_as_fresh, poll_ids))
        for index, each in enumerate(request.at_least_as_fresh_each):
            # The latest of each poll.
            fresh |= wanted(each, poll_ids, f"at_least_as_fresh_each[{index}]")
        min_interval = request.min_interval.ToTimedelta().total_seconds()
        async with self._watchers.watch(poll_ids, fresh, patience(context), min_interval) as watcher:
            await watcher.forward(context.write)

    # That a voter voted can be read, but not when: counts by version would tell what was chosen (docs/security.md).
    async def GetVote(self, request: pb.GetVoteRequest, context: Context) -> pb.GetVoteResponse:
        poll_id, voter_key = UUID(request.poll_id), self._voters.voter_key(request.voter_id)
        seen, receipt = await self._fresh(request, context, poll_id, lambda: self._views.vote(poll_id, voter_key))
        if not seen:
            raise poll_not_found(poll_id)
        if receipt is None:
            raise Refusal(ErrorReason.ERROR_REASON_VOTE_NOT_FOUND, "this voter has no vote in this poll")
        receipt.receipt_id = self._voters.receipt_id(poll_id, voter_key)
        return pb.GetVoteResponse(receipt=receipt)

    async def BatchGetResults(  # type: ignore[override]  # the bytes that the projector made
        self, request: pb.BatchGetResultsRequest, context: Context
    ) -> bytes:
        poll_ids = list(dict.fromkeys(UUID(poll_id) for poll_id in request.poll_ids))
        async with asyncio.timeout(patience(context)):
            found = await self._live.find_all(poll_ids, MAX_ANSWER_BYTES)
        hidden = [poll_id for poll_id in poll_ids if poll_id in found and are_hidden(found[poll_id])]
        others = pb.BatchGetResultsResponse(
            missing_poll_ids=[str(poll_id) for poll_id in poll_ids if poll_id not in found],
            hidden_poll_ids=map(str, hidden),
        )
        # A GetResultsResponse has the same bytes as this response with one poll; repeated fields add up.
        shown = [found[poll_id] for poll_id in poll_ids if poll_id in found and poll_id not in hidden]
        answer = b"".join([*shown, others.SerializeToString()])
        # Also where find_all has left some out: every poll that it found takes at least as much room here.
        if len(answer) > MAX_ANSWER_BYTES:
            raise invalid_request({"poll_ids": "have more options together than one answer can hold; ask for fewer"})
        return answer

    async def ListVoterVotes(self, request: pb.ListVoterVotesRequest, context: Context) -> pb.ListVoterVotesResponse:
        voter_key = self._voters.voter_key(request.voter_id)
        fresh = parse(request.at_least_as_fresh) if request.at_least_as_fresh else ANY_STATE

        async def read() -> tuple[int, pb.ListVoterVotesResponse]:
            return await self._views.voter_votes(voter_key, request.page_size, request.page_token, fresh)

        _, page = await caught_up(self._announcements, VIEWS, *fresh[:2], read, patience(context))
        for vote in page.votes:
            vote.receipt.receipt_id = self._voters.receipt_id(UUID(vote.receipt.poll_id), voter_key)
        return page

    async def GetTurnout(self, request: pb.GetTurnoutRequest, context: Context) -> pb.GetTurnoutResponse:
        poll_id = UUID(request.poll_id)
        _, turnout = await self._fresh(request, context, poll_id, lambda: self._views.turnout(request))
        if turnout is None:
            raise poll_not_found(poll_id)
        return turnout

    async def GetPollDocument(self, request: pb.GetPollDocumentRequest, context: Context) -> pb.GetPollDocumentResponse:
        poll_id = UUID(request.poll_id)
        version, document = await self._fresh(
            request, context, poll_id, lambda: self._views.document(poll_id), DOCUMENTS
        )
        if document is None:
            raise poll_not_found(poll_id)
        return pb.GetPollDocumentResponse(
            poll_id=str(poll_id), version=version, document=document, consistency_token=token(poll_id, version)
        )

    async def GetReadModelStatus(
        self, request: pb.GetReadModelStatusRequest, context: Context
    ) -> pb.GetReadModelStatusResponse:
        return await self._status.read()

    async def _fresh(
        self,
        request: pb.GetPollRequest | pb.GetVoteRequest | pb.GetTurnoutRequest | pb.GetPollDocumentRequest,
        context: Context,
        poll_id: UUID,
        read: Callable[[], Awaitable[tuple[int, Answer]]],
        read_model: str = VIEWS,
    ) -> tuple[int, Answer]:
        """What `read` returns of the poll, once it shows the command that the request has a token of."""
        version = wanted(request.at_least_as_fresh, [poll_id]).get(poll_id, 0)
        return await caught_up(self._announcements, read_model, poll_id, version, read, patience(context))
