"""The ballot box: collects ballots, and commits those of one poll together with their event.

Group commit without timers: ballots that arrive while commits are under way form the next batch. A batch is one
transaction: the votes go in first, by COPY, without any lock but that of their own keys; only then is the poll's row
locked, to check that it is open and to take the next version for the event.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from datetime import datetime
from itertools import chain
from typing import NamedTuple

import asyncpg
import structlog
from asyncpg.pgproto.pgproto import UUID as KeyUUID  # noqa: N811
from prometheus_client import Counter, Gauge, Histogram
from tally.event.v1.event_pb2 import Event
from tally.poll.v1.error_reason_pb2 import ErrorReason

from command_server import ballots
from command_server.poll import already_voted, not_open
from command_server.polls import Poll, Polls
from contracts.refusals import Refusal
from runtime.failpoints import failpoint
from runtime.lifecycle import Backoff
from runtime.postgres import UNAVAILABLE, queries

log = structlog.get_logger()
sql = queries(__package__)

# Commits under way at once: while one waits for the disk, the next one copies its rows.
COMMITTERS = 3
# The most ballots of one commit.
BATCH_BALLOTS = 20_000
# The most ballots that wait: about 100 bytes each.
CAPACITY = 200_000
# One attempt to commit, and all attempts together, in seconds.
ATTEMPT_SECONDS = 10.0
PATIENCE_SECONDS = 15.0

_votes = Counter("tally_votes_recorded", "Votes made durable.")
_batch_votes = Histogram("tally_commit_votes", "Votes in one commit.", buckets=[4**power for power in range(9)])
_commit_seconds = Histogram("tally_commit_seconds", "Time of one commit, with its retries.")
_waiting = Gauge("tally_votes_waiting", "Votes in the queue.")
_failures = Counter("tally_commit_failures", "Attempts to commit that failed.")
_duplicates = Counter("tally_commit_duplicates", "Batches that held a voter who had voted before.")


class Recorded(NamedTuple):
    """A vote that counts: the event that counts it, and whether an earlier call had recorded it."""

    version: int
    recorded_at: datetime
    already: bool


Verdict = Recorded | Refusal


class Verdicts(NamedTuple):
    """What became of the ballots of one submission: `recorded` of all but those in `others`, by index."""

    recorded: Recorded | None
    others: Mapping[int, Verdict]


class _Submission(NamedTuple):
    ballots: Sequence[bytes]
    verdicts: "asyncio.Future[Verdicts]"


class _Queue:
    """The ballots of one poll that wait for a commit."""

    def __init__(self, poll: Poll) -> None:
        self.poll = poll
        self.submissions: deque[_Submission] = deque()

    def take(self) -> list[_Submission]:
        """The submissions of the next commit."""
        taken: list[_Submission] = []
        count = 0
        while self.submissions and (not taken or count + len(self.submissions[0].ballots) <= BATCH_BALLOTS):
            submission = self.submissions.popleft()
            count += len(submission.ballots)
            taken.append(submission)
        return taken


class BallotBox:
    """Takes ballots of any poll and says what became of them, once that is durable."""

    def __init__(self, pool: asyncpg.Pool, polls: Polls) -> None:
        self._pool = pool
        self._polls = polls
        # Polls with waiting ballots, each once, in the order in which they are served.
        self._queues: dict[int, _Queue] = {}
        self._ready: asyncio.Queue[_Queue] = asyncio.Queue()
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

    async def cast(self, poll: Poll, ballot: bytes) -> Verdict:
        """Records one ballot. Raises OVERLOADED where the queue is full."""
        if self._ballots >= CAPACITY:
            raise Refusal(ErrorReason.ERROR_REASON_OVERLOADED, "too many votes wait to be recorded; try again")
        verdicts = await self._submit(poll, [ballot])
        return verdicts.others.get(0) or _present(verdicts.recorded)

    async def cast_all(self, poll: Poll, batch: Sequence[bytes]) -> "asyncio.Future[Verdicts]":
        """Waits for room, accepts the ballots, and returns the future that says what became of them."""
        if self._ballots >= CAPACITY:
            async with self._room:
                await self._room.wait_for(lambda: self._ballots < CAPACITY)
        return self._submit(poll, batch)

    def _submit(self, poll: Poll, batch: Sequence[bytes]) -> "asyncio.Future[Verdicts]":
        verdicts: asyncio.Future[Verdicts] = asyncio.get_running_loop().create_future()
        queue = self._queues.get(poll.poll_no)
        if queue is None:
            queue = self._queues[poll.poll_no] = _Queue(poll)
        if not queue.submissions:
            self._ready.put_nowait(queue)
        queue.submissions.append(_Submission(batch, verdicts))
        self._ballots += len(batch)
        return verdicts

    async def _commit_forever(self) -> None:
        while True:
            queue = await self._ready.get()
            submissions = queue.take()
            # What is left may be committed by others at the same time: batches of one poll overlap.
            if queue.submissions:
                self._ready.put_nowait(queue)
            else:
                del self._queues[queue.poll.poll_no]
            _waiting.set(self._ballots)
            try:
                with _commit_seconds.time():
                    await self._commit(queue.poll, submissions)
            finally:
                async with self._room:
                    self._ballots -= sum(len(submission.ballots) for submission in submissions)
                    self._room.notify_all()

    async def _commit(self, poll: Poll, submissions: Sequence[_Submission]) -> None:
        try:
            batch = list(chain.from_iterable(submission.ballots for submission in submissions))
            outcome = await self._record(poll, secrets.randbits(63), batch)
        except Exception as error:
            if not isinstance(error, UNAVAILABLE):
                log.error("defect", exc_info=error)
            for submission in submissions:
                if not submission.verdicts.done():
                    submission.verdicts.set_exception(error)
            return
        for submission in submissions:
            # A caller that went away has cancelled its future; its votes count all the same.
            if not submission.verdicts.done():
                submission.verdicts.set_result(outcome.verdicts(submission.ballots))

    async def _record(self, poll: Poll, batch_id: int, batch: Sequence[bytes]) -> "_Outcome":
        """Tries until the batch is durable or patience ends. Whether a failed attempt took effect is unknown; the next
        one finds out, because its rows would carry this batch_id."""
        backoff = Backoff()
        all_new = True
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                try:
                    async with asyncio.timeout(ATTEMPT_SECONDS), self._pool.acquire() as connection:
                        if all_new:
                            return await self._record_new(connection, poll, batch_id, batch)
                        return await self._record_some(connection, poll, batch_id, batch)
                except asyncpg.UniqueViolationError as error:
                    if error.constraint_name != "votes_pkey" or not all_new:
                        raise
                    _duplicates.inc()
                    all_new = False
                except (*UNAVAILABLE, asyncpg.DeadlockDetectedError) as error:
                    _failures.inc()
                    log.warning("commit failed", error=repr(error), votes=len(batch), failures=backoff.failures + 1)
                    await backoff.wait()

    async def _record_new(
        self, connection: asyncpg.Connection, poll: Poll, batch_id: int, batch: Sequence[bytes]
    ) -> "_Outcome":
        """The way of nearly every batch: no voter of it has voted. Fails with UniqueViolationError where one has."""
        batch = sorted(batch)
        payload = Event(votes_cast=ballots.votes_cast(batch_id, batch)).SerializeToString()
        try:
            async with connection.transaction():
                await connection.copy_to_table(
                    "votes",
                    source=_chunks(ballots.copy_rows(poll.poll_no, batch_id, batch)),
                    columns=ballots.COPY_COLUMNS,
                    format="binary",
                )
                recorded = await self._log(connection, poll, batch_id, payload)
        except _NotOpenError:
            return await self._record_none(connection, poll, batch)
        failpoint("command.after_commit")
        _count(len(batch))
        return _AllNew(recorded)

    async def _record_some(
        self, connection: asyncpg.Connection, poll: Poll, batch_id: int, batch: Sequence[bytes]
    ) -> "_Outcome":
        """The way of a batch with voters who have voted before, or twice in the batch: their first vote stands."""
        first = {ballots.voter_key(ballot): ballot for ballot in reversed(batch)}
        candidates = sorted(first.values())
        inserted: list[bytes] = []
        recorded: Recorded | None = None
        try:
            async with connection.transaction():
                rows = await connection.fetch(
                    sql.insert_new_votes,
                    batch_id,
                    poll.poll_no,
                    [KeyUUID(ballots.voter_key(ballot)) for ballot in candidates],
                    [ballots.option_no(ballot) for ballot in candidates],
                )
                inserted = sorted(first[row["voter_key"].bytes] for row in rows)
                if inserted:
                    payload = Event(votes_cast=ballots.votes_cast(batch_id, inserted)).SerializeToString()
                    recorded = await self._log(connection, poll, batch_id, payload)
        except _NotOpenError:
            return await self._record_none(connection, poll, batch)
        failpoint("command.after_commit")
        _count(len(inserted))
        new = {ballots.voter_key(ballot) for ballot in inserted}
        standing = await self._find(connection, poll, batch_id, [key for key in first if key not in new])
        if recorded is not None:
            standing.update((key, _Standing(ballots.option_no(first[key]), recorded)) for key in new)
        # Every voter of the batch has a vote now.
        return _Mixed(standing, otherwise=already_voted())

    async def _record_none(self, connection: asyncpg.Connection, poll: Poll, batch: Sequence[bytes]) -> "_Outcome":
        """The way of a batch for a poll that is not open: only repeats of recorded votes are not refused."""
        self._polls.forget(poll)
        state = await connection.fetchval(sql.poll_state, poll.poll_no)
        standing = await self._find(connection, poll, None, {ballots.voter_key(ballot) for ballot in batch})
        return _Mixed(standing, otherwise=not_open(state))

    async def _log(self, connection: asyncpg.Connection, poll: Poll, batch_id: int, payload: bytes) -> Recorded:
        row = await connection.fetchrow(sql.log_votes, poll.poll_no, batch_id, payload)
        if row is None:
            raise _NotOpenError
        failpoint("command.before_commit")
        return Recorded(row["version"], row["recorded_at"], already=False)

    async def _find(
        self, connection: asyncpg.Connection, poll: Poll, batch_id: int | None, keys: Collection[bytes]
    ) -> "dict[bytes, _Standing]":
        """The recorded votes of these voters; those that carry `batch_id` are not `already` recorded."""
        rows = await connection.fetch(sql.find_votes, poll.poll_no, [KeyUUID(key) for key in keys])
        return {
            row["voter_key"].bytes: _Standing(
                row["option_no"], Recorded(row["version"], row["recorded_at"], already=row["batch_id"] != batch_id)
            )
            for row in rows
        }


class _NotOpenError(Exception):
    """Rolls back a batch whose poll takes no votes."""


class _Standing(NamedTuple):
    """The vote of a voter that counts."""

    option_no: int
    recorded: Recorded


class _AllNew(NamedTuple):
    """Every ballot of the batch is recorded by one event."""

    recorded: Recorded

    def verdicts(self, _: Sequence[bytes]) -> Verdicts:
        return Verdicts(self.recorded, {})


class _Mixed:
    """Each ballot of the batch is judged by the vote that stands for its voter."""

    def __init__(self, standing: dict[bytes, _Standing], otherwise: Refusal) -> None:
        self._standing = standing
        # The answer to a ballot whose voter's vote is another one, or none.
        self._otherwise = otherwise

    def verdicts(self, batch: Sequence[bytes]) -> Verdicts:
        others: dict[int, Verdict] = {}
        recorded: Recorded | None = None
        for index, ballot in enumerate(batch):
            key = ballots.voter_key(ballot)
            standing = self._standing.get(key)
            if standing is None or standing.option_no != ballots.option_no(ballot):
                others[index] = self._otherwise if standing is None else already_voted()
            elif standing.recorded.already:
                others[index] = standing.recorded
            else:
                recorded = standing.recorded
                # A further ballot of this voter in the batch repeats this one.
                self._standing[key] = standing._replace(recorded=recorded._replace(already=True))
        return Verdicts(recorded, others)


_Outcome = _AllNew | _Mixed


def _count(votes: int) -> None:
    _votes.inc(votes)
    _batch_votes.observe(votes)


def _present(recorded: Recorded | None) -> Recorded:
    assert recorded is not None, "a ballot without a verdict"
    return recorded


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data
