"""Which lengths of time a chart of the turnout has, and how many voted in each. Pure."""

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from tally.query.v1.query_service_pb2 import GetTurnoutRequest, TurnoutBucket

from contracts.read_database import TURNOUT_GRAIN
from contracts.refusals import invalid_request

MAX_BUCKETS = 1_000
# Who does not say how long a bucket is gets the first of these lengths that makes no more than so many; seconds.
_ENOUGH_BUCKETS = 100
_LENGTHS = (TURNOUT_GRAIN, 30, 60, 300, 600, 1_800, 3_600, 3 * 3_600, 6 * 3_600, 12 * 3_600, 86_400, 7 * 86_400)


class Buckets(NamedTuple):
    """Lengths of time without a gap, in whole seconds of Unix time; `start` and `end` are multiples of `length`."""

    length: int
    start: int
    end: int

    def filled(self, votes: Mapping[int, int], before: int) -> list[TurnoutBucket]:
        """All of them. `votes`: when a bucket starts → how many voted in it; `before`: how many did before all."""
        buckets, cumulative = [], before
        for start in range(self.start, self.end, self.length):
            bucket = TurnoutBucket(votes=votes.get(start, 0))
            bucket.start_time.seconds = start
            cumulative += bucket.votes
            bucket.cumulative_votes = cumulative
            buckets.append(bucket)
        return buckets


def buckets(request: GetTurnoutRequest, opened_at: datetime | None, last: datetime) -> Buckets:
    """The buckets to answer with, none where the poll was not opened; `last` is the moment up to which votes are known.

    Raises INVALID_REQUEST where they would be too many.
    """
    start = request.start_time.seconds if request.HasField("start_time") else _seconds(opened_at or last)
    end = _seconds(last) + 1
    if request.HasField("end_time"):
        end = request.end_time.seconds + (request.end_time.nanos > 0)
    if opened_at is None or end <= start:
        return Buckets(request.bucket.seconds or TURNOUT_GRAIN, 0, 0)
    if request.HasField("bucket"):
        length = request.bucket.seconds
    else:
        length = next((length for length in _LENGTHS if _count(length, start, end) <= _ENOUGH_BUCKETS), _LENGTHS[-1])
    if (count := _count(length, start, end)) > MAX_BUCKETS:
        raise invalid_request({"bucket": f"must be longer: {count:,} are in this time, {MAX_BUCKETS:,} allowed"})
    return Buckets(length, start // length * length, -(-end // length) * length)


def _count(length: int, start: int, end: int) -> int:
    return -(-end // length) - start // length


def _seconds(moment: datetime) -> int:
    return int(moment.timestamp())
