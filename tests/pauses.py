"""How long work holds up everything else on the event loop."""

import asyncio
import gc
import time
from collections.abc import Awaitable


async def longest_pause(work: Awaitable[object]) -> tuple[float, float]:
    """For how long at most the loop served nothing else during some work, and how long the work took; seconds."""
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


async def longest_hold(work: Awaitable[object]) -> float:
    """The most processor time that the loop's thread took between two of its turns during some work; seconds.

    Unlike the time that passes, it does not grow because the machine is busy. Garbage is not collected meanwhile.
    """
    holds = [0.0]

    async def tick() -> None:
        before = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            holds.append(now - before)
            before = now

    gc.collect()
    gc.disable()
    ticking = asyncio.ensure_future(tick())
    try:
        await work
    finally:
        ticking.cancel()
        gc.enable()
    return max(holds)
