"""How long work holds up everything else on the event loop."""

import asyncio
import time
from collections.abc import Awaitable


async def longest_pause(work: Awaitable[object]) -> tuple[float, float]:
    """For how long at most the loop served nobody else during some work, and how long the work took; seconds."""
    pauses: list[float] = []

    async def tick() -> None:
        before = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            pauses.append(now - before)
            before = now

    ticking = asyncio.ensure_future(tick())
    started = time.perf_counter()
    await work
    seconds = time.perf_counter() - started
    ticking.cancel()
    return max(pauses), seconds
