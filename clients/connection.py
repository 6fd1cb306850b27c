"""How a client finds Tally's two servers, calls them, and waits for one that is away."""

import asyncio
import random
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_status import rpc_status
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub
from tally.query.v1.query_service_pb2_grpc import QueryServiceStub

from clients.failures import Failure
from clients.run_record import read_address

if TYPE_CHECKING:
    from tally.command.v1.command_service_pb2_grpc import CommandServiceAsyncStub
    from tally.query.v1.query_service_pb2_grpc import QueryServiceAsyncStub

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

# Servers are told deadlines from 10 s on rounded up, by 1 % or less: too late for an answer that explains a delay.
CALL_SECONDS = 9.0
RETRY_SECONDS = 3.0
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 2.0
# By then the longest pause is reached; without a bound, hours of failures are more than a float can hold.
_MOST_DOUBLINGS = 10

_OPTIONS = [
    # A server that comes back is noticed by our own next attempt, not after gRPC's backoff of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    # gRPC takes this for how long an attempt to connect may last; a server on another continent needs some of it.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Notices a dead peer on a quiet stream. The servers allow a ping every 10 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A page of polls with a thousand options each.
    ("grpc.max_receive_message_length", 64 << 20),
    # A proxy for the web is not meant for these servers.
    ("grpc.enable_http_proxy", 0),
]

# What a message calls by the name of an RPC, and people by that of a command.
_COMMANDS = {
    "CreatePoll": "tally poll create",
    "UpdatePoll": "tally poll update",
    "OpenPoll": "tally poll open",
    "ClosePoll": "tally poll close",
    "CancelPoll": "tally poll cancel",
    "CertifyPoll": "tally poll certify",
    "RegisterVoters": "tally register",
    "CastVote": "tally vote",
    "CastVotes": "tally import",
    "GetPoll": "tally poll show",
    "ListPolls": "tally poll list",
    "GetPollDocument": "tally poll document",
    "GetResults": "tally results",
    "BatchGetResults": "tally results",
    "WatchResults": "tally watch",
    "GetTurnout": "tally turnout",
    "ListVoterVotes": "tally votes",
    "GetVote": "tally votes",
    "GetReadModelStatus": "tally status",
}
_RPC = re.compile(r"\b(" + "|".join(_COMMANDS) + r")\b")

# With one of these reasons, or none and one of these codes, the same request may succeed later, and is safe to repeat.
_TRANSIENT_REASONS = {"OVERLOADED", "STORE_UNAVAILABLE", "READ_MODEL_BEHIND", "LOCKED"}
_TRANSIENT_CODES = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
}


class Refused(Failure):
    """A call that failed for good. `reason` is the name of a tally.poll.v1.ErrorReason, empty where none was given."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


def not_opened(poll_id: str, refused: Refused) -> Failure:
    """Why a poll that was created did not open. It names the poll, which nobody has been told of yet."""
    return Failure(f"{refused}; poll {poll_id} was created and may still be a draft: tally poll open {poll_id}")


@dataclass(frozen=True)
class Address:
    """Where a server listens, and how we know."""

    target: str
    origin: str = ""

    def __str__(self) -> str:
        return f"{self.target} (from {self.origin})" if self.origin else self.target


def find_address(role: Literal["command", "query"], given: str | None, data_dir: Path) -> Address:
    """The address that was given, or else that of the `tally up` whose data are in `data_dir`. Raises Failure."""
    if given:
        return Address(given)
    record = data_dir / "run.json"
    try:
        return Address(read_address(record, f"{role}_address"), str(record))
    except FileNotFoundError:
        raise Failure(
            f"no {role} server: give --{role}-address, set TALLY_{role.upper()}_ADDRESS, or run `tally up`"
            f" in this directory (there is no {record})"
        ) from None
    except ValueError as error:
        raise Failure(f"{record} does not say where the {role} server is ({error}); give --{role}-address") from None


class Server:
    """One of Tally's servers: `async with CommandServer(address) as commands: …`."""

    def __init__(self, role: str, address: Address) -> None:
        self.address = address
        self._role = role
        self.channel = grpc.aio.insecure_channel(address.target, options=_OPTIONS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def call(
        self,
        method: "grpc.aio.UnaryUnaryMultiCallable[Request, Response]",
        request: Request,
        *,
        retry_for: float = RETRY_SECONDS,
        on_lost: Callable[[str], None] = lambda _: None,
    ) -> Response:
        """Calls, and calls again with the same request for `retry_for` seconds where that may help. Raises Refused."""
        patience = Patience(retry_for, failing_since=asyncio.get_running_loop().time())
        return await self.persist(lambda: method(request, timeout=CALL_SECONDS), patience, on_lost)

    async def persist(
        self, attempt: Callable[[], Awaitable[Response]], patience: "Patience", on_lost: Callable[[str], None]
    ) -> Response:
        """Attempts, and again where that may help, until the patience ends. Raises Refused."""
        while True:
            try:
                return await attempt()
            except grpc.aio.AioRpcError as error:
                refused = self.refused(error)
                pause = patience.pause(error) if is_transient(error) else None
            except TimeoutError:
                refused = self._silent()
                pause = patience.pause()
            if pause is None:
                raise refused
            on_lost(f"{refused}; trying again")
            await asyncio.sleep(pause)

    def refused(self, error: grpc.aio.AioRpcError) -> Refused:
        """What to tell a person about a call that failed, in one line."""
        info, retry, fields = _details(error)
        reason = info.reason if info else ""
        text = f"{reason or error.code().name}: {error.details() or 'no details were given'}"
        if not reason and error.code() is grpc.StatusCode.UNAVAILABLE:
            cause = (error.details() or "").rsplit(": ", 1)[-1]
            text = f"UNAVAILABLE: the {self._role} server at {self.address} does not answer: {cause}"
        if not reason and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return self._silent()
        violations = [f"{v.field}: {v.description}" for v in fields.field_violations] if fields else []
        text = "; ".join([text, *(v for v in violations if v not in text)])
        if retry:
            text += f" (try again in {retry.retry_delay.ToTimedelta().total_seconds():g} s)"
        text = _RPC.sub(lambda rpc: _COMMANDS[rpc[0]], text)
        return Refused(" ".join(text.split()), reason)

    def _silent(self) -> Refused:
        return Refused(f"DEADLINE_EXCEEDED: the {self._role} server at {self.address} did not answer in time", "")


class CommandServer(Server):
    """The server that takes commands and votes."""

    def __init__(self, address: Address) -> None:
        super().__init__("command", address)
        self.stub: CommandServiceAsyncStub = CommandServiceStub(self.channel)


class QueryServer(Server):
    """The server that answers questions."""

    def __init__(self, address: Address) -> None:
        super().__init__("query", address)
        self.stub: QueryServiceAsyncStub = QueryServiceStub(self.channel)


async def command(
    address: Address,
    rpc: "Callable[[CommandServiceAsyncStub], grpc.aio.UnaryUnaryMultiCallable[Request, Response]]",
    request: Request,
) -> Response:
    """One call to a command server. Raises Refused."""
    async with CommandServer(address) as commands:
        return await commands.call(rpc(commands.stub), request)


async def query(
    address: Address,
    rpc: "Callable[[QueryServiceAsyncStub], grpc.aio.UnaryUnaryMultiCallable[Request, Response]]",
    request: Request,
) -> Response:
    """One call to a query server. Raises Refused."""
    async with QueryServer(address) as queries:
        return await queries.call(rpc(queries.stub), request)


class Patience:
    """Growing pauses between attempts, until none has succeeded for `seconds`; `renew` after each success."""

    def __init__(self, seconds: float, failing_since: float | None = None) -> None:
        """`failing_since`: when the seconds began, on the event loop's clock. Default: at the first failure."""
        self._seconds = seconds
        self._failures = 0
        self._failing_since = failing_since

    def renew(self) -> None:
        self._failures = 0
        self._failing_since = None

    def pause(self, error: grpc.aio.AioRpcError | None = None) -> float | None:
        """How many seconds to wait before the next attempt, or None to give up."""
        now = asyncio.get_running_loop().time()
        self._failing_since = self._failing_since or now
        left = self._failing_since + self._seconds - now
        if left <= 0:
            return None
        retry = _details(error)[1] if error else None
        asked: float = retry.retry_delay.ToTimedelta().total_seconds() if retry else 0.0
        growing: float = min(_FIRST_PAUSE * 2 ** min(self._failures, _MOST_DOUBLINGS), _LONGEST_PAUSE)
        self._failures += 1
        # Half of it is random, so that many clients of one server do not come back all at once.
        return min(max(asked, growing * random.uniform(0.5, 1)), left)


def is_transient(error: grpc.aio.AioRpcError) -> bool:
    """Whether the same request may succeed later."""
    info, _, _ = _details(error)
    if info:
        return info.reason in _TRANSIENT_REASONS
    # INTERNAL without a reason is a connection that broke in the middle of a frame.
    return error.code() in _TRANSIENT_CODES or error.code() is grpc.StatusCode.INTERNAL


def _details(error: grpc.aio.AioRpcError) -> tuple[ErrorInfo | None, RetryInfo | None, BadRequest | None]:
    """The details of the google.rpc.Status that came with an error."""
    info, retry, fields = ErrorInfo(), RetryInfo(), BadRequest()
    try:
        status = rpc_status.from_call(error)
    except ValueError:
        status = None
    found = [
        next((part for detail in (status.details if status else ()) if detail.Unpack(part)), None)
        for part in (info, retry, fields)
    ]
    return found[0], found[1], found[2]
