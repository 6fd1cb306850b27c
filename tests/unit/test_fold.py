"""Counting, without any server: every event once, in order, and nothing that does not fit."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from tally.event.v1.event_pb2 import (
    CountChange,
    Event,
    PollArchived,
    PollCancelled,
    PollClosed,
    PollCreated,
    PollOpened,
    PollUpdated,
    Recount,
    VotesCast,
)
from tally.poll.v1.poll_pb2 import (
    POLL_STATE_CERTIFIED,
    POLL_STATE_CLOSED,
    POLL_STATE_DRAFT,
    POLL_STATE_OPEN,
    RESULTS_VISIBILITY_AFTER_CLOSE,
    PollOption,
    PollSpec,
)

from projector.fold import Tally, Unfoldable, advance, fold

POLL_ID = str(uuid4())
START = datetime(2026, 1, 1, tzinfo=UTC)
CREATED = PollCreated(poll=PollSpec(options=[PollOption(option_id="yes"), PollOption(option_id="no")]))


def event(version: int, **change: Any) -> Event:
    moment = START + timedelta(seconds=version)
    return Event(poll_id=POLL_ID, version=version, recorded_at=moment, **change)  # type: ignore[arg-type]


def votes(*numbers: int) -> VotesCast:
    return VotesCast(batch_id=1, voter_keys=random.randbytes(16 * len(numbers)), option_numbers=numbers)


def life(*casts: VotesCast) -> list[Event]:
    """A poll from its creation to its end."""
    between = [event(version, votes_cast=cast) for version, cast in enumerate(casts, 3)]
    end = event(len(casts) + 3, poll_closed=PollClosed())
    return [event(1, poll_created=CREATED), event(2, poll_opened=PollOpened()), *between, end]


def folded(events: list[Event]) -> Tally:
    tally = advance(None, events).tally
    assert tally is not None
    return tally


def test_a_poll_goes_through_its_life() -> None:
    events = life(votes(0, 1, 1), votes(1))
    tallies = [folded(events[:length]) for length in range(1, len(events) + 1)]
    assert [tally.version for tally in tallies] == [1, 2, 3, 4, 5]
    assert [tally.counts for tally in tallies] == [(0, 0), (0, 0), (1, 2), (1, 3), (1, 3)]
    states = [POLL_STATE_DRAFT, POLL_STATE_OPEN, POLL_STATE_OPEN, POLL_STATE_OPEN, POLL_STATE_CLOSED]
    assert [tally.state for tally in tallies] == states
    assert tallies[-1].as_of.ToDatetime(UTC) == START + timedelta(seconds=5)
    assert [option.option_id for option in tallies[-1].options] == ["yes", "no"]


def test_results_are_hidden_from_the_plan_on_until_the_poll_is_closed() -> None:
    spec = PollSpec(options=CREATED.poll.options, results_visibility=RESULTS_VISIBILITY_AFTER_CLOSE)
    changes: list[dict[str, Any]] = [
        {"poll_created": CREATED},
        {"poll_updated": PollUpdated(poll=spec)},
        {"poll_opened": PollOpened()},
        {"votes_cast": votes(0)},
    ]
    events = [event(version, **change) for version, change in enumerate(changes, 1)]
    assert [folded(events[:length]).hidden for length in range(1, 5)] == [False, True, True, True]
    assert not folded([*events, event(5, poll_closed=PollClosed())]).hidden
    assert folded([*events, event(5, poll_cancelled=PollCancelled())]).hidden, "to cancel must not be a way to look"


def test_folding_changes_nothing_that_was_there_before() -> None:
    events = life(votes(0))
    before = folded(events[:2])
    after = fold(before, events[2])
    assert (before.version, before.counts, after.counts) == (2, (0, 0), (1, 0))


def test_duplicates_and_any_order_make_no_difference() -> None:
    events = life(*(votes(*random.choices((0, 1), k=random.randrange(9))) for _ in range(30)))
    expected = folded(events)
    shuffled = events * 3
    random.shuffle(shuffled)
    result = advance(None, shuffled)
    assert result.tally == expected
    assert [applied.version for applied in result.applied] == [event.version for event in events]
    assert (result.duplicates, result.beyond, result.error) == (2 * len(events), 0, None)


def test_nothing_is_applied_after_a_gap() -> None:
    events = life(votes(0), votes(1), votes(1))
    result = advance(None, [*events[:3], *events[4:]])
    assert result.tally == folded(events[:3])
    assert result.beyond == events[-1].version
    # What was missing comes, with everything after it again.
    again = advance(result.tally, events[3:])
    assert again.tally == folded(events)
    assert again.beyond == 0


def test_a_poll_without_its_beginning_waits_for_it() -> None:
    result = advance(None, life(votes(0))[1:])
    assert (result.tally, result.applied, result.beyond) == (None, [], 4)


@pytest.mark.parametrize(
    "bad",
    [
        event(3),
        event(3, poll_created=CREATED),
        event(3, poll_opened=PollOpened()),
        event(3, votes_cast=votes(2)),
        event(3, votes_cast=VotesCast(voter_keys=bytes(32), option_numbers=[1])),
        event(3, votes_cast=VotesCast(voter_keys=bytes(15), option_numbers=[1])),
    ],
    ids=["unknown", "created again", "opened again", "unknown option", "more voters than votes", "half a voter"],
)
def test_an_event_that_does_not_fit_stops_the_poll_there(bad: Event) -> None:
    result = advance(None, [*life()[:2], bad, event(4, votes_cast=votes(1))])
    assert result.tally == folded(life()[:2])
    assert [applied.version for applied in result.applied] == [1, 2]
    assert isinstance(result.error, Unfoldable)
    assert "version 3" in str(result.error)


def test_no_vote_counts_before_opening_or_after_closing() -> None:
    draft, closed = folded(life()[:1]), folded(life(votes(0)))
    for tally in (draft, closed):
        with pytest.raises(Unfoldable):
            fold(tally, event(tally.version + 1, votes_cast=votes(0)))


def test_an_event_of_a_later_code_is_unknown_to_this_one() -> None:
    # Field 99 is not in the schema of this code.
    later = Event.FromString(event(3).SerializeToString() + b"\x9a\x06\x00")
    with pytest.raises(Unfoldable, match="does not know"):
        fold(folded(life()[:2]), later)


def test_an_unknown_event_that_is_ignorable_changes_the_version_only() -> None:
    before = folded(life()[:2])
    later = Event.FromString(event(3).SerializeToString() + Event(ignorable=True).SerializeToString() + b"\x9a\x06\x00")
    assert fold(before, later) == before._replace(version=3, as_of=later.recorded_at)
    # One that is known is applied, whatever it says about itself.
    known = event(3, votes_cast=votes(1))
    known.ignorable = True
    assert fold(before, known).counts == (0, 1)
    with pytest.raises(Unfoldable):
        fold(None, Event(version=1, ignorable=True))


def test_a_good_copy_of_a_bad_event_is_applied() -> None:
    events = life(votes(0))
    for copies in ([event(3), events[2]], [events[2], event(3)]):
        result = advance(None, [*events[:2], *copies, events[3]])
        assert (result.tally, result.error) == (folded(events), None)


def test_a_version_is_never_skipped_or_repeated() -> None:
    tally = folded(life()[:2])
    for version in (1, 2, 4):
        with pytest.raises(Unfoldable):
            fold(tally, event(version, votes_cast=votes(0)))
    with pytest.raises(Unfoldable):
        fold(None, event(2, poll_created=CREATED))


def test_the_weight_of_all_votes_has_each_voter_once() -> None:
    def weighted(*weights: int, **fields: Any) -> VotesCast:
        keys = random.randbytes(16 * len(weights))
        changes = [CountChange(option_number=0, change=sum(weights))]
        numbers = [0] * len(weights)
        return VotesCast(voter_keys=keys, option_numbers=numbers, weights=weights, count_changes=changes, **fields)

    plain = folded(life(votes(0, 1), VotesCast(voter_keys=bytes(32), option_numbers=[0, 1], replaced=1)))
    assert (plain.total_votes, plain.total_weight) == (3, 3)
    assert folded(life(weighted(5, 2))).total_weight == 7
    assert folded(life(weighted(5, 2), weighted(5, 9, replaced=1, replaced_weight=5))).total_weight == 16
    # An older event does not tell what the replaced votes weigh; from then on the sum is not known.
    assert folded(life(weighted(5, 2), weighted(5, 9, replaced=1), weighted(1))).total_weight is None


def archived(version: int, **told: Any) -> Event:
    recount = Recount(counts=[5, 2], total_votes=6)
    told = {"poll": CREATED.poll, "state": POLL_STATE_CERTIFIED, "recount": recount, "certified_at": START, **told}
    return event(version, poll_archived=PollArchived(**told), ignorable=True)


@pytest.mark.parametrize("known", [[], [event(1, poll_created=CREATED)]])
def test_an_archived_poll_needs_none_of_its_earlier_events(known: list[Event]) -> None:
    result = advance(None, [*known, archived(9, total_weight=8, eligible_voters=7)])
    tally = result.tally
    assert tally is not None
    assert (result.beyond, result.error) == (0, None)
    assert (tally.version, tally.state, tally.counts, tally.total_votes) == (9, POLL_STATE_CERTIFIED, (5, 2), 6)
    assert (tally.total_weight, tally.eligible_voters, tally.hidden) == (8, 7, False)
    assert tally.certification is not None
    assert tally.certification.agreed
    assert [count.count for count in tally.certification.counts] == [5, 2]
    assert advance(tally, [event(4, poll_opened=PollOpened()), archived(9)]).duplicates == 2


def test_an_archive_that_does_not_fit_its_poll_is_not_applied() -> None:
    result = advance(None, [archived(9, recount=Recount(counts=[5], total_votes=5))])
    assert result.tally is None
    assert "1 counts of 2 options" in str(result.error)
