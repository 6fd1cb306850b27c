"""The two stores of the example: a Postgres database for prescriptions, and a NATS stream for events about them."""

import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NamedTuple

import asyncpg
import nats
from nats.js import JetStreamContext

from runtime.postgres import queries

sql = queries(__package__)

_SECONDS = 10.0


class Stores(NamedTuple):
    """A connection to each of the two stores; nothing commits in both at once."""

    database: asyncpg.Connection
    stream: JetStreamContext
    # Where the events are published: also the name of the stream.
    subject: str

    async def publish(self, prescription_id: int, payload: str) -> None:
        """Returns when the stream has the event on disk. A second copy with the same id is dropped by the stream."""
        headers = {"Nats-Msg-Id": f"prescription {prescription_id}"}
        await self.stream.publish(self.subject, payload.encode(), headers=headers, timeout=_SECONDS)


@asynccontextmanager
async def connect(dsn: str, nats_url: str, subject: str) -> AsyncIterator[Stores]:
    """Connects to both stores; raises the drivers' errors where one does not answer within seconds."""
    database = await asyncpg.connect(dsn, timeout=_SECONDS, command_timeout=_SECONDS)
    try:
        bus = await nats.connect(nats_url, connect_timeout=2, allow_reconnect=False)
        try:
            yield Stores(database, bus.jetstream(timeout=_SECONDS), subject)
        finally:
            await bus.close()
    finally:
        database.terminate()


def connect_by_environment() -> AbstractAsyncContextManager[Stores]:
    """Connects to the stores that the environment variables DSN, NATS_URL and SUBJECT name."""
    return connect(os.environ["DSN"], os.environ["NATS_URL"], os.environ["SUBJECT"])
