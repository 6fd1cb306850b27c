"""Servers with different voter secrets never take votes for one database."""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from structlog.testing import capture_logs
from tally.command.v1 import command_service_pb2 as pb
from tally.poll.v1.poll_pb2 import VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec

from command_server.__main__ import CommandSettings, serve
from command_server.voter_secret import OtherSecret, SecretGuard
from contracts.voters import VoterKeys
from runtime.embedded import free_port
from tests.processes import eventually
from tests.proxy import proxy
from tests.servers import VOTER_SECRET, command_server, sql

OTHER = "another secret, of 32 characters or more"


def create() -> pb.CreatePollRequest:
    options = [PollOption(option_id=option, label=option) for option in "ab"]
    return pb.CreatePollRequest(poll=PollSpec(title="?", method=VOTING_METHOD_SINGLE_CHOICE, options=options))


async def start(dsn: str, ready: Path, **settings: str) -> tuple[int | None, str]:
    """Exit code and stderr of a command server with the other secret."""
    variables = {"TALLY_WRITE_DSN": dsn, "TALLY_VOTER_SECRET": OTHER, "TALLY_READY_FILE": str(ready), **settings}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TALLY_")}
    command = [sys.executable, "-m", "command_server"]
    process = await asyncio.create_subprocess_exec(*command, env=environment | variables, stderr=PIPE, stdout=PIPE)
    async with asyncio.timeout(30):
        _, err = await process.communicate()
    return process.returncode, err.decode()


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_second_secret_is_refused_at_start_in_one_line(write_dsn: str, tmp_path: Path, workers: str) -> None:
    async with command_server(write_dsn) as first:
        await first.CreatePoll(create())
        ready = tmp_path / "ready"
        listen = f"127.0.0.1:{free_port()}"
        code, err = await start(write_dsn, ready, TALLY_COMMAND_LISTEN=listen, TALLY_WORKERS=workers)
    assert code == 1
    assert not ready.exists()
    [line] = [line for line in err.splitlines() if "TALLY_VOTER_SECRET" in line]
    assert line.startswith("TALLY_VOTER_SECRET is not the one")
    assert "Traceback" not in err
    assert OTHER not in err
    assert VOTER_SECRET not in str(await sql(write_dsn, "SELECT * FROM voter_secret"))


async def told(logs: Sequence[Mapping[str, object]]) -> bool:
    return "the write database cannot be used" in [line["event"] for line in logs]


async def test_a_server_that_reaches_another_database_later_ends(write_dsn: str) -> None:
    """It starts while the database is away, as it may."""
    async with command_server(write_dsn) as first:
        await first.CreatePoll(create())
    async with proxy(urlsplit(write_dsn).port or 0) as network:
        await network.cut()
        dsn = write_dsn.replace(f":{urlsplit(write_dsn).port}/", f":{network.port}/")
        settings = CommandSettings(command_listen="127.0.0.1:0", write_dsn=dsn, voter_secret=OTHER)
        port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        with capture_logs() as logs:
            serving = asyncio.create_task(serve(settings, asyncio.Event(), port.set_result))
            await eventually(lambda: told(logs))
            await network.restore()
            with pytest.raises(ExceptionGroup) as ended:
                await serving
    assert ended.group_contains(OtherSecret)
    assert not port.done()
    assert len(await sql(write_dsn, "SELECT FROM polls")) == 1


async def test_of_two_first_servers_at_once_one_is_refused(write_dsn: str) -> None:
    guards = [SecretGuard(VoterKeys(secret)) for secret in (VOTER_SECRET, OTHER) * 5]
    outcomes = await asyncio.gather(*(guard.check_at_start(write_dsn) for guard in guards), return_exceptions=True)
    assert len(await sql(write_dsn, "SELECT FROM voter_secret")) == 1
    refused_ones = [isinstance(outcome, OtherSecret) for outcome in outcomes]
    assert refused_ones in ([False, True] * 5, [True, False] * 5)
