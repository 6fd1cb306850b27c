"""Pauses between attempts."""

from __future__ import annotations

import asyncio

import pytest

from runtime import lifecycle


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
