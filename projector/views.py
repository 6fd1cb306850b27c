"""The views in the read database: a row for each poll, for each counted vote, and for each 10 s with votes."""

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from struct import Struct
from typing import ClassVar, Literal

import asyncpg
from google.protobuf.timestamp_pb2 import Timestamp
from tally.event.v1.event_pb2 import Event
from tally.poll.v1.poll_pb2 import (
    ELIGIBILITY_ROLL,
    RESULTS_VISIBILITY_AFTER_CLOSE,
    PollOption,
    PollSpec,
    PollState,
    VotingMethod,
)
from tally.query.v1.query_service_pb2 import Certification

from contracts.counting import added_votes
from contracts.read_database import TURNOUT_GRAIN, VOTER_BYTES, vote_key
from contracts.voters import KEY_BYTES
from projector.fold import Tally, outcome
from projector.read_model import Change, Displaced
from projector.schema import SECONDS, Schema, tallies_in
from runtime import postgres

sql = postgres.queries(__package__)

# COPY's binary format: a header, rows of fields that each begin with their length, and an end.
_COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_END = b"\xff\xff"
_VOTE_COLUMNS = ["vote_key", "version", "recorded_at"]
# A row is the same up to its voter, and the same after it as all others of its event.
_VOTE_HEAD = Struct(">hi").pack(len(_VOTE_COLUMNS), VOTER_BYTES + 4)
_VOTE_TAIL = Struct(">i iq iq")
_VOTE = Struct(f"{len(_VOTE_HEAD) + VOTER_BYTES + _VOTE_TAIL.size}s")
_KEY = Struct(f"{KEY_BYTES}s")
# Postgres counts time from 2000.
_EPOCH_SECONDS = 946_684_800


class Views(Schema):
    """The read model `views`; made by `connect`."""

    name: ClassVar[str] = "views"
    polls: ClassVar[str] = "polls"

    async def load(self, poll_ids: Sequence[str]) -> dict[str, Tally]:
        return tallies_in(await self._connection.fetch(sql.tallies, poll_ids), _tally)

    async def _apply(self, changes: Sequence[Change]) -> None:
        poll_nos = await self._store_polls(changes)
        if len(poll_nos) != len(changes):
            raise Displaced("a poll is not at the version that this process left it at")
        events = [(poll_nos[change.poll_id], event) for change in changes for event in change.events]
        # An event without replaced votes has only voters who are new, whatever events are around it.
        fresh = [event for event in events if event[1].votes_cast.voter_keys and not event[1].votes_cast.replaced]
        if fresh:
            await self._connection.copy_to_table(
                "votes", source=_copied(fresh), columns=_VOTE_COLUMNS, format="binary", timeout=SECONDS
            )
        for poll_no, event in events:
            if event.votes_cast.replaced:
                await self._replace_votes(poll_no, event)
        if turnout := _turnout(events):
            await self._connection.execute(sql.add_turnout, *zip(*turnout, strict=True))
        if archived := [poll_no for poll_no, event in events if event.HasField("poll_archived")]:
            await self._connection.execute(sql.remove_turnout, archived)

    async def _replace_votes(self, poll_no: int, event: Event) -> None:
        """The votes of an event some of which take the place of earlier ones."""
        keys = [vote_key(voter, poll_no) for (voter,) in _KEY.iter_unpack(event.votes_cast.voter_keys)]
        await self._connection.execute(sql.replace_votes, event.version, _moment(event.recorded_at), keys)

    async def _store_polls(self, changes: Sequence[Change]) -> Mapping[str, int]:
        """The poll_no of each poll that was at the version before its change, and now has that change."""
        rows: list[asyncpg.Record] = []
        created = [_inserted(change) for change in changes if change.before == 0]
        if created:
            rows += await self._connection.fetchmany(sql.insert_poll, created)
        updated = [_updated(change) for change in changes if change.before > 0]
        if updated:
            specs = [_spec(c.poll_id, spec) for c in changes if c.before > 0 and (spec := _newest_spec(c.events))]
            if specs:
                await self._connection.executemany(sql.update_spec, specs)
            rows += await self._connection.fetch(sql.update_polls, *zip(*updated, strict=True))
        return {str(row["poll_id"]): row["poll_no"] for row in rows}


def _inserted(change: Change) -> tuple[object, ...]:
    tally, spec = change.tally, _newest_spec(change.events)
    # A poll begins with one.
    assert spec is not None
    return (
        *_spec(change.poll_id, spec),
        tally.version,
        _state(tally),
        tally.counts,
        tally.total_votes,
        _moment(tally.as_of),
        _when(change.events, "created_at", "poll_created"),
        _when(change.events, "opened_at", "poll_opened"),
        _when(change.events, "closed_at", "poll_closed", "poll_cancelled"),
        tally.eligible_voters,
        _certification(tally),
        tally.hidden,
        _outcome(tally),
        tally.total_weight,
        _archived_at(change.events),
    )


def _updated(change: Change) -> tuple[object, ...]:
    tally = change.tally
    return (
        change.poll_id,
        change.before,
        tally.version,
        _state(tally),
        f"{{{','.join(map(str, tally.counts))}}}",
        tally.total_votes,
        _moment(tally.as_of),
        _when(change.events, "opened_at", "poll_opened"),
        _when(change.events, "closed_at", "poll_closed", "poll_cancelled"),
        tally.eligible_voters,
        _certification(tally),
        tally.hidden,
        _outcome(tally),
        tally.total_weight,
        _archived_at(change.events),
    )


def _newest_spec(events: Sequence[Event]) -> PollSpec | None:
    """What the poll is after these events; None where none of them says so."""
    for event in reversed(events):
        change = event.WhichOneof("change")
        match change:
            case "poll_created":
                return event.poll_created.poll
            case "poll_updated":
                return event.poll_updated.poll
            case "poll_archived":
                return event.poll_archived.poll
    return None


def _spec(poll_id: str, spec: PollSpec) -> tuple[object, ...]:
    return (
        poll_id,
        spec.title,
        spec.description,
        VotingMethod.Name(spec.method).removeprefix("VOTING_METHOD_"),
        [option.option_id for option in spec.options],
        [option.label for option in spec.options],
        spec.max_choices,
        _moment(spec.opens_at) if spec.HasField("opens_at") else None,
        _moment(spec.closes_at) if spec.HasField("closes_at") else None,
        spec.allow_vote_change,
        "ROLL" if spec.eligibility == ELIGIBILITY_ROLL else "OPEN",
        "AFTER_CLOSE" if spec.results_visibility == RESULTS_VISIBILITY_AFTER_CLOSE else "LIVE",
    )


def _turnout(events: Sequence[tuple[int, Event]]) -> list[tuple[int, datetime, int]]:
    """How many voted for the first time, by poll and time; in the order of the key."""
    votes = Counter[tuple[int, int]]()
    for poll_no, event in events:
        if event.HasField("votes_cast"):
            votes[poll_no, event.recorded_at.seconds // TURNOUT_GRAIN] += added_votes(event.votes_cast)
    return [
        (poll_no, datetime.fromtimestamp(number * TURNOUT_GRAIN, UTC), count)
        for (poll_no, number), count in sorted(votes.items())
        if count
    ]


async def _copied(events: Sequence[tuple[int, Event]]) -> AsyncIterator[bytes]:
    """The rows of votes as COPY takes them, in the order of their key, as the index has them: that halves what an
    insertion costs the server."""
    yield _COPY_HEADER
    # The votes of an event are in this order already, and events of one rush often follow each other in it.
    ordered = sorted(events, key=lambda event: event[1].votes_cast.voter_keys[:KEY_BYTES])
    keys = [event.votes_cast.voter_keys for _, event in ordered]
    if all(before[-KEY_BYTES:] <= after[:KEY_BYTES] for before, after in pairwise(keys)):
        for poll_no, event in ordered:
            yield bytes(_rows(poll_no, event))
    else:
        rows = b"".join(_rows(poll_no, event) for poll_no, event in ordered)
        yield b"".join(sorted(row for (row,) in _VOTE.iter_unpack(rows)))
    yield _COPY_END


def _rows(poll_no: int, event: Event) -> bytearray:
    """The rows of an event's votes. By slices with a stride, because a loop over votes takes four times as long."""
    keys = event.votes_cast.voter_keys
    moment = (event.recorded_at.seconds - _EPOCH_SECONDS) * 1_000_000 + event.recorded_at.nanos // 1000
    tail = _VOTE_TAIL.pack(poll_no, 8, event.version, 8, moment)
    rows = bytearray((_VOTE_HEAD + bytes(VOTER_BYTES) + tail) * (len(keys) // KEY_BYTES))
    for place in range(VOTER_BYTES):
        rows[len(_VOTE_HEAD) + place :: _VOTE.size] = keys[place::KEY_BYTES]
    return rows


def _tally(row: asyncpg.Record) -> Tally:
    if None in row["option_ids"] or None in row["option_labels"] or None in row["counts"]:
        raise ValueError("an option has no id, no label or no count")
    if len(row["option_ids"]) != len(row["counts"]):
        raise ValueError(f"{len(row['counts'])} counts for {len(row['option_ids'])} options")
    as_of = Timestamp()
    as_of.FromDatetime(row["as_of"])
    options = zip(row["option_ids"], row["option_labels"], strict=True)
    return Tally(
        version=row["version"],
        state=PollState.Value(f"POLL_STATE_{row['state']}"),
        options=tuple(PollOption(option_id=option_id, label=label) for option_id, label in options),
        counts=tuple(row["counts"]),
        as_of=as_of,
        total_votes=row["total_votes"],
        total_weight=row["total_weight"],
        eligible_voters=row["eligible_voters"],
        certification=Certification.FromString(row["certification"]) if row["certification"] else None,
        hidden=row["hidden"],
    )


def _state(tally: Tally) -> str:
    return PollState.Name(tally.state).removeprefix("POLL_STATE_")


def _certification(tally: Tally) -> bytes | None:
    return tally.certification.SerializeToString() if tally.certification else None


def _outcome(tally: Tally) -> bytes | None:
    came_to = outcome(tally)
    return came_to.SerializeToString() if came_to else None


def _when(
    events: Sequence[Event], field: Literal["created_at", "opened_at", "closed_at"], *changes: str
) -> datetime | None:
    """When one of these changes happened; `field` is where the archive of a poll tells it."""
    for event in events:
        if event.WhichOneof("change") in changes:
            return _moment(event.recorded_at)
        if event.poll_archived.HasField(field):
            return _moment(getattr(event.poll_archived, field))
    return None


def _archived_at(events: Sequence[Event]) -> datetime | None:
    return next((_moment(event.recorded_at) for event in events if event.HasField("poll_archived")), None)


def _moment(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(UTC)
