"""Votes per second through CastVotes, beside what Postgres copies without us."""

import os
import time
from collections.abc import AsyncIterator, Sequence
from random import Random
from typing import NamedTuple

import asyncpg
import grpc
from tally.command.v1 import command_service_pb2 as pb
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub
from tally.poll.v1.poll_pb2 import VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec

from benchmarks.driver import Driver, drive, new_voters
from benchmarks.figures import Effort, Figure, cpu_seconds, figure, take_turns
from benchmarks.stage import Server, Stage
from command_server import ballots

LOAD = "benchmarks.load"
BATCH_VOTES = 5000
_CHUNK_BYTES = 1 << 18
# What a poll grows by while the cost of a vote is measured: a poll that had more would not be new any more.
_SLICE_VOTES = 400_000


async def open_poll(address: str) -> str:
    """A new open poll with two options."""
    options = [PollOption(option_id=name, label=name) for name in ("yes", "no")]
    spec = PollSpec(title="Benchmark", method=VOTING_METHOD_SINGLE_CHOICE, options=options)
    async with grpc.aio.insecure_channel(address) as channel:
        server = CommandServiceStub(channel)
        poll = await server.CreatePoll(pb.CreatePollRequest(poll=spec))
        await server.OpenPoll(pb.OpenPollRequest(poll_id=poll.poll_id))
    return poll.poll_id


def orders(
    address: str,
    poll_ids: Sequence[str],
    votes: int,
    first: int,
    repeated: int | None = None,
    batch: int = BATCH_VOTES,
) -> dict[str, object]:
    """What benchmarks.load sends: votes of voters from `first` on, and one in a hundred of `repeated` again, in
    requests of `batch` votes for one poll after the other."""
    assert votes % batch == 0, f"votes come in batches of {batch}"
    place = {"address": address, "poll_ids": list(poll_ids)}
    return {**place, "votes": votes, "batch": batch, "streams": 3, "first": first, "repeated": repeated}


async def cast(address: str, poll_id: str, votes: int) -> float:
    """Votes per second that a caller in another process gets acknowledged; every voter is new."""
    answer = await drive(LOAD, orders(address, [poll_id], votes, new_voters()))
    assert answer["accepted"] == votes, answer
    return float(votes / answer["seconds"])


async def copy(dsn: str, votes: int) -> float:
    """Rows per second of one COPY on one connection, into a new table with the columns and the key of `votes`."""
    random = Random(votes)
    rows = ballots.copy_rows(1, 1, [os.urandom(16) + ballots.marking([random.randrange(2)]) for _ in range(votes)])
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("CREATE TABLE copied (LIKE votes INCLUDING ALL)")

        async def source() -> AsyncIterator[bytes]:
            for start in range(0, len(rows), _CHUNK_BYTES):
                yield rows[start : start + _CHUNK_BYTES]

        started = time.perf_counter()
        await connection.copy_to_table("copied", source=source(), columns=ballots.COPY_COLUMNS, format="binary")
        seconds = time.perf_counter() - started
        await connection.execute("DROP TABLE copied")
    finally:
        await connection.close()
    return votes / seconds


async def run(stage: Stage, effort: Effort) -> list[Figure]:
    """CastVotes against COPY, on the same Postgres in turns; each side finds the stores empty."""
    async with stage.server("command_server") as server:
        await _into_new_poll(stage, server, effort.votes // 4 // BATCH_VOTES * BATCH_VOTES)

        async def ours() -> float:
            return await _into_new_poll(stage, server, effort.votes)

        async def limit() -> float:
            await stage.clear()
            return await copy(stage.write_dsn, effort.votes)

        values, limits = await take_turns(effort.rounds, ours, limit)
    return [
        figure("cast_votes", values, limits, unit="votes/s", baseline_name="COPY on one connection", bound=1.4),
    ]


async def _into_new_poll(stage: Stage, server: Server, votes: int) -> float:
    await stage.clear()
    return await cast(server.address, await open_poll(server.address), votes)


class Cost(NamedTuple):
    """What one vote cost, in microseconds: of time, and of the processors (command server and Postgres)."""

    time: float
    cpu: float


async def _cost(stage: Stage, server: Server, load: dict[str, object], accepted: int) -> Cost:
    pids = [server.pid, stage.postgres_pid]
    driver = await Driver.prepare(LOAD, load)
    before = sum(map(cpu_seconds, pids))
    answer = await driver.go()
    cpu = sum(map(cpu_seconds, pids)) - before
    await driver.done()
    assert (answer["accepted"], answer.get("rejected", 0)) == (accepted, 0), answer
    return Cost(answer["seconds"] / accepted * 1e6, cpu / accepted * 1e6)


async def grow(stage: Stage, effort: Effort) -> list[Figure]:
    """What a vote costs in a poll that has had millions of them, against one that is new, in turns."""
    slice_votes = min(effort.votes, _SLICE_VOTES, effort.big_poll)
    async with stage.server("command_server") as server:
        await stage.clear()
        big = await open_poll(server.address)
        for _ in range(effort.big_poll // slice_votes):
            await cast(server.address, big, slice_votes)

        # No checkpoint before each part: it would make the big poll write whole pages more often than by itself.
        async def into(poll_id: str) -> Cost:
            return await _cost(stage, server, orders(server.address, [poll_id], slice_votes, new_voters()), slice_votes)

        async def into_new() -> Cost:
            return await into(await open_poll(server.address))

        costs, limits = await take_turns(effort.rounds, lambda: into(big), into_new)
    millions = f"{effort.big_poll / 1e6:g}m"
    return _costs(f"growth_{millions}", costs, limits, baseline_name="a new poll", bound=1.3)


async def repeat(stage: Stage, effort: Effort) -> list[Figure]:
    """What a vote costs in batches of which one vote in a hundred repeats an earlier one, against clean batches."""
    costs: list[Cost] = []
    limits: list[Cost] = []
    async with stage.server("command_server") as server:
        for _ in range(effort.rounds):
            await stage.clear()
            poll_id = await open_poll(server.address)
            clean, votes = new_voters(), effort.votes
            # Only a vote with the key of the recorded one is a repeat of it.
            key = {"idempotency_key": "a key of the benchmarks"}
            load = orders(server.address, [poll_id], votes, clean) | key
            limits.append(await _cost(stage, server, load, votes))
            load = orders(server.address, [poll_id], votes, new_voters(), repeated=clean) | key
            costs.append(await _cost(stage, server, load, votes - votes // 100))
    return _costs("repeats", costs, limits, baseline_name="clean batches", bound=3.0)


def _costs(name: str, costs: list[Cost], limits: list[Cost], *, baseline_name: str, bound: float) -> list[Figure]:
    return [
        figure(
            f"{name}_{part}",
            [getattr(cost, part) for cost in costs],
            [getattr(cost, part) for cost in limits],
            unit=f"µs/vote ({meaning})",
            baseline_name=baseline_name,
            bound=bound,
            at_most=True,
        )
        for part, meaning in (("time", "elapsed"), ("cpu", "server and Postgres"))
    ]
