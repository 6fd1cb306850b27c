"""Names on NATS: the stream of events, and the request to publish events again."""

import json
from datetime import datetime
from uuid import UUID

from tally.event.v1.event_pb2 import Event

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

# Header of each message: the event's version, so that the stream's tail can be checked without parsing it.
VERSION_HEADER = "Tally-Version"
# Header that makes JetStream drop a second copy of the same outbox row.
MESSAGE_ID_HEADER = "Nats-Msg-Id"

# No poll has so many events: a version above it is no number of the database.
_MAX_VERSION = 1 << 62


def event_subject(shard: int, poll_id: UUID) -> str:
    """Where the events of a poll are published."""
    return f"tally.events.{shard}.{poll_id}"


def outbox_report_subject(shard: int) -> str:
    """Where the relay of a shard says what waits in its outbox."""
    return f"tally.outbox.{shard}"


def event_message(poll_id: UUID, version: int, recorded_at: datetime, payload: bytes) -> bytes:
    """A logged event as it goes on the stream: serialized messages one after the other are read as one, merged."""
    head = Event(poll_id=str(poll_id), version=version, recorded_at=recorded_at)  # type: ignore[arg-type]
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
