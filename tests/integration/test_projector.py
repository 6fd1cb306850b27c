"""The projectors against the real NATS, Redis and Postgres: every vote counted once, whatever happens on the way."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import StreamConfig
from prometheus_client import REGISTRY
from redis.asyncio import Redis
from tally.event.v1.event_pb2 import Event, PollCreated, VotesCast
from tally.poll.v1.poll_pb2 import POLL_STATE_CLOSED, POLL_STATE_OPEN, PollOption, PollSpec
from tally.query.v1.query_service_pb2 import RESULTS_SOURCE_LIVE_CACHE, GetResultsResponse, Results

from contracts.bus import (
    ALL_EVENTS,
    DEPLOYMENT_METADATA,
    EPOCH_HEADER,
    EPOCH_METADATA,
    REPUBLISH,
    STREAM,
    VERSION_HEADER,
    event_subject,
    republish_request,
)
from contracts.dead_letters import DeadLetter
from contracts.live import FIRST_GENERATION, filling_key, live_channel, live_key, position_key
from contracts.log_epoch import ZERO
from contracts.read_database import vote_key
from contracts.read_models import READ_MODELS
from projector import session
from projector.__main__ import KINDS, ReadDatabaseSettings, RedisSettings, project
from projector.documents import Documents
from projector.fold import advance
from projector.live import Live
from projector.read_model import Change, Displaced
from projector.session import Session
from projector.stream import Message, Position
from projector.views import Views
from relay import comparison, repair
from relay.__main__ import RelaySettings, relay
from runtime.embedded import Stores
from tests.event_log import EventLog, WrittenPoll
from tests.event_log import sql as log_sql
from tests.processes import eventually, service
from tests.servers import views_of

Runner = Callable[[asyncio.Event], Awaitable[None]]


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def read(read_dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(views_of(read_dsn))
    yield connection
    await connection.close()


class Everything:
    """All there is to run, and to look at."""

    def __init__(
        self, log: EventLog, redis: Redis, read: asyncpg.Connection, bus: Client, settings: dict[str, str]
    ) -> None:
        self.log = log
        self.redis = redis
        self.read = read
        self.bus = bus
        self.settings = settings
        # Projectors have the stream alone, unless a test gives them the event log as well.
        self.projectors = {name: value for name, value in settings.items() if name != "write_dsn"}

    @property
    def relay(self) -> Runner:
        return lambda stop: relay(RelaySettings(**self.settings), stop)  # type: ignore[arg-type]

    @property
    def live(self) -> Runner:
        return lambda stop: project(Live, RedisSettings(**self.projectors), stop)  # type: ignore[arg-type]

    @property
    def views(self) -> Runner:
        return lambda stop: project(Views, ReadDatabaseSettings(**self.projectors), stop)  # type: ignore[arg-type]

    @property
    def documents(self) -> Runner:
        return lambda stop: project(Documents, ReadDatabaseSettings(**self.projectors), stop)  # type: ignore[arg-type]

    async def stream(self) -> JetStreamContext:
        """An empty stream, for tests that publish themselves."""
        jetstream: JetStreamContext = self.bus.jetstream()
        deployment, self.epoch = await self.log.connection.fetchrow(
            "SELECT deployment_id, log_epoch FROM deployment, current_log_epoch"
        )
        metadata = {DEPLOYMENT_METADATA: str(deployment), EPOCH_METADATA: str(self.epoch)}
        await jetstream.add_stream(StreamConfig(name=STREAM, subjects=[ALL_EVENTS], metadata=metadata))
        return jetstream

    async def publish(self, poll: WrittenPoll, events: Sequence[Event]) -> None:
        for event in events:
            await self.publish_bytes(poll, event.version, event.SerializeToString())

    async def publish_bytes(self, poll: WrittenPoll, version: int, data: bytes) -> None:
        headers = {VERSION_HEADER: str(version), EPOCH_HEADER: str(self.epoch)}
        await self.bus.jetstream().publish(event_subject(0, poll.poll_id), data, headers=headers)

    async def dead_letters(self, read_model: str) -> list[DeadLetter]:
        """The events that parked polls wait for."""
        setting = READ_MODELS[read_model].removeprefix("TALLY_").lower()
        async with KINDS[read_model].connect(self.settings[setting]) as model:
            return await model.dead_letters()

    async def results(self, poll: WrittenPoll) -> Results:
        """What Redis has of a poll."""
        value = await self.redis.hget(live_key(FIRST_GENERATION, poll.poll_id), "results")
        assert isinstance(value, bytes)
        return GetResultsResponse.FromString(value).results

    async def in_redis(self, poll: WrittenPoll) -> None:
        """Fails unless Redis has exactly what was written."""
        assert await self.redis.hget(live_key(FIRST_GENERATION, poll.poll_id), "version") == b"%d" % poll.version
        results = await self.results(poll)
        assert [count.count for count in results.counts] == poll.counts
        assert [(count.option_id, count.label) for count in results.counts] == [
            (option.option_id, option.label) for option in poll.spec.options
        ]
        assert (results.poll_id, results.version) == (str(poll.poll_id), poll.version)
        assert (results.total_votes, results.source) == (sum(poll.counts), RESULTS_SOURCE_LIVE_CACHE)

    async def in_views(self, poll: WrittenPoll) -> None:
        """Fails unless the read database has exactly what was written."""
        row = await self.read.fetchrow("SELECT * FROM polls WHERE poll_id = $1", poll.poll_id)
        assert row is not None
        assert (row["version"], row["counts"]) == (poll.version, poll.counts)
        assert row["total_votes"] == len(poll.voters)
        votes = await self.read.fetch("SELECT vote_key, version FROM votes WHERE poll_no = $1", row["poll_no"])
        assert {vote["vote_key"]: vote["version"] for vote in votes} == {
            vote_key(voter, row["poll_no"]): version for voter, version in poll.voters.items()
        }

    async def in_documents(self, poll: WrittenPoll) -> None:
        """Fails unless the document has exactly what was written."""
        row = await self.read.fetchrow("SELECT * FROM documents.documents WHERE poll_id = $1", poll.poll_id)
        assert row is not None
        document = json.loads(row["document"])
        assert (row["version"], document["version"], document["poll_id"]) == (
            poll.version,
            poll.version,
            str(poll.poll_id),
        )
        assert [option["option_id"] for option in document["options"]] == [
            option.option_id for option in poll.spec.options
        ]
        assert [option["count"] for option in document["options"]] == poll.counts
        assert document["turnout"]["total_votes"] == len(poll.voters)

    async def counted(self, *polls: WrittenPoll) -> None:
        """Waits until live and views have these polls as they were written."""
        await self.live_counted(*polls)
        await self.views_counted(*polls)

    async def live_counted(self, *polls: WrittenPoll) -> None:
        for poll in polls:
            await eventually(lambda poll=poll: self.in_redis(poll))  # type: ignore[misc]

    async def views_counted(self, *polls: WrittenPoll) -> None:
        for poll in polls:
            await eventually(lambda poll=poll: self.in_views(poll))  # type: ignore[misc]

    async def documents_counted(self, *polls: WrittenPoll) -> None:
        for poll in polls:
            await eventually(lambda poll=poll: self.in_documents(poll))  # type: ignore[misc]


@pytest.fixture
async def all_(
    log: EventLog,
    redis: Redis,
    read: asyncpg.Connection,
    bus: Client,
    write_dsn: str,
    read_dsn: str,
    nats_url: str,
    redis_url: str,
) -> Everything:
    settings = {"write_dsn": write_dsn, "read_dsn": read_dsn, "nats_url": nats_url, "redis_url": redis_url}
    return Everything(log, redis, read, bus, settings)


@asynccontextmanager
async def running(*runners: Runner) -> AsyncIterator[None]:
    """Relay and projectors, in this process."""
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for runner in runners:
            tasks.create_task(_run(runner, stop))
        yield
        stop.set()


async def _run(runner: Runner, stop: asyncio.Event) -> None:
    await runner(stop)


async def test_votes_arrive_in_both_read_models(all_: Everything) -> None:
    log = all_.log
    async with running(all_.relay, all_.live, all_.views):
        polls = [await log.poll(options=number) for number in (2, 3, 35)]
        for number in range(60):
            await log.cast(polls[number % 3], votes=random.choice((1, 7, 300)))
        await log.close(polls[0])
        await all_.counted(*polls)
    results = await all_.results(polls[0])
    last = (await log.events(polls[0]))[-1]
    assert (results.state, results.as_of) == (POLL_STATE_CLOSED, last.recorded_at)


async def test_a_ballot_with_several_marks_is_one_vote(all_: Everything) -> None:
    def applied() -> float:
        return REGISTRY.get_sample_value("tally_projector_votes_total", {"read_model": "views"}) or 0.0

    before = applied()
    async with running(all_.relay, all_.views):
        poll = await all_.log.poll(options=4)
        await all_.log.cast(poll, votes=5, marks=3)
        await all_.views_counted(poll)
    assert applied() - before == 5


async def test_the_views_say_all_there_is_to_know_of_a_poll(all_: Everything) -> None:
    log = all_.log
    async with running(all_.relay, all_.views):
        draft, closed = await log.poll(opened=False), await log.poll()
        await log.cast(closed, votes=3)
        await all_.views_counted(draft, closed)
        await log.close(closed)
        await all_.views_counted(closed)
    moments = [event.recorded_at.ToDatetime(UTC) for event in await log.events(closed)]
    row = await all_.read.fetchrow("SELECT * FROM polls WHERE poll_id = $1", closed.poll_id)
    assert (row["state"], row["method"]) == ("CLOSED", "SINGLE_CHOICE")
    assert (row["title"], row["description"]) == ("Which?", "…")
    assert row["option_ids"] == ["option-0", "option-1", "option-2"]
    assert row["option_labels"] == ["Option 0", "Option 1", "Option 2"]
    assert [row["created_at"], row["opened_at"], row["closed_at"], row["as_of"]] == [
        moments[0],
        moments[1],
        moments[3],
        moments[3],
    ]
    votes = await all_.read.fetch("SELECT recorded_at FROM votes WHERE poll_no = $1", row["poll_no"])
    assert [vote["recorded_at"] for vote in votes] == [moments[2]] * 3
    row = await all_.read.fetchrow("SELECT * FROM polls WHERE poll_id = $1", draft.poll_id)
    assert (row["state"], row["opened_at"], row["closed_at"]) == ("DRAFT", None, None)


async def test_duplicates_disorder_and_holes_change_no_count(all_: Everything) -> None:
    log = all_.log
    await all_.stream()
    polls = [await log.poll() for _ in range(3)]
    for _ in range(20):
        for poll in polls:
            await log.cast(poll, votes=random.randrange(1, 20))
    asked: dict[str, int] = {}

    async def on_request(message: Msg) -> None:
        request = json.loads(message.data)
        asked.setdefault(request["poll_id"], request["from_version"])

    await all_.bus.subscribe(REPUBLISH, cb=on_request)
    twice, shuffled, holed = [await log.events(poll) for poll in polls]
    async with running(all_.live, all_.views):
        await all_.publish(polls[0], [event for event in twice for _ in range(2)])
        disorder = shuffled * 2
        random.shuffle(disorder)
        # In the end they all come in order: until then, nothing is applied after a gap.
        await all_.publish(polls[1], disorder + shuffled)
        await all_.publish(polls[2], [*holed[:7], *holed[8:]])
        await all_.counted(polls[0], polls[1])

        async def is_asked() -> None:
            assert asked.get(str(polls[2].poll_id)) == 8

        await eventually(is_asked)
        version = await all_.redis.hget(live_key(FIRST_GENERATION, polls[2].poll_id), "version")
        assert version == b"7"
        await all_.publish(polls[2], holed[7:])
        await all_.counted(*polls)


async def test_it_asks_until_the_missing_event_comes_also_after_a_restart(all_: Everything) -> None:
    log = all_.log
    await all_.stream()
    poll, other = await log.poll(), await log.poll()
    for _ in range(5):
        await log.cast(poll)
    events = await log.events(poll)
    requests: list[float] = []

    async def on_request(_: Msg) -> None:
        requests.append(asyncio.get_running_loop().time())

    async def asked(count: int) -> None:
        async def enough() -> None:
            assert len(requests) >= count

        await eventually(enough)

    await all_.bus.subscribe(REPUBLISH, cb=on_request)
    async with running(all_.live):
        await all_.publish(poll, [*events[:3], *events[4:]])
        await all_.publish(other, await log.events(other))
        await all_.live_counted(other)
        await asked(3)
    pauses = [later - earlier for earlier, later in pairwise(requests)]
    assert min(pauses) > 0.1
    requests.clear()
    async with running(all_.live):
        # No new event comes: the position in the stream is held back to before the gap.
        await asked(1)
        await all_.publish(poll, events[3:])
        await all_.live_counted(poll)
    requests.clear()
    async with running(all_.live):
        await log.cast(other)
        await all_.publish(other, await log.events(other))
        await all_.live_counted(other)
    assert requests == []


@pytest.mark.parametrize("failpoint", ["projector.before_store", "projector.after_store"])
async def test_killed_at_any_point_it_counts_each_vote_once(all_: Everything, tmp_path: Path, failpoint: str) -> None:
    log = all_.log
    poll = await log.poll()
    for _ in range(10):
        await log.cast(poll, votes=5)
    async with running(all_.relay):
        for _ in range(2):
            for read_model in READ_MODELS:
                settings = all_.projectors | {"failpoint": failpoint}
                async with service(tmp_path, "projector", read_model, **settings) as process:
                    await process.ended()
                    assert process.how_it_ended() == "was killed by SIGKILL"
            await log.cast(poll, votes=5)
        async with running(all_.live, all_.views, all_.documents):
            await all_.counted(poll)
            await all_.documents_counted(poll)


async def test_killed_again_and_again_it_counts_each_vote_once(all_: Everything, tmp_path: Path) -> None:
    log = all_.log
    polls = [await log.poll() for _ in range(3)]
    async with (
        running(all_.relay),
        service(tmp_path, "projector", "live", **all_.projectors) as live_process,
        service(tmp_path, "projector", "views", **all_.projectors) as views_process,
    ):
        for _ in range(3):
            for process in (live_process, views_process):
                for number in range(60):
                    await log.cast(polls[number % 3], votes=100)
                    if number == 30:
                        process.kill()
                await process.ended()
                await process.start()
        await all_.counted(*polls)


async def test_sigterm_ends_it_at_once(all_: Everything, tmp_path: Path) -> None:
    poll = await all_.log.poll()
    async with running(all_.relay):
        for read_model in ("live", "views"):
            async with service(tmp_path, "projector", read_model, **all_.projectors) as process:
                assert await process.stop(3)
                assert process.how_it_ended() == "ended with status 0"
        async with running(all_.live, all_.views):
            await all_.counted(poll)


async def test_a_deleted_stream_heals(all_: Everything) -> None:
    log = all_.log
    idle, busy = await log.poll(), await log.poll()
    async with running(all_.relay, all_.live, all_.views):
        for _ in range(5):
            await log.cast(idle)
            await log.cast(busy)
        await all_.counted(idle, busy)
        # While the stream is gone, an event that is published before it is there again must not be lost.
        async with log.connection.transaction():
            await log.cast(idle)
            await all_.bus.jetstream().delete_stream(STREAM)
        await log.cast(busy)
        await all_.counted(idle, busy)


async def test_a_read_model_that_missed_the_lost_messages_gets_them(all_: Everything) -> None:
    log = all_.log
    polls = [await log.poll() for _ in range(3)]
    async with running(all_.relay, all_.live):
        await all_.live_counted(*polls)
        for _ in range(10):
            await log.cast(polls[0], votes=3)
            await log.cast(polls[1], votes=3)
        await all_.live_counted(*polls)
    # The views never saw the stream. Now it is lost, and there is nothing new to come.
    await all_.bus.jetstream().delete_stream(STREAM)
    async with running(all_.relay, all_.views):
        await all_.views_counted(*polls)


async def test_a_stream_with_other_messages_in_the_same_places_is_read_from_its_beginning(all_: Everything) -> None:
    log = all_.log
    jetstream = await all_.stream()
    first, second = await log.poll(), await log.poll()
    async with running(all_.live, all_.views):
        await all_.publish(first, await log.events(first))
        await all_.counted(first)
    await jetstream.delete_stream(STREAM)
    await all_.stream()
    # As many as were read before, so that the numbers alone tell nothing.
    await all_.publish(second, await log.events(second))
    async with running(all_.live, all_.views):
        await all_.counted(first, second)


async def test_a_wiped_redis_is_filled_again(all_: Everything) -> None:
    log = all_.log

    async def is_filled() -> bool:
        return not await all_.redis.exists(filling_key(FIRST_GENERATION))

    def requests() -> float:
        return REGISTRY.get_sample_value("tally_projector_republish_requests_total", {"read_model": "live"}) or 0

    async def has_asked(times: float) -> bool:
        return requests() >= times

    async def has_a_gap() -> bool:
        return REGISTRY.get_sample_value("tally_projector_open_gaps", {"read_model": "live"}) == 1

    idle, busy = await log.poll(), await log.poll()
    async with running(all_.relay, all_.live):
        await log.cast(idle, votes=10)
        await log.cast(busy, votes=10)
        await all_.live_counted(idle, busy)
        # While nothing happens.
        await all_.redis.flushall()
        await all_.live_counted(idle, busy)
        await eventually(is_filled)
        # While votes come.
        for number in range(40):
            await log.cast(busy, votes=10)
            if number == 20:
                await all_.redis.flushall()
        await all_.live_counted(idle, busy)
    # While nobody looks, and the stream does not reach back to the beginning.
    await all_.redis.flushall()
    await all_.bus.jetstream().purge_stream(STREAM, keep=1)
    await log.cast(idle)
    await log.cast(busy)
    async with running(all_.live):
        # What is missing is not there yet: this copy is nobody's.
        await eventually(has_a_gap)
        asked = requests()
        await eventually(lambda: has_asked(asked + 1))
        assert not await is_filled()
        async with running(all_.relay):
            await all_.live_counted(idle, busy)
            await eventually(is_filled)


async def test_a_poll_that_vanished_from_redis_is_published_again(all_: Everything) -> None:
    log = all_.log
    lost, kept = await log.poll(), await log.poll()
    async with running(all_.relay, all_.live):
        await log.cast(lost, votes=10)
        await all_.live_counted(lost, kept)
        await all_.redis.delete(live_key(FIRST_GENERATION, lost.poll_id))
        await log.cast(lost)
        await log.cast(kept)
        await all_.live_counted(lost, kept)


async def test_an_older_dump_of_redis_is_brought_up_to_date(all_: Everything) -> None:
    log = all_.log
    poll = await log.poll()
    async with running(all_.relay, all_.live):
        await log.cast(poll, votes=10)
        await all_.live_counted(poll)
        keys = [position_key(FIRST_GENERATION), live_key(FIRST_GENERATION, poll.poll_id)]
        dump = [await all_.redis.dump(key) for key in keys]
        await log.cast(poll, votes=10)
        await all_.live_counted(poll)
        for key, value in zip(keys, dump, strict=True):
            assert value
            await all_.redis.restore(key, 0, value, replace=True)
        await all_.live_counted(poll)
        await log.cast(poll, votes=10)
        await all_.live_counted(poll)


async def test_a_wiped_read_database_is_filled_again(all_: Everything) -> None:
    log = all_.log
    idle, busy = await log.poll(), await log.poll()
    async with running(all_.relay, all_.views):
        await log.cast(idle, votes=10)
        await all_.views_counted(idle, busy)
        await all_.read.execute("TRUNCATE polls, votes, stream_position")
        await all_.views_counted(idle, busy)
        await log.cast(busy)
        await all_.read.execute("TRUNCATE polls, votes, stream_position")
        await all_.views_counted(idle, busy)


async def test_two_projectors_of_one_read_model_count_nothing_twice(all_: Everything) -> None:
    log = all_.log
    polls = [await log.poll() for _ in range(3)]
    async with running(all_.relay, *[all_.live, all_.views, all_.documents] * 2):
        for number in range(60):
            await log.cast(polls[number % 3], votes=20)
        await all_.counted(*polls)
        await all_.documents_counted(*polls)


@pytest.mark.parametrize("kind", [Live, Views, Documents])
async def test_a_change_is_stored_whole_or_not_at_all(
    all_: Everything, kind: type[Live] | type[Views] | type[Documents]
) -> None:
    log = all_.log
    first, second = await log.poll(), await log.poll()
    url = all_.settings["redis_url" if kind is Live else "read_dsn"]
    check = {Live: all_.in_redis, Views: all_.in_views, Documents: all_.in_documents}[kind]

    async def change(poll: WrittenPoll, before: int) -> Change:
        events = await log.events(poll)
        tally = advance(None, events).tally
        assert tally
        return Change(str(poll.poll_id), before, tally, events[before:])

    async with kind.connect(url) as model:
        assert await model.position() is None
        await model.store([await change(first, 0)], {}, None, Position(1, 1))
        await check(first)
        assert (await model.load([str(first.poll_id), str(second.poll_id)])).keys() == {str(first.poll_id)}
        stored = await change(first, 0)
        await log.cast(first, votes=3)
        ahead = [await change(second, 0), await change(first, 2)]
        letter = DeadLetter(str(second.poll_id), 3, 7, 2, "field 99", "unknown", datetime.now(UTC), b"\0\xff")
        # Not the position, or not the version, that it was computed from: another process has written.
        for changes, old in [
            (ahead, None),
            (ahead, Position(1, 2)),
            (ahead, Position(2, 1)),
            ([ahead[0], await change(first, 1)], Position(1, 1)),
            ([ahead[0], await change(first, 0)], Position(1, 1)),
            ([ahead[1], (await change(second, 0))._replace(before=1)], Position(1, 1)),
        ]:
            with pytest.raises(Displaced):
                await model.store(changes, {letter.poll_id: letter}, old, Position(3, 3))
            assert await model.position() == Position(1, 1)
            assert await model.load([str(first.poll_id), str(second.poll_id)]) == {str(first.poll_id): stored.tally}
            assert await model.dead_letters() == []
        await model.store(ahead, {letter.poll_id: letter}, Position(1, 1), Position(3, 3))
        await check(first)
        await check(second)
        assert await model.position() == Position(3, 3)
        assert await model.dead_letters() == [letter]
        await model.store([], {letter.poll_id: letter._replace(latest=8)}, Position(3, 3), Position(3, 3))
        assert await model.dead_letters() == [letter._replace(latest=8)]
        await model.store([], {letter.poll_id: None}, Position(3, 3), Position(3, 3))
        assert await model.dead_letters() == []


def tampered(event: Event) -> bytes:
    return event.SerializeToString()[:-3]


def of_a_later_code(event: Event) -> bytes:
    event = Event(poll_id=event.poll_id, version=event.version, recorded_at=event.recorded_at)
    return event.SerializeToString() + b"\x9a\x06\x00"


def with_a_voter_who_voted_before(event: Event) -> bytes:
    event = Event.FromString(event.SerializeToString())
    event.votes_cast.voter_keys = event.votes_cast.voter_keys[:16] * 2
    return event.SerializeToString()


@pytest.mark.parametrize(
    ("read_model", "spoil", "event_type", "error"),
    [
        ("live", tampered, "unreadable", "is not an event of this poll"),
        ("views", tampered, "unreadable", "is not an event of this poll"),
        ("live", of_a_later_code, "field 99", "does not know"),
        ("views", of_a_later_code, "field 99", "does not know"),
        ("documents", of_a_later_code, "field 99", "does not know"),
        ("views", with_a_voter_who_voted_before, "votes_cast", "UniqueViolationError"),
    ],
)
async def test_an_event_that_cannot_be_applied_stops_only_its_poll(
    all_: Everything, read_model: str, spoil: Callable[[Event], bytes], event_type: str, error: str
) -> None:
    log = all_.log
    runner = {"live": all_.live, "views": all_.views, "documents": all_.documents}[read_model]
    check = {"live": all_.in_redis, "views": all_.in_views, "documents": all_.in_documents}[read_model]

    async def counted(poll: WrittenPoll) -> None:
        await eventually(lambda: check(poll))

    await all_.stream()
    bad, good = await log.poll(), await log.poll()
    for poll in (bad, good):
        for _ in range(4):
            await log.cast(poll, votes=2)
    events = await log.events(bad)
    await all_.publish(bad, events[:3])
    await all_.publish_bytes(bad, 4, spoil(events[3]))
    await all_.publish(bad, events[4:5])
    await all_.publish(good, await log.events(good))
    asked: list[dict[str, object]] = []

    async def on_request(message: Msg) -> None:
        asked.append(json.loads(message.data))

    async def waiting(events: int) -> DeadLetter:
        [letter] = await all_.dead_letters(read_model)
        assert (letter.poll_id, letter.version, letter.waiting) == (str(bad.poll_id), 4, events)
        return letter

    await all_.bus.subscribe(REPUBLISH, cb=on_request)
    async with running(runner):
        await counted(good)
        letter = await waiting(1)
        assert (letter.stream_sequence, letter.event_type) == (4, event_type)
        assert error in letter.error
        assert letter.data == spoil(events[3])
        assert session._parked.labels(read_model)._value.get() == 1
        # What comes later waits, and nobody is asked for what is there.
        await all_.publish(bad, events[5:])
        await eventually(lambda: waiting(2))
        assert asked == []
    session._parked.labels(read_model).set(0)
    async with running(runner):
        # Another code may know better: it tries again, once.
        await eventually(lambda: _true(asked))
        assert asked[0] == {"poll_id": str(bad.poll_id), "from_version": 4}
        await all_.publish_bytes(bad, 4, spoil(events[3]))
        await log.cast(good)
        await all_.publish(good, (await log.events(good))[-1:])
        await counted(good)
        assert await waiting(2) == letter._replace(latest=6, stream_sequence=13, error=(await waiting(2)).error)
        assert session._parked.labels(read_model)._value.get() == 1
        # Once what comes is mended, the poll goes on.
        await all_.publish(bad, events)
        await counted(bad)
        assert await all_.dead_letters(read_model) == []
        assert session._parked.labels(read_model)._value.get() == 0


@pytest.mark.parametrize("failpoint", ["projector.before_store", "projector.after_store"])
async def test_killed_while_it_parks_a_poll_it_skips_nothing(all_: Everything, tmp_path: Path, failpoint: str) -> None:
    log = all_.log
    await all_.stream()
    poll = await log.poll()
    await log.cast(poll, votes=2)
    await log.cast(poll)
    await log.cast(poll)
    events = await log.events(poll)
    await all_.publish(poll, events[:3])
    await all_.publish_bytes(poll, 4, of_a_later_code(events[3]))
    await all_.publish(poll, events[4:])
    for read_model in ("live", "views"):
        async with service(tmp_path, "projector", read_model, **all_.projectors | {"failpoint": failpoint}) as process:
            await process.ended()
    async with running(all_.live, all_.views):
        await eventually(lambda: _stands_still(all_, poll))
        assert (await all_.results(poll)).total_votes == 2
        await all_.publish(poll, events[3:])
        await all_.counted(poll)


async def test_a_beginning_that_the_code_of_the_store_cannot_express_stops_only_its_poll(all_: Everything) -> None:
    log = all_.log
    await all_.stream()
    bad, good = await log.poll(), await log.poll()
    events = await log.events(bad)
    later = Event.FromString(events[0].SerializeToString())
    # A method that a later version of the contract may have.
    later.poll_created.poll.method = 99  # type: ignore[assignment]
    await all_.publish(bad, [later, *events[1:]])
    await all_.publish(good, await log.events(good))
    async with running(all_.views):
        await all_.views_counted(good)
        [letter] = await all_.dead_letters("views")
        assert (letter.poll_id, letter.version, letter.event_type) == (str(bad.poll_id), 1, "poll_created")
        assert "ValueError" in letter.error
        await all_.publish(bad, events)
        await all_.views_counted(bad)


async def _true(value: object) -> bool:
    return bool(value)


@pytest.mark.parametrize("restarted", [True, False])
async def test_a_poll_that_goes_on_gets_all_that_came_while_it_stood_still(
    all_: Everything, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    # What is asked for is published by threes; and the relay does not look at the stream's end, which they are then.
    monkeypatch.setattr(repair, "RANGE_EVENTS", 3)
    monkeypatch.setattr(comparison, "LOOK_SECONDS", 1000)
    log = all_.log
    poll = await log.poll()
    for _ in range(9):
        await log.cast(poll)
    events = await log.events(poll)
    await all_.stream()
    await all_.publish(poll, events[:3])
    await all_.publish_bytes(poll, 4, of_a_later_code(events[3]))
    await all_.publish(poll, events[4:])
    await log.connection.execute("DELETE FROM outbox")

    # No later event of the poll comes, and the stream has its end: only the letter knows what is missing.
    async def goes_on() -> None:
        for read_model in ("live", "views"):
            assert await all_.dead_letters(read_model) == []
        await all_.in_redis(poll)
        await all_.in_views(poll)

    async with running(all_.live, all_.views):
        await eventually(lambda: _stands_still(all_, poll))
        if not restarted:
            async with running(all_.relay):

                async def is_replayed() -> None:
                    await all_.bus.publish(REPUBLISH, republish_request(poll.poll_id, 4))
                    await goes_on()

                await eventually(is_replayed)
    if restarted:
        async with running(all_.relay, all_.live, all_.views):
            await eventually(goes_on)


async def _stands_still(all_: Everything, poll: WrittenPoll) -> None:
    for read_model in ("live", "views"):
        letters = await all_.dead_letters(read_model)
        assert [(letter.version, letter.latest) for letter in letters] == [(4, poll.version)]


async def test_a_wiped_read_model_parks_the_poll_again(all_: Everything) -> None:
    log = all_.log
    await all_.stream()
    poll = await log.poll()
    for _ in range(3):
        await log.cast(poll)
    events = await log.events(poll)
    await all_.publish(poll, events[:3])
    await all_.publish_bytes(poll, 4, of_a_later_code(events[3]))
    await all_.publish(poll, events[4:])
    async with running(all_.live, all_.views):
        await eventually(lambda: _stands_still(all_, poll))
        await all_.redis.flushall()
        await all_.read.execute("TRUNCATE polls, votes, stream_position, dead_letters")
        await eventually(lambda: _stands_still(all_, poll))
        assert (await all_.results(poll)).version == 3


async def test_readers_skip_what_is_ignorable_and_unknown_to_them(all_: Everything) -> None:
    log = all_.log
    poll = await log.poll()
    await log.cast(poll, votes=3)
    # As a later code would write it, which knows a change with the number 99.
    later = Event(ignorable=True).SerializeToString() + b"\x9a\x06\x02\x08\x01"
    columns = ("OPEN", poll.spec.SerializeToString(), None, None, later)
    poll.version = await log.connection.fetchval(log_sql.change_poll, poll.poll_no, *columns)
    async with running(all_.relay, all_.live, all_.views):
        await all_.counted(poll)
        await log.cast(poll, votes=2)
        await all_.counted(poll)
    assert poll.version == 5
    assert await all_.dead_letters("live") == await all_.dead_letters("views") == []


async def test_what_is_not_of_a_poll_is_left_alone(all_: Everything) -> None:
    jetstream = await all_.stream()
    poll, other = await all_.log.poll(), await all_.log.poll()
    nonsense = Event(poll_id="nonsense", version=1, votes_cast=VotesCast()).SerializeToString()
    await jetstream.publish("tally.events.0.nonsense", nonsense)
    await jetstream.publish("tally.events.0", b"")
    mixed_up = (await all_.log.events(other))[0].SerializeToString()
    await all_.publish(poll, await all_.log.events(poll))
    await jetstream.publish(event_subject(0, poll.poll_id), mixed_up)
    async with running(all_.live, all_.views):
        await all_.counted(poll)


async def test_watchers_hear_of_every_change_in_the_bytes_that_are_stored(all_: Everything) -> None:
    log = all_.log
    poll = await log.poll()
    heard: list[bytes] = []
    async with running(all_.relay, all_.live), all_.redis.pubsub() as channel:
        await all_.live_counted(poll)
        await channel.subscribe(live_channel(poll.poll_id))
        for _ in range(20):
            await log.cast(poll, votes=2)
        await all_.live_counted(poll)
        while not heard or heard[-1] != await all_.redis.hget(live_key(FIRST_GENERATION, poll.poll_id), "results"):
            message = await channel.get_message(ignore_subscribe_messages=True, timeout=5)
            if message:
                heard.append(message["data"])
    results = [GetResultsResponse.FromString(data).results for data in heard]
    versions = [result.version for result in results]
    assert versions == sorted(set(versions))
    assert {result.state for result in results} == {POLL_STATE_OPEN}
    assert all(result.total_votes == 2 * (result.version - 2) for result in results)


async def test_a_vote_is_seen_soon(all_: Everything) -> None:
    log = all_.log
    poll = await log.poll()
    waits: list[float] = []
    loop = asyncio.get_running_loop()
    async with running(all_.relay, all_.live), all_.redis.pubsub() as channel:
        await all_.live_counted(poll)
        await channel.subscribe(live_channel(poll.poll_id))
        for _ in range(6):
            # Long enough for the relay to look less often.
            await asyncio.sleep(0.3)
            await log.cast(poll)
            committed = loop.time()
            while True:
                message = await channel.get_message(ignore_subscribe_messages=True, timeout=5)
                if message and GetResultsResponse.FromString(message["data"]).results.version == poll.version:
                    break
            waits.append(loop.time() - committed)
    # Typically; a busy machine may be slower now and then.
    assert sorted(waits)[len(waits) // 2] < 0.05


async def test_it_outlives_nats_redis_and_postgres(all_: Everything, stores: Stores) -> None:
    log = all_.log
    poll = await log.poll()
    async with running(all_.relay, all_.live, all_.views):
        await all_.counted(poll)
        for process in (stores.nats_process, stores.redis_process):
            process.kill()
            await process.ended()
            await log.cast(poll)
            await process.start()
            await all_.redis.connection_pool.disconnect()
            await all_.counted(poll)
        admin = await asyncpg.connect(stores.admin_dsn)
        await admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'projector views'"
        )
        await admin.close()
        await log.cast(poll)
        await all_.counted(poll)


async def test_no_more_polls_are_kept_in_memory_than_fit(all_: Everything, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_CACHED_OPTIONS", 10)
    log = all_.log
    async with running(all_.relay, all_.live, all_.views):
        polls = [await log.poll(options=4) for _ in range(6)]
        for number in range(60):
            await log.cast(polls[number % 6])
        await all_.counted(*polls)
        for poll in polls:
            await log.cast(poll)
        await all_.counted(*polls)


async def test_many_large_polls_are_changed_a_few_at_a_time(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one batch, they would take gigabytes with what is made of them."""
    stored: list[int] = []
    store = Live.store

    async def counted(model: Live, changes: Any, letters: Any, old: Any, new: Any) -> None:
        stored.append(sum(len(change.tally.options) for change in changes))
        await store(model, changes, letters, old, new)

    monkeypatch.setattr(Live, "store", counted)
    options = [PollOption(option_id=f"option-{number}", label="?") for number in range(1000)]
    large, small = [str(uuid4()) for _ in range(50)], [str(uuid4()) for _ in range(50)]
    messages: list[Message] = []
    for poll_id in [*large, *small]:
        spec = PollSpec(title="?", options=options if poll_id in large else options[:2])
        event = Event(poll_id=poll_id, version=1, poll_created=PollCreated(poll=spec))
        event.recorded_at.GetCurrentTime()
        place = Position(len(messages) + 1, 1)
        messages.append(Message(f"tally.events.0.{poll_id}", event.SerializeToString(), place, 0, 1))
    async with Live.connect(redis_url) as model:
        session = Session(model)
        await session.begin(ZERO)
        assert await session.apply(messages, messages[-1].position) == (100, 0)
        assert len(await model.load([*large, *small])) == 100
        assert await model.position() == messages[-1].position
    assert max(stored) <= 20_000
    # Of small ones many go together.
    assert len(stored) < 10
