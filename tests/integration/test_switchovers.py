"""A server that answers "I am not the one": its connections are given up, and all goes on once one takes changes.

Real servers that became read-only while they keep every connection: the old primary of a switchover, a Redis that
became a replica.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import grpc
import pytest
import redis.asyncio
import redis.exceptions
from tally.command.v1 import command_service_pb2 as command
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub
from tally.poll.v1.poll_pb2 import POLL_STATE_OPEN, VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec
from tally.query.v1 import query_service_pb2 as query
from tally.query.v1.query_service_pb2_grpc import QueryServiceStub

from command_server import polls, vote_log
from command_server.__main__ import CommandSettings
from command_server.__main__ import serve as serve_commands
from contracts.failures import refusal_of
from migrations import migrate_read, migrate_write
from projector.__main__ import KINDS, ReadDatabaseSettings, RedisSettings, project
from query_server.__main__ import QuerySettings
from query_server.__main__ import serve as serve_queries
from query_server.failures import status_of
from relay.__main__ import RelaySettings, relay
from runtime import postgres
from runtime.embedded import Postgres, Stores
from tests import standby
from tests.processes import eventually
from tests.servers import VOTER_SECRET, Refused, command_server, query_channel, refused, serving, sql
from tests.standby import Server, Standby

if TYPE_CHECKING:
    from tally.command.v1.command_service_pb2_grpc import CommandServiceAsyncStub

_DATABASES = ["tally_write", "tally_read"]
_READ_ONLY = "ALTER SYSTEM SET default_transaction_read_only = on"
_WRITABLE = "ALTER SYSTEM RESET default_transaction_read_only"
_RELOAD = "SELECT pg_reload_conf()"


def _poll(**fields: object) -> PollSpec:
    options = [PollOption(option_id=o, label=o) for o in ("mon", "tue")]
    return PollSpec(title="When?", options=options, method=VOTING_METHOD_SINGLE_CHOICE, **fields)  # type: ignore[arg-type]


async def _open_poll(server: CommandServiceAsyncStub) -> str:
    poll_id = (await server.CreatePoll(command.CreatePollRequest(poll=_poll()))).poll_id
    await server.OpenPoll(command.OpenPollRequest(poll_id=poll_id))
    return str(poll_id)


def _vote(poll_id: str, voter: str) -> command.CastVoteRequest:
    return command.CastVoteRequest(poll_id=poll_id, voter_id=voter, option_ids=["mon"])


@asynccontextmanager
async def _read_only(stores: Stores, database: str, kind: str) -> AsyncIterator[None]:
    """New sessions of a database are read-only while the context lasts, and the old ones are cut; or, by a reload, all
    sessions are, and none is cut."""
    if kind == "reload":
        begin, end = [_READ_ONLY, _RELOAD], [_WRITABLE, _RELOAD]
    else:
        cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
        begin = [f"ALTER DATABASE {database} SET default_transaction_read_only = on", cut]
        end = [f"ALTER DATABASE {database} RESET default_transaction_read_only"]
    try:
        for statement in begin:
            await sql(stores.admin_dsn, statement)
        yield
    finally:
        for statement in end:
            await sql(stores.admin_dsn, statement)


@pytest.mark.parametrize("kind", ["new sessions", "reload"])
async def test_votes_and_commands_go_on_once_a_read_only_database_takes_changes_again(
    stores: Stores, write_dsn: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = write_dsn.partition("?")[0].rpartition("/")[2]
    async with command_server(write_dsn) as server:
        poll_id = await _open_poll(server)
        await asyncio.gather(*(server.CastVote(_vote(poll_id, f"before-{n}")) for n in range(20)))
        async with _read_only(stores, database, kind):
            monkeypatch.setattr(vote_log, "PATIENCE_SECONDS", 0.3)
            monkeypatch.setattr(polls, "PATIENCE_SECONDS", 0.3)
            calls: list[Any] = [server.CastVote(_vote(poll_id, f"voter-{n}")) for n in range(10)]
            calls.append(server.ClosePoll(command.ClosePollRequest(poll_id=poll_id)))
            refusals = await asyncio.gather(*(refused(call) for call in calls))
            assert {refusal.reason for refusal in refusals} == {"STORE_UNAVAILABLE"}
            monkeypatch.undo()

        async def taken() -> None:
            try:
                await asyncio.gather(*(server.CastVote(_vote(poll_id, f"voter-{n}")) for n in range(10)))
            except grpc.aio.AioRpcError as error:
                raise AssertionError(Refused(error).reason) from error

        await eventually(taken)
        await server.ClosePoll(command.ClosePollRequest(poll_id=poll_id))


@pytest.mark.parametrize(
    ("code", "kept"),
    [
        *[(code, False) for code in ("25006", "57P01", "57P02", "57P03", "57P04", "55000", "08006")],
        *[(code, True) for code in ("55P03", "57014", "40P01", "53400")],
    ],
)
async def test_what_says_that_the_server_is_not_the_one_takes_the_connection_out_of_the_pool(
    write_dsn: str, code: str, kept: bool
) -> None:
    pool = await postgres.connect_pool(write_dsn, size=1, application="test")
    try:
        before = await pool.fetchval("SELECT pg_backend_pid()")
        with pytest.raises(asyncpg.PostgresError) as failure:
            async with pool.acquire(timeout=5) as connection, connection.transaction():
                await connection.execute(f"DO $$ BEGIN RAISE 'as if' USING ERRCODE = '{code}'; END $$")
        assert failure.value.sqlstate == code
        assert refusal_of(failure.value).status().code == (
            grpc.StatusCode.INTERNAL.value[0] if code == "40P01" else grpc.StatusCode.UNAVAILABLE.value[0]
        )
        assert (await pool.fetchval("SELECT pg_backend_pid()") == before) is kept
    finally:
        pool.terminate()


async def test_one_connection_that_finds_another_primary_takes_all_out_of_the_pool(
    stores: Stores, write_dsn: str
) -> None:
    database = write_dsn.partition("?")[0].rpartition("/")[2]
    pool = await postgres.connect_pool(write_dsn, size=5, application="test", lasting=True)

    async def pids() -> set[int]:
        async with AsyncExitStack() as stack:
            connections = [await stack.enter_async_context(pool.acquire(timeout=5)) for _ in range(5)]
            return {connection.get_server_pid() for connection in connections}

    async def is_refused() -> bool:
        try:
            await pool.execute("CREATE TABLE IF NOT EXISTS unwanted ()")
        except (asyncpg.ReadOnlySQLTransactionError, asyncpg.TargetServerAttributeNotMatched):
            return True
        return False

    async def is_new() -> None:
        try:
            assert not await pids() & before
        except asyncpg.TargetServerAttributeNotMatched as error:
            raise AssertionError(str(error)) from error

    try:
        before = await pids()
        assert await pids() == before
        async with _read_only(stores, database, "reload"):
            await eventually(is_refused)
        await eventually(is_new)
    finally:
        pool.terminate()


async def test_a_server_that_only_reads_is_not_connected_to(stores: Stores, write_dsn: str) -> None:
    database = write_dsn.partition("?")[0].rpartition("/")[2]
    async with _read_only(stores, database, "new sessions"):
        pool = await postgres.connect_pool(write_dsn, size=1, application="test")
        with pytest.raises(asyncpg.TargetServerAttributeNotMatched, match="no server takes changes"):
            await pool.fetchval("SELECT 1")
        pool.terminate()


@asynccontextmanager
async def _pair() -> AsyncIterator[tuple[Server, Server]]:
    """Both databases on a primary, and a standby that follows it."""
    with tempfile.TemporaryDirectory(prefix="tally-switchover-") as folder:
        first, second = Path(folder, "first"), Path(folder, "second")
        cluster = Postgres(first, _DATABASES, set(), shared_buffers="32MB")
        async with standby.serving(cluster, first) as primary:
            await cluster.provision()
            await migrate_write(cluster.dsn("tally_write"))
            await migrate_read(cluster.dsn("tally_read"))
            async with standby.serving(Standby(second, cluster), second) as following:
                yield primary, following


async def test_a_switchover_that_cuts_no_connection_takes_all_services_to_the_new_primary(
    nats_url: str, redis_url: str
) -> None:
    async with _pair() as (old, new):
        write, read = (standby.any_of(old.cluster.dsn(name), new.cluster.dsn(name)) for name in _DATABASES)
        commands = CommandSettings(command_listen="127.0.0.1:0", write_dsn=write, voter_secret=VOTER_SECRET)
        queries = QuerySettings(
            query_listen="127.0.0.1:0", read_dsn=read, redis_url=redis_url, voter_secret=VOTER_SECRET
        )
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(relay(RelaySettings(write_dsn=write, nats_url=nats_url), stop))
            for name in ("views", "documents"):
                projector = ReadDatabaseSettings(read_dsn=read, nats_url=nats_url)
                tasks.create_task(project(KINDS[name], projector, stop))
            async with (
                serving(lambda stop, ready: serve_commands(commands, stop, ready)) as writing,
                serving(lambda stop, ready: serve_queries(queries, stop, ready)) as reading,
            ):
                server, reader = CommandServiceStub(writing), QueryServiceStub(reading)
                poll_id = await _open_poll(server)
                token = (await server.CastVote(_vote(poll_id, "ada"))).consistency_token
                await reader.GetPoll(query.GetPollRequest(poll_id=poll_id, at_least_as_fresh=token), timeout=20)
                # Everything that was committed has reached the standby, as a planned switchover makes sure.
                await old.run(_READ_ONLY)
                await old.run(_RELOAD)
                await old.run("CHECKPOINT")
                head = (await sql(old.cluster.admin_dsn, "SELECT pg_current_wal_lsn()::text"))[0][0]
                await eventually(lambda: _replayed(new, head))
                await new.run("SELECT pg_promote()")

                async def votes() -> None:
                    try:
                        await server.CastVote(_vote(poll_id, "grace"), timeout=5)
                    except grpc.aio.AioRpcError as error:
                        raise AssertionError(Refused(error).reason) from error

                await eventually(votes, 30)
                opens_at = datetime.now(UTC) + timedelta(seconds=1)
                due = await server.CreatePoll(command.CreatePollRequest(poll=_poll(opens_at=opens_at)))

                async def opened() -> None:
                    request = query.GetPollRequest(poll_id=due.poll_id, at_least_as_fresh=due.consistency_token)
                    try:
                        assert (await reader.GetPoll(request, timeout=5)).poll.state == POLL_STATE_OPEN
                    except grpc.aio.AioRpcError as error:
                        raise AssertionError(Refused(error).reason) from error

                # The scheduler leads there, the relay publishes, the projectors store.
                await eventually(opened, 30)
                writers = ("relay", "caretaker", "projector views", "projector documents", "query_server announcements")

                async def moved() -> None:
                    assert {name: await old.sessions(name) for name in writers} == dict.fromkeys(writers, 0)
                    assert all([await new.sessions(name) for name in writers])

                await eventually(moved)
            stop.set()


async def _replayed(server: Server, head: str) -> None:
    [row] = await sql(server.cluster.admin_dsn, f"SELECT pg_last_wal_replay_lsn() >= '{head}'::pg_lsn")
    assert row[0]


async def test_a_redis_that_became_a_replica_stops_nothing_and_is_filled_once_it_is_a_master(
    write_dsn: str, read_dsn: str, nats_url: str, redis_url: str
) -> None:
    stop = asyncio.Event()
    async with (
        redis.asyncio.Redis.from_url(redis_url) as admin,
        command_server(write_dsn) as server,
        query_channel(read_dsn, redis_url) as channel,
        asyncio.TaskGroup() as tasks,
    ):
        reader = QueryServiceStub(channel)
        tasks.create_task(relay(RelaySettings(write_dsn=write_dsn, nats_url=nats_url), stop))
        live = RedisSettings(redis_url=redis_url, nats_url=nats_url)
        tasks.create_task(project(KINDS["live"], live, stop))
        views = ReadDatabaseSettings(read_dsn=read_dsn, nats_url=nats_url)
        tasks.create_task(project(KINDS["views"], views, stop))
        poll_id = await _open_poll(server)
        await server.CastVote(_vote(poll_id, "ada"))

        async def source(votes: int, wanted: int) -> None:
            try:
                results = (await reader.GetResults(query.GetResultsRequest(poll_id=poll_id), timeout=5)).results
            except grpc.aio.AioRpcError as error:
                raise AssertionError(Refused(error).reason) from error
            assert (results.total_votes, results.source) == (votes, wanted)

        await eventually(lambda: source(1, query.RESULTS_SOURCE_LIVE_CACHE))
        # Without its master it refuses writes; told not to show what is old, it refuses reads with MASTERDOWN, too.
        try:
            await admin.config_set("replica-serve-stale-data", "no")
            await admin.execute_command("REPLICAOF", "127.0.0.1", "1")  # type: ignore[no-untyped-call]
            await server.CastVote(_vote(poll_id, "grace"))
            await eventually(lambda: source(2, query.RESULTS_SOURCE_READ_DATABASE))
        finally:
            await admin.execute_command("REPLICAOF", "NO", "ONE")  # type: ignore[no-untyped-call]
            await admin.config_set("replica-serve-stale-data", "yes")
        await eventually(lambda: source(2, query.RESULTS_SOURCE_LIVE_CACHE))
        stop.set()


@pytest.mark.parametrize(
    "answer",
    [
        redis.exceptions.ReadOnlyError("You can't write against a read only replica."),
        redis.exceptions.MasterDownError("Link with MASTER is down and replica-serve-stale-data is set to 'no'."),
        redis.exceptions.BusyLoadingError("Redis is loading the dataset in memory"),
        redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
        redis.exceptions.ResponseError("MISCONF Redis is configured to save RDB snapshots"),
    ],
)
def test_what_redis_says_of_itself_is_no_defect(answer: Exception) -> None:
    assert status_of(answer).code == grpc.StatusCode.UNAVAILABLE.value[0]
