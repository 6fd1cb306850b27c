"""What may happen to a poll: pure functions over plain data."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from google.protobuf.field_mask_pb2 import FieldMask
from tally.event.v1.event_pb2 import (
    CertificationFailed,
    CertificationRequested,
    Event,
    PollCancelled,
    PollCertified,
    PollClosed,
    PollCreated,
    PollOpened,
    PollUpdated,
    Recount,
    VotersRegistered,
)
from tally.poll.v1.error_reason_pb2 import ErrorReason
from tally.poll.v1.poll_pb2 import ELIGIBILITY_ROLL, VOTING_METHOD_SINGLE_CHOICE, PollSpec

from contracts.refusals import Refusal, invalid_request, quoted
from contracts.text import look

DRAFT, OPEN, CLOSED, CERTIFIED, CANCELLED = "DRAFT", "OPEN", "CLOSED", "CERTIFIED", "CANCELLED"


class Poll(NamedTuple):
    """A poll as a decision needs it: `now` is the write database's clock, under the poll's lock."""

    state: str
    spec: PollSpec
    now: datetime


class Change(NamedTuple):
    """What a command does to a poll: the state that it leaves, the event that tells it, and what the poll is then."""

    state: str
    event: Event
    spec: PollSpec


Decision = Callable[[Poll], Change]
"""Decides what a command does to a poll; raises Refusal where it may not."""


def create_poll(spec: PollSpec) -> Change:
    """The first event of a new poll."""
    known = _known(spec)
    return Change(DRAFT, Event(poll_created=PollCreated(poll=known)), known)


def update_poll(changes: PollSpec, mask: FieldMask) -> Decision:
    """A draft becomes another one. The caller checks what results by the rules of a new poll."""
    unknown = [path for path in mask.paths if path not in PollSpec.DESCRIPTOR.fields_by_name]
    if unknown:
        raise invalid_request({"update_mask": f"PollSpec has no field {quoted(unknown[0])}"})

    def decide(poll: Poll) -> Change:
        if poll.state != DRAFT:
            raise _not_draft(poll, "changed")
        spec = PollSpec()
        spec.CopyFrom(poll.spec)
        names = mask.paths or [field.name for field, _ in changes.ListFields()]
        _clear(spec, names)
        wanted = _known(changes)
        _clear(wanted, set(PollSpec.DESCRIPTOR.fields_by_name) - set(names))
        spec.MergeFrom(wanted)
        return Change(DRAFT, Event(poll_updated=PollUpdated(poll=spec)), spec)

    return decide


def open_poll(poll: Poll) -> Change:
    """A draft starts to take votes."""
    if poll.state != DRAFT:
        raise _not_draft(poll, "opened")
    if is_past_closing(poll):
        raise Refusal(ErrorReason.ERROR_REASON_POLL_NOT_OPEN, "the poll's closes_at has passed; update it first")
    return Change(OPEN, Event(poll_opened=PollOpened()), poll.spec)


def close_poll(poll: Poll) -> Change:
    """An open poll takes no more votes."""
    if poll.state != OPEN:
        raise not_open(poll.state, "only an OPEN poll can be closed")
    return Change(CLOSED, Event(poll_closed=PollClosed()), poll.spec)


def cancel_poll(poll: Poll) -> Change:
    """A poll that has not ended is given up."""
    if poll.state not in (DRAFT, OPEN):
        raise not_open(poll.state, "only a DRAFT or an OPEN poll can be cancelled")
    return Change(CANCELLED, Event(poll_cancelled=PollCancelled()), poll.spec)


def register_voters(voters: int, weight: int) -> Decision:
    """The electoral roll grew by so many voters, with so much weight together."""

    def decide(poll: Poll) -> Change:
        if not has_roll(poll.spec):
            raise invalid_request({"poll_id": "the poll has no electoral roll: its eligibility is OPEN"})
        if poll.state not in (DRAFT, OPEN):
            raise not_open(poll.state, "voters are registered while a poll is DRAFT or OPEN")
        event = Event(voters_registered=VotersRegistered(voters=voters, weight=weight))
        return Change(poll.state, event, poll.spec)

    return decide


def request_certification(poll: Poll) -> Change:
    """A recount of a closed poll begins."""
    if poll.state != CLOSED:
        raise Refusal(
            ErrorReason.ERROR_REASON_POLL_NOT_CLOSED, f"the poll is {poll.state}; only a CLOSED poll can be certified"
        )
    return Change(CLOSED, Event(certification_requested=CertificationRequested()), poll.spec)


def certify(recount: Recount, log: Recount) -> Decision:
    """A recount ended: the poll is certified if and only if the votes and the event log tell the same."""

    def decide(poll: Poll) -> Change:
        if poll.state != CLOSED:
            raise Refusal(ErrorReason.ERROR_REASON_POLL_NOT_CLOSED, f"the poll is {poll.state}")
        if recount == log:
            return Change(CERTIFIED, Event(poll_certified=PollCertified(recount=recount)), poll.spec)
        failed = CertificationFailed(recount=recount, log=log)
        return Change(CLOSED, Event(certification_failed=failed), poll.spec)

    return decide


def is_past_closing(poll: Poll) -> bool:
    """Whether the poll's time has passed by the write database's clock."""
    return poll.spec.HasField("closes_at") and poll.now >= poll.spec.closes_at.ToDatetime(UTC)


def has_roll(spec: PollSpec) -> bool:
    """Whether a vote weighs what the electoral roll says of its voter, and only those on it vote. In any other poll a
    vote weighs 1, whatever was put on a roll while the poll was another draft."""
    return spec.eligibility == ELIGIBILITY_ROLL


def most_choices(spec: PollSpec) -> int:
    """How many options one vote may mark."""
    if spec.method == VOTING_METHOD_SINGLE_CHOICE:
        return 1
    return min(spec.max_choices or len(spec.options), len(spec.options))


def choose(spec: PollSpec, option_numbers: Mapping[str, int], option_ids: Sequence[str]) -> list[int]:
    """The numbers of the options that a vote marks, ascending."""
    if not option_ids:
        raise Refusal(ErrorReason.ERROR_REASON_INVALID_REQUEST, "option_ids: must name at least one option")
    allowed = most_choices(spec)
    if len(option_ids) > allowed:
        raise Refusal(
            ErrorReason.ERROR_REASON_TOO_MANY_CHOICES, f"{len(option_ids)} options chosen where {allowed} is the most"
        )
    unknown = [option_id for option_id in option_ids if option_id not in option_numbers]
    if unknown:
        raise Refusal(ErrorReason.ERROR_REASON_UNKNOWN_OPTION, f"the poll has no option {quoted(unknown[0])}")
    numbers = sorted({option_numbers[option_id] for option_id in option_ids})
    if len(numbers) < len(option_ids):
        raise Refusal(ErrorReason.ERROR_REASON_INVALID_REQUEST, "option_ids: an option can be chosen only once")
    return numbers


def look_alikes(spec: PollSpec) -> Mapping[str, str]:
    """The labels that look the same as an earlier one of the poll: path of the field → what is wrong, in words."""
    seen: dict[str, int] = {}
    found = {}
    for number, option in enumerate(spec.options):
        first = seen.setdefault(look(option.label), number)
        if first != number:
            same = quoted(spec.options[first].label)
            found[f"options[{number}].label"] = (
                f"{quoted(option.label)} looks the same as options[{first}].label, {same}"
            )
    return found


def is_idempotency_key(text: str) -> bool:
    """Whether the contract allows this text as an idempotency_key."""
    return 16 <= len(text) <= 64 and text.isascii() and text.isprintable()


def not_open(state: str, why: str = "it takes no votes") -> Refusal:
    """The answer to what only an open poll allows."""
    return Refusal(ErrorReason.ERROR_REASON_POLL_NOT_OPEN, f"the poll is {state}; {why}")


def already_voted() -> Refusal:
    """The answer to a second vote, whatever it chooses."""
    return Refusal(
        ErrorReason.ERROR_REASON_ALREADY_VOTED,
        "a vote of this voter is recorded and stands; only a repeat of it, with its idempotency_key, gets its receipt",
    )


def locked() -> Refusal:
    """The answer to what another transaction's lock kept from being done in time."""
    return Refusal(
        ErrorReason.ERROR_REASON_LOCKED, "another transaction has locked what this call changes; nothing was changed"
    )


def too_many_of_voter() -> Refusal:
    """The answer to one more change of a voter of whom many wait."""
    return Refusal(
        ErrorReason.ERROR_REASON_OVERLOADED,
        "too many votes of this voter wait to be recorded; this one was not recorded, try again",
    )


def vote_conflict() -> Refusal:
    """The answer to a vote that would replace one which was recorded while it was under way."""
    return Refusal(
        ErrorReason.ERROR_REASON_VOTE_CONFLICT,
        "another vote of this voter was recorded while this one was under way; that vote stands",
    )


def not_eligible() -> Refusal:
    """The answer to a voter who is not on the roll."""
    return Refusal(ErrorReason.ERROR_REASON_VOTER_NOT_ELIGIBLE, "this voter is not on the poll's electoral roll")


def _not_draft(poll: Poll, what: str) -> Refusal:
    return Refusal(ErrorReason.ERROR_REASON_POLL_NOT_DRAFT, f"the poll is {poll.state}; only a DRAFT can be {what}")


def _known(spec: PollSpec) -> PollSpec:
    """A copy without fields that the contract does not name: no rule limits how much they hold."""
    known = PollSpec()
    known.CopyFrom(spec)
    known.DiscardUnknownFields()
    return known


def _clear(spec: PollSpec, names: Iterable[str]) -> None:
    for name in names:
        spec.ClearField(name)  # type: ignore[arg-type]  # the names are those of its fields
