"""Postgres: pools, named SQL blocks, migrations."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from hashlib import sha256
from importlib.resources import files as package_files
from importlib.resources.abc import Traversable
from types import SimpleNamespace
from typing import TypeVar

import asyncpg
import structlog

from runtime.lifecycle import Backoff
from runtime.replicas import PrimaryConnection, connect_primary, connect_reader

log = structlog.get_logger()

# What a caller sees as "the database does not answer": the connection, not the statement, is at fault.
UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    asyncpg.OperatorInterventionError,
    asyncpg.ReadOnlySQLTransactionError,
    # The process was paused, or starved, for longer than the server keeps a transaction open.
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.TransactionTimeoutError,
    # Its disk fails.
    asyncpg.PostgresSystemError,
)

T = TypeVar("T")

# For `pool.acquire(timeout=…)`: what a connection may take to come, and also to go back. Going back includes to stop a
# statement that nobody waits for any more; without a limit, a silent network would hold its caller.
POOL_SECONDS = 3.0

_BLOCK = re.compile(r"^-- (\w+): .+$", re.MULTILINE)
# Whoever changes a schema holds this advisory lock.
MIGRATION_LOCK = 0x74616C6C79
_MIGRATION_LOCK_SECONDS = 60.0
# The server ends the session of a migration whose client is gone after a minute, and with it the lock.
_KEEPALIVE = {"tcp_keepalives_idle": "30", "tcp_keepalives_interval": "10", "tcp_keepalives_count": "3"}


def queries(package: str, name: str = "queries.sql") -> SimpleNamespace:
    """The SQL blocks of a file beside the code that runs them. A block begins with `-- name: what it is for`."""
    parts = _BLOCK.split((package_files(package) / name).read_text())
    return SimpleNamespace(**{block: sql.strip() for block, sql in zip(parts[1::2], parts[2::2], strict=True)})


async def connect_pool(
    dsn: str,
    *,
    size: int,
    application: str,
    read_only: bool = False,
    schema: str = "public",
    lock_seconds: float = 0,
    check: Callable[[asyncpg.Connection], Awaitable[None]] | None = None,
) -> asyncpg.Pool:
    """A pool of up to `size` connections that is made even while the server is away; statements take 30 s at most.

    Of several servers in the DSN it uses the primary, or if `read_only` the standbys where there are some. A connection
    whose server turns out not to be the primary is closed when it comes back. A new one that `check` raises for is not
    used. A statement that waits for a lock for `lock_seconds` fails with LockNotAvailableError; 0: it waits.
    """
    settings = {
        "application_name": application,
        "search_path": schema,
        "statement_timeout": "30s",
        # A transaction whose client vanished must not keep its locks.
        "idle_in_transaction_session_timeout": "10s",
        "lock_timeout": f"{round(lock_seconds * 1000)}ms",
    }
    if read_only:
        settings["default_transaction_read_only"] = "on"
    return await asyncpg.create_pool(
        dsn,
        min_size=0,
        max_size=size,
        timeout=5,
        command_timeout=30,
        server_settings=settings,
        init=check,
        connect=connect_reader if read_only else connect_primary,
        connection_class=asyncpg.Connection if read_only else PrimaryConnection,
        # Nothing here changes a session, so there is nothing to reset when a connection goes back: one round trip less.
        reset=_keep if read_only else _keep_unless_misplaced,
    )


async def _keep(_: object) -> None:
    pass


async def _keep_unless_misplaced(connection: PrimaryConnection) -> None:
    if connection.misplaced:
        connection.terminate()


async def patiently(attempt: Callable[[], Awaitable[T]], seconds: float) -> T:
    """What `attempt` returns, tried again for so many seconds while the database does not answer."""
    backoff = Backoff()
    async with asyncio.timeout(seconds):
        while True:
            try:
                return await attempt()
            except UNAVAILABLE as error:
                log.warning("the database does not answer", error=repr(error), failures=backoff.failures + 1)
                await backoff.wait()


async def check_durability(connection: asyncpg.Connection) -> None:
    """Warns loudly where the server would acknowledge a commit that a power cut can undo."""
    for setting in ("fsync", "synchronous_commit", "full_page_writes"):
        value = await connection.fetchval("SELECT current_setting($1)", setting)
        if value == "off":
            log.error("the database is not durable: acknowledged changes can be lost", setting=setting, value=value)


class Edited(asyncpg.InterfaceError):  # type: ignore[misc]
    """A migration is not what it was when it was applied: two databases of one version would differ."""


class TooOld(asyncpg.InterfaceError):  # type: ignore[misc]
    """A server lacks what these schemas need; the message says which version has it."""


async def migrate(dsn: str, folder: Traversable, schema: str = "public", *, version: int = 0) -> list[str]:
    """Applies the numbered SQL files that this schema does not have yet, each in a transaction; returns their names.

    The schema is made where it is missing. Safe to run from several processes at once, and again after a crash.
    Raises TimeoutError where somebody else holds the lock for more than a minute; a migration may take any time. Raises
    TooOld, and changes nothing, where the server's major version is below `version`; Edited where a file is not the one
    that was applied.
    """
    connection = await connect_primary(dsn, timeout=10, server_settings=_KEEPALIVE | {"search_path": schema})
    try:
        if connection.get_server_version().major < version:
            running = connection.get_settings().server_version
            raise TooOld(f"this is Postgres {running}, and Tally needs version {version} or newer here")
        try:
            await connection.execute("SELECT pg_advisory_lock($1)", MIGRATION_LOCK, timeout=_MIGRATION_LOCK_SECONDS)
        except TimeoutError:
            raise TimeoutError(
                f"another session has held the migration lock for {_MIGRATION_LOCK_SECONDS:g} s (pg_locks says which)"
            ) from None
        if not await connection.fetchval("SELECT to_regnamespace($1)", schema):
            await connection.execute(f"CREATE SCHEMA {schema}")
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations"
            " (name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        # Where this column is new, what was applied before is taken for what the files are now.
        await connection.execute("ALTER TABLE schema_migrations ADD COLUMN IF NOT EXISTS digest text")
        applied = dict(await connection.fetch("SELECT name, digest FROM schema_migrations"))
        files = sorted((file for file in folder.iterdir() if file.name.endswith(".sql")), key=lambda file: file.name)
        for file in files:
            if applied.get(file.name) not in (None, _digest(file)):
                raise Edited(f"{file.name} was edited after it was applied here: put it back, and make a new file")
        pending = [file for file in files if file.name not in applied]
        for file in files:
            async with connection.transaction():
                if file in pending:
                    await connection.execute(file.read_text())
                    await connection.execute("INSERT INTO schema_migrations (name) VALUES ($1)", file.name)
                if applied.get(file.name) is None:
                    await connection.execute(
                        "UPDATE schema_migrations SET digest = $2 WHERE name = $1", file.name, _digest(file)
                    )
        return [file.name for file in pending]
    finally:
        await asyncio.wait_for(connection.close(), 5)


def _digest(file: Traversable) -> str:
    return sha256(file.read_bytes()).hexdigest()
