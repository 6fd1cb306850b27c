"""Several processes that serve on one port: the kernel spreads connections over them.

The parent only starts and replaces them. It never makes a gRPC object itself, because gRPC does not survive a fork.
"""

import argparse
import asyncio
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

import structlog

from runtime.lifecycle import Backoff, announce
from runtime.settings import PREFIX, ServerSettings
from runtime.supervisor import leashed

log = structlog.get_logger()

Chosen = TypeVar("Chosen", bound=ServerSettings)

_STOP_SECONDS = 8.0
_LOOK_SECONDS = 0.05
# A worker that ran this long is replaced after the shortest pause.
_STABLE_SECONDS = 10.0


def settings_from(arguments: Sequence[str], module: str, settings: type[Chosen]) -> Chosen:
    """The settings of `python -m module`, whose `--workers` goes before TALLY_WORKERS. Exits where one is wrong."""
    # Without a usage, what is wrong is said in one line.
    parser = argparse.ArgumentParser(prog=f"python -m {module}", usage=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help="processes that serve on one port (default: TALLY_WORKERS, or 1)")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    chosen = settings.from_environment(**given)
    if chosen.metrics_listen and int(nth_port(chosen.metrics_listen, chosen.workers - 1).rpartition(":")[2]) > 65535:
        sys.exit(
            f"{PREFIX}METRICS_LISTEN: each of {chosen.workers} workers takes the next port, and 65535 is the last one"
        )
    return chosen


async def run(module: str, settings: ServerSettings, listen_setting: str, stop: asyncio.Event) -> None:
    """Runs `settings.workers` processes `python -m module` until `stop`, and replaces one that dies.

    `listen_setting` is the name of the setting with their common host:port; port 0 becomes a free port.
    """
    host, _, port = getattr(settings, listen_setting).rpartition(":")
    with closing(_reserve(host, int(port))) as reserved, _temporary_folder() as folder:
        port = reserved.getsockname()[1]
        ready = [Path(folder) / f"{number}.ready" for number in range(settings.workers)]
        async with asyncio.TaskGroup() as tasks:
            keeping = []
            for number, path in enumerate(ready):
                own = {
                    listen_setting: f"{host}:{port}",
                    "workers": "1",
                    "worker": "true",
                    "ready_file": str(path),
                    "metrics_listen": nth_port(settings.metrics_listen, number),
                }
                keeping.append(tasks.create_task(_keep([sys.executable, "-m", module], own)))
            waiting = tasks.create_task(stop.wait())
            while not all(path.exists() for path in ready) and not stop.is_set():
                await asyncio.sleep(_LOOK_SECONDS)
            if not stop.is_set():
                announce("serving", settings, port=port, workers=settings.workers)
            await waiting
            for task in keeping:
                task.cancel()


async def _keep(command: Sequence[str], settings: Mapping[str, str]) -> None:
    environment = os.environ | {PREFIX + name.upper(): value for name, value in settings.items()}
    backoff = Backoff(longest=5.0)
    while True:
        began = time.monotonic()
        child = await asyncio.create_subprocess_exec(*leashed(command, signal.SIGTERM), env=environment)
        try:
            code = await child.wait()
        except asyncio.CancelledError:
            await _end(child)
            raise
        if time.monotonic() - began > _STABLE_SECONDS:
            backoff.reset()
        log.error("a worker died", pid=child.pid, code=code, failures=backoff.failures + 1)
        await backoff.wait()


async def _end(child: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        child.terminate()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await child.wait()
        except TimeoutError:
            child.kill()
            await child.wait()


def nth_port(listen: str | None, number: int) -> str:
    """The host:port of the n-th process, from the host:port of the first on; 0, which is any free port, stays."""
    if not listen:
        return ""
    host, _, port = listen.rpartition(":")
    return f"{host}:{int(port) + number if int(port) else 0}"


def _temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    """Where workers say that they are ready. Exits where there is none, as in a container that can only be read."""
    try:
        return tempfile.TemporaryDirectory(prefix="workers-")
    except OSError:
        sys.exit("workers need a folder for temporary files, and none can be written to: set TMPDIR")


def _reserve(host: str, port: int) -> socket.socket:
    """Holds a port for the workers, without listening on it. Exits where somebody else has it."""
    reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind((host.strip("[]"), port))
    except OSError as error:
        reserved.close()
        sys.exit(f"cannot listen on {host}:{port}: {error.strerror}")
    return reserved
