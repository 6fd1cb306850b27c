"""The comparison of the stream with the log: continuous, complete, and no vote waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import nats
import pytest
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import StreamConfig
from structlog.testing import capture_logs
from tally.query.v1.query_service_pb2 import OutboxStatus

import relay.comparison
import relay.repair
import relay.stream
from contracts.bus import ALL_EVENTS, REPUBLISH, STREAM, EventHeaders, event_subject, republish_request
from relay.backlog import Backlog
from relay.comparison import Comparison
from relay.history import History
from relay.stream import Stream
from runtime.postgres import connect_pool
from tests.event_log import EventLog, event_log
from tests.processes import eventually
from tests.relaying import compare_once, drained, published, relaying


async def many_polls(log: EventLog, polls: int) -> None:
    """Copies of a poll; all of them are in the outbox, and nothing of them is published."""
    template = await log.poll()
    await log.connection.execute(
        "INSERT INTO polls (poll_id, state, version, spec, created_at, recorded_at)"
        " SELECT gen_random_uuid(), state, version, spec, created_at, recorded_at"
        " FROM polls, generate_series(1, $2::integer) WHERE poll_no = $1",
        template.poll_no,
        polls - 1,
    )
    await log.connection.execute(
        "INSERT INTO events (poll_no, version, recorded_at, payload)"
        " SELECT polls.poll_no, event.version, event.recorded_at, event.payload"
        " FROM polls, events AS event WHERE event.poll_no = $1 AND polls.poll_no > $1",
        template.poll_no,
    )
    await log.connection.execute(
        "INSERT INTO outbox (poll_no, version) SELECT poll_no, version FROM events WHERE poll_no > $1"
        " ORDER BY poll_no, version",
        template.poll_no,
    )


async def last_versions(bus: Client, log: EventLog) -> list[int]:
    """The version of the last message of each poll; 0 for a poll without messages."""
    poll_ids = [row["poll_id"] for row in await log.connection.fetch("SELECT poll_id FROM polls ORDER BY poll_no")]
    found: dict[UUID, EventHeaders | None] = {}
    for start in range(0, len(poll_ids), 1000):
        found |= await Stream(bus, 0).versions(poll_ids[start : start + 1000])
    return [headers.version if (headers := found.get(poll_id)) else 0 for poll_id in poll_ids]


async def test_a_loss_that_leaves_no_trace_is_found_in_each_comparison(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay.comparison, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(relay.stream.Stream, "_compare", lambda _self, _traces: None)
    polls = [await log.poll() for _ in range(3)]
    jetstream: JetStreamContext = bus.jetstream()
    async with relaying(write_dsn, nats_url):
        await drained(log)
        for poll in polls:
            for _ in range(2):
                # Also the head that was published again is lost once more.
                last = await jetstream.get_last_msg(STREAM, event_subject(0, poll.poll_id))
                assert last.seq
                await jetstream.delete_msg(STREAM, last.seq)

                async def healed() -> None:
                    assert await last_versions(bus, log) == [2, 2, 2]

                await eventually(healed)
        await jetstream.purge_stream(STREAM)
        await eventually(healed)
        await drained(log)


async def test_a_loss_while_events_of_the_poll_wait_is_found_later(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long poll is published again, and before that is done all of the stream is lost once more."""
    monkeypatch.setattr(relay.repair, "RANGE_EVENTS", 50)
    monkeypatch.setattr(relay.comparison, "LOOK_SECONDS", 0.2)
    poll, other = await log.poll(), await log.poll()
    for _ in range(100):
        await log.cast(poll)
    jetstream: JetStreamContext = bus.jetstream()
    async with relaying(write_dsn, nats_url):
        await drained(log)
        await jetstream.purge_stream(STREAM)

    # A part is asked for and waits in the outbox; the relay that begins finds a stream without anything.
    pool = await connect_pool(write_dsn, size=2, application="test")
    await relay.repair.Repair(pool, bus, 0, 1).republish(poll.poll_id, 1)
    # Fifty, and the head.
    assert await log.waiting() == 51
    await log.connection.execute("DELETE FROM outbox WHERE version > 50")
    await pool.close()
    async with relaying(write_dsn, nats_url):

        async def healed() -> None:
            assert await last_versions(bus, log) == [102, other.version]

        await eventually(healed)
        await drained(log)


async def test_what_is_published_again_ends_with_the_latest_event(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay.repair, "RANGE_EVENTS", 3)
    # Else the comparison would bring it.
    monkeypatch.setattr(relay.comparison, "LOOK_SECONDS", 3600.0)
    poll = await log.poll()
    for _ in range(8):
        await log.cast(poll)
    async with relaying(write_dsn, nats_url):
        await drained(log)
        for first, more in ((2, [2, 3, 4, 10]), (7, [7, 8, 9, 10]), (5, [5, 6, 7, 10])):
            before = (await published(bus)).versions(poll)
            await bus.publish(REPUBLISH, republish_request(poll.poll_id, first))

            async def again() -> None:
                assert (await published(bus)).versions(poll) == [*before, *more]  # noqa: B023

            await eventually(again)
            await drained(log)
    await compare_once(write_dsn, bus)
    assert await log.waiting() == 0


async def test_a_locked_poll_keeps_no_other_from_being_published_again(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    locked, free = await log.poll(), await log.poll()
    async with relaying(write_dsn, nats_url), event_log(write_dsn) as holder:
        await drained(log)
        async with holder.connection.transaction():
            await holder.connection.execute("SELECT FROM polls WHERE poll_no = $1 FOR UPDATE", locked.poll_no)
            await bus.publish(REPUBLISH, republish_request(locked.poll_id, 1))
            await bus.publish(REPUBLISH, republish_request(free.poll_id, 1))

            async def again() -> None:
                assert (await published(bus)).versions(free) == [1, 2, 1, 2]

            await eventually(again)
            # And the comparison takes it for one that gets an event just now.
            jetstream: JetStreamContext = bus.jetstream()
            await jetstream.purge_stream(STREAM)

            async def head() -> None:
                assert (await published(bus)).versions(free) == [2]

            await eventually(head)
        async with asyncio.timeout(30):
            await eventually(lambda: _has(bus, log, [2, 2]), 25)


async def _has(bus: Client, log: EventLog, versions: list[int]) -> bool:
    return await last_versions(bus, log) == versions


async def test_heads_are_queued_only_while_few_events_wait(
    log: EventLog, write_dsn: str, bus: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay.comparison, "_WAITING_EVENTS", 100)
    monkeypatch.setattr(relay.comparison, "_PAGE_POLLS", 100)
    await many_polls(log, 1000)
    await log.connection.execute("DELETE FROM outbox")
    async with comparing(write_dsn, bus) as comparison, asyncio.TaskGroup() as tasks:
        tasks.create_task(comparison.compare_all())
        published_heads = 0
        while published_heads < 1000:
            # Two pages wait at most, however long nothing is published.
            await eventually(lambda: _waits(log, min(200, 1000 - published_heads)))  # noqa: B023
            await asyncio.sleep(0.1)
            assert await log.waiting() == min(200, 1000 - published_heads)
            rows = await log.connection.fetch("DELETE FROM outbox RETURNING poll_no")
            published_heads += len(rows)


async def _waits(log: EventLog, events: int) -> bool:
    return await log.waiting() == events


async def test_a_stream_without_anything_gets_all_heads_while_votes_come(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    await many_polls(log, 2000)
    poll = await log.poll()
    jetstream: JetStreamContext = bus.jetstream()
    async with relaying(write_dsn, nats_url):
        await drained(log)
        await jetstream.delete_stream(STREAM)
        while 0 in (versions := await _versions_or_none(bus, log)):
            await log.cast(poll)
        assert set(versions[:-1]) == {2}
        await drained(log)
        assert (await _versions_or_none(bus, log))[-1] == poll.version


async def test_a_poll_whose_events_wait_is_looked_at_again_before_its_turn(
    log: EventLog, write_dsn: str, bus: Client
) -> None:
    waiting, other = await log.poll(), await log.poll()
    await log.connection.execute("DELETE FROM outbox WHERE poll_no = $1", other.poll_no)
    async with comparing(write_dsn, bus) as comparison:
        await comparison.compare_all()
        assert await _queued(log) == [other.poll_no]
        # They were published, and lost.
        await log.connection.execute("DELETE FROM outbox")
        await comparison._look_again()
        assert await _queued(log) == [waiting.poll_no, other.poll_no]


async def _queued(log: EventLog) -> list[int]:
    rows = await log.connection.fetch("SELECT poll_no FROM outbox WHERE again ORDER BY poll_no")
    return [row["poll_no"] for row in rows]


@asynccontextmanager
async def comparing(write_dsn: str, bus: Client, shards: int = 1) -> AsyncIterator[Comparison]:
    """A comparison beside which nothing is published."""
    pool = await connect_pool(write_dsn, size=2, application="test")
    stream, history = Stream(bus, 0), History(pool)
    await stream.ensure()
    try:
        yield Comparison(pool, stream, history, await history.agree(stream), 0, shards)
    finally:
        await pool.close()


async def _versions_or_none(bus: Client, log: EventLog) -> list[int]:
    try:
        async with asyncio.timeout(1):
            return await last_versions(bus, log)
    except (TimeoutError, nats.errors.Error):
        return [0]


async def test_old_polls_of_a_long_stream_take_their_time_and_end_no_session(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each message may take as long as NATS needs: the limit is for one, not for all of a page."""
    await many_polls(log, 300)
    async with relaying(write_dsn, nats_url):
        await drained(log)
    monkeypatch.setattr(relay.stream, "_SECONDS", 0.25)
    slow = relay.stream._next_headers

    async def slowly(*arguments: object) -> dict[str, str]:
        await asyncio.sleep(0.002)
        return await slow(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(relay.stream, "_next_headers", slowly)
    started = time.monotonic()
    assert await last_versions(bus, log) == [2] * 300
    assert time.monotonic() - started > 0.5


async def test_answers_that_are_larger_than_one_page_are_put_together(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay.stream, "_ANSWER_BYTES", 20_000)
    polls = [await log.poll() for _ in range(20)]
    for poll in polls[::2]:
        await log.cast(poll, votes=400)
    async with relaying(write_dsn, nats_url):
        await drained(log)
    assert await last_versions(bus, log) == [3, 2] * 10
    await compare_once(write_dsn, bus)
    assert await log.waiting() == 0


async def test_a_message_of_somebody_else_is_not_taken_for_an_event(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    poll = await log.poll()
    async with relaying(write_dsn, nats_url):
        await drained(log)
    jetstream: JetStreamContext = bus.jetstream()
    await jetstream.publish(event_subject(0, poll.poll_id), b"nonsense")
    await jetstream.publish("tally.events.0.not-a-poll", b"nonsense")
    await jetstream.publish("tally.events.x.y.z", b"nonsense")
    with capture_logs() as logs:
        await compare_once(write_dsn, bus)
    assert await log.waiting() == 1
    assert [line["polls"] for line in logs if "lacked the latest events" in line["event"]] == [1]


async def test_a_stream_that_goes_back_is_noticed_when_an_event_is_published(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    """Its end is lost and others take the places: the next event gets a sequence that another one had."""
    poll = await log.poll()
    stream = Stream(bus, 0)
    async with relaying(write_dsn, nats_url):
        await drained(log)
        await stream.ensure()
    jetstream: JetStreamContext = bus.jetstream()
    await jetstream.delete_stream(STREAM)
    await jetstream.add_stream(StreamConfig(name=STREAM, subjects=[ALL_EVENTS], allow_atomic=True, allow_direct=True))
    await log.cast(poll)
    async with relay.outbox.connect(write_dsn, 0, 1) as events:
        chunk = await events.next([])
    with pytest.raises(relay.stream.Damaged, match="became message 1, and the stream had 2"):
        await stream.publish(chunk)


async def test_a_hundred_pages_are_compared_and_progress_is_told(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay.comparison, "_PAGE_POLLS", 10)
    monkeypatch.setattr(relay.comparison, "LOOK_SECONDS", 0.05)
    await many_polls(log, 1000)
    async with relaying(write_dsn, nats_url):
        await drained(log)
    compared = relay.comparison._compared.labels(0)._value.get
    before = compared()
    async with comparing(write_dsn, bus) as comparison:
        with capture_logs() as logs:
            await comparison.compare_all()
    assert compared() - before == 1000
    assert relay.comparison._progress.labels(0)._value.get() == 1
    told = [line["polls"] for line in logs if line["event"] == "comparing the stream with the log"]
    assert told == sorted(told)
    assert told


async def test_a_shard_whose_relay_is_away_keeps_no_other_from_being_repaired(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay.comparison, "_WAITING_EVENTS", 3)
    polls = [await log.poll() for _ in range(4)]
    async with relaying(write_dsn, nats_url, shards=2):
        await drained(log)
    mine = [poll for poll in polls if poll.poll_no % 2 == 0]
    for poll in polls:
        if poll not in mine:
            for _ in range(5):
                await log.cast(poll)
    jetstream: JetStreamContext = bus.jetstream()
    await jetstream.purge_stream(STREAM)
    async with comparing(write_dsn, bus, shards=2) as comparison, asyncio.timeout(10):
        await comparison.compare_all()
    assert await _queued(log) == [poll.poll_no for poll in mine]


async def test_what_is_published_again_does_not_count_with_the_age_of_its_events(log: EventLog, write_dsn: str) -> None:
    poll, waiting = await log.poll(), await log.poll()
    await log.connection.execute(
        "UPDATE events SET recorded_at = now() - interval '3 days' WHERE poll_no = $1", poll.poll_no
    )
    await log.connection.execute(
        "UPDATE events SET recorded_at = now() - interval '9 s' WHERE poll_no <> $1", poll.poll_no
    )
    await log.connection.execute("UPDATE outbox SET again = true WHERE poll_no = $1", poll.poll_no)
    pool = await connect_pool(write_dsn, size=2, application="test")

    async def measured() -> OutboxStatus:
        backlog = Backlog(pool, 0, 1)
        measuring = asyncio.create_task(backlog.measure())
        await eventually(lambda: _is_there(backlog))
        measuring.cancel()
        assert backlog._status
        return backlog._status

    status = await measured()
    assert status.events == 4
    assert 9 <= status.oldest_seconds < 60
    await log.connection.execute("DELETE FROM outbox WHERE poll_no = $1", waiting.poll_no)
    status = await measured()
    assert status.events == 2
    assert not status.HasField("oldest_seconds")
    await pool.close()


async def _is_there(backlog: Backlog) -> bool:
    return backlog._status is not None
