"""`make setup` and `make generate` are interrupted, and the next make mends what they left."""

import asyncio
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
_FILES = ("Makefile", "pyproject.toml", "requirements.lock", "README.md", "LICENSE")
_FOLDERS = ("gen", "protos", "tools", "migrations")
_PACKAGES = ("clients", "command_server", "contracts", "projector", "query_server", "relay", "runtime")
_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("TALLY_", "MAKE"))}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what make setup needs."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for file in _FILES:
        shutil.copy(REPOSITORY / file, copy)
    for folder in (*_FOLDERS, *_PACKAGES):
        shutil.copytree(REPOSITORY / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return copy


@pytest.mark.timeout(500)
async def test_a_half_made_environment_is_made_whole_by_the_next_make(checkout: Path) -> None:
    # What is left where the system's Python has no ensurepip, as without Debian's python3-venv.
    await _succeeds(checkout, "python3", "-m", "venv", "--without-pip", ".venv")
    interrupted = await asyncio.create_subprocess_exec(
        "make", "setup", cwd=checkout, env=_ENVIRONMENT, start_new_session=True
    )
    async with asyncio.timeout(240):
        # Killed in the middle of the packages.
        while not _found(checkout, ".venv/lib/python3*/site-packages/grpc/*"):
            assert interrupted.returncode is None
            await asyncio.sleep(0.02)
    os.killpg(interrupted.pid, signal.SIGKILL)
    await interrupted.wait()
    assert not (checkout / ".venv/.ready").exists()

    await _succeeds(checkout, "make", "setup")
    await _succeeds(checkout, ".venv/bin/tally", "--help")
    # Nothing is to be done then; but again, once its Python or one of its packages is gone.
    assert "pip install" not in await _succeeds(checkout, "make", "-n", "setup")
    [package] = _found(checkout, ".venv/lib/python3*/site-packages/asyncpg")
    shutil.rmtree(package)
    assert "rm -rf .venv" in await _succeeds(checkout, "make", "-n", "setup")
    assert not (checkout / ".venv/.ready").exists()


@pytest.mark.parametrize("ends_by", ["a wrong proto", "a kill"])
async def test_an_interrupted_generation_leaves_the_stubs_that_there_were(checkout: Path, ends_by: str) -> None:
    (checkout / ".venv").symlink_to(REPOSITORY / ".venv")
    before = _stubs(checkout)
    proto = checkout / "protos/tally/poll/v1/poll.proto"
    if ends_by == "a wrong proto":
        proto.write_text(proto.read_text() + "message")
        generating = await _generate(checkout)
        async with asyncio.timeout(60):
            assert await generating.wait() != 0
    else:
        generating = await _generate(checkout)
        async with asyncio.timeout(60):
            while not _found(checkout, ".generate.*/gen/tally") and generating.returncode is None:
                await asyncio.sleep(0.005)
        os.killpg(generating.pid, signal.SIGKILL)
        await generating.wait()
    assert _stubs(checkout) == before
    # A stub without a proto goes, and the others are as before.
    if ends_by == "a kill":
        (checkout / "gen/tally/poll/v1/gone_pb2.py").touch()
        async with asyncio.timeout(60):
            assert await (await _generate(checkout)).wait() == 0
        assert _stubs(checkout) == before


def _found(checkout: Path, pattern: str) -> list[Path]:
    return list(checkout.glob(pattern))


def _stubs(checkout: Path) -> dict[str, bytes]:
    return {str(path.relative_to(checkout)): path.read_bytes() for path in (checkout / "gen").rglob("*_pb2*.py*")}


async def _generate(checkout: Path) -> asyncio.subprocess.Process:
    path = f"{REPOSITORY / '.venv/bin'}:{_ENVIRONMENT['PATH']}"
    return await asyncio.create_subprocess_exec(
        *("tools/generate.sh", "gen"), cwd=checkout, env=_ENVIRONMENT | {"PATH": path}, start_new_session=True
    )


async def _succeeds(checkout: Path, *command: str) -> str:
    """What the command prints."""
    running = await asyncio.create_subprocess_exec(
        *command, cwd=checkout, env=_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    async with asyncio.timeout(240):
        output, _ = await running.communicate()
    assert running.returncode == 0, output.decode()
    return output.decode()
