"""The consistency token: what a command returns and a query takes as `at_least_as_fresh`. Opaque to callers.

It names a position of a poll, (log_epoch, version). A read model of a later epoch satisfies it at any version: the
write that the token stands for may have been lost with its history.
"""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from contextlib import suppress
from struct import Struct
from struct import error as StructError  # noqa: N812
from typing import NamedTuple
from uuid import UUID

from contracts.log_epoch import ZERO
from contracts.refusals import invalid_request

# The format, the poll and the version; from format 2 on between them the epoch.
_WITHOUT_EPOCH = Struct(">B16sQ")
_WITH_EPOCH = Struct(">B16s16sQ")


class Freshness(NamedTuple):
    """A poll, and the version of it, in one history of the log, that a reader wants to see at least."""

    poll_id: UUID
    version: int
    log_epoch: UUID = ZERO


# What a reader without a token wants to see.
ANY_STATE = Freshness(UUID(int=0), 0)


def token(poll_id: UUID, version: int, log_epoch: UUID = ZERO) -> str:
    """The token for a poll at a version, safe in URLs and headers."""
    if log_epoch == ZERO:
        # Format 1, which servers that are older than epochs read as well.
        packed = _WITHOUT_EPOCH.pack(1, poll_id.bytes, version)
    else:
        packed = _WITH_EPOCH.pack(2, log_epoch.bytes, poll_id.bytes, version)
    return urlsafe_b64encode(packed).decode().rstrip("=")


def parse(at_least_as_fresh: str, field: str = "at_least_as_fresh") -> Freshness:
    """What a token asks for. Raises INVALID_REQUEST, about `field`, for a text that no command returned."""
    padded = at_least_as_fresh + "=" * (-len(at_least_as_fresh) % 4)
    with suppress(ValueError, StructError):
        packed = urlsafe_b64decode(padded.encode("ascii"))
        match packed[:1]:
            case b"\x01":
                _, poll_id, version = _WITHOUT_EPOCH.unpack(packed)
                return Freshness(UUID(bytes=poll_id), version)
            case b"\x02":
                _, log_epoch, poll_id, version = _WITH_EPOCH.unpack(packed)
                return Freshness(UUID(bytes=poll_id), version, UUID(bytes=log_epoch))
    raise invalid_request({field: "must be a consistency_token that a command returned"})
