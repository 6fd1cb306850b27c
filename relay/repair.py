"""What the stream lost is published again: a range that a reader asks for, or a tail that the stream has no more."""

import asyncio
import time
from collections import OrderedDict
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

import asyncpg
import structlog
from nats.aio.client import Client
from prometheus_client import Counter

from contracts.bus import REPUBLISH, parse_republish_request
from relay.stream import Stream
from runtime.postgres import queries

log = structlog.get_logger()
sql = queries(__package__)

# The most events that one request brings back; who misses more asks again.
RANGE_EVENTS = 5_000
TAIL_CHECK_SECONDS = 10.0

_PAGE_POLLS = 500
_PATIENCE_SECONDS = 1.0
_REMEMBERED_POLLS = 10_000
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
# A poll may be committed this long after the time that it carries.
_CLOCK_MARGIN = timedelta(seconds=60)

_republished = Counter("tally_relay_republished_events", "Events queued once more for a reader that missed them.")
_lost_tails = Counter("tally_relay_lost_tails", "Polls whose latest event was missing in the stream.")


class _Range(NamedTuple):
    """Versions of a poll that were queued once more, and the last of their rows."""

    first: int
    last: int
    last_outbox_id: int
    queued_at: float


class Repair:
    """Puts events of one shard into the outbox once more."""

    def __init__(self, pool: asyncpg.Pool, connection: Client, stream: Stream, shard: int, shards: int) -> None:
        self._pool = pool
        self._connection = connection
        self._stream = stream
        self._shard = shard
        self._shards = shards
        self._ranges: OrderedDict[UUID, _Range] = OrderedDict()

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

    async def republish(self, poll_id: UUID, first: int) -> None:
        """Queues a poll's events from a version on, unless just that is under way."""
        async with self._pool.acquire() as connection:
            before = self._ranges.get(poll_id)
            if before and before.first <= first <= before.last:
                recent = time.monotonic() - before.queued_at < _PATIENCE_SECONDS
                if recent or await connection.fetchval(sql.is_queued, before.last_outbox_id):
                    return
            async with connection.transaction():
                # Votes for this poll wait until the commit, so that its next event gets a higher outbox_id.
                poll_no = await connection.fetchval(sql.lock_poll, poll_id, self._shards, self._shard)
                if poll_no is None:
                    return
                row = await connection.fetchrow(sql.queue_again, poll_no, first, first + RANGE_EVENTS - 1)
        if row["last_version"] is None:
            return
        self._ranges[poll_id] = _Range(first, row["last_version"], row["last_outbox_id"], time.monotonic())
        self._ranges.move_to_end(poll_id)
        if len(self._ranges) > _REMEMBERED_POLLS:
            self._ranges.popitem(last=False)
        _republished.inc(row["last_version"] - first + 1)
        log.info("publishing again", poll_id=str(poll_id), first=first, last=row["last_version"])

    async def check_tails(self) -> None:
        """Compares the stream's latest event of each poll with the log, until cancelled: first of all polls, because
        anything may have happened to the stream before, then of those that have changed since the last time."""
        since = _BEGINNING
        while True:
            started = datetime.now(UTC)
            await self.check_tails_once(since)
            since = started - _CLOCK_MARGIN
            await asyncio.sleep(TAIL_CHECK_SECONDS)

    async def check_tails_once(self, since: datetime) -> None:
        """Queues the latest event of each poll that changed since some time and whose latest event the stream lacks.
        A reader that lacks more than that one sees the gap, and asks."""
        after = 0
        while True:
            async with self._pool.acquire() as connection:
                polls = await connection.fetch(sql.settled_polls, after, self._shards, self._shard, since, _PAGE_POLLS)
            if not polls:
                return
            after = polls[-1]["poll_no"]
            versions = await self._stream.versions([poll["poll_id"] for poll in polls])
            lost = [poll["poll_no"] for poll in polls if self._is_lost(poll, versions.get(poll["poll_id"]))]
            if lost:
                async with self._pool.acquire() as connection:
                    await connection.execute(sql.queue_heads, lost)
                _lost_tails.inc(len(lost))
                log.warning("the stream lost the latest events of polls; publishing them again", polls=len(lost))

    def _is_lost(self, poll: asyncpg.Record, streamed: int | None) -> bool:
        if streamed is None:
            # Where the stream discards old messages, a poll without any may be just old.
            return not self._stream.discards
        return streamed < int(poll["version"])
