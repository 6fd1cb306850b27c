"""The ballot box: collects ballots, and commits those of one poll together with their event.

Group commit: ballots that arrive while commits are under way form the next batch. A batch is one
transaction: the votes go in first, by COPY, without any lock but that of their own keys; only then is the poll's row
locked, to check that it is open and to take the next version for the event.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import chain, takewhile
from random import Random
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
from command_server.ballot_queue import SMALL_BATCH, BallotQueue, Piece, Recorded, Submission, Verdict, Verdicts
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
# After a small commit the next one of its poll begins so many seconds later for each of its ballots, up to a limit.
# While fewer than 2,500 votes a second come, no vote waits longer for that than for the commit under way; above that,
# the pauses grow to the limit: larger batches, and more of the processors for the calls.
PACE_SECONDS_PER_BALLOT = 0.0004
PACE_SECONDS = 0.004
# The most ballots that wait: about 100 bytes each, and two more for each choice of an approval. Those of a request are
# kept until all of them are recorded, so up to twice as many are in memory.
CAPACITY = 400_000
# One attempt to commit, all attempts together, how long a request may wait for its first commit, and how often it is
# looked for those that waited longer, in seconds.
ATTEMPT_SECONDS = 10.0
PATIENCE_SECONDS = 15.0
WAIT_SECONDS = 15.0
LOOK_SECONDS = 1.0

_votes = Count("tally_votes_recorded", "Votes made durable.")
_batch_votes = Histogram("tally_commit_votes", "Votes in one commit.", buckets=[4**power for power in range(9)])
_commit_seconds = Histogram("tally_commit_seconds", "Time of one commit, with its retries.")
_waiting = Gauge("tally_votes_waiting", "Votes in the queue.")
_failures = Count("tally_commit_failures", "Attempts to commit that failed.")
_duplicates = Count("tally_commit_duplicates", "Batches that held a voter who had voted before.")


# SQLSTATE of record_votes where the poll takes no votes.
_NOT_OPEN = "TA001"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class BallotBox:
    """Takes ballots of any poll and says what became of them, once that is durable."""

    def __init__(self, pool: asyncpg.Pool, polls: Polls) -> None:
        self._pool = pool
        self._polls = polls
        # Polls with ballots that wait, or a commit under way; by poll_no and the state in which the poll was found. A
        # ballot for a draft must not wait together with one for the poll once it is open: its options were others.
        self._queues: dict[tuple[int, str], BallotQueue] = {}
        # Those that are due, each once, in the order in which they are served.
        self._ready: asyncio.Queue[BallotQueue] = asyncio.Queue()
        # Connections that worked last time; at most one for each committer.
        self._idle: list[asyncpg.Connection] = []
        # By poll_no: polls with a queue whose latest batch held voters who had voted before. So may the next.
        self._repeating: set[int] = set()
        # The submissions of which no commit has taken a ballot, oldest first; a dict for its order.
        self._unbegun: dict[Submission, None] = {}
        # Ballots that wait or are being committed, and the event that there are fewer than before.
        self._ballots = 0
        self._fewer = asyncio.Event()
        # Chance from the system, without a system call for each commit.
        self._random = Random(secrets.token_bytes(32))

    async def run(self) -> None:
        """Commits until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(COMMITTERS):
                tasks.create_task(self._commit_forever())
            tasks.create_task(self._give_up_forever())

    async def drain(self) -> None:
        """Returns when no ballot waits any more."""
        while self._ballots:
            await self._until_fewer()

    def cast(self, poll: Poll, ballot: bytes) -> "asyncio.Future[Verdicts]":
        """Accepts one ballot, and returns the future that says what became of it. Raises OVERLOADED where the queue is
        full."""
        if self._ballots >= CAPACITY:
            raise Refusal(ErrorReason.ERROR_REASON_OVERLOADED, "too many votes wait to be recorded; try again")
        return self._submit(poll, [ballot])

    async def cast_all(self, poll: Poll, batch: list[bytes]) -> "asyncio.Future[Verdicts]":
        """Waits for room, accepts the ballots, and returns the future that says what became of them."""
        while self._ballots >= CAPACITY:
            await self._until_fewer()
        return self._submit(poll, batch)

    async def _until_fewer(self) -> None:
        self._fewer.clear()
        await self._fewer.wait()

    def _submit(self, poll: Poll, batch: list[bytes]) -> "asyncio.Future[Verdicts]":
        loop = asyncio.get_running_loop()
        queue = self._queues.get((poll.poll_no, poll.state))
        if queue is None:
            queue = self._queues[poll.poll_no, poll.state] = BallotQueue(poll)
        submission = Submission(batch, loop.time(), loop.create_future())
        queue.put(submission)
        self._unbegun[submission] = None
        self._ballots += len(batch)
        self._offer(queue)
        return submission.verdicts

    def _offer(self, queue: BallotQueue) -> None:
        if queue.due:
            queue.offered = True
            self._ready.put_nowait(queue)

    async def _commit_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            queue = await self._ready.get()
            # Ballots whose requests have arrived, but were not read yet, come into this batch too.
            await asyncio.sleep(0)
            started = loop.time()
            queue.offered = False
            pieces = queue.take()
            taken = sum([len(piece.ballots) for piece in pieces])
            queue.committing += 1
            if not queue.paced:
                queue.paced = True
                pause = min(PACE_SECONDS_PER_BALLOT * taken, PACE_SECONDS)
                loop.call_later(pause, self._end_pace, queue)
            self._offer(queue)
            _waiting.set(self._ballots)
            try:
                await self._commit(queue.poll, self._begin(pieces))
            finally:
                queue.committing -= 1
                self._offer(queue)
                self._forget_if_idle(queue)
                self._ballots -= taken
                self._fewer.set()
                _commit_seconds.observe(loop.time() - started)

    def _begin(self, pieces: list[Piece]) -> list[Piece]:
        """Those of submissions that somebody still waits for."""
        for piece in pieces:
            self._unbegun.pop(piece.submission, None)
        return [piece for piece in pieces if not piece.submission.verdicts.done()]

    async def _give_up_forever(self) -> None:
        """Watches how long submissions wait, also while all committers are held up."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._give_up(asyncio.get_running_loop().time())

    def _give_up(self, now: float) -> None:
        """Fails the submissions that have waited for too long. That is a reason only before the first commit of one:
        after it, a repeat would be mostly repeated votes."""
        for submission in list(takewhile(lambda submission: submission.since < now - WAIT_SECONDS, self._unbegun)):
            del self._unbegun[submission]
            submission.fail(TimeoutError("no commit began in time"))

    def _end_pace(self, queue: BallotQueue) -> None:
        queue.paced = False
        self._offer(queue)
        self._forget_if_idle(queue)

    def _forget_if_idle(self, queue: BallotQueue) -> None:
        if queue.idle:
            del self._queues[queue.poll.poll_no, queue.poll.state]
            self._repeating.discard(queue.poll.poll_no)

    async def _commit(self, poll: Poll, pieces: Sequence[Piece]) -> None:
        if not pieces:
            return
        try:
            batch = list(chain.from_iterable([piece.ballots for piece in pieces]))
            verdicts = await self._record(poll, batch)
        except Exception as error:
            if not isinstance(error, UNAVAILABLE):
                log.error("defect", exc_info=error)
            for piece in pieces:
                piece.submission.fail(error)
            return
        start = 0
        for piece in pieces:
            piece.submission.settle(piece, verdicts.part(start, len(piece.ballots)))
            start += len(piece.ballots)

    async def _record(self, poll: Poll, batch: list[bytes]) -> Verdicts:
        """Tries until the batch is durable or patience ends. Whether a failed attempt took effect is unknown; the next
        one finds out, because its event and its rows would carry this batch_id, of which there is one event at most."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        batch_id = self._random.getrandbits(63)
        backoff = Backoff(longest=0.5)
        all_new = not (poll.has_roll or poll.poll_no in self._repeating)
        while True:
            try:
                until = min(loop.time() + ATTEMPT_SECONDS, started + PATIENCE_SECONDS)
                async with asyncio.timeout_at(until), self._connection() as connection:
                    if backoff.failures and (unseen := await self._recorded_unseen(connection, poll, batch_id, batch)):
                        return unseen
                    if poll.state != OPEN:
                        return await self._record_none(connection, poll, batch_id, batch)
                    if all_new:
                        return Verdicts(await self._record_new(connection, poll, batch_id, batch), {})
                    if poll.spec.allow_vote_change:
                        return await self._replace_some(connection, poll, batch_id, batch)
                    return await self._record_some(connection, poll, batch_id, batch)
            except asyncpg.UniqueViolationError as error:
                # The latter where a failed attempt takes effect only now, and others' votes have replaced some of it.
                if error.constraint_name not in ("votes_pkey", "events_batch_id"):
                    raise
                self._repeating.add(poll.poll_no)
                all_new = False
            except (*UNAVAILABLE, asyncpg.DeadlockDetectedError) as error:
                _failures.inc()
                log.warning("commit failed", error=repr(error), votes=len(batch), failures=backoff.failures + 1)
                if loop.time() >= started + PATIENCE_SECONDS:
                    raise
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
        batch: list[bytes],
        weights: Mapping[bytes, int] | None = None,
    ) -> Recorded:
        """Votes of voters who have none. Fails with UniqueViolationError where one has.

        They are sorted by key, so that two batches with the same voters wait for each other in one order and never
        deadlock.
        """
        batch = ballots.in_order(batch)
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
        self, connection: asyncpg.Connection, poll: Poll, batch_id: int, batch: list[bytes]
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
        self, connection: asyncpg.Connection, poll: Poll, batch_id: int, batch: list[bytes]
    ) -> Verdicts:
        """The way of a batch, without repeated voters, in which votes may take the place of earlier ones."""
        mine = {ballots.voter(ballot): ballot for ballot in batch}
        weights = await self._weights(connection, poll, mine) if poll.has_roll else None
        eligible = mine if weights is None else weights
        candidates = sorted(mine[key] for key in eligible)
        async with connection.transaction():
            rows = await connection.fetch(sql.replace_votes, batch_id, *_columns(poll, candidates))
            written = {ballots.voter_of(row["ballot_key"]): row["replaced"] for row in rows}
            # Those that repeat what the voter chose before are locked too: nobody changes them before this is read.
            unchanged = [key for key in eligible if key not in written]
            standing = await self._standing(connection, poll, batch_id, unchanged) if unchanged else {}
            if written:
                replaced = {key: choices for key, choices in written.items() if choices is not None}
                votes = ballots.votes_cast(batch_id, sorted(mine[key] for key in written), weights, replaced)
                payload = Event(votes_cast=votes).SerializeToString()
                recorded = _recorded(await connection.fetchrow(sql.log_votes, poll.poll_no, batch_id, payload))
                standing |= {key: _Standing(ballots.choices(mine[key]), recorded) for key in written}
                failpoint("command.before_commit")
        failpoint("command.after_commit")
        _count(len(written))
        return _judge(batch, standing, not_eligible())

    async def _record_none(
        self, connection: asyncpg.Connection, poll: Poll, batch_id: int, batch: list[bytes]
    ) -> Verdicts:
        """The way of a batch for a poll that is not open: only repeats of recorded votes are not refused."""
        state = await connection.fetchval(sql.poll_state, poll.poll_no)
        mine = {ballots.voter(ballot): ballot for ballot in batch}
        standing = await self._standing(connection, poll, batch_id, mine)
        if poll.spec.allow_vote_change:
            # Another choice would be no second vote, only a late one.
            standing = {key: vote for key, vote in standing.items() if vote.choices == ballots.choices(mine[key])}
        return _judge(batch, standing, not_open(poll.state if state == OPEN else state))

    async def _recorded_unseen(
        self, connection: asyncpg.Connection, poll: Poll, batch_id: int, batch: list[bytes]
    ) -> Verdicts | None:
        """What became of a batch, if an attempt that seemed to fail took effect. Its event tells, not only the votes:
        they may have been changed since, and those who were not eligible may have been registered."""
        row = await connection.fetchrow(sql.find_batch, batch_id)
        if row is None:
            return None
        first = {ballots.voter(ballot): ballot for ballot in reversed(batch)}
        standing = await self._standing(connection, poll, batch_id, first)
        if poll.spec.allow_vote_change:
            # What the attempt left out was a repeat then, whatever stands now.
            standing = {key: vote._replace(choices=ballots.choices(first[key])) for key, vote in standing.items()}
        recorded = _recorded(row)
        for key in ballots.voters(Event.FromString(row["payload"]).votes_cast):
            standing[key] = _Standing(ballots.choices(first[key]), recorded)
        return _judge(batch, standing, not_eligible())

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


def _judge(batch: list[bytes], standing: "dict[bytes, _Standing]", without: Refusal) -> Verdicts:
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
    since = row["recorded_at"] - _EPOCH
    # Timestamp.FromDatetime takes ten times as long, for each commit.
    moment = Timestamp(seconds=86_400 * since.days + since.seconds, nanos=1000 * since.microseconds)
    return Recorded(row["version"], moment, already, row["log_epoch"])


def _columns(poll: Poll, batch: list[bytes]) -> tuple[list[UUID], list[bytes]]:
    """ballot_key and choices of each ballot, as arrays for a statement."""
    return _keys(poll, map(ballots.voter, batch)), [ballots.choices(ballot) for ballot in batch]


def _keys(poll: Poll, voters: Iterable[bytes]) -> list[UUID]:
    return [ballots.ballot_key(poll.poll_no, voter) for voter in voters]


def _count(votes: int) -> None:
    _votes.inc(votes)
    _batch_votes.observe(votes)


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data
