"""Names in Redis: the live counters.

Each poll is one hash, `live_key`: `version` is the latest event it contains, `results` a serialized
tally.query.v1.GetResultsResponse (which has the same bytes as a WatchResultsResponse). Each change is published on
the channel of the same name as those same bytes, so the counters are encoded once, whatever the number of readers.
"""

from uuid import UUID

# How far into the stream the live counters are; see migrations/read/0001_views.sql, stream_position.
POSITION_KEY = "tally:live:position"


def live_key(poll_id: UUID | str) -> str:
    """The hash, and the channel, of a poll's live counters."""
    return f"tally:live:{poll_id}"
