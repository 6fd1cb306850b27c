"""The life of a process: it runs until SIGTERM, SIGINT or SIGHUP, then finishes what it accepted."""

from __future__ import annotations

import asyncio
import gc
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import uvloop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from runtime.settings import Settings

log = structlog.get_logger()


def run(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Runs `main` on an event loop. The event it is given is set by SIGTERM, SIGINT and SIGHUP: time to finish and
    return. Under nohup SIGHUP stays ignored."""

    async def supervised() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, stop.set)
        await main(stop)

    settle_memory()
    uvloop.run(supervised())


def settle_memory() -> None:
    """Spares the garbage collector what is loaded by now, which stays, and looks at what calls leave behind, which is
    hardly ever a cycle, a seventh as often as Python would: that took a fifth of the time of a server under load. More
    seldom would be worse: a look takes longer the more has gathered, 37 ms at 50,000 objects, and every call waits.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 100)


def announce(event: str, settings: Settings, **details: object) -> None:
    """Says, in the log and in the ready file, that the process does its work from now on."""
    if settings.ready_file:
        try:
            Path(settings.ready_file).write_text(event)
        except OSError as error:
            # The work goes on: a process that waits for the file finds it missing, or empty on a full disk.
            log.error("the ready file cannot be written", file=settings.ready_file, error=error.strerror)
    log.info(event, **details)


class Backoff:
    """Growing pauses between attempts: doubled each time, from `first` up to `longest` seconds; `reset` on success."""

    def __init__(self, first: float = 0.05, longest: float = 5.0) -> None:
        self._first = first
        self._longest = longest
        self.failures = 0

    async def wait(self) -> None:
        task = asyncio.current_task()
        if task and task.cancelling():
            # In Python 3.11 a task group that is cancelled while one of its tasks fails raises only the failure.
            raise asyncio.CancelledError
        # Bounded before it grows: an int of more than 1,024 bits is no float.
        pause = min(self._first * 2 ** min(self.failures, 30), self._longest)
        self.failures += 1
        await asyncio.sleep(pause)

    def reset(self) -> None:
        self.failures = 0


def reasons(failures: BaseExceptionGroup[BaseException]) -> list[str]:
    """What failed, one by one, for the log."""
    found: list[str] = []
    for failure in failures.exceptions:
        found += reasons(failure) if isinstance(failure, BaseExceptionGroup) else [repr(failure)]
    return found
