"""The caretaker: opens and closes polls on time, recounts those that are to be certified, and forgets old answers.

Of all command servers one is the caretaker: the one whose session holds an advisory lock. What it does is decided under
each poll's own lock like any command, so two of them, for a moment, would do nothing twice.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import asyncpg
import structlog
from prometheus_client import Counter, Gauge
from tally.event.v1.event_pb2 import Event, PollClosed, PollOpened
from tally.poll.v1.poll_pb2 import PollSpec

from command_server.poll import CERTIFIED, CLOSED, certify
from command_server.poll_log import append, lock
from command_server.polls import Polls
from command_server.recount import fold_log, recount_votes
from runtime.failpoints import failpoint
from runtime.lifecycle import Backoff, reasons
from runtime.postgres import POOL_SECONDS, UNAVAILABLE, check_durability, queries
from runtime.replicas import connect_primary

log = structlog.get_logger()
sql = queries(__package__)

_LOCK = 0x74616C6C79_02
_STANDBY_SECONDS = 0.5
# How late a poll may open or close. A vote is never accepted late: the database's clock is asked for each batch.
_LOOK_SECONDS = 0.2
_STEP_SECONDS = 8.0
# How long a poll that could not be taken care of is left alone, while the others go on.
_SKIP_SECONDS = 10.0
# How long one that another transaction has locked is left alone.
_LOCKED_SECONDS = 0.5
_TELL_SECONDS = 10.0
# How many polls open and close in one transaction: votes in them wait for its commit.
_PAGE = 500
# How many answers are forgotten at once, and how often. There is no index of their age: each command would pay for it,
# and a scan each hour costs less.
_FORGOTTEN_AT_ONCE = 10_000
_FORGET_SECONDS = 3600.0
# A process that stands still, or whose host is gone, leads no longer than this. Any other asks five times a second, and
# no step takes as long as a transaction may; for Postgres one begins already when a statement is prepared.
_SESSION = {"application_name": "caretaker", "idle_session_timeout": "5s", "transaction_timeout": "10s"}

_leads = Gauge("tally_caretaker_leads", "1 where this process opens, closes and recounts polls.")
_late = Gauge("tally_caretaker_failures", "Failures in a row; 0 is healthy.")
_failed_polls = Counter("tally_caretaker_failed_polls", "Times that one poll failed, and the others went on.")
_locked_polls = Gauge("tally_caretaker_locked_polls", "Polls that are due, and locked by another transaction.")
_recounts = Counter("tally_recounts", "Recounts that ended.", ["outcome"])
_mismatches = Gauge("tally_recount_mismatch", "1 after a recount that did not agree with the event log.", ["poll_id"])

_OPENED = Event(poll_opened=PollOpened()).SerializeToString()
_CLOSED = Event(poll_closed=PollClosed()).SerializeToString()


class Caretaker:
    """Does what is due in all polls, while it leads."""

    def __init__(self, write_dsn: str, pool: "asyncpg.Pool[Any]", polls: Polls) -> None:
        self._polls = polls
        self._write_dsn = write_dsn
        self._pool = pool
        # When each poll that failed is tried again.
        self._skipped: dict[UUID, float] = {}
        # When each poll that is due and was found locked is tried again, and when the log tells of it again.
        self._locked: dict[UUID, tuple[float, float]] = {}

    async def run(self) -> None:
        """Leads or stands by, until it is cancelled."""
        backoff = Backoff(longest=2.0)
        while True:
            started = time.monotonic()
            try:
                await self._session()
            except* (*UNAVAILABLE, asyncpg.PostgresError) as failures:
                if time.monotonic() - started > 10:
                    backoff.reset()
                _late.set(backoff.failures + 1)
                log.warning("taking care of polls failed", errors=reasons(failures))
            else:
                continue
            # Not within except*, which would wrap a cancellation into a group.
            await backoff.wait()

    async def _session(self) -> None:
        connection = await connect_primary(self._write_dsn, timeout=5, command_timeout=10, server_settings=_SESSION)
        try:
            while not await connection.fetchval(sql.lead, _LOCK):
                await asyncio.sleep(_STANDBY_SECONDS)
            await check_durability(connection)
            log.info("taking care of polls")
            _leads.set(1)
            _late.set(0)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._recount())
                tasks.create_task(self._forget())
                # Not a task as well: in Python 3.11 a group that only waits when one of its tasks fails leaves the mark
                # of a cancellation behind, and the next pause would end the caretaker for good.
                await self._keep_time(connection)
        finally:
            _leads.set(0)
            connection.terminate()

    async def _keep_time(self, connection: asyncpg.Connection) -> None:
        # On the connection that holds the lock: when it is lost, so is the lead, and the loop ends.
        while True:
            due = await connection.fetch(sql.due_polls, self._left_alone(), _PAGE)
            if due:
                try:
                    await self._advance(connection, due)
                except asyncpg.PostgresError as error:
                    if isinstance(error, UNAVAILABLE):
                        raise
                    # One of them failed, and with it all of this page.
                    for row in due:
                        with self._skipping(row["poll_id"]):
                            await self._advance(connection, [row])
            if len(due) < _PAGE:
                await asyncio.sleep(_LOOK_SECONDS)

    async def _advance(self, connection: asyncpg.Connection, due: Sequence[asyncpg.Record]) -> None:
        """Opens and closes polls that are due, except those that another transaction has locked."""
        async with asyncio.timeout(_STEP_SECONDS):
            numbers = [row["poll_no"] for row in due]
            advanced = await connection.fetch(sql.advance_polls, numbers, _OPENED, _CLOSED)
        for row in advanced:
            self._polls.changed(row["poll_id"])
            log.info("on time", poll_id=str(row["poll_id"]), state=row["state"])
        left = {row["poll_id"] for row in due} - {row["poll_id"] for row in advanced}
        for poll_id in left:
            self._leave_locked(poll_id)

    def _leave_locked(self, poll_id: UUID) -> None:
        """Tries a poll again a little later. It is worth a word from the second time on: a vote's commit takes less."""
        now = time.monotonic()
        tell = self._locked[poll_id][1] if poll_id in self._locked else now
        if poll_id in self._locked and now >= tell:
            log.warning("a poll is due, and locked by another transaction", poll_id=str(poll_id))
            tell = now + _TELL_SECONDS
        self._locked[poll_id] = (now + _LOCKED_SECONDS, tell)

    async def _recount(self) -> None:
        while True:
            due = await self._pool.fetchrow(sql.next_recount, self._left_alone())
            if due is None:
                await asyncio.sleep(_LOOK_SECONDS)
            elif not await self._pool.fetchval(sql.is_unlocked, due["poll_no"]):
                self._leave_locked(due["poll_id"])
            else:
                with self._skipping(due["poll_id"]):
                    await self._recount_poll(due)

    async def _recount_poll(self, due: asyncpg.Record) -> None:
        poll_id, poll_no, spec = due["poll_id"], due["poll_no"], PollSpec.FromString(due["spec"])
        recount = await recount_votes(self._pool, poll_no, spec)
        folded = await fold_log(self._pool, poll_no, len(spec.options))
        failpoint("caretaker.before_certified")
        async with (
            asyncio.timeout(_STEP_SECONDS),
            self._pool.acquire(timeout=POOL_SECONDS) as connection,
            connection.transaction(),
        ):
            locked = await lock(connection, poll_id)
            pending = await connection.fetchval(sql.end_recount, poll_no, due["requested_at"])
            # Not pending: this process stood still, and the caretaker after it was faster.
            if not pending or locked.poll.state != CLOSED:
                return
            change = certify(recount, folded)(locked.poll)
            await append(connection, locked, change)
        agreed = change.state == CERTIFIED
        _recounts.labels("agreed" if agreed else "mismatch").inc()
        if agreed:
            log.info("certified", poll_id=str(poll_id), votes=recount.total_votes)
        else:
            _mismatches.labels(str(poll_id)).set(1)
            log.error("the votes and the event log differ", poll_id=str(poll_id), votes=str(recount), log=str(folded))

    async def _forget(self) -> None:
        while True:
            forgotten = 0
            try:
                forgotten = await self._pool.fetchval(sql.forget_requests, _FORGOTTEN_AT_ONCE)
            except (*UNAVAILABLE, asyncpg.PostgresError) as error:
                # Nobody waits for it, and no poll shall.
                log.warning("old answers were not forgotten", error=repr(error))
            await asyncio.sleep(_LOOK_SECONDS if forgotten == _FORGOTTEN_AT_ONCE else _FORGET_SECONDS)

    @contextmanager
    def _skipping(self, poll_id: UUID) -> Iterator[None]:
        """What is wrong with one poll must not keep the others: only a store that does not answer ends the session."""
        try:
            yield
        except asyncpg.LockNotAvailableError:
            self._leave_locked(poll_id)
        except UNAVAILABLE:
            raise
        except Exception:
            self._skipped[poll_id] = time.monotonic() + _SKIP_SECONDS
            _failed_polls.inc()
            log.exception("a poll could not be taken care of", poll_id=str(poll_id), again_after=_SKIP_SECONDS)

    def _left_alone(self) -> list[UUID]:
        now = time.monotonic()
        self._skipped = {poll_id: until for poll_id, until in self._skipped.items() if until > now}
        # One that is found locked again soon is still known then.
        forget = now - 4 * _LOCKED_SECONDS
        self._locked = {poll_id: times for poll_id, times in self._locked.items() if times[0] > forget}
        _locked_polls.set(len(self._locked))
        return [*self._skipped, *(poll_id for poll_id, (until, _) in self._locked.items() if until > now)]
