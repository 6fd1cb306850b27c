"""The stream of events in JetStream, as the relay writes it."""

import asyncio
import json
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import structlog
from nats import errors as nats_errors
from nats.aio.client import Client
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
    StreamInfo,
)
from nats.js.errors import APIError, NotFoundError

from contracts.bus import ALL_EVENTS, MESSAGE_ID_HEADER, STREAM, VERSION_HEADER, event_subject
from relay.outbox import OutboxEvent

log = structlog.get_logger()

# Each question to NATS has this limit, and none of the library's own: those use asyncio.wait_for, which in Python 3.11
# can lose a cancellation, and then a session would not end.
_SECONDS = 5.0
# How long events go one by one before the relay looks into its outbox again, which shows that it still leads.
_ONE_BY_ONE_SECONDS = 1.0
_NO_LIMIT: Any = None
# How long JetStream remembers message ids: a relay that takes over publishes the last events of the other once more.
_DUPLICATE_WINDOW_SECONDS = 120.0
_WATCH_SECONDS = 1.0


class Damaged(nats_errors.Error):
    """The stream was made anew, or lost messages, since the session began: the next one compares it with the log."""


class _Traces(NamedTuple):
    """What changes when messages vanish from a stream that keeps them."""

    created: datetime | None
    first_sequence: int
    deleted: int


class Stream:
    """Publishes the events of one shard, and knows what the stream has of each poll."""

    def __init__(self, connection: Client, shard: int) -> None:
        self._connection = connection
        self._jetstream = connection.jetstream(timeout=_NO_LIMIT)
        self._shard = shard
        # Whether the stream drops old messages by itself.
        self.discards = False
        self._traces: _Traces | None = None

    async def ensure(self) -> None:
        """Creates the stream, or adds to an existing one what is needed; its limits stay as the operator set them."""
        async with asyncio.timeout(_SECONDS):
            try:
                info = await self._jetstream.stream_info(STREAM)
            except NotFoundError:
                config = StreamConfig(name=STREAM, storage=StorageType.FILE, retention=RetentionPolicy.LIMITS)
                info = await self._jetstream.add_stream(_required(config))
                log.info("stream created", stream=STREAM, created=str(info.created))
            self._traces = _traces(info)
            config = info.config
            self.discards = any(limit and limit > 0 for limit in (config.max_age, config.max_bytes, config.max_msgs))
            if config != _required(config):
                await self._jetstream.update_stream(_required(config))
                log.info("stream updated", stream=STREAM)

    async def keep_watch(self) -> None:
        """Looks each second, until cancelled. Raises Damaged, or NotFoundError, where something happened to the stream
        since `ensure`: also while there is nothing to publish."""
        while True:
            async with asyncio.timeout(_SECONDS):
                traces = _traces(await self._jetstream.stream_info(STREAM))
            if traces != self._traces and not self.discards:
                raise Damaged(f"the stream was {self._traces} and is {traces}")
            await asyncio.sleep(_WATCH_SECONDS)

    async def publish(self, events: Sequence[OutboxEvent]) -> Sequence[OutboxEvent]:
        """Returns the events that are stored, in this order: all, or where they go one by one the first of them. Raises
        if that is unknown; then a later event of the list is stored only if all before it are."""
        if len(events) > 1:
            try:
                await self._publish_together(events)
                return events
            except APIError as error:
                # Some of them are in the stream already: they were published before, and no one learned of the ack.
                log.info("publishing one by one", events=len(events), reason=error.description)
        started = time.monotonic()
        for stored, event in enumerate(events, 1):
            await self._acknowledged(event, {})
            if time.monotonic() - started > _ONE_BY_ONE_SECONDS:
                return events[:stored]
        return events

    async def _publish_together(self, events: Sequence[OutboxEvent]) -> None:
        """One atomic batch: all are stored or none, with one write to the disk and one ack."""
        batch = uuid4().hex
        for place, event in enumerate(events[:-1], 1):
            headers = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(place)}
            await self._connection.publish(self._subject(event), event.data, headers=_headers(event) | headers)
        headers = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(len(events)), "Nats-Batch-Commit": "1"}
        ack = await self._acknowledged(events[-1], headers)
        if ack.get("count") != len(events):
            raise APIError(description="NATS does not support atomic batches: version 2.12 or later is needed")

    async def _acknowledged(self, event: OutboxEvent, headers: dict[str, str]) -> dict[str, Any]:
        headers |= _headers(event)
        async with asyncio.timeout(_SECONDS):
            message = await self._connection.request(
                self._subject(event), event.data, timeout=_NO_LIMIT, headers=headers
            )
        ack: dict[str, Any] = json.loads(message.data)
        if "error" in ack:
            raise APIError.from_error(ack["error"])
        return ack

    async def versions(self, polls: Sequence[UUID]) -> dict[UUID, int]:
        """The version of the last message of each poll; a poll without messages is left out. At most 500 polls."""
        subjects = {event_subject(self._shard, poll_id): poll_id for poll_id in polls}
        config = ConsumerConfig(
            deliver_policy=DeliverPolicy.LAST_PER_SUBJECT,
            filter_subjects=list(subjects),
            headers_only=True,
            ack_policy=AckPolicy.NONE,
            mem_storage=True,
            num_replicas=1,
            inactive_threshold=_SECONDS,
        )
        found: dict[UUID, int] = {}
        async with asyncio.timeout(_SECONDS):
            consumer = await self._jetstream.add_consumer(STREAM, config)
            if consumer.num_pending:
                subscription = await self._jetstream.pull_subscribe_bind(consumer.name, STREAM)
                for message in await subscription.fetch(consumer.num_pending, timeout=_NO_LIMIT):
                    version = (message.headers or {}).get(VERSION_HEADER, "")
                    # Someone else's message is as good as none.
                    found[subjects[message.subject]] = int(version) if version.isdecimal() else 0
                await subscription.unsubscribe()
            await self._jetstream.delete_consumer(STREAM, consumer.name)
        return found

    def _subject(self, event: OutboxEvent) -> str:
        return event_subject(self._shard, event.poll_id)


def _traces(info: StreamInfo) -> _Traces:
    # The first sequence of an empty stream is 0 or 1, depending on its past.
    return _Traces(info.created, max(info.state.first_seq, 1), info.state.num_deleted or 0)


def _required(config: StreamConfig) -> StreamConfig:
    return config.evolve(
        subjects=[ALL_EVENTS],
        duplicate_window=_DUPLICATE_WINDOW_SECONDS,
        allow_atomic=True,
        allow_direct=True,
    )


def _headers(event: OutboxEvent) -> dict[str, str]:
    return {MESSAGE_ID_HEADER: f"outbox-{event.outbox_id}", VERSION_HEADER: str(event.version)}
