"""What may happen to a poll: pure functions over plain data."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tally.event.v1.event_pb2 import Event, PollClosed, PollCreated, PollOpened
from tally.poll.v1.error_reason_pb2 import ErrorReason
from tally.poll.v1.poll_pb2 import PollSpec

from contracts.refusals import Refusal

DRAFT, OPEN, CLOSED = "DRAFT", "OPEN", "CLOSED"

MAX_VOTER_ID_CHARACTERS = 256


class Change(NamedTuple):
    """What a command does to a poll: the state it leaves the poll in, and the event that tells it."""

    state: str
    event: Event


Decision = Callable[[str], Change]
"""Decides, from a poll's state, what a command does to it; raises Refusal where it may not."""


def create_poll(spec: PollSpec) -> Change:
    """The first event of a new poll."""
    return Change(DRAFT, Event(poll_created=PollCreated(poll=spec)))


def open_poll(state: str) -> Change:
    """A draft starts to take votes."""
    if state != DRAFT:
        raise Refusal(ErrorReason.ERROR_REASON_POLL_NOT_DRAFT, f"the poll is {state}; only a DRAFT can be opened")
    return Change(OPEN, Event(poll_opened=PollOpened()))


def close_poll(state: str) -> Change:
    """An open poll takes no more votes."""
    if state != OPEN:
        raise Refusal(ErrorReason.ERROR_REASON_POLL_NOT_OPEN, f"the poll is {state}; only an OPEN poll can be closed")
    return Change(CLOSED, Event(poll_closed=PollClosed()))


def choose(option_numbers: Mapping[str, int], option_ids: Sequence[str]) -> int:
    """The number of the option that a SINGLE_CHOICE vote marks."""
    if len(option_ids) != 1:
        if not option_ids:
            raise Refusal(ErrorReason.ERROR_REASON_INVALID_REQUEST, "option_ids: must name one option")
        raise Refusal(ErrorReason.ERROR_REASON_TOO_MANY_CHOICES, f"{len(option_ids)} options chosen where 1 is allowed")
    number = option_numbers.get(option_ids[0])
    if number is None:
        raise Refusal(ErrorReason.ERROR_REASON_UNKNOWN_OPTION, f"the poll has no option {option_ids[0]!r}")
    return number


def check_voter_id(voter_id: str) -> None:
    """Refuses a voter id that the contract does not allow."""
    if not 1 <= len(voter_id) <= MAX_VOTER_ID_CHARACTERS:
        raise Refusal(
            ErrorReason.ERROR_REASON_INVALID_REQUEST,
            f"voter_id: must have 1 to {MAX_VOTER_ID_CHARACTERS} characters, has {len(voter_id)}",
        )


def not_open(state: str) -> Refusal:
    """The answer to a vote that comes too early or too late."""
    return Refusal(ErrorReason.ERROR_REASON_POLL_NOT_OPEN, f"the poll is {state} and takes no votes")


def already_voted() -> Refusal:
    """The answer to a second, different vote."""
    return Refusal(ErrorReason.ERROR_REASON_ALREADY_VOTED, "this voter chose another option before; that vote stands")


def poll_not_found(poll_id: object) -> Refusal:
    """The answer to a command for a poll that does not exist."""
    return Refusal(ErrorReason.ERROR_REASON_POLL_NOT_FOUND, f"there is no poll {poll_id}")
