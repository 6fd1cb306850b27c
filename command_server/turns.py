"""Transactions of commands, so that what one of them waits for takes nothing that others need.

Commands for one poll, or with one request_id, take turns before they take a connection. A command that finds another
transaction's lock gives its connection back, and tries again on one of few that are for such attempts.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeVar
from uuid import UUID

import asyncpg
from prometheus_client import Counter
from tally.poll.v1.error_reason_pb2 import ErrorReason

from command_server.poll import locked
from contracts.refusals import Refusal
from runtime.lifecycle import Backoff
from runtime.postgres import POOL_SECONDS

# The most commands that wait for one turn, and the most connections for attempts after one that found a lock.
WAITING = 100
CONNECTIONS_FOR_LOCKED = 2
# Less than this time is not enough for another attempt.
_LEAST_SECONDS = 1.0

_locks = Counter("tally_commands_locked", "Attempts of commands that found another transaction's lock.")

T = TypeVar("T")

Name = tuple[str, UUID]
"""What a command changes: ("request", request_id) or ("poll", poll_id)."""


class _Line:
    """Those who want the turn of one poll or one request_id."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.waiting = 0
        # Whether the latest attempt found a lock.
        self.locked = False


class Turns:
    """Runs commands, each in a transaction."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._lines: dict[Name, _Line] = {}
        self._for_locked = asyncio.Semaphore(CONNECTIONS_FOR_LOCKED)

    async def take(
        self,
        names: Sequence[Name],
        command: Callable[[asyncpg.Connection], Awaitable[T]],
        seconds: float,
        connections: asyncio.Semaphore | None = None,
    ) -> T:
        """Runs a command in a transaction, after those before it with one of these names; a request comes before a
        poll. It may run several times; only the last one takes effect. `connections`: what commands of its kind share.

        Raises LOCKED where it had no turn, or found a lock, for so many seconds; OVERLOADED where too many wait.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        async with AsyncExitStack() as turns:
            lines = [await turns.enter_async_context(self._turn(name, until)) for name in names]
            backoff = Backoff(longest=1.0)
            while True:
                gates = [self._for_locked] if any(line.locked for line in lines) else []
                try:
                    async with AsyncExitStack() as gate, asyncio.timeout_at(until):
                        for each in (*gates, connections) if connections else gates:
                            await gate.enter_async_context(each)
                        result = await self._attempt(command)
                except asyncpg.LockNotAvailableError:
                    _locks.inc()
                    for line in lines:
                        line.locked = True
                    if loop.time() + _LEAST_SECONDS > until:
                        raise locked() from None
                    await backoff.wait()
                except TimeoutError:
                    if any(line.locked for line in lines):
                        raise locked() from None
                    raise
                else:
                    for line in lines:
                        line.locked = False
                    return result

    async def _attempt(self, command: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        async with self._pool.acquire(timeout=POOL_SECONDS) as connection, connection.transaction():
            return await command(connection)

    @asynccontextmanager
    async def _turn(self, name: Name, until: float) -> AsyncIterator[_Line]:
        line = self._lines.setdefault(name, _Line())
        if line.waiting >= WAITING:
            raise Refusal(ErrorReason.ERROR_REASON_OVERLOADED, f"too many commands wait for this {name[0]}; try again")
        line.waiting += 1
        try:
            try:
                async with asyncio.timeout_at(until):
                    await line.turn.acquire()
            except TimeoutError:
                raise locked() from None
            try:
                yield line
            finally:
                line.turn.release()
        finally:
            line.waiting -= 1
            if not line.waiting:
                del self._lines[name]
