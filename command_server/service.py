"""The RPCs of CommandService: each handler reads its request, calls, and translates the outcome."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from math import inf
from typing import Any
from uuid import UUID

import grpc
from tally.command.v1 import command_service_pb2 as pb
from tally.command.v1.command_service_pb2_grpc import CommandServiceServicer
from tally.poll.v1.poll_pb2 import VoteReceipt

from command_server.ballot_box import BallotBox
from command_server.ballot_queue import Recorded, Verdicts
from command_server.ballots import Envelope, Reader, keyed
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
from contracts.refusals import Refusal, invalid_request
from contracts.text import MAX_VOTER_ID
from contracts.voters import KEY_BYTES, VoterKeys
from runtime.serving import check, checks_itself, read_message, reads_bytes

Context = grpc.aio.ServicerContext[Any, Any]

# Requests of one stream that may be under way at once, and the votes of those of all streams; then the server stops
# reading. But each stream may always have one, so that none waits for another whose caller reads no answers.
STREAM_IN_FLIGHT = 24
VOTES_IN_FLIGHT = 400_000
# Votes of one request: what the rules of the message allow.
MAX_BATCH_VOTES = 20_000

# Holds the place of a receipt id, which has this many characters and never these.
_RECEIPT_ID = "?" * 2 * KEY_BYTES


class CommandService(CommandServiceServicer):
    """Commands and votes. See protos/tally/command/v1/command_service.proto for what each promises."""

    def __init__(self, log: PollLog, roll: Roll, polls: Polls, box: BallotBox, voters: VoterKeys) -> None:
        self._log = log
        self._roll = roll
        self._polls = polls
        self._box = box
        self._voters = voters
        self._reader = Reader(voters)
        self._answer: _Answer | None = None
        # Votes of the streams' requests that are not answered, and the event that there are fewer than before.
        self._in_flight = 0
        self._fewer = asyncio.Event()

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

    async def RegisterVoters(
        self, requests: AsyncIterator[pb.RegisterVotersRequest], context: Context
    ) -> pb.RegisterVotersResponse:
        response, poll_id = pb.RegisterVotersResponse(), ""
        async for request in requests:
            if poll_id not in ("", request.poll_id):
                raise invalid_request({"poll_id": "must be the same in all requests of a call"})
            poll_id = request.poll_id
            # The first of several entries for one voter is the one that counts.
            weights: dict[bytes, int] = {}
            for index, voter in enumerate(request.voters):
                key = self._voters.voter_key(voter.voter_id, f"voters[{index}].voter_id")
                weights.setdefault(key, voter.weight or 1)
            registered = await self._roll.register(UUID(poll_id), weights)
            response.registered += registered.voters
            response.already_registered += len(request.voters) - registered.voters
            response.consistency_token = token(UUID(poll_id), registered.version, registered.log_epoch)
        return response

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
        deadline = _deadline(context) if poll.spec.allow_vote_change else inf
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
        under_way: asyncio.Queue[_Batch | Exception | None] = asyncio.Queue(STREAM_IN_FLIGHT)
        unanswered: deque[_Batch] = deque()
        in_flight = 0
        deadline = _deadline(context)

        def count(votes: int) -> None:
            nonlocal in_flight
            in_flight += votes
            self._in_flight += votes
            if votes < 0:
                self._fewer.set()

        async def read() -> None:
            try:
                async for request in requests:
                    while in_flight and self._in_flight >= VOTES_IN_FLIGHT:
                        self._fewer.clear()
                        await self._fewer.wait()
                    batch = await self._submit(request, deadline)
                    unanswered.append(batch)
                    count(batch.votes)
                    await under_way.put(batch)
            except Exception as error:  # noqa: BLE001 - what came before it is answered first
                await under_way.put(error)
            await under_way.put(None)

        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(read())
                while (batch := await under_way.get()) is not None:
                    if isinstance(batch, Exception):
                        raise batch
                    await context.write(await batch.answer())
                    unanswered.popleft()
                    count(-batch.votes)
        finally:
            for batch in unanswered:
                batch.abandon()
            count(-in_flight)

    async def _submit(self, data: bytes, deadline: float) -> "_Batch":
        """Puts the valid votes of a batch into the ballot box; the others are rejected one by one."""
        request = None
        envelope = self._reader.envelope(data)
        if (
            envelope is None
            or self._polls.known(envelope.poll_id) is None
            or not 0 < envelope.votes <= MAX_BATCH_VOTES
            or (envelope.idempotency_key and not is_idempotency_key(envelope.idempotency_key))
        ):
            # Not what nearly all requests are, votes for an open poll: it is read and checked like any other message.
            request = read_message(pb.CastVotesRequest, data)
            envelope = Envelope(request.batch_sequence, request.poll_id, len(request.votes), request.idempotency_key)
        idempotency_key = envelope.idempotency_key
        batch = _Batch(envelope.batch_sequence, envelope.votes)
        try:
            poll = await self._polls.find(envelope.poll_id)
        except Refusal as refusal:
            for index in range(envelope.votes):
                batch.reject(index, refusal)
            return batch
        batch.poll = poll
        marked: list[bytes | None] = (
            [None] * envelope.votes if request else self._reader.mark(data, poll.markings, idempotency_key)
        )
        if None in marked:
            request = request or read_message(pb.CastVotesRequest, data)
            for index, vote in enumerate(request.votes):
                if marked[index] is None:
                    try:
                        voter_key = self._voters.voter_key(vote.voter_id)
                        ballot = voter_key + poll.mark(vote.option_ids)
                        if idempotency_key:
                            ballot += keyed(self._voters.idempotency_hash(voter_key, idempotency_key))
                        marked[index] = ballot
                    except Refusal as refusal:
                        batch.reject(index, refusal)
        ballots = [ballot for ballot in marked if ballot is not None]
        if ballots:
            batch.verdicts = await self._box.cast_all(poll, ballots, deadline)
        return batch


def _deadline(context: Context) -> float:
    """When the caller stops waiting, by the loop's clock."""
    remaining = context.time_remaining()
    return inf if remaining is None else asyncio.get_running_loop().time() + remaining


class _Answer:
    """The CastVoteResponse to the votes of one commit, encoded once: they differ in their receipt ids only."""

    def __init__(self, poll: Poll, recorded: Recorded) -> None:
        self.recorded = recorded
        response = pb.CastVoteResponse(
            receipt=VoteReceipt(
                poll_id=str(poll.poll_id),
                receipt_id=_RECEIPT_ID,
                version=recorded.version,
                recorded_at=recorded.recorded_at,
            ),
            already_recorded=recorded.already,
            consistency_token=token(poll.poll_id, recorded.version, recorded.log_epoch),
        )
        self._before, self._after = response.SerializeToString().split(_RECEIPT_ID.encode())

    def with_receipt(self, receipt_id: str) -> bytes:
        return b"".join((self._before, receipt_id.encode(), self._after))


class _Batch:
    """A CastVotesRequest under way: its answer, with the votes that were rejected at once, and the others' verdicts to
    come."""

    def __init__(self, sequence: int, votes: int) -> None:
        self.votes = votes
        self.poll: Poll | None = None
        self.verdicts: asyncio.Future[Verdicts] | None = None
        self._response = pb.CastVotesResponse(batch_sequence=sequence)

    def reject(self, index: int, refusal: Refusal) -> None:
        """Says why a vote does not count. The refusal is not kept: its traceback would keep the request."""
        self._response.rejections.add(index=index, reason=refusal.reason, message=refusal.message)

    def abandon(self) -> None:
        """Its caller has gone: a vote of it that waits for its turn takes the place of none."""
        if self.verdicts is not None:
            self.verdicts.cancel()

    async def answer(self) -> pb.CastVotesResponse:
        """The answer, once all votes are judged."""
        response = self._response
        if self.verdicts is not None and self.poll is not None:
            recorded, others = await self.verdicts
            latest = recorded
            if others:
                # Verdicts count the ballots that were submitted; the caller counts the votes it sent.
                rejected = {rejection.index for rejection in response.rejections}
                sent = [index for index in range(self.votes) if index not in rejected]
                for index, verdict in others.items():
                    if isinstance(verdict, Recorded):
                        response.already_recorded += verdict.already
                        if latest is None or latest.position < verdict.position:
                            latest = verdict
                    else:
                        self.reject(sent[index], verdict)
                response.rejections.sort(key=lambda rejection: rejection.index)
            response.accepted = self.votes - response.already_recorded - len(response.rejections)
            if latest:
                response.consistency_token = token(self.poll.poll_id, latest.version, latest.log_epoch)
        return response
