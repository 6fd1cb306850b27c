"""CastVote, a vote at a time: calls per second, processor time and latency."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple
from uuid import uuid4

import asyncpg

from benchmarks import servers
from benchmarks.driver import Driver, new_voters
from benchmarks.figures import Effort, Figure, cpu_seconds, figure, take_turns
from benchmarks.ingest import open_poll
from benchmarks.stage import Server, Stage

METHOD = "/tally.command.v1.CommandService/CastVote"
CONCURRENT = (64, 128, 256)


CALLS = "benchmarks.calls"


class Calls(NamedTuple):
    """What callers see of a server: calls per second, latency in ms; and its processor time per call, in µs."""

    per_second: float
    cpu: float
    p50: float
    p99: float


def orders(
    server: Server,
    method: str,
    seconds: float,
    *,
    poll_ids: Sequence[str] = (),
    request: bytes = b"",
    concurrent: int = 0,
    rate: float = 0.0,
    acknowledged: bool = False,
) -> dict[str, object]:
    """Orders for benchmarks.calls: to call with votes in polls, or with the same request."""
    return {
        "address": server.address,
        "method": method,
        "seconds": seconds,
        "poll_ids": list(poll_ids),
        "first": new_voters(),
        "request": request.hex(),
        "concurrent": concurrent,
        "rate": rate,
        "acknowledged": acknowledged,
    }


async def call(server: Server, method: str, seconds: float, **others: Any) -> Calls:
    """Calls a server from another process; see `orders`."""
    driver = await Driver.prepare(CALLS, orders(server, method, seconds, **others))
    before = cpu_seconds(server.pid)
    answer = await driver.go()
    cpu = cpu_seconds(server.pid) - before
    await driver.done()
    calls = answer["calls"]
    return Calls(calls / answer["seconds"], cpu / calls * 1e6, answer["p50"] * 1e3, answer["p99"] * 1e3)


async def run(stage: Stage, effort: Effort) -> list[Figure]:
    """CastVote beside an empty RPC, with as many calls at once; then its latency at half of that rate."""
    figures: list[Figure] = []
    await stage.clear()
    async with stage.server("command_server") as server, stage.server("benchmarks.servers", "empty") as empty:
        poll_id = await open_poll(server.address)
        await call(server, METHOD, effort.seconds, poll_ids=[poll_id], concurrent=CONCURRENT[0])
        for concurrent in CONCURRENT:
            ours, limits = await take_turns(
                effort.rounds,
                partial(call, server, METHOD, effort.seconds, poll_ids=[poll_id], concurrent=concurrent),
                partial(call, empty, servers.METHOD, effort.seconds, concurrent=concurrent),
            )
            figures += [
                figure(
                    f"cast_vote_{concurrent}",
                    [calls.per_second for calls in ours],
                    [calls.per_second for calls in limits],
                    unit="calls/s",
                    baseline_name="an empty RPC",
                    bound=0.7,
                ),
                figure(
                    f"cast_vote_{concurrent}_cpu",
                    [calls.cpu for calls in ours],
                    [calls.cpu for calls in limits],
                    unit="µs/call (server)",
                    baseline_name="an empty RPC",
                    bound=1.4,
                    at_most=True,
                ),
            ]
        half = figures[0].value / 2
        ours, empties, commits = await take_turns(
            effort.rounds,
            lambda: call(server, METHOD, effort.seconds, poll_ids=[poll_id], rate=half),
            lambda: call(empty, servers.METHOD, effort.seconds, rate=half),
            lambda: commit(stage.write_dsn, effort.seconds),
        )
    return [
        *figures,
        *(
            figure(
                f"cast_vote_{part}_beside_{name}",
                [getattr(calls, part) for calls in ours],
                [getattr(calls, part) for calls in baselines],
                unit=f"ms at {half:,.0f} calls/s",
                baseline_name=f"{part} of {meaning}",
                bound=bound,
                at_most=True,
            )
            for name, meaning, baselines, part, bound in (
                ("commit", "committing one row", commits, "p50", None),
                ("commit", "committing one row", commits, "p99", 10.0),
                ("empty", "an empty RPC", empties, "p50", None),
                ("empty", "an empty RPC", empties, "p99", None),
            )
        ),
    ]


async def commit(dsn: str, seconds: float) -> Calls:
    """One connection that inserts rows with the columns and the key of `votes`, each in a transaction of its own."""
    connection = await asyncpg.connect(dsn)
    times: list[float] = []
    try:
        await connection.execute("CREATE TABLE committed (LIKE votes INCLUDING ALL)")
        insert = await connection.prepare("INSERT INTO committed VALUES (1, $1, $2)")
        until = time.perf_counter() + seconds
        while (started := time.perf_counter()) < until:
            await insert.fetch(uuid4(), b"\0\0")
            times.append((time.perf_counter() - started) * 1e3)
        await connection.execute("DROP TABLE committed")
    finally:
        await connection.close()
    times.sort()
    return Calls(len(times) / seconds, 0.0, times[len(times) // 2], times[len(times) * 99 // 100])
