"""Stores of `tally up` that answer and do not store, or whose files cannot be read."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path

import asyncpg
import nats
import nats.errors
import psutil
import pytest
import redis.asyncio

from runtime import embedded, supervisor
from runtime.supervisor import Died, Process, Program, Supervisor, supervise
from tests.processes import eventually
from tests.servers import sql

SLEEPS = ["/bin/sleep", "60"]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait is long in here."""
    monkeypatch.setattr(supervisor, "_CHECK_SECONDS", 0.1)


class Store:
    """A store under supervision; `said` is what the supervisor said."""

    def __init__(self, supervised: Supervisor, said: list[str]) -> None:
        self._supervised = supervised
        self.said = said

    @property
    def process(self) -> Process:
        return self._supervised.processes[0]

    async def says(self, text: str) -> None:
        async def said() -> None:
            assert any(text in line for line in self.said), self.said

        await eventually(said, 30)


@asynccontextmanager
async def keeping(directory: Path, program: Program, patience: float = 0.5) -> AsyncIterator[Store]:
    said: list[str] = []
    object.__setattr__(program, "patience", patience)
    async with supervise(directory, say=said.append) as supervised:
        await supervised.start([program], 5)
        yield Store(supervised, said)


async def test_a_process_whose_check_fails_is_restarted_less_and_less_often(tmp_path: Path) -> None:
    checks: list[float] = []
    starts: list[float] = []

    async def check() -> None:
        checks.append(asyncio.get_running_loop().time())
        raise supervisor.NotServing("nothing is stored")

    async def prepare() -> None:
        starts.append(asyncio.get_running_loop().time())

    async def ready() -> bool:
        return True

    program = Program(name="sick", command=SLEEPS, ready=ready, check=check, prepare=prepare)
    async with keeping(tmp_path, program, patience=0.3) as store:

        async def restarted() -> None:
            assert len(starts) == 4

        await eventually(restarted)
    # Twice as long each time; a busy machine adds to it.
    for pause, least in zip([later - earlier for earlier, later in pairwise(starts)], (0.3, 0.6, 1.2), strict=True):
        assert pause > least
    assert store.said[0] == "sick runs, but does not do its work: nothing is stored"
    assert "it is restarted" in store.said[1]


async def test_a_process_that_no_restart_can_help_is_named_and_left_alone(tmp_path: Path) -> None:
    problem: str | None = "the disk is full"

    async def check() -> None:
        if problem:
            raise supervisor.NotServing(problem, restart=False)

    async def ready() -> bool:
        return True

    async with keeping(tmp_path, Program(name="sick", command=SLEEPS, ready=ready, check=check), 0.1) as store:
        pid = store.process.pid
        await store.says("sick runs, but does not do its work: the disk is full")
        problem = "another reason"
        await store.says("another reason")
        problem = None
        await store.says("sick does its work again")
        assert store.process.pid == pid
        assert len(store.said) == 3


@pytest.mark.parametrize("kind", ["postgres", "nats", "redis"])
async def test_the_check_of_a_store_writes_and_a_frozen_store_is_restarted(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(supervisor, "_STOP_SECONDS", 0.5)
    program = await a_store(tmp_path, kind)
    assert program.check
    async with keeping(tmp_path, program, patience=1.0) as store:
        await program.check()
        first = store.process.pid
        assert first
        os.kill(first, signal.SIGSTOP)
        await store.says(f"{kind} runs, but does not do its work: no answer within 0.5 s")
        await store.says(f"{kind} serves again")
        assert store.process.pid != first
        await program.check()


async def a_store(directory: Path, kind: str) -> Program:
    match kind:
        case "postgres":
            return await embedded.Postgres(directory, ["app"], set(), shared_buffers="16MB").program()
        case "nats":
            return await embedded.Nats(directory, set()).program()
    return await embedded.Redis(directory, set()).program()


async def test_a_redis_that_became_a_replica_is_its_own_master_again(tmp_path: Path) -> None:
    server = embedded.Redis(tmp_path, set())
    async with keeping(tmp_path, await server.program()) as store:
        async with redis.asyncio.Redis.from_url(server.url) as client:
            await client.execute_command("REPLICAOF", "127.0.0.1", "1")  # type: ignore[no-untyped-call]
        await store.says("-READONLY")
        await store.says("redis serves again")
        await set_key(server.url)


async def set_key(url: str) -> None:
    async with redis.asyncio.Redis.from_url(url) as client:
        await client.set("key", "value")


async def test_a_redis_without_memory_is_named_and_not_restarted(tmp_path: Path) -> None:
    server = embedded.Redis(tmp_path, set())
    async with keeping(tmp_path, await server.program(), 0.1) as store:
        async with redis.asyncio.Redis.from_url(server.url) as client:
            pid = store.process.pid
            await client.config_set("maxmemory", "1")
            await store.says("redis runs, but does not do its work: -OOM")
            await client.config_set("maxmemory", "0")
            await store.says("redis does its work again")
        assert store.process.pid == pid


async def test_a_nats_whose_stream_failed_to_write_once_takes_messages_again(tmp_path: Path) -> None:
    server = embedded.Nats(tmp_path, set())
    async with keeping(tmp_path, await server.program(), patience=3) as store:
        assert await publish(server.url)
        # A limit of the files' size fails a write as a full disk does, and the stream refuses everything from then on,
        # also without the limit; another stream, such as the one of the check, does not.
        process = psutil.Process(store.process.pid)
        process.rlimit(psutil.RLIMIT_FSIZE, (50_000, -1))
        assert not await publish(server.url, 100_000)
        process.rlimit(psutil.RLIMIT_FSIZE, (-1, -1))
        await store.says("write error")
        await store.says("nats serves again")

        async def stored() -> None:
            assert await publish(server.url)

        await eventually(stored)


@pytest.mark.parametrize("kind", ["postgres", "nats", "redis"])
async def test_a_full_disk_is_named_and_is_no_reason_for_a_restart(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with keeping(tmp_path, await a_store(tmp_path, kind), patience=0.1) as store:
        pid = store.process.pid
        monkeypatch.setattr(embedded, "_LEAST_FREE_BYTES", 1 << 60)
        await store.says(f"{kind} runs, but does not do its work: the disk of {tmp_path / kind} is full")
        monkeypatch.setattr(embedded, "_LEAST_FREE_BYTES", 0)
        await store.says(f"{kind} does its work again")
        assert store.process.pid == pid


async def publish(url: str, size: int = 1) -> bool:
    """Whether a stream acknowledges a message."""
    with suppress(nats.errors.Error, OSError, TimeoutError):
        connection = await nats.connect(url, allow_reconnect=False, connect_timeout=1)
        try:
            jetstream = connection.jetstream(timeout=0.5)
            await jetstream.add_stream(name="EVENTS", subjects=["events"])
            await jetstream.publish("events", b"x" * size)
        finally:
            await connection.close()
        return True
    return False


async def test_nats_has_no_limit_but_the_disk(tmp_path: Path) -> None:
    server = embedded.Nats(tmp_path, set())
    async with keeping(tmp_path, await server.program()) as store:
        log = store.process.log.read_text()
    assert "Max Storage:     8.00 TB" in log


def set_aside(directory: Path, name: str) -> list[Path]:
    """The folders with files of a store that were set aside."""
    return list(directory.glob(f"{name}.damaged-*"))


def damage(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


@pytest.mark.parametrize("content", [bytes(4096), b"*1\r\n$7\r\nnonsens\r\n", os.urandom(300), b"REDIS0009garbage"])
async def test_files_that_redis_cannot_read_are_set_aside(tmp_path: Path, content: bytes) -> None:
    server = embedded.Redis(tmp_path, set())
    async with keeping(tmp_path, await server.program(), patience=60) as store:
        await set_key(server.url)
        first = store.process.pid
        assert first
        os.kill(first, signal.SIGSTOP)
        [file] = (tmp_path / "redis").rglob("*.incr.aof")
        whole = file.read_bytes()
        damage(file, content)
        os.kill(first, signal.SIGKILL)
        await store.says("redis serves again")
        await set_key(server.url)
    [said] = [line for line in store.said if "set aside" in line]
    [aside] = set_aside(tmp_path, "redis")
    assert str(aside) in said
    [kept] = [path for path in aside.rglob(file.name) if path.is_file()]
    assert kept.read_bytes() == whole + content
    # And at a start.
    damage(next((tmp_path / "redis").rglob("*.incr.aof")), content)
    async with keeping(tmp_path, await server.program()) as store:
        assert any("set aside" in line for line in store.said)


async def test_a_redis_that_may_not_read_its_files_keeps_them(tmp_path: Path) -> None:
    server = embedded.Redis(tmp_path, set())
    program = await server.program()
    mend = program.mend
    assert await mend("1:M # Can't open the append-only file: Permission denied") == ""
    assert await mend("1:M # Can't open the append-only file: No space left on device") == ""
    assert await mend("1:M * DB loaded from append only file: 0.001 seconds") == ""
    assert await mend("1:M # Could not create server TCP listening socket 127.0.0.1:1: bind: in use") == ""
    assert not set_aside(tmp_path, "redis")


async def test_a_nats_store_that_it_cannot_open_is_set_aside(tmp_path: Path) -> None:
    server = embedded.Nats(tmp_path, set())
    (tmp_path / "nats").mkdir()
    (tmp_path / "nats" / "jetstream").write_text("what was a folder")
    async with keeping(tmp_path, await server.program()) as store:
        assert await publish(server.url)
    assert any("set aside" in line for line in store.said)
    [aside] = set_aside(tmp_path, "nats")
    assert (aside / "jetstream").read_text() == "what was a folder"


@pytest.mark.parametrize("damaged", ["global/pg_control", "pg_wal"])
async def test_a_damaged_cluster_with_the_write_database_stays_as_it_is(tmp_path: Path, damaged: str) -> None:
    cluster = embedded.Postgres(tmp_path, ["write", "read"], set(), shared_buffers="16MB", irreplaceable="write")
    async with keeping(tmp_path, await cluster.program()):
        await cluster.provision()
    break_cluster(tmp_path / "postgres", damaged)
    # Also where the write database is elsewhere by now: this one had it.
    for databases in (["write", "read"], ["read"]):
        cluster = embedded.Postgres(tmp_path, databases, set(), shared_buffers="16MB", irreplaceable="write")
        with pytest.raises(Died, match=r"It holds write, which nothing can make anew.*restore it from a backup"):
            async with keeping(tmp_path, await cluster.program()):
                pass
    assert not set_aside(tmp_path, "postgres")


@pytest.mark.parametrize("damaged", ["global/pg_control", "pg_wal"])
async def test_a_damaged_cluster_with_only_the_read_database_is_made_anew(tmp_path: Path, damaged: str) -> None:
    cluster = embedded.Postgres(tmp_path, ["read"], set(), shared_buffers="16MB", irreplaceable="write")
    async with keeping(tmp_path, await cluster.program()):
        await cluster.provision()
        await sql(cluster.dsn("read"), "CREATE TABLE lost ()")
    break_cluster(tmp_path / "postgres", damaged)
    cluster = embedded.Postgres(tmp_path, ["read"], set(), shared_buffers="16MB", irreplaceable="write")
    async with keeping(tmp_path, await cluster.program()) as store:
        await cluster.provision()
        with pytest.raises(asyncpg.UndefinedTableError):
            await sql(cluster.dsn("read"), "SELECT FROM lost")
    assert any("set aside" in line for line in store.said)


def break_cluster(data: Path, damaged: str) -> None:
    if damaged == "pg_wal":
        shutil.rmtree(data / "pg_wal")
        (data / "pg_wal").mkdir()
        shutil.chown(data / "pg_wal", data.stat().st_uid)
    else:
        (data / damaged).write_bytes(bytes(8192))
