"""A database on several servers: its DSN names them all, `postgresql://user@a:5432,b:5433/name`, in any order.

Which of them is the primary can change at any time, so each connection finds out anew. The servers are asked one after
the other, in a random order that spreads readers over standbys, and each has a second to answer: one that is silent
must not keep a connection from being made to another.

The primary is the server that takes changes. A server that is in recovery is not, and neither is one whose sessions
are read-only by default, as the old primary is during a switchover. A session keeps what it was opened with, so a
connection that has learned that its server is not the primary is never used again: see PrimaryConnection.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from runtime.addresses import InvalidAddress
from runtime.stores import UnsupportedStore

# The first Postgres that has what both databases need: votes that take the place of others are told by RETURNING old,
# the key of a vote is read by virtual columns, and uuidv7() names a history of the log.
VERSION = 18
# How long a server may take to accept a connection, where there are others; seconds.
_SERVER_SECONDS = 1.0
# How often readers are spread again; seconds.
_SPREAD_SECONDS = 30.0

# What every statement here relies on. A role or a database may have another default, which must not reach it.
_SESSION = {
    # Statements wait for a row's lock and then see what its holder committed; a snapshot of before would fail instead.
    "default_transaction_isolation": "read committed",
    "search_path": "public",
    # Each connection limits its statements by command_timeout, or here. A lower limit, meant for other programs, would
    # end for ever what needs longer: to fill a read model, a migration; or cut what waits for the next vote.
    "statement_timeout": "0",
    "transaction_timeout": "0",
    "idle_session_timeout": "0",
}

_POOLED = (
    "a connection pooler such as PgBouncer answers, and drops the settings of sessions: locks, notifications and time"
    " limits would be lost; connect to Postgres itself, not through transaction or session pooling"
)

# Which process runs the statements; and a commit waits for the disk where it would not. What else it waits for, such as
# standbys, stays as the operator set it.
_BEGIN_SESSION = """
SELECT pg_backend_pid(), CASE WHEN $1 AND current_setting('synchronous_commit') = 'off'
    THEN set_config('synchronous_commit', 'on', false) END
"""

_NO_PRIMARY = "no server takes changes: each is a standby, or read-only by default"

# Answers that mean "this server is not the one", whatever the statement was.
_NOT_THE_ONE = (
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.DatabaseDroppedError,
    asyncpg.PostgresConnectionError,
)

P = ParamSpec("P")
T = TypeVar("T")


class Pooled(asyncpg.InterfaceError):  # type: ignore[misc]  # asyncpg has no types
    """Between here and Postgres is a pooler that gives a session's statements to different sessions of the server."""

    def __init__(self) -> None:
        super().__init__(_POOLED)


def _checked(
    statement: Callable[Concatenate["PrimaryConnection", P], Awaitable[T]],
) -> Callable[Concatenate["PrimaryConnection", P], Awaitable[T]]:
    @wraps(statement)
    async def run(self: "PrimaryConnection", /, *args: P.args, **kwargs: P.kwargs) -> T:
        if not takes_changes(self):
            # The server said so beside its last answer. Nothing is sent: a reader would be told old things as new.
            self.misplaced = True
            raise asyncpg.TargetServerAttributeNotMatched(_NO_PRIMARY)
        try:
            return await statement(self, *args, **kwargs)
        except asyncpg.PostgresError as error:
            self.misplaced = self.misplaced or _says_not_the_one(error)
            raise

    return run


class PrimaryConnection(asyncpg.Connection):  # type: ignore[misc]
    """A connection that may be used while its server takes changes.

    `misplaced` is True from the moment that the server has answered otherwise; then the connection must be closed, and
    the next one finds the primary. A statement on a server that reports that it became read-only raises
    TargetServerAttributeNotMatched, also one that only reads.
    """

    misplaced = False

    execute = _checked(asyncpg.Connection.execute)
    executemany = _checked(asyncpg.Connection.executemany)
    fetch = _checked(asyncpg.Connection.fetch)
    fetchval = _checked(asyncpg.Connection.fetchval)
    fetchrow = _checked(asyncpg.Connection.fetchrow)
    copy_to_table = _checked(asyncpg.Connection.copy_to_table)


async def connect_primary(dsn: str, *, timeout: float, **options: Any) -> asyncpg.Connection:
    """A PrimaryConnection to the server that takes changes. Raises what postgres.UNAVAILABLE lists, also where there is
    none.

    `timeout`, in seconds, is for a server that is the only one; `options` are those of asyncpg.connect. Its commits are
    durable, whatever the role or the database has for synchronous_commit, unless server_settings says otherwise.
    """
    options = {"connection_class": PrimaryConnection, **options}
    return await _connect(dsn, timeout, options, takes_changes, or_other=False)


async def connect_reader(dsn: str, *, timeout: float, **options: Any) -> asyncpg.Connection:
    """A connection to a standby or, where no standby answers, to the primary; see `connect_primary`."""
    return await _connect(dsn, timeout, options, _is_standby, or_other=True)


def takes_changes(connection: asyncpg.Connection) -> bool:
    """Whether the server of a connection says that it takes changes. Servers tell so when a connection is made, and
    beside an answer when it changes; before Postgres 14 they do not, and are believed to."""
    settings = connection.get_settings()
    return (
        getattr(settings, "in_hot_standby", "off") != "on"
        and getattr(settings, "default_transaction_read_only", "off") != "on"
    )


async def spread_readers(pool: asyncpg.Pool) -> None:
    """Lets a pool make its connections anew now and then, until cancelled: otherwise the readers that a dying standby
    has sent to the primary would stay there, and those of a standby that was promoted, too."""
    while True:
        await asyncio.sleep(_SPREAD_SECONDS)
        await pool.expire_connections()


async def _connect(
    dsn: str, timeout: float, options: dict[str, Any], fits: Callable[[asyncpg.Connection], bool], *, or_other: bool
) -> asyncpg.Connection:
    servers = _servers(dsn)
    seconds = min(timeout, _SERVER_SECONDS) if len(servers) > 1 else timeout
    others: list[asyncpg.Connection] = []
    failure: Exception = asyncpg.TargetServerAttributeNotMatched(_NO_PRIMARY)
    try:
        for server in random.sample(servers, len(servers)):
            try:
                connection = await _open(server, seconds, options)
            except Pooled:
                raise
            except (
                OSError,
                TimeoutError,
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                asyncpg.InternalClientError,
            ) as error:
                failure = error
                continue
            except ValueError:
                raise InvalidAddress from None
            if fits(connection):
                return connection
            others.append(connection)
        if others and or_other:
            return others.pop()
        raise failure
    finally:
        for connection in others:
            connection.terminate()


async def _open(server: str, seconds: float, options: Mapping[str, Any]) -> asyncpg.Connection:
    """A connection to one server. Raises UnsupportedStore where it is too old, Pooled where a pooler answers in its
    place and drops a session's settings."""
    settings = _SESSION | options.get("server_settings", {})
    try:
        connection = await asyncpg.connect(server, timeout=seconds, **{**options, "server_settings": settings})
    except asyncpg.ProtocolViolationError as error:
        if "startup parameter" in str(error):
            raise Pooled from None
        raise
    try:
        if connection.get_server_version().major < VERSION:
            running = connection.get_settings().server_version
            raise UnsupportedStore(f"this is Postgres {running}, and Tally needs version {VERSION} or newer")
        # A pooler names another process than the one that runs the statements.
        async with asyncio.timeout(seconds):
            durable = "synchronous_commit" not in settings
            if await connection.fetchval(_BEGIN_SESSION, durable) != connection.get_server_pid():
                await _require_settings(connection, settings)
    except BaseException:
        connection.terminate()
        raise
    return connection


async def _require_settings(connection: asyncpg.Connection, settings: dict[str, str]) -> None:
    # Poolers pass this one on, whatever else they drop.
    names = sorted(settings.keys() - {"application_name"})
    query = "SELECT count(*) FROM pg_settings WHERE name = ANY ($1) AND source = 'client'"
    if await connection.fetchval(query, names) < len(names):
        raise Pooled


def _servers(dsn: str) -> list[str]:
    """A DSN for each server."""
    try:
        parts = urlsplit(dsn)
    except ValueError:
        raise InvalidAddress from None
    user, at, servers = parts.netloc.rpartition("@")
    if "," not in servers:
        return [dsn]
    return [urlunsplit(parts._replace(netloc=f"{user}{at}{server}")) for server in servers.split(",")]


def _is_standby(connection: asyncpg.Connection) -> bool:
    return getattr(connection.get_settings(), "in_hot_standby", "off") == "on"


def _says_not_the_one(error: asyncpg.PostgresError) -> bool:
    # 55000 itself, "not in the state that this needs": its subclasses, such as a lock that is not available, are about
    # the statement.
    return isinstance(error, _NOT_THE_ONE) or type(error) is asyncpg.ObjectNotInPrerequisiteStateError
