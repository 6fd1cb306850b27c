"""The RPCs of CommandService: each handler reads its request, calls, and translates the outcome."""

from collections.abc import AsyncIterator
from math import inf
from typing import Any
from uuid import UUID

import grpc
from tally.command.v1 import command_service_pb2 as pb
from tally.command.v1.command_service_pb2_grpc import CommandServiceServicer

from command_server.ballot_box import BallotBox
from command_server.ballot_queue import Recorded
from command_server.ballots import keyed
from command_server.intake import Intake, deadline_of
from command_server.poll import (
    cancel_poll,
    close_poll,
    is_idempotency_key,
    open_poll,
    update_poll,
)
from command_server.poll_log import PollLog, Request
from command_server.polls import Poll, Polls
from command_server.roll import Roll
from contracts.freshness import token
from contracts.refusals import Refusal
from contracts.text import MAX_VOTER_ID
from contracts.voters import KEY_BYTES, VoterKeys
from runtime.serving import check, checks_itself, reads_bytes

Context = grpc.aio.ServicerContext[Any, Any]

# Holds the place of a receipt id, which has this many characters and never these.
_RECEIPT_ID = "?" * 2 * KEY_BYTES


class CommandService(CommandServiceServicer):
    """Commands and votes. See protos/tally/command/v1/command_service.proto for what each promises."""

    def __init__(self, log: PollLog, roll: Roll, polls: Polls, box: BallotBox, voters: VoterKeys) -> None:
        self._log = log
        self._polls = polls
        self._box = box
        self._voters = voters
        self._intake = Intake(polls, box, roll, voters)
        self._answer: _Answer | None = None

    async def CreatePoll(self, request: pb.CreatePollRequest, context: Context) -> pb.CreatePollResponse:
        return await self._log.create(Request.of(request, request.request_id), request.poll)

    async def OpenPoll(self, request: pb.OpenPollRequest, context: Context) -> pb.OpenPollResponse:
        command = Request.of(request, request.request_id)
        return await self._log.change(command, UUID(request.poll_id), open_poll, pb.OpenPollResponse)

    async def ClosePoll(self, request: pb.ClosePollRequest, context: Context) -> pb.ClosePollResponse:
        command = Request.of(request, request.request_id)
        return await self._log.change(command, UUID(request.poll_id), close_poll, pb.ClosePollResponse)

    async def UpdatePoll(self, request: pb.UpdatePollRequest, context: Context) -> pb.UpdatePollResponse:
        command = Request.of(request, request.request_id)
        decide = update_poll(request.poll, request.update_mask)
        return await self._log.change(command, UUID(request.poll_id), decide, pb.UpdatePollResponse)

    async def CancelPoll(self, request: pb.CancelPollRequest, context: Context) -> pb.CancelPollResponse:
        command = Request.of(request, request.request_id)
        return await self._log.change(command, UUID(request.poll_id), cancel_poll, pb.CancelPollResponse)

    async def CertifyPoll(self, request: pb.CertifyPollRequest, context: Context) -> pb.CertifyPollResponse:
        command = Request.of(request, request.request_id)
        return await self._log.request_recount(command, UUID(request.poll_id))

    @reads_bytes
    async def RegisterVoters(  # type: ignore[override]  # bytes in the place of requests
        self, requests: AsyncIterator[bytes], context: Context
    ) -> pb.RegisterVotersResponse:
        return await self._intake.register_voters(requests)

    @checks_itself
    async def CastVote(  # type: ignore[override]  # the bytes of a CastVoteResponse
        self, request: pb.CastVoteRequest, context: Context
    ) -> bytes:
        poll = self._polls.known(request.poll_id)
        voter_id, option_ids = request.voter_id, request.option_ids
        mark = poll.markings.get(option_ids[0]) if poll and len(option_ids) == 1 else None
        idempotency_key = request.idempotency_key
        if not (
            poll
            and mark
            and 0 < len(voter_id) <= MAX_VOTER_ID
            and (not idempotency_key or is_idempotency_key(idempotency_key))
        ):
            # Any but the most usual vote: that one has just been seen to keep every rule of its message.
            check(request)
            poll = await self._polls.find(request.poll_id)
            mark = poll.mark(option_ids)
        voter_key = self._voters.voter_key(voter_id)
        ballot = voter_key + mark
        if idempotency_key:
            ballot += keyed(self._voters.idempotency_hash(voter_key, idempotency_key))
        # Elsewhere a vote whose caller has gone is harmless: the voter's first one counts.
        deadline = deadline_of(context) if poll.spec.allow_vote_change else inf
        recorded = (await self._box.cast(poll, ballot, deadline)).of(0)
        if isinstance(recorded, Refusal):
            # All votes of a commit share it: without this, each of them would lengthen its traceback.
            raise recorded.with_traceback(None)
        answer = self._answer
        if answer is None or answer.recorded is not recorded:
            # The votes of one commit are answered one after the other.
            answer = self._answer = _Answer(poll, recorded)
        return answer.with_receipt(self._voters.receipt_id(poll.poll_id, voter_key))

    @reads_bytes
    async def CastVotes(  # type: ignore[override]  # it writes to its context
        self, requests: AsyncIterator[bytes], context: Context
    ) -> None:
        await self._intake.cast_votes(requests, context.write, deadline_of(context))


class _Answer:
    """The CastVoteResponse to the votes of one commit, encoded once: they differ in their receipt ids only."""

    def __init__(self, poll: Poll, recorded: Recorded) -> None:
        self.recorded = recorded
        response = pb.CastVoteResponse(
            already_recorded=recorded.already,
            consistency_token=token(poll.poll_id, recorded.version, recorded.log_epoch),
        )
        # Field by field: messages that are made apart, and copied in, take twice as long.
        receipt = response.receipt
        receipt.poll_id = str(poll.poll_id)
        receipt.receipt_id = _RECEIPT_ID
        receipt.version = recorded.version
        receipt.recorded_at.seconds = recorded.recorded_at.seconds
        receipt.recorded_at.nanos = recorded.recorded_at.nanos
        self._before, self._after = response.SerializeToString().split(_RECEIPT_ID.encode())

    def with_receipt(self, receipt_id: str) -> bytes:
        return b"".join((self._before, receipt_id.encode(), self._after))
