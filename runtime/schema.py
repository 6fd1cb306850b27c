"""The schema of a database: numbered SQL files, applied in their order, and what code finds out before it uses one.

A database keeps the names and digests of the files that it has in `schema_migrations`. Code that has files which a
schema lacks cannot use it. Code that lacks files which a schema has can, where each of these says so in a line that
begins with `-- compatible: `: then servers of both versions may run at once while an upgrade is rolled out.
"""

import asyncio
import re
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

import asyncpg

from runtime.replicas import connect_primary
from runtime.stores import UnsupportedStore

# The advisory lock of a session that changes a schema.
MIGRATION_LOCK = 0x74616C6C79
_MIGRATION_LOCK_SECONDS = 60.0
# The server ends the session of a migration whose client is gone after a minute, and with it the lock.
_SESSION = {
    "lock_timeout": "0",
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
}

_COMPATIBLE = re.compile(r"^-- compatible: ", re.MULTILINE)


class _Applied(NamedTuple):
    """A file that a schema has. Columns that a schema of an earlier version does not have are None."""

    digest: str | None
    compatible: bool | None


async def migrate(dsn: str, folder: Traversable, schema: str = "public") -> list[str]:
    """Applies the numbered SQL files that this schema does not have yet; returns their names.

    A schema that has none of them gets all in one transaction, and is never found half-made. In any other each file is
    a transaction. Safe to run from several processes at once, and again after a crash. Raises TimeoutError where
    somebody else holds the lock for more than a minute; a migration may take any time. Raises UnsupportedStore, and
    changes nothing, where a file is not the one that was applied.
    """
    connection = await connect_primary(dsn, timeout=10, server_settings=_SESSION | {"search_path": schema})
    try:
        try:
            await connection.execute("SELECT pg_advisory_lock($1)", MIGRATION_LOCK, timeout=_MIGRATION_LOCK_SECONDS)
        except TimeoutError:
            raise TimeoutError(
                f"another session has held the migration lock for {_MIGRATION_LOCK_SECONDS:g} s (pg_locks says which)"
            ) from None
        files = _files(folder)
        async with connection.transaction():
            applied = await _prepare(connection, schema)
            _require_unedited(files, applied, "put the file back, and make a new one")
            for file in files:
                if file.name in applied and applied[file.name].digest is None:
                    # What was applied before there were digests is taken for what the file is now.
                    await _record(connection, file)
            pending = [file for file in files if file.name not in applied]
            if not applied:
                for file in pending:
                    await _apply(connection, file)
        if applied:
            for file in pending:
                async with connection.transaction():
                    await _apply(connection, file)
        return [file.name for file in pending]
    finally:
        await asyncio.wait_for(connection.close(), 5)


async def check(connection: asyncpg.Connection, folder: Traversable, schema: str = "public") -> str:
    """The newest file that a schema has. Raises UnsupportedStore where code with these files cannot use it."""
    try:
        applied = await _applied(connection, schema)
    except (asyncpg.InvalidSchemaNameError, asyncpg.UndefinedTableError):
        applied = {}
    except asyncpg.InsufficientPrivilegeError:
        raise UnsupportedStore(
            f"its role may not read {schema}.schema_migrations: grant it, or change the role"
        ) from None
    files = _files(folder)
    names = {file.name for file in files}
    newest = max(applied, default="")
    if not newest:
        raise UnsupportedStore(f"there is no schema {schema}: run `tally migrate`")
    _require_unedited(files, applied, "this code is not the one that this database was migrated with")
    if lacking := max(names - applied.keys(), default=""):
        raise UnsupportedStore(
            f"the schema {schema} is at {newest}, and this code needs {lacking}: run `tally migrate`"
        )
    if unknown := min(
        (name for name, file in applied.items() if name not in names and not file.compatible), default=""
    ):
        raise UnsupportedStore(
            f"the schema {schema} is at {newest}, and this code, which is at {files[-1].name}, cannot use a schema with"
            f" {unknown}: run a later version of Tally"
        )
    return newest


async def _prepare(connection: asyncpg.Connection, schema: str) -> dict[str, _Applied]:
    """Makes what is needed to record files; returns those that are recorded."""
    if not await connection.fetchval("SELECT to_regnamespace($1)", schema):
        await connection.execute(f"CREATE SCHEMA {schema}")
    await connection.execute(
        "CREATE TABLE IF NOT EXISTS schema_migrations"
        " (name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
    )
    await connection.execute(
        "ALTER TABLE schema_migrations"
        " ADD COLUMN IF NOT EXISTS digest text, ADD COLUMN IF NOT EXISTS compatible boolean"
    )
    return await _applied(connection, schema)


async def _applied(connection: asyncpg.Connection, schema: str) -> dict[str, _Applied]:
    # By way of JSON, because schemas of earlier versions lack columns.
    rows: Sequence[Any] = await connection.fetch(
        "SELECT name, to_jsonb(file) ->> 'digest', (to_jsonb(file) ->> 'compatible')::boolean"
        f" FROM {schema}.schema_migrations AS file"
    )
    return {name: _Applied(digest, compatible) for name, digest, compatible in rows}


async def _apply(connection: asyncpg.Connection, file: Traversable) -> None:
    await connection.execute(file.read_text())
    await connection.execute("INSERT INTO schema_migrations (name) VALUES ($1)", file.name)
    await _record(connection, file)


async def _record(connection: asyncpg.Connection, file: Traversable) -> None:
    compatible = bool(_COMPATIBLE.search(file.read_text()))
    await connection.execute(
        "UPDATE schema_migrations SET digest = $2, compatible = $3 WHERE name = $1",
        file.name,
        _digest(file),
        compatible,
    )


def _require_unedited(files: Sequence[Traversable], applied: dict[str, _Applied], advice: str) -> None:
    for file in files:
        if file.name in applied and applied[file.name].digest not in (None, _digest(file)):
            raise UnsupportedStore(f"{file.name} was edited after it was applied here: {advice}")


def _files(folder: Traversable) -> list[Traversable]:
    return sorted((file for file in folder.iterdir() if file.name.endswith(".sql")), key=lambda file: file.name)


def _digest(file: Traversable) -> str:
    return sha256(file.read_bytes()).hexdigest()
