"""The electoral roll: who may vote in a poll, and with which weight."""

from asyncio import timeout
from collections.abc import Mapping
from typing import NamedTuple
from uuid import UUID

import asyncpg
from asyncpg.pgproto.pgproto import UUID as KeyUUID  # noqa: N811

from command_server.poll import register_voters
from command_server.poll_log import append, lock
from runtime.postgres import POOL_SECONDS, queries

sql = queries(__package__)

_REGISTER_SECONDS = 30.0


class Registered(NamedTuple):
    """How many voters a batch added to the roll, and the poll's version after it."""

    voters: int
    version: int


class Roll:
    """Registers voters in the write database."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def register(self, poll_id: UUID, weights: Mapping[bytes, int]) -> Registered:
        """Adds voters (voter key → weight) with an event that counts them. Those on the roll keep their weight."""
        keys = sorted(weights)
        async with (
            timeout(_REGISTER_SECONDS),
            self._pool.acquire(timeout=POOL_SECONDS) as connection,
            connection.transaction(),
        ):
            rows = await connection.fetch(
                sql.register_voters, poll_id, [weights[key] for key in keys], [KeyUUID(key) for key in keys]
            )
            locked = await lock(connection, poll_id)
            # Also where nothing was added: the decision says whether this poll has a roll, and takes voters now.
            change = register_voters(len(rows), sum(row["weight"] for row in rows))(locked.poll)
            version = await append(connection, locked, change) if rows else locked.version
            return Registered(len(rows), version)
