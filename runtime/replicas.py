"""A database on several servers: its DSN names them all, `postgresql://user@a:5432,b:5433/name`, in any order.

Which of them is the primary can change at any time, so each connection finds out anew. The servers are asked one after
the other, in a random order that spreads readers over standbys, and each has a second to answer: one that is silent
must not keep a connection from being made to another.
"""

import asyncio
import random
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from runtime.addresses import InvalidAddress

# How long a server may take to accept a connection, where there are others; seconds.
_SERVER_SECONDS = 1.0
# How often readers are spread again; seconds.
_SPREAD_SECONDS = 30.0


async def connect_primary(dsn: str, *, timeout: float, **options: Any) -> asyncpg.Connection:
    """A connection to the server that takes changes. Raises what postgres.UNAVAILABLE lists, also where there is none.

    `timeout`, in seconds, is for a server that is the only one; `options` are those of asyncpg.connect.
    """
    return await _connect(dsn, timeout, options, standby=False, or_other=False)


async def connect_reader(dsn: str, *, timeout: float, **options: Any) -> asyncpg.Connection:
    """A connection to a standby or, where no standby answers, to the primary; see `connect_primary`."""
    return await _connect(dsn, timeout, options, standby=True, or_other=True)


async def spread_readers(pool: asyncpg.Pool) -> None:
    """Lets a pool make its connections anew now and then, until cancelled: otherwise the readers that a dying standby
    has sent to the primary would stay there, and those of a standby that was promoted, too."""
    while True:
        await asyncio.sleep(_SPREAD_SECONDS)
        await pool.expire_connections()


async def _connect(
    dsn: str, timeout: float, options: dict[str, Any], *, standby: bool, or_other: bool
) -> asyncpg.Connection:
    servers = _servers(dsn)
    seconds = min(timeout, _SERVER_SECONDS) if len(servers) > 1 else timeout
    others: list[asyncpg.Connection] = []
    failure: Exception = asyncpg.TargetServerAttributeNotMatched("none of the servers is the primary")
    try:
        for server in random.sample(servers, len(servers)):
            try:
                connection = await asyncpg.connect(server, timeout=seconds, **options)
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
            if _is_standby(connection) == standby:
                return connection
            others.append(connection)
        if others and or_other:
            return others.pop()
        raise failure
    finally:
        for connection in others:
            connection.terminate()


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
    # The server tells this when a connection is made; before Postgres 14 it does not.
    return getattr(connection.get_settings(), "in_hot_standby", "off") == "on"
