"""What the events of a poll add up to. Pure: every read model counts by this, and by nothing else."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp
from tally.event.v1.event_pb2 import Event, VotesCast
from tally.poll.v1.poll_pb2 import (
    POLL_STATE_CLOSED,
    POLL_STATE_DRAFT,
    POLL_STATE_OPEN,
    PollOption,
    PollState,
)

from contracts.voters import KEY_BYTES


class Tally(NamedTuple):
    """The results of a poll at one version; `counts` runs in parallel with `options`."""

    version: int
    state: PollState.ValueType
    options: tuple[PollOption, ...]
    counts: tuple[int, ...]
    # When the event `version` was recorded.
    as_of: Timestamp


class Unfoldable(Exception):  # noqa: N818 - says what the event is
    """An event that this code does not know, or that cannot follow the ones before it."""


class Advance(NamedTuple):
    """What some events did to a poll: `applied` led to `tally`, the others did nothing."""

    tally: Tally | None
    applied: list[Event]
    # How many were applied before.
    duplicates: int
    # The highest version among those that cannot be applied because one before them is missing; 0: none.
    beyond: int
    # Why the event after the last of `applied` cannot be applied at all.
    error: Unfoldable | None


def advance(tally: Tally | None, events: Iterable[Event]) -> Advance:
    """Applies whichever of a poll's events come next: each once, in order of version, nothing after a gap."""
    applied: list[Event] = []
    duplicates = beyond = 0
    error = None
    for event in sorted(events, key=_version):
        version = tally.version if tally else 0
        if event.version <= version:
            duplicates += 1
        elif event.version > version + 1:
            beyond = event.version
        else:
            try:
                tally = fold(tally, event)
            except Unfoldable as reason:
                error = reason
                break
            applied.append(event)
    return Advance(tally, applied, duplicates, beyond, error)


def fold(tally: Tally | None, event: Event) -> Tally:
    """The poll after one more event. Raises Unfoldable."""
    change = event.WhichOneof("change")
    if tally is None:
        if change != "poll_created" or event.version != 1:
            raise Unfoldable(f"version {event.version} is {change}: not the beginning of a poll")
        options = tuple(event.poll_created.poll.options)
        return Tally(1, POLL_STATE_DRAFT, options, (0,) * len(options), event.recorded_at)
    if event.version != tally.version + 1:
        raise Unfoldable(f"version {event.version} cannot follow version {tally.version}")
    state, counts = tally.state, tally.counts
    match change, state:
        case "poll_opened", PollState.POLL_STATE_DRAFT:
            state = POLL_STATE_OPEN
        case "votes_cast", PollState.POLL_STATE_OPEN:
            counts = _counted(counts, event.votes_cast, event.version)
        case "poll_closed", PollState.POLL_STATE_OPEN:
            state = POLL_STATE_CLOSED
        case None, _:
            raise Unfoldable(f"version {event.version} is a change that this version of the code does not know")
        case _:
            raise Unfoldable(f"version {event.version} is {change}, in state {PollState.Name(state)}")
    return Tally(event.version, state, tally.options, counts, event.recorded_at)


def _counted(counts: tuple[int, ...], votes: VotesCast, version: int) -> tuple[int, ...]:
    if len(votes.voter_keys) != KEY_BYTES * len(votes.option_numbers):
        raise Unfoldable(f"version {version} has not as many voters as votes")
    total = list(counts)
    for number, count in Counter(votes.option_numbers).items():
        if number >= len(total):
            raise Unfoldable(f"version {version} has a vote for option {number} of {len(total)}")
        total[number] += count
    return tuple(total)


def _version(event: Event) -> int:
    return event.version
