"""Relays in the test's process, and what they put on the stream."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError
from tally.event.v1.event_pb2 import Event

from contracts.bus import ALL_EVENTS, STREAM
from relay.__main__ import RelaySettings
from relay.__main__ import relay as run_relay
from relay.comparison import Comparison
from relay.history import History
from relay.stream import Stream
from runtime.postgres import connect_pool
from tests.event_log import EventLog, WrittenPoll
from tests.processes import eventually


@asynccontextmanager
async def relaying(write_dsn: str, nats_url: str, shards: int = 1) -> AsyncIterator[None]:
    """A relay in this process."""
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(run_relay(RelaySettings(write_dsn=write_dsn, nats_url=nats_url, shards=shards), stop))
        yield
        stop.set()


class Published:
    """What is on the stream, by poll, in its order."""

    def __init__(self, messages: list[Any]) -> None:
        self.messages = messages
        self.events: dict[str, list[Event]] = defaultdict(list)
        for message in messages:
            event = Event.FromString(message.data)
            assert message.headers["Tally-Version"] == str(event.version)
            assert message.subject.endswith(f".{event.poll_id}")
            self.events[event.poll_id].append(event)

    def versions(self, poll: WrittenPoll) -> list[int]:
        return [event.version for event in self.events[str(poll.poll_id)]]


async def published(bus: Client) -> Published:
    stream: JetStreamContext = bus.jetstream()
    try:
        count = (await stream.stream_info(STREAM)).state.messages
    except NotFoundError:
        return Published([])
    subscription = await stream.subscribe(ALL_EVENTS, ordered_consumer=True)
    messages = [await subscription.next_msg(timeout=5) for _ in range(count)]
    await subscription.unsubscribe()
    return Published(messages)


async def compare_once(write_dsn: str, bus: Client) -> None:
    """One comparison of all polls with the stream, by a relay that publishes nothing."""
    pool = await connect_pool(write_dsn, size=2, application="test")
    stream, history = Stream(bus, 0), History(pool)
    await stream.ensure()
    await Comparison(pool, stream, history, await history.agree(stream), shard=0, shards=1).compare_all()
    await pool.close()


async def drained(log: EventLog, seconds: float = 15.0) -> None:
    async def empty() -> None:
        assert await log.waiting() == 0

    await eventually(empty, seconds)
