"""What the tests share: one Postgres, NATS and Redis for the whole run, and fresh databases for each test."""

import itertools
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import nats
import pytest
import redis.asyncio
from nats.aio.client import Client
from nats.js import JetStreamContext

from migrations import migrate_read, migrate_write
from runtime import embedded
from tests.event_log import EventLog, event_log
from tests.system import System, running_system

_numbers = itertools.count(1)

# Where the command line keeps the key of its votes: not in the home of the user who runs the tests.
_state = tempfile.TemporaryDirectory(prefix="tally-state-")
os.environ["XDG_STATE_HOME"] = _state.name


# The files that take longest, in order. Where several processes share the work they go first, or all would wait for the
# last of them.
_LONGEST = ("test_cli", "test_setup", "test_files", "test_up", "test_query_server")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    order = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
async def stores() -> AsyncIterator[embedded.Stores]:
    """The real servers. Their databases tally_write and tally_read are the migrated templates: connect to neither."""
    with tempfile.TemporaryDirectory(prefix="tally-") as directory:
        async with embedded.stores(Path(directory), ["tally_write", "tally_read"]) as running:
            await migrate_write(running.dsn("tally_write"))
            await migrate_read(running.dsn("tally_read"))
            yield running


@pytest.fixture(scope="session")
async def system() -> AsyncIterator[System]:
    """Everything that `tally up` runs, shared by the tests that ask for it: each makes polls of its own."""
    with tempfile.TemporaryDirectory(prefix="tally-system-") as directory:
        async with running_system(Path(directory)) as running:
            yield running


@pytest.fixture
async def write_dsn(stores: embedded.Stores) -> AsyncIterator[str]:
    """A new, empty write database."""
    async with _clone(stores, "tally_write") as dsn:
        yield dsn


@pytest.fixture
async def read_dsn(stores: embedded.Stores) -> AsyncIterator[str]:
    """A new, empty read database."""
    async with _clone(stores, "tally_read") as dsn:
        yield dsn


@pytest.fixture
async def nats_url(stores: embedded.Stores) -> str:
    """NATS without any stream."""
    connection = await nats.connect(stores.nats_url)
    try:
        stream: JetStreamContext = connection.jetstream()
        for info in await stream.streams_info():
            assert info.config.name
            await stream.delete_stream(info.config.name)
    finally:
        await connection.close()
    return stores.nats_url


@pytest.fixture
async def log(write_dsn: str) -> AsyncIterator[EventLog]:
    async with event_log(write_dsn) as log:
        yield log


@pytest.fixture
async def bus(nats_url: str) -> AsyncIterator[Client]:
    connection = await nats.connect(nats_url)
    yield connection
    await connection.close()


@pytest.fixture
async def redis_url(stores: embedded.Stores) -> str:
    """Redis without any key."""
    async with redis.asyncio.Redis.from_url(stores.redis_url) as client:
        await client.flushall()
    return stores.redis_url


@asynccontextmanager
async def _clone(stores: embedded.Stores, template: str) -> AsyncIterator[str]:
    name = f"{template}_{next(_numbers)}"
    await _administer(stores, f"CREATE DATABASE {name} TEMPLATE {template} OWNER {template}")
    yield stores.dsn(name, role=template)
    await _administer(stores, f"DROP DATABASE {name} WITH (FORCE)")


async def _administer(stores: embedded.Stores, statement: str) -> None:
    connection = await asyncpg.connect(stores.admin_dsn, timeout=10, command_timeout=30)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
