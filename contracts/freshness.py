"""The consistency token: what a command returns and a query takes as `at_least_as_fresh`. Opaque to callers."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from struct import Struct
from struct import error as StructError  # noqa: N812
from typing import NamedTuple
from uuid import UUID

from contracts.refusals import invalid_request

_LAYOUT = Struct(">B16sQ")
_FORMAT = 1


class Freshness(NamedTuple):
    """A poll, and the version that a reader wants to see at least."""

    poll_id: UUID
    version: int


# What a reader without a token wants to see.
ANY_STATE = Freshness(UUID(int=0), 0)


def token(poll_id: UUID, version: int) -> str:
    """The token for a poll at a version, safe in URLs and headers."""
    return urlsafe_b64encode(_LAYOUT.pack(_FORMAT, poll_id.bytes, version)).decode().rstrip("=")


def parse(at_least_as_fresh: str, field: str = "at_least_as_fresh") -> Freshness:
    """What a token asks for. Raises INVALID_REQUEST, about `field`, for a text that no command returned."""
    try:
        padded = at_least_as_fresh + "=" * (-len(at_least_as_fresh) % 4)
        token_format, poll_id, version = _LAYOUT.unpack(urlsafe_b64decode(padded.encode("ascii")))
    except (ValueError, StructError):
        token_format = None
    if token_format != _FORMAT:
        raise invalid_request({field: "must be a consistency_token that a command returned"})
    return Freshness(UUID(bytes=poll_id), version)
