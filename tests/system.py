"""The whole product as `tally up` runs it, for tests of what only all of it together promises."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub
from tally.query.v1.query_service_pb2_grpc import QueryServiceStub

REPOSITORY = Path(__file__).parents[1]
_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("TALLY_")}


class System:
    """A running `tally up`: its run.json, and clients of both servers."""

    def __init__(self, directory: Path, command: grpc.aio.Channel, query: grpc.aio.Channel) -> None:
        self.directory = directory
        self.command = CommandServiceStub(command)
        self.query = QueryServiceStub(query)

    @property
    def run(self) -> dict[str, Any]:
        """Where everything is, and the processes' pids."""
        run: dict[str, Any] = json.loads((self.directory / "run.json").read_text())
        return run

    def __getitem__(self, key: str) -> str:
        return str(self.run[key])

    def pid(self, process: str, number: int = 0) -> int:
        """The pid of a process, which changes when it is restarted."""
        return int(self.run["processes"][process][number])


@asynccontextmanager
async def running_system(
    directory: Path, variables: Mapping[str, str] = MappingProxyType({}), repository: Path = REPOSITORY
) -> AsyncIterator[System]:
    """Starts everything in `directory`, with these environment variables, and stops it at the end.

    `repository` is where the program is.
    """
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from clients.cli import main; main()", "up"),
        *("--data-dir", str(directory), "--command-port", "0", "--query-port", "0"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=repository,
        env={**_ENVIRONMENT, "PYTHONPATH": str(repository), **variables},
        start_new_session=True,
    )
    assert child.stdout
    said: list[str] = []
    try:
        async with asyncio.timeout(60):
            while not any("Ctrl-C" in line for line in said):
                line = (await child.stdout.readline()).decode()
                assert line, "it ended: " + "".join(said)
                said.append(line)
        run = json.loads((directory / "run.json").read_text())
        reading = asyncio.ensure_future(child.stdout.read())
        async with (
            grpc.aio.insecure_channel(run["command_address"]) as command,
            grpc.aio.insecure_channel(run["query_address"]) as query,
        ):
            yield System(directory, command, query)
        child.terminate()
        await reading
    finally:
        if child.returncode is None:
            child.terminate()
        await child.wait()
