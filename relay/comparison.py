"""The comparison of the stream with the log: continuous, and of all polls.

JetStream may lose acknowledged messages, and a log may go back to an earlier state. So the latest event of each poll is
looked up on the stream, page after page, for as long as the relay leads; then from the first poll again. Where the
stream lacks it, it is published again: a reader that lacks more than that one sees the gap, and asks. Where the stream
has an event that the log lacks, the log went back: relay/history.py.
"""

import asyncio
import time
from collections.abc import Sequence
from uuid import UUID

import asyncpg
import structlog
from prometheus_client import Counter, Gauge

from contracts.bus import EventHeaders, microseconds
from relay.history import History
from relay.outbox import CHUNK_EVENTS
from relay.stream import Stream, StreamedEvent
from runtime.postgres import queries

log = structlog.get_logger()
sql = queries(__package__)

# A comparison of all polls begins this long after the one before began, or ended if that is later. Polls that were not
# to be compared, because events of them waited in the outbox, are looked at again as often.
LOOK_SECONDS = 10.0
# The part of the time that is spent on it, once all polls were compared in a session.
SHARE = 0.25
_PAGE_POLLS = 500
# What a server of a replicated stream may need to have the latest messages.
_LAG_SECONDS = 1.0
# Heads are queued only while no more events than this wait: new votes wait behind them.
_WAITING_EVENTS = CHUNK_EVENTS
_PAUSE_SECONDS = 0.02
# The polls that are looked at again before their turn comes; of more, those that come first.
_UNSETTLED_POLLS = 10_000

_compared = Counter("tally_relay_compared_polls", "Polls whose latest event was looked up on the stream.", ["shard"])
_progress = Gauge("tally_relay_comparison_progress", "Part of the polls that is compared, from 0 to 1.", ["shard"])
_seconds = Gauge("tally_relay_comparison_seconds", "How long the latest comparison of all polls took.", ["shard"])
_lost_tails = Counter("tally_relay_lost_tails", "Polls whose latest event was missing in the stream.")


class Comparison:
    """Compares the polls of one shard with the stream, which carries this epoch of the log."""

    def __init__(
        self, pool: asyncpg.Pool, stream: Stream, history: History, epoch: UUID, shard: int, shards: int
    ) -> None:
        self._pool = pool
        self._stream = stream
        self._history = history
        self._epoch = epoch
        self._shard = shard
        self._shards = shards
        # The polls that are to be looked at again, by poll_no.
        self._unsettled: set[int] = set()
        self._looked_at = 0.0

    async def run(self) -> None:
        """Compares until cancelled: first all polls as fast as it goes, because anything may have happened to the
        stream before; then all polls again and again, for a part of the time."""
        share = 1.0
        while True:
            began = time.monotonic()
            await self.compare_all(share)
            share = SHARE
            while (rest := began + LOOK_SECONDS - time.monotonic()) > 0:
                await asyncio.sleep(rest)
                await self._look_again()

    async def compare_all(self, share: float = 1.0) -> None:
        """Compares all polls, one page after the other."""
        began = self._looked_at = time.monotonic()
        after = polls_compared = queued = 0
        last = max(await self._pool.fetchval(sql.last_poll_no), 1)
        while polls := await self._pool.fetch(sql.polls_after, after, self._shards, self._shard, _PAGE_POLLS):
            started = time.monotonic()
            after = polls[-1]["poll_no"]
            polls_compared += len(polls)
            queued += await self._compare(polls)
            _progress.labels(self._shard).set(min(after / last, 1.0))
            if time.monotonic() - self._looked_at > LOOK_SECONDS:
                log.info("comparing the stream with the log", shard=self._shard, polls=polls_compared, queued=queued)
                await self._look_again()
            await asyncio.sleep((time.monotonic() - started) * (1 / share - 1))
        seconds = time.monotonic() - began
        _seconds.labels(self._shard).set(seconds)
        if queued:
            log.warning(
                "the stream lacked the latest events of polls; they are published again",
                shard=self._shard,
                polls=queued,
                of=polls_compared,
            )
        elif seconds > LOOK_SECONDS:
            log.info("compared the stream with the log", shard=self._shard, polls=polls_compared, seconds=seconds)

    async def _look_again(self) -> None:
        self._looked_at = time.monotonic()
        unsettled, self._unsettled = sorted(self._unsettled), set()
        for start in range(0, len(unsettled), _PAGE_POLLS):
            page = unsettled[start : start + _PAGE_POLLS]
            await self._compare(await self._pool.fetch(sql.polls, page))

    def _look_later(self, polls: Sequence[asyncpg.Record]) -> None:
        if len(self._unsettled) < _UNSETTLED_POLLS:
            self._unsettled.update(poll["poll_no"] for poll in polls)

    async def _compare(self, polls: Sequence[asyncpg.Record]) -> int:
        """Queues the latest event of each of these polls that the stream lacks; how many these were."""
        self._look_later([poll for poll in polls if not poll["settled"]])
        behind = await self._behind([poll for poll in polls if poll["settled"]])
        if behind and self._stream.is_replicated:
            await asyncio.sleep(_LAG_SECONDS)
            again = await self._pool.fetch(sql.polls, [poll["poll_no"] for poll in behind])
            behind = await self._behind([poll for poll in again if poll["settled"]])
        _compared.labels(self._shard).inc(len(polls))
        if not behind:
            return 0
        while await self._pool.fetchval(sql.is_busy, self._shards, self._shard, _WAITING_EVENTS):
            await asyncio.sleep(_PAUSE_SECONDS)
        queued: int = await self._pool.fetchval(sql.queue_heads, [poll["poll_no"] for poll in behind])
        # Until it is seen that they are there.
        self._look_later(behind)
        _lost_tails.inc(queued)
        return queued

    async def _behind(self, polls: Sequence[asyncpg.Record]) -> list[asyncpg.Record]:
        """Those of some polls, of which nothing waited in the outbox, whose latest event the stream lacks."""
        heads = await self._stream.versions([poll["poll_id"] for poll in polls]) if polls else {}
        behind, others = [], []
        for poll in polls:
            head = heads.get(poll["poll_id"])
            if head is None:
                # Where the stream drops old messages, a poll without any may be just old.
                if poll["poll_id"] in heads or not self._stream.forgets_polls:
                    behind.append(poll)
            elif head.log_epoch < self._epoch:
                behind.append(poll)
            elif not _is_latest(head, poll):
                others.append(StreamedEvent(poll["poll_id"], head))
                if head.version < poll["version"]:
                    behind.append(poll)
        await self._history.verify(self._epoch, others)
        return behind


def _is_latest(head: EventHeaders, poll: asyncpg.Record) -> bool:
    return head.version == poll["version"] and head.recorded_at in (None, microseconds(poll["recorded_at"]))
