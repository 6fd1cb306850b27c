"""A read model in the read database twice: the copy in use, and a fresh one in another schema, to take its place.

The switch renames both schemas in one transaction. Readers find tables by the schema's name; a statement that they have
prepared is planned anew by Postgres after that, and one that is running ends on the tables that it began with.
"""

import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Self

import asyncpg
import structlog

from migrations import READ
from projector.read_model import Displaced
from projector.schema import Schema
from runtime import postgres
from runtime.lifecycle import Backoff
from runtime.replicas import connect_primary
from runtime.schema import MIGRATION_LOCK, migrate

log = structlog.get_logger()
sql = postgres.queries(__package__, "schema_copies.sql")

_SECONDS = 60.0
# A copy that readers still use after so many attempts is left to the next rebuild.
_CLAIMS = 100
_SESSION = {
    "application_name": "rebuild",
    "lock_timeout": "3s",
    # Nothing here asks what could be found without a name.
    "search_path": "",
}


class SchemaCopies:
    """See projector.rebuild.Copies; made by `open`."""

    def __init__(self, connection: asyncpg.Connection, in_use: Schema, fresh: Schema, names: Mapping[str, str]) -> None:
        """`names` are what the statements call the schemas and the table of polls."""
        self.in_use = in_use
        self.fresh = fresh
        self._connection = connection
        self._names = names

    @classmethod
    @asynccontextmanager
    async def open(cls, kind: type[Schema], read_dsn: str) -> AsyncIterator[Self]:
        """Begins a fresh copy, which is removed at the end unless it is the one in use by then."""
        fresh, retired = (f"{kind.name}_{secrets.token_hex(4)}" for _ in range(2))
        names = {"in_use": kind.name, "fresh": fresh, "retired": retired, "polls": kind.polls}
        connection = await connect_primary(read_dsn, timeout=10, command_timeout=_SECONDS, server_settings=_SESSION)
        try:
            for (left,) in await connection.fetch(sql.left, kind.name):
                await _remove(connection, left)
            await migrate(read_dsn, READ[kind.name], fresh)
            async with kind.connect(read_dsn) as in_use, kind.connect(read_dsn, fresh) as copy:
                yield cls(connection, in_use, copy, names)
        finally:
            try:
                for schema in (fresh, retired):
                    await _remove(connection, schema)
            except (*postgres.UNAVAILABLE, asyncpg.PostgresError) as error:
                log.warning("a copy was not removed; the next rebuild does it", error=repr(error))
            connection.terminate()

    async def ahead(self) -> AsyncIterator[dict[str, int]]:
        yield dict(await self._connection.fetch(self._sql(sql.ahead)))

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        try:
            async with self._connection.transaction():
                await self._connection.execute(self._sql(sql.freeze))
                yield
        except asyncpg.LockNotAvailableError as error:
            raise TimeoutError("somebody changes the read model, or its schema, for long") from error

    async def switch(self) -> None:
        await self._connection.execute(sql.lock_migrations, MIGRATION_LOCK)
        if lacking := await self._connection.fetch(self._sql(sql.lacking)):
            raise Displaced(f"the copy in use has been migrated: {lacking[0]['name']}")
        await self._connection.execute(self._sql(sql.switch))

    def _sql(self, statement: str) -> str:
        return statement.format(**self._names)


async def _remove(connection: asyncpg.Connection, schema: str) -> None:
    """Drops a copy, where there is one, once no reader is on it."""
    backoff = Backoff(first=0.01, longest=0.5)
    for _ in range(_CLAIMS):
        try:
            async with connection.transaction():
                tables = [table for (table,) in await connection.fetch(sql.tables, schema)]
                if tables:
                    await connection.execute(sql.claim.format(tables=", ".join(tables)))
                await connection.execute(sql.drop.format(schema=schema))
        except asyncpg.LockNotAvailableError:
            await backoff.wait()
        else:
            return
    log.warning("a copy is still read; the next rebuild removes it", schema=schema)
