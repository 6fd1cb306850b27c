"""`python -m command_server`: the write side as a process."""

import asyncio
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import asyncpg
import structlog
from pydantic import Field
from tally.command.v1 import command_service_pb2
from tally.command.v1.command_service_pb2_grpc import add_CommandServiceServicer_to_server

from command_server.ballot_box import COMMITTERS, WARY_COMMITTERS, BallotBox
from command_server.caretaker import Caretaker
from command_server.poll_log import PollLog
from command_server.polls import Polls
from command_server.roll import Roll
from command_server.service import CommandService
from command_server.turns import Turns
from command_server.vote_log import VoteLog
from command_server.voter_secret import OtherSecret, SecretGuard
from contracts.failures import status_of
from contracts.voters import VoterKeys
from migrations import check_write
from runtime import lifecycle, postgres, serving, telemetry, workers
from runtime.settings import Listen, PostgresUrl, ServerSettings
from runtime.stores import Store

log = structlog.get_logger()

# How long a stop waits for votes that were accepted, after the calls have ended.
_DRAIN_SECONDS = 3.0
# How long a statement waits for another transaction's lock. Transactions that commit votes of one poll after each other
# are far faster; what is locked for longer is tried again where it holds up nothing else.
_LOCK_SECONDS = 0.25

# For votes, and for commands. The caretaker, if this process is the one, has one of its own.
CONNECTIONS = COMMITTERS + WARY_COMMITTERS + 5

SERVICE = command_service_pb2.DESCRIPTOR.services_by_name["CommandService"].full_name


class CommandSettings(ServerSettings):
    """What the command server reads from the environment."""

    command_listen: Listen = Field("127.0.0.1:50051", description="host:port of the CommandService.")
    write_dsn: PostgresUrl = Field(description="Postgres URL of the write database.")
    voter_secret: str = Field(
        min_length=32, max_length=64, description="Key of the voter hash: the same in all command and query servers."
    )


async def main(stop: asyncio.Event) -> None:
    settings = workers.settings_from(sys.argv[1:], "command_server", CommandSettings)
    try:
        await run(settings, stop)
    except* OtherSecret as refused:
        sys.exit(str(refused.exceptions[0]))


async def run(settings: CommandSettings, stop: asyncio.Event) -> None:
    """Serves by itself, or by workers. Raises OtherSecret, also in a group."""
    await SecretGuard(VoterKeys(settings.voter_secret)).check_at_start(settings.write_dsn)
    if settings.workers > 1:
        telemetry.start("command_server workers", settings, metrics=False)
        await workers.run("command_server", settings, "command_listen", stop)
        return
    telemetry.start("command_server", settings)
    await serve(settings, stop, lambda port: lifecycle.announce("serving", settings, port=port))


async def serve(settings: CommandSettings, stop: asyncio.Event, ready: Callable[[int], None]) -> None:
    """Serves until `stop`, then records what was accepted. `ready` gets the port."""
    voters = VoterKeys(settings.voter_secret)
    guard = SecretGuard(voters)

    async def check(connection: asyncpg.Connection) -> None:
        await check_write(connection)
        await guard.check(connection)

    pool = await postgres.connect_pool(
        settings.write_dsn,
        size=CONNECTIONS,
        application="command_server",
        lock_seconds=_LOCK_SECONDS,
        # What another process may take meanwhile would be missing when votes come.
        lasting=True,
        check=check,
    )
    polls, turns = Polls(pool), Turns(pool)
    box = BallotBox(VoteLog(pool, polls))
    service = CommandService(PollLog(turns, polls), Roll(turns), polls, box, voters)

    server = serving.new_server(share_port=settings.worker)
    serving.add_service(server, add_CommandServiceServicer_to_server, service, status_of)
    usable = asyncio.Event()

    def begin(port: int) -> None:
        usable.set()
        ready(port)

    async def take_care() -> None:
        # Not of polls in a schema of another version.
        await usable.wait()
        await Caretaker(settings.write_dsn, pool, polls).run()

    async with asyncio.TaskGroup() as tasks:
        committing = tasks.create_task(box.run())
        caring = tasks.create_task(take_care())
        guarding = tasks.create_task(guard.run())
        stores = [Store("the write database", partial(_check, pool), postgres.REFUSALS, postgres.UNAVAILABLE)]
        await serving.serve(server, settings.command_listen, [SERVICE], stores, stop, begin)
        caring.cancel()
        guarding.cancel()
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                await box.drain()
        except TimeoutError:
            # Nobody was told that these votes count. Their callers send them again.
            log.warning("stopped before all votes were recorded")
        committing.cancel()
    pool.terminate()


async def _check(pool: "asyncpg.Pool[Any]") -> str:
    """What the write database is, once this process has all its connections."""
    async with pool.acquire(timeout=postgres.POOL_SECONDS) as connection:
        found = f"Postgres {connection.get_settings().server_version}, schema {await check_write(connection)}"
    await postgres.fill(pool)
    return found


if __name__ == "__main__":
    lifecycle.run(main)
