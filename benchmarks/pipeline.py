"""The way of votes from the ballot box to the readers: each leg on its own, and all of it at once."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import asyncpg
from redis.asyncio import Redis
from tally.event.v1.event_pb2 import Event, VotesCast

from benchmarks.driver import Driver, new_voters
from benchmarks.figures import Effort, Figure, cpu_seconds, figure
from benchmarks.ingest import BATCH_VOTES, LOAD, cast, copy, open_poll, orders
from benchmarks.stage import Server, Stage, pid_of
from contracts.live import FIRST_GENERATION, live_key

RELAY, LIVE, VIEWS = ("relay",), ("projector", "live"), ("projector", "views")
# What is asked of a relay, in events per second.
ASKED_EVENTS = 20_000

_LOOK_SECONDS = 0.005
_PATIENCE_SECONDS = 120.0

# Any byte as one of two options.
_TWO = bytes(byte % 2 for byte in range(256))

# The log and the outbox as so many commits leave them, but that the votes themselves are missing.
_EVENTS = """
WITH poll AS (
    UPDATE polls SET version = version + $2 WHERE poll_id = $1 RETURNING poll_no, version, recorded_at
), logged AS (
    INSERT INTO events (poll_no, version, recorded_at, batch_id, payload)
    SELECT poll_no, version - $2 + n, recorded_at, version - $2 + n, $3 FROM poll, generate_series(1, $2::bigint) AS n
    RETURNING poll_no, version
)
INSERT INTO outbox (poll_no, version) SELECT poll_no, version FROM logged ORDER BY version
"""


class Together(NamedTuple):
    """The whole way at once: votes per second, and the µs that each process has worked for one vote."""

    rate: float
    cpu: Mapping[str, float]


class Legs(NamedTuple):
    """Each leg alone: votes per second, and small events per second."""

    ingest: float
    relay: float
    live: float
    views: float
    small_events: float


async def run(stage: Stage, effort: Effort) -> list[Figure]:
    """The relay and the projectors against what they have to keep up with; then all together against COPY."""
    async with stage.server("command_server") as server, _ends(stage) as ends:
        copies: list[float] = []
        together: list[Together] = []
        alone: list[Legs] = []
        for _ in range(effort.rounds):
            await stage.clear()
            copies.append(await copy(stage.write_dsn, effort.votes))
            together.append(await _together(stage, server, ends, effort.votes))
            alone.append(await _legs(stage, server, ends, effort.votes))
    ingest = [legs.ingest for legs in alone]
    return [
        figure(
            "cast_votes_with_readers",
            [whole.rate for whole in together],
            copies,
            unit="votes/s",
            baseline_name="COPY on one connection",
            bound=0.8,
        ),
        *(
            figure(
                f"cpu_{process}",
                [whole.cpu[process] for whole in together],
                [sum(whole.cpu.values()) for whole in together],
                unit="µs/vote",
                baseline_name="all processes",
            )
            for process in together[0].cpu
        ),
        *(
            figure(
                name,
                [getattr(legs, leg) for legs in alone],
                ingest,
                unit="votes/s",
                baseline_name="CastVotes alone",
                bound=bound,
            )
            for name, leg, bound in (
                ("relay", "relay", 1.0),
                ("projector_live", "live", 1.0),
                ("projector_views", "views", 0.7),
            )
        ),
        figure(
            "relay_small_events",
            [legs.small_events for legs in alone],
            [ASKED_EVENTS] * effort.rounds,
            unit="events/s",
            baseline_name="asked for",
            bound=1.0,
        ),
    ]


async def _together(stage: Stage, server: Server, ends: "_Ends", votes: int) -> Together:
    """The clock stops when all votes are acknowledged and both read models show them."""
    await stage.clear()
    async with stage.service(*RELAY) as relay, stage.service(*LIVE) as live, stage.service(*VIEWS) as views:
        processes = {"relay": relay, "projector_live": live, "projector_views": views}
        stores = {name: getattr(stage.stores, f"{name}_process") for name in ("postgres", "nats", "redis")}
        pids = {"command_server": server.pid} | {name: pid_of(each) for name, each in (processes | stores).items()}
        poll_id = await open_poll(server.address)
        driver = await Driver.prepare(LOAD, orders(server.address, [poll_id], votes, new_voters()))
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        started = time.perf_counter()
        assert (await driver.go())["accepted"] == votes
        version = await ends.version(poll_id)
        await _reached(lambda: ends.live_has(poll_id, version))
        await _reached(lambda: ends.views_have(poll_id, version))
        seconds = time.perf_counter() - started
        cpu = {name: (cpu_seconds(pid) - before[name]) / votes * 1e6 for name, pid in pids.items()}
        await driver.done()
    return Together(votes / seconds, cpu)


async def _legs(stage: Stage, server: Server, ends: "_Ends", votes: int) -> Legs:
    """Each process finds its work waiting when it starts."""
    await stage.clear()
    poll_id = await open_poll(server.address)
    ingest = await cast(server.address, poll_id, votes)
    await _catch_up(RELAY, stage, ends.outbox_is_empty)
    version = await ends.version(poll_id)
    views = votes / await _catch_up(VIEWS, stage, lambda: ends.views_have(poll_id, version))
    await stage.clear()
    # Relay and counters are faster than that: they get more to do.
    poll_id, events = await open_poll(server.address), 10 * votes // BATCH_VOTES
    await _queue(stage, poll_id, events, BATCH_VOTES)
    relay = events * BATCH_VOTES / await _catch_up(RELAY, stage, ends.outbox_is_empty)
    version = await ends.version(poll_id)
    live = events * BATCH_VOTES / await _catch_up(LIVE, stage, lambda: ends.live_has(poll_id, version))
    await _queue(stage, poll_id, votes // 10, 1)
    small_events = votes // 10 / await _catch_up(RELAY, stage, ends.outbox_is_empty)
    return Legs(ingest, relay, live, views, small_events)


async def _queue(stage: Stage, poll_id: str, events: int, votes: int) -> None:
    """Fills log and outbox with events of so many votes each."""
    cast_votes = VotesCast(
        batch_id=1, voter_keys=os.urandom(16 * votes), option_numbers=os.urandom(votes).translate(_TWO)
    )
    await stage.sql(_EVENTS, UUID(poll_id), events, Event(votes_cast=cast_votes).SerializeToString())


async def _catch_up(service: tuple[str, ...], stage: Stage, end: Callable[[], Awaitable[bool]]) -> float:
    """Seconds from when a process is ready until it has done what waits for it."""
    async with stage.service(*service) as process:
        assert isinstance(process.program.ready, Path)
        started = process.program.ready.stat().st_mtime
        await _reached(end)
        return time.time() - started


async def _reached(end: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while not await end():
            await asyncio.sleep(_LOOK_SECONDS)


class _Ends:
    """Looks at the stores: whether a leg has done its work."""

    def __init__(self, write: asyncpg.Connection, read: asyncpg.Connection, redis: Redis) -> None:
        self._write = write
        self._read = read
        self._redis = redis

    async def version(self, poll_id: str) -> int:
        """The poll's latest event in the log."""
        version: int = await self._write.fetchval("SELECT version FROM polls WHERE poll_id = $1", UUID(poll_id))
        return version

    async def outbox_is_empty(self) -> bool:
        return not await self._write.fetchval("SELECT EXISTS (SELECT FROM outbox)")

    async def live_has(self, poll_id: str, version: int) -> bool:
        return int(await self._redis.hget(live_key(FIRST_GENERATION, poll_id), "version") or 0) >= version

    async def views_have(self, poll_id: str, version: int) -> bool:
        return bool(
            await self._read.fetchval("SELECT version >= $2 FROM polls WHERE poll_id = $1", UUID(poll_id), version)
        )


@asynccontextmanager
async def _ends(stage: Stage) -> AsyncIterator[_Ends]:
    write, read = await asyncpg.connect(stage.write_dsn), await asyncpg.connect(stage.views_dsn)
    try:
        async with Redis.from_url(stage.stores.redis_url) as redis:
            yield _Ends(write, read, redis)
    finally:
        await write.close()
        await read.close()
