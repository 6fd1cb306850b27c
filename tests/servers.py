"""Real servers for tests, in this process and on free ports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg
import grpc
from asyncpg.pgproto.pgproto import UUID
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_status import rpc_status
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub

from command_server.__main__ import CommandSettings
from command_server.__main__ import serve as serve_commands
from command_server.ballots import key_range
from query_server.__main__ import QuerySettings
from query_server.__main__ import serve as serve_queries

if TYPE_CHECKING:
    from tally.command.v1.command_service_pb2_grpc import CommandServiceAsyncStub

VOTER_SECRET = "a secret that only tests use, 32+ chars"


@asynccontextmanager
async def serving(serve: Callable[[asyncio.Event, Callable[[int], None]], Any]) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server that runs while the context lasts, and is stopped as SIGTERM stops it."""
    stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as tasks:
        server = tasks.create_task(serve(stop, port.set_result))
        await asyncio.wait([server, port], return_when=asyncio.FIRST_COMPLETED)
        if server.done():
            server.result()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port.result()}") as channel:
            yield channel
        stop.set()


@asynccontextmanager
async def command_channel(write_dsn: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a command server on this database."""
    settings = CommandSettings(command_listen="127.0.0.1:0", write_dsn=write_dsn, voter_secret=VOTER_SECRET)
    async with serving(lambda stop, ready: serve_commands(settings, stop, ready)) as channel:
        yield channel


@asynccontextmanager
async def command_server(write_dsn: str) -> AsyncIterator[CommandServiceAsyncStub]:
    """A client of a command server on this database."""
    async with command_channel(write_dsn) as channel:
        yield CommandServiceStub(channel)


@asynccontextmanager
async def query_channel(read_dsn: str, redis_url: str, **fields: Any) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a query server on these stores."""
    fields = {"query_listen": "127.0.0.1:0", **fields}
    settings = QuerySettings(read_dsn=read_dsn, redis_url=redis_url, voter_secret=VOTER_SECRET, **fields)
    async with serving(lambda stop, ready: serve_queries(settings, stop, ready)) as channel:
        yield channel


def views_of(read_dsn: str) -> str:
    """The read database, as its read model `views` sees it."""
    return f"{read_dsn}&search_path=views"


async def sql(dsn: str, query: str, *arguments: object) -> list[asyncpg.Record]:
    """The rows of a query on a connection of its own."""
    connection = await asyncpg.connect(dsn)
    try:
        return list(await connection.fetch(query, *arguments))
    finally:
        await connection.close()


async def vote_rows(write_dsn: str, poll_no: int) -> dict[UUID, bytes]:
    """The rows of a poll in the table votes: ballot_key → choices."""
    query = "SELECT ballot_key, choices FROM votes WHERE ballot_key > $1 AND ballot_key <= $2"
    rows = await sql(write_dsn, query, *key_range(poll_no))
    return {row["ballot_key"]: row["choices"] for row in rows}


class Refused:
    """What a refused call told its caller."""

    def __init__(self, error: grpc.RpcError) -> None:
        assert isinstance(error, grpc.aio.AioRpcError)
        self.code = error.code()
        self.message = error.details() or ""
        self.reason, self.domain, self.fields, self.retry_after = "", "", [], None
        status = rpc_status.from_call(error)
        for detail in status.details if status else []:
            info, bad, retry = ErrorInfo(), BadRequest(), RetryInfo()
            if detail.Unpack(info):
                self.reason, self.domain = info.reason, info.domain
            elif detail.Unpack(bad):
                self.fields = [violation.field for violation in bad.field_violations]
            elif detail.Unpack(retry):
                self.retry_after = retry.retry_delay.ToMilliseconds() / 1000


async def refused(call: Any) -> Refused:
    """Awaits a call that must fail."""
    try:
        answer = await call
    except grpc.RpcError as error:
        return Refused(error)
    raise AssertionError(f"was not refused: {answer}")
