"""Long work in slices, so that it holds up no other call."""

import asyncio
import time

# A step that follows may take as long again and more.
_SLICE_SECONDS = 0.005


class Pace:
    """`await pace()` between the steps of long work lets the loop serve others, once a slice of time is used up."""

    __slots__ = ("_since",)

    def __init__(self) -> None:
        self._since = time.perf_counter()

    async def __call__(self) -> None:
        if time.perf_counter() - self._since > _SLICE_SECONDS:
            await asyncio.sleep(0)
            self._since = time.perf_counter()
