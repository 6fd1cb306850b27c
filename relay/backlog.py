"""What waits in the outbox of one shard: measured whether or not NATS is there, told to the read side when it is."""

import asyncio
import math
import time

import asyncpg
from nats.aio.client import Client
from prometheus_client import Gauge
from tally.query.v1.query_service_pb2 import OutboxStatus

from contracts import log_epoch
from contracts.bus import outbox_report_subject
from contracts.status import REPORT_SECONDS, now
from runtime import postgres

sql = postgres.queries(__package__)

# A long outbox takes long to count: at most this part of the time is spent on it.
_SHARE = 0.1

_events = Gauge("tally_outbox_events", "Events that wait in the outbox; NaN while that is unknown.", ["shard"])
_oldest = Gauge(
    "tally_outbox_oldest_seconds",
    "Age of the first waiting event that was never published; NaN while unknown.",
    ["shard"],
)


class Backlog:
    """The outbox of one of `shards` as it was when it was looked at last."""

    def __init__(self, pool: asyncpg.Pool, shard: int, shards: int) -> None:
        self._pool = pool
        self._shard = shard
        self._shards = shards
        # None while the write database does not answer.
        self._status: OutboxStatus | None = None

    async def measure(self) -> None:
        """Looks each second, until cancelled. Every relay does, also one that stands by."""
        while True:
            started = time.monotonic()
            try:
                async with self._pool.acquire(timeout=postgres.POOL_SECONDS) as connection:
                    row = await connection.fetchrow(sql.backlog, self._shards, self._shard)
            except (*postgres.UNAVAILABLE, asyncpg.PostgresError):
                # The session that publishes meets the same failure and says so.
                self._status = None
                _events.labels(self._shard).set(math.nan)
                _oldest.labels(self._shard).set(math.nan)
            else:
                self._status = OutboxStatus(
                    shard=self._shard,
                    shards=self._shards,
                    events=row["events"],
                    oldest_seconds=row["oldest_seconds"],
                    reported_at=now(),
                    log_epoch=log_epoch.text(row["log_epoch"]),
                )
                _events.labels(self._shard).set(row["events"])
                _oldest.labels(self._shard).set(row["oldest_seconds"] or 0.0)
            await asyncio.sleep(max(REPORT_SECONDS, (time.monotonic() - started) / _SHARE))

    async def report(self, bus: Client) -> None:
        """Tells the projectors each second, until cancelled. A report that is lost is followed by another one."""
        while True:
            await self.report_once(bus)
            await asyncio.sleep(REPORT_SECONDS)

    async def report_once(self, bus: Client, problem: str = "") -> None:
        """Tells the projectors, also why nothing is published."""
        if self._status:
            report = OutboxStatus(problem=problem)
            report.MergeFrom(self._status)
            await bus.publish(outbox_report_subject(self._shard), report.SerializeToString())
