"""Names on NATS: the stream of events, and the request to publish events again."""

import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import NamedTuple
from uuid import UUID

from tally.event.v1.event_pb2 import Event

from contracts import log_epoch

STREAM = "TALLY_EVENTS"
ALL_EVENTS = "tally.events.>"
REPUBLISH = "tally.republish"
# Where relays tell each second what waits in the outbox: a serialized tally.query.v1.OutboxStatus.
OUTBOX_REPORTS = "tally.outbox.*"

# No event is larger: a poll's definition has at most 1.3 MB, and a batch of votes comes from requests of at most 4 MiB.
# The NATS servers' max_payload must allow it; their default of 1 MiB does not.
MAX_EVENT_BYTES = 4 << 20
# What the log may hold of an event, by a constraint of its table: the rest is for what a message has beside it.
MAX_PAYLOAD_BYTES = MAX_EVENT_BYTES - 1024

# Headers of each message, so that the stream can be compared with the log without reading events: the history that the
# event belongs to (absent: log_epoch.ZERO), its version, and when it was recorded, in microseconds of Unix time.
EPOCH_HEADER = "Tally-Log-Epoch"
VERSION_HEADER = "Tally-Version"
RECORDED_AT_HEADER = "Tally-Recorded-At"
# Header that makes JetStream drop a second copy of the same outbox row.
MESSAGE_ID_HEADER = "Nats-Msg-Id"

# Metadata of the stream: the history whose events are published now, and the write database that they come from.
EPOCH_METADATA = "tally-log-epoch"
DEPLOYMENT_METADATA = "tally-deployment"

# No poll has so many events: a version above it is no number of the database.
_MAX_VERSION = 1 << 62
# More digits are no number of microseconds that a database can hold.
_MAX_DIGITS = 18
_UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class EventHeaders(NamedTuple):
    """What the headers of a message say of its event. (log_epoch, poll, version) names one event; that two events with
    one name are the same is seen by `recorded_at`."""

    log_epoch: UUID
    version: int
    # Microseconds of Unix time; None: the message is of a relay that did not write it.
    recorded_at: int | None


def event_subject(shard: int, poll_id: UUID) -> str:
    """Where the events of a poll are published."""
    return f"tally.events.{shard}.{poll_id}"


def parse_event_subject(subject: str) -> tuple[int, UUID] | None:
    """The shard and the poll of a subject that `event_subject` made; None for another one."""
    with suppress(ValueError):
        *_, shard, poll_id = subject.split(".")
        found = int(shard), UUID(poll_id)
        if event_subject(*found) == subject:
            return found
    return None


def outbox_report_subject(shard: int) -> str:
    """Where the relay of a shard says what waits in its outbox."""
    return f"tally.outbox.{shard}"


def event_headers(epoch: UUID, version: int, recorded_at: datetime) -> dict[str, str]:
    """The headers of an event of the current history."""
    headers = {VERSION_HEADER: str(version), RECORDED_AT_HEADER: str(microseconds(recorded_at))}
    if epoch != log_epoch.ZERO:
        headers[EPOCH_HEADER] = str(epoch)
    return headers


def parse_event_headers(headers: Mapping[str, str] | None) -> EventHeaders | None:
    """What `event_headers` wrote, or a relay of an earlier version; None: the message is not the relay's."""
    if not headers:
        return None
    with suppress(ValueError):
        version, recorded_at = _number(headers.get(VERSION_HEADER)), _number(headers.get(RECORDED_AT_HEADER))
        if version:
            return EventHeaders(log_epoch.parse(headers.get(EPOCH_HEADER, "")), version, recorded_at)
    return None


def microseconds(moment: datetime) -> int:
    """Microseconds of Unix time."""
    since = moment - _UNIX_EPOCH
    # Three times as fast as a division by a timedelta, for each event.
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def event_message(poll_id: UUID, version: int, recorded_at: datetime, payload: bytes) -> bytes:
    """A logged event as it goes on the stream: serialized messages one after the other are read as one, merged."""
    head = Event(poll_id=str(poll_id), version=version)
    # As protobuf would convert the datetime, which takes longer than all the rest, for each event.
    head.recorded_at.seconds, micros = divmod(microseconds(recorded_at), 1_000_000)
    head.recorded_at.nanos = 1000 * micros
    return head.SerializeToString() + payload


def republish_request(poll_id: UUID, from_version: int) -> bytes:
    """Asks the relay to publish a poll's events again, from a version on."""
    return json.dumps({"poll_id": str(poll_id), "from_version": from_version}).encode()


def parse_republish_request(data: bytes) -> tuple[UUID, int]:
    """The poll and the first version that somebody asked for. Raises ValueError for anything else."""
    try:
        request = json.loads(data)
        poll_id, from_version = UUID(request["poll_id"]), int(request["from_version"])
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a republish request: {data[:200]!r}") from error
    if from_version > _MAX_VERSION:
        raise ValueError(f"no event has version {from_version}")
    return poll_id, from_version


def _number(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS):
        raise ValueError(f"not a number of the database: {text!r}")
    return int(text)
