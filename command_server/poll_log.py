"""Changes to polls: one transaction that takes a decision and writes state, event, outbox and the caller's answer."""

from asyncio import timeout
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import NamedTuple, TypeVar
from uuid import UUID, uuid4

import asyncpg
from google.protobuf.message import Message
from tally.command.v1.command_service_pb2 import ClosePollResponse, CreatePollResponse, OpenPollResponse
from tally.poll.v1.poll_pb2 import PollSpec

from command_server.poll import Decision, create_poll, poll_not_found
from contracts.freshness import token
from contracts.refusals import invalid_request
from runtime.postgres import queries

sql = queries(__package__)

COMMAND_SECONDS = 10.0

ResponseT = TypeVar("ResponseT", bound=Message)
ChangeResponseT = TypeVar("ChangeResponseT", OpenPollResponse, ClosePollResponse)


class Request(NamedTuple):
    """A command's request_id, and a hash of its whole body; no id: the command is not idempotent."""

    request_id: UUID | None
    fingerprint: bytes

    @classmethod
    def of(cls, message: Message, request_id: str) -> "Request":
        body = message.DESCRIPTOR.full_name.encode() + b"\0" + message.SerializeToString(deterministic=True)
        return cls(UUID(request_id) if request_id else None, blake2b(body, digest_size=32).digest())


class PollLog:
    """Appends events to polls in the write database, each command once."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def create(self, request: Request, spec: PollSpec) -> CreatePollResponse:
        """Creates a poll, in state DRAFT."""

        async def insert(connection: asyncpg.Connection) -> CreatePollResponse:
            poll_id = uuid4()
            state, event = create_poll(spec)
            await connection.execute(
                sql.insert_poll, poll_id, state, spec.SerializeToString(), event.SerializeToString()
            )
            return CreatePollResponse(poll_id=str(poll_id), consistency_token=token(poll_id, 1))

        return await self._once(request, CreatePollResponse, insert)

    async def change(
        self, request: Request, poll_id: UUID, decide: Decision, response_type: type[ChangeResponseT]
    ) -> ChangeResponseT:
        """Does to a poll what `decide` says. The response carries the consistency token."""

        async def append(connection: asyncpg.Connection) -> ChangeResponseT:
            # From here until the commit no batch of votes and no other command can change this poll.
            row = await connection.fetchrow(sql.lock_poll, poll_id)
            if row is None:
                raise poll_not_found(poll_id)
            state, event = decide(row["state"])
            version = await connection.fetchval(sql.change_poll, row["poll_no"], state, event.SerializeToString())
            return response_type(consistency_token=token(poll_id, version))

        return await self._once(request, response_type, append)

    async def _once(
        self,
        request: Request,
        response_type: type[ResponseT],
        command: Callable[[asyncpg.Connection], Awaitable[ResponseT]],
    ) -> ResponseT:
        async with timeout(COMMAND_SECONDS), self._pool.acquire() as connection, connection.transaction():
            if request.request_id is None:
                return await command(connection)
            # A repeat that comes while the first call is under way waits here for the first one's answer.
            await connection.execute(sql.lock_request, int.from_bytes(request.request_id.bytes[:8], signed=True))
            known = await connection.fetchrow(sql.find_request, request.request_id)
            if known is not None:
                if known["fingerprint"] != request.fingerprint:
                    raise invalid_request({"request_id": "was used before, for another command"})
                return response_type.FromString(known["response"])
            response = await command(connection)
            await connection.execute(
                sql.remember_request, request.request_id, request.fingerprint, response.SerializeToString()
            )
            return response
