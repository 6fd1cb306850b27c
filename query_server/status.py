"""How far the read models are: what their projectors have stored about themselves, put together.

The clocks of other hosts may be wrong, so how old a report is goes by how long it has been the same here.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping
from math import nan
from typing import NamedTuple

import structlog
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from prometheus_client import Gauge
from tally.query.v1.query_service_pb2 import (
    READ_MODEL_STATE_FILLING,
    READ_MODEL_STATE_READING,
    READ_MODEL_STATE_REBUILDING,
    READ_MODEL_STATE_SILENT,
    READ_MODEL_STATE_UNAVAILABLE,
    GetReadModelStatusResponse,
    OutboxStatus,
    ReadModelStatus,
    StreamStatus,
)

from contracts import log_epoch
from contracts.read_database import VIEWS
from contracts.read_models import READ_MODELS
from contracts.status import age, is_fresh, now
from query_server.failures import STORE_FAILURES
from query_server.live import FAILURES, LiveResults
from query_server.views import Views

log = structlog.get_logger()

LIVE = "live"

# How often it is found out whether the live counters lag behind, and the metrics are renewed; seconds.
_MEASURE_SECONDS = 1.0
# A projector that has said nothing for so long, or is so much further behind than that of the views, may lag; seconds.
_LAG_SECONDS = 2.5
# States of a projector that knows how far behind it is.
_KNOWING = (READ_MODEL_STATE_READING, READ_MODEL_STATE_FILLING, READ_MODEL_STATE_REBUILDING)

_Report = GetReadModelStatusResponse

_reading = Gauge(
    "tally_status_reading", "1 while the projector reads the stream; NaN: the store does not answer.", ["read_model"]
)
# By the field of ReadModelStatus.
_figures = {
    field: Gauge(f"tally_status_{field}", f"{meaning}; NaN while unknown.", ["read_model"])
    for field, meaning in {
        "version": "The last message of the stream that the read model contains",
        "events_behind": "Events that the read model lacks, in the outbox and in the stream",
        "seconds_behind": "Age of the latest state that the read model is known to contain",
        "parked_polls": "Polls that stand still because of an event that cannot be applied",
        "gapped_polls": "Polls that wait for a missing event",
    }.items()
}
_outbox_events = Gauge("tally_status_outbox_events", "Events in the outbox, of all shards; NaN while unknown.")
_outbox_oldest = Gauge("tally_status_outbox_oldest_seconds", "Age of the first waiting event; NaN while unknown.")
# By the field of StreamStatus.
_stream_figures = {
    field: Gauge(f"tally_status_stream_{field}", f"{meaning}; NaN while unknown.")
    for field, meaning in {
        "messages": "Messages that the stream has",
        "last_sequence": "The last message of the stream",
        "consumers": "Who reads the stream now",
    }.items()
}


class Status:
    """Reads what there is to know of the read models, whatever is down."""

    def __init__(self, live: LiveResults, views: Views) -> None:
        self._live = live
        self._views = views
        self._heard = Heard()

    async def read(self) -> GetReadModelStatusResponse:
        """The read models with what they are behind; see the contract."""
        reports = await asyncio.gather(*map(self._report, READ_MODELS))
        at = now()
        for name, report in zip(READ_MODELS, reports, strict=True):
            if report:
                self._heard.retime(name, report, at, time.monotonic())
        return merged(dict(zip(READ_MODELS, reports, strict=True)), at)

    async def measure(self) -> None:
        """Keeps the metrics up to date, and LiveResults about whether they lag, for ever."""
        while True:
            try:
                answer = await self.read()
                self._live.lag = lags(answer)
                self._live.log_epoch = log_epoch.parse(max(model.log_epoch for model in _results_models(answer)))
                _measure(answer)
            except Exception:
                # Figures that nobody can renew must not pass for true, and are no reason to stop serving.
                log.exception("defect")
                _measure(merged(dict.fromkeys(READ_MODELS), now()))
            await asyncio.sleep(_MEASURE_SECONDS)

    async def _report(self, read_model: str) -> _Report | None:
        store = self._live.status() if read_model == LIVE else self._views.status(read_model)
        try:
            return _parsed(await store)
        except (*FAILURES, *STORE_FAILURES):
            return None
        except Exception:
            # Whatever is wrong with one read model, the others are told of.
            log.exception("defect")
            return None


class _Hearing(NamedTuple):
    """When a report was made, by its sender's clock in ns; since when it is here, in s; whether another was before."""

    reported_at: int
    since: float
    renewed: bool


class Heard:
    """When reports were heard for the first time."""

    def __init__(self) -> None:
        self._hearings: dict[tuple[str, str, int], _Hearing] = {}

    def retime(self, read_model: str, report: _Report, at: Timestamp, clock: float) -> None:
        """Puts the moments of a report on this server's clock; `clock` are its monotonic seconds at `at`."""
        for model in report.read_models:
            before = model.reported_at.ToNanoseconds()
            self._retime((read_model, "model", 0), model, at, clock)
            if model.HasField("last_error_at"):
                shift = model.reported_at.ToNanoseconds() - before
                model.last_error_at.FromNanoseconds(max(model.last_error_at.ToNanoseconds() + shift, 0))
        if report.HasField("stream"):
            self._retime((read_model, "stream", 0), report.stream, at, clock)
        for status in report.outbox:
            self._retime((read_model, "outbox", status.shard), status, at, clock)

    def _retime(
        self,
        key: tuple[str, str, int],
        said: ReadModelStatus | StreamStatus | OutboxStatus,
        at: Timestamp,
        clock: float,
    ) -> None:
        if not said.HasField("reported_at"):
            return
        reported_at, known = said.reported_at.ToNanoseconds(), self._hearings.get(key)
        if known is None or known.reported_at != reported_at:
            known = self._hearings[key] = _Hearing(reported_at, clock, renewed=known is not None)
        # What was here when this server began has only its sender's word for its age.
        seconds = max(clock - known.since, 0.0 if known.renewed else age(said.reported_at, at))
        said.reported_at.FromNanoseconds(max(at.ToNanoseconds() - round(seconds * 1e9), 0))


def lags(answer: GetReadModelStatusResponse) -> bool:
    """Whether the live counters may lack what the views have: their projector does not go on, or goes on far behind."""
    live, views = _results_models(answer)
    if live.log_epoch != views.log_epoch:
        return live.log_epoch < views.log_epoch
    known = live.HasField("version") and views.HasField("version")
    if known and views.version <= live.version:
        return False
    if not _goes_on(live, answer.answered_at):
        return known or _goes_on(views, answer.answered_at)
    if not (live.HasField("seconds_behind") and views.HasField("seconds_behind")):
        return views.HasField("seconds_behind")
    return live.seconds_behind > views.seconds_behind + _LAG_SECONDS


def _goes_on(model: ReadModelStatus, at: Timestamp) -> bool:
    return model.state in _KNOWING and age(model.reported_at, at) <= _LAG_SECONDS


def _results_models(answer: GetReadModelStatusResponse) -> tuple[ReadModelStatus, ReadModelStatus]:
    """Those that have results: live and views."""
    by_name = {model.name: model for model in answer.read_models}
    return by_name[LIVE], by_name[VIEWS]


def merged(reports: Mapping[str, _Report | None], at: Timestamp) -> GetReadModelStatusResponse:
    """What several projectors have said of the same things, and how far behind that makes each of them.

    `reports` has one for each read model; an empty one where its projector never said anything, None where the store of
    the read model does not answer.
    """
    heard = [report for report in reports.values() if report]
    stream = _newest(report.stream for report in heard if report.HasField("stream"))
    outbox = _newest_of_each_shard(status for report in heard for status in report.outbox)
    epochs = [
        *(model.log_epoch for report in heard for model in report.read_models),
        *(status.log_epoch for report in heard for status in report.outbox),
        *(report.stream.log_epoch for report in heard),
    ]
    newest = max(epochs, default="")
    answer = GetReadModelStatusResponse(stream=stream, outbox=outbox, answered_at=at, log_epoch=newest)
    for name, report in reports.items():
        if report is None:
            answer.read_models.add(name=name, state=READ_MODEL_STATE_UNAVAILABLE)
        elif not report.read_models:
            answer.read_models.add(name=name, state=READ_MODEL_STATE_SILENT)
        else:
            answer.read_models.append(_status(report, stream, outbox, at))
            if report.read_models[0].log_epoch < newest and answer.read_models[-1].state == READ_MODEL_STATE_READING:
                answer.read_models[-1].state = READ_MODEL_STATE_REBUILDING
    return answer


def _status(report: _Report, stream: StreamStatus | None, outbox: list[OutboxStatus], at: Timestamp) -> ReadModelStatus:
    status = ReadModelStatus()
    status.CopyFrom(report.read_models[0])
    silent_seconds = 0.0
    if not is_fresh(status.reported_at, at):
        status.state = READ_MODEL_STATE_SILENT
        silent_seconds = age(status.reported_at, at)
        # What may have changed since is not known any more.
        status.ClearField("gapped_polls")
    in_stream = _behind_in_stream(status, report.stream, stream, at)
    in_outbox = _events_in_outbox(outbox, at)
    status.ClearField("events_behind")
    if in_stream is not None and in_outbox is not None:
        status.events_behind = in_stream + in_outbox
    waiting_seconds = _seconds_in_outbox(outbox, at)
    if not status.HasField("seconds_behind") or waiting_seconds is None:
        status.ClearField("seconds_behind")
    elif status.HasField("events_behind") and not status.events_behind:
        status.seconds_behind = 0.0
    else:
        status.seconds_behind = max(status.seconds_behind + silent_seconds, waiting_seconds)
    return status


def _measure(answer: GetReadModelStatusResponse) -> None:
    for model in answer.read_models:
        unavailable = model.state == READ_MODEL_STATE_UNAVAILABLE
        _reading.labels(model.name).set(nan if unavailable else model.state == READ_MODEL_STATE_READING)
        known = {field.name: value for field, value in model.ListFields()}
        for field, gauge in _figures.items():
            gauge.labels(model.name).set(known.get(field, nan))
    outbox, at = list(answer.outbox), answer.answered_at
    for gauge, figure in (
        (_outbox_events, _events_in_outbox(outbox, at)),
        (_outbox_oldest, _seconds_in_outbox(outbox, at)),
    ):
        gauge.set(nan if figure is None else figure)
    seen = is_fresh(answer.stream.reported_at, at)
    for field, gauge in _stream_figures.items():
        gauge.set(getattr(answer.stream, field) if seen else nan)


def _behind_in_stream(
    status: ReadModelStatus, seen: StreamStatus, stream: StreamStatus | None, at: Timestamp
) -> int | None:
    """How many messages of the stream the read model lacks: as its projector says, or another that sees the stream."""
    if status.state in _KNOWING:
        return status.events_behind if status.HasField("events_behind") else None
    # How many events wait behind dead letters, its projector alone knows.
    if status.parked_polls or not status.HasField("version"):
        return None
    if stream is None or not is_fresh(stream.reported_at, at):
        return None
    if seen.created_at != stream.created_at:
        # It was made anew, and counts its messages from 1 again.
        return None
    return max(stream.last_sequence - status.version, 0)


def _events_in_outbox(outbox: list[OutboxStatus], at: Timestamp) -> int | None:
    """How many events wait there; None unless all shards' relays have just said so."""
    if not _is_complete(outbox) or not all(is_fresh(status.reported_at, at) for status in outbox):
        return None
    return sum(status.events for status in outbox)


def _seconds_in_outbox(outbox: list[OutboxStatus], at: Timestamp) -> float | None:
    """How old the latest moment is up to which everything has left the outbox; None unless all shards were heard of."""
    if not _is_complete(outbox):
        return None
    silent = (age(status.reported_at, at) if not is_fresh(status.reported_at, at) else 0.0 for status in outbox)
    return max(status.oldest_seconds + seconds for status, seconds in zip(outbox, silent, strict=True))


def _is_complete(outbox: list[OutboxStatus]) -> bool:
    return bool(outbox) and len(outbox) == outbox[0].shards


def _newest_of_each_shard(reports: Iterable[OutboxStatus]) -> list[OutboxStatus]:
    newest: dict[int, OutboxStatus] = {}
    for report in sorted(reports, key=lambda report: report.reported_at.ToNanoseconds()):
        # Where there are fewer or more shards than before, what was said before is of other shards.
        newest = {shard: old for shard, old in newest.items() if old.shards == report.shards} | {report.shard: report}
    return [newest[shard] for shard in sorted(newest)]


def _newest(reports: Iterable[StreamStatus]) -> StreamStatus | None:
    return max(reports, key=lambda report: report.reported_at.ToNanoseconds(), default=None)


def _parsed(stored: bytes | None) -> _Report:
    try:
        return GetReadModelStatusResponse.FromString(stored or b"")
    except DecodeError:
        # Whoever wrote that is not one of our projectors.
        return GetReadModelStatusResponse()
