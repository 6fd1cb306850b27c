"""The event log in the write database, for whoever reads it whole: what the stream has lost is here."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

import asyncpg

from contracts.bus import event_message, event_subject
from migrations import check_write
from projector.stream import Message, Origin, Position
from runtime.postgres import queries
from runtime.replicas import connect_primary

sql = queries(__package__, "rebuild.sql")

_SECONDS = 60.0
_PAGE_POLLS = 500
# What is read at once: so many events, and about so many bytes of them.
_CHUNK_EVENTS = 1000
_CHUNK_BYTES = 8 << 20
_LOCKS = 0x72_62_6C_64
_LEAD_ATTEMPTS = 10
_LEAD_PAUSE = 0.1

_SESSION = {
    # Each statement knows its rows by key, however many rows a table has.
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}


class LoggedPoll(NamedTuple):
    """A poll, and its latest event: the version, and when it was recorded."""

    poll_no: int
    poll_id: UUID
    version: int
    recorded_at: datetime
    # The events before this one may be gone: it holds all that they come to. 0: none are.
    snapshot_version: int


class Incomplete(Exception):  # noqa: N818 - says what the event log is
    """The event log lacks what it has had: a read model made from it would take something back from readers."""


class EventLog:
    """Reads the event log; made by `connect`."""

    def __init__(self, connection: asyncpg.Connection, origin: Origin) -> None:
        # The history that it was of when the connection was made.
        self.origin = origin
        self._connection = connection

    async def lead(self, read_model: str) -> bool:
        """Whether this is the only process that rebuilds the read model, until the connection is closed."""
        # The server may need a moment to notice that one has ended.
        for _ in range(_LEAD_ATTEMPTS):
            if await self._connection.fetchval(sql.lead, _LOCKS, read_model):
                return True
            await asyncio.sleep(_LEAD_PAUSE)
        return False

    async def log_epoch(self) -> UUID:
        """The history that the log is of now."""
        return (await self._connection.fetchrow(sql.origin))["log_epoch"]  # type: ignore[no-any-return]

    async def size(self) -> tuple[int, int]:
        """How many polls there are, and how many events."""
        polls, events = await self._connection.fetchrow(sql.size)
        return polls, events

    async def horizon(self) -> str:
        """What has changed since this moment, and only a little more, is what `changed_polls` has from here on."""
        horizon: str = await self._connection.fetchval(sql.horizon)
        return horizon

    async def changed_polls(self, horizon: str | None) -> AsyncIterator[list[LoggedPoll]]:
        """The polls that have changed since a horizon, or all polls, page by page."""
        after = 0
        while rows := await self._connection.fetch(sql.changed_polls, after, horizon, _PAGE_POLLS):
            yield [LoggedPoll(*row) for row in rows]
            after = rows[-1]["poll_no"]

    async def page(self, after: int, limit: int) -> list[tuple[LoggedPoll, bool]]:
        """The next polls by their number, up to `limit`; each with whether events of it wait for the relay."""
        rows = await self._connection.fetch(sql.page, after, limit)
        return [(LoggedPoll(*row[:5]), row["waiting"]) for row in rows]

    async def polls(self, poll_ids: Sequence[str]) -> list[LoggedPoll]:
        """Those of the polls that there are."""
        return [LoggedPoll(*row) for row in await self._connection.fetch(sql.polls, poll_ids)]

    async def recorded_at(self, versions: Mapping[int, int]) -> dict[int, datetime]:
        """When the events were recorded that are given as poll_no → version; without those that there are not."""
        rows = await self._connection.fetch(sql.recorded_at, list(versions), list(versions.values()))
        return {row["poll_no"]: row["recorded_at"] for row in rows}

    async def events(self, polls: Sequence[LoggedPoll], known: Mapping[UUID, int]) -> AsyncIterator[list[Message]]:
        """The events of some polls after the known versions, in order and in chunks, as the stream brings them."""
        ids = {poll.poll_no: poll.poll_id for poll in polls}
        # From which version to which one is missing of each poll.
        missing = {poll.poll_no: (max(known[poll.poll_id], poll.snapshot_version - 1), poll.version) for poll in polls}
        while wanted := _first(missing, _CHUNK_EVENTS):
            rows = await self._connection.fetch(sql.events, *zip(*wanted, strict=True), _CHUNK_BYTES)
            if not rows:
                poll_no, after, _ = wanted[0]
                raise Incomplete(f"there is no event after version {after} of poll {ids[poll_no]}")
            for row in rows:
                missing[row["poll_no"]] = row["version"], missing[row["poll_no"]][1]
            yield [self._message(ids[row["poll_no"]], row) for row in rows]

    def _message(self, poll_id: UUID, row: asyncpg.Record) -> Message:
        data = event_message(poll_id, row["version"], row["recorded_at"], row["payload"])
        assert self.origin.log_epoch is not None
        nowhere = Position(0, 0, self.origin.log_epoch)
        return Message(event_subject(0, poll_id), data, nowhere, 0, row["version"])


@asynccontextmanager
async def connect(write_dsn: str, application: str = "rebuild", timeout: float = 10) -> AsyncIterator[EventLog]:
    """The event log of a write database; not of a standby, which may lack the latest events. `timeout`: seconds.
    Raises UnsupportedStore where this code cannot read it."""
    settings = _SESSION | {"application_name": application}
    connection = await connect_primary(write_dsn, timeout=timeout, command_timeout=_SECONDS, server_settings=settings)
    try:
        await check_write(connection)
        yield EventLog(connection, Origin(*await connection.fetchrow(sql.origin)))
    finally:
        connection.terminate()


def _first(missing: dict[int, tuple[int, int]], limit: int) -> list[tuple[int, int, int]]:
    """The first missing versions, up to so many: number of the poll, after which version, up to which one."""
    wanted = []
    for poll_no, (after, latest) in list(missing.items()):
        if after >= latest:
            del missing[poll_no]
        elif limit:
            up_to = min(latest, after + limit)
            wanted.append((poll_no, after, up_to))
            limit -= up_to - after
    return wanted
