"""Where read models keep their dead letters, and how another attempt at one is asked for."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from uuid import UUID

from clients.databases import FAILURES, reason
from clients.failures import Failure
from clients.poll_ids import find_among
from contracts.bus import REPUBLISH, republish_request
from contracts.dead_letters import DeadLetter
from projector.__main__ import KINDS
from runtime import nats

_SECONDS = 5.0
_LOOK_SECONDS = 0.1
# Who asks the relay for the same events again within a second may not be heard.
_ASK_SECONDS = 2.0

Row = tuple[str, DeadLetter]


class Outcome(NamedTuple):
    """What became of dead letters, each with its read model: those of `parked_again` are the new ones."""

    applied: list[Row]
    parked_again: list[Row]
    untried: list[Row]


async def read_all(stores: Mapping[str, str]) -> tuple[dict[str, list[DeadLetter]], dict[str, str]]:
    """The dead letters of each read model, and of those whose store does not answer the reason."""
    found: dict[str, list[DeadLetter]] = {}
    unanswered: dict[str, str] = {}
    for name, store in stores.items():
        failures: tuple[type[Exception], ...] = (*KINDS[name].failures, *FAILURES)
        try:
            found[name] = await _read(name, store)
        except failures as error:
            unanswered[name] = reason(error)
    return found, unanswered


async def replay(stores: Mapping[str, str], nats_url: str, polls: Sequence[str] | None, seconds: float) -> Outcome:
    """Has polls published again from where they are parked, and waits up to `seconds` for what comes of it.

    `polls` are ids or what they begin with; None: all. Raises Failure where a store or NATS does not answer, and where
    one of the polls is not parked.
    """
    before = await _parked(stores)
    if polls is not None:
        wanted = find_among(polls, [letter.poll_id for letter in before.values()])
        before = {key: letter for key, letter in before.items() if letter.poll_id in wanted}
        if missing := set(wanted) - {letter.poll_id for letter in before.values()}:
            raise Failure(f"no read model is parked at an event of poll {min(missing)}")
    waiting, now = dict(before), before
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    try:
        async with nats.connect(nats_url, application="tally dead-letters") as bus:
            ask_at = 0.0
            while waiting and loop.time() < end:
                if loop.time() >= ask_at:
                    ask_at = loop.time() + _ASK_SECONDS
                    for poll_id, version in _first_versions(waiting).items():
                        await bus.publish(REPUBLISH, republish_request(UUID(poll_id), version))
                await asyncio.sleep(_LOOK_SECONDS)
                now = await _parked(stores)
                waiting = {key: letter for key, letter in waiting.items() if not _is_tried(letter, now.get(key))}
    except* (Failure, *nats.UNAVAILABLE) as failures:
        first = failures.exceptions[0]
        if not isinstance(first, Failure):
            first = Failure(f"NATS does not answer: {reason(first)}")
        raise first from None
    return Outcome(
        applied=[(name, letter) for (name, poll_id), letter in before.items() if (name, poll_id) not in now],
        parked_again=[(key[0], now[key]) for key in before if key in now and key not in waiting],
        untried=[(name, letter) for (name, _), letter in waiting.items()],
    )


async def _parked(stores: Mapping[str, str]) -> dict[tuple[str, str], DeadLetter]:
    """The dead letters by read model and poll. Raises Failure."""
    found, unanswered = await read_all(stores)
    for name, error in unanswered.items():
        raise Failure(f"the store of {name} does not answer: {error}")
    return {(name, letter.poll_id): letter for name, letters in found.items() for letter in letters}


async def _read(name: str, store: str) -> list[DeadLetter]:
    async with asyncio.timeout(_SECONDS), KINDS[name].connect(store) as model:
        return await model.dead_letters()


def _is_tried(before: DeadLetter, now: DeadLetter | None) -> bool:
    """Whether the poll went on, or another message with the event came and was no better."""
    return now is None or (now.version, now.stream_sequence) != (before.version, before.stream_sequence)


def _first_versions(letters: Mapping[tuple[str, str], DeadLetter]) -> dict[str, int]:
    """Where each poll is parked, in the read model that is behind the others."""
    first: dict[str, int] = {}
    for letter in letters.values():
        first[letter.poll_id] = min(letter.version, first.get(letter.poll_id, letter.version))
    return first
