"""A database of an earlier version is brought up to date without losing what is in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from uuid import UUID

import asyncpg

import migrations
from command_server.ballots import ballot_key, marking
from runtime import postgres
from tests.servers import sql


async def test_votes_and_rolls_keep_their_voters_under_the_new_key(write_dsn: str, tmp_path: Path) -> None:
    for name in ("0001_polls_and_votes.sql", "0002_every_kind_of_poll.sql"):
        shutil.copy(str(migrations.WRITE / name), tmp_path / name)
    await postgres.migrate(write_dsn, tmp_path, "before")
    voters = {poll_no: sorted(os.urandom(16) for _ in range(5)) for poll_no in (1, 2, 300)}
    votes = [(7, poll_no, marking([1])[4:], UUID(bytes=key)) for poll_no, keys in voters.items() for key in keys]
    rolls = [(poll_no, weight, vote) for weight, (_, poll_no, _, vote) in enumerate(votes, 1)]
    connection = await asyncpg.connect(write_dsn, server_settings={"search_path": "before"})
    try:
        await connection.copy_records_to_table("votes", records=votes)
        await connection.copy_records_to_table("roll", records=rolls)
    finally:
        await connection.close()

    assert "0003_one_key_for_poll_and_voter.sql" in await postgres.migrate(write_dsn, migrations.WRITE, "before")
    keys = [ballot_key(poll_no, key) for poll_no, keys in voters.items() for key in keys]
    rows = await sql(write_dsn, "SELECT batch_id, ballot_key, choices FROM before.votes ORDER BY ballot_key")
    assert [tuple(row) for row in rows] == [(7, key, b"\0\1") for key in keys]
    rows = await sql(write_dsn, "SELECT weight, ballot_key FROM before.roll ORDER BY ballot_key")
    assert [tuple(row) for row in rows] == list(enumerate(keys, 1))
