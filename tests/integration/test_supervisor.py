"""Processes that are restarted when they die and never left behind: small programs in place of real servers."""

import asyncio
import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from runtime import supervisor
from runtime.supervisor import Died, Process, Program, Supervisor, supervise

ROOT = Path(__file__).parents[2]
RUNS = "open(READY, 'w').close(); signal.pause()"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); open(READY, 'w').close()\nwhile True: signal.pause()"


def program(directory: Path, name: str, body: str = RUNS) -> Program:
    """A program of a few lines of Python, that is ready once it has written the file READY."""
    ready = directory / f"{name}.ready"
    code = f"import os, signal, subprocess, sys, time\nREADY = {str(ready)!r}\n{textwrap.dedent(body)}"
    return Program(name=name, command=[sys.executable, "-I", "-S", "-c", code], ready=ready)


class Watched:
    """A supervisor, and what it said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.supervisor: Supervisor

    def process(self, name: str) -> Process:
        return next(process for process in self.supervisor.processes if process.name == name)


@asynccontextmanager
async def supervising(directory: Path, stop_seconds: float, *programs: Program) -> AsyncIterator[Watched]:
    watched = Watched()
    async with supervise(directory, say=watched.said.append) as watched.supervisor:
        await watched.supervisor.start(programs, stop_seconds)
        yield watched


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


def gone(pid: int | None) -> bool:
    """Whether it runs no more; a process that only waits to be reaped by its parent is gone."""
    assert pid
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def recorded(directory: Path) -> dict[str, int]:
    return {entry["name"]: entry["pid"] for entry in json.loads((directory / "processes.json").read_text())}


async def test_a_process_that_dies_is_started_again(tmp_path: Path) -> None:
    async with supervising(tmp_path, 5, program(tmp_path, "one"), program(tmp_path, "two")) as watched:
        one, two = watched.process("one"), watched.process("two")
        first, other = one.pid, two.pid
        assert first
        os.kill(first, signal.SIGKILL)
        await until(lambda: any("one serves again" in said for said in watched.said))
        assert one.pid != first
        assert two.pid == other
        assert watched.said[0].startswith("one was killed by SIGKILL and is started again")
        assert recorded(tmp_path) == {"one": one.pid, "two": two.pid}
    assert gone(one.pid or first)
    assert gone(other)
    assert not (tmp_path / "processes.json").exists()


async def test_a_lost_log_or_a_broken_probe_stops_nothing_else(tmp_path: Path) -> None:
    broken = False

    async def probe() -> bool:
        nonlocal broken
        if broken:
            broken = False
            raise ValueError("no answer that we know")
        return True

    runs = [sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"]
    probed = Program(name="one", command=runs, ready=probe)
    async with supervising(tmp_path, 5, probed, program(tmp_path, "two")) as watched:
        first, other = watched.process("one").pid, watched.process("two").pid
        assert first
        (tmp_path / "logs" / "one.log").unlink()
        broken = True
        os.kill(first, signal.SIGKILL)
        await until(lambda: any("one serves again" in said for said in watched.said))
        assert any(said.startswith("no answer that we know\n") for said in watched.said)
        assert watched.process("two").pid == other


async def test_restarts_come_at_growing_intervals(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    dies = (
        f"print(time.time(), file=open({str(starts)!r}, 'a')); open(READY, 'w').close(); time.sleep(0.05); sys.exit(3)"
    )
    async with supervising(tmp_path, 5, program(tmp_path, "dies", dies)) as watched:
        await until(lambda: len(starts.read_text().split()) > 4)
    times = [float(line) for line in starts.read_text().split()]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert all(pause > 0.1 * 2**number for number, pause in enumerate(pauses))
    assert "dies ended with status 3 and is started again" in watched.said[0]


async def test_a_program_that_dies_before_it_is_ready_ends_the_start(tmp_path: Path) -> None:
    fails = program(tmp_path, "fails", "sys.exit('no such\\nsetting')")
    with pytest.raises(Died, match="fails ended with status 1\n    no such\n    setting"):
        async with supervising(tmp_path, 5, program(tmp_path, "runs"), fails):
            pass
    assert not (tmp_path / "processes.json").exists()


async def test_what_cannot_be_run_is_said(tmp_path: Path) -> None:
    missing = Program(name="missing", command=["/no/such/program"], ready=tmp_path / "ready")
    with pytest.raises(Died, match="/no/such/program: No such file or directory"):
        async with supervising(tmp_path, 5, missing):
            pass


async def test_a_stale_ready_file_does_not_count(tmp_path: Path) -> None:
    slow = program(tmp_path, "slow", f"time.sleep(0.3); {RUNS}")
    (tmp_path / "slow.ready").touch()
    began = time.monotonic()
    async with supervising(tmp_path, 5, slow):
        assert time.monotonic() - began > 0.3


async def test_groups_stop_in_reverse_order_and_may_finish(tmp_path: Path) -> None:
    ends = tmp_path / "ends"
    finishes = f"""
        def finish(*_):
            time.sleep(0.2)
            print(sys.argv[0], READY, file=open({str(ends)!r}, "a"))
            sys.exit(0)
        signal.signal(signal.SIGTERM, finish)
        {RUNS}
    """
    async with supervise(tmp_path, say=lambda _: None) as supervisor:
        await supervisor.start([program(tmp_path, "store", finishes)], 5)
        await supervisor.start([program(tmp_path, "service", finishes)], 5)
    assert [Path(line).stem for line in ends.read_text().splitlines()] == ["service", "store"]


async def test_a_deaf_process_is_killed_in_the_end(tmp_path: Path) -> None:
    async with supervising(tmp_path, 0.2, program(tmp_path, "deaf", DEAF)) as watched:
        pid = watched.process("deaf").pid
    assert gone(pid)
    assert watched.said == ["deaf did not end within 0.2 s and was killed"]


async def test_a_stopped_process_is_killed_in_the_end(tmp_path: Path) -> None:
    async with supervising(tmp_path, 0.2, program(tmp_path, "frozen")) as watched:
        pid = watched.process("frozen").pid
        watched.process("frozen").signal(signal.SIGSTOP)
    assert gone(pid)


async def test_what_a_process_started_goes_with_it(tmp_path: Path) -> None:
    child = tmp_path / "child"
    parent = f"print(subprocess.Popen(['sleep', '60']).pid, file=open({str(child)!r}, 'w'), flush=True); {RUNS}"
    async with supervising(tmp_path, 5, program(tmp_path, "parent", parent)) as watched:
        orphan = int(child.read_text())
        watched.process("parent").signal(signal.SIGKILL)
        await until(lambda: gone(orphan))
        await until(lambda: any("serves again" in said for said in watched.said))
        assert int(child.read_text()) != orphan


async def test_a_terminal_signal_does_not_reach_the_processes(tmp_path: Path) -> None:
    async with supervising(tmp_path, 5, program(tmp_path, "own")) as watched:
        pid = watched.process("own").pid
        assert pid
        assert os.getsid(pid) == os.getpgid(pid) == pid


async def test_nothing_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    supervisor = f"""
        import asyncio, pathlib, signal
        from runtime.supervisor import supervise
        from tests.integration.test_supervisor import DEAF, program
        async def main():
            directory = pathlib.Path({str(tmp_path)!r})
            async with supervise(directory, say=print) as supervisor:
                await supervisor.start([program(directory, "deaf", DEAF), program(directory, "plain")], 5)
                (directory / "all ready").touch()
                await asyncio.Event().wait()
        asyncio.run(main())
    """
    running = await asyncio.create_subprocess_exec(sys.executable, "-c", textwrap.dedent(supervisor), cwd=ROOT)
    await until((tmp_path / "all ready").exists)
    pids = recorded(tmp_path)
    assert set(pids) == {"deaf", "plain"}
    running.kill()
    await running.wait()
    await until(lambda: all(map(gone, pids.values())))


async def test_what_an_earlier_supervisor_left_is_stopped_and_nothing_else(tmp_path: Path) -> None:
    leftover, stranger = [await asyncio.create_subprocess_exec("sleep", "60", start_new_session=True) for _ in range(2)]
    try:
        created = psutil.Process(leftover.pid).create_time()
        entries = [
            {"name": "leftover", "pid": leftover.pid, "created": created, "signal": signal.SIGTERM.value},
            # The same number, but started at another time than what was recorded: somebody else's process.
            {"name": "stranger", "pid": stranger.pid, "created": created - 60, "signal": signal.SIGTERM.value},
        ]
        (tmp_path / "processes.json").write_text(json.dumps(entries))
        async with supervising(tmp_path, 5) as watched:
            assert gone(leftover.pid)
            assert not gone(stranger.pid)
        assert watched.said == [f"leftover, process {leftover.pid}, is left over from before and is stopped"]
    finally:
        stranger.kill()
        await asyncio.gather(leftover.wait(), stranger.wait())


async def test_logs_are_kept_and_turned_over_when_large(tmp_path: Path) -> None:
    talks = program(tmp_path, "talks", f"print('hello', flush=True); {RUNS}")
    log = tmp_path / "logs" / "talks.log"
    for _ in range(2):
        async with supervising(tmp_path, 5, talks):
            pass
    assert log.read_text() == "hello\nhello\n"
    os.truncate(log, 21 << 20)
    async with supervising(tmp_path, 5, talks):
        pass
    assert log.read_text() == "hello\n"
    assert (tmp_path / "logs" / "talks.log.1").stat().st_size == 21 << 20


async def test_the_output_of_all_can_be_watched(tmp_path: Path) -> None:
    lines: list[tuple[str, str]] = []
    talks = program(tmp_path, "talks", f"print('first', flush=True); {RUNS}")
    for _ in range(2):
        lines.clear()
        async with supervise(tmp_path, say=print, echo=lambda *line: lines.append(line)) as supervisor:
            await supervisor.start([talks], 5)
            await until(lambda: lines)
        assert lines == [("talks", "first")]


async def test_the_log_of_a_process_that_goes_on_writing_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_LOG_LIMIT_BYTES", 100_000)
    monkeypatch.setattr(supervisor, "_LOG_LOOK_SECONDS", 0.01)
    talks = program(
        tmp_path,
        "talks",
        """
        open(READY, 'w').close()
        number = 0
        while True:
            number += 1
            os.write(1, b"line %d\\n" % number)
            if not number % 100: time.sleep(0.001)
        """,
    )
    log, older = tmp_path / "logs" / "talks.log", tmp_path / "logs" / "talks.log.1"
    async with supervising(tmp_path, 5, talks) as watched:
        pid = watched.process("talks").pid
        for _ in range(3):
            await until(older.exists)
            last = older.read_bytes()
            older.unlink()
            assert last.startswith(b"line ")
            assert log.stat().st_size < 20_000_000
        assert watched.process("talks").pid == pid
        await until(lambda: watched.process("talks").last_lines().count("line ") == 10)


async def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "one.log"
    log.mkdir(parents=True)
    async with supervising(tmp_path, 5, program(tmp_path, "one")) as watched:
        assert watched.process("one").pid
        assert watched.process("one").last_lines() == ""
    assert watched.said == [f"one runs without a log: [Errno 21] Is a directory: '{log}'"]


@pytest.mark.parametrize(
    "content",
    [
        "5",
        "null",
        "{}",
        '[{"pid": 1}, 5, null, [], "x"]',
        '[{"name": "x", "pid": -1, "created": 1, "signal": 9}]',
        '[{"name": "x", "pid": 1, "created": 1, "signal": 9}, {"name": "x", "pid": 2, "created": "x", "signal": 9}]',
        '[{"name": "x", "pid": 99999999999999999999, "created": 1.0, "signal": 9}]',
        '[{"name": "x", "pid": 2, "created": 1.0, "signal": 9999}]',
        "[" * 100_000,
        "\x00",
    ],
)
async def test_a_record_that_no_supervisor_wrote_stops_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "processes.json").write_text(content)
    async with supervising(tmp_path, 5) as watched:
        assert watched.said == []


async def test_a_folder_in_the_place_of_the_record_is_said_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "processes.json").mkdir()
    async with supervising(tmp_path, 5, program(tmp_path, "one")) as watched:
        assert watched.process("one").pid
    assert {line.partition(":")[0] for line in watched.said} == {"the record of the processes cannot be written"}


async def test_a_leftover_of_another_user_is_named_and_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign, own = [await asyncio.create_subprocess_exec("sleep", "60", start_new_session=True) for _ in range(2)]
    kill, killpg = os.kill, os.killpg

    def refuse(pid: int, number: int) -> None:
        if pid == foreign.pid:
            raise PermissionError(1, "Operation not permitted")
        kill(pid, number)

    def refuse_group(pid: int, number: int) -> None:
        refuse(pid, 0)
        killpg(pid, number)

    entries = [
        {"name": name, "pid": child.pid, "created": psutil.Process(child.pid).create_time(), "signal": 15}
        for name, child in (("foreign", foreign), ("own", own))
    ]
    (tmp_path / "processes.json").write_text(json.dumps(entries))
    monkeypatch.setattr(supervisor, "_LEFTOVER_SECONDS", 0.1)
    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setattr(os, "killpg", refuse_group)
    try:
        async with supervising(tmp_path, 5) as watched:
            await until(lambda: gone(own.pid))
            assert not gone(foreign.pid)
        assert f"process {foreign.pid} belongs to another user: stop it by hand" in watched.said
    finally:
        monkeypatch.undo()
        foreign.kill()
        await asyncio.gather(foreign.wait(), own.wait())
