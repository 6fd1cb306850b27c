"""`tally up`: everything on this machine, started in its order, kept running, and stopped together."""

import asyncio
import fcntl
import json
import os
import re
import secrets
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import grpc
import typer
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from clients.databases import FAILURES, reason, say_warnings
from clients.failures import Failure
from clients.options import DEFAULT_DATA_DIR
from clients.output import say
from contracts.read_models import READ_MODELS
from migrations import migrate_read, migrate_write
from runtime import embedded
from runtime.supervisor import Died, Process, Program, Supervisor, supervise, write_atomically
from runtime.workers import nth_port

# Together they leave a second of the ten within which everything has stopped.
_SERVICES_STOP_SECONDS = 6.0
_STORES_STOP_SECONDS = 3.0

_STORES = ("TALLY_WRITE_DSN", "TALLY_READ_DSN", "TALLY_NATS_URL", "TALLY_REDIS_URL")
# What run.json calls them.
_RECORDED = {
    "TALLY_COMMAND_LISTEN": "command_address",
    "TALLY_QUERY_LISTEN": "query_address",
    "TALLY_WRITE_DSN": "write_dsn",
    "TALLY_READ_DSN": "read_dsn",
    "TALLY_NATS_URL": "nats_url",
    "TALLY_REDIS_URL": "redis_url",
}
_PROCESSES = ("command_server", "query_server", "relay", "projector", "postgres", "nats", "redis")


class Service(NamedTuple):
    """One of Tally's processes, with those variables that only some of them get; `listens` if it serves gRPC."""

    name: str
    command: str
    variables: Sequence[str]
    listens: str = ""


_SERVICES = (
    Service("command_server", "command_server", ("TALLY_WRITE_DSN", "TALLY_VOTER_SECRET"), "TALLY_COMMAND_LISTEN"),
    Service(
        "query_server",
        "query_server",
        ("TALLY_READ_DSN", "TALLY_REDIS_URL", "TALLY_VOTER_SECRET"),
        "TALLY_QUERY_LISTEN",
    ),
    Service("relay", "relay", ("TALLY_WRITE_DSN", "TALLY_NATS_URL")),
    *(
        Service(f"projector-{name}", f"projector {name}", ("TALLY_WRITE_DSN", "TALLY_NATS_URL", store))
        for name, store in READ_MODELS.items()
    ),
)


def up(
    data_dir: Annotated[Path, typer.Option(help="Where data, logs and run.json are kept.")] = DEFAULT_DATA_DIR,
    command_port: Annotated[int, typer.Option(min=0, max=65535, help="CommandService; 0: any free port.")] = 50051,
    query_port: Annotated[int, typer.Option(min=0, max=65535, help="QueryService; 0: any free port.")] = 50052,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the logs of all processes.")] = False,
) -> None:
    """Start everything on this machine: Postgres, NATS, Redis and Tally's services, until Ctrl-C.

    A store whose TALLY_WRITE_DSN, TALLY_READ_DSN, TALLY_NATS_URL or TALLY_REDIS_URL is set is not started: that one is
    used instead.
    """
    say_warnings()
    run(data_dir, command_port, query_port, verbose)


def run(data_dir: Path, command_port: int, query_port: int, verbose: bool) -> None:
    """Runs everything until SIGTERM, SIGINT or SIGHUP; where a port is 0, any free one serves. Raises Failure."""
    directory = data_dir.resolve()
    try:
        with _only_one(directory):
            _say(f"starting in {directory}")
            asyncio.run(_until_stopped(directory, command_port, query_port, verbose))
    except FAILURES as error:
        # A disk that is full, a folder that is not ours, a Postgres that does not do as it is told.
        raise Failure(f"Tally cannot run in {directory}: {reason(error)}") from None


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Holds the lock of the data directory, which is created. Raises Failure if another `tally up` holds it."""
    try:
        # The stores' configuration files name it.
        str(directory).encode()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (directory / "lock").open("a+")
    except UnicodeEncodeError:
        raise Failure(f"{directory} cannot be the data directory: its name is not valid UTF-8") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise Failure(f"tally up is already running in {directory}, as process {lock.read()}") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


async def _until_stopped(directory: Path, command_port: int, query_port: int, verbose: bool) -> None:
    """Runs everything until SIGTERM, SIGINT or SIGHUP. Raises Failure if it cannot be started."""
    main = asyncio.current_task()
    assert main is not None
    stopping = False

    def stop() -> None:
        # Once: a second one, from an impatient finger or from make, would cut the stop short.
        nonlocal stopping
        if not stopping:
            stopping = True
            _say("stopping")
            main.cancel()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # SIGHUP stays ignored under nohup.
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, stop)
    try:
        await _run(directory, command_port, query_port, verbose)
    except asyncio.CancelledError:
        if not stopping:
            raise
        _say("stopped")
    except Died as death:
        _say(str(death))
        raise Failure("Tally could not be started") from None


async def _run(directory: Path, command_port: int, query_port: int, verbose: bool) -> None:
    record = RunRecord(directory / "run.json")
    async with supervise(directory, say=_say, changed=record.changed, echo=_echo if verbose else None) as supervisor:
        listen = _addresses(command_port, query_port)
        taken = {int(address.rpartition(":")[2]) for address in listen.values()}
        stores = await _start_stores(supervisor, directory, taken)
        await _start_services(supervisor, directory, listen | stores)
        record.publish(listen | stores, supervisor.processes)
        _show(listen, stores, directory)
        try:
            await asyncio.Event().wait()
        finally:
            record.withdraw()


def _addresses(command_port: int, query_port: int) -> dict[str, str]:
    """Where the two servers will listen, by variable. Raises Failure if a port is taken."""
    ports: list[int] = []
    for option, port in (("--command-port", command_port), ("--query-port", query_port)):
        if port and (port in ports or not embedded.is_free(port)):
            raise Failure(f"port {port} of 127.0.0.1 is taken: choose another one with {option}, or 0 for any")
        ports.append(port or embedded.free_port({command_port, query_port, *ports}))
    return {"TALLY_COMMAND_LISTEN": f"127.0.0.1:{ports[0]}", "TALLY_QUERY_LISTEN": f"127.0.0.1:{ports[1]}"}


async def _start_stores(supervisor: Supervisor, directory: Path, taken: set[int]) -> dict[str, str]:
    """Starts the stores that are not given, creates and migrates the databases; returns all addresses by variable."""
    stores = {variable: os.environ[variable] for variable in _STORES if os.environ.get(variable)}
    databases = {"TALLY_WRITE_DSN": "tally_write", "TALLY_READ_DSN": "tally_read"}
    own = {variable: database for variable, database in databases.items() if variable not in stores}
    programs = []
    if own:
        cluster = embedded.Postgres(directory, list(own.values()), taken, irreplaceable=databases["TALLY_WRITE_DSN"])
        stores |= {variable: cluster.dsn(database) for variable, database in own.items()}
        programs.append(await cluster.program())
    if "TALLY_NATS_URL" not in stores:
        nats = embedded.Nats(directory, taken)
        stores["TALLY_NATS_URL"] = nats.url
        programs.append(await nats.program())
    if "TALLY_REDIS_URL" not in stores:
        redis = embedded.Redis(directory, taken)
        stores["TALLY_REDIS_URL"] = redis.url
        programs.append(await redis.program())
    await supervisor.start(programs, _STORES_STOP_SECONDS)
    if own:
        await cluster.provision()
    for variable, migrate in (("TALLY_WRITE_DSN", migrate_write), ("TALLY_READ_DSN", migrate_read)):
        try:
            await migrate(stores[variable])
        except FAILURES as error:
            raise Failure(f"{variable}: the database cannot be migrated: {reason(error)}") from None
    return stores


async def _start_services(supervisor: Supervisor, directory: Path, addresses: Mapping[str, str]) -> None:
    secret = os.environ.get("TALLY_VOTER_SECRET") or _voter_secret(directory / "voter-secret")
    variables = {**addresses, "TALLY_VOTER_SECRET": secret}
    shared = {name: value for name, value in os.environ.items() if name not in variables}
    metrics = shared.get("TALLY_METRICS_LISTEN", "")
    # A wrong number is refused by the servers themselves, with a clear message.
    given = shared.get("TALLY_WORKERS", "")
    workers = int(given) if given.isdecimal() else 1
    (directory / "ready").mkdir(exist_ok=True)
    programs = []
    for number, service in enumerate(_SERVICES):
        ready_file = directory / "ready" / service.name
        environment = shared | {name: variables[name] for name in (*service.variables, service.listens) if name}
        environment["TALLY_READY_FILE"] = str(ready_file)
        if metrics.rpartition(":")[2].isdecimal():
            # Each has its own, and as many as a server has workers: the one that is set, and those after it.
            environment["TALLY_METRICS_LISTEN"] = nth_port(metrics, number * workers)
        programs.append(
            Program(
                name=service.name,
                # -P: a folder called relay, where the operator happens to be, is not ours.
                command=[sys.executable, "-P", "-m", *service.command.split()],
                ready=partial(_is_serving, variables[service.listens]) if service.listens else ready_file,
                environment=environment,
            )
        )
    await supervisor.start(programs, _SERVICES_STOP_SECONDS)


async def _is_serving(address: str) -> bool:
    """Whether a gRPC server says that it is healthy."""
    # Waits for the server within the call instead of failing at once: tried every 100 ms, the least that gRPC allows,
    # while it refuses. To a server that accepts and is silent there is one attempt, which the call's timeout ends.
    options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 100)]
    async with grpc.aio.insecure_channel(address, [*options, ("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = await HealthStub(channel).Check(HealthCheckRequest(), timeout=0.5, wait_for_ready=True)
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == HealthCheckResponse.SERVING)


def _voter_secret(path: Path) -> str:
    """The key of the voter hash, made once: with another one, everybody could vote again."""
    if not path.exists():
        write_atomically(path, secrets.token_urlsafe(32), durable=True)
    try:
        return path.read_text(encoding="ascii").strip()
    except UnicodeDecodeError:
        raise Failure(f"{path} is damaged: put the key back that it had, or everybody can vote again") from None


class RunRecord:
    """run.json: the addresses and processes of a `tally up` while everything has been started, and only then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._addresses: dict[str, str] = {}
        path.unlink(missing_ok=True)

    def publish(self, addresses: Mapping[str, str], processes: Sequence[Process]) -> None:
        self._addresses = {_RECORDED[variable]: address for variable, address in addresses.items()}
        self.changed(processes)

    def changed(self, processes: Sequence[Process]) -> None:
        if self._addresses:
            running: dict[str, list[int]] = {name: [] for name in _PROCESSES}
            for process in processes:
                running[process.name.partition("-")[0]] += [process.pid] if process.pid else []
            content = {"pid": os.getpid(), **self._addresses, "processes": running}
            write_atomically(self._path, json.dumps(content, indent=2) + "\n")

    def withdraw(self) -> None:
        self._addresses = {}
        self._path.unlink(missing_ok=True)


def _show(listen: Mapping[str, str], stores: Mapping[str, str], directory: Path) -> None:
    lines = {
        "CommandService": listen["TALLY_COMMAND_LISTEN"],
        "QueryService": listen["TALLY_QUERY_LISTEN"],
        "write database": _without_password(stores["TALLY_WRITE_DSN"]),
        "read database": _without_password(stores["TALLY_READ_DSN"]),
        "NATS": _without_password(stores["TALLY_NATS_URL"]),
        "Redis": _without_password(stores["TALLY_REDIS_URL"]),
        "data and logs": str(directory),
        "all of this": f"{directory / 'run.json'}, with the passwords",
    }
    text = "".join(f"  {name:<16}{value}\n" for name, value in lines.items())
    with suppress(OSError):
        print(f"\nTally serves.\n\n{text}\nCtrl-C stops it.\n", flush=True)


def _without_password(url: str) -> str:
    # All before the last @ of each address: a password, or NATS' token alone, may have any of ":/?,@" in it.
    return re.sub(r"(^|,)(\w+://)?(?:(?!,\w+://).)*@", r"\1\2", url).partition("?")[0]


def _say(text: str) -> None:
    with suppress(OSError):
        say(text)


def _echo(process: str, line: str) -> None:
    _say(f"{process} | {line}")
