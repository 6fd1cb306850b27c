"""Long work in slices, so that it holds up no other call."""

import asyncio
import time

# A step that begins within it may take as long again and more.
_SLICE_SECONDS = 0.002


class Pace:
    """`await pace()` between the steps of long work lets the loop serve others, once a slice of time is used up.

    Of all work with the same `turns` one slice is done in each turn of the loop, however much of it there is.
    """

    __slots__ = ("_since", "_turns")

    def __init__(self, turns: asyncio.Lock) -> None:
        self._turns = turns
        self._since = time.perf_counter()

    async def __call__(self) -> None:
        if time.perf_counter() - self._since > _SLICE_SECONDS:
            async with self._turns:
                await asyncio.sleep(0)
            self._since = time.perf_counter()
