"""What the read database says of itself: which versions of which polls its read models have, for whoever waits for one.

The projectors announce each commit with a NOTIFY. An announcement can be lost with its connection, so all polls that
somebody waits for are also looked up in one statement now and then: rarely while announcements arrive, because that is
only for safety; more often while they do not.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
import structlog
from prometheus_client import Counter, Gauge
from tally.poll.v1.error_reason_pb2 import ErrorReason

from contracts.log_epoch import LogPosition
from contracts.read_database import CHANNEL, parse_announcement
from contracts.refusals import ReadModelBehind, Refusal
from query_server.failures import STORE_FAILURES
from query_server.views import Views
from runtime import postgres
from runtime.lifecycle import Backoff
from runtime.replicas import connect_primary

log = structlog.get_logger()

MAX_WAITING = 50_000

# How often the polls that are waited for are looked up, while announcements arrive and while they do not; seconds.
_SAFETY_SECONDS = 1.0
_ALONE_SECONDS = 0.1
# How often the connection is tried, and how long it may take; seconds.
_PING_SECONDS = 3.0
_PATIENCE = 3.0
_SESSION = {
    "application_name": "query_server announcements",
    # A reader that is gone must not hold up the server's queue of notifications.
    "tcp_user_timeout": "10000",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "1",
    "tcp_keepalives_count": "5",
}

_connected = Gauge("tally_query_announced", "1 while announcements of the read database arrive.")
_waits = Gauge("tally_query_waiting", "Waits for a version in the read database.")
_heard = Counter("tally_query_announcements", "Announcements that arrived.")
_lookups = Counter("tally_query_version_lookups", "Times that the polls which are waited for were looked up.")


class _Wait(NamedTuple):
    least: LogPosition
    reached: Callable[[], None]


class Announcements:
    """Calls whoever expects a version of a poll, once the read database has it. `run` keeps listening."""

    def __init__(self, read_dsn: str, views: Views) -> None:
        self._dsn = read_dsn
        self._views = views
        self._waits: dict[tuple[str, UUID], set[_Wait]] = {}
        self._count = 0
        self._arriving = False
        # Something may have been announced that was not heard.
        self._unheard = asyncio.Event()

    @contextmanager
    def expect(self, read_model: str, poll_id: UUID, least: LogPosition, reached: Callable[[], None]) -> Iterator[None]:
        """Calls `reached` whenever it is heard that a read model has the poll at `least` or further.

        The server that is read may still be behind the one that announces. Raises OVERLOADED.
        """
        if self._count >= MAX_WAITING:
            raise Refusal(
                ErrorReason.ERROR_REASON_OVERLOADED, "as many calls wait for a version as this server can hold"
            )
        wait = _Wait(least, reached)
        key = read_model, poll_id
        waits = self._waits.setdefault(key, set())
        waits.add(wait)
        self._count += 1
        _waits.set(self._count)
        try:
            yield
        finally:
            waits.discard(wait)
            if not waits and self._waits.get(key) is waits:
                del self._waits[key]
            self._count -= 1
            _waits.set(self._count)

    async def run(self) -> None:
        """Listens, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._look_up())

    async def _listen(self) -> None:
        backoff, failing = Backoff(first=0.05, longest=1.0), False
        while True:
            try:
                # A standby can be read, but not listened to.
                connection = await connect_primary(
                    self._dsn, timeout=_PATIENCE, command_timeout=_PATIENCE, server_settings=_SESSION
                )
                try:
                    await connection.add_listener(CHANNEL, self._on_notification)
                    backoff.reset()
                    failing = False
                    self._announced(True)
                    await self._until_it_ends(connection)
                finally:
                    self._announced(False)
                    connection.terminate()
            except (*postgres.UNAVAILABLE, asyncpg.PostgresError) as error:
                if not failing:
                    log.warning("the read database announces nothing", error=f"{type(error).__name__}: {error}")
                failing = True
            await backoff.wait()

    async def _until_it_ends(self, connection: "asyncpg.Connection[Any]") -> None:
        ended = asyncio.Event()
        connection.add_termination_listener(lambda _: ended.set())
        while not connection.is_closed():
            try:
                async with asyncio.timeout(_PING_SECONDS):
                    await ended.wait()
            except TimeoutError:
                await connection.fetchval("SELECT 1")

    async def _look_up(self) -> None:
        backoff = Backoff(first=_ALONE_SECONDS, longest=_SAFETY_SECONDS)
        while True:
            try:
                async with asyncio.timeout(_SAFETY_SECONDS if self._arriving else _ALONE_SECONDS):
                    await self._unheard.wait()
            except TimeoutError:
                pass
            self._unheard.clear()
            if not self._waits:
                continue
            _lookups.inc()
            for read_model in {name for name, _ in self._waits}:
                poll_ids = [poll_id for name, poll_id in self._waits if name == read_model]
                try:
                    positions = await self._views.positions(read_model, poll_ids)
                except (*STORE_FAILURES, ReadModelBehind):
                    # Whoever waits reads the same database, and is told by its own failure.
                    continue
                except Exception:
                    # The same, and no reason to send away whoever waits for nothing here.
                    log.exception("defect")
                    await backoff.wait()
                    continue
                backoff.reset()
                for poll_id, position in positions.items():
                    self._reached(read_model, poll_id, position)

    def _announced(self, arriving: bool) -> None:
        self._arriving = arriving
        _connected.set(arriving)
        self._unheard.set()

    def _on_notification(self, *notification: Any) -> None:
        _heard.inc()
        try:
            read_model, announced = parse_announcement(notification[-1])
        except ValueError:
            log.error("not an announcement", payload=notification[-1][:200])
            return
        for poll_id, position in announced:
            self._reached(read_model, poll_id, position)

    def _reached(self, read_model: str, poll_id: UUID, position: LogPosition) -> None:
        for wait in tuple(self._waits.get((read_model, poll_id), ())):
            if position >= wait.least:
                wait.reached()
