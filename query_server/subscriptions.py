"""Redis channels over one connection, which is made anew whenever it breaks."""

import asyncio
from collections.abc import Callable

import structlog
from prometheus_client import Gauge
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import TimeoutError as RedisTimeoutError

from query_server.live import FAILURES, PATIENCE
from runtime.lifecycle import Backoff

log = structlog.get_logger()

# Redis is taken for dead if it says nothing for this long, twice, the second time after a ping; seconds.
_SILENCE = 1.0
# Channels in one command.
_BATCH = 500
# Nothing is published there: with it the connection is a subscriber's also while no other channel is wanted.
_IDLE = b"tally:idle"

_connected = Gauge("tally_query_redis_subscribed", "1 while changes arrive from Redis.")


class Subscriptions:
    """The channels that are wanted, and which of them Redis has confirmed: `channel in subscriptions`.

    `joined` is called whenever Redis has confirmed a channel: what is published from then on arrives at `heard` as
    channel and message, until `lost` is called, after which every channel is joined again.
    """

    def __init__(
        self,
        redis: Redis,
        joined: Callable[[bytes], None],
        heard: Callable[[bytes, bytes], None],
        lost: Callable[[], None],
    ) -> None:
        self.connected = False
        self._redis = redis
        self._joined = joined
        self._heard = heard
        self._lost = lost
        self._wanted: set[bytes] = set()
        # As of the last confirmation, which may not be the last command: when that one is confirmed the channel is
        # reviewed, so the two agree in the end, and whoever is joined then has missed nothing since.
        self._confirmed: set[bytes] = set()
        # Channels for which a command may be due.
        self._unsettled: set[bytes] = set()
        self._due = asyncio.Event()

    def __contains__(self, channel: bytes) -> bool:
        return channel in self._confirmed

    def want(self, channel: bytes) -> None:
        """Subscribe, and stay subscribed."""
        self._wanted.add(channel)
        self._review(channel)

    def leave(self, channel: bytes) -> None:
        """Nobody listens any more."""
        self._wanted.discard(channel)
        self._review(channel)

    async def run(self) -> None:
        """Keeps the wanted channels subscribed, for ever."""
        backoff = Backoff(first=0.05, longest=1.0)
        while True:
            try:
                async with self._redis.pubsub() as connection, asyncio.TaskGroup() as tasks:
                    async with asyncio.timeout(2 * PATIENCE):
                        await connection.subscribe(_IDLE)
                    tasks.create_task(self._ask(connection))
                    await self._listen(connection, backoff)
            except* FAILURES as failures:
                error = failures.exceptions[0]
                log.warning("no changes arrive from redis", error=f"{type(error).__name__}: {error}")
            except* Exception as failures:
                # The driver's own mistakes, when a connection breaks under its reader and its writer at once.
                log.error("defect", exc_info=failures)
            if self.connected:
                self._disconnected()
            await backoff.wait()

    async def _ask(self, connection: PubSub) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            unsettled, self._unsettled = self._unsettled, set()
            joining = [channel for channel in unsettled if channel in self._wanted and channel not in self._confirmed]
            leaving = [channel for channel in unsettled if channel not in self._wanted and channel in self._confirmed]
            for command, channels in ((connection.subscribe, joining), (connection.unsubscribe, leaving)):
                for start in range(0, len(channels), _BATCH):
                    async with asyncio.timeout(PATIENCE):
                        await command(*channels[start : start + _BATCH])

    async def _listen(self, connection: PubSub, backoff: Backoff) -> None:
        pinged = False
        while True:
            message = await connection.get_message(timeout=_SILENCE)
            if message is None:
                if pinged:
                    raise RedisTimeoutError("Redis answers no ping")
                async with asyncio.timeout(PATIENCE):
                    await connection.ping()
                pinged = True
                continue
            pinged = False
            kind, channel = message["type"], message["channel"]
            if kind == "message":
                self._heard(channel, message["data"])
            elif channel == _IDLE:
                backoff.reset()
                self._reconnected()
            elif kind == "subscribe":
                self._confirmed.add(channel)
                self._joined(channel)
                self._review(channel)
            elif kind == "unsubscribe":
                self._confirmed.discard(channel)
                self._review(channel)

    def _review(self, channel: bytes) -> None:
        if self.connected:
            self._unsettled.add(channel)
            self._due.set()

    def _reconnected(self) -> None:
        log.info("changes arrive from redis", channels=len(self._wanted))
        self.connected = True
        _connected.set(1)
        self._unsettled = set(self._wanted)
        self._due.set()

    def _disconnected(self) -> None:
        self.connected = False
        _connected.set(0)
        self._confirmed.clear()
        self._unsettled.clear()
        self._lost()
