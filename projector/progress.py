"""What a projector knows of its own way through the stream: told to readers each second, and to Prometheus."""

import asyncio
import math
import time
from collections.abc import Collection
from datetime import UTC
from typing import Any
from uuid import UUID

import structlog
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from nats import errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from prometheus_client import Gauge
from tally.query.v1.query_service_pb2 import (
    READ_MODEL_STATE_FILLING,
    READ_MODEL_STATE_INTERRUPTED,
    READ_MODEL_STATE_READING,
    READ_MODEL_STATE_REBUILDING,
    GetReadModelStatusResponse,
    OutboxStatus,
    ReadModelState,
    ReadModelStatus,
    StreamStatus,
)

from contracts import log_epoch
from contracts.bus import OUTBOX_REPORTS, STREAM
from contracts.dead_letters import DeadLetter
from contracts.status import REPORT_SECONDS, now
from projector import stream
from projector.stream import Position

log = structlog.get_logger()

_SECONDS = 5.0
# How often it is logged how far a read model is that is made anew.
_TELL_SECONDS = 5.0
# The library's own limits use asyncio.wait_for, which in Python 3.11 can lose a cancellation.
_NO_LIMIT: Any = None

_LABELS = ["read_model"]
_reading = Gauge("tally_projector_reading", "1 while the stream is read, 0 while something prevents it.", _LABELS)
_sequence = Gauge("tally_projector_stream_sequence", "The last message of the stream that is applied.", _LABELS)
_pending = Gauge(
    "tally_projector_pending_messages", "Messages in the stream that are not applied yet; NaN while unknown.", _LABELS
)
_behind = Gauge(
    "tally_projector_seconds_behind", "Age of the latest state that is known to be applied; NaN: unknown.", _LABELS
)


class Progress:
    """How far a projector is, from what its sessions note here."""

    def __init__(self, read_model: str) -> None:
        self._read_model = read_model
        self._state: ReadModelState.ValueType = READ_MODEL_STATE_INTERRUPTED
        self._position: Position | None = None
        # What the stream had got up to this moment, in Unix seconds, is applied; None: unknown.
        self._complete_at: float | None = None
        # Events that are known to be missing, beside those in the stream; None: unknown how many.
        self._lacking: int | None = 0
        self._told_at = 0.0
        self._parked: Collection[DeadLetter] | None = None
        self._gapped: int | None = None
        self._last_error = ""
        self._last_error_at = Timestamp()
        self._stream: StreamStatus | None = None
        # The history whose events are published on the stream now; None: unknown.
        self.stream_epoch: UUID | None = None
        self._outbox: dict[int, OutboxStatus] = {}

    def applied(
        self,
        position: Position,
        *,
        everything: bool,
        filling: bool = False,
        lacking: int | None = 0,
        gapped: int,
        parked: Collection[DeadLetter],
    ) -> None:
        """The read model contains the stream up to `position`, and there was just now nothing else if `everything`;
        except for what waits in the polls that are `gapped` or `parked`, and for `lacking` events (None: unknown how
        many) that come from the event log. `filling`: it began empty, and is not for readers yet."""
        self._state = READ_MODEL_STATE_FILLING if filling else READ_MODEL_STATE_READING
        self._position = position
        self._gapped, self._parked, self._lacking = gapped, parked, lacking
        if gapped or parked or lacking != 0:
            return
        if everything:
            self._complete_at = time.time()
        else:
            # By when the stream stored it: an event that is published again is old, and says nothing of later ones.
            self._complete_at = max(position.stored_at / 1e6, self._complete_at or 0.0) or None

    def interrupted(self, reason: str) -> None:
        """A session ended by a failure."""
        if self._state != READ_MODEL_STATE_REBUILDING:
            self._state = READ_MODEL_STATE_INTERRUPTED
        self._gapped = None
        self._last_error, self._last_error_at = reason, now()

    def rebuilding(self, reason: str) -> None:
        """The read model is made anew from now on, for a reason."""
        self._state = READ_MODEL_STATE_REBUILDING
        self._lacking = self._gapped = None
        self._last_error, self._last_error_at = reason, now()

    def made(self, events: int, total: int) -> None:
        """`events` of about `total` events are in the copy that is made anew."""
        self._lacking = max(total - events, 0)
        if time.monotonic() - self._told_at >= _TELL_SECONDS:
            self._told_at = time.monotonic()
            log.info("making the read model anew", read_model=self._read_model, events=events, of=total)

    async def look(self, bus: Client) -> None:
        """Sees each second how long the stream is, and hears what relays say of the outbox, until cancelled."""
        await bus.subscribe(OUTBOX_REPORTS, cb=self._heard)
        jetstream = bus.jetstream(timeout=_NO_LIMIT)
        while True:
            try:
                async with asyncio.timeout(_SECONDS):
                    info = await jetstream.stream_info(STREAM)
            except TimeoutError as error:
                raise errors.TimeoutError from error
            state, created_at = info.state, Timestamp()
            self.stream_epoch = stream.origin_of(info).log_epoch
            if info.created:
                created_at.FromDatetime(info.created.astimezone(UTC))
            self._stream = StreamStatus(
                created_at=created_at,
                first_sequence=state.first_seq,
                last_sequence=state.last_seq,
                messages=state.messages,
                bytes=state.bytes,
                consumers=state.consumer_count,
                reported_at=now(),
                log_epoch=log_epoch.text(self.stream_epoch or log_epoch.ZERO),
            )
            await asyncio.sleep(REPORT_SECONDS)

    def report(self) -> GetReadModelStatusResponse:
        """All of it, as readers get it; the events in the outbox are not among `events_behind` yet."""
        at = now()
        status = ReadModelStatus(
            name=self._read_model,
            state=self._state,
            version=self._position.sequence if self._position else None,
            log_epoch=log_epoch.text(self._position.log_epoch) if self._position else "",
            parked_polls=None if self._parked is None else len(self._parked),
            gapped_polls=self._gapped,
            last_error=self._last_error,
            last_error_at=self._last_error_at if self._last_error else None,
            reported_at=at,
        )
        if self._state == READ_MODEL_STATE_REBUILDING and self._lacking is not None:
            status.events_behind = self._lacking
        elif self._reading and self._stream and self._position and self._lacking is not None:
            waiting = sum(1 + letter.waiting for letter in self._parked or ())
            # Where events are taken from the log, all of the stream is among these.
            unread = 0 if self._lacking else max(self._stream.last_sequence - self._position.sequence, 0)
            status.events_behind = unread + self._lacking + waiting
        if self._complete_at:
            complete = status.HasField("events_behind") and not status.events_behind
            status.seconds_behind = 0.0 if complete else max(time.time() - self._complete_at, 0.0)
        self._measure(status)
        return GetReadModelStatusResponse(
            read_models=[status], outbox=list(self._outbox.values()), stream=self._stream, answered_at=at
        )

    @property
    def _reading(self) -> bool:
        return self._state in (READ_MODEL_STATE_READING, READ_MODEL_STATE_FILLING)

    def _measure(self, status: ReadModelStatus) -> None:
        _reading.labels(self._read_model).set(self._reading)
        known = {field.name: value for field, value in status.ListFields()}
        for gauge, field in ((_sequence, "version"), (_pending, "events_behind"), (_behind, "seconds_behind")):
            gauge.labels(self._read_model).set(known.get(field, math.nan))

    async def _heard(self, message: Msg) -> None:
        try:
            report = OutboxStatus.FromString(message.data)
        except DecodeError:
            return
        # Where there are fewer shards than before, those that are no more have nothing to say.
        self._outbox = {shard: old for shard, old in self._outbox.items() if old.shards == report.shards}
        self._outbox[report.shard] = report
