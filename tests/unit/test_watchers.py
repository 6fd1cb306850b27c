"""What a watcher is sent, and when; no server is needed for that."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from unittest.mock import AsyncMock
from uuid import uuid4

import asyncpg
import pytest
from tally.poll.v1.error_reason_pb2 import ErrorReason
from tally.query.v1.query_service_pb2 import (
    RESULTS_SOURCE_LIVE_CACHE,
    RESULTS_SOURCE_READ_DATABASE,
    GetResultsResponse,
    Results,
)

from contracts.live import hidden_results, live_channel
from contracts.log_epoch import ZERO, LogPosition
from contracts.refusals import Refusal
from query_server.announcements import Announcements
from query_server.answered import Answered
from query_server.freshness import Wanted
from query_server.live import LiveResults, connect
from query_server.views import Views
from query_server.watchers import Topic, Watcher, Watchers
from tests.pauses import longest_pause

NOT_FOUND = ErrorReason.ERROR_REASON_POLL_NOT_FOUND
UNAVAILABLE = ErrorReason.ERROR_REASON_STORE_UNAVAILABLE
BEHIND = ErrorReason.ERROR_REASON_READ_MODEL_BEHIND


@pytest.fixture
async def hub() -> AsyncIterator[Watchers]:
    """Watchers whose topics only the test changes: it does not run, and its stores are never asked."""
    redis = connect("redis://127.0.0.1:1")
    async with asyncpg.create_pool("postgresql://127.0.0.1:1", min_size=0, max_size=1) as pool:
        views = Views(pool)
        announcements = Announcements("postgresql://127.0.0.1:1", views)
        yield Watchers(redis, LiveResults(redis, views), views, announcements, Answered())
    await redis.aclose()


def new_topic() -> Topic:
    poll_id = uuid4()
    return Topic(poll_id, live_channel(poll_id).encode(), tell)


def tell(topic: Topic) -> None:
    for watcher in topic.watchers:
        watcher.notice(topic)


def at(version: int) -> LogPosition:
    return LogPosition(ZERO, version)


def watcher_of(hub: Watchers, *topics: Topic, wanted: Wanted | None = None, every: float = 0.0) -> Watcher:
    watcher = Watcher(hub, topics, wanted or {}, every)
    for topic in topics:
        topic.watchers.add(watcher)
    return watcher


async def sent(watcher: Watcher, seconds: float = 1.0) -> bytes:
    async with asyncio.timeout(seconds):
        return await watcher.next()


async def has_news(watcher: Watcher) -> bool:
    try:
        await sent(watcher, 0.05)
    except TimeoutError:
        return False
    return True


async def test_a_slow_watcher_gets_the_newest_only(hub: Watchers) -> None:
    topic = new_topic()
    watcher = watcher_of(hub, topic)
    for version in range(1, 1000):
        topic.offer(at(version), b"%d" % version)
    assert await sent(watcher) == b"999"
    assert not await has_news(watcher)


async def test_every_watcher_is_sent_the_same_object(hub: Watchers) -> None:
    topic = new_topic()
    watchers = [watcher_of(hub, topic) for _ in range(3)]
    topic.offer(at(1), b"".join([b"one", b"object"]))
    assert len({id(await sent(watcher)) for watcher in watchers}) == 1


async def test_a_watcher_that_begins_between_a_change_and_its_telling_is_sent_it_once(hub: Watchers) -> None:
    untold: list[Topic] = []
    topic = Topic(uuid4(), b"channel", untold.append)
    topic.offer(at(1), b"1")
    watcher = watcher_of(hub, topic)
    await watcher.start(patience=1)
    assert await sent(watcher) == b"1"
    tell(untold.pop())
    assert not await has_news(watcher)
    topic.offer(at(2), b"2")
    tell(untold.pop())
    assert await sent(watcher) == b"2"
    assert not await has_news(watcher)


async def test_versions_only_grow(hub: Watchers) -> None:
    topic = new_topic()
    watcher = watcher_of(hub, topic)
    last, seen = 200, [0]

    async def read() -> None:
        while seen[-1] < last:
            seen.append(int(await sent(watcher)))

    reading = asyncio.ensure_future(read())
    shuffled = random.Random(7)
    for newest in range(1, last + 1):
        for version in (newest, shuffled.randrange(1, newest + 1)):
            topic.offer(at(version), b"%d" % version)
        await asyncio.sleep(0)
    await reading
    assert len(seen) > 10
    assert seen == sorted(set(seen))


async def test_a_version_is_told_again_where_its_counts_were_corrected(hub: Watchers) -> None:
    topic = new_topic()
    watcher = watcher_of(hub, topic)
    stored, live, corrected = (
        GetResultsResponse(results=Results(version=2, total_votes=votes, source=source)).SerializeToString()  # type: ignore[arg-type]
        for votes, source in ((7, RESULTS_SOURCE_READ_DATABASE), (7, RESULTS_SOURCE_LIVE_CACHE), (9, 0))
    )
    topic.offer(at(2), stored)
    assert await sent(watcher) == stored
    # The same from another store is no news.
    topic.offer(at(2), live, known=stored)
    assert not await has_news(watcher)
    topic.offer(at(2), corrected, known=stored)
    assert await sent(watcher) == corrected
    # What was asked for before that arrives late.
    topic.offer(at(2), stored, known=stored)
    assert not await has_news(watcher)
    topic.offer(at(2), hidden_results(2), known=corrected)
    with pytest.raises(Refusal):
        await sent(watcher)


async def test_a_busy_poll_does_not_hide_the_others(hub: Watchers) -> None:
    busy, quiet = new_topic(), new_topic()
    watcher = watcher_of(hub, busy, quiet)
    busy.offer(at(1), b"busy")
    quiet.offer(at(1), b"quiet")
    got = []
    for version in range(2, 5):
        got.append(await sent(watcher))
        busy.offer(at(version), b"busy")
    assert b"quiet" in got


async def test_min_interval_holds_for_each_poll(hub: Watchers) -> None:
    one, other = new_topic(), new_topic()
    watcher = watcher_of(hub, one, other, every=0.2)
    one.offer(at(1), b"one 1")
    assert await sent(watcher) == b"one 1"
    started = time.monotonic()
    one.offer(at(2), b"one 2")
    # It does not wait for the first poll's interval to end.
    other.offer(at(1), b"other 1")
    assert await sent(watcher, 0.1) == b"other 1"
    one.offer(at(3), b"one 3")
    assert await sent(watcher) == b"one 3"
    assert time.monotonic() - started > 0.15
    assert not await has_news(watcher)


async def test_the_start_waits_for_the_wanted_version(hub: Watchers) -> None:
    topic, other = new_topic(), new_topic()
    other.offer(at(1), b"other")
    watcher = watcher_of(hub, topic, other, wanted={topic.poll_id: at(3)})
    start = asyncio.ensure_future(watcher.start(2))
    for version in (1, 2):
        topic.offer(at(version), b"%d" % version)
        await asyncio.sleep(0.01)
        assert not start.done()
    topic.offer(at(3), b"3")
    await start
    assert {await sent(watcher), await sent(watcher)} == {b"3", b"other"}


@pytest.mark.parametrize(
    ("version", "absence", "wanted", "reason"),
    [
        (0, NOT_FOUND, 0, NOT_FOUND),
        (0, UNAVAILABLE, 0, UNAVAILABLE),
        (0, None, 0, UNAVAILABLE),
        (0, NOT_FOUND, 1, BEHIND),
        (0, UNAVAILABLE, 1, UNAVAILABLE),
        (4, None, 5, BEHIND),
    ],
)
async def test_a_start_that_fails_says_why(
    hub: Watchers, version: int, absence: ErrorReason.ValueType | None, wanted: int, reason: ErrorReason.ValueType
) -> None:
    topic = new_topic()
    if version:
        topic.offer(at(version), b"results")
    watcher = watcher_of(hub, topic, wanted={topic.poll_id: at(wanted)} if wanted else None)
    start = asyncio.ensure_future(watcher.start(0.1))
    await asyncio.sleep(0)
    if absence:
        topic.lack(absence)
    with pytest.raises(Refusal) as refused:
        await start
    assert refused.value.reason == reason


async def test_a_poll_that_is_found_missing_as_patience_ends_is_not_found(hub: Watchers) -> None:
    topic, fresh = new_topic(), new_topic()
    watcher = watcher_of(hub, topic, fresh, wanted={fresh.poll_id: at(1)})
    start = asyncio.ensure_future(watcher.start(0.05))
    await asyncio.sleep(0)
    # Both are due once the loop looks again.
    loop = asyncio.get_running_loop()
    loop.call_later(0.05, topic.lack, NOT_FOUND)
    loop.call_soon(time.sleep, 0.1)
    with pytest.raises(Refusal) as refused:
        await start
    assert refused.value.reason == NOT_FOUND


async def test_a_defect_of_a_reader_of_redis_ends_nothing(hub: Watchers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiveResults, "counters", AsyncMock(side_effect=RuntimeError("the driver's own mistake")))
    stop = asyncio.Event()
    running = asyncio.ensure_future(hub.run(stop))
    with pytest.raises(Refusal) as refused:
        async with hub.watch([uuid4()], {}, patience=0.1):
            pass
    # As whoever comes while no store answers.
    assert refused.value.reason == UNAVAILABLE
    stop.set()
    await running


async def test_a_watcher_is_sent_away_when_the_server_stops(hub: Watchers) -> None:
    stop = asyncio.Event()
    running = asyncio.ensure_future(hub.run(stop))
    topic = new_topic()
    watcher = watcher_of(hub, topic)
    hub._watchers.add(watcher)
    reading = asyncio.ensure_future(watcher.next())
    await asyncio.sleep(0.02)
    stop.set()
    with pytest.raises(Refusal, match="stopping"):
        await reading
    await running


async def test_a_crowd_of_watchers_holds_up_no_other_call(hub: Watchers) -> None:
    stop = asyncio.Event()
    running = asyncio.ensure_future(hub.run(stop))
    topic = Topic(uuid4(), b"channel", hub._changed)
    written = 0

    async def write(_: bytes) -> None:
        nonlocal written
        # About what gRPC takes.
        until = time.perf_counter() + 30e-6
        while time.perf_counter() < until:
            pass
        written += 1

    watchers = [watcher_of(hub, topic) for _ in range(10_000)]
    reading = [asyncio.ensure_future(watcher.forward(write, no_room)) for watcher in watchers]
    await asyncio.sleep(0)

    async def change() -> None:
        topic.offer(at(2), b"results")
        while written < len(watchers):
            await asyncio.sleep(0)

    pause, seconds = await longest_pause(change())
    assert pause < seconds / 3
    for watching in reading:
        watching.cancel()
    stop.set()
    await running


@asynccontextmanager
async def no_room(*_: object) -> AsyncIterator[None]:
    raise AssertionError("results are small")
    yield
