"""Real stores and services in a temporary directory, as benchmarks need them."""

import os
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import asyncpg
import nats
from nats.js.errors import NotFoundError
from redis.asyncio import Redis

from contracts.bus import STREAM
from migrations import migrate_read, migrate_write
from runtime import embedded
from runtime.supervisor import Died, Process, Program

# The key of ten million votes, with all else that is written meanwhile, has room there: docs/operations.md.
SHARED_BUFFERS = "2GB"
VOTER_SECRET = "benchmarks have a secret of their own"

_TABLES = """
SELECT format('%I.%I', schemaname, tablename) AS name FROM pg_tables
WHERE tableowner = current_user
    -- What a migration puts there.
    AND tablename NOT IN ('schema_migrations', 'log_epochs', 'deployment')
"""


class Server(NamedTuple):
    """A running gRPC server."""

    address: str
    pid: int


def pid_of(process: Process) -> int:
    """The pid of a process that runs."""
    if process.pid is None:
        raise Died(f"{process.name} {process.how_it_ended()}{process.last_lines()}")
    return process.pid


class Stage:
    """Running stores, and services that are started when a benchmark wants them."""

    def __init__(self, directory: Path, stores: embedded.Stores) -> None:
        self.directory = directory
        self.stores = stores
        self.write_dsn = stores.dsn("tally_write")
        self.read_dsn = stores.dsn("tally_read")
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("TALLY_")} | {
            "TALLY_WRITE_DSN": self.write_dsn,
            "TALLY_READ_DSN": self.read_dsn,
            "TALLY_NATS_URL": stores.nats_url,
            "TALLY_REDIS_URL": stores.redis_url,
        }

    @property
    def views_dsn(self) -> str:
        """The read database, as its read model `views` sees it."""
        return f"{self.read_dsn}&search_path=views"

    @property
    def postgres_pid(self) -> int:
        """The server process, whose children serve the connections."""
        return pid_of(self.stores.postgres_process)

    @asynccontextmanager
    async def service(self, *arguments: str, environment: Mapping[str, str] = {}) -> AsyncIterator[Process]:
        """A process `python -m …` while the context lasts, with its settings for these stores."""
        name = "-".join(arguments)
        ready = self.directory / f"{name}.ready"
        ready.unlink(missing_ok=True)
        process = Process(
            Program(
                name=name,
                command=[sys.executable, "-m", *arguments],
                ready=ready,
                environment={**self._environment, **environment, "TALLY_READY_FILE": str(ready)},
            ),
            self.directory / f"{name}.log",
        )
        await process.start()
        try:
            yield process
        finally:
            await process.stop()

    @asynccontextmanager
    async def server(self, *arguments: str) -> AsyncIterator[Server]:
        """A gRPC server `python -m …` on these stores."""
        address = f"127.0.0.1:{embedded.free_port()}"
        listen = {"TALLY_COMMAND_LISTEN": address, "TALLY_QUERY_LISTEN": address}
        environment = {**listen, "TALLY_VOTER_SECRET": VOTER_SECRET}
        async with self.service(*arguments, environment=environment) as process:
            yield Server(address, pid_of(process))

    async def sql(self, query: str, *arguments: object, dsn: str = "") -> list[asyncpg.Record]:
        """The rows of a query, on the write database or another one."""
        connection = await asyncpg.connect(dsn or self.write_dsn)
        try:
            return list(await connection.fetch(query, *arguments))
        finally:
            await connection.close()

    async def clear(self) -> None:
        """Empties all stores, and leaves no work behind that the next measurement would pay for.

        A command server may go on running; relay and projectors may not.
        """
        for dsn in (self.write_dsn, self.read_dsn):
            tables = await self.sql(_TABLES, dsn=dsn)
            await self.sql(f"TRUNCATE {', '.join(row['name'] for row in tables)}", dsn=dsn)
        await self.sql("CHECKPOINT", dsn=self.stores.admin_dsn)
        async with Redis.from_url(self.stores.redis_url) as redis:
            await redis.flushall()
        bus = await nats.connect(self.stores.nats_url)
        with suppress(NotFoundError):
            await bus.jetstream().delete_stream(STREAM)
        await bus.close()

    async def durability(self) -> dict[str, str]:
        """The settings of the server without which a commit is not on the disk. Raises where one of them is off."""
        names = ("fsync", "synchronous_commit", "full_page_writes")
        settings = {name: str((await self.sql(f"SHOW {name}"))[0][0]) for name in names}
        if set(settings.values()) != {"on"}:
            raise RuntimeError(f"figures without durability mean nothing: {settings}")
        return settings


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    """Stores with migrated databases; everything is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="tally-bench-") as folder:
        directory = Path(folder)
        async with embedded.stores(directory, ["tally_write", "tally_read"], shared_buffers=SHARED_BUFFERS) as stores:
            await migrate_write(stores.dsn("tally_write"))
            await migrate_read(stores.dsn("tally_read"))
            yield Stage(directory, stores)
