"""Positions in the log: epochs, and how messages and consistency tokens carry them."""

from base64 import urlsafe_b64encode
from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest
from tally.event.v1.event_pb2 import Event, PollOpened

from contracts import bus, freshness, log_epoch
from contracts.refusals import Refusal

EARLIER, LATER = UUID("019ab000-0000-7000-8000-000000000001"), UUID("019ab000-0000-7001-8000-000000000000")
MOMENT = datetime(2026, 5, 4, 3, 2, 1, 123457, tzinfo=UTC)


def test_epochs_are_ordered_by_time_and_zero_comes_first() -> None:
    assert log_epoch.parse("") == log_epoch.ZERO < log_epoch.parse(str(EARLIER)) < log_epoch.parse(str(LATER))
    assert str(log_epoch.ZERO) < str(EARLIER) < str(LATER)
    assert log_epoch.ZERO.bytes < EARLIER.bytes < LATER.bytes


@pytest.mark.parametrize("text", ["0", "nonsense", str(UUID(int=1)), "a" * 32, "11ae6dbf-be00-439a-b3b6-096cc60eaf89"])
def test_what_is_no_epoch_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        log_epoch.parse(text)


@pytest.mark.parametrize("epoch", [log_epoch.ZERO, EARLIER])
def test_headers_name_the_event(epoch: UUID) -> None:
    headers = bus.event_headers(epoch, 12, MOMENT)
    assert bus.parse_event_headers(headers) == (epoch, 12, bus.microseconds(MOMENT)) == (epoch, 12, 1777863721123457)


def test_a_message_of_an_earlier_relay_is_of_the_first_epoch() -> None:
    assert bus.parse_event_headers({bus.VERSION_HEADER: "7"}) == (log_epoch.ZERO, 7, None)


@pytest.mark.parametrize(
    "headers",
    [
        None,
        {},
        {bus.RECORDED_AT_HEADER: "1", bus.EPOCH_HEADER: str(EARLIER)},
        {bus.VERSION_HEADER: "0"},
        {bus.VERSION_HEADER: "-1"},
        {bus.VERSION_HEADER: "٣"},
        {bus.VERSION_HEADER: "9" * 40},
        {bus.VERSION_HEADER: "7", bus.RECORDED_AT_HEADER: "noon"},
        {bus.VERSION_HEADER: "7", bus.RECORDED_AT_HEADER: "1", bus.EPOCH_HEADER: "nonsense"},
    ],
)
def test_a_message_of_somebody_else_names_no_event(headers: dict[str, str] | None) -> None:
    assert bus.parse_event_headers(headers) is None


@pytest.mark.parametrize("epoch", [log_epoch.ZERO, EARLIER])
def test_a_token_names_a_position(epoch: UUID) -> None:
    poll_id = uuid4()
    assert freshness.parse(freshness.token(poll_id, 12, epoch)) == (poll_id, 12, epoch)


def test_a_token_of_a_server_without_epochs_is_of_the_first_epoch() -> None:
    poll_id = uuid4()
    old = urlsafe_b64encode(b"\1" + poll_id.bytes + (12).to_bytes(8)).decode().rstrip("=")
    assert freshness.parse(old) == (poll_id, 12, log_epoch.ZERO)
    assert freshness.token(poll_id, 12) == old


@pytest.mark.parametrize("packed", [b"", b"\0" * 25, b"\3" + b"\0" * 40, b"\1" + b"\0" * 40, b"\2" + b"\0" * 24])
def test_what_no_command_returned_is_no_token(packed: bytes) -> None:
    with pytest.raises(Refusal, match="consistency_token"):
        freshness.parse(urlsafe_b64encode(packed).decode())


@pytest.mark.parametrize("moment", [MOMENT, datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)])
def test_a_message_says_when_its_event_was_recorded(moment: datetime) -> None:
    poll_id = uuid4()
    event = Event.FromString(bus.event_message(poll_id, 3, moment, Event(poll_opened=PollOpened()).SerializeToString()))
    assert (event.poll_id, event.version, event.WhichOneof("change")) == (str(poll_id), 3, "poll_opened")
    assert event.recorded_at.ToDatetime(UTC) == moment
    assert event.recorded_at.ToNanoseconds() == 1000 * bus.microseconds(moment)
