"""The vote log: records batches of ballots in the write database, each with its event, as a whole or not at all.

A batch holds ballots of one poll, and becomes one event. The votes go in first, without any lock but that of their own
keys; only then is the poll's row locked, to check that it is open and to take the next version for the event.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from enum import Enum
from itertools import chain, islice
from random import Random
from typing import NamedTuple

import asyncpg
import structlog
from asyncpg.pgproto.pgproto import UUID
from google.protobuf.timestamp_pb2 import Timestamp
from prometheus_client import Counter as Count
from prometheus_client import Histogram
from tally.event.v1.event_pb2 import Event

from command_server import ballots
from command_server.ballot_queue import SMALL_BATCH, Piece, Recorded, Verdict, Verdicts
from command_server.poll import CLOSED, OPEN, already_voted, not_eligible, not_open, vote_conflict
from command_server.polls import Poll, Polls
from contracts.refusals import Refusal
from runtime.failpoints import failpoint
from runtime.lifecycle import Backoff
from runtime.postgres import POOL_SECONDS, UNAVAILABLE, queries

log = structlog.get_logger()
sql = queries(__package__)

# One attempt, and all attempts together, in seconds.
ATTEMPT_SECONDS = 10.0
PATIENCE_SECONDS = 15.0
# The most callers who are told at once what became of their ballots.
TOLD_AT_ONCE = 100
# A ballot that waited for longer than the first of these, in seconds, may be of a caller who has gone, which the server
# has been told of and has not read yet: it gets the second one for that.
_LONG_WAIT_SECONDS = 0.1
_READ_SECONDS = 0.02

_votes = Count("tally_votes_recorded", "Votes made durable.")
_batch_votes = Histogram("tally_commit_votes", "Votes in one commit.", buckets=[4**power for power in range(9)])
_failures = Count("tally_commit_failures", "Attempts to commit that failed.")
_duplicates = Count("tally_commit_duplicates", "Batches that held a voter who had voted before.")
_conflicts = Count(
    "tally_vote_conflicts", "Votes that were not recorded because another one of their voter came between."
)

# SQLSTATE of record_votes where the poll takes no votes.
_NOT_OPEN = "TA001"
# A part of the statement in record_votes that locks the poll's row.
_POLL_STATEMENT = "UPDATE polls"
# The most polls of which repeats are expected that are kept in mind.
_MOST_REPEATING = 100_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Lock(Enum):
    """What another transaction holds, so that a batch could not be recorded."""

    POLL = "poll"
    VOTES = "votes"


class Batch:
    """Ballots of one poll for one event."""

    def __init__(self, poll: Poll, pieces: Sequence[Piece]) -> None:
        self.poll = poll
        self.pieces = pieces
        self.ballots = _ballots(pieces)
        # Of the event and of its votes: there is one event with it at most.
        self.batch_id = 0
        # How far the poll's log had come when the callers of all ballots still waited: no later vote is replaced.
        self.seen: _Position | None = None
        # Whether all voters are taken for new, which the key of their votes decides.
        self.all_new = not poll.has_roll
        # Whether an attempt failed, and may have taken effect all the same.
        self.unsure = False
        # Whether its ballots have their verdicts, or else what another transaction holds: nothing more is tried.
        self.recorded = False
        self.lock: Lock | None = None

    @property
    def settled(self) -> bool:
        """Whether there is nothing more to try."""
        return self.recorded or self.lock is not None

    def settle(self, verdicts: Verdicts) -> None:
        """Tells the callers what became of their ballots."""
        self.recorded = True

        def tell() -> Iterator[None]:
            start = 0
            for piece in self.pieces:
                piece.submission.settle(piece, verdicts.part(start, len(piece.ballots)))
                start += len(piece.ballots)
                yield

        _tell_in_turns(tell())

    def fail(self, error: BaseException) -> None:
        """Tells the callers that it is unknown what became of their ballots."""

        def tell() -> Iterator[None]:
            for piece in self.pieces:
                piece.submission.fail(error)
                yield

        _tell_in_turns(tell())

    @property
    def changes(self) -> bool:
        """Whether its votes may take the place of earlier ones."""
        return self.poll.spec.allow_vote_change and self.poll.state == OPEN and not self.all_new

    def drop_gone(self, now: float) -> None:
        """Leaves the ballots out whose callers wait no longer."""
        self.pieces = [piece for piece in self.pieces if piece.submission.is_awaited(now)]
        self.ballots = _ballots(self.pieces)


def _ballots(pieces: Iterable[Piece]) -> list[bytes]:
    return list(chain.from_iterable([piece.ballots for piece in pieces]))


def _tell_in_turns(callers: Iterator[None]) -> None:
    """Tells callers one after the other, with other work of the loop in between: each has an answer to send, and
    thousands that wake at once would hold up all else for a second."""
    if sum(1 for _ in islice(callers, TOLD_AT_ONCE)) == TOLD_AT_ONCE:
        asyncio.get_running_loop().call_soon(_tell_in_turns, callers)


class _Position(NamedTuple):
    """How far a poll's log had come."""

    log_epoch: UUID
    version: int


class VoteLog:
    """Appends votes to polls in the write database."""

    def __init__(self, pool: asyncpg.Pool, polls: Polls) -> None:
        self._pool = pool
        self._polls = polls
        # Connections that worked last time; at most one for each that records at once.
        self._idle: list[asyncpg.Connection] = []
        # By poll_no: polls whose latest batch held voters who had voted before. So may the next. Emptied when full.
        self._repeating: set[int] = set()
        # Chance from the system, without a system call for each batch.
        self._random = Random(secrets.token_bytes(32))

    async def record(self, batches: Sequence[Batch]) -> None:
        """Tries until each batch is settled, or patience ends: then it raises why. The polls are different ones.

        Whether a failed attempt took effect is unknown; the next one finds out by the batch_id.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        backoff = Backoff(longest=0.5)
        for batch in batches:
            batch.batch_id = self._random.getrandbits(63)
            batch.all_new = batch.all_new and batch.poll.poll_no not in self._repeating
        while waiting := [batch for batch in batches if not batch.settled]:
            try:
                until = min(loop.time() + ATTEMPT_SECONDS, started + PATIENCE_SECONDS)
                async with asyncio.timeout_at(until), self._connection() as connection:
                    for batch in waiting:
                        if batch.unsure and (unseen := await self._recorded_unseen(connection, batch)):
                            batch.settle(unseen)
                    await self._attempt(connection, [batch for batch in waiting if not batch.settled])
            except asyncpg.UniqueViolationError as error:
                # The latter where a failed attempt takes effect only now, and others' votes have replaced some of it.
                if error.constraint_name not in ("votes_pkey", "events_batch_id"):
                    raise
                for batch in waiting:
                    self._expect_repeats(batch)
            except (*UNAVAILABLE, asyncpg.DeadlockDetectedError) as error:
                _failures.inc()
                votes = sum([len(batch.ballots) for batch in waiting])
                log.warning("commit failed", error=repr(error), votes=votes, failures=backoff.failures + 1)
                if loop.time() >= started + PATIENCE_SECONDS:
                    raise
                for batch in waiting:
                    batch.unsure = True
                await backoff.wait()

    async def look_at(self, poll_nos: Sequence[int]) -> dict[int, tuple[int, bool]]:
        """poll_no → the poll's version, and whether no other transaction has locked it."""
        async with asyncio.timeout(ATTEMPT_SECONDS), self._connection() as connection:
            rows = await connection.fetch(sql.look_at_polls, poll_nos)
        return {row["poll_no"]: (row["version"], row["unlocked"]) for row in rows}

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

    async def _attempt(self, connection: asyncpg.Connection, batches: Sequence[Batch]) -> None:
        """Settles some batches; those that it leaves are tried again."""
        closed = [batch for batch in batches if batch.poll.state != OPEN]
        changes = [batch for batch in batches if batch.changes]
        firsts = [batch for batch in batches if batch.poll.state == OPEN and not batch.changes]
        if closed:
            await self._record_none(connection, closed)
        if firsts:
            await self._record_first(connection, firsts)
        for batch in changes:
            await self._replace_some(connection, batch)

    @contextmanager
    def _outcome_of(self, batches: Sequence[Batch]) -> Iterator[None]:
        """Says of batches that were not recorded together why; of one that is closed or locked."""
        try:
            yield
        except asyncpg.LockNotAvailableError as error:
            held = Lock.POLL if _POLL_STATEMENT in (error.context or "") else Lock.VOTES
            for batch in batches:
                batch.lock = held
        except asyncpg.PostgresError as error:
            if error.sqlstate != _NOT_OPEN:
                raise
            [batch] = batches
            self._close(batch)

    def _close(self, batch: Batch) -> None:
        self._polls.forget(batch.poll)
        batch.poll = batch.poll._replace(state=CLOSED)

    def _expect_repeats(self, batch: Batch) -> None:
        if len(self._repeating) >= _MOST_REPEATING:
            self._repeating.clear()
        self._repeating.add(batch.poll.poll_no)
        batch.all_new = False

    async def _record_first(self, connection: asyncpg.Connection, batches: Sequence[Batch]) -> None:
        """The first votes of voters, in polls that take votes. Where no voter is expected to have one they are tried
        at once, else each who has one is left out: the key still decides, and where another batch is faster this one
        fails and is tried again."""
        plain = [(batch, batch.ballots, None) for batch in batches if batch.all_new]
        checked = await self._check([batch for batch in batches if not batch.all_new], connection)
        new = plain + [(each.batch, list(each.new.values()), each.weights) for each in checked if each.new]
        recorded = await self._record_new(connection, new) if new else {}
        for batch, _, _ in plain:
            if batch in recorded:
                batch.settle(Verdicts(recorded[batch], {}))
        for each in checked:
            if each.batch in recorded or not each.new:
                each.batch.settle(each.judge(recorded.get(each.batch)))

    async def _check(self, batches: Sequence[Batch], connection: asyncpg.Connection) -> "list[_Checked]":
        """Finds the voters of each batch who have voted, or who are not on the roll."""
        if not batches:
            return []
        checked = [_Checked(batch) for batch in batches]
        standing = await self._standing(connection, [(each.batch, each.first) for each in checked])
        rolls = [(each.batch, each.first) for each in checked if each.batch.poll.has_roll]
        weights = await self._weights(connection, rolls) if rolls else {}
        for each in checked:
            poll = each.batch.poll
            each.look(standing[poll.poll_no], weights[poll.poll_no] if poll.has_roll else None)
            if each.has_repeats:
                _duplicates.inc()
            else:
                self._repeating.discard(poll.poll_no)
        return checked

    async def _record_new(self, connection: asyncpg.Connection, new: "Sequence[_New]") -> dict[Batch, Recorded]:
        """Ballots of voters who have none, of different polls. What it does not return was not recorded, and its batch
        says why; it fails with UniqueViolationError where a voter of the only batch has a vote.

        They are sorted by key, so that two batches with the same voters wait for each other in one order and never
        deadlock.
        """
        recorded: dict[Batch, Recorded] = {}
        with self._outcome_of([batch for batch, _, _ in new]):
            if len(new) == 1:
                [(batch, cast, weights)] = new
                recorded[batch] = await self._record_batch(connection, batch, cast, weights)
            else:
                recorded = await self._record_batches(connection, new)
        return recorded

    async def _record_batch(
        self, connection: asyncpg.Connection, batch: Batch, cast: list[bytes], weights: Mapping[bytes, int] | None
    ) -> Recorded:
        cast = ballots.in_order(cast)
        poll_no, batch_id = batch.poll.poll_no, batch.batch_id
        payload = Event(votes_cast=ballots.votes_cast(batch_id, cast, weights)).SerializeToString()
        if len(cast) <= SMALL_BATCH:
            columns = _columns(poll_no, cast)
            if ballots.any_keyed(cast):
                statement = connection.fetchrow(
                    sql.record_keyed_votes, poll_no, batch_id, *columns, payload, _hashes(cast)
                )
            else:
                statement = connection.fetchrow(sql.record_votes, poll_no, batch_id, *columns, payload)
            row = await statement
        else:
            async with connection.transaction():
                await connection.copy_to_table(
                    "votes",
                    source=_chunks(ballots.copy_rows(poll_no, batch_id, cast)),
                    columns=ballots.copy_columns(cast),
                    format="binary",
                )
                row = await connection.fetchrow(sql.log_votes, poll_no, batch_id, payload)
                failpoint("command.before_commit")
        failpoint("command.after_commit")
        _count(len(cast))
        return _recorded(row)

    async def _record_batches(self, connection: asyncpg.Connection, new: "Sequence[_New]") -> dict[Batch, Recorded]:
        """Small batches of several polls in one transaction, in the order of their polls. A batch with a voter who has
        a vote, or of a poll that is closed or locked, fails no other."""
        new = sorted(new, key=lambda one: one[0].poll.poll_no)
        batch_of: list[int] = []
        keys: list[UUID] = []
        choices: list[bytes] = []
        hashes: list[bytes | None] = []
        payloads: list[bytes] = []
        for batch, unordered, weights in new:
            cast = ballots.in_order(unordered)
            batch_of += [batch.batch_id] * len(cast)
            keys += _keys(batch.poll.poll_no, map(ballots.voter, cast))
            choices += map(ballots.choices, cast)
            hashes += _hashes(cast)
            event = Event(votes_cast=ballots.votes_cast(batch.batch_id, cast, weights))
            payloads.append(event.SerializeToString())
        numbers, ids = [batch.poll.poll_no for batch, _, _ in new], [batch.batch_id for batch, _, _ in new]
        rows = await connection.fetch(sql.record_small_batches, numbers, ids, payloads, batch_of, keys, choices, hashes)
        failpoint("command.after_commit")
        outcomes = {row["batch_id"]: row for row in rows}
        recorded = {}
        votes = 0
        for batch, cast, _ in new:
            row = outcomes[batch.batch_id]
            if row["outcome"] == "recorded":
                recorded[batch] = _recorded(row)
                votes += len(cast)
            elif row["outcome"] == "repeated":
                self._expect_repeats(batch)
            elif row["outcome"] == "locked":
                batch.lock = Lock.POLL
            else:
                self._close(batch)
        if votes:
            _count(votes)
        return recorded

    async def _replace_some(self, connection: asyncpg.Connection, batch: Batch) -> None:
        """The way of a batch, without repeated voters, in which votes may take the place of earlier ones.

        Only of those that were recorded before the log was seen at a position: docs/adr/0018. A caller who still waits
        after that has not sent the voter's next vote before it, so nothing that this replaces was meant to follow.
        And a vote with the same choice is left out only where it has the idempotency key of the one before: left out
        for its choice alone, it would tell what that one chose.
        """
        poll = batch.poll
        if batch.seen is None:
            seen = _Position(*await connection.fetchrow(sql.poll_position, poll.poll_no))
            # Only what was done wholly is done: an attempt may end here.
            await self._drop_gone(batch)
            batch.seen = seen
        if not batch.ballots:
            batch.settle(Verdicts(None, {}))
            return
        mine = {ballots.voter(ballot): ballot for ballot in batch.ballots}
        weights = (await self._weights(connection, [(batch, mine)]))[poll.poll_no] if poll.has_roll else None
        eligible = mine if weights is None else weights
        candidates = sorted(mine[key] for key in eligible)
        with self._outcome_of([batch]):
            async with connection.transaction():
                columns = _columns(poll.poll_no, candidates)
                rows = await connection.fetch(
                    sql.replace_votes, batch.batch_id, *columns, *batch.seen, _hashes(candidates)
                )
                written = {ballots.voter_of(row["ballot_key"]): row["replaced"] for row in rows}
                # Those that stay are locked too: nobody changes them before this is read.
                unchanged = [key for key in eligible if key not in written]
                standing = (await self._standing(connection, [(batch, unchanged)]))[poll.poll_no] if unchanged else {}
                if not written and batch.unsure and (unseen := await self._recorded_unseen(connection, batch)):
                    # An attempt that took effect only now left nothing to write, and its votes may have been replaced.
                    batch.settle(unseen)
                    return
                if written:
                    replaced = {key: choices for key, choices in written.items() if choices is not None}
                    cast = sorted(mine[key] for key in written)
                    votes = ballots.votes_cast(batch.batch_id, cast, weights, replaced)
                    payload = Event(votes_cast=votes).SerializeToString()
                    row = await connection.fetchrow(sql.log_votes, poll.poll_no, batch.batch_id, payload)
                    recorded = _recorded(row)
                    standing |= {key: _Standing.of(mine[key], recorded) for key in written}
                    if not (replaced or unchanged):
                        self._repeating.discard(poll.poll_no)
                    failpoint("command.before_commit")
            failpoint("command.after_commit")
            _count(len(written))
            conflict = vote_conflict()
            verdicts = _judge(batch.ballots, standing, not_eligible(), conflict)
            _conflicts.inc(sum(verdict is conflict for verdict in verdicts.others.values()))
            batch.settle(verdicts)

    async def _drop_gone(self, batch: Batch) -> None:
        loop = asyncio.get_running_loop()
        if any(loop.time() - piece.submission.since > _LONG_WAIT_SECONDS for piece in batch.pieces):
            await asyncio.sleep(_READ_SECONDS)
        batch.drop_gone(loop.time())

    async def _record_none(self, connection: asyncpg.Connection, batches: Sequence[Batch]) -> None:
        """The way of batches for polls that are not open: only repeats of recorded votes are not refused."""
        rows = await connection.fetch(sql.poll_states, [batch.poll.poll_no for batch in batches])
        states = {row["poll_no"]: row["state"] for row in rows}
        mine = {batch: {ballots.voter(ballot): ballot for ballot in batch.ballots} for batch in batches}
        standing = await self._standing(connection, list(mine.items()))
        for batch in batches:
            poll, votes = batch.poll, standing[batch.poll.poll_no]
            if poll.spec.allow_vote_change:
                # Anything but a repeat would be no second vote, only a late one.
                cast = mine[batch]
                votes = {v: vote for v, vote in votes.items() if v in cast and vote.is_repeated_by(cast[v])}
            state = states[poll.poll_no]
            if state == OPEN:
                self._polls.changed(poll.poll_id)
            refusal = not_open(poll.state if state == OPEN else state)
            batch.settle(_judge(batch.ballots, votes, refusal, already_voted()))

    async def _recorded_unseen(self, connection: asyncpg.Connection, batch: Batch) -> Verdicts | None:
        """What became of a batch, if an attempt that seemed to fail took effect. Its event tells, not only the votes:
        they may have been changed since, and those who were not eligible may have been registered."""
        row = await connection.fetchrow(sql.find_batch, batch.batch_id)
        if row is None:
            return None
        first = {ballots.voter(ballot): ballot for ballot in reversed(batch.ballots)}
        standing = (await self._standing(connection, [(batch, first)]))[batch.poll.poll_no]
        recorded = _recorded(row)
        if batch.seen and recorded.position == (batch.seen.log_epoch, batch.seen.version + 1):
            # What the attempt left out was a repeat then, whatever stands now: nothing came between.
            standing = {key: _Standing.of(first[key], vote.recorded) for key, vote in standing.items()}
        for key in ballots.voters(Event.FromString(row["payload"]).votes_cast):
            if key in first:
                standing[key] = _Standing.of(first[key], recorded)
        changes = batch.poll.spec.allow_vote_change
        return _judge(batch.ballots, standing, not_eligible(), vote_conflict() if changes else already_voted())

    async def _weights(
        self, connection: asyncpg.Connection, voters: "Sequence[_Voters]"
    ) -> dict[int, dict[bytes, int]]:
        """poll_no → voter → the weight of each of these voters who is on the roll. It stays: nobody is ever taken off a
        roll."""
        rows = await connection.fetch(sql.find_weights, _keys_of(voters))
        weights: dict[int, dict[bytes, int]] = {batch.poll.poll_no: {} for batch, _ in voters}
        for row in rows:
            poll_no, voter = ballots.poll_and_voter_of(row["ballot_key"])
            weights[poll_no][voter] = row["weight"]
        return weights

    async def _standing(
        self, connection: asyncpg.Connection, voters: "Sequence[_Voters]"
    ) -> "dict[int, dict[bytes, _Standing]]":
        """poll_no → voter → the recorded vote of each of these voters; those of a batch itself are not `already`
        recorded."""
        rows = await connection.fetch(sql.find_votes, _keys_of(voters))
        standing: dict[int, dict[bytes, _Standing]] = {batch.poll.poll_no: {} for batch, _ in voters}
        own = {batch.batch_id for batch, _ in voters}
        for row in rows:
            poll_no, voter = ballots.poll_and_voter_of(row["ballot_key"])
            recorded = _recorded(row, already=row["batch_id"] not in own)
            standing[poll_no][voter] = _Standing(row["choices"], row["idempotency_hash"], recorded)
        return standing


# Ballots of voters without a vote, with the weights of voters where they are on a roll.
_New = tuple[Batch, list[bytes], Mapping[bytes, int] | None]
# Voters of a batch's poll.
_Voters = tuple[Batch, Iterable[bytes]]


class _Checked:
    """A batch of which some voters may have voted before, or twice in it, or have to be on the roll."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._voters = [ballots.voter(ballot) for ballot in batch.ballots]
        # Of several ballots of one voter the first one counts.
        self.first = dict(zip(reversed(self._voters), reversed(batch.ballots), strict=True))
        self.weights: Mapping[bytes, int] | None = None
        # The ballots of eligible voters who have no vote.
        self.new: dict[bytes, bytes] = {}
        self._standing: dict[bytes, _Standing] = {}

    def look(self, standing: "dict[bytes, _Standing]", weights: Mapping[bytes, int] | None) -> None:
        """Says which votes stand, and who is on the roll if there is one."""
        self._standing, self.weights = standing, weights
        eligible = self._eligible
        self.new = {v: ballot for v, ballot in self.first.items() if v not in standing and v in eligible}

    @property
    def _eligible(self) -> Mapping[bytes, object]:
        return self.first if self.weights is None else self.weights

    @property
    def has_repeats(self) -> bool:
        """Whether a voter has voted before, or twice."""
        return bool(self._standing) or len(self.first) < len(self._voters)

    def judge(self, recorded: Recorded | None) -> Verdicts:
        """What became of each ballot, once the new ones are recorded."""
        # Nearly all ballots of a batch are the first of a new voter. Only the others are judged one by one.
        new, standing = self.new, self._standing
        rest = [index for index, voter in enumerate(self._voters) if new.pop(voter, None) is None]
        if recorded:
            repeated = {self._voters[index] for index in rest} - standing.keys()
            again, eligible = recorded._replace(already=True), self._eligible
            standing |= {v: _Standing.of(self.first[v], again) for v in repeated if v in eligible}
        judged = _judge([self.batch.ballots[index] for index in rest], standing, not_eligible(), already_voted())
        return Verdicts(recorded, {index: judged.of(place) for place, index in enumerate(rest)})


class _Standing(NamedTuple):
    """The vote of a voter that counts."""

    choices: bytes
    idempotency_hash: bytes | None
    recorded: Recorded

    @classmethod
    def of(cls, ballot: bytes, recorded: Recorded) -> "_Standing":
        return cls(ballots.choices(ballot), ballots.idempotency_hash(ballot), recorded)

    def is_repeated_by(self, ballot: bytes) -> bool:
        """Whether a ballot is this vote once more, from its caller. Without the vote's key nothing is compared."""
        return (
            self.idempotency_hash is not None
            and self.idempotency_hash == ballots.idempotency_hash(ballot)
            and self.choices == ballots.choices(ballot)
        )


def _judge(batch: list[bytes], standing: "dict[bytes, _Standing]", without: Refusal, other: Refusal) -> Verdicts:
    """Judges each ballot by the vote that stands for its voter: `without` is the answer where there is none, `other`
    where the ballot is not a repeat of it, whatever it chooses: docs/adr/0016."""
    others: dict[int, Verdict] = {}
    recorded: Recorded | None = None
    for index, ballot in enumerate(batch):
        key = ballots.voter(ballot)
        vote = standing.get(key)
        if vote is None:
            others[index] = without
        elif vote.recorded.already:
            others[index] = vote.recorded if vote.is_repeated_by(ballot) else other
        elif vote.choices != ballots.choices(ballot):
            others[index] = other
        else:
            recorded = vote.recorded
            # A further ballot of this voter in the batch comes after this one.
            standing[key] = vote._replace(recorded=recorded._replace(already=True))
    return Verdicts(recorded, others)


def _recorded(row: asyncpg.Record, *, already: bool = False) -> Recorded:
    since = row["recorded_at"] - _EPOCH
    # Timestamp.FromDatetime takes ten times as long, for each commit.
    moment = Timestamp(seconds=86_400 * since.days + since.seconds, nanos=1000 * since.microseconds)
    return Recorded(row["version"], moment, already, row["log_epoch"])


def _columns(poll_no: int, batch: list[bytes]) -> tuple[list[UUID], list[bytes]]:
    """ballot_key and choices of each ballot, as arrays for a statement."""
    return _keys(poll_no, map(ballots.voter, batch)), [ballots.choices(ballot) for ballot in batch]


def _hashes(batch: list[bytes]) -> list[bytes | None]:
    return [ballots.idempotency_hash(ballot) for ballot in batch]


def _keys_of(voters: Sequence[_Voters]) -> list[UUID]:
    return [ballots.ballot_key(batch.poll.poll_no, voter) for batch, some in voters for voter in some]


def _keys(poll_no: int, voters: Iterable[bytes]) -> list[UUID]:
    return [ballots.ballot_key(poll_no, voter) for voter in voters]


def _count(votes: int) -> None:
    _votes.inc(votes)
    _batch_votes.observe(votes)


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data
