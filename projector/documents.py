"""The documents in the read database: each poll whole, with its counts, turnout and outcome, as one JSON value."""

import json
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import asyncpg
from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp
from tally.event.v1.event_pb2 import Event, PollArchived
from tally.poll.v1.poll_pb2 import (
    ELIGIBILITY_OPEN,
    RESULTS_VISIBILITY_LIVE,
    PollOption,
    PollSpec,
    PollState,
)
from tally.query.v1.query_service_pb2 import Certification, OptionCount

from projector.fold import Tally, outcome
from projector.read_model import Change, Displaced
from projector.schema import Schema, tallies_in
from runtime import postgres

sql = postgres.queries(__package__, "documents.sql")


class Documents(Schema):
    """The read model `documents`; made by `connect`."""

    name: ClassVar[str] = "documents"
    polls: ClassVar[str] = "documents"

    async def load(self, poll_ids: Sequence[str]) -> dict[str, Tally]:
        return tallies_in(await self._connection.fetch(sql.tallies, poll_ids), _tally)

    async def _apply(self, changes: Sequence[Change]) -> None:
        created = [_row(change) for change in changes if change.before == 0]
        updated = [(change.before, *_row(change)) for change in changes if change.before > 0]
        stored = []
        if created:
            stored += await self._connection.fetch(sql.insert_documents, *zip(*created, strict=True))
        if updated:
            stored += await self._connection.fetch(sql.update_documents, *zip(*updated, strict=True))
        if len(stored) != len(changes):
            raise Displaced("a poll is not at the version that this process left it at")


def _row(change: Change) -> tuple[str, int, str, str]:
    parts = {"poll_id": change.poll_id}
    for event in change.events:
        parts |= _told(event)
    parts |= _counted(change.tally)
    counts = f"{{{','.join(map(str, change.tally.counts))}}}"
    return change.poll_id, change.tally.version, json.dumps(parts), counts


def _told(event: Event) -> dict[str, Any]:
    """The parts of the document that an event sets by itself."""
    recorded_at = event.recorded_at.ToJsonString()
    match event.WhichOneof("change"):
        case "poll_created":
            times = {"created_at": recorded_at, "opened_at": None, "closed_at": None, "archived_at": None}
            return times | _planned(event.poll_created.poll)
        case "poll_updated":
            return _planned(event.poll_updated.poll)
        case "poll_opened":
            return {"opened_at": recorded_at}
        case "poll_closed" | "poll_cancelled":
            return {"closed_at": recorded_at}
        case "poll_archived":
            # Whole: where the earlier events were removed already, nothing else tells what the poll was.
            told = event.poll_archived
            times = {name: _text(told, name) for name in ("created_at", "opened_at", "closed_at")}
            return times | {"archived_at": recorded_at} | _planned(told.poll)
    return {}


def _text(told: PollArchived, name: Literal["created_at", "opened_at", "closed_at"]) -> str | None:
    return getattr(told, name).ToJsonString() if told.HasField(name) else None


def _planned(spec: PollSpec) -> dict[str, Any]:
    """The fields of a PollSpec, all of them: what is absent now may have been there before."""
    whole = PollSpec(eligibility=ELIGIBILITY_OPEN, results_visibility=RESULTS_VISIBILITY_LIVE)
    whole.MergeFrom(spec)
    fields = MessageToDict(whole, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return {"opens_at": None, "closes_at": None} | fields


def _counted(tally: Tally) -> dict[str, Any]:
    """The parts that all events together come to. While the counts are hidden, nothing here tells them."""
    shown = not tally.hidden
    came_to = outcome(tally) if shown else None
    certification = tally.certification if shown else None
    return {
        "version": tally.version,
        "as_of": tally.as_of.ToJsonString(),
        "state": PollState.Name(tally.state),
        "results_hidden": tally.hidden,
        "options": [
            {"option_id": option.option_id, "label": option.label} | ({"count": count} if shown else {})
            for option, count in zip(tally.options, tally.counts, strict=True)
        ],
        "turnout": {
            "total_votes": tally.total_votes,
            "total_weight": tally.total_weight,
            "eligible_voters": tally.eligible_voters,
        },
        "outcome": came_to
        and {
            "leaders": [leader.option_id for leader in came_to.leaders],
            "leader_count": came_to.leader_count,
            "certified": came_to.certified,
        },
        "certification": certification
        and {
            "certified_at": certification.certified_at.ToJsonString(),
            "agreed": certification.agreed,
            "counts": [{"option_id": count.option_id, "count": count.count} for count in certification.counts],
            "total_votes": certification.total_votes,
        },
    }


def _tally(row: asyncpg.Record) -> Tally:
    document = json.loads(row["document"])
    options = tuple(PollOption(option_id=option["option_id"], label=option["label"]) for option in document["options"])
    if None in row["counts"] or len(row["counts"]) != len(options) or document["version"] != row["version"]:
        raise ValueError("the document, its version and its counts do not belong together")
    recount = document["certification"]
    return Tally(
        version=row["version"],
        state=PollState.Value(document["state"]),
        options=options,
        counts=tuple(row["counts"]),
        as_of=_moment(document["as_of"]),
        total_votes=document["turnout"]["total_votes"],
        # A document that was stored before there was this number does not have it.
        total_weight=document["turnout"].get("total_weight"),
        eligible_voters=document["turnout"]["eligible_voters"],
        certification=recount
        and Certification(
            certified_at=_moment(recount["certified_at"]),
            counts=[
                OptionCount(option_id=option.option_id, label=option.label, count=counted["count"])
                for option, counted in zip(options, recount["counts"], strict=True)
            ],
            total_votes=recount["total_votes"],
            agreed=recount["agreed"],
        ),
        hidden=document["results_hidden"],
    )


def _moment(text: str) -> Timestamp:
    moment = Timestamp()
    moment.FromJsonString(text)
    return moment
