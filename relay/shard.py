"""One shard's relay: publishes while it holds the shard's lock, stands by while another does, and never gives up.

A failure of any kind ends the session: both connections are closed, which frees the lock, and after a pause everything
begins anew from what the outbox holds. So there is one way to recover, whatever broke.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from uuid import UUID

import asyncpg
import structlog
from nats.aio.client import Client
from prometheus_client import Counter, Gauge

from contracts.bus import EventHeaders
from relay import outbox
from relay.backlog import Backlog
from relay.comparison import Comparison
from relay.history import History, check
from relay.outbox import Outbox, OutboxEvent
from relay.repair import Repair
from relay.stream import Stream, StreamedEvent, Unusable
from runtime import nats, postgres
from runtime.failpoints import failpoint
from runtime.lifecycle import Backoff, reasons
from runtime.stores import Notice

log = structlog.get_logger()

_STANDBY_SECONDS = 0.5
# Between two looks into an empty outbox: short after an event, longer while nothing happens.
_SHORTEST_PAUSE_SECONDS = 0.002
_LONGEST_PAUSE_SECONDS = 0.020
# The most polls of which a session remembers the version that it published last.
_REMEMBERED_POLLS = 10_000
# A session that lasted this long was a good one: the next pause is a short one.
_GOOD_SESSION_SECONDS = 10.0

_FAILURES = (*postgres.UNAVAILABLE, asyncpg.PostgresError, *nats.UNAVAILABLE)

_leads = Gauge("tally_relay_leads", "1 where this process relays the shard, 0 where it stands by.", ["shard"])
_published = Counter("tally_relay_published_events", "Events that the stream has acknowledged.", ["shard"])
_published_bytes = Counter("tally_relay_published_bytes", "Their size.", ["shard"])
_publish_seconds = Counter("tally_relay_publish_seconds", "Time spent waiting for the stream.", ["shard"])
_failures = Counter("tally_relay_failures", "Sessions that ended by a failure.", ["shard"])


class Shard:
    """The relay of one of `shards`; `ready` is called each time that it publishes or stands by."""

    def __init__(
        self, write_dsn: str, nats_url: str, pool: asyncpg.Pool, shard: int, shards: int, ready: Callable[[], None]
    ) -> None:
        self._write_dsn = write_dsn
        self._nats_url = nats_url
        self._pool = pool
        self._shard = shard
        self._shards = shards
        self._ready = ready
        self._backlog = Backlog(pool, shard, shards)
        self._history = History(pool)
        self._leads = _leads.labels(shard)
        self._notice = Notice()
        self._durability_checked = False

    async def run(self, stop: asyncio.Event) -> None:
        """Relays until `stop` is set; then what is under way is finished and nothing acknowledged is left behind."""
        async with asyncio.TaskGroup() as tasks:
            measuring = tasks.create_task(self._backlog.measure())
            await self._relay(stop)
            measuring.cancel()

    async def _relay(self, stop: asyncio.Event) -> None:
        backoff = Backoff(longest=1.0)
        while not stop.is_set():
            started = time.monotonic()
            try:
                await self._session(stop)
            except* _FAILURES as failures:
                if time.monotonic() - started > _GOOD_SESSION_SECONDS:
                    backoff.reset()
                _failures.labels(self._shard).inc()
                self._tell(failures, backoff.failures + 1)
            else:
                continue
            # Not within except*, which would wrap a cancellation into a group.
            await backoff.wait()

    def _tell(self, failures: BaseExceptionGroup[BaseException], count: int) -> None:
        errors = reasons(failures)
        if self._notice.is_due(str(errors)):
            for_an_operator = failures.subgroup((Unusable, *postgres.REFUSALS)) is not None
            say = log.error if for_an_operator else log.warning
            say("relaying failed", shard=self._shard, errors=errors, failures=count)

    async def _session(self, stop: asyncio.Event) -> None:
        async with (
            nats.connect(self._nats_url, application=f"relay {self._shard}") as connection,
            outbox.connect(self._write_dsn, self._shard, self._shards) as events,
        ):
            while not await events.lead():
                self._ready()
                await asyncio.sleep(_STANDBY_SECONDS)
                if stop.is_set():
                    return
            stream = Stream(connection, self._shard)
            try:
                await stream.ensure()
            except Unusable as problem:
                await self._backlog.report_once(connection, str(problem))
                raise
            epoch = await self._history.agree(stream)
            repair = Repair(self._pool, connection, self._shard, self._shards)
            comparison = Comparison(self._pool, stream, self._history, epoch, self._shard, self._shards)
            self._notice.is_due("")
            log.info("leading", shard=self._shard, log_epoch=str(epoch), nats=nats.version(connection))
            self._leads.set(1)
            self._ready()
            try:
                async with asyncio.TaskGroup() as tasks:
                    beside = [
                        tasks.create_task(repair.answer_requests()),
                        tasks.create_task(repair.tell()),
                        tasks.create_task(comparison.run()),
                        tasks.create_task(self._backlog.report(connection)),
                        tasks.create_task(stream.keep_watch()),
                        tasks.create_task(self._history.watch(epoch)),
                        tasks.create_task(self._check_durability(connection)),
                    ]
                    await self._publish(events, stream, epoch, stop)
                    for task in beside:
                        task.cancel()
            finally:
                self._leads.set(0)

    async def _check_durability(self, connection: Client) -> None:
        # Once for each process.
        if self._shard == 0 and not self._durability_checked:
            self._durability_checked = True
            await nats.check_durability(connection)

    async def _publish(self, events: Outbox, stream: Stream, epoch: UUID, stop: asyncio.Event) -> None:
        acknowledged: list[int] = []
        latest = _Latest()
        pause = _SHORTEST_PAUSE_SECONDS
        while True:
            # Killed before the deletion: the rows are read again, and published under the same message ids.
            chunk = await events.next(acknowledged)
            if stop.is_set():
                return
            acknowledged = []
            if not chunk:
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, _LONGEST_PAUSE_SECONDS)
                continue
            check(epoch, chunk[0].log_epoch)
            if suspicious := latest.contradicted_by(chunk):
                await self._history.verify(epoch, suspicious)
            started = time.monotonic()
            stored = await stream.publish(chunk)
            latest.note(stored)
            failpoint("relay.after_publish")
            acknowledged = [event.outbox_id for event in stored]
            pause = _SHORTEST_PAUSE_SECONDS
            _publish_seconds.labels(self._shard).inc(time.monotonic() - started)
            _published.labels(self._shard).inc(len(stored))
            _published_bytes.labels(self._shard).inc(sum(len(event.data) for event in stored))


class _Latest:
    """The latest event that a session published of each poll, for the polls that had one last."""

    def __init__(self) -> None:
        # Version and recorded_at.
        self._events: OrderedDict[UUID, tuple[int, int]] = OrderedDict()

    def contradicted_by(self, events: Sequence[OutboxEvent]) -> list[StreamedEvent]:
        """Those of polls that now get a version that is not greater for a new event: the log may lack them."""
        found = []
        for event in events:
            version, recorded_at = self._events.get(event.poll_id, (0, 0))
            if event.version <= version and not event.again:
                found.append(StreamedEvent(event.poll_id, EventHeaders(event.log_epoch, version, recorded_at)))
        return found

    def note(self, events: Sequence[OutboxEvent]) -> None:
        for event in events:
            if not event.again:
                self._events[event.poll_id] = event.version, event.recorded_at
                self._events.move_to_end(event.poll_id)
        while len(self._events) > _REMEMBERED_POLLS:
            self._events.popitem(last=False)
