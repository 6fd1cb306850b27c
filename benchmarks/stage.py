"""Real stores and services in a temporary directory, as benchmarks need them."""

import os
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

import migrations
from runtime import embedded, postgres
from runtime.supervisor import Process, Program

VOTER_SECRET = "benchmarks have a secret of their own"


class Stage:
    """Running stores, and services that are started when a benchmark wants them."""

    def __init__(self, directory: Path, stores: embedded.Stores) -> None:
        self.directory = directory
        self.stores = stores
        self.write_dsn = stores.dsn("tally_write")
        self.read_dsn = stores.dsn("tally_read")

    @asynccontextmanager
    async def service(self, *arguments: str, environment: Mapping[str, str]) -> AsyncIterator[Process]:
        """A process `python -m …` while the context lasts."""
        name = "-".join(arguments)
        ready = self.directory / f"{name}.ready"
        ready.unlink(missing_ok=True)
        process = Process(
            Program(
                name=name,
                command=[sys.executable, "-m", *arguments],
                ready=ready,
                environment={**embedded_environment(), **environment, "TALLY_READY_FILE": str(ready)},
            ),
            self.directory / f"{name}.log",
        )
        await process.start()
        try:
            yield process
        finally:
            await process.stop()

    @asynccontextmanager
    async def command_server(self) -> AsyncIterator[tuple[str, Process]]:
        """The address of a command server, and its process."""
        address = f"127.0.0.1:{embedded.free_port()}"
        environment = {
            "TALLY_COMMAND_LISTEN": address,
            "TALLY_WRITE_DSN": self.write_dsn,
            "TALLY_VOTER_SECRET": VOTER_SECRET,
        }
        async with self.service("command_server", environment=environment) as process:
            yield address, process

    async def sql(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        """The rows of a query on the write database."""
        connection = await asyncpg.connect(self.write_dsn)
        try:
            return list(await connection.fetch(query, *arguments))
        finally:
            await connection.close()


def embedded_environment() -> dict[str, str]:
    """The environment without any setting of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TALLY_")}


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    """Stores with migrated databases; everything is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="tally-bench-") as folder:
        directory = Path(folder)
        databases = ["tally_write", "tally_read"]
        async with embedded.stores(directory, databases, shared_buffers="512MB") as stores:
            for name, folder_of_files in zip(databases, (migrations.WRITE, migrations.READ), strict=True):
                await postgres.migrate(stores.dsn(name), folder_of_files)
            yield Stage(directory, stores)
