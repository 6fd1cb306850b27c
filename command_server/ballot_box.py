"""The ballot box: collects ballots, and commits those of one poll together with their event.

Group commit: ballots that arrive while commits are under way form the next batch. A batch is one
transaction: the votes go in first, by COPY, without any lock but that of their own keys; only then is the poll's row
locked, to check that it is open and to take the next version for the event.
"""

import asyncio
import secrets
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import chain
from typing import NamedTuple

import asyncpg
import structlog
from asyncpg.pgproto.pgproto import UUID
from google.protobuf.timestamp_pb2 import Timestamp
from prometheus_client import Counter as Count
from prometheus_client import Gauge, Histogram
from tally.event.v1.event_pb2 import Event
from tally.poll.v1.error_reason_pb2 import ErrorReason

from command_server import ballots
from command_server.poll import CLOSED, OPEN, already_voted, not_eligible, not_open
from command_server.polls import Poll, Polls
from contracts.refusals import Refusal
from runtime.failpoints import failpoint
from runtime.lifecycle import Backoff
from runtime.postgres import POOL_SECONDS, UNAVAILABLE, queries

log = structlog.get_logger()
sql = queries(__package__)

# Commits under way at once: while one waits for the disk, the next one copies its rows.
COMMITTERS = 3
# Ballots of one poll wait for its commit under way to end, unless there are so many that a further one is worth its
# cost. Fewer, larger commits are cheaper for everybody.
OVERLAP_BALLOTS = 30_000
# The most ballots of one commit, and their most bytes: its event must fit a message of the bus.
BATCH_BALLOTS = 60_000
BATCH_BYTES = 1 << 21
# Up to so many ballots go in one round trip instead of four, by a function of the database.
SMALL_BATCH = 200
# After a small commit the next one of its poll begins so many seconds later for each of its ballots, up to a limit.
# While fewer than 2,500 votes a second come, no vote waits longer for that than for the commit under way; above that,
# the pauses grow to the limit: larger batches, and more of the processors for the calls.
PACE_SECONDS_PER_BALLOT = 0.0004
PACE_SECONDS = 0.004
# The most ballots that wait: about 100 bytes each, and two more for each choice of an approval.
CAPACITY = 400_000
# One attempt to commit, all attempts together, and how long a ballot may wait for its commit to begin, in seconds.
ATTEMPT_SECONDS = 10.0
PATIENCE_SECONDS = 15.0
WAIT_SECONDS = 15.0

_votes = Count("tally_votes_recorded", "Votes made durable.")
_batch_votes = Histogram("tally_commit_votes", "Votes in one commit.", buckets=[4**power for power in range(9)])
_commit_seconds = Histogram("tally_commit_seconds", "Time of one commit, with its retries.")
_waiting = Gauge("tally_votes_waiting", "Votes in the queue.")
_failures = Count("tally_commit_failures", "Attempts to commit that failed.")
_duplicates = Count("tally_commit_duplicates", "Batches that held a voter who had voted before.")


# SQLSTATE of log_votes where the poll takes no votes.
_NOT_OPEN = "TA001"


class Recorded(NamedTuple):
    """A vote that counts: the event that counts it, and whether an earlier call had recorded it."""

    version: int
    recorded_at: Timestamp
    already: bool


Verdict = Recorded | Refusal


class Verdicts(NamedTuple):
    """What became of some ballots: `recorded` of all but those in `others`, by index."""

    recorded: Recorded | None
    others: Mapping[int, Verdict]

    def part(self, start: int, length: int) -> "Verdicts":
        """What became of the ballots from `start` on."""
        if not self.others:
            return self
        return Verdicts(self.recorded, {i: self.others[start + i] for i in range(length) if start + i in self.others})

    def of(self, index: int) -> Verdict:
        """What became of one ballot."""
        verdict = self.others.get(index, self.recorded)
        assert verdict is not None, "a ballot without a verdict"
        return verdict


class _Submission(NamedTuple):
    ballots: Sequence[bytes]
    verdicts: "asyncio.Future[Verdicts]"
    # When it came, by the loop's clock.
    since: float


class _Queue:
    """The ballots of one poll that wait for a commit."""

    def __init__(self, poll: Poll) -> None:
        self.poll = poll
        self.submissions: deque[_Submission] = deque()
        self.ballots = 0
        # How many commits of this poll are under way, and whether it waits for a committer.
        self.committing = 0
        self.offered = False
        # Whether the pause after the latest commit is still to end.
        self.paced = False

    @property
    def due(self) -> bool:
        """Whether another commit should begin."""
        if self.offered or not self.submissions or (self.paced and self.ballots < SMALL_BATCH):
            return False
        # Where a later vote replaces an earlier one, commits keep the order in which the votes came.
        overlap = self.ballots >= OVERLAP_BALLOTS and not self.poll.spec.allow_vote_change
        return self.committing == 0 or overlap

    def put(self, submission: _Submission) -> None:
        self.submissions.append(submission)
        self.ballots += len(submission.ballots)

    def take(self) -> list[_Submission]:
        """The submissions of the next commit."""
        taken: list[_Submission] = []
        ballots = size = 0
        while self.submissions:
            following = self.submissions[0].ballots
            ballots += len(following)
            size += sum(map(len, following))
            if taken and (ballots > BATCH_BALLOTS or size > BATCH_BYTES):
                break
            taken.append(self.submissions.popleft())
        self.ballots -= sum(len(submission.ballots) for submission in taken)
        return taken


class BallotBox:
    """Takes ballots of any poll and says what became of them, once that is durable."""

    def __init__(self, pool: asyncpg.Pool, polls: Polls) -> None:
        self._pool = pool
        self._polls = polls
        # Polls with ballots that wait, or a commit under way; by poll_no and the state in which the poll was found. A
        # ballot for a draft must not wait together with one for the poll once it is open: its options were others.
        self._queues: dict[tuple[int, str], _Queue] = {}
        # Those that are due, each once, in the order in which they are served.
        self._ready: asyncio.Queue[_Queue] = asyncio.Queue()
        # Connections that worked last time; at most one for each committer.
        self._idle: list[asyncpg.Connection] = []
        # By poll_no: polls with a queue whose latest batch held voters who had voted before. So may the next.
        self._repeating: set[int] = set()
        self._ballots = 0
        self._room = asyncio.Condition()

    async def run(self) -> None:
        """Commits until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(COMMITTERS):
                tasks.create_task(self._commit_forever())

    async def drain(self) -> None:
        """Returns when no ballot waits any more."""
        async with self._room:
            await self._room.wait_for(lambda: self._ballots == 0)

    def cast(self, poll: Poll, ballot: bytes) -> "asyncio.Future[Verdicts]":
        """Accepts one ballot, and returns the future that says what became of it. Raises OVERLOADED where the queue is
        full."""
        if self._ballots >= CAPACITY:
            raise Refusal(ErrorReason.ERROR_REASON_OVERLOADED, "too many votes wait to be recorded; try again")
        return self._submit(poll, (ballot,))

    async def cast_all(self, poll: Poll, batch: Sequence[bytes]) -> "asyncio.Future[Verdicts]":
        """Waits for room, accepts the ballots, and returns the future that says what became of them."""
        if self._ballots >= CAPACITY:
            async with self._room:
                await self._room.wait_for(lambda: self._ballots < CAPACITY)
        return self._submit(poll, batch)

    def _submit(self, poll: Poll, batch: Sequence[bytes]) -> "asyncio.Future[Verdicts]":
        loop = asyncio.get_running_loop()
        verdicts: asyncio.Future[Verdicts] = loop.create_future()
        queue = self._queues.get((poll.poll_no, poll.state))
        if queue is None:
            queue = self._queues[poll.poll_no, poll.state] = _Queue(poll)
        queue.put(_Submission(batch, verdicts, loop.time()))
        self._ballots += len(batch)
        self._offer(queue)
        return verdicts

    def _offer(self, queue: _Queue) -> None:
        if queue.due:
            queue.offered = True
            self._ready.put_nowait(queue)

    async def _commit_forever(self) -> None:
        while True:
            queue = await self._ready.get()
            # Ballots whose requests have arrived, but were not read yet, come into this batch too.
            await asyncio.sleep(0)
            queue.offered = False
            submissions = queue.take()
            queue.committing += 1
            if not queue.paced:
                queue.paced = True
                taken = sum(len(submission.ballots) for submission in submissions)
                pause = min(PACE_SECONDS_PER_BALLOT * taken, PACE_SECONDS)
                asyncio.get_running_loop().call_later(pause, self._end_pace, queue)
            self._offer(queue)
            _waiting.set(self._ballots)
            try:
                with _commit_seconds.time():
                    await self._commit(queue.poll, self._in_time(submissions))
            finally:
                queue.committing -= 1
                self._offer(queue)
                self._forget_if_idle(queue)
                async with self._room:
                    self._ballots -= sum(len(submission.ballots) for submission in submissions)
                    self._room.notify_all()

    def _end_pace(self, queue: _Queue) -> None:
        queue.paced = False
        self._offer(queue)
        self._forget_if_idle(queue)

    def _forget_if_idle(self, queue: _Queue) -> None:
        if not (queue.submissions or queue.committing or queue.paced):
            del self._queues[queue.poll.poll_no, queue.poll.state]
            self._repeating.discard(queue.poll.poll_no)

    def _in_time(self, submissions: Sequence[_Submission]) -> Sequence[_Submission]:
        """Those that somebody still waits for; the others are given up, unrecorded."""
        oldest = asyncio.get_running_loop().time() - WAIT_SECONDS
        for submission in submissions:
            if submission.since < oldest and not submission.verdicts.done():
                submission.verdicts.set_exception(TimeoutError("no commit began in time"))
        return [submission for submission in submissions if not submission.verdicts.done()]

    async def _commit(self, poll: Poll, submissions: Sequence[_Submission]) -> None:
        if not submissions:
            return
        try:
            batch = list(chain.from_iterable(submission.ballots for submission in submissions))
            if poll.spec.allow_vote_change:
                verdicts = await self._record_in_turn(poll, batch)
            else:
                verdicts = await self._record(poll, batch)
        except Exception as error:
            if not isinstance(error, UNAVAILABLE):
                log.error("defect", exc_info=error)
            for submission in submissions:
                if not submission.verdicts.done():
                    submission.verdicts.set_exception(error)
            return
        start = 0
        for submission in submissions:
            # A caller that went away has cancelled its future; its votes count all the same.
            if not submission.verdicts.done():
                submission.verdicts.set_result(verdicts.part(start, len(submission.ballots)))
            start += len(submission.ballots)

    async def _record_in_turn(self, poll: Poll, batch: Sequence[bytes]) -> Verdicts:
        """A batch in which a voter may vote several times: each of these votes gets a commit, so the log keeps it."""
        turns: list[list[int]] = []
        votes = Counter[bytes]()
        for index, ballot in enumerate(batch):
            key = ballots.voter(ballot)
            if votes[key] == len(turns):
                turns.append([])
            turns[votes[key]].append(index)
            votes[key] += 1
        others: dict[int, Verdict] = {}
        for turn in turns:
            verdicts = await self._record(poll, [batch[index] for index in turn])
            others.update((index, verdicts.of(place)) for place, index in enumerate(turn))
        return Verdicts(None, others)

    async def _record(self, poll: Poll, batch: Sequence[bytes]) -> Verdicts:
        """Tries until the batch is durable or patience ends. Whether a failed attempt took effect is unknown; the next
        one finds out, because its rows would carry this batch_id."""
        batch_id = secrets.randbits(63)
        backoff = Backoff(longest=0.5)
        all_new = not (poll.has_roll or poll.poll_no in self._repeating)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                try:
                    async with asyncio.timeout(ATTEMPT_SECONDS), self._connection() as connection:
                        if poll.state != OPEN:
                            return await self._record_none(connection, poll, batch_id, batch)
                        if all_new:
                            return Verdicts(await self._record_new(connection, poll, batch_id, batch), {})
                        if poll.spec.allow_vote_change:
                            return await self._replace_some(connection, poll, batch_id, batch)
                        return await self._record_some(connection, poll, batch_id, batch)
                except asyncpg.UniqueViolationError as error:
                    if error.constraint_name != "votes_pkey":
                        raise
                    self._repeating.add(poll.poll_no)
                    all_new = False
                except (*UNAVAILABLE, asyncpg.DeadlockDetectedError) as error:
                    _failures.inc()
                    log.warning("commit failed", error=repr(error), votes=len(batch), failures=backoff.failures + 1)
                    await backoff.wait()
                except asyncpg.PostgresError as error:
                    if error.sqlstate != _NOT_OPEN:
                        raise
                    self._polls.forget(poll)
                    poll = poll._replace(state=CLOSED)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[asyncpg.Connection]:
        """A connection for one attempt, kept for the next one after a success: the way through the pool would cost each
        small commit several turns of the loop."""
        connection = self._idle.pop() if self._idle else None
        if connection is None or connection.is_closed():
            connection = await self._pool.acquire(timeout=POOL_SECONDS)
        try:
            yield connection
        except BaseException:
            await self._pool.release(connection, timeout=POOL_SECONDS)
            raise
        self._idle.append(connection)

    async def _record_new(
        self,
        connection: asyncpg.Connection,
        poll: Poll,
        batch_id: int,
        batch: Sequence[bytes],
        weights: Mapping[bytes, int] | None = None,
    ) -> Recorded:
        """Votes of voters who have none. Fails with UniqueViolationError where one has.

        They are sorted by key, so that two batches with the same voters wait for each other in one order and never
        deadlock.
        """
        batch = sorted(batch)
        payload = Event(votes_cast=ballots.votes_cast(batch_id, batch, weights)).SerializeToString()
        if len(batch) <= SMALL_BATCH:
            columns = _columns(poll, batch)
            row = await connection.fetchrow(sql.record_votes, poll.poll_no, batch_id, *columns, payload)
        else:
            async with connection.transaction():
                await connection.copy_to_table(
                    "votes",
                    source=_chunks(ballots.copy_rows(poll.poll_no, batch_id, batch)),
                    columns=ballots.COPY_COLUMNS,
                    format="binary",
                )
                row = await connection.fetchrow(sql.log_votes, poll.poll_no, batch_id, payload)
                failpoint("command.before_commit")
        failpoint("command.after_commit")
        _count(len(batch))
        return _recorded(row)

    async def _record_some(
        self, connection: asyncpg.Connection, poll: Poll, batch_id: int, batch: Sequence[bytes]
    ) -> Verdicts:
        """The way of a batch with voters who have voted before, or twice in the batch, or have to be on the roll.

        Who has voted is read first, but only to leave them out: the key still decides, and where another batch is
        faster this one fails and is tried again.
        """
        voters = [ballots.voter(ballot) for ballot in batch]
        # Of several ballots of one voter the first one counts.
        first = dict(zip(reversed(voters), reversed(batch), strict=True))
        standing = await self._standing(connection, poll, batch_id, first)
        if standing or len(first) < len(batch):
            _duplicates.inc()
        else:
            self._repeating.discard(poll.poll_no)
        weights = await self._weights(connection, poll, first) if poll.has_roll else None
        eligible = first if weights is None else weights
        new = {voter: ballot for voter, ballot in first.items() if voter not in standing and voter in eligible}
        recorded = await self._record_new(connection, poll, batch_id, list(new.values()), weights) if new else None
        # Nearly all ballots of a batch are the first of a new voter. Only the others are judged one by one.
        rest = [index for index, voter in enumerate(voters) if new.pop(voter, None) is None]
        if recorded:
            repeated = {voters[index] for index in rest} - standing.keys()
            again = recorded._replace(already=True)
            standing |= {v: _Standing(ballots.choices(first[v]), again) for v in repeated if v in eligible}
        judged = _judge([batch[index] for index in rest], standing, not_eligible())
        return Verdicts(recorded, {index: judged.of(place) for place, index in enumerate(rest)})

    async def _replace_some(
        self, connection: asyncpg.Connection, poll: Poll, batch_id: int, batch: Sequence[bytes]
    ) -> Verdicts:
        """The way of a batch, without repeated voters, in which votes may take the place of earlier ones."""
        mine = {ballots.voter(ballot): ballot for ballot in batch}
        weights = await self._weights(connection, poll, mine) if poll.has_roll else None
        candidates = sorted(batch if weights is None else [mine[key] for key in weights])
        standing: dict[bytes, _Standing] = {}
        async with connection.transaction():
            rows = await connection.fetch(sql.replace_votes, batch_id, *_columns(poll, candidates))
            written = {ballots.voter_of(row["ballot_key"]): row["replaced"] for row in rows}
            if written:
                replaced = {key: choices for key, choices in written.items() if choices is not None}
                votes = ballots.votes_cast(batch_id, sorted(mine[key] for key in written), weights, replaced)
                payload = Event(votes_cast=votes).SerializeToString()
                recorded = _recorded(await connection.fetchrow(sql.log_votes, poll.poll_no, batch_id, payload))
                standing = {key: _Standing(ballots.choices(mine[key]), recorded) for key in written}
                failpoint("command.before_commit")
        failpoint("command.after_commit")
        _count(len(written))
        unchanged = [key for key in mine if key not in written]
        standing |= await self._standing(connection, poll, batch_id, unchanged)
        return _judge(batch, standing, not_eligible())

    async def _record_none(
        self, connection: asyncpg.Connection, poll: Poll, batch_id: int, batch: Sequence[bytes]
    ) -> Verdicts:
        """The way of a batch for a poll that is not open: only repeats of recorded votes are not refused."""
        state = await connection.fetchval(sql.poll_state, poll.poll_no)
        standing = await self._standing(connection, poll, batch_id, {ballots.voter(ballot) for ballot in batch})
        return _judge(batch, standing, not_open(poll.state if state == OPEN else state))

    async def _weights(self, connection: asyncpg.Connection, poll: Poll, voters: Iterable[bytes]) -> dict[bytes, int]:
        """The weights of those voters who are on the roll. They stay: nobody is ever taken off a roll."""
        rows = await connection.fetch(sql.find_weights, _keys(poll, voters))
        return {ballots.voter_of(row["ballot_key"]): row["weight"] for row in rows}

    async def _standing(
        self, connection: asyncpg.Connection, poll: Poll, batch_id: int, voters: Iterable[bytes]
    ) -> "dict[bytes, _Standing]":
        """The recorded votes of these voters; those that carry `batch_id` are not `already` recorded."""
        rows = await connection.fetch(sql.find_votes, _keys(poll, voters))
        standing = {}
        for row in rows:
            recorded = _recorded(row, already=row["batch_id"] != batch_id)
            standing[ballots.voter_of(row["ballot_key"])] = _Standing(row["choices"], recorded)
        return standing


class _Standing(NamedTuple):
    """The vote of a voter that counts."""

    choices: bytes
    recorded: Recorded


def _judge(batch: Sequence[bytes], standing: "dict[bytes, _Standing]", without: Refusal) -> Verdicts:
    """Judges each ballot by the vote that stands for its voter; `without` is the answer where there is none."""
    others: dict[int, Verdict] = {}
    recorded: Recorded | None = None
    for index, ballot in enumerate(batch):
        key = ballots.voter(ballot)
        vote = standing.get(key)
        if vote is None:
            others[index] = without
        elif vote.choices != ballots.choices(ballot):
            others[index] = already_voted()
        elif vote.recorded.already:
            others[index] = vote.recorded
        else:
            recorded = vote.recorded
            # A further ballot of this voter in the batch repeats this one.
            standing[key] = vote._replace(recorded=recorded._replace(already=True))
    return Verdicts(recorded, others)


def _recorded(row: asyncpg.Record, *, already: bool = False) -> Recorded:
    moment = Timestamp()
    moment.FromDatetime(row["recorded_at"])
    return Recorded(row["version"], moment, already)


def _columns(poll: Poll, batch: Sequence[bytes]) -> tuple[list[UUID], list[bytes]]:
    """ballot_key and choices of each ballot, as arrays for a statement."""
    return _keys(poll, map(ballots.voter, batch)), [ballots.choices(ballot) for ballot in batch]


def _keys(poll: Poll, voters: Iterable[bytes]) -> list[UUID]:
    return [ballots.ballot_key(poll.poll_no, voter) for voter in voters]


def _count(votes: int) -> None:
    _votes.inc(votes)
    _batch_votes.observe(votes)


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data
