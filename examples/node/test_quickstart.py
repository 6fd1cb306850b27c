"""The Node quick start, run by node as the README says, against everything that `tally up` starts."""

import asyncio
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.system import REPOSITORY, running_system


@pytest.mark.timeout(300)
async def test_the_quick_start_votes_and_reads_the_results(tmp_path: Path) -> None:
    # What is generated and installed stays out of the checkout.
    for folder in ("protos", "examples/node"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copy(REPOSITORY / "examples/service_config.json", tmp_path / "examples")
    example = tmp_path / "examples/node"
    await _run(example, "npm", "install", "--silent", "--no-audit", "--no-fund")
    async with running_system(tmp_path / "data") as system:
        addresses = {f"TALLY_{role.upper()}_ADDRESS": system[f"{role}_address"] for role in ("command", "query")}
        printed = await _run(example, "node", "quickstart.js", **addresses)
    receipt, refused, *counts = printed.splitlines()
    first, again = re.fullmatch(r"receipt (\S+) again (\S+)", receipt).groups()  # type: ignore[union-attr]
    assert first == again
    assert refused.startswith("refused INVALID_ARGUMENT ")
    assert counts == ["Pizza 1", "Soup 0"]


async def _run(folder: Path, *command: str, **variables: str) -> str:
    """What a command prints; it must succeed."""
    running = await asyncio.create_subprocess_exec(
        *command, cwd=folder, env=os.environ | variables, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(200):
        output, _ = await running.communicate()
    assert running.returncode == 0, output.decode()
    return output.decode()
