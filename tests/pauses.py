"""How long work holds up everything else on the event loop."""

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable


async def longest_pause(work: Awaitable[object]) -> tuple[float, float]:
    """For how long at most the loop served nothing else during some work, and how long the work took; seconds."""
    started = time.perf_counter()
    longest = await _longest_turn(work, time.perf_counter)
    return longest, time.perf_counter() - started


async def longest_hold(work: Awaitable[object]) -> float:
    """The most processor time that the loop's thread took between two of its turns during some work; seconds.

    Unlike the time that passes, it does not grow because the machine is busy. Garbage is not collected meanwhile.
    """
    gc.collect()
    gc.disable()
    try:
        return await _longest_turn(work, time.thread_time)
    finally:
        gc.enable()


async def _longest_turn(work: Awaitable[object], clock: Callable[[], float]) -> float:
    turns = [0.0]

    async def tick() -> None:
        before = clock()
        while True:
            await asyncio.sleep(0)
            now = clock()
            turns.append(now - before)
            before = now

    ticking = asyncio.ensure_future(tick())
    try:
        await work
    finally:
        ticking.cancel()
    return max(turns)
