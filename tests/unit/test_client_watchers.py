"""When a watcher asks again, and when it gives up, where a server ends its streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from tally.poll.v1.poll_pb2 import POLL_STATE_CLOSED, POLL_STATE_OPEN
from tally.query.v1.query_service_pb2 import Results, WatchResultsRequest, WatchResultsResponse

from clients import watchers
from clients.connection import Address, QueryServer, Refused


class Breaking:
    """Ends every stream so many seconds after the first results, which are the same each time."""

    def __init__(self, seconds: float, streams: int) -> None:
        """After so many streams, the poll is closed."""
        self._seconds = seconds
        self._left = streams
        self.asked = 0

    async def watch(self, _: WatchResultsRequest, context: Any) -> AsyncIterator[WatchResultsResponse]:
        self.asked += 1
        state, version = (POLL_STATE_OPEN, 3) if self.asked <= self._left else (POLL_STATE_CLOSED, 4)
        yield WatchResultsResponse(results=Results(state=state, version=version))
        await asyncio.sleep(self._seconds)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "broken")


@asynccontextmanager
async def watched(service: Breaking) -> AsyncIterator[QueryServer]:
    server = grpc.aio.server()
    method = grpc.unary_stream_rpc_method_handler(
        service.watch, WatchResultsRequest.FromString, WatchResultsResponse.SerializeToString
    )
    handlers = grpc.method_handlers_generic_handler("tally.query.v1.QueryService", {"WatchResults": method})
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with QueryServer(Address(f"127.0.0.1:{port}")) as queries:
            yield queries
    finally:
        await server.stop(None)


async def versions(queries: QueryServer, on_lost: Callable[[str], None]) -> list[int]:
    async with asyncio.timeout(10):
        changes = watchers.watch(queries, "poll", retry_for=0.5, on_lost=on_lost)
        return [results.version async for results in changes]


async def test_a_server_that_breaks_every_stream_at_once_is_given_up() -> None:
    told: list[str] = []
    service = Breaking(seconds=0.0, streams=1_000)
    async with watched(service) as queries:
        with pytest.raises(Refused, match="broken"):
            await versions(queries, told.append)
    assert service.asked < 10
    assert told


async def test_streams_that_end_now_and_then_are_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchers, "_SETTLED_SECONDS", 0.1)
    told: list[str] = []
    async with watched(Breaking(seconds=0.2, streams=6)) as queries:
        assert await versions(queries, told.append) == [3, 4]
    assert not told
