"""Large answers that are being sent: bounded in bytes, for each connection and for all.

gRPC copies a message, and keeps the copy until the reader has taken it: for a reader that takes nothing until its
connection ends, also after its call has ended. So a large message waits here before it is given to gRPC, where a
watcher's costs nothing because all watchers share it. A connection that has nothing under way finds room also while
others, which read nothing, have taken theirs.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import grpc
from prometheus_client import Gauge
from tally.poll.v1.error_reason_pb2 import ErrorReason

from contracts.refusals import Refusal
from query_server.freshness import patience

Context = grpc.aio.ServicerContext[Any, Any]

# Below this a message is small beside what gRPC keeps for each call anyway.
LARGE = 4 << 10
# Bytes under way: of one connection, of all, and of connections that have nothing else under way, above all.
_CONNECTION_BYTES = 4 << 20
_BYTES = 48 << 20
_RESERVE = 48 << 20
# Bytes of finished answers that wait for room.
_WAITING_BYTES = 64 << 20
# Calls that gather results of several polls at a time, 3 MiB each.
_BATCHES = 16

_sending = Gauge("tally_query_sending_bytes", "Bytes of large answers that were given to gRPC and not taken yet.")


class _Wait(NamedTuple):
    peer: str
    size: int
    room: asyncio.Future[None]


class Outgoing:
    """How many bytes of large answers are under way."""

    def __init__(self) -> None:
        self._bytes = 0
        self._waiting_bytes = 0
        self._of_connection = Counter[str]()
        self._waits: dict[_Wait, None] = {}
        self._batches = asyncio.Semaphore(_BATCHES)

    @asynccontextmanager
    async def room(self, context: Context, size: int, seconds: float) -> AsyncIterator[None]:
        """Within it a large message, of `size` bytes, may be written to a stream.

        Waits up to `seconds`; raises OVERLOADED. Where writing is given up, the bytes count until gRPC ends the call.
        """
        peer = context.peer()
        await self._take(peer, size, seconds)
        try:
            yield
        except BaseException:
            self._give_at_the_end(context, peer, size)
            raise
        self._give(peer, size)

    @asynccontextmanager
    async def batch(self, seconds: float) -> AsyncIterator[None]:
        """One of a few that may gather several large results at a time. Waits up to `seconds`; raises OVERLOADED."""
        try:
            async with asyncio.timeout(seconds):
                await self._batches.acquire()
        except TimeoutError:
            raise _overloaded() from None
        try:
            yield
        finally:
            self._batches.release()

    async def send(self, context: Context, size: int) -> None:
        """Returns when a unary answer of `size` bytes may be returned.

        Waits as long as the call may; raises OVERLOADED.
        """
        if size < LARGE:
            return
        peer = context.peer()
        if self._waiting_bytes + size > _WAITING_BYTES:
            raise _overloaded()
        self._waiting_bytes += size
        try:
            await self._take(peer, size, patience(context))
        finally:
            self._waiting_bytes -= size
        self._give_at_the_end(context, peer, size)

    def _give_at_the_end(self, context: Context, peer: str, size: int) -> None:
        context.add_done_callback(lambda _: self._give(peer, size))  # type: ignore[arg-type]  # it takes any callable

    async def _take(self, peer: str, size: int, seconds: float) -> None:
        wait = _Wait(peer, size, asyncio.get_running_loop().create_future())
        self._waits[wait] = None
        self._let_in()
        try:
            async with asyncio.timeout(seconds):
                await asyncio.shield(wait.room)
        except BaseException as error:
            if wait in self._waits:
                del self._waits[wait]
            else:
                self._give(peer, size)
            if isinstance(error, TimeoutError):
                raise _overloaded() from None
            raise

    def _give(self, peer: str, size: int) -> None:
        self._bytes -= size
        self._of_connection[peer] -= size
        if not self._of_connection[peer]:
            del self._of_connection[peer]
        self._let_in()

    def _let_in(self) -> None:
        """Lets in those for which there is room, in the order in which they came."""
        for wait in tuple(self._waits):
            of_connection = self._of_connection[wait.peer]
            limit = _BYTES if of_connection else _BYTES + _RESERVE
            if self._bytes + wait.size > limit or (of_connection and of_connection + wait.size > _CONNECTION_BYTES):
                continue
            del self._waits[wait]
            self._bytes += wait.size
            self._of_connection[wait.peer] = of_connection + wait.size
            wait.room.set_result(None)
        _sending.set(self._bytes)


def _overloaded() -> Refusal:
    message = "as many large answers are under way as this server can hold; ask again"
    return Refusal(ErrorReason.ERROR_REASON_OVERLOADED, message)
