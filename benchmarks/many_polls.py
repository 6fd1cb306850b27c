"""Votes in many polls at once, beside the same votes in one poll: single calls, streams, and a slow disk."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from benchmarks import ingest, unary
from benchmarks.driver import drive, new_voters
from benchmarks.figures import Effort, Figure, figure, take_turns
from benchmarks.stage import Server, Stage

# Calls at once, and the votes of a request of a stream: small, as those of a thousand meetings are.
CONCURRENT = 128
REQUEST_VOTES = 10
# What a slow disk, or a synchronous standby far away, adds to each commit, in microseconds.
SLOW_COMMIT = 5_000
# Of the votes of a large stream, as many take about as long in small requests.
_FEWER_VOTES = 10

_COPY_POLL = """
WITH poll AS (
    INSERT INTO polls (poll_id, state, version, spec, created_at, recorded_at)
    SELECT gen_random_uuid(), state, version, spec, created_at, recorded_at
    FROM polls CROSS JOIN generate_series(1, $2) WHERE poll_id = $1::text::uuid
    RETURNING poll_id, poll_no
), logged AS (
    INSERT INTO events (poll_no, version, recorded_at, payload)
    SELECT poll.poll_no, event.version, event.recorded_at, event.payload
    FROM poll CROSS JOIN polls AS original JOIN events AS event ON event.poll_no = original.poll_no
    WHERE original.poll_id = $1::text::uuid
)
SELECT poll_id::text FROM poll
"""


async def open_polls(stage: Stage, server: Server, number: int) -> list[str]:
    """New open polls with two options: the first one as a caller opens it, the others copies of it."""
    poll_id = await ingest.open_poll(server.address)
    return [poll_id, *(row["poll_id"] for row in await stage.sql(_COPY_POLL, poll_id, number - 1))]


async def run(stage: Stage, effort: Effort) -> list[Figure]:
    """CastVote and CastVotes in many polls beside one poll, in turns; then CastVote where commits are slow."""
    figures: list[Figure] = []
    votes = effort.votes // _FEWER_VOTES
    async with stage.server("command_server") as server:
        await stage.clear()
        one = await open_polls(stage, server, 1)
        many = {number: await open_polls(stage, server, number) for number in effort.many_polls}
        for poll_ids in (one, *many.values()):
            # The server knows all of them, and has got its memory.
            await _stream(server, poll_ids, len(poll_ids) * REQUEST_VOTES)
            await _call(server, poll_ids, effort.seconds)
        singles = await take_turns(
            effort.rounds,
            *(partial(_call, server, poll_ids, effort.seconds) for poll_ids in (one, *many.values())),
        )
        streams = await take_turns(
            effort.rounds, *(partial(_stream, server, poll_ids, votes) for poll_ids in (one, *many.values()))
        )
        for name, rates, bound in (("cast_vote", singles, 0.7), ("cast_votes", streams, 0.5)):
            figures += [
                _figure(name, number, each, rates[0], bound) for number, each in zip(many, rates[1:], strict=True)
            ]

        number = max(effort.many_polls)
        unknown = iter([await open_polls(stage, server, number) for _ in range(effort.rounds)])
        alone, firsts = await take_turns(
            effort.rounds,
            lambda: _call(server, one, effort.seconds),
            lambda: _call(server, next(unknown), effort.seconds),
        )
        figures.append(_figure("cast_vote_unknown", number, firsts, alone, None))

    number = min(effort.many_polls)
    async with _slow_commits(stage), stage.server("command_server") as server:
        one, some = await open_polls(stage, server, 1), await open_polls(stage, server, number)
        alone, others = await take_turns(
            effort.rounds,
            lambda: _call(server, one, effort.seconds),
            lambda: _call(server, some, effort.seconds),
        )
    figures.append(_figure("cast_vote_slow_commit", number, others, alone, 0.7))
    return figures


def _figure(name: str, polls: int, values: Sequence[float], alone: Sequence[float], bound: float | None) -> Figure:
    return figure(f"{name}_{polls}_polls", values, alone, unit="votes/s", baseline_name="one poll", bound=bound)


async def _call(server: Server, poll_ids: Sequence[str], seconds: float) -> float:
    calls = await unary.call(server, unary.METHOD, seconds, poll_ids=poll_ids, concurrent=CONCURRENT)
    return calls.per_second


async def _stream(server: Server, poll_ids: Sequence[str], votes: int) -> float:
    load = ingest.orders(server.address, poll_ids, votes, new_voters(), batch=REQUEST_VOTES)
    answer = await drive(ingest.LOAD, load)
    assert answer["accepted"] == votes, answer
    return float(votes / answer["seconds"])


@asynccontextmanager
async def _slow_commits(stage: Stage) -> AsyncIterator[None]:
    """Connections that begin meanwhile commit as to a slow disk."""
    settings = {"commit_delay": SLOW_COMMIT, "commit_siblings": 0}
    for name, value in settings.items():
        await stage.sql(f"ALTER DATABASE tally_write SET {name} = {value}", dsn=stage.stores.admin_dsn)
    try:
        yield
    finally:
        for name in settings:
            await stage.sql(f"ALTER DATABASE tally_write RESET {name}", dsn=stage.stores.admin_dsn)
