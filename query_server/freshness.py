"""How far a poll must be in an answer: what a reader asks for, and how long it waits until a read model shows it."""

import asyncio
from collections.abc import Awaitable, Callable, Container, Mapping
from typing import Any, TypeVar
from uuid import UUID

import grpc

from contracts.freshness import parse
from contracts.log_epoch import LogPosition
from contracts.refusals import ReadModelBehind, invalid_request
from query_server.announcements import Announcements
from query_server.views import ReadModelFilling
from runtime.lifecycle import Backoff

Answer = TypeVar("Answer")

# How far each of some polls must be.
Wanted = Mapping[UUID, LogPosition]

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


def wanted(at_least_as_fresh: str, poll_ids: Container[UUID], field: str = "at_least_as_fresh") -> Wanted:
    """The poll that the token is for, with how far it must be; empty where there is no token.

    Raises INVALID_REQUEST, about `field`, for a token of a poll that the request does not ask for.
    """
    if not at_least_as_fresh:
        return {}
    poll_id, version, log_epoch = parse(at_least_as_fresh, field)
    if poll_id not in poll_ids:
        raise invalid_request({field: "must be a token of the poll that is asked for"})
    # Every poll is at version 1 at least: a forged 0 must not pass for an answer that is there.
    return {poll_id: LogPosition(log_epoch, max(version, 1))}


def behind(seen: LogPosition, least: LogPosition) -> ReadModelBehind:
    """What a caller is told whose patience ended while no store had a poll at `least`, but one had it at `seen`."""
    if seen.log_epoch != least.log_epoch:
        how_far = "is of an earlier log_epoch than the version asked for, or answered before"
    else:
        missing = least.version - seen.version
        how_far = (
            f"is at version {seen.version} of the poll, {missing} behind the version asked for, or answered before"
        )
    return ReadModelBehind(f"the read model {how_far}; the write stands")


async def caught_up(
    announcements: Announcements,
    read_model: str,
    poll_id: UUID,
    least: LogPosition,
    read: Callable[[], Awaitable[tuple[LogPosition, Answer]]],
    seconds: float,
) -> tuple[LogPosition, Answer]:
    """Reads once a read model has this poll at `least`, which it waits for up to `seconds`.

    `read` returns how far the poll is with the answer, and so does this. Raises READ_MODEL_BEHIND, and TimeoutError
    where nothing was read by then.
    """
    refusal: ReadModelBehind | None = None
    announced = asyncio.Event()
    lag = Backoff(first=0.005, longest=0.1)
    filling = Backoff(first=0.05, longest=1.0)

    async def once() -> tuple[LogPosition, Answer] | None:
        nonlocal refusal
        try:
            seen, answer = await read()
        except ReadModelBehind as behind_all:
            refusal = behind_all
            return None
        if seen >= least:
            return seen, answer
        refusal = behind(seen, least)
        return None

    try:
        async with asyncio.timeout(seconds) as limit:
            if found := await once():
                return found
            with announcements.expect(read_model, poll_id, least, announced.set):
                # Once more, now that nothing is missed any more; after that only when there is a reason to.
                while not (found := await once()):
                    if isinstance(refusal, ReadModelFilling):
                        # Nothing announces that it is full.
                        await filling.wait()
                        continue
                    if announced.is_set():
                        # The server that was read still follows the one that announces.
                        await lag.wait()
                    await announced.wait()
                return found
    except TimeoutError:
        if refusal is None or not limit.expired():
            raise
        raise refusal from None


async def retried(read: Callable[[], Awaitable[Answer]], seconds: float) -> Answer:
    """What `read` returns, which is asked again while it raises READ_MODEL_BEHIND, for up to `seconds`.

    Raises READ_MODEL_BEHIND, and TimeoutError where nothing was read by then.
    """
    refusal: ReadModelBehind | None = None
    pause = Backoff(first=0.02, longest=0.5)
    try:
        async with asyncio.timeout(seconds) as limit:
            while True:
                try:
                    return await read()
                except ReadModelBehind as behind_all:
                    refusal = behind_all
                await pause.wait()
    except TimeoutError:
        if refusal is None or not limit.expired():
            raise
        raise refusal from None
