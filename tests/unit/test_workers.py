"""Workers that die: when they are started again."""

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from runtime import workers


@pytest.mark.parametrize(("stable_seconds", "failures"), [(0.0, [1, 1, 1]), (60.0, [1, 2, 3])])
async def test_one_that_ran_for_a_while_is_replaced_after_the_shortest_pause(
    monkeypatch: pytest.MonkeyPatch, stable_seconds: float, failures: list[int]
) -> None:
    monkeypatch.setattr(workers, "_STABLE_SECONDS", stable_seconds)
    said: list[Any]
    with capture_logs() as said:
        keeping = asyncio.create_task(workers._keep(["/bin/sh", "-c", "exit 3"], {}))
        async with asyncio.timeout(10):
            while len(said) < 3:
                await asyncio.sleep(0.01)
        keeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeping
    assert [(line["code"], line["failures"]) for line in said[:3]] == [(3, number) for number in failures]
