"""Defaults that an operator sets for sessions of a database, or of a role, change nothing for Tally's statements."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from tally.command.v1 import command_service_pb2 as command
from tally.poll.v1.poll_pb2 import VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec

from command_server.vote_log import _failures
from relay import outbox
from runtime.postgres import connect_pool
from runtime.replicas import connect_primary
from runtime.schema import MIGRATION_LOCK, migrate
from tests.processes import eventually
from tests.servers import command_server, sql


async def _set_defaults(dsn: str, settings: Sequence[str]) -> None:
    """New sessions of the database begin with these settings."""
    database = urlsplit(dsn).path[1:]
    connection = await asyncpg.connect(dsn)
    for setting in settings:
        await connection.execute(f"ALTER DATABASE {database} SET {setting}")
    await connection.close()


@pytest.mark.parametrize("found", ["off", "local", "remote_write"])
async def test_a_commit_waits_for_the_disk(write_dsn: str, found: str) -> None:
    expected = "on" if found == "off" else found
    await _set_defaults(write_dsn, [f"synchronous_commit = {found}"])
    connection = await connect_primary(write_dsn, timeout=5)
    assert await connection.fetchval("SHOW synchronous_commit") == expected
    await connection.close()
    pool = await connect_pool(write_dsn, size=1, application="test")
    for _ in range(2):  # also when the connection is used again
        assert await pool.fetchval("SHOW synchronous_commit") == expected
    await pool.close()
    async with outbox.connect(write_dsn, 0, 1) as events:
        # Its own choice: a deletion that is undone costs a repetition.
        assert await events._connection.fetchval("SHOW synchronous_commit") == "off"


@pytest.mark.parametrize(
    "settings",
    [
        ["default_transaction_isolation = 'repeatable read'"],
        ["default_transaction_isolation = 'serializable'", "default_transaction_deferrable = on"],
        ["search_path = elsewhere", "datestyle = 'SQL, DMY'", "timezone = 'Pacific/Apia'", "client_encoding = latin1"],
    ],
    ids=["repeatable read", "serializable", "names and forms"],
)
async def test_votes_that_meet_are_recorded_at_once(write_dsn: str, settings: list[str]) -> None:
    options = [PollOption(option_id=name, label=name) for name in ("ä", "b")]
    await _set_defaults(write_dsn, settings)
    async with command_server(write_dsn) as one, command_server(write_dsn) as other:
        spec = PollSpec(title="Ü", options=options, method=VOTING_METHOD_SINGLE_CHOICE, allow_vote_change=True)
        poll_id = (await one.CreatePoll(command.CreatePollRequest(poll=spec))).poll_id
        await one.OpenPoll(command.OpenPollRequest(poll_id=poll_id))
        failed = _failures._value.get()
        for round_ in range(3):
            votes = [
                command.CastVoteRequest(poll_id=poll_id, voter_id=f"v{n}", option_ids=["äb"[(n + round_) % 2]])
                for n in range(100)
            ]
            await asyncio.gather(*((one, other)[n % 2].CastVote(vote) for n, vote in enumerate(votes)))
        assert _failures._value.get() == failed
        assert await sql(f"{write_dsn}&search_path=public", "SELECT count(*) FROM votes") == [(100,)]
        async with outbox.connect(write_dsn, 0, 1) as events:
            assert len(await events.next([])) >= 5


async def test_a_migration_may_take_longer_than_other_statements(write_dsn: str, tmp_path: Path) -> None:
    (tmp_path / "0001_slow.sql").write_text("SELECT pg_sleep(0.2); CREATE TABLE slow ();")
    await _set_defaults(
        write_dsn, ["statement_timeout = '100ms'", "lock_timeout = '50ms'", "transaction_timeout = '100ms'"]
    )
    async with _locked(write_dsn):
        migrating = asyncio.create_task(migrate(write_dsn, tmp_path, "slow"))
        await eventually(partial(_waits, write_dsn))
        # For longer than either limit.
        await asyncio.sleep(0.3)
    assert await migrating == ["0001_slow.sql"]


@asynccontextmanager
async def _locked(dsn: str) -> AsyncIterator[None]:
    """Another process migrates."""
    connection = await asyncpg.connect(dsn)
    await connection.execute("SET statement_timeout = 0; SET lock_timeout = 0; SET transaction_timeout = 0")
    await connection.execute("SELECT pg_advisory_lock($1)", MIGRATION_LOCK)
    yield
    await connection.close()


async def _waits(dsn: str) -> None:
    assert await sql(dsn, "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
