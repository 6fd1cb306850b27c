"""Reading one's own writes: which version a reader asks for, and how long it waits until the read model shows it."""

import asyncio
from collections.abc import Awaitable, Callable, Container
from typing import Any, TypeVar
from uuid import UUID

import grpc
from tally.poll.v1.error_reason_pb2 import ErrorReason

from contracts.freshness import parse
from contracts.refusals import Refusal, invalid_request
from query_server.announcements import Announcements
from runtime.lifecycle import Backoff

Answer = TypeVar("Answer")

# How long a reader waits that sets no deadline, and how long at most; seconds.
_DEFAULT_PATIENCE = 5.0
_LONGEST_PATIENCE = 30.0
# What an answer needs to reach the caller before its deadline: at least so many seconds, or half of a very short
# deadline, and this part of a longer one, which gRPC rounds up on the wire.
_MARGIN = 0.05
_MARGIN_PART = 0.02


def patience(context: grpc.aio.ServicerContext[Any, Any]) -> float:
    """How long this call may wait for a store, and for a read model to catch up, in seconds."""
    remaining = context.time_remaining()
    if remaining is None:
        return _DEFAULT_PATIENCE
    margin = max(min(_MARGIN, remaining / 2), _MARGIN_PART * remaining)
    return min(max(remaining - margin, 0.0), _LONGEST_PATIENCE)


def wanted(at_least_as_fresh: str, poll_ids: Container[UUID], field: str = "at_least_as_fresh") -> dict[UUID, int]:
    """The poll that the token is for, with the version to be shown; empty where there is no token.

    Raises INVALID_REQUEST, about `field`, for a token of a poll that the request does not ask for.
    """
    if not at_least_as_fresh:
        return {}
    poll_id, version, _ = parse(at_least_as_fresh, field)
    if poll_id not in poll_ids:
        raise invalid_request({field: "must be a token of the poll that is asked for"})
    # Every poll is at version 1 at least: a forged 0 must not pass for an answer that is there.
    return {poll_id: max(version, 1)}


def behind(version: int, wanted_version: int) -> Refusal:
    """What a caller is told whose patience ended while the read model was at `version`."""
    missing = wanted_version - version
    return Refusal(
        ErrorReason.ERROR_REASON_READ_MODEL_BEHIND,
        f"the read model is at version {version} of the poll, {missing} behind the version asked for; the write stands",
    )


async def caught_up(
    announcements: Announcements,
    read_model: str,
    poll_id: UUID,
    version: int,
    read: Callable[[], Awaitable[tuple[int, Answer]]],
    seconds: float,
) -> tuple[int, Answer]:
    """Reads once a read model has this version of the poll, 0 for any, which it waits for up to `seconds`.

    `read` returns the poll's version with the answer, and so does this. Raises READ_MODEL_BEHIND, and TimeoutError
    where nothing was read by then.
    """
    seen = None
    announced = asyncio.Event()
    lag = Backoff(first=0.005, longest=0.1)
    try:
        async with asyncio.timeout(seconds) as limit:
            seen, answer = await read()
            if seen >= version:
                return seen, answer
            with announcements.expect(read_model, poll_id, version, announced.set):
                # Once more, now that nothing is missed any more; after that only when there is a reason to.
                seen, answer = await read()
                while seen < version:
                    if announced.is_set():
                        # The server that was read still follows the one that announces.
                        await lag.wait()
                    await announced.wait()
                    seen, answer = await read()
    except TimeoutError:
        if seen is None or not limit.expired():
            raise
        raise behind(seen, version) from None
    return seen, answer
