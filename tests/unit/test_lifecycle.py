"""The signals that end a process, and pauses between attempts."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime import lifecycle

_PROCESS = """
from runtime import lifecycle

async def main(stop):
    print("begun", flush=True)
    await stop.wait()
    print("finished")

lifecycle.run(main)
"""


_WITH_DEFAULTS = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_process_finishes_what_it_accepted(number: signal.Signals) -> None:
    with _process() as process:
        process.send_signal(number)
        assert process.communicate(timeout=30)[0] == "finished\n"
        assert process.returncode == 0


def test_a_process_outlives_its_terminal_under_nohup() -> None:
    with _process("nohup") as process:
        # The bit of SIGHUP among the signals that it ignores.
        status = Path(f"/proc/{process.pid}/status").read_text()
        [ignored] = re.findall(r"^SigIgn:\s*([0-9a-f]+)$", status, re.MULTILINE)
        assert int(ignored, 16) & 1 << (signal.SIGHUP - 1)
        process.terminate()
        assert process.communicate(timeout=30)[0] == "finished\n"


@contextmanager
def _process(*before: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has begun; `before`: what runs it."""
    # These tests may themselves run under nohup, or behind a shell that ignores Ctrl-C.
    program = _PROCESS if before else _WITH_DEFAULTS + _PROCESS
    command = [*before, sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            yield process
        finally:
            process.kill()


async def test_pauses_grow_to_the_longest_and_stay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def note(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", note)
    backoff = lifecycle.Backoff(first=0.1, longest=1.0)
    # An outage of an hour.
    for _ in range(3600):
        await backoff.wait()
    assert pauses[:5] == [0.1, 0.2, 0.4, 0.8, 1.0]
    assert set(pauses[5:]) == {1.0}
    backoff.reset()
    await backoff.wait()
    assert pauses[-1] == 0.1


async def test_a_cancellation_that_a_task_group_has_swallowed_takes_effect() -> None:
    """A loop that tries for ever must end even where the cancellation met a failure."""
    attempts = 0

    async def fail_on_cancel() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise OSError("the connection broke at that moment")

    async def try_for_ever() -> None:
        nonlocal attempts
        backoff = lifecycle.Backoff(first=0.01, longest=0.01)
        while True:
            attempts += 1
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(fail_on_cancel())
            except* OSError:
                pass
            await backoff.wait()

    task = asyncio.create_task(try_for_ever())
    await asyncio.sleep(0.01)
    task.cancel()
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert attempts == 1
