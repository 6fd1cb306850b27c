"""How a gRPC server ends without a call that is lost: new calls are kept waiting while those under way end, then every
connection is closed, and callers get UNAVAILABLE for what was kept waiting, which any retry policy repeats.

gRPC's own stop announces the end to clients with a GOAWAY, but what they send before they have read it is answered
CANCELLED, which nothing repeats (grpc/grpc issues 24237 and 41785). It has no way to send the GOAWAY alone.
"""

import asyncio
import ctypes
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")

# What clients that watch the health need to go elsewhere.
_FAREWELL_SECONDS = 0.1
# Streams and then calls have so long to end; together with the rest five seconds.
_STREAMS_SECONDS = 3.5
_CALLS_SECONDS = 1.0
# Between the end of a handler and its answer on the wire.
_ANSWER_SECONDS = 0.05
_CLOSE_SECONDS = 0.3
_LOOK_SECONDS = 0.005

_SO_ATTACH_FILTER = 26


class Stopping(Exception):  # noqa: N818 - says what the server does
    """The server takes nothing more: the caller sends the same to another one, or again."""

    def __init__(self) -> None:
        super().__init__("this server is stopping; ask again")


class Drain:
    """The calls of one server that are under way."""

    def __init__(self) -> None:
        # Unary calls that have begun, and streams.
        self.calls = 0
        self._streams = 0
        # Whether new calls are kept waiting.
        self.holding = False
        self._stopping = False
        self._closed = asyncio.Event()
        # Tasks that wait for the next request of a stream.
        self._reading: set[asyncio.Task[Any]] = set()

    async def hold(self) -> None:
        """Waits with a new call until the connections are closed, and raises Stopping."""
        await self._closed.wait()
        raise Stopping

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Counts a stream that is under way."""
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    async def read(self, read: Callable[[], Awaitable[T]]) -> T:
        """The next request of a stream, as `read` gives it. Raises Stopping in its place when the server ends."""
        if self._stopping:
            raise Stopping
        task = asyncio.current_task()
        assert task is not None
        self._reading.add(task)
        try:
            return await read()
        except asyncio.CancelledError:
            if self._stopping and task not in self._reading and not task.uncancel():
                raise Stopping from None
            raise
        finally:
            self._reading.discard(task)

    async def run(self, port: int) -> None:
        """Ends all calls and then the connections to `port`, within five seconds."""
        if any(_sockets(port, listening=False)):
            await asyncio.sleep(_FAREWELL_SECONDS)
        self._stopping = True
        reading, self._reading = self._reading, set()
        for task in reading:
            task.cancel()
        await self._until(lambda: not self._streams, _STREAMS_SECONDS)
        self.holding = True
        await self._until(lambda: not self.calls, _CALLS_SECONDS)
        for end in _sockets(port, listening=True):
            _deafen(end)
        await asyncio.sleep(_ANSWER_SECONDS)
        # Again until gRPC has closed them: it may take one yet that had connected before.
        await self._until(lambda: not _shut_all(port), _CLOSE_SECONDS)
        self._closed.set()

    async def _until(self, ended: Any, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not ended():
                    await asyncio.sleep(_LOOK_SECONDS)


def _sockets(port: int, *, listening: bool) -> Iterator[socket.socket]:
    """The sockets of this process on one of its ports: what listens there, or the connections to it."""
    for name in os.listdir("/dev/fd"):
        try:
            descriptor = os.dup(int(name))
        except OSError:
            # Closed meanwhile.
            continue
        try:
            end = socket.socket(fileno=descriptor)
        except OSError:
            # Not a socket.
            os.close(descriptor)
            continue
        with closing(end), suppress(OSError):
            if (
                end.family in (socket.AF_INET, socket.AF_INET6)
                and end.type == socket.SOCK_STREAM
                and end.getsockname()[1] == port
                and bool(end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)) == listening
            ):
                yield end


def _deafen(listener: socket.socket) -> None:
    """Lets nothing connect any more: callers that were sent away would be back at once, and run into gRPC's stop."""
    # A packet filter of one instruction, "take nothing". An end of the listening itself would be an error to gRPC, and
    # a line of its own kind on stderr.
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(instruction)))
    except OSError:
        # Not Linux.
        _shut(listener)


def _shut_all(port: int) -> int:
    """Shuts the connections to a port; returns how many there still are."""
    ends = 0
    for end in _sockets(port, listening=False):
        _shut(end)
        ends += 1
    return ends


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
