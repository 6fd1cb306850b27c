"""How far the read models are: what their projectors have stored about themselves, put together."""

import asyncio
from collections.abc import Iterable, Mapping

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from tally.query.v1.query_service_pb2 import (
    READ_MODEL_STATE_READING,
    READ_MODEL_STATE_SILENT,
    READ_MODEL_STATE_UNAVAILABLE,
    GetReadModelStatusResponse,
    OutboxStatus,
    ReadModelStatus,
    StreamStatus,
)

from contracts.failures import STORE_FAILURES
from contracts.status import age, is_fresh, now
from query_server.live import FAILURES, LiveResults
from query_server.views import Views

LIVE = "live"
# The read models in the read database; where others have reported, they are told of too.
STORED = ("views",)

_Report = GetReadModelStatusResponse


class Status:
    """Reads what there is to know of the read models, whatever is down."""

    def __init__(self, live: LiveResults, views: Views) -> None:
        self._live = live
        self._views = views

    async def read(self) -> GetReadModelStatusResponse:
        """The read models with what they are behind; see the contract."""
        live, stored = await asyncio.gather(self._live_report(), self._stored_reports())
        return merged({LIVE: live} | stored, now())

    async def _live_report(self) -> _Report | None:
        try:
            return _parsed(await self._live.status())
        except FAILURES:
            return None

    async def _stored_reports(self) -> dict[str, _Report | None]:
        try:
            reports = await self._views.statuses()
        except STORE_FAILURES:
            return dict.fromkeys(STORED)
        return {name: _parsed(reports.get(name)) for name in (*STORED, *sorted(reports.keys() - {*STORED}))}


def merged(reports: Mapping[str, _Report | None], at: Timestamp) -> GetReadModelStatusResponse:
    """What several projectors have said of the same things, and how far behind that makes each of them.

    `reports` has one for each read model; an empty one where its projector never said anything, None where the store of
    the read model does not answer.
    """
    heard = [report for report in reports.values() if report]
    stream = _newest(report.stream for report in heard if report.HasField("stream"))
    outbox = _newest_of_each_shard(status for report in heard for status in report.outbox)
    answer = GetReadModelStatusResponse(stream=stream, outbox=outbox, answered_at=at)
    for name, report in reports.items():
        if report is None:
            answer.read_models.add(name=name, state=READ_MODEL_STATE_UNAVAILABLE)
        elif not report.read_models:
            answer.read_models.add(name=name, state=READ_MODEL_STATE_SILENT)
        else:
            answer.read_models.append(_status(report, stream, outbox, at))
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


def _behind_in_stream(
    status: ReadModelStatus, seen: StreamStatus, stream: StreamStatus | None, at: Timestamp
) -> int | None:
    """How many messages of the stream the read model lacks: as its projector says, or another that sees the stream."""
    if status.state == READ_MODEL_STATE_READING:
        return status.events_behind if status.HasField("events_behind") else None
    if not status.HasField("version") or stream is None or not is_fresh(stream.reported_at, at):
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
