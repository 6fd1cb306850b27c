"""What the events of a poll add up to. Pure: every read model counts by this, and by nothing else."""

from collections.abc import Iterable
from typing import NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp
from tally.event.v1.event_pb2 import Event, Recount, VotesCast
from tally.poll.v1.poll_pb2 import (
    POLL_STATE_CANCELLED,
    POLL_STATE_CERTIFIED,
    POLL_STATE_CLOSED,
    POLL_STATE_DRAFT,
    POLL_STATE_OPEN,
    RESULTS_VISIBILITY_AFTER_CLOSE,
    PollOption,
    PollSpec,
    PollState,
)
from tally.query.v1.query_service_pb2 import Certification, OptionCount, Outcome

from contracts.counting import added_votes, added_weight, count_changes
from contracts.voters import KEY_BYTES

# The most options that an outcome names; it counts those beyond.
_MAX_LEADERS = 10


class Tally(NamedTuple):
    """The results of a poll at one version; `counts` runs in parallel with `options`."""

    version: int
    state: PollState.ValueType
    options: tuple[PollOption, ...]
    counts: tuple[int, ...]
    # When the event `version` was recorded.
    as_of: Timestamp
    # The voters whose vote counts, and those on the electoral roll.
    total_votes: int = 0
    eligible_voters: int = 0
    # The outcome of the final recount.
    certification: Certification | None = None
    # Nobody may read the counts: the poll shows them after it is closed. It stays so where the poll is cancelled.
    hidden: bool = False
    # The sum of the weights of the votes that count; None where it is not known.
    total_weight: int | None = 0


# In which states each change can happen.
_STATES = {
    "poll_created": (),
    "poll_updated": (POLL_STATE_DRAFT,),
    "poll_opened": (POLL_STATE_DRAFT,),
    "poll_closed": (POLL_STATE_OPEN,),
    "poll_cancelled": (POLL_STATE_DRAFT, POLL_STATE_OPEN),
    "voters_registered": (POLL_STATE_DRAFT, POLL_STATE_OPEN),
    "votes_cast": (POLL_STATE_OPEN,),
    "certification_requested": (POLL_STATE_CLOSED,),
    "poll_certified": (POLL_STATE_CLOSED,),
    "certification_failed": (POLL_STATE_CLOSED,),
}


_LEADS_TO = {
    "poll_opened": POLL_STATE_OPEN,
    "poll_closed": POLL_STATE_CLOSED,
    "poll_cancelled": POLL_STATE_CANCELLED,
    "poll_certified": POLL_STATE_CERTIFIED,
}


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
    # Why the event after the last of `applied` cannot be applied at all, in none of the copies that came.
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
        elif event.version > version + 1 and not event.HasField("poll_archived"):
            beyond = event.version
        else:
            try:
                tally = fold(tally, event)
            except Unfoldable as reason:
                error = reason
                continue
            error = None
            applied.append(event)
    return Advance(tally, applied, duplicates, beyond, error)


def fold(tally: Tally | None, event: Event) -> Tally:
    """The poll after one more event; an unknown one that is ignorable only changes the version. Raises Unfoldable."""
    change = event.WhichOneof("change")
    if change == "poll_archived":
        return _archived(event)
    if tally is None:
        return _created(event)
    if event.version != tally.version + 1:
        raise Unfoldable(f"version {event.version} cannot follow version {tally.version}")
    if change not in _STATES:
        if event.ignorable:
            return tally._replace(version=event.version, as_of=event.recorded_at)
        raise Unfoldable(f"version {event.version} is a change that this version of the code does not know")
    if tally.state not in _STATES[change]:
        raise Unfoldable(f"version {event.version} is {change}, in state {PollState.Name(tally.state)}")
    state = _LEADS_TO.get(change, tally.state)
    tally = tally._replace(version=event.version, as_of=event.recorded_at, state=state)
    match change:
        case "poll_updated":
            tally = _planned(tally, event.poll_updated.poll)
        case "poll_closed":
            tally = tally._replace(hidden=False)
        case "voters_registered":
            tally = tally._replace(eligible_voters=tally.eligible_voters + event.voters_registered.voters)
        case "votes_cast":
            tally = _counted(tally, event.votes_cast)
        case "poll_certified":
            tally = tally._replace(certification=_certification(tally, event.poll_certified.recount, agreed=True))
        case "certification_failed":
            recount = event.certification_failed.recount
            tally = tally._replace(certification=_certification(tally, recount, agreed=False))
    return tally


def outcome(tally: Tally) -> Outcome | None:
    """What a closed poll came to; None before."""
    if tally.state not in (POLL_STATE_CLOSED, POLL_STATE_CERTIFIED):
        return None
    most = max(tally.counts)
    leaders = [
        OptionCount(option_id=option.option_id, label=option.label, count=count)
        for option, count in zip(tally.options, tally.counts, strict=True)
        if count == most > 0
    ]
    certified = tally.state == POLL_STATE_CERTIFIED
    return Outcome(
        leaders=leaders[:_MAX_LEADERS],
        leader_count=len(leaders),
        total_votes=tally.total_votes,
        certified=certified,
    )


def _planned(tally: Tally, spec: PollSpec) -> Tally:
    """A draft as it was planned last."""
    hidden = spec.results_visibility == RESULTS_VISIBILITY_AFTER_CLOSE
    return tally._replace(options=tuple(spec.options), counts=(0,) * len(spec.options), hidden=hidden)


def _counted(tally: Tally, votes: VotesCast) -> Tally:
    voters, rest = divmod(len(votes.voter_keys), KEY_BYTES)
    if rest or voters != len(votes.choices or votes.option_numbers):
        raise Unfoldable(f"version {tally.version} has not as many voters as votes")
    counts = list(tally.counts)
    for number, count in count_changes(votes).items():
        if number >= len(counts):
            raise Unfoldable(f"version {tally.version} has a vote for option {number} of {len(counts)}")
        counts[number] += count
    total_votes = tally.total_votes + added_votes(votes)
    return tally._replace(counts=tuple(counts), total_votes=total_votes, total_weight=_weight(tally, votes))


def _weight(tally: Tally, votes: VotesCast) -> int | None:
    added = added_weight(votes)
    return None if tally.total_weight is None or added is None else tally.total_weight + added


def _certification(tally: Tally, recount: Recount, *, agreed: bool) -> Certification:
    if len(recount.counts) != len(tally.options):
        raise Unfoldable(f"version {tally.version} recounts {len(recount.counts)} options of {len(tally.options)}")
    counts = [
        OptionCount(option_id=option.option_id, label=option.label, count=count)
        for option, count in zip(tally.options, recount.counts, strict=True)
    ]
    return Certification(certified_at=tally.as_of, counts=counts, total_votes=recount.total_votes, agreed=agreed)


def _created(event: Event) -> Tally:
    if not event.HasField("poll_created") or event.version != 1:
        raise Unfoldable(f"version {event.version} is {event.WhichOneof('change')}: not the beginning of a poll")
    return _planned(Tally(1, POLL_STATE_DRAFT, (), (), event.recorded_at), event.poll_created.poll)


def _archived(event: Event) -> Tally:
    """The poll as its archive tells it, whatever was known of it before."""
    told = event.poll_archived
    tally = _planned(Tally(event.version, told.state, (), (), event.recorded_at), told.poll)
    if len(told.recount.counts) != len(tally.options):
        raise Unfoldable(
            f"version {event.version} has {len(told.recount.counts)} counts of {len(tally.options)} options"
        )
    tally = tally._replace(
        counts=tuple(told.recount.counts),
        total_votes=told.recount.total_votes,
        total_weight=told.total_weight,
        eligible_voters=told.eligible_voters,
        hidden=tally.hidden and told.state == POLL_STATE_CANCELLED,
    )
    if told.HasField("certified_at"):
        certification = _certification(tally._replace(as_of=told.certified_at), told.recount, agreed=True)
        tally = tally._replace(certification=certification)
    return tally


def _version(event: Event) -> int:
    return event.version
