"""Processes that do what they are told, once they are told to go: `python -m benchmarks.…`."""

import asyncio
import json
import sys
from collections.abc import Mapping
from itertools import count
from typing import Any

# The most bytes of an answer, which is one line.
_ANSWER_BYTES = 16 << 20

# Each order has voters of its own: a million of them.
_voters = count(step=1_000_000)


def new_voters() -> int:
    """The first number of a million voters that nobody else sends."""
    return next(_voters)


class Driver:
    """A process that has its orders, and waits for `go`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def prepare(cls, module: str, orders: Mapping[str, object]) -> "Driver":
        """Starts `python -m module`, hands it its orders as JSON, and returns when it is ready."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, stdin=pipe, stdout=pipe, limit=_ANSWER_BYTES
        )
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps(orders).encode() + b"\n")
        assert await process.stdout.readline() == b"ready\n", f"{module} is not ready"
        return cls(process)

    async def go(self) -> dict[str, Any]:
        """Lets it work, and returns its answer as soon as it has one."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(b"\n")
        line = await self._process.stdout.readline()
        assert line, "ended without an answer"
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def done(self) -> None:
        """Returns when it has ended."""
        assert self._process.stdin
        self._process.stdin.close()
        assert await self._process.wait() == 0


async def drive(module: str, orders: Mapping[str, object]) -> dict[str, Any]:
    """The answer of a process to its orders."""
    driver = await Driver.prepare(module, orders)
    answer = await driver.go()
    await driver.done()
    return answer
