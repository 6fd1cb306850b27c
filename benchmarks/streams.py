"""Readers of a server stream in a process of their own: `python -m benchmarks.streams`, its orders as JSON on stdin.

It opens so many streams of `method` with the same `request` (hex), over so many connections, and says "ready" once each
has had its first message. For each line that it gets then, it reads until all have had so many `messages` more, or all
have ended, for `seconds` at most, and prints as JSON: {"complete", "at", "seen"}: whether it came to that, when
(time.perf_counter), and when the first stream showed which version, since it was opened.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import grpc
import uvloop
from tally.query.v1.query_service_pb2 import WatchResultsResponse

# Each channel has a connection of its own.
_OPTIONS = [("grpc.use_local_subchannel_pool", 1)]
# Streams that are opened at once.
_OPENING = 500


class Readers:
    """All streams, and what they have had."""

    def __init__(self, streams: int) -> None:
        self._streams = streams
        # How many streams have had so many messages.
        self._have_had = Counter[int]()
        self._last_one = asyncio.Event()
        self._seen: list[tuple[float, bytes]] = []

    async def read(self, call: Any, *, first: bool) -> None:
        """Reads a stream to its end."""
        had = 0
        while (message := await call.read()) is not grpc.aio.EOF:
            if first:
                self._seen.append((time.perf_counter(), message))
            had += 1
            self._have_had[had] += 1
            if self._have_had[had] == self._streams:
                self._last_one.set()

    async def all_have_had(self, messages: int) -> None:
        """Waits until every stream has had so many messages."""
        while self._have_had[messages] < self._streams:
            self._last_one.clear()
            await self._last_one.wait()

    def seen(self) -> list[tuple[float, int]]:
        """When the first stream showed which version."""
        return [(when, WatchResultsResponse.FromString(message).results.version) for when, message in self._seen]


async def main() -> None:
    orders = json.loads(sys.stdin.readline())
    request, streams = bytes.fromhex(orders["request"]), orders["streams"]
    readers = Readers(streams)
    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(orders["address"], _OPTIONS))
            for _ in range(orders["connections"])
        ]
        open_stream: list[Any] = [channel.unary_stream(orders["method"]) for channel in channels]
        reading = []
        for start in range(0, streams, _OPENING):
            numbers = range(start, min(start + _OPENING, streams))
            calls = [open_stream[number % len(channels)](request) for number in numbers]
            reading += [
                asyncio.create_task(readers.read(call, first=number == 0))
                for call, number in zip(calls, numbers, strict=True)
            ]
            await asyncio.gather(*(call.initial_metadata() for call in calls))
        ended = asyncio.create_task(asyncio.wait(reading))
        await readers.all_have_had(1)
        print("ready", flush=True)
        messages = 1
        while await asyncio.to_thread(sys.stdin.readline):
            messages += orders["messages"]
            complete = asyncio.create_task(readers.all_have_had(messages))
            await asyncio.wait([ended, complete], timeout=orders["seconds"], return_when=asyncio.FIRST_COMPLETED)
            at = time.perf_counter()
            answer = {"complete": complete.done() or ended.done(), "at": at, "seen": readers.seen()}
            complete.cancel()
            print(json.dumps(answer), flush=True)
        for task in reading:
            if task.done():
                task.result()
            task.cancel()


if __name__ == "__main__":
    uvloop.run(main())
