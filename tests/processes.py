"""Services as processes of their own, for tests that kill them; and waiting for what they do."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from runtime.supervisor import Process, Program

_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("TALLY_")}


@asynccontextmanager
async def service(directory: Path, *module: str, failpoint: str = "", **settings: str) -> AsyncIterator[Process]:
    """`python -m module`, with its settings and perhaps a failpoint; started, and stopped if it still runs."""
    name = "-".join(module)
    ready = directory / f"{name}.ready"
    variables = {"ready_file": str(ready), "failpoint": failpoint, **settings}
    program = Program(
        name=name,
        command=[sys.executable, "-m", *module],
        ready=ready,
        environment=_ENVIRONMENT | {f"TALLY_{name.upper()}": value for name, value in variables.items()},
    )
    process = Process(program, directory / f"{name}.log")
    try:
        await process.start()
        yield process
    finally:
        await process.stop()


async def eventually(condition: Callable[[], Awaitable[object]], seconds: float = 15.0) -> None:
    """Returns once the condition holds; fails after `seconds`, with the assertion that the condition failed last."""
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            assert await condition() is not False
        except AssertionError:
            if asyncio.get_running_loop().time() > deadline:
                raise
        else:
            return
        await asyncio.sleep(0.01)
