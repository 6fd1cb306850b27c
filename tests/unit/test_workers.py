"""Workers: what each of them is told, and when one that died is started again."""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from runtime import workers
from runtime.settings import Listen, ServerSettings


class _Settings(ServerSettings):
    server_listen: Listen = "127.0.0.1:0"


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


@pytest.mark.parametrize(("listen", "third"), [("[::1]:9100", "[::1]:9102"), ("127.0.0.1:0", "127.0.0.1:0"), ("", "")])
def test_each_worker_has_a_port_for_its_metrics(listen: str, third: str) -> None:
    assert workers.nth_port(listen, 2) == third


def test_ports_beyond_the_last_one_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLY_METRICS_LISTEN", "127.0.0.1:65534")
    assert workers.settings_from(["--workers", "2"], "server", ServerSettings).workers == 2
    with pytest.raises(SystemExit, match="TALLY_METRICS_LISTEN: each of 3 workers"):
        workers.settings_from(["--workers", "3"], "server", ServerSettings)


async def test_a_machine_that_can_only_be_read_is_told_what_workers_need(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As `tempfile` finds no folder of its own.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(SystemExit, match="set TMPDIR"):
        await workers.run("server", _Settings(workers=2), "server_listen", asyncio.Event())
