"""Changes to polls: one transaction that takes a decision and writes state, event, outbox and the caller's answer."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Literal, NamedTuple, TypeVar
from uuid import UUID, uuid4

import asyncpg
from google.protobuf.message import Message
from tally.command.v1.command_service_pb2 import CertifyPollResponse, CreatePollResponse
from tally.poll.v1.poll_pb2 import PollSpec

from command_server.poll import Change, Decision, Poll, create_poll, look_alikes, request_certification
from command_server.polls import Polls
from command_server.turns import Turns
from contracts.bus import MAX_PAYLOAD_BYTES
from contracts.freshness import token
from contracts.refusals import invalid_request, poll_not_found
from runtime.postgres import queries
from runtime.serving import apart, violations

sql = queries(__package__)

COMMAND_SECONDS = 10.0

# The first and the last of Python's moments; to Postgres they would be infinite.
_BEGINNING, _END = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)

ResponseT = TypeVar("ResponseT", bound=Message)


class Request(NamedTuple):
    """A command's request_id, and a hash of its whole body; no id: the command is not idempotent."""

    request_id: UUID | None
    fingerprint: bytes

    @classmethod
    def of(cls, message: Message, request_id: str) -> "Request":
        uuid = UUID(request_id) if request_id else None
        if uuid:
            # However their letters are written, they are the same ids.
            message.MergeFrom(type(message)(request_id=str(uuid)))
            if "poll_id" in message.DESCRIPTOR.fields_by_name:
                poll_id = UUID(message.poll_id)  # type: ignore[attr-defined]
                message.MergeFrom(type(message)(poll_id=str(poll_id)))
        body = message.DESCRIPTOR.full_name.encode() + b"\0" + message.SerializeToString(deterministic=True)
        return cls(uuid, blake2b(body, digest_size=32).digest())


class PollLog:
    """Appends events to polls in the write database, each command once."""

    def __init__(self, turns: Turns, polls: Polls) -> None:
        self._turns = turns
        self._polls = polls

    async def create(self, request: Request, spec: PollSpec) -> CreatePollResponse:
        """Creates a poll, in state DRAFT."""

        columns = await _columns(create_poll(spec))

        async def insert(connection: asyncpg.Connection) -> CreatePollResponse:
            poll_id = uuid4()
            log_epoch = await connection.fetchval(sql.insert_poll, poll_id, *columns)
            return CreatePollResponse(poll_id=str(poll_id), consistency_token=token(poll_id, 1, log_epoch))

        return await self._once(request, None, CreatePollResponse, insert)

    async def change(
        self, request: Request, poll_id: UUID, decide: Decision, response_type: type[ResponseT]
    ) -> ResponseT:
        """Does to a poll what `decide` says. The response carries the consistency token."""

        async def command(connection: asyncpg.Connection) -> ResponseT:
            locked = await lock(connection, poll_id)
            version = await append(connection, locked, decide(locked.poll))
            return response_type(consistency_token=token(poll_id, version, locked.log_epoch))

        return await self._once(request, poll_id, response_type, command)

    async def request_recount(self, request: Request, poll_id: UUID) -> CertifyPollResponse:
        """Leaves the recount of a closed poll to the caretaker. While one is under way, no other is begun."""

        async def command(connection: asyncpg.Connection) -> CertifyPollResponse:
            locked = await lock(connection, poll_id)
            change = request_certification(locked.poll)
            begun = await connection.fetchval(sql.request_recount, locked.poll_no)
            version = await append(connection, locked, change) if begun else locked.version
            return CertifyPollResponse(consistency_token=token(poll_id, version, locked.log_epoch))

        return await self._once(request, poll_id, CertifyPollResponse, command)

    async def _once(
        self,
        request: Request,
        poll_id: UUID | None,
        response_type: type[ResponseT],
        command: Callable[[asyncpg.Connection], Awaitable[ResponseT]],
    ) -> ResponseT:
        async def run(connection: asyncpg.Connection) -> ResponseT:
            if request.request_id is None:
                return await command(connection)
            # A repeat at another server that comes while the first call is under way waits here for its answer.
            # Below zero, where no other lock is: a caller, who chooses the id, must not hold what others wait for.
            await connection.execute(sql.lock_request, ~(int.from_bytes(request.request_id.bytes[:8]) >> 1))
            known = await connection.fetchrow(sql.find_request, request.request_id)
            if known is not None:
                if known["fingerprint"] != request.fingerprint:
                    raise invalid_request({"request_id": "was used before, for another command"})
                answer: ResponseT = response_type.FromString(known["response"])
                return answer
            response = await command(connection)
            await connection.execute(
                sql.remember_request, request.request_id, request.fingerprint, response.SerializeToString()
            )
            return response

        names = [(kind, name) for kind, name in (("request", request.request_id), ("poll", poll_id)) if name]
        response = await self._turns.take(names, run, COMMAND_SECONDS)
        if poll_id:
            self._polls.changed(poll_id)
        return response


class Locked(NamedTuple):
    """A poll that no batch of votes and no other command can change until the transaction ends."""

    poll_no: int
    version: int
    log_epoch: UUID
    poll: Poll


async def lock(connection: asyncpg.Connection, poll_id: UUID) -> Locked:
    """Waits for the poll's lock. The poll is read by a statement of its own: the first one's snapshot is older than the
    end of its wait."""
    poll_no = await connection.fetchval(sql.lock_poll, poll_id)
    if poll_no is None:
        raise poll_not_found(poll_id)
    row = await connection.fetchrow(sql.read_poll, poll_no)
    poll = Poll(row["state"], PollSpec.FromString(row["spec"]), row["now"])
    return Locked(poll_no, row["version"], row["log_epoch"], poll)


async def append(connection: asyncpg.Connection, locked: Locked, change: Change) -> int:
    """Appends the event of a change to a locked poll; returns the poll's new version."""
    return int(await connection.fetchval(sql.change_poll, locked.poll_no, *await _columns(change)))


async def _columns(change: Change) -> tuple[str, bytes, datetime | None, datetime | None, bytes]:
    """state, spec, opens_at, closes_at, payload. Raises INVALID_REQUEST where a spec that a caller wrote breaks the
    rules of a poll; a poll that was written under other rules goes on."""
    state, event, spec = change
    broken: Mapping[str, str] = {}
    if event.HasField("poll_updated"):
        # A new poll's was checked with its request; this one is what the request makes of the poll.
        broken = await apart(violations, spec)
    if not broken and (event.HasField("poll_created") or event.HasField("poll_updated")):
        broken = await apart(look_alikes, spec)
    if broken:
        raise invalid_request({f"poll.{field}" if field else "poll": rule for field, rule in broken.items()})
    opens_at, closes_at = _moment(spec, "opens_at"), _moment(spec, "closes_at")
    payload = event.SerializeToString()
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise invalid_request({"poll": f"makes an event of {len(payload):,} bytes; {MAX_PAYLOAD_BYTES:,} are allowed"})
    return state, spec.SerializeToString(), opens_at, closes_at, payload


def _moment(spec: PollSpec, field: Literal["opens_at", "closes_at"]) -> datetime | None:
    """When a poll opens or closes by itself. Raises INVALID_REQUEST where that is no time of the calendar."""
    if not spec.HasField(field):
        return None
    with suppress(ValueError, OverflowError):
        moment: datetime = getattr(spec, field).ToDatetime(UTC)
        if _BEGINNING < moment < _END:
            return moment
    raise invalid_request({f"poll.{field}": "must be a valid time after 0001-01-01 and in a year up to 9999"})
