"""Projectors that read the event log: what the stream does not have is found and brought, and damage stays where it is.

No relay runs here unless a test says so: what arrives comes from the log.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import nats
import pytest
from google.protobuf.message import DecodeError
from nats.aio.client import Client
from nats.js.api import StreamConfig
from nats.js.errors import NotFoundError
from prometheus_client import REGISTRY
from redis.asyncio import Redis
from redis.exceptions import ResponseError
from tally.query.v1.query_service_pb2 import (
    READ_MODEL_STATE_FILLING,
    READ_MODEL_STATE_READING,
    GetReadModelStatusResponse,
    GetResultsResponse,
    ReadModelStatus,
)

from contracts.bus import ALL_EVENTS, DEPLOYMENT_METADATA, EPOCH_METADATA, STREAM, event_headers, event_subject
from contracts.live import (
    DEPLOYMENT_KEY,
    FIRST_GENERATION,
    GENERATION_KEY,
    STATUS_KEY,
    dead_letters_key,
    filling_key,
    frozen_key,
    live_key,
    position_key,
    set_aside_key,
)
from contracts.read_models import READ_MODELS
from projector import comparison, projection
from projector import event_log as log_reader
from projector.__main__ import KINDS, SETTINGS, project
from projector.live import generation_in_use
from tests.event_log import EventLog, WrittenPoll, event_log
from tests.processes import eventually

ALL = ["live", "views", "documents"]


class Stage:
    """An event log, an empty stream, and the read models."""

    def __init__(self, log: EventLog, redis: Redis, read: asyncpg.Pool, bus: Client, settings: dict[str, Any]):
        self.log = log
        self.redis = redis
        self.read = read
        self.bus = bus
        self.settings = settings

    async def epoch(self) -> UUID:
        epoch: UUID = await self.log.connection.fetchval("SELECT log_epoch FROM current_log_epoch")
        return epoch

    async def deployment(self) -> UUID:
        deployment: UUID = await self.log.connection.fetchval("SELECT deployment_id FROM deployment")
        return deployment

    async def begin_epoch(self) -> UUID:
        epoch: UUID = await self.log.connection.fetchval("SELECT log_epoch FROM begin_log_epoch('a test')")
        return epoch

    async def make_stream(self, epoch: UUID | None = None, deployment: UUID | None = None) -> None:
        """As the relay does it."""
        metadata = {EPOCH_METADATA: str(epoch or await self.epoch())}
        metadata[DEPLOYMENT_METADATA] = str(deployment or await self.deployment())
        config = StreamConfig(name=STREAM, subjects=[ALL_EVENTS], metadata=metadata)
        try:
            await self.bus.jetstream().update_stream(config)
        except NotFoundError:
            await self.bus.jetstream().add_stream(config)

    async def publish(self, poll: WrittenPoll, first: int = 1, epoch: UUID | None = None) -> None:
        """As the relay does it: the poll's events from a version on."""
        epoch = epoch or await self.epoch()
        for event in (await self.log.events(poll))[first - 1 :]:
            headers = event_headers(epoch, event.version, event.recorded_at.ToDatetime(UTC))
            await self.bus.jetstream().publish(
                event_subject(0, poll.poll_id), event.SerializeToString(), headers=headers
            )

    @asynccontextmanager
    async def running(self, *read_models: str, log: bool = True) -> AsyncIterator[None]:
        stop = asyncio.Event()
        settings = self.settings if log else self.settings | {"write_dsn": None}
        async with asyncio.TaskGroup() as tasks:
            for name in read_models:
                tasks.create_task(project(KINDS[name], SETTINGS[READ_MODELS[name]](**settings), stop))
            yield
            stop.set()

    async def has(self, read_model: str, poll: WrittenPoll) -> None:
        """Fails unless a read model has exactly what was written, and says so to readers."""
        if read_model == "live":
            generation = await generation_in_use(self.redis)
            assert not await self.redis.exists(filling_key(generation))
            try:
                stored: Any = await self.redis.hget(live_key(generation, poll.poll_id), "results")
                results = GetResultsResponse.FromString(stored or b"").results
            except (ResponseError, DecodeError) as error:
                raise AssertionError("damaged") from error
            version, counts = results.version, [count.count for count in results.counts]
        else:
            assert not await self.read.fetchval(f"SELECT filling FROM {read_model}.stream_position")
            table = "views.polls" if read_model == "views" else "documents.documents"
            row = await self.read.fetchrow(f"SELECT * FROM {table} WHERE poll_id = $1", poll.poll_id)
            assert row is not None
            version, counts = row["version"], row["counts"]
            if read_model == "views":
                votes = await self.read.fetchval("SELECT count(*) FROM views.votes WHERE poll_no = $1", row["poll_no"])
                turnout = "SELECT coalesce(sum(votes), 0) FROM views.turnout WHERE poll_no = $1"
                assert votes == len(poll.voters) == await self.read.fetchval(turnout, row["poll_no"])
        assert (version, counts) == (poll.version, poll.counts)

    async def counted(self, read_model: str, *polls: WrittenPoll) -> None:
        for poll in polls:
            await eventually(lambda poll=poll: self.has(read_model, poll))  # type: ignore[misc]

    async def status(self, read_model: str) -> ReadModelStatus:
        """What the projector says of itself."""
        stored: Any
        if read_model == "live":
            stored = await self.redis.get(STATUS_KEY)
        else:
            stored = await self.read.fetchval(f"SELECT status FROM {read_model}.projector_status")
        response = GetReadModelStatusResponse.FromString(stored or b"")
        assert response.read_models
        return response.read_models[0]


@pytest.fixture
async def stage(write_dsn: str, read_dsn: str, nats_url: str, redis_url: str) -> AsyncIterator[Stage]:
    settings = {"write_dsn": write_dsn, "read_dsn": read_dsn, "nats_url": nats_url, "redis_url": redis_url}
    bus = await nats.connect(nats_url)
    async with (
        event_log(write_dsn) as log,
        Redis.from_url(redis_url) as redis,
        asyncpg.create_pool(read_dsn, min_size=1, max_size=4, statement_cache_size=0) as read,
    ):
        stage = Stage(log, redis, read, bus, settings)
        await stage.make_stream()
        yield stage
    await bus.close()


@pytest.fixture
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost is found at once, not within some seconds."""
    monkeypatch.setattr(comparison, "_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(comparison, "_ON_ITS_WAY_SECONDS", 0.05)
    monkeypatch.setattr(comparison, "_EPOCH_SECONDS", 0.3)


async def sent(stage: Stage) -> None:
    """Nothing waits for a relay: the stream has had it all, whether it still has it or not."""
    await stage.log.connection.execute("DELETE FROM outbox")


def metric(name: str, read_model: str) -> float:
    return REGISTRY.get_sample_value(name, {"read_model": read_model}) or 0.0


@pytest.mark.parametrize("read_model", ALL)
async def test_an_empty_read_model_is_filled_from_the_log(
    stage: Stage, read_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_reader, "_CHUNK_EVENTS", 7)
    polls = [await stage.log.poll(options=2 + number % 3) for number in range(50)]
    for number in range(60):
        await stage.log.cast(polls[number % 7], votes=1 + number % 5)
    # The stream has the latest events only.
    for poll in polls[:10]:
        await stage.publish(poll, poll.version)
    async with stage.running(read_model):
        await stage.counted(read_model, *polls)
        await stage.log.cast(polls[0], votes=3)
        await stage.publish(polls[0], polls[0].version)
        await stage.counted(read_model, *polls)

        async def is_read() -> bool:
            status = await stage.status(read_model)
            return (status.state, status.log_epoch) == (READ_MODEL_STATE_READING, str(await stage.epoch()))

        await eventually(is_read)


@pytest.mark.parametrize("read_model", ALL)
async def test_until_it_is_full_readers_are_told(
    stage: Stage, read_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls = [await stage.log.poll() for _ in range(5)]
    full, pages = asyncio.Event(), log_reader.EventLog.page

    async def page(self: log_reader.EventLog, after: int, _: int) -> Any:
        if after:
            await full.wait()
        return await pages(self, after, 3)

    monkeypatch.setattr(log_reader.EventLog, "page", page)

    async def fills() -> None:
        status = await stage.status(read_model)
        assert status.state == READ_MODEL_STATE_FILLING
        # Two events of each poll, and three polls are there.
        assert status.events_behind == 4
        if read_model == "live":
            assert await stage.redis.exists(filling_key(FIRST_GENERATION))
        else:
            assert await stage.read.fetchval(f"SELECT filling FROM {read_model}.stream_position")

    async with stage.running(read_model):
        await eventually(fills)
    # A projector that ended meanwhile goes on with filling.
    async with stage.running(read_model):
        await eventually(fills)
        full.set()
        await stage.counted(read_model, *polls)


@pytest.mark.parametrize("read_model", ALL)
async def test_what_the_stream_removed_before_it_was_read_comes_from_the_log(stage: Stage, read_model: str) -> None:
    ended, other = await stage.log.poll(), await stage.log.poll()
    async with stage.running(read_model):
        await stage.publish(ended)
        await stage.publish(other)
        await stage.counted(read_model, ended, other)
    # The end of a poll is in the stream for too short a time, and nothing comes after it.
    await stage.log.cast(ended, votes=5)
    await stage.log.close(ended)
    await stage.publish(ended, 3)
    await stage.bus.jetstream().purge_stream(STREAM)
    async with stage.running(read_model):
        await stage.counted(read_model, ended, other)


async def test_messages_that_are_removed_while_it_reads_are_missed(stage: Stage) -> None:
    lost, other = await stage.log.poll(), await stage.log.poll()
    async with stage.running("live"):
        await stage.publish(other)
        await stage.counted("live", other, lost)
        for number in range(6):
            await stage.log.cast(lost)
            await stage.log.cast(other)
            await stage.publish(lost, lost.version)
            if number == 2:
                info = await stage.bus.jetstream().stream_info(STREAM)
                await stage.bus.jetstream().delete_msg(STREAM, info.state.last_seq)
        await stage.publish(other, 3)
        await stage.counted("live", lost, other)


async def _sql(stage: Stage, statement: str, poll: WrittenPoll) -> None:
    await stage.read.execute(statement, poll.poll_id)


async def _hash(stage: Stage, poll: WrittenPoll, field: str, value: bytes) -> None:
    await stage.redis.hset(live_key(FIRST_GENERATION, poll.poll_id), field, value)


async def _replaced_by_a_list(stage: Stage, key: str) -> None:
    await stage.redis.delete(key)
    await stage.redis.rpush(key, "x")


async def _fewer_counts(stage: Stage, poll: WrittenPoll) -> None:
    await stage.read.execute("ALTER TABLE views.polls DROP CONSTRAINT polls_check")
    await _sql(stage, "UPDATE views.polls SET counts = counts[:1] WHERE poll_id = $1", poll)


LOSSES: dict[str, tuple[str, Callable[[Stage, WrittenPoll], Awaitable[object]]]] = {
    "evicted hash": ("live", lambda stage, poll: stage.redis.delete(live_key(FIRST_GENERATION, poll.poll_id))),
    "removed view": ("views", lambda stage, poll: _sql(stage, "DELETE FROM views.polls WHERE poll_id = $1", poll)),
    "removed document": (
        "documents",
        lambda stage, poll: _sql(stage, "DELETE FROM documents.documents WHERE poll_id = $1", poll),
    ),
}
DAMAGES: dict[str, tuple[str, Callable[[Stage, WrittenPoll], Awaitable[object]]]] = {
    "another type": ("live", lambda stage, poll: _replaced_by_a_list(stage, live_key(FIRST_GENERATION, poll.poll_id))),
    "garbage": ("live", lambda stage, poll: _hash(stage, poll, "results", b"\xff\x00garbage")),
    "of another version": ("live", lambda stage, poll: _hash(stage, poll, "version", b"1")),
    "no number": ("live", lambda stage, poll: _hash(stage, poll, "version", b"\xc3\x28")),
    "no version": (
        "live",
        lambda stage, poll: stage.redis.hdel(live_key(FIRST_GENERATION, poll.poll_id), "version"),
    ),
    "another poll's": (
        "live",
        lambda stage, poll: _hash(stage, poll, "results", GetResultsResponse().SerializeToString()),
    ),
    "unknown state": (
        "views",
        lambda stage, poll: _sql(stage, "UPDATE views.polls SET state = 'ODD' WHERE poll_id = $1", poll),
    ),
    "no label": (
        "views",
        lambda stage, poll: _sql(stage, "UPDATE views.polls SET option_labels[2] = NULL WHERE poll_id = $1", poll),
    ),
    "fewer counts": ("views", _fewer_counts),
    "certification": (
        "views",
        lambda stage, poll: _sql(stage, r"UPDATE views.polls SET certification = '\xffff' WHERE poll_id = $1", poll),
    ),
    "no turnout": (
        "documents",
        lambda stage, poll: _sql(
            stage, "UPDATE documents.documents SET document = document - 'turnout' WHERE poll_id = $1", poll
        ),
    ),
    "options of another type": (
        "documents",
        lambda stage, poll: _sql(
            stage, """UPDATE documents.documents SET document = document || '{"options": 7}' WHERE poll_id = $1""", poll
        ),
    ),
    "more counts": (
        "documents",
        lambda stage, poll: _sql(
            stage, "UPDATE documents.documents SET counts = counts || 9::bigint WHERE poll_id = $1", poll
        ),
    ),
}


@pytest.mark.usefixtures("without_pauses")
@pytest.mark.parametrize("loss", [*LOSSES, *DAMAGES])
@pytest.mark.parametrize("idle", [True, False], ids=["idle", "busy"])
async def test_one_poll_that_is_lost_or_damaged_is_made_anew(stage: Stage, loss: str, idle: bool) -> None:
    read_model, harm = (LOSSES | DAMAGES)[loss]
    harmed, other = await stage.log.poll(), await stage.log.poll()
    for poll in (harmed, other):
        await stage.log.cast(poll, votes=10)
    await sent(stage)
    async with stage.running(read_model):
        await stage.counted(read_model, harmed, other)
        damaged = metric("tally_projector_damaged_polls_total", read_model)
        await harm(stage, harmed)
        if not idle:
            for poll in (harmed, other):
                await stage.log.cast(poll, votes=2)
                await stage.publish(poll, poll.version)
            await sent(stage)
        # Only that one: the other is not disturbed by it.
        await stage.counted(read_model, other, harmed)
        if loss in DAMAGES and idle:
            # Where votes come, what is known of the poll may be written over the damage before that is read.
            await eventually(
                lambda: asyncio.sleep(0, metric("tally_projector_damaged_polls_total", read_model) > damaged)
            )
            await stage.counted(read_model, other, harmed)
    if read_model == "live" and loss in DAMAGES and idle:
        assert 0 < await stage.redis.ttl(set_aside_key(FIRST_GENERATION, harmed.poll_id)) <= 7 * 24 * 3600


@pytest.mark.parametrize(
    "key",
    [
        GENERATION_KEY,
        DEPLOYMENT_KEY,
        STATUS_KEY,
        *(name(FIRST_GENERATION) for name in (position_key, dead_letters_key, filling_key)),
    ],
)
@pytest.mark.parametrize("value", ["text", "list"])
async def test_no_damaged_key_stops_the_live_counters(stage: Stage, key: str, value: str) -> None:
    poll = await stage.log.poll()
    async with stage.running("live"):
        await stage.counted("live", poll)
    if value == "list":
        await _replaced_by_a_list(stage, key)
    elif key == dead_letters_key(FIRST_GENERATION):
        await stage.redis.hset(key, str(poll.poll_id), "{]")
    else:
        await stage.redis.set(key, b"\xff\xfe garbage")
    await stage.log.cast(poll, votes=3)
    async with stage.running("live"):
        await stage.counted("live", poll)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (position_key(FIRST_GENERATION), "-5 7"),
        (position_key(FIRST_GENERATION), "9" * 400 + " 7"),
        (position_key(FIRST_GENERATION), "5 7 not-an-epoch"),
        (frozen_key(FIRST_GENERATION), "for ever"),
        (GENERATION_KEY, "another:copy"),
    ],
)
async def test_no_damaged_value_stops_the_live_counters(stage: Stage, key: str, value: str) -> None:
    poll = await stage.log.poll()
    async with stage.running("live"):
        await stage.counted("live", poll)
        await stage.redis.set(key, value)
        await stage.log.cast(poll, votes=3)
        await stage.publish(poll, poll.version)
        await stage.counted("live", poll)


@pytest.mark.parametrize("letter", [b"7", b"{}", b'{"poll_id": 5, "version": 3, "latest": 3, "stream_sequence": 1}'])
async def test_a_dead_letter_that_cannot_be_read_is_dropped(stage: Stage, letter: bytes) -> None:
    poll = await stage.log.poll()
    async with stage.running("live"):
        await stage.counted("live", poll)
    whole = json.dumps(json.loads(letter) | LETTER) if letter != b"7" else letter
    await stage.redis.hset(dead_letters_key(FIRST_GENERATION), str(poll.poll_id), whole)
    await stage.log.cast(poll, votes=3)
    await stage.publish(poll, poll.version)
    async with stage.running("live"):
        await stage.counted("live", poll)
    assert not await stage.redis.exists(dead_letters_key(FIRST_GENERATION))


LETTER = {"event_type": "votes_cast", "error": "", "first_seen": "2026-01-01T00:00:00+00:00", "data": ""}


@pytest.mark.usefixtures("without_pauses")
@pytest.mark.parametrize("read_model", ALL)
async def test_a_new_history_of_the_log_is_a_new_read_model(stage: Stage, read_model: str) -> None:
    rewritten, kept = await stage.log.poll(), await stage.log.poll()
    for _ in range(4):
        await stage.log.cast(rewritten, votes=5)
    await sent(stage)
    old = await stage.epoch()
    async with stage.running(read_model):
        await stage.counted(read_model, rewritten, kept)
        rebuilds = metric("tally_projector_rebuilds_total", read_model)
        before, events = rewritten.version, await stage.log.events(rewritten)
        await _rewind(stage, rewritten, 3)
        new = await stage.begin_epoch()
        await stage.log.cast(rewritten, votes=1)
        await stage.make_stream(new)
        await sent(stage)
        await stage.counted(read_model, rewritten, kept)
        assert rewritten.version < before
        await eventually(lambda: asyncio.sleep(0, metric("tally_projector_rebuilds_total", read_model) > rebuilds))

        # What the stream still has of the history before is nothing: also where it would come next.
        headers = event_headers(old, 5, events[4].recorded_at.ToDatetime(UTC))
        await stage.bus.jetstream().publish(
            event_subject(0, rewritten.poll_id), events[4].SerializeToString(), headers=headers
        )
        await stage.log.cast(kept, votes=2)
        await stage.publish(kept, kept.version)
        await stage.counted(read_model, kept, rewritten)

        async def is_told() -> bool:
            return (await stage.status(read_model)).log_epoch == str(new)

        await eventually(is_told)


async def _rewind(stage: Stage, poll: WrittenPoll, version: int) -> None:
    """As a backup that does not have the events after a version."""
    async with stage.log.connection.transaction():
        await stage.log.connection.execute("DELETE FROM outbox")
        await stage.log.connection.execute(
            "DELETE FROM events WHERE poll_no = $1 AND version > $2", poll.poll_no, version
        )
        await stage.log.connection.execute(
            "UPDATE polls SET version = event.version, recorded_at = event.recorded_at FROM events AS event"
            " WHERE polls.poll_no = $1 AND event.poll_no = $1 AND event.version = $2",
            *(poll.poll_no, version),
        )
    poll.version = version
    poll.voters = {voter: voted for voter, voted in poll.voters.items() if voted <= version}
    poll.counts = [0] * len(poll.counts)
    for event in await stage.log.events(poll):
        for number in event.votes_cast.option_numbers:
            poll.counts[number] += 1


@pytest.mark.usefixtures("without_pauses")
@pytest.mark.parametrize("regrown", [0, 2, 4, 6])
async def test_a_log_that_was_rewound_unannounced_is_noticed(stage: Stage, regrown: int) -> None:
    """It ends before what the read model has, is as long with other events, or longer."""
    poll, other = await stage.log.poll(), await stage.log.poll()
    for _ in range(5):
        await stage.log.cast(poll, votes=3)
    await sent(stage)
    async with stage.running("live"):
        await stage.counted("live", poll, other)
        async with stage.log.connection.transaction():
            await _rewind(stage, poll, 3)
            for _ in range(regrown):
                await stage.log.cast(poll)
        await sent(stage)
        await stage.counted("live", poll, other)


@pytest.mark.usefixtures("without_pauses")
@pytest.mark.parametrize("read_model", ["live", "documents"])
async def test_without_the_log_a_new_history_comes_from_the_stream(
    stage: Stage, read_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "_QUIET_SECONDS", 0.3)
    poll, idle = await stage.log.poll(), await stage.log.poll()
    await stage.log.cast(poll, votes=5)
    await stage.publish(poll)
    await stage.publish(idle)
    async with stage.running(read_model, log=False):
        await stage.counted(read_model, poll, idle)
        await _rewind(stage, poll, 2)
        await stage.log.cast(poll, votes=2)
        new = await stage.begin_epoch()
        await stage.publish(poll, epoch=new)
        await stage.publish(idle, epoch=new)
        await stage.make_stream(new)
        await stage.counted(read_model, poll, idle)


@pytest.mark.parametrize("read_model", ALL)
async def test_another_deployment_is_refused(stage: Stage, read_model: str) -> None:
    poll = await stage.log.poll()
    async with stage.running(read_model):
        await stage.counted(read_model, poll)
    own, other = await stage.deployment(), uuid4()

    async def refused() -> bool:
        return metric("tally_projector_failures_total", read_model) > failures

    # A stream and a log that do not belong together, and then both of them with a store that is another one's.
    for log_too in (False, True):
        await stage.make_stream(deployment=other)
        if log_too:
            await stage.log.connection.execute("UPDATE deployment SET deployment_id = $1", other)
        failures = metric("tally_projector_failures_total", read_model)
        await stage.log.cast(poll)
        await stage.publish(poll, poll.version)
        async with stage.running(read_model):
            await eventually(refused)
        with pytest.raises(AssertionError):
            await stage.has(read_model, poll)
    await stage.log.connection.execute("UPDATE deployment SET deployment_id = $1", own)
    await stage.make_stream()
    async with stage.running(read_model):
        await stage.counted(read_model, poll)


@pytest.mark.parametrize("read_model", ["views", "documents"])
async def test_a_schema_that_was_dropped_is_made_anew(stage: Stage, read_model: str) -> None:
    poll = await stage.log.poll()
    await stage.log.cast(poll, votes=4)
    async with stage.running(read_model):
        await stage.counted(read_model, poll)
        await stage.read.execute(f"DROP SCHEMA {read_model} CASCADE")

        async def is_there() -> bool:
            columns = "SELECT FROM information_schema.columns WHERE table_schema = $1 AND column_name = 'filling'"
            return bool(await stage.read.fetch(columns, read_model))

        await eventually(is_there)
        await stage.counted(read_model, poll)


async def test_while_the_log_is_away_the_stream_is_applied(stage: Stage) -> None:
    poll = await stage.log.poll()
    await stage.publish(poll)
    stage.settings["write_dsn"] = "postgresql://nobody@127.0.0.1:9/nothing"
    async with stage.running("live"):
        # As nothing says that this is all, it is not for readers.
        await eventually(lambda: _filling_with(stage, poll))


async def _filling_with(stage: Stage, poll: WrittenPoll) -> bool:
    stored: Any = await stage.redis.hget(live_key(FIRST_GENERATION, poll.poll_id), "version")
    return stored == b"%d" % poll.version and bool(await stage.redis.exists(filling_key(FIRST_GENERATION)))
