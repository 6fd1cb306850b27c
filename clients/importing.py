"""The import of a file of ballots: one poll, every row cast through CastVotes, no ballot counted twice."""

import asyncio
import signal
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import grpc
from tally.command.v1.command_service_pb2 import (
    CastVotesRequest,
    CastVotesResponse,
    ClosePollRequest,
    CreatePollRequest,
    OpenPollRequest,
)
from tally.poll.v1.error_reason_pb2 import ErrorReason
from tally.poll.v1.poll_pb2 import PollOption, PollSpec, ResultsVisibility, VotingMethod
from tally.query.v1.query_service_pb2 import GetPollRequest, GetResultsRequest, Results

from clients.ballots import Ballot, BallotFile, Survey, label, option_id
from clients.batches import divided
from clients.charts import state_name
from clients.connection import CommandServer, Patience, QueryServer, Refused, is_transient, not_opened
from clients.failures import Failure
from clients.idempotency import idempotency_key
from clients.progress import Progress
from clients.watchers import ENDED, watch

if TYPE_CHECKING:
    CastVotesCall = grpc.aio.StreamStreamCall[CastVotesRequest, CastVotesResponse]

# Batches that are read from the file ahead of the stream.
_READ_AHEAD = 2
# A server that owes an answer for so long is given up, and its batches go to a new stream.
_ANSWER_SECONDS = 30.0
# After an interrupt, answers to what was sent are awaited for so long.
_DRAIN_SECONDS = 10.0
# An outcome keeps this many rejections; each is reported when it comes.
_KEPT_REJECTIONS = 10_000
_CHART_INTERVAL = 0.1

_IDENTITY = uuid.UUID("3f0d8a9c-5d0e-4f57-9d6b-6a1f0c1f7b52")
# Unspecified means live, and keeps the request the same that earlier versions sent for the same import.
_VISIBILITIES = {
    True: ResultsVisibility.RESULTS_VISIBILITY_AFTER_CLOSE,
    False: ResultsVisibility.RESULTS_VISIBILITY_UNSPECIFIED,
}
# Reasons that say nothing about a row: the poll takes no votes.
_POLL_REASONS = {ErrorReason.ERROR_REASON_POLL_NOT_OPEN, ErrorReason.ERROR_REASON_POLL_NOT_FOUND}


class PollTakesNoVotes(Failure):
    """The poll is closed, not open yet, or not there: to go on with it is useless."""


class Rejection(NamedTuple):
    """A row that does not count; `reason` is the name of a tally.poll.v1.ErrorReason."""

    line: int
    reason: str
    message: str


@dataclass
class Outcome:
    """How far an import has got. It is complete where there is no `failure` and it was not interrupted."""

    poll_id: str = ""
    closed: bool = False
    """The import closed the poll: every vote is recorded, and there is nothing to go on with."""
    accepted: int = 0
    already_recorded: int = 0
    rejected: int = 0
    rejections: list[Rejection] = field(default_factory=list)
    """The first 10,000."""
    seconds: float = 0.0
    """From the first batch to the last answer."""
    read_side_seconds: float | None = None
    """From the last answer until the results showed every vote."""
    results: Results | None = None
    results_hidden: bool = False
    """The poll shows no results before it is closed."""
    interrupted: bool = False
    failure: Failure | None = None

    @property
    def done(self) -> int:
        return self.accepted + self.already_recorded + self.rejected

    @property
    def votes_per_second(self) -> float:
        return (self.accepted + self.already_recorded) / self.seconds if self.seconds else 0.0

    @property
    def pace(self) -> str:
        return f"{self.votes_per_second:,.0f} votes/s"


@dataclass(frozen=True)
class Import:
    """What to import, and how. Without `poll_id`, the same content, title and columns lead to the same poll again."""

    file: BallotFile
    survey: Survey
    method: "VotingMethod.ValueType" = VotingMethod.VOTING_METHOD_SINGLE_CHOICE
    title: str = ""
    poll_id: str | None = None
    new_poll: bool = False
    batch_size: int = 2_000
    in_flight: int = 8
    close: bool = False
    watch: bool = False
    retry_for: float = 60.0
    results_after_close: bool = False

    async def run(self, commands: CommandServer, queries: QueryServer, outcome: Outcome, progress: Progress) -> None:
        """Opens the poll, casts every vote, waits for the read side; `outcome` says how far it got, also on failure.

        While votes are cast, a first SIGINT or SIGTERM ends the reading and waits for the answers to what was sent.
        """
        casting = _Casting(commands, outcome, progress, self.in_flight, self.retry_for)
        try:
            async with _interruptible(casting), asyncio.TaskGroup() as tasks:
                showing: asyncio.Task[None] | None = None
                try:
                    outcome.poll_id, token = await self._open_poll(commands, queries, outcome, progress)
                    progress.say(f"poll {outcome.poll_id}")
                    if self.watch:
                        showing = tasks.create_task(_show(queries, outcome.poll_id, token, progress))
                    ballots = self.file.ballots(self.survey)
                    await casting.run(batches(ballots, outcome.poll_id, self.batch_size, idempotency_key()))
                    if not outcome.failure and not outcome.interrupted:
                        await self._conclude(commands, queries, outcome, casting.tokens or [token], progress)
                except Failure as failure:
                    outcome.failure = failure
                finally:
                    if showing:
                        showing.cancel()
        except asyncio.CancelledError:
            if not outcome.interrupted:
                raise

    async def _open_poll(
        self, commands: CommandServer, queries: QueryServer, outcome: Outcome, progress: Progress
    ) -> tuple[str, str]:
        """The poll and its consistency token; of a poll that somebody else made, there is no token. The outcome names a
        poll that was created and not opened."""
        poll_id, token = self.poll_id, ""
        if poll_id is None:
            identity = uuid.uuid4() if self.new_poll else self.request_id
            create = CreatePollRequest(request_id=str(identity), poll=self._spec())
            try:
                created = await commands.call(
                    commands.stub.CreatePoll, create, retry_for=self.retry_for, on_lost=progress.lost
                )
            except Refused as error:
                if "request_id" not in str(error):
                    raise
                raise Failure(
                    "another version of tally imported this file into a poll with other options: --poll goes on with"
                    " that one, --new-poll imports the file into another"
                ) from None
            poll_id = created.poll_id
            opening = OpenPollRequest(request_id=str(uuid.uuid5(identity, "open")), poll_id=poll_id)
            try:
                opened = await commands.call(
                    commands.stub.OpenPoll, opening, retry_for=self.retry_for, on_lost=progress.lost
                )
            except Refused as error:
                outcome.poll_id = poll_id
                raise not_opened(poll_id, error) from None
            token = opened.consistency_token
        # Whether the poll takes votes is for the command server to say. But a poll never opens again: where the read
        # side knows that it is closed, that is said before a vote is sent.
        try:
            poll = (await queries.stub.GetPoll(GetPollRequest(poll_id=poll_id), timeout=2)).poll
        except grpc.aio.AioRpcError as error:
            refused = queries.refused(error)
            if refused.reason == "INVALID_REQUEST":
                raise refused from None
            return poll_id, token
        if poll.state in ENDED:
            hint = "" if self.poll_id else "; --new-poll imports the file into another one"
            raise PollTakesNoVotes(f"poll {poll_id} is {state_name(poll.state)} and takes no more votes{hint}")
        return poll_id, token

    async def _conclude(
        self,
        commands: CommandServer,
        queries: QueryServer,
        outcome: Outcome,
        tokens: Iterable[str],
        progress: Progress,
    ) -> None:
        if self.close:
            close = ClosePollRequest(request_id=str(uuid.uuid4()), poll_id=outcome.poll_id)
            answer = await commands.call(
                commands.stub.ClosePoll, close, retry_for=self.retry_for, on_lost=progress.lost
            )
            tokens = [answer.consistency_token]
            outcome.closed = True
        clock = asyncio.get_running_loop().time
        started = clock()
        for token in tokens:
            request = GetResultsRequest(poll_id=outcome.poll_id, at_least_as_fresh=token)
            try:
                response = await queries.call(
                    queries.stub.GetResults, request, retry_for=self.retry_for, on_lost=progress.lost
                )
            except Refused as refused:
                # It is said of this version: the read side has all votes, and keeps to itself what they come to.
                if refused.reason != "RESULTS_HIDDEN":
                    raise
                outcome.results_hidden = True
                continue
            if outcome.results is None or response.results.version > outcome.results.version:
                outcome.results = response.results
        outcome.read_side_seconds = clock() - started

    @property
    def request_id(self) -> uuid.UUID:
        """The request_id of the poll's creation: the same import has the same one, and so the same poll."""
        columns = "\1".join(self.file.choice_columns)
        parts = [self.survey.digest, self.title, columns, self.file.voter_column or "", *sorted(self.file.ignored)]
        parts += ["results after close"] if self.results_after_close else []
        parts += self.file.ways
        return uuid.uuid5(_IDENTITY, "\0".join([VotingMethod.Name(self.method), *parts]))

    def _spec(self) -> PollSpec:
        return PollSpec(
            title=self.title,
            method=self.method,
            options=[PollOption(option_id=option_id(name), label=label(name)) for name in self.survey.choices],
            results_visibility=_VISIBILITIES[self.results_after_close],
        )


class Batch(NamedTuple):
    """Votes that travel together: `lines` has the line of each. `faulty` rows are not worth sending."""

    request: CastVotesRequest
    lines: list[int]
    faulty: list[Rejection]


def batches(ballots: Iterator[Ballot], poll_id: str, size: int, idempotency_key: str = "") -> Iterator[Batch]:
    """The ballots in batches of up to `size` rows that the server's limit of 4 MiB allows."""

    def build(good: Sequence[Ballot]) -> CastVotesRequest:
        request = CastVotesRequest(poll_id=poll_id, idempotency_key=idempotency_key)
        add = request.votes.add
        for _, voter_id, option_ids, _ in good:
            vote = add()
            vote.voter_id = voter_id
            vote.option_ids.extend(option_ids)
        return request

    while rows := list(islice(ballots, size)):
        faulty = [Rejection(line, "INVALID_REQUEST", fault) for line, _, _, fault in rows if fault]
        for request, part in divided([ballot for ballot in rows if not ballot[3]], build):
            yield Batch(request, [ballot[0] for ballot in part], faulty)
            faulty = []


class _Casting:
    """Casts batches over a stream, several under way; where the stream breaks, over a new one."""

    def __init__(
        self, commands: CommandServer, outcome: Outcome, progress: Progress, in_flight: int, retry_for: float
    ) -> None:
        self.outcome = outcome
        self.running = False
        self.stop = asyncio.Event()
        # Batches that are under way together may be recorded in any order, so the newest of this many tokens is the
        # newest of all.
        self.tokens: deque[str] = deque(maxlen=in_flight)
        self._commands = commands
        self._progress = progress
        self._in_flight = in_flight
        self._retry_for = retry_for
        self._read_ahead: asyncio.Queue[Batch | None] = asyncio.Queue(_READ_AHEAD)
        self._all_taken = False
        self._unanswered: deque[Batch] = deque()
        self._room = asyncio.Event()
        self._sequence = 0
        self._started = 0.0

    async def run(self, source: Iterator[Batch]) -> None:
        """Returns when every batch is answered, or sets the outcome's failure."""
        self._started = asyncio.get_running_loop().time()
        self.running = True
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(self._read(source))
            try:
                await self._deliver(tasks)
            except Failure as failure:
                self.outcome.failure = failure
            reading.cancel()
        self.running = False

    async def _read(self, source: Iterator[Batch]) -> None:
        try:
            while not self.stop.is_set() and (batch := await asyncio.to_thread(next, source, None)):
                await self._read_ahead.put(batch)
        except Failure as failure:
            # What was read before is cast all the same.
            self.outcome.failure = failure
        await self._read_ahead.put(None)

    async def _deliver(self, tasks: asyncio.TaskGroup) -> None:
        patience = Patience(self._retry_for)
        while True:
            trouble: Failure
            call = self._commands.stub.CastVotes()
            sending = tasks.create_task(self._send(call))
            try:
                await self._receive(call, patience)
                return
            except grpc.aio.AioRpcError as error:
                trouble = self._commands.refused(error)
                pause = patience.pause(error) if is_transient(error) else None
            except OSError as error:
                trouble = Failure(str(error) or f"the command server did not answer within {_ANSWER_SECONDS:g} s")
                pause = patience.pause()
            finally:
                sending.cancel()
                call.cancel()
            await asyncio.wait([sending])
            if pause is None or self.stop.is_set():
                raise trouble
            self._progress.lost(f"{trouble}; trying again")
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self.stop.wait()

    async def _send(self, call: "CastVotesCall") -> None:
        # A call that broke says why to whoever reads its answers.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            for batch in list(self._unanswered):
                await call.write(batch.request)
            while not self._all_taken:
                while len(self._unanswered) >= self._in_flight:
                    self._room.clear()
                    await self._room.wait()
                next_batch = await self._read_ahead.get()
                if next_batch is None:
                    self._all_taken = True
                elif self._take(next_batch):
                    await call.write(next_batch.request)
            await call.done_writing()

    def _take(self, batch: Batch) -> bool:
        self._reject(batch.faulty)
        if batch.lines:
            self._sequence += 1
            batch.request.batch_sequence = self._sequence
            self._unanswered.append(batch)
        return bool(batch.lines)

    async def _receive(self, call: "CastVotesCall", patience: Patience) -> None:
        while True:
            async with asyncio.timeout(_ANSWER_SECONDS):
                response = await call.read()
            if isinstance(response, CastVotesResponse):
                patience.renew()
                self._answered(response)
            elif self._all_taken and not self._unanswered:
                return
            else:
                raise ConnectionError("the command server ended the stream")

    def _answered(self, response: CastVotesResponse) -> None:
        if not self._unanswered or self._unanswered[0].request.batch_sequence != response.batch_sequence:
            raise Failure(f"the command server answered batch {response.batch_sequence} out of turn")
        batch = self._unanswered.popleft()
        self._room.set()
        if response.consistency_token:
            self.tokens.append(response.consistency_token)
        self.outcome.accepted += response.accepted
        self.outcome.already_recorded += response.already_recorded
        self.outcome.seconds = asyncio.get_running_loop().time() - self._started
        for refused in response.rejections:
            if refused.reason in _POLL_REASONS:
                raise PollTakesNoVotes(f"{_reason_name(refused.reason)}: {refused.message}")
        self._reject([Rejection(batch.lines[r.index], _reason_name(r.reason), r.message) for r in response.rejections])
        self._progress.went_on()

    def _reject(self, rejections: Sequence[Rejection]) -> None:
        kept = self.outcome.rejections
        kept.extend(rejections[: _KEPT_REJECTIONS - len(kept)])
        self.outcome.rejected += len(rejections)
        if rejections:
            self._progress.say("\n".join(f"line {r.line}: {r.reason}: {r.message}" for r in rejections))


@asynccontextmanager
async def _interruptible(casting: _Casting) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    deadline: asyncio.TimerHandle | None = None

    def interrupt() -> None:
        nonlocal deadline
        first = not casting.outcome.interrupted
        casting.outcome.interrupted = True
        if first and casting.running:
            casting.stop.set()
            deadline = loop.call_later(_DRAIN_SECONDS, task.cancel)
        else:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        yield
    finally:
        if deadline:
            deadline.cancel()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _show(queries: QueryServer, poll_id: str, token: str, progress: Progress) -> None:
    # Without live results the import goes on; where the read side stays away, its end says so.
    with suppress(Failure):
        changes = watch(queries, poll_id, min_interval=_CHART_INTERVAL, at_least_as_fresh=token)
        async with aclosing(changes):
            async for results in changes:
                progress.counted(results)


def _reason_name(reason: "ErrorReason.ValueType") -> str:
    # A newer server may have reasons that this client does not know.
    known = reason in ErrorReason.values()
    return ErrorReason.Name(reason).removeprefix("ERROR_REASON_") if known else str(reason)
