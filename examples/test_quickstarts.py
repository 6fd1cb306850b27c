"""The quick starts in other languages, run as the README says, against everything that `tally up` starts."""

import asyncio
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.proxy import proxy
from tests.system import REPOSITORY, running_system

_BUILDS = {"node": ["ci"], "typescript": ["ci", "run build"]}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("language", _BUILDS)
async def test_a_quick_start_votes_and_reads_the_results(language: str, tmp_path: Path) -> None:
    example = tmp_path / "examples" / language
    # What is generated and installed stays out of the checkout.
    for folder in ("protos", f"examples/{language}"):
        ignored = shutil.ignore_patterns("node_modules", "gen", "build")
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(REPOSITORY / "examples/service_config.json", tmp_path / "examples")
    for step in _BUILDS[language]:
        await _npm(example, *step.split())
    async with running_system(tmp_path / "data") as system, proxy(_port(system["command_address"])) as unreliable:
        # Its first call meets a server that restarts.
        unreliable.to_break = 1
        command, query = f"127.0.0.1:{unreliable.port}", system["query_address"]
        printed = await _npm(example, "start", TALLY_COMMAND_ADDRESS=command, TALLY_QUERY_ADDRESS=query)
        assert not unreliable.to_break
    receipt, *refused, pizza, soup = printed.splitlines()
    first, again = re.fullmatch(r"receipt (\S+) again (\S+)", receipt).groups()  # type: ignore[union-attr]
    assert first == again
    assert [line.partition(":")[0] for line in refused] == ["refused UNKNOWN_OPTION", "refused POLL_NOT_FOUND"]
    assert (pizza, soup) == ("Pizza 1", "Soup 0")


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


async def _npm(folder: Path, *arguments: str, **variables: str) -> str:
    """What a command of npm prints; it must succeed."""
    running = await asyncio.create_subprocess_exec(
        *("npm", "--silent", *arguments), cwd=folder, env=os.environ | variables, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(200):
        output, _ = await running.communicate()
    assert running.returncode == 0, output.decode()
    return output.decode()
