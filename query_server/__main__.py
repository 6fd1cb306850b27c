"""`python -m query_server`: the read side as a process."""

import asyncio
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import asyncpg
from pydantic import Field
from tally.query.v1 import query_service_pb2
from tally.query.v1.query_service_pb2_grpc import add_QueryServiceServicer_to_server

from contracts.voters import VoterKeys
from migrations import READ, check_read
from query_server import live
from query_server.announcements import Announcements
from query_server.answered import Answered
from query_server.failures import status_of
from query_server.live import LiveResults
from query_server.service import QueryService
from query_server.status import Status
from query_server.views import CONNECTIONS, Views
from query_server.watchers import Watchers
from runtime import lifecycle, postgres, serving, telemetry, workers
from runtime import redis as redis_versions
from runtime.replicas import spread_readers
from runtime.settings import Listen, PostgresUrl, RedisUrl, ServerSettings
from runtime.stores import Store

SERVICE = query_service_pb2.DESCRIPTOR.services_by_name["QueryService"].full_name


class QuerySettings(ServerSettings):
    """What the query server reads from the environment."""

    query_listen: Listen = Field("127.0.0.1:50052", description="host:port of the QueryService.")
    read_dsn: PostgresUrl = Field(description="Postgres URL of the read database.")
    redis_url: RedisUrl = Field(description="Redis URL of the live counters.")
    voter_secret: str = Field(
        min_length=32, max_length=64, description="Key of the voter hash: the same in all command and query servers."
    )
    max_connection_age: float = Field(
        600.0, gt=0, le=1_000_000, description="Seconds after which a connection is replaced, so that watchers spread."
    )


async def main(stop: asyncio.Event) -> None:
    settings = workers.settings_from(sys.argv[1:], "query_server", QuerySettings)
    if settings.workers > 1:
        telemetry.start("query_server workers", settings, metrics=False)
        await workers.run("query_server", settings, "query_listen", stop)
        return
    telemetry.start("query_server", settings)
    await serve(settings, stop, lambda port: lifecycle.announce("serving", settings, port=port))


async def serve(settings: QuerySettings, stop: asyncio.Event, ready: Callable[[int], None]) -> None:
    """Serves until `stop`, also while Redis or the read database is away; `ready` gets the port once one of them can be
    used."""
    pool = await postgres.connect_pool(
        settings.read_dsn, size=CONNECTIONS, application="query_server", read_only=True, schema="views"
    )
    redis = live.connect(settings.redis_url)
    views = Views(pool)
    results = LiveResults(redis, views)
    announcements = Announcements(settings.read_dsn, views)
    answered = Answered()
    watchers = Watchers(redis, results, views, announcements, answered)
    status = Status(results, views)
    voters = VoterKeys(settings.voter_secret)
    service = QueryService(views, announcements, results, watchers, status, voters, answered)

    server = serving.new_server(share_port=settings.worker, max_connection_age=settings.max_connection_age)
    serving.add_service(server, add_QueryServiceServicer_to_server, service, status_of)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watchers.run(stop))
        loops = (results.run(), announcements.run(), spread_readers(pool), status.measure())
        beside = [tasks.create_task(loop) for loop in loops]
        stores = [
            Store("the read database", partial(_check, pool), postgres.REFUSALS, postgres.UNAVAILABLE),
            Store("Redis", partial(redis_versions.check, redis), redis_versions.REFUSALS, redis_versions.FAILURES),
        ]
        await serving.serve(server, settings.query_listen, [SERVICE], stores, stop, ready)
        for task in beside:
            task.cancel()
    await redis.aclose()
    pool.terminate()


async def _check(pool: "asyncpg.Pool[Any]") -> str:
    """What the read database is."""
    async with pool.acquire(timeout=postgres.POOL_SECONDS) as connection:
        found = [f"{name} {await check_read(connection, name)}" for name in READ]
        return f"Postgres {connection.get_settings().server_version}, schemas {', '.join(found)}"


if __name__ == "__main__":
    lifecycle.run(main)
