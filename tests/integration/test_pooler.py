"""Behind a real PgBouncer: a service says in words that it needs sessions of its own, and never goes on without."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import pytest
from tally.command.v1.command_service_pb2 import CreatePollRequest
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub

from clients import databases
from clients.failures import Failure
from command_server.__main__ import CommandSettings
from command_server.__main__ import serve as serve_commands
from runtime.embedded import free_port
from runtime.replicas import Pooled, connect_primary, connect_reader
from tests.processes import eventually
from tests.servers import VOTER_SECRET, refused, sql

IGNORED = (
    "extra_float_digits,search_path,statement_timeout,idle_in_transaction_session_timeout,lock_timeout,jit,"
    "default_transaction_isolation,transaction_timeout,idle_session_timeout"
)


@asynccontextmanager
async def pooler(directory: Path, dsn: str, *lines: str) -> AsyncIterator[str]:
    """A PgBouncer in front of a database; its DSN."""
    program = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
    assert os.access(program, os.X_OK), "tools/install_debian_packages.sh installs PgBouncer"
    server = urlsplit(dsn)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    users, configuration = directory / "users.txt", directory / "pgbouncer.ini"
    users.write_text(f'"{server.username}" "{server.password}"\n')
    settings = [
        "[databases]",
        f"* = host=127.0.0.1 port={server.port}",
        "[pgbouncer]",
        "listen_addr=127.0.0.1",
        f"listen_port={port}",
        "unix_socket_dir=",
        "auth_type=plain",
        f"auth_file={users}",
        *lines,
    ]
    configuration.write_text("\n".join(settings) + "\n")
    user = []
    if os.getuid() == 0:
        # It refuses to be root, and another user has to reach its files.
        user = ["-u", "nobody"]
        for path in (*directory.parents, directory, users, configuration):
            if path.owner() == "root" and path not in (Path("/"), Path("/tmp")):
                path.chmod(path.stat().st_mode | 0o055)
    process = await asyncio.create_subprocess_exec(
        program, *user, str(configuration), stderr=asyncio.subprocess.DEVNULL
    )
    try:

        async def listening() -> None:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                raise AssertionError("pgbouncer does not listen") from None
            writer.close()

        await eventually(listening)
        yield server._replace(netloc=f"{server.username}:{server.password}@127.0.0.1:{port}").geturl()
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.parametrize(
    "lines",
    [
        ("pool_mode=transaction", f"ignore_startup_parameters={IGNORED}"),
        ("pool_mode=session", f"ignore_startup_parameters={IGNORED}"),
        ("pool_mode=transaction",),
    ],
    ids=["transaction", "session", "parameters refused"],
)
async def test_a_pooler_is_noticed_when_a_connection_is_made(
    tmp_path: Path, write_dsn: str, lines: tuple[str, ...]
) -> None:
    settings = {"application_name": "a test", "statement_timeout": "30s"}
    async with pooler(tmp_path, write_dsn, *lines) as pooled:
        for connect in (connect_primary, connect_reader):
            with pytest.raises(Pooled, match="session pooling"):
                await connect(pooled, timeout=5, server_settings=settings)
        with pytest.raises(Failure, match="PgBouncer") as failure:
            await databases.migrate("write", pooled)
        assert "\n" not in str(failure.value)
    connection = await connect_primary(write_dsn, timeout=5, server_settings=settings)
    await connection.close()


async def test_a_server_behind_a_pooler_takes_no_command(tmp_path: Path, write_dsn: str) -> None:
    lines = ("pool_mode=transaction", f"ignore_startup_parameters={IGNORED}")
    request = CreatePollRequest()
    request.poll.title = "Lunch?"
    request.poll.method = 1  # type: ignore[assignment]
    for name in ("pizza", "soup"):
        request.poll.options.add(option_id=name, label=name)
    stop = asyncio.Event()
    served: list[int] = []
    async with pooler(tmp_path, write_dsn, *lines) as pooled, asyncio.TaskGroup() as tasks:
        settings = CommandSettings(
            command_listen=f"127.0.0.1:{free_port()}", write_dsn=pooled, voter_secret=VOTER_SECRET
        )
        tasks.create_task(serve_commands(settings, stop, served.append))
        async with grpc.aio.insecure_channel(settings.command_listen) as channel:
            call = CommandServiceStub(channel).CreatePoll(request, timeout=30, wait_for_ready=True)
            assert (await refused(call)).reason == "STORE_UNAVAILABLE"
        stop.set()
    assert not served
    assert not await sql(write_dsn, "SELECT FROM polls")
