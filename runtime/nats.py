"""A connection to NATS that is either whole or over: no reconnecting behind the back of whoever uses it."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import nats.errors
import structlog
from nats.aio.client import Client

from runtime.stores import UnsupportedStore

log = structlog.get_logger()

# The first one that stores several messages as a whole.
VERSION = (2, 12)
_VARZ = "$SYS.REQ.SERVER.PING.VARZ"
_ANSWER_SECONDS = 2.0
_CONNECT_SECONDS = 3.0
_CLOSE_SECONDS = 2.0
# A server that is silent for three of them is taken for gone.
_PING_SECONDS = 5
# Nothing waits in here for long: callers bound what they send before they wait for an answer.
_BUFFER_BYTES = 32 << 20

# What a caller sees as "NATS does not answer, or not as it should".
UNAVAILABLE = (OSError, TimeoutError, nats.errors.Error)


class Unreachable(nats.errors.Error):
    """No server takes a connection; not an OSError, which might be another server's."""


@asynccontextmanager
async def connect(url: str, *, application: str) -> AsyncIterator[Client]:
    """A connection to one of the servers of `url` (several are separated by commas).

    When it is lost, the body of the `async with` is cancelled and ConnectionClosedError is raised, within an
    ExceptionGroup. Raises what UNAVAILABLE lists if no server can be reached, and UnsupportedStore, which is one of
    these, where it is too old.
    """
    client = Client()
    closed = asyncio.Event()

    async def on_closed() -> None:
        closed.set()

    try:
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await client.connect(
                    url.split(","),
                    name=application,
                    # The library's reconnecting would send what it buffered for the old connection into the new one.
                    allow_reconnect=False,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=1,
                    connect_timeout=2,
                    ping_interval=_PING_SECONDS,
                    pending_size=_BUFFER_BYTES,
                    error_cb=_on_error,
                    closed_cb=on_closed,
                )
        except (OSError, TimeoutError) as error:
            raise Unreachable(repr(error)) from error
        running = client.connected_server_version
        if (running.major, running.minor) < VERSION:
            raise UnsupportedStore(
                f"this is NATS {version(client)}, and Tally needs {VERSION[0]}.{VERSION[1]} or newer"
            )
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(_fail_when(closed))
            yield client
            watch.cancel()
    finally:
        # AssertionError: it could not read the address, and has nothing to close.
        with suppress(*UNAVAILABLE, AssertionError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await client.close()


def version(client: Client) -> str:
    """The version of the server that a client is connected to."""
    running = client.connected_server_version
    return f"{running.major}.{running.minor}.{running.patch}"


async def check_durability(client: Client) -> None:
    """Logs an error where the server acknowledges messages before they are on disk. Most accounts are not told; see
    Durability in docs/operations.md."""
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            answer = await client.request(_VARZ, b"{}", timeout=None)  # type: ignore[arg-type]  # no limit of its own
        config = json.loads(answer.data)["data"]["jetstream"]["config"]
        always, interval = config.get("sync_always", False), config.get("sync_interval")
    except (*UNAVAILABLE, ValueError, LookupError, TypeError, AttributeError):
        log.info("NATS does not tell this account its sync_interval, which should be always")
        return
    if always:
        log.info("NATS acknowledges what is on disk", sync_interval="always")
    else:
        seconds = f"{interval / 1e9:g} s" if isinstance(interval, int) else "unknown"
        log.error("NATS acknowledges what is not on disk: set its sync_interval to always", sync_interval=seconds)


async def _fail_when(closed: asyncio.Event) -> None:
    await closed.wait()
    raise nats.errors.ConnectionClosedError


async def _on_error(error: Exception) -> None:
    log.debug("nats", error=repr(error))
