"""The same job done as one would otherwise do it, on the same Postgres: each vote durable, unique and counted."""

from functools import partial
from urllib.parse import urlsplit
from uuid import uuid4

from benchmarks import servers, unary
from benchmarks.driver import drive, new_voters
from benchmarks.figures import Effort, Figure, figure, take_turns
from benchmarks.ingest import cast, open_poll
from benchmarks.stage import Stage

CONCURRENT = 64


async def run(stage: Stage, effort: Effort) -> list[Figure]:
    """CastVote and CastVotes beside the `eventsourcing` library and a service with one transaction for each vote."""
    await stage.clear()
    async with stage.server("command_server") as server, stage.server("benchmarks.servers", "plain") as plain:
        poll_id = await open_poll(server.address)
        plain_poll = str(uuid4())
        await stage.sql(servers.CREATE_VOTES)
        await stage.sql(servers.CREATE_COUNTERS)
        await stage.sql("INSERT INTO plain_counters VALUES ($1, 'yes', 0)", plain_poll)

        async def singly() -> float:
            calls = await unary.call(server, unary.METHOD, effort.seconds, poll_ids=[poll_id], concurrent=CONCURRENT)
            return calls.per_second

        async def one_by_one() -> float:
            calls = await unary.call(
                plain, servers.METHOD, effort.seconds, poll_ids=[plain_poll], concurrent=CONCURRENT
            )
            return calls.per_second

        ours, batched, transactions, saved, saved_together = await take_turns(
            effort.rounds,
            singly,
            lambda: cast(server.address, poll_id, effort.votes),
            one_by_one,
            partial(_library, stage, effort.seconds, 1),
            partial(_library, stage, effort.seconds, 1000),
        )
    return [
        figure(
            "cast_vote_beside_transactions",
            ours,
            transactions,
            unit="votes/s",
            baseline_name="a transaction for each vote",
        ),
        figure("cast_vote_beside_library", ours, saved, unit="votes/s", baseline_name="eventsourcing, singly"),
        figure(
            "cast_votes_beside_library",
            batched,
            saved_together,
            unit="votes/s",
            baseline_name="eventsourcing, by 1,000",
        ),
    ]


async def _library(stage: Stage, seconds: float, batch: int) -> float:
    """Votes per second that the library saves."""
    dsn = urlsplit(stage.write_dsn)
    environment = {
        "PERSISTENCE_MODULE": "eventsourcing.postgres",
        "POSTGRES_DBNAME": dsn.path[1:],
        "POSTGRES_HOST": dsn.hostname,
        "POSTGRES_PORT": str(dsn.port),
        "POSTGRES_USER": dsn.username,
        "POSTGRES_PASSWORD": dsn.password,
    }
    orders = {"environment": environment, "seconds": seconds, "batch": batch, "poll_id": str(uuid4())}
    answer = await drive("benchmarks.library", {**orders, "first": new_voters()})
    return float(answer["votes"] / answer["seconds"])
