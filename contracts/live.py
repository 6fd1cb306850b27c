"""Names in Redis: the live counters.

Each poll is one hash, `live_key`: `version` is the latest event it contains, `results` a serialized
tally.query.v1.GetResultsResponse (which has the same bytes as a WatchResultsResponse). Each change is published on
the channel of the same name as those same bytes, so the counters are encoded once, whatever the number of readers.

While a poll hides its results, `results`, and what is published, is `hidden_results` in their place: no query server
ever holds what it must not tell. The projector keeps what it counts on from in `counted`, which nobody else reads.
"""

from struct import Struct
from uuid import UUID

# How far into the stream the live counters are; see migrations/read/0001_views.sql, stream_position.
POSITION_KEY = "tally:live:position"
# The hash of the polls that stand still: poll_id → contracts.dead_letters.DeadLetter.
DEAD_LETTERS_KEY = "tally:live:dead-letters"


# No protobuf message begins with a zero byte.
_HIDDEN = Struct(">xQ")


def hidden_results(version: int) -> bytes:
    """What stands in the place of the results of a poll that hides them."""
    return _HIDDEN.pack(version)


def are_hidden(results: bytes) -> bool:
    """Whether these are `hidden_results`."""
    return results.startswith(b"\0")


def hidden_version(results: bytes) -> int:
    """The version in `hidden_results`. Raises struct.error for what only begins like them."""
    version: int = _HIDDEN.unpack(results)[0]
    return version


def live_key(poll_id: UUID | str) -> str:
    """The hash, and the channel, of a poll's live counters."""
    return f"tally:live:{poll_id}"
