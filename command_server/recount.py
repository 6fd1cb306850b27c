"""The final recount: what a poll's votes come to, beside what its event log adds up to."""

import struct
from collections import Counter
from typing import Any

import asyncpg
import structlog
from google.protobuf.message import DecodeError
from tally.event.v1.event_pb2 import Event, Recount
from tally.poll.v1.poll_pb2 import PollSpec

from command_server.ballots import key_range, option_numbers
from command_server.poll import has_roll
from contracts.counting import added_votes, count_changes
from runtime.postgres import queries

log = structlog.get_logger()
sql = queries(__package__)

# Read by pages, so that no statement is long and memory does not depend on the size of the poll; and small ones, since
# votes of other polls wait while a page is added up. Votes that are alike come as one row, with its marks once.
_VOTES_OF_A_PAGE = 200_000
_MARKS_OF_A_PAGE = 20_000
_EVENTS_OF_A_PAGE = 2_000
_BYTES_OF_A_PAGE = 1 << 20


async def recount_votes(pool: "asyncpg.Pool[Any]", poll_no: int, spec: PollSpec) -> Recount:
    """Counts the votes of a closed poll from the votes themselves, each with its weight by the poll's rules.

    A vote that cannot be read is counted as one without a mark. No event tells of such a vote, so the log cannot agree.
    """
    counts, total, limit = Counter[int](), 0, 1
    weighted = has_roll(spec)
    first, last = key_range(poll_no)
    while page := await pool.fetch(sql.recount_votes, first, last, limit):
        marks = 0
        for row in page:
            total += row["votes"]
            try:
                numbers = option_numbers(row["choices"])
            except struct.error:
                log.error("votes cannot be read", poll_no=poll_no, choices=row["choices"].hex(), votes=row["votes"])
                continue
            weight = int(row["roll_weight"]) if weighted else row["votes"]
            for number in numbers:
                counts[number] += weight
            marks += len(numbers)
        first = page[0]["last_key"]
        limit = _next_limit(limit, marks / _MARKS_OF_A_PAGE, _VOTES_OF_A_PAGE)
    return Recount(counts=[counts[number] for number in range(len(spec.options))], total_votes=total)


async def fold_log(pool: "asyncpg.Pool[Any]", poll_no: int, options: int) -> Recount:
    """Adds up the events of a closed poll. Where one cannot be read the sum is empty, and agrees with no recount."""
    counts, total, version, limit = Counter[int](), 0, 0, 1
    while page := await pool.fetch(sql.read_events, poll_no, version, limit):
        for row in page:
            try:
                cast = Event.FromString(row["payload"]).votes_cast
            except DecodeError:
                log.error("an event cannot be read", poll_no=poll_no, version=row["version"])
                return Recount()
            total += added_votes(cast)
            counts.update(count_changes(cast))
        version = page[-1]["version"]
        size = sum(len(row["payload"]) for row in page)
        limit = _next_limit(limit, size / _BYTES_OF_A_PAGE, _EVENTS_OF_A_PAGE)
    return Recount(counts=[counts[number] for number in range(options)], total_votes=total)


def _next_limit(limit: int, share: float, most: int) -> int:
    """How many rows the next page has. If they are like those before, which were this share of a page, it is whole."""
    return max(1, min(int(limit / max(share, 0.1)), most))
