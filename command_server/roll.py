"""The electoral roll: who may vote in a poll, and with which weight."""

import asyncio
from collections.abc import Mapping
from typing import NamedTuple
from uuid import UUID

import asyncpg

from command_server.ballots import ballot_key
from command_server.poll import register_voters
from command_server.poll_log import append, lock
from command_server.turns import Turns
from contracts.refusals import poll_not_found
from runtime.postgres import queries

sql = queries(__package__)

_REGISTER_SECONDS = 30.0
_CONNECTIONS = 2
# Voters of one statement: to make the arrays of many more would hold the event loop.
_VOTERS = 2_000


class Registered(NamedTuple):
    """How many voters a batch added to the roll, how many it gave another weight than the roll has, and the poll's
    version after it, in this epoch of the log."""

    voters: int
    other_weights: int
    version: int
    log_epoch: UUID


class Roll:
    """Registers voters in the write database."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        # Large batches of voters take long, so they do not get all connections.
        self._connections = asyncio.Semaphore(_CONNECTIONS)

    async def register(self, poll_id: UUID, weights: Mapping[bytes, int]) -> Registered:
        """Adds voters (voter key → weight) with an event that counts them. Those on the roll keep their weight."""
        keys = sorted(weights)

        async def add(connection: asyncpg.Connection) -> Registered:
            poll = await connection.fetchrow(sql.find_poll, poll_id)
            if poll is None:
                raise poll_not_found(poll_id)
            added = total_weight = others = 0
            for begin in range(0, len(keys), _VOTERS):
                piece = keys[begin : begin + _VOTERS]
                voters = [weights[key] for key in piece], [ballot_key(poll["poll_no"], key) for key in piece]
                new = await connection.fetchrow(sql.register_voters, *voters)
                if new["voters"] < len(piece):
                    others += await connection.fetchval(sql.count_other_weights, *voters)
                added += new["voters"]
                total_weight += new["weight"]
            locked = await lock(connection, poll_id)
            # Also where nothing was added: the decision says whether this poll has a roll, and takes voters now.
            change = register_voters(added, total_weight)(locked.poll)
            version = await append(connection, locked, change) if added else locked.version
            return Registered(added, others, version, locked.log_epoch)

        return await self._turns.take([("poll", poll_id)], add, _REGISTER_SECONDS, self._connections)
