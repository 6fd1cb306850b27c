"""The history of the log on the stream: that a write database went back is noticed, and begins a new epoch."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import StreamConfig
from structlog.testing import capture_logs
from tally.query.v1.query_service_pb2 import OutboxStatus

import relay.comparison
import relay.history
from contracts import log_epoch
from contracts.bus import (
    ALL_EVENTS,
    DEPLOYMENT_METADATA,
    EPOCH_METADATA,
    MESSAGE_ID_HEADER,
    REPUBLISH,
    STREAM,
    event_subject,
    parse_event_headers,
    republish_request,
)
from relay import outbox
from relay.stream import Stream
from tests.event_log import EventLog, WrittenPoll
from tests.processes import eventually
from tests.relaying import compare_once, drained, published, relaying


async def current(log: EventLog) -> UUID:
    epoch: UUID = await log.connection.fetchval("SELECT log_epoch FROM current_log_epoch")
    return epoch


async def metadata(bus: Client) -> dict[str, str]:
    jetstream: JetStreamContext = bus.jetstream()
    return (await jetstream.stream_info(STREAM)).config.metadata or {}


async def go_back(log: EventLog, polls: dict[int, int]) -> None:
    """Puts the log back to where each poll (poll_no) had a version; all other polls were not there."""
    async with log.connection.transaction():
        await log.connection.execute("DELETE FROM outbox")
        await log.connection.execute("DELETE FROM polls WHERE poll_no <> ALL ($1)", list(polls))
        await log.connection.execute("DELETE FROM events WHERE poll_no <> ALL ($1)", list(polls))
        for poll_no, version in polls.items():
            await log.connection.execute("DELETE FROM events WHERE poll_no = $1 AND version > $2", poll_no, version)
            await log.connection.execute(
                "UPDATE polls SET version = $2, recorded_at = (SELECT recorded_at FROM events WHERE poll_no = $1"
                " AND version = $2) WHERE poll_no = $1",
                poll_no,
                version,
            )


async def epochs_of(bus: Client, poll: WrittenPoll) -> list[tuple[UUID, int]]:
    """The positions of a poll's messages, in the order of the stream."""
    messages = (await published(bus)).messages
    found = [parse_event_headers(m.headers) for m in messages if m.subject.endswith(str(poll.poll_id))]
    return [(headers.log_epoch, headers.version) for headers in found if headers]


async def carried_on(log: EventLog, bus: Client, before: UUID, polls: list[WrittenPoll]) -> UUID:
    """Waits for a new epoch under which the latest event of each poll is on the stream, and returns it."""

    async def begun() -> None:
        epoch = await current(log)
        assert epoch > before
        assert (await metadata(bus))[EPOCH_METADATA] == str(epoch)
        for poll in polls:
            version = await log.connection.fetchval("SELECT version FROM polls WHERE poll_no = $1", poll.poll_no)
            assert (await epochs_of(bus, poll))[-1] == (epoch, version)

    await eventually(begun)
    await drained(log)
    return await current(log)


async def test_messages_name_their_history_and_the_stream_its_deployment(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    poll = await log.poll()
    async with relaying(write_dsn, nats_url):
        await drained(log)
        reports = await bus.subscribe("tally.outbox.0")
        report = OutboxStatus.FromString((await reports.next_msg(timeout=5)).data)
    epoch = await current(log)
    deployment = await log.connection.fetchval("SELECT deployment_id FROM deployment")
    assert UUID(report.log_epoch) == epoch
    assert (await metadata(bus))[EPOCH_METADATA] == str(epoch)
    assert (await metadata(bus))[DEPLOYMENT_METADATA] == str(deployment)
    assert await epochs_of(bus, poll) == [(epoch, 1), (epoch, 2)]
    for message in (await published(bus)).messages:
        headers = parse_event_headers(message.headers)
        assert headers
        recorded_at = await log.connection.fetchval(
            "SELECT (extract(epoch FROM recorded_at) * 1000000)::bigint FROM events WHERE version = $1", headers.version
        )
        assert headers.recorded_at == recorded_at
        assert message.headers[MESSAGE_ID_HEADER].startswith(f"{epoch}:{poll.poll_id}:{headers.version}:")


async def test_a_log_that_goes_on_keeps_its_epoch(log: EventLog, write_dsn: str, nats_url: str, bus: Client) -> None:
    polls = [await log.poll() for _ in range(3)]
    before = await current(log)
    for _ in range(3):
        async with relaying(write_dsn, nats_url):
            for poll in polls:
                await log.cast(poll)
            await bus.publish(REPUBLISH, republish_request(polls[0].poll_id, 1))
            await drained(log)
        await compare_once(write_dsn, bus)
    assert await current(log) == before


@pytest.mark.parametrize("votes_since", [0, 2, 9])
async def test_a_log_that_went_back_while_no_relay_ran_begins_a_new_epoch(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, votes_since: int
) -> None:
    poll, other = await log.poll(), await log.poll()
    for _ in range(8):
        await log.cast(poll)
    async with relaying(write_dsn, nats_url):
        await drained(log)
    before = await current(log)
    await go_back(log, {poll.poll_no: 5, other.poll_no: 2})
    for _ in range(votes_since):
        await log.cast(poll)
    with capture_logs() as logs:
        async with relaying(write_dsn, nats_url):
            epoch = await carried_on(log, bus, before, [poll, other])
            await log.cast(other)
            await drained(log)
    assert (await epochs_of(bus, other))[-2:] == [(epoch, 2), (epoch, 3)]
    assert [line["log_epoch"] for line in logs if "went back" in line["event"]] == [str(epoch)]
    # What was published before is there still, and says that it is of the history before.
    assert (await epochs_of(bus, poll))[:10] == [(before, version) for version in range(1, 11)]
    # It is noticed once.
    async with relaying(write_dsn, nats_url):
        await compare_once(write_dsn, bus)
    assert await current(log) == epoch


async def test_a_poll_that_the_log_lacks_is_enough(log: EventLog, write_dsn: str, nats_url: str, bus: Client) -> None:
    poll = await log.poll()
    async with relaying(write_dsn, nats_url):
        await drained(log)
        await log.poll()
        await drained(log)
    before = await current(log)
    await go_back(log, {poll.poll_no: 2})
    async with relaying(write_dsn, nats_url):
        await carried_on(log, bus, before, [poll])


async def test_a_log_that_goes_back_under_a_relay_is_noticed_by_the_comparison(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay.comparison, "LOOK_SECONDS", 0.2)
    poll, other = await log.poll(), await log.poll()
    async with relaying(write_dsn, nats_url):
        for _ in range(4):
            await log.cast(poll)
        await drained(log)
        before = await current(log)
        await go_back(log, {poll.poll_no: 4, other.poll_no: 2})
        await carried_on(log, bus, before, [poll, other])


async def test_a_version_that_is_given_again_is_noticed_before_it_is_published(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay.comparison, "LOOK_SECONDS", 3600.0)
    poll, other = await log.poll(), await log.poll()
    async with relaying(write_dsn, nats_url):
        for _ in range(4):
            await log.cast(poll)
        await drained(log)
        before = await current(log)
        await go_back(log, {poll.poll_no: 4, other.poll_no: 2})
        await log.cast(poll)
        await carried_on(log, bus, before, [poll, other])
    of_poll = await epochs_of(bus, poll)
    # Version 5 was published for the event that the log lost, and then only as an event of the new history.
    assert of_poll.count((before, 5)) == 1


async def test_rows_that_an_earlier_relay_queued_again_are_no_log_that_went_back(
    log: EventLog, write_dsn: str, nats_url: str
) -> None:
    poll = await log.poll()
    for _ in range(4):
        await log.cast(poll)
    # That one did not say which rows it had queued again.
    await log.connection.execute("INSERT INTO outbox (poll_no, version) SELECT poll_no, version FROM events")
    before = await current(log)
    async with relaying(write_dsn, nats_url):
        await drained(log)
        await log.connection.execute("INSERT INTO outbox (poll_no, version) SELECT poll_no, version FROM events")
        await drained(log)
    assert await current(log) == before


async def test_an_announced_epoch_is_published_at_once(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    poll = await log.poll()
    async with relaying(write_dsn, nats_url):
        await drained(log)
        before = await current(log)
        await log.connection.execute("SELECT begin_log_epoch('restored by an operator')")
        epoch = await carried_on(log, bus, before, [poll])
    assert epoch == await current(log)


async def test_a_backup_of_an_earlier_epoch_gets_a_later_one_than_the_stream(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    poll = await log.poll()
    first = await current(log)
    async with relaying(write_dsn, nats_url):
        await drained(log)
        await log.connection.execute("SELECT begin_log_epoch('a restore')")
        second = await carried_on(log, bus, first, [poll])
        # The same backup once more, while the relay that has published the second history is alive.
        await log.connection.execute("DELETE FROM log_epochs WHERE log_epoch = $1", second)
        await carried_on(log, bus, second, [poll])


async def test_a_relay_of_a_log_that_another_one_has_overtaken_publishes_nothing_more(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    poll = await log.poll()
    async with relaying(write_dsn, nats_url):
        await drained(log)
        # The relay of a promoted standby has begun a later history on the stream.
        jetstream: JetStreamContext = bus.jetstream()
        config = (await jetstream.stream_info(STREAM)).config
        later = str(await log.connection.fetchval("SELECT uuidv7(interval '1 minute')"))
        with capture_logs() as logs:
            await jetstream.update_stream(config.evolve(metadata=(config.metadata or {}) | {EPOCH_METADATA: later}))

            async def said() -> None:
                assert any("later history of the log" in str(line.get("errors")) for line in logs)

            await eventually(said)
        await log.cast(poll)
        assert await log.waiting() == 1
        assert (await metadata(bus))[EPOCH_METADATA] == later
        # Until its own database is of a later one.
        await log.connection.execute("SELECT begin_log_epoch('an operator decides', $1)", UUID(later))
        await drained(log)
    assert (await epochs_of(bus, poll))[-1] == (await current(log), 3)


async def test_the_stream_of_another_deployment_is_left_alone(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    poll = await log.poll()
    async with relaying(write_dsn, nats_url):
        await drained(log)
    owner = (await metadata(bus))[DEPLOYMENT_METADATA]
    await log.connection.execute("UPDATE deployment SET deployment_id = $1", uuid4())
    await log.cast(poll)
    with capture_logs() as logs:
        async with relaying(write_dsn, nats_url):

            async def refused() -> None:
                assert any(f"belongs to another deployment, {owner}" in str(line.get("errors")) for line in logs)

            await eventually(refused)
    assert (await published(bus)).versions(poll) == [1, 2]
    assert await log.waiting() == 1


async def test_a_stream_of_an_earlier_version_is_taken_over(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    """An upgrade: a log without an epoch, and messages that say nothing of one."""
    poll = await log.poll()
    await log.cast(poll)
    await log.connection.execute("UPDATE log_epochs SET log_epoch = $1", log_epoch.ZERO)
    jetstream: JetStreamContext = bus.jetstream()
    await jetstream.add_stream(StreamConfig(name=STREAM, subjects=[ALL_EVENTS]))
    for event in (await log.events(poll))[:2]:
        payload, headers = event.SerializeToString(), {"Tally-Version": str(event.version)}
        await jetstream.publish(event_subject(0, poll.poll_id), payload, headers=headers)
    await log.connection.execute("DELETE FROM outbox WHERE version < 3")
    async with relaying(write_dsn, nats_url):
        await drained(log)
        await log.cast(poll)
        await drained(log)
    await compare_once(write_dsn, bus)
    assert await log.waiting() == 0
    assert await current(log) == log_epoch.ZERO
    assert await epochs_of(bus, poll) == [(log_epoch.ZERO, version) for version in (1, 2, 3, 4)]
    # A log of that version that went back is noticed by the version alone.
    await go_back(log, {poll.poll_no: 2})
    async with relaying(write_dsn, nats_url):
        await carried_on(log, bus, log_epoch.ZERO, [poll])


async def test_an_event_that_nats_takes_for_a_copy_of_another_is_published(
    log: EventLog, write_dsn: str, bus: Client
) -> None:
    poll, other = await log.poll(), await log.poll()
    async with outbox.connect(write_dsn, 0, 1) as events:
        chunk = await events.next([])
    stream = Stream(bus, 0)
    await stream.ensure()
    jetstream: JetStreamContext = bus.jetstream()
    # Another event has the id of the first one; the message that had the id of the second one is lost.
    strange = chunk[0].headers | {"Tally-Recorded-At": "1"}
    await jetstream.publish(event_subject(0, poll.poll_id), chunk[0].data, headers=strange)
    lost = await jetstream.publish(event_subject(0, poll.poll_id), chunk[1].data, headers=chunk[1].headers)
    await jetstream.delete_msg(STREAM, lost.seq)
    stream = Stream(bus, 0)
    await stream.ensure()
    assert await stream.publish(chunk[:2]) == chunk[:2]
    assert (await published(bus)).versions(poll) == [1, 1, 2]
    # Now they are there, and are not published once more.
    assert await stream.publish(chunk) == chunk
    assert (await published(bus)).versions(poll) == [1, 1, 2, 1, 2]
    assert (await published(bus)).versions(other) == [1, 2]


async def test_outbox_numbers_that_begin_again_lose_nothing(
    log: EventLog, write_dsn: str, nats_url: str, bus: Client
) -> None:
    first = await log.poll()
    for _ in range(20):
        await log.cast(first)
    async with relaying(write_dsn, nats_url):
        await drained(log)
        await log.connection.execute("ALTER SEQUENCE outbox_outbox_id_seq RESTART WITH 1")
        polls = [await log.poll() for _ in range(5)]
        await drained(log)
    stream = await published(bus)
    assert [stream.versions(poll) for poll in polls] == [[1, 2]] * 5
