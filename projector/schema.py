"""A read model that is a schema of the read database: what all of them have in common."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar, Self
from uuid import UUID

import asyncpg
import structlog
from google.protobuf.message import DecodeError

from contracts.dead_letters import DeadLetter
from contracts.read_database import CHANNEL, announcements
from migrations import READ, check_read
from projector.fold import Tally
from projector.read_model import Change, Damaged, Displaced, Replaced
from projector.stream import Position
from runtime import postgres
from runtime.replicas import connect_primary
from runtime.schema import migrate
from runtime.stores import UnsupportedStore

log = structlog.get_logger()
sql = postgres.queries(__package__, "schema.sql")

SECONDS = 30.0
_SESSION = {
    # A commit that a crash undoes is read from the stream again: its position is undone with it.
    "synchronous_commit": "off",
    "idle_in_transaction_session_timeout": "30s",
    # Each of these statements knows its rows by key, however many rows a table has.
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "1",
    "tcp_keepalives_count": "5",
}


class Schema:
    """One copy of a read model: a schema with tables stream_position, dead_letters and projector_status, and its own.
    The copy in use has the read model's name."""

    name: ClassVar[str]
    # Its table with a row for each poll: poll_id and version.
    polls: ClassVar[str]
    failures: ClassVar[tuple[type[Exception], ...]] = (*postgres.UNAVAILABLE, asyncpg.PostgresError)
    refusals: ClassVar[tuple[type[Exception], ...]] = (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError)

    def __init__(self, connection: asyncpg.Connection, copy: int, in_use: bool) -> None:
        self._connection = connection
        self._copy = copy
        self._in_use = in_use

    @classmethod
    @asynccontextmanager
    async def connect(cls, read_dsn: str, schema: str = "") -> AsyncIterator[Self]:
        """Opens the read model for one session: the copy in use, or the one in another schema. Raises UnsupportedStore
        where the schema in use is not one for this code."""
        session = _SESSION | {"application_name": f"projector {cls.name}", "search_path": schema or cls.name}
        connection = await connect_primary(read_dsn, timeout=5, command_timeout=SECONDS, server_settings=session)
        try:
            try:
                copy = await connection.fetchval(sql.copy)
            except asyncpg.UndefinedTableError:
                if schema:
                    raise
                # The database was dropped, or its schema: it is made anew, and is filled from the event log.
                log.error("the read model has no schema; it is made anew", read_model=cls.name)
                await _make(read_dsn, cls.name)
                copy = await connection.fetchval(sql.copy)
            if not schema:
                await check_read(connection, cls.name)
            yield cls(connection, copy, in_use=not schema)
        finally:
            connection.terminate()

    async def position(self) -> Position | None:
        row = await self._connection.fetchrow(sql.position, self._copy)
        if not row:
            await self._require_copy()
        return Position(*row) if row else None

    async def claim(self, deployment_id: UUID) -> UUID:
        # Without a write where it is known: that would wait for who changes the copy.
        owner: UUID | None = await self._connection.fetchval(sql.deployment, self._copy)
        owner = owner or await self._connection.fetchval(sql.claim, deployment_id, self._copy)
        if owner is None:
            await self._require_copy()
            raise Displaced("the copy has no position")
        return owner

    async def load(self, poll_ids: Sequence[str]) -> dict[str, Tally]:
        """Those of the polls that it has. Raises Damaged; `tallies_in` does what is needed for that."""
        raise NotImplementedError

    async def set_aside(self, poll_ids: Sequence[str]) -> None:
        """Only their rows in the table of polls: without these, no reader finds what else refers to them."""
        removed = await self._connection.fetch(sql.set_aside.format(polls=self.polls), poll_ids)
        for poll_id, content in removed:
            log.error("the row of a poll was removed", read_model=self.name, poll_id=poll_id, content=content)

    async def filling(self) -> bool:
        return bool(await self._connection.fetchval(sql.filling, self._copy))

    async def filled(self) -> None:
        await self._connection.execute(sql.filled, self._copy)

    async def dead_letters(self) -> list[DeadLetter]:
        return [DeadLetter(*row) for row in await self._connection.fetch(sql.dead_letters)]

    async def store(
        self,
        changes: Sequence[Change],
        letters: Mapping[str, DeadLetter | None],
        old: Position | None,
        new: Position,
    ) -> None:
        async with self._connection.transaction():
            # First, and so that everything after it is in the same copy: whoever replaces the copy by another one waits
            # until nobody has changed this table and not committed yet.
            if old is None:
                moved = await self._connection.execute(sql.begin, *new)
            else:
                moved = await self._connection.execute(sql.move, *old, *new, self._copy)
            if moved not in ("INSERT 0 1", "UPDATE 1"):
                await self._require_copy()
                raise Displaced("the position is not the one that was stored")
            await self._apply(changes)
            if changes and self._in_use:
                versions = [(change.poll_id, change.tally.version) for change in changes]
                await self._connection.execute(sql.announce, CHANNEL, announcements(self.name, versions, new.log_epoch))
            if letters:
                kept = [letter for letter in letters.values() if letter]
                await self._connection.executemany(sql.keep_dead_letter, kept)
                dropped = [poll_id for poll_id, letter in letters.items() if not letter]
                await self._connection.execute(sql.drop_dead_letters, dropped)

    async def report(self, status: bytes) -> None:
        await self._connection.execute(sql.report, self.name, status)

    async def _require_copy(self) -> None:
        if await self._connection.fetchval(sql.copy) != self._copy:
            raise Replaced("another copy is in use now")

    async def _apply(self, changes: Sequence[Change]) -> None:
        """Applies changes, within a transaction. Raises Displaced where a poll is not at the version before its own."""
        raise NotImplementedError


async def _make(read_dsn: str, read_model: str) -> None:
    try:
        await migrate(read_dsn, READ[read_model], read_model)
    except asyncpg.InsufficientPrivilegeError as error:
        raise UnsupportedStore(
            f"there is no schema {read_model}, and this role may not make it ({error}): run `tally migrate`"
        ) from None


def tallies_in(rows: Sequence[asyncpg.Record], tally_of: Callable[[asyncpg.Record], Tally]) -> dict[str, Tally]:
    """The polls in rows that have a poll_id. Raises Damaged for those that `tally_of` cannot read."""
    tallies: dict[str, Tally] = {}
    damaged: dict[str, str] = {}
    for row in rows:
        poll_id = str(row["poll_id"])
        try:
            tallies[poll_id] = tally_of(row)
        except (DecodeError, LookupError, TypeError, ValueError, AttributeError) as error:
            damaged[poll_id] = repr(error)
    if damaged:
        raise Damaged(damaged)
    return tallies
