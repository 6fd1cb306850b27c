"""How several reports of the same things become one answer, and what an operator is told of it."""

import time
from typing import Any
from uuid import UUID

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from tally.query.v1.query_service_pb2 import (
    READ_MODEL_STATE_FILLING,
    READ_MODEL_STATE_INTERRUPTED,
    READ_MODEL_STATE_READING,
    READ_MODEL_STATE_REBUILDING,
    READ_MODEL_STATE_SILENT,
    READ_MODEL_STATE_UNAVAILABLE,
    GetReadModelStatusResponse,
    OutboxStatus,
    ReadModelStatus,
    StreamStatus,
)

from clients.status import troubles_of
from projector.progress import Progress
from projector.stream import Position
from query_server.status import Heard, lags, merged

NOW = 1_800_000_000


def ago(seconds: float) -> Timestamp:
    moment = Timestamp()
    moment.FromNanoseconds(round((NOW - seconds) * 1e9))
    return moment


def outbox(*, shard: int = 0, shards: int = 1, heard: float = 0.5, **figures: Any) -> OutboxStatus:
    return OutboxStatus(shard=shard, shards=shards, reported_at=ago(heard), **figures)


def report(
    name: str = "live", *, heard: float = 0.5, last: int = 100, made: float = 1000, seen: float = 0.5, **fields: Any
) -> GetReadModelStatusResponse:
    """What a projector says that has all 100 messages of the stream, unless told otherwise."""
    fields = {"state": READ_MODEL_STATE_READING, "version": 100, "events_behind": 0, "seconds_behind": 0.0, **fields}
    waiting = fields.pop("outbox", [outbox()])
    return GetReadModelStatusResponse(
        read_models=[ReadModelStatus(name=name, reported_at=ago(heard), parked_polls=0, gapped_polls=0, **fields)],
        stream=StreamStatus(created_at=ago(made), last_sequence=last, reported_at=ago(seen)),
        outbox=waiting,
    )


def answer(*reports: GetReadModelStatusResponse) -> GetReadModelStatusResponse:
    return merged({report.read_models[0].name: report for report in reports}, ago(0))


def behind(model: ReadModelStatus) -> tuple[int | None, float | None]:
    return (
        model.events_behind if model.HasField("events_behind") else None,
        round(model.seconds_behind, 3) if model.HasField("seconds_behind") else None,
    )


def test_why_a_relay_publishes_nothing_is_said() -> None:
    refusing = answer(report(outbox=[outbox(events=3, oldest_seconds=20.0, problem="set discard to old")]))
    assert "outbox: nothing is published: set discard to old" in troubles_of(refusing, 10)


def test_what_waits_in_the_outbox_and_in_the_stream_is_behind() -> None:
    there = answer(report())
    assert behind(there.read_models[0]) == (0, 0.0)
    assert list(troubles_of(there, 10)) == []
    late = answer(report(events_behind=7, seconds_behind=1.5, outbox=[outbox(events=3, oldest_seconds=20.0)]))
    assert behind(late.read_models[0]) == (10, 20.0)
    assert list(troubles_of(late, 10)) == [
        "live: 10 events and 20.0 s behind",
        "outbox: 3 events wait, the first for 20.0 s",
    ]
    assert list(troubles_of(late, 30)) == []


def test_where_the_relay_is_silent_nobody_knows_how_many_events_there_are() -> None:
    silent = answer(report(outbox=[outbox(heard=60)]))
    # It had been empty then, so what was recorded before that is there.
    assert behind(silent.read_models[0]) == (None, 60.0)
    assert [model.state for model in silent.read_models] == [READ_MODEL_STATE_READING]
    assert list(troubles_of(silent, 10)) == [
        "live: it is not known how far it is behind",
        "outbox: the relay was last heard of 60.0 s ago",
    ]
    never = answer(report(outbox=[]))
    assert behind(never.read_models[0]) == (None, None)
    assert "outbox: a relay was never heard of" in troubles_of(never, 10)


def test_every_shard_counts_and_the_latest_word_of_each() -> None:
    first = report("live", outbox=[outbox(shards=2, events=9, heard=3), outbox(shard=1, shards=2, events=1)])
    second = report("views", outbox=[outbox(shards=2, events=2)])
    both = answer(first, second)
    assert [(shard.shard, shard.events) for shard in both.outbox] == [(0, 2), (1, 1)]
    assert [behind(model)[0] for model in both.read_models] == [3, 3]
    # One shard of two is not all of the outbox.
    assert behind(answer(second).read_models[0]) == (None, None)
    # There were two, and now there is one.
    assert [shard.shards for shard in answer(first, report("views", heard=0, outbox=[outbox(heard=0)])).outbox] == [1]


def test_how_far_a_dead_projector_is_behind_is_known_from_another_one() -> None:
    dead = report("live", heard=60, seen=60, last=100)
    alive = report("views", version=140, last=140)
    live, views = answer(dead, alive).read_models
    assert (live.state, views.state) == (READ_MODEL_STATE_SILENT, READ_MODEL_STATE_READING)
    assert behind(live) == (40, 60.0)
    assert (live.version, live.HasField("gapped_polls"), live.parked_polls) == (100, False, 0)
    assert behind(views) == (0, 0.0)
    # Nothing has come since: it has everything.
    assert behind(answer(dead, report("views")).read_models[0]) == (0, 0.0)
    # The stream that it was reading is no more: its place in it tells nothing.
    assert behind(answer(dead, report("views", version=140, last=140, made=30)).read_models[0]) == (None, 60.0)
    # Both are dead.
    assert behind(answer(dead).read_models[0]) == (None, 60.0)
    assert list(troubles_of(answer(dead), 10)) == ["live: its projector was last heard of 60.0 s ago"]


def test_an_interrupted_projector_says_why() -> None:
    interrupted = report(state=READ_MODEL_STATE_INTERRUPTED, seen=30, seconds_behind=30.0, last_error="NATS failed: X")
    interrupted.read_models[0].ClearField("events_behind")
    told = answer(interrupted)
    assert behind(told.read_models[0]) == (None, 30.0)
    assert list(troubles_of(told, 10)) == ["live: its projector is interrupted: NATS failed: X"]


def test_a_store_that_does_not_answer_is_not_an_empty_one() -> None:
    told = merged({"live": None, "views": GetReadModelStatusResponse()}, ago(0))
    live, views = told.read_models
    assert (live.state, views.state) == (READ_MODEL_STATE_UNAVAILABLE, READ_MODEL_STATE_SILENT)
    for model in (live, views):
        assert behind(model) == (None, None)
        assert not any(model.HasField(field) for field in ("version", "parked_polls", "reported_at"))
    assert list(troubles_of(told, 10)) == [
        "live: its store does not answer",
        "views: its projector was never heard of",
        "stream: unknown",
        "outbox: a relay was never heard of",
    ]


def test_parked_polls_are_trouble_also_where_nothing_is_late() -> None:
    parked = report(events_behind=5, seconds_behind=1.0)
    parked.read_models[0].parked_polls = 2
    assert list(troubles_of(answer(parked), 10)) == ["live: 2 polls are parked: an event cannot be applied"]


def test_what_waits_in_parked_polls_is_unknown_where_their_projector_is_dead() -> None:
    dead = report(heard=60)
    dead.read_models[0].parked_polls = 2
    assert behind(answer(dead, report("views")).read_models[0]) == (None, 60.0)


def test_a_projector_that_has_just_begun_knows_nothing() -> None:
    [begun] = Progress("live").report().read_models
    assert [field.name for field, _ in begun.ListFields()] == ["name", "state", "reported_at"]


def test_a_read_model_of_an_earlier_history_is_not_well() -> None:
    old, new = "019ab000-0000-7000-8000-000000000001", "019ab000-0000-7001-8000-000000000000"
    for restored in (
        answer(report(log_epoch=old), report("views", log_epoch=new)),
        answer(report(log_epoch=old, outbox=[outbox(log_epoch=new)]), report("views", log_epoch=new)),
    ):
        assert restored.log_epoch == new
        live, views = restored.read_models
        assert (live.state, views.state) == (READ_MODEL_STATE_REBUILDING, READ_MODEL_STATE_READING)
        assert [trouble for trouble in troubles_of(restored, 10) if "rebuilt" in trouble]
    same = answer(report(log_epoch=new), report("views", log_epoch=new))
    assert not list(troubles_of(same, 10))


@pytest.mark.parametrize(
    ("live", "views", "lag"),
    [
        ({}, {}, False),
        ({"version": 90, "seconds_behind": 0.4}, {}, False),
        # It goes on, but far behind, or unknown how far.
        ({"version": 90, "events_behind": 10, "seconds_behind": 9.0}, {}, True),
        (
            {"version": 90, "events_behind": 10, "seconds_behind": 9.0},
            {"events_behind": 5, "seconds_behind": 8.0},
            False,
        ),
        ({"version": 90, "seconds_behind": None}, {}, True),
        # It does not go on; where the views are no further, they have nothing else.
        ({"version": 90, "heard": 4.0}, {}, True),
        ({"version": 90, "state": READ_MODEL_STATE_INTERRUPTED}, {}, True),
        ({"heard": 4.0}, {}, False),
        ({"version": 90, "heard": 4.0}, {"heard": 4.0}, True),
        ({"version": None, "heard": 4.0}, {}, True),
        ({"version": None, "heard": 4.0}, {"heard": 4.0}, False),
        # Versions of two histories have nothing to do with each other.
        ({"version": 100, "log_epoch": "019"}, {"version": 9, "log_epoch": "01a"}, True),
        ({"version": 9, "log_epoch": "01a"}, {"version": 100, "log_epoch": "019"}, False),
    ],
)
def test_whether_the_live_counters_lag(live: dict[str, Any], views: dict[str, Any], lag: bool) -> None:
    assert lags(answer(report(**live), report("views", **views))) == lag


def test_clocks_that_are_wrong_make_no_report_old_or_fresh() -> None:
    """A projector 5 s behind and a relay a minute ahead are alive as long as they say something new."""
    heard, clock = Heard(), 1000.0

    def retimed(passed: float, said: float) -> GetReadModelStatusResponse:
        """A report that was made `said` seconds after the first, heard `passed` seconds after it."""
        at = ago(-passed)
        told = report(heard=5.5 - said, seen=5.5 - said, outbox=[outbox(heard=-60.0 - said)])
        heard.retime("live", told, at, clock + passed)
        return merged({"live": told}, at)

    retimed(0, 0)
    for second in (1, 2, 3):
        alive = retimed(second, second)
        assert not list(troubles_of(alive, 10))
        assert behind(alive.read_models[0]) == (0, 0.0)
    # Then both are silent, and no clock hides it.
    assert not list(troubles_of(retimed(7.5, 3), 10))
    silent = list(troubles_of(retimed(9, 3), 10))
    assert any("its projector was last heard of" in trouble for trouble in silent)
    assert any("the relay was last heard of" in trouble for trouble in silent)


def test_an_old_event_that_is_published_again_makes_no_read_model_old() -> None:
    progress, now = Progress("live"), time.time()
    # The stream stored it a moment ago, whenever it was recorded; and more is to come.
    progress.applied(Position(7, round((now - 2) * 1e6)), everything=False, gapped=0, parked=[])
    [status] = progress.report().read_models
    assert 2 <= status.seconds_behind < 10


def test_while_events_are_taken_from_the_log_those_are_behind() -> None:
    progress = Progress("live")
    epoch = UUID("01a22394-ab39-79e6-add9-21be037d7314")
    position = Position(0, 0, epoch)
    progress._stream = StreamStatus(last_sequence=1000)
    progress.applied(position, everything=True, filling=True, lacking=40, gapped=0, parked=[])
    [status] = progress.report().read_models
    assert (status.state, status.events_behind, status.log_epoch) == (READ_MODEL_STATE_FILLING, 40, str(epoch))
    assert not status.HasField("seconds_behind")
    progress.rebuilding("another history")
    progress.made(30, 100)
    # What interrupts it does not end it.
    progress.interrupted("the store failed")
    [status] = progress.report().read_models
    assert (status.state, status.events_behind) == (READ_MODEL_STATE_REBUILDING, 70)
    progress.applied(position._replace(sequence=1000), everything=True, gapped=0, parked=[])
    [status] = progress.report().read_models
    assert (status.state, status.events_behind, status.seconds_behind) == (READ_MODEL_STATE_READING, 0, 0)
