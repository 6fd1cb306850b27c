"""`python -m benchmarks.servers empty|plain`: what our RPCs are compared with, on the same kind of gRPC server.

`empty` answers a unary RPC without reading it. `plain` is a service as one writes it first: for each vote a transaction
that inserts the vote and adds one to a counter's row. Both have a stream that sends the bytes of its request, and again
whenever somebody calls `Tell`.
"""

import asyncio
import sys
from typing import Any

import asyncpg
import grpc
from pydantic import Field
from tally.command.v1 import command_service_pb2 as pb

from runtime import lifecycle, serving, telemetry
from runtime.settings import Settings

SERVICE = "tally.benchmarks.Server"
METHOD = f"/{SERVICE}/Call"
WATCH = f"/{SERVICE}/Watch"
TELL = f"/{SERVICE}/Tell"

CREATE_VOTES = """
CREATE TABLE IF NOT EXISTS plain_votes (poll_id uuid, voter_id text, option_id text, PRIMARY KEY (poll_id, voter_id))
"""
CREATE_COUNTERS = """
CREATE TABLE IF NOT EXISTS plain_counters (poll_id uuid, option_id text, votes bigint, PRIMARY KEY (poll_id, option_id))
"""
_INSERT = "INSERT INTO plain_votes VALUES ($1, $2, $3) ON CONFLICT DO NOTHING RETURNING true"
_COUNT = "UPDATE plain_counters SET votes = votes + 1 WHERE poll_id = $1 AND option_id = $2"


class ServerSettings(Settings):
    """What both read from the environment."""

    command_listen: str = Field(description="host:port of the server.")
    write_dsn: str = Field(description="Postgres URL of a database with the tables above.")


async def main(stop: asyncio.Event) -> None:
    settings = ServerSettings.from_environment()
    telemetry.start("benchmarks", settings)
    async with asyncpg.create_pool(settings.write_dsn, min_size=0, max_size=16) as pool:

        async def empty(_: bytes, __: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            return b""

        async def plain(request: bytes, _: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            vote = pb.CastVoteRequest.FromString(request)
            option_id = vote.option_ids[0]
            async with pool.acquire() as connection, connection.transaction():
                if await connection.fetchval(_INSERT, vote.poll_id, vote.voter_id, option_id):
                    await connection.execute(_COUNT, vote.poll_id, option_id)
            return pb.CastVoteResponse().SerializeToString()

        told = asyncio.Event()

        async def tell(_: bytes, __: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            nonlocal told
            told.set()
            told = asyncio.Event()
            return b""

        async def watch(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            while True:
                await context.write(request)
                await told.wait()

        handlers: dict[str, Any] = {
            "Call": grpc.unary_unary_rpc_method_handler({"empty": empty, "plain": plain}[sys.argv[1]]),
            "Tell": grpc.unary_unary_rpc_method_handler(tell),
            "Watch": grpc.unary_stream_rpc_method_handler(watch),
        }
        server = serving.new_server()
        server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        await serving.serve(
            server, settings.command_listen, [], [], stop, lambda _: lifecycle.announce("serving", settings)
        )


if __name__ == "__main__":
    lifecycle.run(main)
