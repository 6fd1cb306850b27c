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
