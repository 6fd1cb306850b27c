"""`tally up`: the whole product as a child process of the test."""

import asyncio
import json
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import grpc
import psutil
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from tally.command.v1.command_service_pb2 import CreatePollRequest
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub
from tally.poll.v1.poll_pb2 import VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec

from clients.failures import Failure
from clients.up import _RECORDED, _start_services, run
from runtime import embedded
from runtime.supervisor import Died, Program, Supervisor
from tests.servers import sql, views_of

PROCESSES = {"command_server": 1, "query_server": 1, "relay": 1, "projector": 3, "postgres": 1, "nats": 1, "redis": 1}
ADDRESSES = {"command_address", "query_address", "write_dsn", "read_dsn", "nats_url", "redis_url"}
NONE_SET = {f"TALLY_{name}": "" for name in ("WRITE_DSN", "READ_DSN", "NATS_URL", "REDIS_URL", "VOTER_SECRET")}


class Up:
    """A `tally up`, with what it has printed."""

    def __init__(self, directory: Path, child: asyncio.subprocess.Process) -> None:
        self.directory = directory
        self.child = child
        self.printed = ""

    @property
    def run(self) -> dict[str, Any]:
        run: dict[str, Any] = json.loads((self.directory / "run.json").read_text())
        return run

    @property
    def pids(self) -> list[int]:
        return [pid for pids in self.run["processes"].values() for pid in pids]

    async def prints(self, text: str) -> None:
        """Reads on until it has printed this, or fails when it ends before that."""
        assert self.child.stdout
        async with asyncio.timeout(60):
            while text not in self.printed:
                line = await self.child.stdout.readline()
                assert line, f"it ended without: {text}\n{self.printed}"
                self.printed += line.decode()

    async def end(self) -> int:
        """Reads what it still prints until it ends; returns its exit code."""
        assert self.child.stdout
        async with asyncio.timeout(60):
            self.printed += (await self.child.stdout.read()).decode()
            return await self.child.wait()


async def start(directory: Path, *options: str, environment: Mapping[str, str] = NONE_SET) -> Up:
    command = [sys.executable, "-c", "from clients.cli import main; main()", "up", "--data-dir", str(directory)]
    child = await asyncio.create_subprocess_exec(
        *command,
        *(options or ("--command-port", "0", "--query-port", "0")),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **NONE_SET, **environment},
        start_new_session=True,
    )
    return Up(directory, child)


@asynccontextmanager
async def serving(directory: Path, environment: Mapping[str, str] = NONE_SET) -> AsyncIterator[Up]:
    up = await start(directory, environment=environment)
    try:
        await up.prints("Ctrl-C stops it.")
        yield up
    finally:
        if up.child.returncode is None:
            up.child.terminate()
            await up.end()


@pytest.fixture(scope="module")
async def up(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Up]:
    async with serving(tmp_path_factory.mktemp("up") / "data") as up:
        yield up


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while True:
            if condition():
                return
            await asyncio.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether it runs no more; a process that only waits to be reaped by its parent is gone."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def health(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        answer = await HealthStub(channel).Check(HealthCheckRequest(), timeout=10, wait_for_ready=True)
    return int(answer.status)


async def create_poll(address: str, request_id: str) -> str:
    options = [PollOption(option_id="a", label="A"), PollOption(option_id="b", label="B")]
    spec = PollSpec(title="Kept?", method=VOTING_METHOD_SINGLE_CHOICE, options=options)
    async with grpc.aio.insecure_channel(address) as channel:
        request = CreatePollRequest(request_id=request_id, poll=spec)
        return (await CommandServiceStub(channel).CreatePoll(request, timeout=10, wait_for_ready=True)).poll_id


async def test_it_serves_what_it_prints(up: Up) -> None:
    run = up.run
    assert run.keys() == {*ADDRESSES, "processes", "pid"}
    assert {name: len(pids) for name, pids in run["processes"].items()} == PROCESSES
    assert not any(map(gone, up.pids))
    for address in ("command_address", "query_address"):
        assert await health(run[address]) == HealthCheckResponse.SERVING
        assert run[address] in up.printed
    for dsn in (run["write_dsn"], views_of(run["read_dsn"])):
        assert await sql(dsn, "SELECT name FROM schema_migrations")


async def test_secrets_are_for_those_who_need_them(up: Up) -> None:
    for name in ("run.json", "voter-secret", "postgres.json", "nats.json", "redis.json"):
        assert stat.S_IMODE((up.directory / name).stat().st_mode) == 0o600, name
    secret = (up.directory / "voter-secret").read_text()
    passwords = [urlsplit(up.run[name]).password for name in ("write_dsn", "read_dsn", "nats_url", "redis_url")]
    assert len({secret, *passwords, None}) == 6
    assert not any(word in up.printed for word in (secret, *map(str, passwords)))
    for name, pids in up.run["processes"].items():
        for pid in pids:
            environment = str(psutil.Process(pid).environ())
            assert (secret in environment) == (name in {"command_server", "query_server"}), name
            assert (str(passwords[0]) in environment) == (name in {"command_server", "relay", "projector"}), name


async def test_a_second_one_in_the_same_directory_is_refused(up: Up) -> None:
    before = up.run
    second = await start(up.directory)
    assert await second.end() == 1
    assert f"tally up is already running in {up.directory}, as process {up.child.pid}" in second.printed
    assert up.run == before


@pytest.mark.parametrize("option", ["--command-port", "--query-port"])
async def test_a_port_that_is_taken_is_named(tmp_path: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        up = await start(tmp_path, "--command-port", "0", "--query-port", "0", option, str(port))
        assert await up.end() == 1
    assert f"port {port} of 127.0.0.1 is taken: choose another one with {option}" in up.printed
    assert not (tmp_path / "postgres").exists()


async def test_whatever_dies_is_started_again(up: Up) -> None:
    before = up.run
    old = up.pids
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    await until(lambda: len(up.pids) == len(old) and not {*up.pids} & {*old})
    await until(lambda: not any(map(gone, up.pids)))
    assert {name: len(pids) for name, pids in up.run["processes"].items()} == PROCESSES
    assert {name: up.run[name] for name in ADDRESSES} == {name: before[name] for name in ADDRESSES}
    for name in ("command_server", "postgres", "projector-live"):
        await up.prints(f"{name} was killed by SIGKILL and is started again")
        await up.prints(f"{name} serves again")
    assert await health(up.run["command_address"]) == HealthCheckResponse.SERVING
    assert await create_poll(up.run["command_address"], str(uuid4()))


async def test_data_survive_and_nothing_is_left_behind(tmp_path: Path) -> None:
    request_id = str(uuid4())
    async with serving(tmp_path) as up:
        stores = {name: up.run[name] for name in ("write_dsn", "read_dsn", "nats_url", "redis_url")}
        poll_id = await create_poll(up.run["command_address"], request_id)
        pids = up.pids
        up.child.kill()
        await until(lambda: all(map(gone, pids)))

    async with serving(tmp_path) as up:
        assert {name: up.run[name] for name in stores} == stores
        assert await create_poll(up.run["command_address"], request_id) == poll_id
        pids = up.pids
        began = time.monotonic()
        # What Ctrl-C in a terminal does.
        os.killpg(up.child.pid, signal.SIGINT)
        assert await up.end() == 0
        assert time.monotonic() - began < 10
        assert all(map(gone, pids))
        assert not (tmp_path / "run.json").exists()
        assert "was killed" not in up.printed


async def test_stores_that_are_given_are_used(tmp_path: Path, write_dsn: str, redis_url: str) -> None:
    given = {"TALLY_WRITE_DSN": write_dsn, "TALLY_REDIS_URL": redis_url}
    async with serving(tmp_path, given) as up:
        assert (up.run["write_dsn"], up.run["redis_url"]) == (write_dsn, redis_url)
        assert {name: len(pids) for name, pids in up.run["processes"].items()} == PROCESSES | {"redis": 0}
        assert urlsplit(up.run["read_dsn"]).port != urlsplit(write_dsn).port
        await create_poll(up.run["command_address"], str(uuid4()))
        assert await sql(write_dsn, "SELECT count(*) FROM polls") == [(1,)]


async def test_a_data_directory_that_the_stores_cannot_name_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "caf\udce9"
    directory.mkdir()
    up = await start(directory)
    assert await up.end() == 1
    assert up.printed.endswith("cannot be the data directory: its name is not valid UTF-8\n")
    assert not list(directory.iterdir())


@pytest.mark.parametrize("name", ["postgres.json", "nats.json", "redis.json", "voter-secret"])
async def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff{")
    up = await start(tmp_path)
    assert await up.end() == 1
    assert f"{tmp_path / name} is damaged: " in up.printed
    assert "Traceback" not in up.printed


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"port": "x", "passwords": {}}', '{"port": 1, "passwords": 1}'])
def test_a_kept_file_without_what_it_keeps_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "nats.json").write_text(content)
    with pytest.raises(Died, match="is damaged"):
        embedded.Nats(tmp_path, set())


@pytest.mark.parametrize("name", ["lock", "logs", "nats", "redis.json.new", "ready", "run.json", "run.json.new"])
async def test_what_cannot_be_written_ends_it_with_one_line(tmp_path: Path, name: str) -> None:
    # Something else in the way, as root may write into any folder; a folder where a file goes, and the reverse.
    if name in {"logs", "nats", "ready"}:
        (tmp_path / name).touch()
    else:
        (tmp_path / name).mkdir()
    up = await start(tmp_path)
    assert await up.end() == 1
    last = up.printed.splitlines()[-1]
    assert last.startswith(f"Tally cannot run in {tmp_path}: ")
    assert str(tmp_path / name) in last
    assert "Traceback" not in up.printed
    assert not (tmp_path / "processes.json").exists()
    log = tmp_path / "logs" / "postgres.log"
    assert log.exists() == (name in {"ready", "run.json.new"})
    assert not log.exists() or "database system is shut down" in log.read_text()


@pytest.mark.parametrize(("workers", "apart"), [("", 1), ("3", 3)])
async def test_each_service_has_metrics_ports_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str, apart: int
) -> None:
    programs: list[Program] = []

    async def start(group: list[Program], _: float) -> None:
        programs.extend(group)

    monkeypatch.setenv("TALLY_METRICS_LISTEN", "127.0.0.1:9100")
    monkeypatch.setenv("TALLY_WORKERS", workers)
    addresses = dict.fromkeys((*_RECORDED, "TALLY_VOTER_SECRET"), "")
    await _start_services(cast(Supervisor, SimpleNamespace(start=start)), tmp_path, addresses)
    ports = [(program.environment or {})["TALLY_METRICS_LISTEN"] for program in programs]
    assert ports == [f"127.0.0.1:{9100 + number * apart}" for number in range(6)]


def test_a_postgres_that_cannot_be_set_up_ends_it_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: object) -> None:
        raise asyncpg.DiskFullError("no space left")

    monkeypatch.setattr(embedded.Postgres, "provision", fail)
    for variable in NONE_SET:
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(Failure, match=rf"^Tally cannot run in {tmp_path}: no space left$"):
        run(tmp_path, 0, 0, False)
    assert "database system is shut down" in (tmp_path / "logs" / "postgres.log").read_text()


async def test_a_database_that_does_not_answer_ends_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    up = await start(tmp_path, environment={"TALLY_WRITE_DSN": f"postgresql://u:secret@127.0.0.1:{port}/d"})
    assert await up.end() == 1
    assert up.printed.splitlines()[-1].startswith("TALLY_WRITE_DSN: the database cannot be migrated: ")
    assert "secret" not in up.printed


async def test_a_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    up = await start(tmp_path, environment={"TALLY_VOTER_SECRET": "too short"})
    assert await up.end() == 1
    assert "_server ended with status 2\n    TALLY_VOTER_SECRET: " in up.printed
    assert not (tmp_path / "run.json").exists()
    assert not (tmp_path / "processes.json").exists()
