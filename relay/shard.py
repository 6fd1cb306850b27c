"""One shard's relay: publishes while it holds the shard's lock, stands by while another does, and never gives up.

A failure of any kind ends the session: both connections are closed, which frees the lock, and after a pause everything
begins anew from what the outbox holds. So there is one way to recover, whatever broke.
"""

import asyncio
import time
from collections.abc import Callable

import asyncpg
import structlog
from nats import errors as nats_errors
from prometheus_client import Counter, Gauge

from contracts.bus import MAX_EVENT_BYTES
from relay import outbox
from relay.backlog import Backlog
from relay.outbox import Outbox
from relay.repair import Repair
from relay.stream import Stream
from runtime import nats, postgres
from runtime.failpoints import failpoint
from runtime.lifecycle import Backoff, reasons

log = structlog.get_logger()

_STANDBY_SECONDS = 0.5
# Between two looks into an empty outbox: short after an event, longer while nothing happens.
_SHORTEST_PAUSE_SECONDS = 0.002
_LONGEST_PAUSE_SECONDS = 0.020
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
        self._leads = _leads.labels(shard)

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
                log.warning(
                    "relaying failed", shard=self._shard, errors=reasons(failures), failures=backoff.failures + 1
                )
            else:
                continue
            # Not within except*, which would wrap a cancellation into a group.
            await backoff.wait()

    async def _session(self, stop: asyncio.Event) -> None:
        async with (
            nats.connect(self._nats_url, application=f"relay {self._shard}") as connection,
            outbox.connect(self._write_dsn, self._shard, self._shards) as events,
        ):
            if connection.max_payload < MAX_EVENT_BYTES:
                # Better no event at all, and everybody hears of it, than one that blocks all behind it some day.
                raise nats_errors.Error(
                    f"NATS refuses messages above {connection.max_payload:,} bytes: set its max_payload to at least"
                    f" {MAX_EVENT_BYTES:,}"
                )
            while not await events.lead():
                self._ready()
                await asyncio.sleep(_STANDBY_SECONDS)
                if stop.is_set():
                    return
            stream = Stream(connection, self._shard)
            await stream.ensure()
            repair = Repair(self._pool, connection, stream, self._shard, self._shards)
            log.info("leading", shard=self._shard)
            self._leads.set(1)
            self._ready()
            try:
                async with asyncio.TaskGroup() as tasks:
                    beside = [
                        tasks.create_task(repair.answer_requests()),
                        tasks.create_task(repair.check_tails()),
                        tasks.create_task(self._backlog.report(connection)),
                        tasks.create_task(stream.keep_watch()),
                    ]
                    await self._publish(events, stream, stop)
                    for task in beside:
                        task.cancel()
            finally:
                self._leads.set(0)

    async def _publish(self, events: Outbox, stream: Stream, stop: asyncio.Event) -> None:
        acknowledged: list[int] = []
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
            started = time.monotonic()
            stored = await stream.publish(chunk)
            failpoint("relay.after_publish")
            acknowledged = [event.outbox_id for event in stored]
            pause = _SHORTEST_PAUSE_SECONDS
            _publish_seconds.labels(self._shard).inc(time.monotonic() - started)
            _published.labels(self._shard).inc(len(stored))
            _published_bytes.labels(self._shard).inc(sum(len(event.data) for event in stored))
