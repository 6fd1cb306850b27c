"""The outbox of one shard: the events that the stream has not acknowledged yet."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

import asyncpg

from contracts.bus import MESSAGE_ID_HEADER, event_headers, event_message, microseconds
from migrations import check_write
from runtime.postgres import queries
from runtime.replicas import connect_primary

sql = queries(__package__)

# The most events that are read and published at once, and about how many bytes of them.
CHUNK_EVENTS = 1000
CHUNK_BYTES = 4 << 20

_LOCKS = 0x74_61_6C_6C
_SECONDS = 10.0

_SESSION = {
    "application_name": "relay",
    # A deletion that a crash undoes means an event published twice, which readers skip. So none waits for the disk.
    "synchronous_commit": "off",
    # The outbox is empty at one moment and long at the next: no statistics of it hold, only its index does.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    # A relay that stands still, or is cut off from the network, loses its lock within seconds. Between two looks into
    # the outbox is one publish, which takes 11 s at most: two acks, and a second of single events.
    "idle_session_timeout": "12s",
    "transaction_timeout": "12s",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "1",
    "tcp_keepalives_count": "5",
}


class OutboxEvent(NamedTuple):
    """A row of the outbox, and its event as it goes on the stream."""

    outbox_id: int
    poll_id: UUID
    version: int
    # When it was recorded, in microseconds of Unix time.
    recorded_at: int
    # Whether it was published before, and is now for readers that missed it.
    again: bool
    # The current epoch of the log.
    log_epoch: UUID
    headers: dict[str, str]
    data: bytes


class Outbox:
    """Reads and empties the outbox of one shard, over the connection that holds the shard's lock.

    So whoever lost the lock cannot read another event; made by `connect`.
    """

    def __init__(self, connection: asyncpg.Connection, shard: int, shards: int) -> None:
        self._connection = connection
        self._shard = shard
        self._shards = shards

    async def lead(self) -> bool:
        """Whether this process relays the shard from now on, until the connection is closed."""
        leads: bool = await self._connection.fetchval(sql.lead, _LOCKS, self._shard)
        return leads

    async def next(self, acknowledged: Sequence[int]) -> list[OutboxEvent]:
        """Deletes the rows that the stream acknowledged, then returns the first of the others, in order."""
        rows = await self._connection.fetch(
            sql.next_events, acknowledged, self._shards, self._shard, CHUNK_EVENTS, CHUNK_BYTES
        )
        return [_event(*row) for row in rows]


@asynccontextmanager
async def connect(dsn: str, shard: int, shards: int) -> AsyncIterator[Outbox]:
    """The outbox of one of `shards`. Its lock is free again when the context ends or the process does. Raises
    UnsupportedStore where the write database is not what this code needs."""
    connection = await connect_primary(dsn, timeout=5, command_timeout=_SECONDS, server_settings=_SESSION)
    try:
        await check_write(connection)
        yield Outbox(connection, shard, shards)
    finally:
        connection.terminate()


def _event(
    outbox_id: int, poll_id: UUID, version: int, again: bool, recorded_at: datetime, payload: bytes, log_epoch: UUID
) -> OutboxEvent:
    # Another event has another id, also in a history that gives it the same version; and so has a row that is queued
    # once more for an event that readers missed.
    headers = {MESSAGE_ID_HEADER: f"{log_epoch}:{poll_id}:{version}:{outbox_id}"}
    headers |= event_headers(log_epoch, version, recorded_at)
    data = event_message(poll_id, version, recorded_at, payload)
    return OutboxEvent(outbox_id, poll_id, version, microseconds(recorded_at), again, log_epoch, headers, data)
