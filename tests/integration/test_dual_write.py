"""The example of the dual-write hazard: real processes, killed between their steps, on the real Postgres and NATS."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from examples.dual_write.__main__ import Outcome, as_json, as_table, compare_ways

_README = Path("examples/dual_write/README.md").read_text()


@pytest.fixture
async def outcomes(write_dsn: str, nats_url: str) -> list[Outcome]:
    return await compare_ways(write_dsn, nats_url)


async def test_only_the_outbox_keeps_database_and_stream_equal(outcomes: list[Outcome]) -> None:
    stores = {outcome.scenario: (outcome.acknowledged, outcome.in_database, outcome.on_stream) for outcome in outcomes}
    assert stores == {
        "lost_event": ([1, 3], [1, 2, 3], [1, 3]),
        "ghost_event": ([1, 3], [1, 3], [1, 2, 3]),
        "ghost_in_transaction": ([1, 3], [1, 3], [1, 2, 3]),
        "outbox_stored": ([1, 3], [1, 2, 3], [1, 2, 3]),
        "outbox_announced": ([1, 3], [1, 3], [1, 3]),
        "outbox_relay": ([1, 2, 3], [1, 2, 3], [1, 2, 3]),
    }
    faults = {
        row["scenario"]: (row["lost"], row["ghosts"], row["doubled"], row["agrees"])
        for row in json.loads(as_json(outcomes))["outcomes"]
    }
    nothing: tuple[list[int], list[int], list[int], bool] = ([], [], [], True)
    assert faults == {
        "lost_event": ([2], [], [], False),
        "ghost_event": ([], [2], [], False),
        "ghost_in_transaction": ([], [2], [], False),
        "outbox_stored": nothing,
        "outbox_announced": nothing,
        "outbox_relay": nothing,
    }
    console = Console(width=80, highlight=False)
    with console.capture() as printed:
        console.print(as_table(outcomes))
    lines = [line.rstrip() for line in printed.get().splitlines() if line.strip()]
    assert "\n".join(lines) in _README
