"""A database of an earlier version is brought up to date without losing what is in it."""

from __future__ import annotations

import os
import re
import shutil
from datetime import UTC, datetime
from importlib.resources.abc import Traversable
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

import migrations
from clients.databases import migrate
from clients.failures import Failure
from command_server.ballots import ballot_key, marking
from contracts import log_epoch
from contracts.read_database import vote_key
from runtime import replicas, schema
from runtime.stores import UnsupportedStore
from tests.servers import sql


def files_up_to(number: str, folder: Traversable, directory: Path) -> Path:
    """A folder with the migrations of an earlier version."""
    for file in folder.iterdir():
        if file.name <= number:
            shutil.copy(str(file), directory / file.name)
    return directory


async def test_votes_and_rolls_keep_their_voters_under_the_new_key(write_dsn: str, tmp_path: Path) -> None:
    await schema.migrate(write_dsn, files_up_to("0003", migrations.WRITE, tmp_path), "before")
    voters = {poll_no: sorted(os.urandom(16) for _ in range(5)) for poll_no in (1, 2, 300)}
    votes = [(7, poll_no, marking([1])[4:], UUID(bytes=key)) for poll_no, keys in voters.items() for key in keys]
    rolls = [(poll_no, weight, vote) for weight, (_, poll_no, _, vote) in enumerate(votes, 1)]
    connection = await asyncpg.connect(write_dsn, server_settings={"search_path": "before"})
    try:
        await connection.copy_records_to_table("votes", records=votes)
        await connection.copy_records_to_table("roll", records=rolls)
    finally:
        await connection.close()

    assert "0003_one_key_for_poll_and_voter.sql" in await schema.migrate(write_dsn, migrations.WRITE, "before")
    keys = [ballot_key(poll_no, key) for poll_no, keys in voters.items() for key in keys]
    rows = await sql(write_dsn, "SELECT batch_id, ballot_key, choices FROM before.votes ORDER BY ballot_key")
    assert [tuple(row) for row in rows] == [(7, key, b"\0\1") for key in keys]
    rows = await sql(write_dsn, "SELECT weight, ballot_key FROM before.roll ORDER BY ballot_key")
    assert [tuple(row) for row in rows] == list(enumerate(keys, 1))


async def test_the_views_keep_their_votes_under_the_new_key(read_dsn: str, tmp_path: Path) -> None:
    views = migrations.READ["views"]
    await schema.migrate(read_dsn, files_up_to("0006", views, tmp_path), "before")
    voters = sorted(os.urandom(16) for _ in range(5))
    now = datetime.now(UTC)
    votes = [(version, now, poll_no, UUID(bytes=key)) for version, key in enumerate(voters) for poll_no in (1, 300)]
    connection = await asyncpg.connect(read_dsn, server_settings={"search_path": "before"})
    try:
        await connection.copy_records_to_table("votes", records=votes)
    finally:
        await connection.close()

    assert "0006_one_key_for_voter_and_poll.sql" in await schema.migrate(read_dsn, views, "before")
    rows = await sql(read_dsn, "SELECT version, recorded_at, vote_key, poll_no FROM before.votes ORDER BY vote_key")
    assert [tuple(row) for row in rows] == [
        (version, now, vote_key(key, poll_no), poll_no) for version, key in enumerate(voters) for poll_no in (1, 300)
    ]


async def test_a_lock_that_is_never_released_is_said(write_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "_MIGRATION_LOCK_SECONDS", 0.2)
    holder = await asyncpg.connect(write_dsn)
    try:
        await holder.execute("SELECT pg_advisory_lock($1)", schema.MIGRATION_LOCK)
        with pytest.raises(TimeoutError, match="migration lock"):
            await migrations.migrate_write(write_dsn)
    finally:
        await holder.close()


FIRST = "SELECT log_epoch, reason FROM {}log_epochs"


async def test_an_empty_log_gets_an_epoch_and_one_with_events_keeps_none(write_dsn: str, tmp_path: Path) -> None:
    rows = await sql(write_dsn, FIRST.format(""))
    assert [row["log_epoch"].version for row in rows] == [7]
    await schema.migrate(write_dsn, files_up_to("0006", migrations.WRITE, tmp_path), "before")
    await sql(write_dsn, "INSERT INTO before.events (poll_no, version, recorded_at, payload) VALUES (1, 1, now(), '')")
    assert "0006_log_epoch.sql" in await schema.migrate(write_dsn, migrations.WRITE, "before")
    rows = await sql(write_dsn, FIRST.format("before."))
    assert [row["log_epoch"] for row in rows] == [log_epoch.ZERO]


async def test_a_new_epoch_is_greater_than_all_that_anybody_knows(write_dsn: str) -> None:
    begin = "SELECT log_epoch FROM begin_log_epoch('a test', $1)"
    future = "SELECT uuidv7(interval '30 days') AS log_epoch"
    known = [row["log_epoch"] for row in await sql(write_dsn, FIRST.format(""))]
    known += [row["log_epoch"] for row in await sql(write_dsn, begin, log_epoch.ZERO)]
    # Somebody's clock was a month ahead; from then on epochs follow that one.
    known += [row["log_epoch"] for row in await sql(write_dsn, future)]
    known += [row["log_epoch"] for row in await sql(write_dsn, begin, known[-1])]
    known += [row["log_epoch"] for row in await sql(write_dsn, begin, known[0])]
    known += [row["log_epoch"] for row in await sql(write_dsn, "SELECT log_epoch FROM begin_log_epoch('announced')")]
    assert known == sorted(set(known))
    current = await sql(write_dsn, "SELECT log_epoch FROM current_log_epoch")
    assert [row["log_epoch"] for row in current] == known[-1:]
    with pytest.raises(asyncpg.InvalidParameterValueError):
        await sql(write_dsn, begin, UUID(int=(1 << 128) - 1))


async def test_a_postgres_that_is_too_old_is_refused_in_one_line(
    write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "VERSION", 99)
    with pytest.raises(Failure) as failure:
        await migrate("write", write_dsn)
    [line] = str(failure.value).splitlines()
    assert re.fullmatch(
        r"the write database was not migrated: this is Postgres 1\d.*, and Tally needs version 99 or newer", line
    )


async def test_a_migration_that_was_edited_after_it_was_applied_is_refused(write_dsn: str, tmp_path: Path) -> None:
    first, second = tmp_path / "0001_first.sql", tmp_path / "0002_second.sql"
    first.write_text("CREATE TABLE made_here ()")
    assert await schema.migrate(write_dsn, tmp_path, "edited") == [first.name]
    # A database of before there were digests: what it has is taken for what the file is now.
    await sql(write_dsn, "ALTER TABLE edited.schema_migrations DROP COLUMN digest")
    first.write_text("CREATE TABLE made_here (text text)")
    assert await schema.migrate(write_dsn, tmp_path, "edited") == []
    first.write_text("CREATE TABLE made_here (number int)")
    second.write_text("CREATE TABLE made_later ()")
    with pytest.raises(UnsupportedStore, match=r"^0001_first\.sql was edited after it was applied here"):
        await schema.migrate(write_dsn, tmp_path, "edited")
    assert await sql(write_dsn, "SELECT to_regclass('edited.made_later')") == [(None,)]
    first.write_text("CREATE TABLE made_here (text text)")
    assert await schema.migrate(write_dsn, tmp_path, "edited") == [second.name]
