"""Postgres: pools, named SQL blocks, and what its answers mean for those who ask."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from importlib.resources import files as package_files
from types import SimpleNamespace
from typing import TypeVar

import asyncpg
import structlog

from runtime.lifecycle import Backoff
from runtime.replicas import Pooled, PrimaryConnection, connect_primary, connect_reader
from runtime.stores import UnsupportedStore

log = structlog.get_logger()

# A statement that finds its tables, functions or rights missing: the schema is gone, half-made, or not this code's.
WITHOUT_SCHEMA = (
    asyncpg.InvalidSchemaNameError,
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedFunctionError,
    asyncpg.InsufficientPrivilegeError,
    # It was prepared for a table that has other columns now.
    asyncpg.InvalidCachedStatementError,
)

# What a caller sees as "the database does not answer": the server or its schema, not the statement, is at fault.
UNAVAILABLE = (
    *WITHOUT_SCHEMA,
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

# Of these, what stays so until an operator changes something.
REFUSALS = (
    UnsupportedStore,
    Pooled,
    *WITHOUT_SCHEMA,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
)

T = TypeVar("T")

# For `pool.acquire(timeout=…)`: what a connection may take to come, and also to go back. Going back includes to stop a
# statement that nobody waits for any more; without a limit, a silent network would hold its caller.
POOL_SECONDS = 3.0

_BLOCK = re.compile(r"^-- (\w+): .+$", re.MULTILINE)


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
    lasting: bool = False,
    check: Callable[[asyncpg.Connection], Awaitable[None]] | None = None,
) -> asyncpg.Pool:
    """A pool of up to `size` connections that is made even while the server is away; statements take 30 s at most.

    Of several servers in the DSN it uses the primary, or if `read_only` the standbys where there are some. A connection
    whose server turns out not to be the primary is closed when it comes back, and so are all others before they are
    used again: they were made when that server was the primary. A new one that `check` raises for is not
    used. A statement that waits for a lock for `lock_seconds` fails with LockNotAvailableError; 0: it waits. Idle
    connections are closed after some minutes, unless they are `lasting`.
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

    async def keep_unless_misplaced(connection: PrimaryConnection) -> None:
        if connection.misplaced:
            connection.terminate()
            # Of an expired connection nothing is asked here, so each switchover expires those that it left behind.
            await pool.expire_connections()

    pool: asyncpg.Pool = await asyncpg.create_pool(
        dsn,
        min_size=0,
        max_size=size,
        timeout=5,
        command_timeout=30,
        server_settings=settings,
        max_inactive_connection_lifetime=0 if lasting else 300,
        init=check,
        connect=connect_reader if read_only else connect_primary,
        connection_class=asyncpg.Connection if read_only else PrimaryConnection,
        # Nothing here changes a session, so there is nothing to reset when a connection goes back: one round trip less.
        reset=_keep if read_only else keep_unless_misplaced,
    )
    return pool


async def _keep(_: object) -> None:
    pass


async def fill(pool: asyncpg.Pool) -> None:
    """Opens all connections that a pool may have. Raises what UNAVAILABLE lists: where the server has no room for them,
    TooManyConnectionsError, in words."""
    opened = await asyncio.gather(
        *(pool.acquire(timeout=POOL_SECONDS) for _ in range(pool.get_max_size())), return_exceptions=True
    )
    failures = [connection for connection in opened if isinstance(connection, BaseException)]
    for connection in opened:
        if connection not in failures:
            await pool.release(connection, timeout=POOL_SECONDS)
    for failure in failures:
        if isinstance(failure, asyncpg.TooManyConnectionsError):
            raise asyncpg.TooManyConnectionsError(
                f"it has no room for the {len(opened)} connections of this process: raise max_connections, or run fewer"
                f" processes ({failure})"
            )
    if failures:
        raise failures[0]


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
    for setting in ("fsync", "full_page_writes"):
        value = await connection.fetchval("SELECT current_setting($1)", setting)
        if value == "off":
            log.error("the database is not durable: acknowledged changes can be lost", setting=setting, value=value)
