"""Votes per second through CastVotes, beside what Postgres copies without us."""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from itertools import count
from random import Random

import asyncpg
import grpc
from tally.command.v1 import command_service_pb2 as pb
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub
from tally.poll.v1.poll_pb2 import VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec

from benchmarks.figures import Figure, compare
from benchmarks.stage import Stage
from command_server import ballots

_voters = count(step=1_000_000)


async def open_poll(address: str) -> str:
    """A new open poll with two options."""
    options = [PollOption(option_id=name, label=name) for name in ("yes", "no")]
    spec = PollSpec(title="Benchmark", method=VOTING_METHOD_SINGLE_CHOICE, options=options)
    async with grpc.aio.insecure_channel(address) as channel:
        server = CommandServiceStub(channel)
        poll = await server.CreatePoll(pb.CreatePollRequest(poll=spec))
        await server.OpenPoll(pb.OpenPollRequest(poll_id=poll.poll_id))
    return poll.poll_id


async def cast(address: str, poll_id: str, votes: int, *, batch: int = 5000, streams: int = 3) -> float:
    """Votes per second that a caller in another process gets acknowledged; every voter is new."""
    orders = {"address": address, "poll_id": poll_id, "votes": votes, "batch": batch, "streams": streams}
    load = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.load", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert load.stdin is not None
    assert load.stdout is not None
    load.stdin.write(json.dumps({**orders, "first": next(_voters)}).encode() + b"\n")
    assert await load.stdout.readline() == b"ready\n"
    load.stdin.write(b"\n")
    answer = json.loads((await load.communicate())[0])
    assert answer["accepted"] == votes // batch * batch, answer
    return float(answer["accepted"] / answer["seconds"])


async def copy(dsn: str, votes: int) -> float:
    """Rows per second of one COPY on one connection, into a new table with the columns and the key of `votes`."""
    random = Random(votes)
    rows = ballots.copy_rows(1, 1, [os.urandom(16) + ballots.marking([random.randrange(2)]) for _ in range(votes)])
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("DROP TABLE IF EXISTS copied; CREATE TABLE copied (LIKE votes INCLUDING ALL)")

        async def source() -> AsyncIterator[bytes]:
            yield rows

        started = time.perf_counter()
        await connection.copy_to_table("copied", source=source(), columns=ballots.COPY_COLUMNS, format="binary")
        return votes / (time.perf_counter() - started)
    finally:
        await connection.close()


async def run(stage: Stage, rounds: int, votes: int) -> list[Figure]:
    """CastVotes against COPY, on the same Postgres in turns."""
    async with stage.command_server() as (address, _):
        poll_id = await open_poll(address)
        await cast(address, poll_id, votes // 4)
        return [
            await compare(
                "cast_votes",
                lambda: cast(address, poll_id, votes),
                lambda: copy(stage.write_dsn, votes),
                unit="votes/s",
                baseline_name="COPY on one connection",
                rounds=rounds,
            )
        ]
