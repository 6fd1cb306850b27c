"""A TCP proxy before a real server: it cuts, refuses, or goes silent as a broken network does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit, urlunsplit


class Proxy:
    """Passes connections on to a server until it is told otherwise; made by `proxy`."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._pass = asyncio.Event()
        self._pass.set()
        self.port = 0
        # How many bytes came through, either way.
        self.passed = 0
        # How many of the next connections are broken as soon as they are made.
        self.to_break = 0

    async def restore(self) -> None:
        """Listens, on the same port as before, and passes on; what was held back by `silence` is delivered."""
        self._pass.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._connection, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Breaks every connection and refuses new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._writers:
            writer.transport.abort()
        # The ends learn of it in the next turns of the loop.
        await asyncio.sleep(0)

    def silence(self) -> None:
        """Connections stay, and can be made, but nothing comes through any more."""
        self._pass.clear()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.to_break, to_break = max(self.to_break - 1, 0), self.to_break
        # It may have been accepted just before the proxy was cut.
        if to_break or self._server is None:
            writer.transport.abort()
            return
        ends = [writer]
        self._writers.add(writer)
        try:
            with suppress(OSError):
                upstream = await asyncio.open_connection("127.0.0.1", self._target)
                ends.append(upstream[1])
                self._writers.add(upstream[1])
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._copy(reader, upstream[1]))
                    tasks.create_task(self._copy(upstream[0], writer))
        finally:
            for end in ends:
                self._writers.discard(end)
                end.close()

    async def end(self) -> None:
        """Breaks every connection and waits until nothing of it is left, so that no later test hears of it."""
        await self.restore()
        async with asyncio.timeout(10):
            await self.cut()
            while self._writers:
                await asyncio.sleep(0.001)
                await self.cut()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._pass.wait()
                self.passed += len(data)
                writer.write(data)
                await writer.drain()
        writer.close()


def through(dsn: str, port: int) -> str:
    """The same database by another port."""
    url = urlsplit(dsn)
    return urlunsplit(url._replace(netloc=f"{url.netloc.rpartition(':')[0]}:{port}"))


@asynccontextmanager
async def proxy(port: int) -> AsyncIterator[Proxy]:
    """A proxy on a free port of 127.0.0.1, before the server on `port`."""
    made = Proxy(port)
    await made.restore()
    try:
        yield made
    finally:
        await made.end()
