"""Every way in which a call is refused, and the one table that maps each to its status. Plain data, without I/O."""

from collections.abc import Mapping
from itertools import accumulate, islice

from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from tally.poll.v1.error_reason_pb2 import ErrorReason

DOMAIN = "tally"

STATUS_CODES: Mapping[ErrorReason.ValueType, int] = {
    ErrorReason.ERROR_REASON_INVALID_REQUEST: code_pb2.INVALID_ARGUMENT,
    ErrorReason.ERROR_REASON_UNKNOWN_OPTION: code_pb2.INVALID_ARGUMENT,
    ErrorReason.ERROR_REASON_TOO_MANY_CHOICES: code_pb2.INVALID_ARGUMENT,
    ErrorReason.ERROR_REASON_POLL_NOT_FOUND: code_pb2.NOT_FOUND,
    ErrorReason.ERROR_REASON_VOTE_NOT_FOUND: code_pb2.NOT_FOUND,
    ErrorReason.ERROR_REASON_POLL_NOT_OPEN: code_pb2.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_POLL_NOT_DRAFT: code_pb2.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_POLL_NOT_CLOSED: code_pb2.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_RESULTS_HIDDEN: code_pb2.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_POLL_ARCHIVED: code_pb2.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_ALREADY_VOTED: code_pb2.ALREADY_EXISTS,
    ErrorReason.ERROR_REASON_VOTER_NOT_ELIGIBLE: code_pb2.PERMISSION_DENIED,
    ErrorReason.ERROR_REASON_OVERLOADED: code_pb2.RESOURCE_EXHAUSTED,
    ErrorReason.ERROR_REASON_STORE_UNAVAILABLE: code_pb2.UNAVAILABLE,
    ErrorReason.ERROR_REASON_READ_MODEL_BEHIND: code_pb2.UNAVAILABLE,
    ErrorReason.ERROR_REASON_INTERNAL: code_pb2.INTERNAL,
    ErrorReason.ERROR_REASON_VOTE_CONFLICT: code_pb2.ABORTED,
    ErrorReason.ERROR_REASON_LOCKED: code_pb2.UNAVAILABLE,
}

# How long a caller should wait before it tries again, in seconds; reasons that are not here do not pass by waiting.
_RETRY_AFTER: Mapping[ErrorReason.ValueType, float] = {
    ErrorReason.ERROR_REASON_OVERLOADED: 0.1,
    ErrorReason.ERROR_REASON_STORE_UNAVAILABLE: 1.0,
    ErrorReason.ERROR_REASON_READ_MODEL_BEHIND: 0.5,
    ErrorReason.ERROR_REASON_LOCKED: 1.0,
}

# A status travels in headers, of which gRPC begins to drop what is above 8 KiB, and with it the reason: the most field
# violations of one refusal, the most bytes of them together, and the most bytes of a text that is quoted.
_MOST_FIELDS = 20
_MOST_FIELDS_BYTES = 1_800
_MOST_QUOTED = 100


class Refusal(Exception):  # noqa: N818 - the caller's fault or a passing state, not an error of ours
    """A call that is not carried out, for a reason that the contract names."""

    def __init__(self, reason: ErrorReason.ValueType, message: str, fields: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        # For INVALID_REQUEST: path of each field that breaks a rule → the rule, in words.
        self.fields = fields or {}

    def status(self) -> Status:
        """The refusal as a `google.rpc.Status` with its details."""
        details: list[Message] = [ErrorInfo(reason=reason_name(self.reason), domain=DOMAIN)]
        if self.fields:
            violations = [BadRequest.FieldViolation(field=f, description=rule) for f, rule in self.fields.items()]
            details.append(BadRequest(field_violations=violations))
        if self.reason in _RETRY_AFTER:
            delay = Duration()
            delay.FromMilliseconds(round(_RETRY_AFTER[self.reason] * 1000))
            details.append(RetryInfo(retry_delay=delay))
        status = Status(code=STATUS_CODES[self.reason], message=self.message)
        for detail in details:
            packed = Any()
            packed.Pack(detail)
            status.details.append(packed)
        return status


class ReadModelBehind(Refusal):
    """No store shows what is asked for yet, or what was answered before. It passes, so it is worth asking again."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorReason.ERROR_REASON_READ_MODEL_BEHIND, message)


def reason_name(reason: ErrorReason.ValueType) -> str:
    """The reason as callers see it: `POLL_NOT_FOUND`."""
    return ErrorReason.Name(reason).removeprefix("ERROR_REASON_")


def quoted(text: str) -> str:
    """What a caller sent, as a message repeats it: in quotes, and only its beginning."""
    whole = repr(text).encode()
    return whole.decode() if len(whole) <= _MOST_QUOTED else f"{whole[:_MOST_QUOTED].decode(errors='ignore')}…"


def invalid_request(fields: Mapping[str, str]) -> Refusal:
    """The request breaks rules of its message; `fields` is path → rule, the path empty for the whole message. Of many
    rules the first are told, and how many more there are."""
    sizes = accumulate(len(f"{field}{rule}".encode()) for field, rule in fields.items())
    told = max(1, sum(1 for size in islice(sizes, _MOST_FIELDS) if size <= _MOST_FIELDS_BYTES))
    if len(fields) > told:
        more = f"{len(fields) - told:,} more fields break a rule"
        fields = {**dict(islice(fields.items(), told)), "": more}
    message = "; ".join(f"{field or 'request'}: {rule}" for field, rule in fields.items())
    return Refusal(ErrorReason.ERROR_REASON_INVALID_REQUEST, message, fields)


def poll_archived(poll_id: object) -> Refusal:
    """The answer about votes that are in a file now."""
    return Refusal(
        ErrorReason.ERROR_REASON_POLL_ARCHIVED, f"poll {poll_id} was archived: who voted is only in its archive file"
    )


def results_hidden(poll_id: object) -> Refusal:
    """The poll shows its results AFTER_CLOSE, and is not closed."""
    message = f"poll {poll_id} shows its results only after it has been closed; GetTurnout tells how many have voted"
    return Refusal(ErrorReason.ERROR_REASON_RESULTS_HIDDEN, message)


def poll_not_found(poll_id: object) -> Refusal:
    """There is no such poll, or a read model has not heard of it yet."""
    return Refusal(ErrorReason.ERROR_REASON_POLL_NOT_FOUND, f"there is no poll {poll_id}")
