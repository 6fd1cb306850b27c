"""The intake: reads streams of votes for the ballot box and of voters for the roll, a bounded number of bytes at once.

A long request is read entry by entry, with pauses in which the other calls of the server go on.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from math import inf
from typing import Any
from uuid import UUID

import grpc
from google.protobuf.message import DecodeError
from prometheus_client import Gauge
from tally.command.v1 import command_service_pb2 as pb
from tally.poll.v1.error_reason_pb2 import ErrorReason

from command_server.ballot_box import BallotBox
from command_server.ballot_queue import Recorded, Verdicts
from command_server.ballots import Envelope, Reader, keyed
from command_server.poll import is_idempotency_key
from command_server.polls import Poll, Polls
from command_server.roll import Roll
from contracts.freshness import token
from contracts.refusals import Refusal
from contracts.text import voter_id_problem
from contracts.voters import VoterKeys
from runtime import wire
from runtime.serving import check, read_message
from runtime.wire import InvalidMessage, Pauses

# The calls of CastVotes and of RegisterVoters that may be open at once. A request has up to 2 and 4 MB in memory while
# it waits for the database.
MAX_VOTE_STREAMS = 128
MAX_ROLL_STREAMS = 64
# The bytes of CastVotes requests that may be under way at once, of which each stream has an equal share, and the
# requests of one stream. But each stream may always have one.
BYTES_IN_FLIGHT = 64 << 20
REQUESTS_IN_FLIGHT = 24
# Bytes of all requests that wait to be read entry by entry.
BYTES_WAITING = 32 << 20
# What a vote under way takes in memory, beside its place in the request.
_VOTE_BYTES = 150
# The rejections of a batch that are explained: so an answer has 300 kB at most.
MAX_EXPLAINED = 1_000
# A larger vote is looked into before it is read.
_LARGE_VOTE_BYTES = 1 << 12
# Broken entries of which a refusal tells.
_MAX_BROKEN = 20
_MAX_WEIGHT = 1_000_000

_streams = Gauge("tally_streams_open", "Calls of CastVotes and RegisterVoters that are open.", ["rpc"])
_bytes = Gauge("tally_stream_bytes_in_flight", "Bytes of CastVotes requests that were read and are not answered.")


class Intake:
    """Takes the requests of streams; one for each server."""

    def __init__(self, polls: Polls, box: BallotBox, roll: Roll, voters: VoterKeys) -> None:
        self._polls = polls
        self._box = box
        self._roll = roll
        self._voters = voters
        self._reader = Reader(voters)
        self._streams = Counter[str]()
        # What is read entry by entry takes its turn: the pieces of one request are in memory, not those of all. And the
        # bytes of those that wait for it.
        self._reading = asyncio.Lock()
        self._waiting = 0

    async def cast_votes(
        self, requests: AsyncIterator[bytes], write: Callable[[bytes], Awaitable[None]], deadline: float
    ) -> None:
        """Casts the votes of a stream's requests and answers these in order. The callers wait until `deadline`, by the
        loop's clock. Raises OVERLOADED where too many streams are open."""
        under_way: asyncio.Queue[_Batch | Exception | None] = asyncio.Queue()
        unanswered: deque[_Batch] = deque()
        answered = asyncio.Event()
        in_flight = 0

        def count(change: int) -> None:
            nonlocal in_flight
            in_flight += change
            _bytes.inc(change)

        async def read() -> None:
            try:
                while True:
                    while in_flight and (
                        in_flight >= BYTES_IN_FLIGHT // self._streams["CastVotes"]
                        or len(unanswered) >= REQUESTS_IN_FLIGHT
                    ):
                        answered.clear()
                        await answered.wait()
                    request = await anext(requests, None)
                    if request is None:
                        break
                    batch, poll, ballots = await self._read_batch(request)
                    # Not to be kept while this waits for room, and then for the next one.
                    del request
                    if poll and ballots:
                        batch.verdicts = await self._box.cast_all(poll, ballots, deadline)
                    del ballots
                    unanswered.append(batch)
                    count(batch.bytes)
                    under_way.put_nowait(batch)
            except Exception as error:  # noqa: BLE001 - what came before it is answered first
                under_way.put_nowait(error)
            under_way.put_nowait(None)

        with self._open_stream("CastVotes", MAX_VOTE_STREAMS):
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(read())
                    while (batch := await under_way.get()) is not None:
                        if isinstance(batch, Exception):
                            raise batch
                        await write(await batch.answer())
                        unanswered.popleft()
                        count(-batch.bytes)
                        answered.set()
            finally:
                for batch in unanswered:
                    batch.abandon()
                count(-in_flight)

    async def register_voters(self, requests: AsyncIterator[bytes]) -> pb.RegisterVotersResponse:
        """Puts the voters of a stream's requests on the roll. Raises OVERLOADED where too many streams are open."""
        response, poll_id = pb.RegisterVotersResponse(), ""
        with self._open_stream("RegisterVoters", MAX_ROLL_STREAMS):
            while (data := await anext(requests, None)) is not None:
                request, weights, voters, others = await self._read_voters(data)
                del data
                if poll_id not in ("", request.poll_id):
                    raise InvalidMessage({"poll_id": "must be the same in all requests of a call"})
                poll_id = request.poll_id
                registered = await self._roll.register(UUID(poll_id), weights)
                response.registered += registered.voters
                response.already_registered += voters - registered.voters
                response.other_weights += registered.other_weights + others
                response.consistency_token = token(UUID(poll_id), registered.version, registered.log_epoch)
        return response

    @contextmanager
    def _open_stream(self, rpc: str, most: int) -> Iterator[None]:
        if self._streams[rpc] >= most:
            message = f"{most} calls of {rpc} are open at this server; try again"
            raise Refusal(ErrorReason.ERROR_REASON_OVERLOADED, message)
        self._streams[rpc] += 1
        _streams.labels(rpc).inc()
        try:
            yield
        finally:
            self._streams[rpc] -= 1
            _streams.labels(rpc).dec()

    @asynccontextmanager
    async def _turn(self, data: bytes) -> AsyncIterator[None]:
        """The turn of a request to be read entry by entry. Raises OVERLOADED where too much waits for that."""
        if self._waiting and self._waiting + len(data) > BYTES_WAITING:
            raise Refusal(ErrorReason.ERROR_REASON_OVERLOADED, "too many large requests wait to be read; try again")
        self._waiting += len(data)
        try:
            async with self._reading:
                yield
        finally:
            self._waiting -= len(data)

    async def _read_batch(self, data: bytes) -> "tuple[_Batch, Poll | None, list[bytes]]":
        """A request with the ballots of its valid votes; the others are rejected one by one."""
        envelope, entries = self._reader.envelope(data), None
        if envelope is None:
            # Not what nearly all requests are.
            rest, entries = await self._split(data)
            request = read_message(pb.CastVotesRequest, rest)
            envelope = Envelope(request.batch_sequence, request.poll_id, len(entries), request.idempotency_key)
        most = wire.most_entries(pb.CastVotesRequest.DESCRIPTOR, "votes")
        if envelope.votes > most:
            raise InvalidMessage({"votes": wire.too_many(most)})
        key = envelope.idempotency_key
        if self._polls.known(envelope.poll_id) is None or not envelope.votes or (key and not is_idempotency_key(key)):
            votes = [pb.Vote()] * min(envelope.votes, 1)
            check(pb.CastVotesRequest(poll_id=envelope.poll_id, votes=votes, idempotency_key=key))
        batch = _Batch(envelope.batch_sequence, envelope.votes, len(data))
        try:
            poll = await self._polls.find(envelope.poll_id)
        except Refusal as refusal:
            for index in range(envelope.votes):
                batch.reject(index, refusal)
            return batch, None, []
        batch.poll = poll
        marked: list[bytes | None] = [None] * envelope.votes
        if entries is None:
            marked = self._reader.mark(data, poll.markings, key)
        if None in marked:
            if entries is None:
                _, entries = await self._split(data)
            async with self._turn(data):
                pauses = Pauses()
                for index, entry in enumerate(entries):
                    if marked[index] is None:
                        try:
                            marked[index] = self._ballot(entry, poll, key)
                        except Refusal as refusal:
                            batch.reject(index, refusal)
                        await pauses.pause()
        return batch, poll, [ballot for ballot in marked if ballot is not None]

    async def _split(self, data: bytes) -> tuple[bytes, list[bytes]]:
        async with self._turn(data):
            return await wire.split(data, pb.CastVotesRequest.DESCRIPTOR, "votes", Pauses())

    def _ballot(self, entry: bytes, poll: Poll, idempotency_key: str) -> bytes:
        if len(entry) > _LARGE_VOTE_BYTES and (found := wire.excess(entry, pb.Vote.DESCRIPTOR)):
            [(field, rule)] = found.items()
            raise Refusal(ErrorReason.ERROR_REASON_INVALID_REQUEST, f"{field}: {rule}")
        vote = _read_entry(pb.Vote, entry)
        voter_key = self._voters.voter_key(vote.voter_id)
        ballot = voter_key + poll.mark(vote.option_ids)
        if idempotency_key:
            ballot += keyed(self._voters.idempotency_hash(voter_key, idempotency_key))
        return ballot

    async def _read_voters(self, data: bytes) -> tuple[pb.RegisterVotersRequest, dict[bytes, int], int, int]:
        """The request without its voters, voter key → weight, the number of voters as they came, and of those who came
        again with another weight."""
        async with self._turn(data):
            pauses = Pauses()
            rest, entries = await wire.split(data, pb.RegisterVotersRequest.DESCRIPTOR, "voters", pauses)
            request = read_message(pb.RegisterVotersRequest, rest)
            check(pb.RegisterVotersRequest(poll_id=request.poll_id, voters=[pb.Voter()] * min(len(entries), 1)))
            weights: dict[bytes, int] = {}
            others = 0
            broken: dict[str, str] = {}
            for index, entry in enumerate(entries):
                voter = _read_entry(pb.Voter, entry)
                if problem := voter_id_problem(voter.voter_id):
                    broken[f"voters[{index}].voter_id"] = problem
                if voter.weight > _MAX_WEIGHT:
                    broken[f"voters[{index}].weight"] = f"must be at most {_MAX_WEIGHT:,}"
                if len(broken) >= _MAX_BROKEN:
                    break
                if not broken:
                    # The first of several entries for one voter is the one that counts.
                    key, weight = self._voters.voter_key(voter.voter_id), voter.weight or 1
                    others += weights.setdefault(key, weight) != weight
                await pauses.pause()
            if broken:
                raise InvalidMessage(broken)
        return request, weights, len(entries), others


def deadline_of(context: "grpc.aio.ServicerContext[Any, Any]") -> float:
    """When the caller stops waiting, by the loop's clock."""
    remaining = context.time_remaining()
    return inf if remaining is None else asyncio.get_running_loop().time() + remaining


def _read_entry(kind: Any, entry: bytes) -> Any:
    try:
        return kind.FromString(entry)
    except DecodeError:
        raise InvalidMessage({"": "is not a valid message of its type"}) from None


class _Batch:
    """A CastVotesRequest under way: its answer, with the votes that were rejected at once, and the others' verdicts to
    come."""

    def __init__(self, sequence: int, votes: int, size: int) -> None:
        self.votes = votes
        self.bytes = size + votes * _VOTE_BYTES
        self.poll: Poll | None = None
        self.verdicts: asyncio.Future[Verdicts] | None = None
        self._sequence = sequence
        self._rejected: dict[int, tuple[ErrorReason.ValueType, str]] = {}

    def reject(self, index: int, refusal: Refusal) -> None:
        """Says why a vote does not count. The refusal is not kept: its traceback would keep the request."""
        message = refusal.message if len(self._rejected) < MAX_EXPLAINED else ""
        self._rejected[index] = (refusal.reason, message)

    def abandon(self) -> None:
        """Its caller has gone: a vote of it that waits for its turn takes the place of none."""
        if self.verdicts is not None:
            self.verdicts.cancel()

    async def answer(self) -> bytes:
        """The answer, serialized, once all votes are judged."""
        response = pb.CastVotesResponse(batch_sequence=self._sequence)
        pauses = Pauses()
        if self.verdicts is not None and self.poll is not None:
            recorded, others = await self.verdicts
            latest = recorded
            if others:
                # Verdicts count the ballots that were submitted; the caller counts the votes it sent.
                sent = [index for index in range(self.votes) if index not in self._rejected]
                for index, verdict in others.items():
                    if isinstance(verdict, Recorded):
                        response.already_recorded += verdict.already
                        if latest is None or latest.position < verdict.position:
                            latest = verdict
                    else:
                        self.reject(sent[index], verdict)
                    await pauses.pause()
            if latest:
                response.consistency_token = token(self.poll.poll_id, latest.version, latest.log_epoch)
        response.accepted = self.votes - response.already_recorded - len(self._rejected)
        for index in sorted(self._rejected):
            reason, message = self._rejected[index]
            response.rejections.add(index=index, reason=reason, message=message)
            await pauses.pause()
        self._rejected.clear()
        return response.SerializeToString()
