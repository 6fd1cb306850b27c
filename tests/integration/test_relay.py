"""The relay against the real Postgres and NATS: everything in the outbox gets on the stream, once, in order."""

from __future__ import annotations

import signal
import time
from math import isnan
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import nats
import pytest
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import (
    DiscardPolicy,
    PersistMode,
    RetentionPolicy,
    StorageType,
    StoreCompression,
    StreamConfig,
    StreamSource,
    SubjectTransform,
)
from prometheus_client import REGISTRY
from structlog.testing import capture_logs
from tally.query.v1.query_service_pb2 import OutboxStatus

import relay.comparison
import relay.stream
from contracts.bus import ALL_EVENTS, REPUBLISH, STREAM, event_subject, republish_request
from relay import outbox, shard
from relay.stream import Stream
from runtime.embedded import Stores
from tests.event_log import EventLog, event_log
from tests.processes import eventually, service
from tests.proxy import proxy
from tests.relaying import compare_once, drained, published, relaying


async def test_every_event_is_published_whole_and_in_order(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    polls = [await log.poll() for _ in range(5)]
    for number in range(30):
        await log.cast(polls[number % 5], votes=number)
    async with relaying(write_dsn, nats_url):
        await drained(log)
        for number in range(70):
            await log.cast(polls[number % 5], votes=3)
        await log.close(polls[0])
        await drained(log)
    stream = await published(bus)
    for poll in polls:
        assert stream.events[str(poll.poll_id)] == await log.events(poll)
    assert {message.subject for message in stream.messages} == {event_subject(0, poll.poll_id) for poll in polls}


async def test_a_row_that_is_committed_late_is_not_passed_over(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    early, late = await log.poll(), await log.poll()
    async with relaying(write_dsn, nats_url), event_log(write_dsn) as slow:
        await drained(log)
        async with slow.connection.transaction():
            await slow.cast(late)
            # This row has a higher outbox_id, and is published first.
            await log.cast(early)
            await drained(log)
        await drained(log)
    stream = await published(bus)
    assert stream.versions(early) == stream.versions(late) == [1, 2, 3]


async def test_the_backlog_is_unknown_while_the_outbox_is_locked_and_known_soon_after(
    log: EventLog, write_dsn: str, nats_url: str
) -> None:
    await log.poll()

    async def is_known() -> bool:
        return REGISTRY.get_sample_value("tally_outbox_events", {"shard": "0"}) == 0

    async def is_unknown() -> bool:
        return isnan(REGISTRY.get_sample_value("tally_outbox_events", {"shard": "0"}) or 0)

    async with relaying(write_dsn, nats_url):
        await drained(log)
        await eventually(is_known)
        async with event_log(write_dsn) as other, other.connection.transaction():
            await other.connection.execute("LOCK TABLE outbox")
            await eventually(is_unknown)
        await eventually(is_known)


async def test_big_events_are_read_a_few_at_a_time(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "CHUNK_BYTES", 300_000)
    poll = await log.poll()
    for _ in range(6):
        await log.cast(poll, votes=10_000)
    async with outbox.connect(write_dsn, 0, 1) as events:
        first = await events.next([])
        # Two small ones, and of the big ones as many as it takes to pass the bound.
        assert [event.version for event in first] == [1, 2, 3, 4]
        second = await events.next([event.outbox_id for event in first])
        assert [event.version for event in second] == [5, 6]
    # The first four were said to be acknowledged.
    async with relaying(write_dsn, nats_url):
        await drained(log)
    assert (await published(bus)).versions(poll) == [5, 6, 7, 8]


async def test_killed_between_publishing_and_deleting_it_publishes_nothing_twice(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, tmp_path: Path
) -> None:
    settings = {"write_dsn": write_dsn, "nats_url": nats_url}
    poll = await log.poll()
    for _ in range(20):
        await log.cast(poll)
    async with service(tmp_path, "relay", failpoint="relay.after_publish", **settings) as process:
        await process.ended()
    assert process.how_it_ended() == "was killed by SIGKILL"
    assert await log.waiting() == 22
    assert (await published(bus)).versions(poll) == list(range(1, 23))
    # What the next one reads first is a part of what was published, and more.
    for _ in range(5):
        await log.cast(poll)
    async with service(tmp_path, "relay", **settings):
        await drained(log)
    assert (await published(bus)).versions(poll) == list(range(1, 28))


async def test_killed_again_and_again_it_loses_nothing(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, tmp_path: Path
) -> None:
    polls = [await log.poll() for _ in range(3)]
    async with service(tmp_path, "relay", write_dsn=write_dsn, nats_url=nats_url) as process:
        for round_ in range(4):
            for number in range(40):
                await log.cast(polls[number % 3])
                if number == 10 * round_:
                    process.kill()
            await process.ended()
            await process.start()
        await drained(log)
    stream = await published(bus)
    assert [stream.versions(poll) for poll in polls] == [list(range(1, poll.version + 1)) for poll in polls]


async def test_one_relays_and_another_takes_over(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, tmp_path: Path
) -> None:
    poll = await log.poll()
    settings = {"write_dsn": write_dsn, "nats_url": nats_url}
    (tmp_path / "first").mkdir()
    async with (
        service(tmp_path / "first", "relay", **settings) as first,
        service(tmp_path, "relay", **settings) as second,
    ):
        for _ in range(50):
            await log.cast(poll)
        await drained(log)
        assert any('"leading"' in line for line in first.new_lines())
        assert not any('"leading"' in line for line in second.new_lines())
        first.kill()
        killed = time.monotonic()
        await log.cast(poll)
        await drained(log)
        assert time.monotonic() - killed < 10
        assert any('"leading"' in line for line in second.new_lines())
    assert (await published(bus)).versions(poll) == list(range(1, poll.version + 1))


async def test_a_relay_that_stands_still_is_replaced(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, tmp_path: Path
) -> None:
    poll = await log.poll()
    async with service(tmp_path, "relay", write_dsn=write_dsn, nats_url=nats_url) as first:
        await drained(log)
        async with relaying(write_dsn, nats_url):
            first.signal(signal.SIGSTOP)
            try:
                await log.cast(poll)
                await drained(log, seconds=20)
            finally:
                first.signal(signal.SIGCONT)
            await log.cast(poll)
            await drained(log)
        await log.cast(poll)
        await drained(log)
    assert (await published(bus)).versions(poll) == list(range(1, poll.version + 1))


async def test_events_that_go_one_by_one_keep_no_relay_from_its_outbox_for_long(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.stream._ONE_BY_ONE_SECONDS", 0.0)
    poll = await log.poll()
    for _ in range(3):
        await log.cast(poll)
    stream = Stream(bus, 0)
    await stream.ensure()
    async with outbox.connect(write_dsn, 0, 1) as events:
        chunk = await events.next([])
    assert await stream.publish(chunk[:2]) == chunk[:2]
    # The first two are in the stream already, so no batch can have them.
    assert await stream.publish(chunk) == chunk[:1]
    async with relaying(write_dsn, nats_url):
        await drained(log)
    assert (await published(bus)).versions(poll) == list(range(1, poll.version + 1))


async def test_each_poll_belongs_to_one_shard(log: EventLog, write_dsn: str, nats_url: str, bus: Client) -> None:
    polls = [await log.poll() for _ in range(6)]
    async with relaying(write_dsn, nats_url, shards=3):
        await drained(log)
    subjects = {message.subject for message in (await published(bus)).messages}
    assert subjects == {event_subject(poll.poll_no % 3, poll.poll_id) for poll in polls}


async def test_a_stream_that_vanishes_is_made_again_with_the_head_of_each_poll(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    polls = [await log.poll() for _ in range(3)]
    async with relaying(write_dsn, nats_url):
        for poll in polls:
            await log.cast(poll)
        await drained(log)
        await bus.jetstream().delete_stream(STREAM)
        await log.cast(polls[0])

        async def heads() -> None:
            stream = await published(bus)
            assert [stream.versions(poll)[-1:] for poll in polls] == [[4], [3], [3]]

        await eventually(heads)
        await drained(log)


async def test_what_happens_to_the_stream_is_noticed_while_nothing_else_happens(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only at the beginning of a session.
    monkeypatch.setattr(relay.comparison, "LOOK_SECONDS", 3600.0)
    polls = [await log.poll() for _ in range(3)]
    stream: JetStreamContext = bus.jetstream()
    async with relaying(write_dsn, nats_url):
        await drained(log)

        async def heads() -> None:
            now = await published(bus)
            assert [now.versions(poll)[-1:] for poll in polls] == [[2]] * 3

        await stream.delete_stream(STREAM)
        await eventually(heads)
        await drained(log)
        # Its last message stays: only another poll's are missing.
        await stream.purge_stream(STREAM, subject=event_subject(0, polls[0].poll_id))
        await eventually(heads)


async def test_the_end_of_the_stream_is_compared_with_the_log(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    polls = [await log.poll() for _ in range(3)]
    async with relaying(write_dsn, nats_url):
        await drained(log)
    stream: JetStreamContext = bus.jetstream()
    # NATS loses the last message of one poll, and all of another.
    last = await stream.get_last_msg(STREAM, event_subject(0, polls[0].poll_id))
    assert last.seq
    await stream.delete_msg(STREAM, last.seq)
    await stream.purge_stream(STREAM, subject=event_subject(0, polls[1].poll_id))
    async with relaying(write_dsn, nats_url):

        async def healed() -> None:
            now = await published(bus)
            assert [now.versions(poll) for poll in polls] == [[1, 2], [2], [1, 2]]

        await eventually(healed)
        await drained(log)


async def test_where_the_stream_may_forget_old_polls_they_are_not_missed(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    stream: JetStreamContext = bus.jetstream()
    await stream.add_stream(StreamConfig(name=STREAM, subjects=[ALL_EVENTS], max_age=3600))
    old = await log.poll()
    async with relaying(write_dsn, nats_url):
        await drained(log)
    config = (await stream.stream_info(STREAM)).config
    # What the operator has set stays, what the relay needs is added.
    assert (config.max_age, config.allow_atomic, config.allow_direct) == (3600, True, True)
    await stream.purge_stream(STREAM)
    async with relaying(write_dsn, nats_url):
        new = await log.poll()

        async def there() -> None:
            assert (await published(bus)).versions(new) == [1, 2]

        await eventually(there)
        await drained(log)
    await compare_once(write_dsn, bus)
    assert await log.waiting() == 0
    assert (await published(bus)).versions(old) == []
    await stream.purge_stream(STREAM, keep=1)
    await stream.update_stream(config.evolve(max_age=0))
    await compare_once(write_dsn, bus)
    assert await log.waiting() == 1


async def test_what_the_stream_refuses_stays_in_the_outbox(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    stream: JetStreamContext = bus.jetstream()
    failures = shard._failures.labels(0)._value.get
    poll = await log.poll()
    async with relaying(write_dsn, nats_url):
        await drained(log)
        before = failures()
        config = (await stream.stream_info(STREAM)).config
        # Changed while it runs.
        await stream.update_stream(config.evolve(max_msg_size=2000))
        await log.cast(poll)
        await log.cast(poll, votes=500)
        await log.cast(poll)

        async def refused() -> None:
            assert failures() > before + 1

        await eventually(refused)
        # Nothing passes it: the events of a poll stay in order.
        assert (await published(bus)).versions(poll) in ([1, 2], [1, 2, 3])
        assert await log.waiting() in (2, 3)
        await stream.update_stream(config.evolve(max_msg_size=-1))
        await drained(log)
    assert (await published(bus)).versions(poll) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_msgs": 10, "discard": DiscardPolicy.NEW}, "once it has max_msgs: set discard to old"),
        ({"max_bytes": 1 << 30, "discard": DiscardPolicy.NEW}, "once it has max_bytes: set discard to old"),
        (
            {"max_msgs_per_subject": 5, "discard": DiscardPolicy.NEW, "discard_new_per_subject": True},
            "once it has max_msgs_per_subject: set discard to old",
        ),
        ({"max_msg_size": 1 << 20}, "max_msg_size must be at least 4,194,304, or -1"),
        ({"max_bytes": 1 << 20}, "max_bytes must be at least 16,777,216, or -1"),
        ({"max_consumers": 2}, "max_consumers must be -1"),
        ({"no_ack": True}, "set no_ack to false"),
        ({"retention": RetentionPolicy.WORK_QUEUE}, "its retention is workqueue, and must be limits"),
        ({"retention": RetentionPolicy.INTEREST}, "its retention is interest, and must be limits"),
        ({"storage": StorageType.MEMORY}, "it is kept in memory, and must be kept in files"),
        (
            {"subject_transform": SubjectTransform(src=ALL_EVENTS, dest="other.>")},
            "it changes the subjects of messages",
        ),
        ({"sources": [StreamSource(name="OTHER")]}, "it takes messages from other streams"),
        ({"persist_mode": PersistMode.ASYNC}, "set persist_mode to default"),
    ],
)
async def test_a_stream_that_would_lose_or_refuse_events_is_refused_in_words(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, limits: dict[str, Any], words: str
) -> None:
    stream: JetStreamContext = bus.jetstream()
    await stream.add_stream(StreamConfig(name=STREAM, subjects=[ALL_EVENTS], **limits))
    await log.poll()
    with capture_logs() as logs:
        async with relaying(write_dsn, nats_url):

            async def refused() -> None:
                assert [words in str(line.get("errors")) for line in logs if line["log_level"] == "error"] == [True]

            await eventually(refused)
            assert await log.waiting() == 2
            # The status tells it, too.
            reports = await bus.subscribe("tally.outbox.0")
            report = OutboxStatus.FromString((await reports.next_msg(timeout=5)).data)
            assert words in report.problem
            # An operator makes another one.
            await stream.delete_stream(STREAM)
            await drained(log)

            async def well() -> None:
                assert OutboxStatus.FromString((await reports.next_msg(timeout=5)).data).problem == ""

            await eventually(well)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_age": 60},
        {"max_bytes": 64 << 20},
        {"max_msgs": 5},
        {"max_msgs_per_subject": 1},
        {"discard": DiscardPolicy.NEW, "max_age": 3600},
        {"deny_purge": True, "allow_rollup_hdrs": False},
        {"allow_msg_ttl": True, "compression": StoreCompression.S2},
    ],
)
async def test_a_stream_that_forgets_what_is_old_is_used_as_it_is(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, limits: dict[str, Any]
) -> None:
    stream: JetStreamContext = bus.jetstream()
    await stream.add_stream(StreamConfig(name=STREAM, subjects=[ALL_EVENTS], **limits))
    failures = shard._failures.labels(0)._value.get
    before = failures()
    poll = await log.poll()
    async with relaying(write_dsn, nats_url):
        await drained(log)
        for _ in range(8):
            await log.cast(poll)
        await drained(log)
        await compare_once(write_dsn, bus)
        assert await log.waiting() == 0
    assert failures() == before
    config = (await stream.stream_info(STREAM)).config
    assert {name: getattr(config, name) for name in limits} == limits
    assert (await published(bus)).versions(poll)[-1] == 10


async def test_a_range_is_published_again_up_to_the_head(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    poll, other = await log.poll(), await log.poll()
    for _ in range(8):
        await log.cast(poll)
    async with relaying(write_dsn, nats_url):
        await drained(log)
        head = b'{"poll_id": "%s", "from_version": ' % str(poll.poll_id).encode()
        for nonsense in (b"nonsense", b"[" * 100_000, head + b"1e999}", head + b"9" * 30 + b"}"):
            await bus.publish(REPUBLISH, nonsense)
        await bus.publish(REPUBLISH, republish_request(uuid4(), 1))
        await bus.publish(REPUBLISH, republish_request(poll.poll_id, poll.version + 1))
        for _ in range(5):
            # Asked for five times, and brought once.
            await bus.publish(REPUBLISH, republish_request(poll.poll_id, 4))

        async def again() -> None:
            assert (await published(bus)).versions(poll) == [*range(1, 11), *range(4, 11)]

        await eventually(again)
        await drained(log)
        await again()
        await bus.publish(REPUBLISH, republish_request(poll.poll_id, 2))

        async def more() -> None:
            assert (await published(bus)).versions(poll) == [*range(1, 11), *range(4, 11), *range(2, 11)]

        await eventually(more)
    assert (await published(bus)).versions(other) == [1, 2]


async def test_what_is_published_again_stays_in_order_while_votes_come(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    poll = await log.poll()
    async with relaying(write_dsn, nats_url):
        for number in range(150):
            await log.cast(poll)
            if number % 50 == 25:
                await bus.publish(REPUBLISH, republish_request(poll.poll_id, 1))
        await drained(log)
        versions = (await published(bus)).versions(poll)
    # A reader that lost everything is complete after each time that the beginning came.
    starts = [place for place, version in enumerate(versions) if version == 1]
    assert len(starts) > 1
    for start in starts:
        reached = 0
        for version in versions[start:]:
            assert version <= reached + 1
            reached = max(reached, version)
        assert reached == poll.version


async def test_it_outlives_nats_and_postgres(log: EventLog, write_dsn: str, nats_url: str, stores: Stores) -> None:
    poll = await log.poll()
    async with relaying(write_dsn, nats_url):
        await drained(log)
        stores.nats_process.kill()
        await stores.nats_process.ended()
        await log.cast(poll)
        await stores.nats_process.start()
        await drained(log)
        admin = await asyncpg.connect(stores.admin_dsn)
        await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'relay'")
        await admin.close()
        await log.cast(poll)
        await drained(log)
    fresh = await nats.connect(nats_url)
    assert (await published(fresh)).versions(poll) == [1, 2, 3, 4]
    await fresh.close()


async def test_a_network_that_swallows_everything_does_not_stop_it_for_good(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay.stream, "_SECONDS", 0.3)
    failures = shard._failures.labels(0)._value.get
    poll = await log.poll()
    credentials, port = nats_url.rsplit(":", 1)
    async with proxy(int(port)) as between, relaying(write_dsn, f"{credentials}:{between.port}"):
        await drained(log)
        before = failures()
        between.silence()
        await log.cast(poll)

        async def noticed() -> None:
            assert failures() > before

        await eventually(noticed)
        assert await log.waiting() == 1
        # What was held back arrives now, from a connection that the relay has given up.
        await between.restore()
        await drained(log)
    assert (await published(bus)).versions(poll) == [1, 2, 3]


async def test_sigterm_leaves_nothing_acknowledged_behind(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, tmp_path: Path
) -> None:
    poll = await log.poll()
    async with log.connection.transaction():
        for _ in range(8000):
            await log.cast(poll)
    async with service(tmp_path, "relay", write_dsn=write_dsn, nats_url=nats_url) as process:

        async def begun() -> None:
            assert await log.waiting() < poll.version

        await eventually(begun)
        started = time.monotonic()
        assert await process.stop()
        assert time.monotonic() - started < 10
        assert process.how_it_ended() == "ended with status 0"
    versions = (await published(bus)).versions(poll)
    assert versions == list(range(1, len(versions) + 1))
    # It was in the middle of it.
    assert 0 < len(versions) < poll.version
    assert await log.waiting() == poll.version - len(versions)
