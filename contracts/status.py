"""How it is told how far events have come, and what of it is still worth believing.

Each projector stores, each second and in the store of its read model, a `GetReadModelStatusResponse` with all that it
knows: its own read model, the stream as it sees it, and what relays have told it about the outbox. So a reader of the
stores needs neither NATS nor the write database to know how the rest of the system does.
"""

from google.protobuf.timestamp_pb2 import Timestamp

REPORT_SECONDS = 1.0
# Whoever has said nothing for this long may be dead, and what was said before may be wrong by now.
SILENCE_SECONDS = 5.0


def now() -> Timestamp:
    """The moment of a report."""
    moment = Timestamp()
    moment.GetCurrentTime()
    return moment


def age(reported_at: Timestamp, at: Timestamp) -> float:
    """How old a report is, in seconds; 0 for one of a clock that is ahead."""
    return max((at.ToNanoseconds() - reported_at.ToNanoseconds()) / 1e9, 0.0)


def is_fresh(reported_at: Timestamp, at: Timestamp) -> bool:
    """Whether a report says how things are now."""
    return age(reported_at, at) <= SILENCE_SECONDS
