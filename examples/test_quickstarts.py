"""The quick starts, run as the README says, against everything that `tally up` starts."""

import asyncio
import os
import re
import shutil
import sys
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.proxy import proxy
from tests.system import REPOSITORY, System, running_system

_GENERATED = shutil.ignore_patterns("node_modules", "build", "*.egg-info", "__pycache__")
# By language: how its quick start is prepared, and how it is run.
_COMMANDS = {
    "node": (["npm ci"], "npm start"),
    "typescript": (["npm ci", "npm run build"], "npm start"),
}


@pytest.fixture(scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    async with running_system(tmp_path_factory.mktemp("quickstarts") / "data") as system:
        yield system


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a caller's team needs of a clone; what is generated and installed stays out of the checkout."""
    for folder in ("protos", "examples", "gen"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=_GENERATED)
    shutil.rmtree(tmp_path / "examples/typescript/gen", ignore_errors=True)
    return tmp_path


@pytest.mark.timeout(400)
@pytest.mark.parametrize("language", _COMMANDS)
async def test_a_quick_start_votes_and_reads_the_results(system: System, clone: Path, language: str) -> None:
    prepared_by, run_by = _COMMANDS[language]
    example = clone / "examples" / language
    for command in prepared_by:
        await _output(example, *command.split())
    await _votes_and_reads(system, example, *run_by.split(), "--silent")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("end", ["oldest", "newest"])
async def test_the_stubs_work_with_both_ends_of_what_they_require(system: System, clone: Path, end: str) -> None:
    required = tomllib.loads((clone / "gen/pyproject.toml").read_text())["project"]["dependencies"]
    lowest = [re.fullmatch(r"([\w-]+)>=([\d.]+)(,<\d+)?", requirement).groups() for requirement in required]  # type: ignore[union-attr]
    pins = [f"{name}=={version}" for name, version, _ in lowest] if end == "oldest" else []
    await _output(clone, sys.executable, "-m", "venv", "venv")
    python = str(clone / "venv/bin/python")
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    await _output(clone, *pip, "./gen", "googleapis-common-protos", *pins)
    # Protobuf warns where stubs and runtime are too far apart.
    await _votes_and_reads(system, clone, python, "-W", "error", "examples/python/quickstart.py")


async def _votes_and_reads(system: System, folder: Path, *command: str) -> None:
    async with proxy(_port(system["command_address"])) as unreliable:
        # The first call meets a server that restarts.
        unreliable.to_break = 1
        variables = {
            "TALLY_COMMAND_ADDRESS": f"127.0.0.1:{unreliable.port}",
            "TALLY_QUERY_ADDRESS": system["query_address"],
        }
        printed = await _output(folder, *command, **variables)
        assert not unreliable.to_break
    receipt, *refused, pizza, soup = printed.splitlines()
    first, again = re.fullmatch(r"receipt (\S+) again (\S+)", receipt).groups()  # type: ignore[union-attr]
    assert first == again
    assert [line.partition(":")[0] for line in refused] == ["refused UNKNOWN_OPTION", "refused POLL_NOT_FOUND"]
    assert (pizza, soup) == ("Pizza 1", "Soup 0")


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


async def _output(folder: Path, *command: str, **variables: str) -> str:
    """What the command prints; it must succeed."""
    running = await asyncio.create_subprocess_exec(
        *command, cwd=folder, env=os.environ | variables, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(200):
        output, _ = await running.communicate()
    assert running.returncode == 0, output.decode()
    return output.decode()
