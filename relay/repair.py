"""Ranges of events that readers missed are published again when they ask."""

import asyncio
import time
from collections import OrderedDict
from typing import NamedTuple
from uuid import UUID

import asyncpg
import structlog
from nats.aio.client import Client
from prometheus_client import Counter

from contracts.bus import REPUBLISH, parse_republish_request
from runtime.postgres import queries

log = structlog.get_logger()
sql = queries(__package__)

# The most events that one request brings back; who misses more asks again.
RANGE_EVENTS = 5_000

_PATIENCE_SECONDS = 1.0
_REMEMBERED_POLLS = 10_000
_TELL_SECONDS = 10.0

_republished = Counter("tally_relay_republished_events", "Events queued once more for a reader that missed them.")


class _Range(NamedTuple):
    """Versions of a poll that were queued once more, and the last of their rows."""

    first: int
    last: int
    last_outbox_id: int
    queued_at: float


class Repair:
    """Puts events of one shard into the outbox once more."""

    def __init__(self, pool: asyncpg.Pool, connection: Client, shard: int, shards: int) -> None:
        self._pool = pool
        self._connection = connection
        self._shard = shard
        self._shards = shards
        self._ranges: OrderedDict[UUID, _Range] = OrderedDict()
        # What was queued since it was last told.
        self._polls = 0
        self._events = 0

    async def answer_requests(self) -> None:
        """Queues what readers ask for, until cancelled. A request that is lost or ignored comes again."""
        subscription = await self._connection.subscribe(REPUBLISH, pending_msgs_limit=_REMEMBERED_POLLS)
        async for message in subscription.messages:
            try:
                poll_id, first = parse_republish_request(message.data)
            except ValueError as error:
                log.warning("not a republish request", error=str(error))
                continue
            await self.republish(poll_id, max(first, 1))

    async def tell(self) -> None:
        """Logs now and then what was queued, until cancelled."""
        while True:
            await asyncio.sleep(_TELL_SECONDS)
            if self._polls:
                log.info("published again for readers", shard=self._shard, polls=self._polls, events=self._events)
                self._polls = self._events = 0

    async def republish(self, poll_id: UUID, first: int) -> None:
        """Queues a poll's events from a version on, unless just that is under way."""
        async with self._pool.acquire() as connection:
            before = self._ranges.get(poll_id)
            if before and before.first <= first <= before.last:
                recent = time.monotonic() - before.queued_at < _PATIENCE_SECONDS
                if recent or await connection.fetchval(sql.is_queued, before.last_outbox_id):
                    return
            try:
                async with connection.transaction():
                    await connection.execute(sql.limit_waiting)
                    # Votes for this poll wait until the commit, so that its next event gets a higher outbox_id.
                    poll_no = await connection.fetchval(sql.lock_poll, poll_id, self._shards, self._shard)
                    if poll_no is None:
                        return
                    row = await connection.fetchrow(sql.queue_again, poll_no, first, first + RANGE_EVENTS - 1)
            except asyncpg.LockNotAvailableError:
                # The poll is locked, and the requests for others are not to wait for it.
                return
        if row["last_version"] is None:
            return
        self._ranges[poll_id] = _Range(first, row["last_version"], row["last_outbox_id"], time.monotonic())
        self._ranges.move_to_end(poll_id)
        if len(self._ranges) > _REMEMBERED_POLLS:
            self._ranges.popitem(last=False)
        _republished.inc(row["events"])
        self._polls += 1
        self._events += row["events"]
        log.debug("publishing again", poll_id=str(poll_id), first=first, last=row["last_version"])
