"""The stream of events in JetStream, as the relay writes it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import structlog
from nats import errors as nats_errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    PersistMode,
    RetentionPolicy,
    StorageType,
    StreamConfig,
    StreamInfo,
)
from nats.js.errors import APIError, NotFoundError
from prometheus_client import Counter

from contracts import log_epoch
from contracts.bus import (
    ALL_EVENTS,
    DEPLOYMENT_METADATA,
    EPOCH_METADATA,
    MAX_EVENT_BYTES,
    MESSAGE_ID_HEADER,
    STREAM,
    EventHeaders,
    event_subject,
    parse_event_headers,
    parse_event_subject,
)
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
# A stream with less room than this could not take what the relay publishes at once.
_LEAST_BYTES = 4 * MAX_EVENT_BYTES
# What is asked for at once of the last messages of polls, which come with their events.
_ANSWER_BYTES = 4 << 20
_LAST_MESSAGES = f"$JS.API.DIRECT.GET.{STREAM}"

_false_duplicates = Counter(
    "tally_relay_false_duplicates",
    "Events that JetStream took for copies of other ones, and that were published again.",
)


class Damaged(nats_errors.Error):
    """The stream was made anew, or lost messages, since the session began: the next one compares it with the log."""


class Unusable(nats_errors.Error):
    """The stream is not one that this relay can publish to; the message tells an operator what to change."""


class StreamedEvent(NamedTuple):
    """An event as the headers of its message tell it."""

    poll_id: UUID
    headers: EventHeaders


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
        self._config = StreamConfig()
        self._traces: _Traces | None = None
        # The greatest sequence of an acknowledged message.
        self._acknowledged_sequence = 0

    @property
    def forgets_polls(self) -> bool:
        """Whether the stream drops old messages by itself, also the only one of a poll."""
        return any(
            limit and limit > 0 for limit in (self._config.max_age, self._config.max_bytes, self._config.max_msgs)
        )

    @property
    def is_replicated(self) -> bool:
        """Whether a server may answer that does not have the latest messages yet."""
        return (self._config.num_replicas or 1) > 1

    @property
    def epoch(self) -> UUID:
        """The log epoch that was published last, as the stream's metadata names it."""
        text = (self._config.metadata or {}).get(EPOCH_METADATA, "")
        try:
            return log_epoch.parse(text)
        except ValueError as error:
            raise Unusable(f"the metadata {EPOCH_METADATA} of the stream {STREAM} is {text!r}: remove it") from error

    @property
    def deployment(self) -> UUID | None:
        """The deployment that the stream belongs to; None: none has claimed it yet."""
        text = (self._config.metadata or {}).get(DEPLOYMENT_METADATA, "")
        try:
            return UUID(text) if text else None
        except ValueError as error:
            raise Unusable(
                f"the metadata {DEPLOYMENT_METADATA} of the stream {STREAM} is {text!r}: remove it"
            ) from error

    async def ensure(self) -> None:
        """Creates the stream, or adds to an existing one what is needed; its limits stay as the operator set them.

        Raises Unusable where they would lose events that were not read, or refuse new ones.
        """
        if self._connection.max_payload < MAX_EVENT_BYTES:
            # Better no event at all, and everybody hears of it, than one that blocks all behind it some day.
            raise Unusable(
                f"NATS refuses messages above {self._connection.max_payload:,} bytes: set its max_payload to at least"
                f" {MAX_EVENT_BYTES:,}"
            )
        async with asyncio.timeout(_SECONDS):
            try:
                info = await self._jetstream.stream_info(STREAM)
            except NotFoundError:
                config = StreamConfig(name=STREAM, storage=StorageType.FILE, retention=RetentionPolicy.LIMITS)
                info = await self._jetstream.add_stream(_required(config))
                log.info("stream created", stream=STREAM, created=str(info.created))
            if unusable := _unusable(info.config):
                raise Unusable(f"the stream {STREAM} cannot be used: {'; '.join(unusable)}")
            self._traces = _traces(info)
            self._acknowledged_sequence = info.state.last_seq
            await self._update(info.config, _required(info.config))

    async def carry(self, deployment: UUID, epoch: UUID) -> None:
        """Names in the stream's metadata what is published from now on."""
        metadata = (self._config.metadata or {}) | {DEPLOYMENT_METADATA: str(deployment), EPOCH_METADATA: str(epoch)}
        async with asyncio.timeout(_SECONDS):
            await self._update(self._config, self._config.evolve(metadata=metadata))

    async def _update(self, before: StreamConfig, after: StreamConfig) -> None:
        self._config = before
        if before != after:
            self._config = (await self._jetstream.update_stream(after)).config
            log.info("stream updated", stream=STREAM)
        if not (self._config.allow_atomic and self._config.allow_direct):
            raise Unusable("NATS does not support atomic batches: version 2.12 or later is needed")

    async def keep_watch(self) -> None:
        """Looks each second, until cancelled. Raises Damaged, or NotFoundError, where something happened to the stream
        since `ensure`: also while there is nothing to publish."""
        while True:
            acknowledged = self._acknowledged_sequence
            async with asyncio.timeout(_SECONDS):
                info = await self._jetstream.stream_info(STREAM)
            if info.state.last_seq < acknowledged:
                raise Damaged(f"the stream ends at {info.state.last_seq}, and had message {acknowledged}")
            self._compare(_traces(info))
            if info.config != self._config:
                raise Damaged("the configuration of the stream was changed")
            await asyncio.sleep(_WATCH_SECONDS)

    def _compare(self, traces: _Traces) -> None:
        known = self._traces
        if self.forgets_polls or self._config.max_msgs_per_subject > 0:
            # It drops messages by itself: only one that was made anew can be told.
            traces, known = (
                traces._replace(first_sequence=0, deleted=0),
                known and known._replace(first_sequence=0, deleted=0),
            )
        if traces != known:
            raise Damaged(f"the stream was {known} and is {traces}")

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
            await self._publish_alone(event)
            if time.monotonic() - started > _ONE_BY_ONE_SECONDS:
                return events[:stored]
        return events

    async def _publish_together(self, events: Sequence[OutboxEvent]) -> None:
        """One atomic batch: all are stored or none, with one write to the disk and one ack."""
        batch = uuid4().hex
        for place, event in enumerate(events[:-1], 1):
            headers = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(place)}
            await self._connection.publish(self._subject(event), event.data, headers=event.headers | headers)
        headers = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(len(events)), "Nats-Batch-Commit": "1"}
        ack = await self._acknowledged(events[-1], headers)
        if ack.get("count") != len(events):
            raise APIError(description="NATS does not support atomic batches: version 2.12 or later is needed")
        self._note(ack)

    async def _publish_alone(self, event: OutboxEvent) -> None:
        ack = await self._acknowledged(event, {})
        if ack.get("duplicate"):
            if await self._is_stored(event, ack["seq"]):
                return
            # Another event has this message id, or the one that had it is lost.
            _false_duplicates.inc()
            log.warning("published under another message id", message_id=event.headers[MESSAGE_ID_HEADER])
            message_id = f"{event.headers[MESSAGE_ID_HEADER]}:{uuid4().hex}"
            ack = await self._acknowledged(event, {MESSAGE_ID_HEADER: message_id})
        self._note(ack)

    async def _acknowledged(self, event: OutboxEvent, headers: dict[str, str]) -> dict[str, Any]:
        async with asyncio.timeout(_SECONDS):
            message = await self._connection.request(
                self._subject(event), event.data, timeout=_NO_LIMIT, headers=event.headers | headers
            )
        ack: dict[str, Any] = json.loads(message.data)
        if "error" in ack:
            raise APIError.from_error(ack["error"])
        return ack

    def _note(self, ack: dict[str, Any]) -> None:
        if ack["seq"] <= self._acknowledged_sequence:
            raise Damaged(f"an event became message {ack['seq']}, and the stream had {self._acknowledged_sequence}")
        self._acknowledged_sequence = ack["seq"]

    async def _is_stored(self, event: OutboxEvent, sequence: int) -> bool:
        """Whether a message of the stream is this event."""
        try:
            async with asyncio.timeout(_SECONDS):
                message = await self._jetstream.get_msg(STREAM, seq=sequence)
        except NotFoundError:
            return False
        same = parse_event_headers(message.headers) == parse_event_headers(event.headers)
        return same and message.subject == self._subject(event)

    async def versions(self, polls: Sequence[UUID]) -> dict[UUID, EventHeaders | None]:
        """What the last message of each poll says of its event; None: it is not the relay's. Polls without messages are
        left out. At most 1,000 polls."""
        subjects = {event_subject(self._shard, poll_id): poll_id for poll_id in polls}
        # By direct get: to make a consumer of many subjects holds up who publishes.
        return {
            subjects[headers["Nats-Subject"]]: parse_event_headers(headers)
            async for headers in self._last_messages(list(subjects))
        }

    async def _last_messages(self, subjects: Sequence[str]) -> AsyncIterator[dict[str, str]]:
        """The headers of the last message of each subject, with those that the server adds."""
        answers: asyncio.Queue[Msg] = asyncio.Queue()
        inbox = self._connection.new_inbox()
        subscription = await self._connection.subscribe(inbox, cb=answers.put)
        request: dict[str, Any] = {"multi_last": subjects, "max_bytes": _ANSWER_BYTES}
        try:
            while True:
                await self._connection.publish(_LAST_MESSAGES, json.dumps(request).encode(), reply=inbox)
                while "Nats-Sequence" in (headers := await _next_headers(answers)):
                    yield headers
                match headers.get("Status"), headers.get("Nats-Num-Pending"):
                    case ("404", _) | ("204", "0" | None):
                        return
                    case "204", _:
                        request["seq"] = int(headers["Nats-Last-Sequence"]) + 1
                        request["up_to_seq"] = int(headers["Nats-UpTo-Sequence"])
                    case status, _:
                        raise nats_errors.Error(f"no last messages: {status} {headers.get('Description', '')}")
        finally:
            await subscription.unsubscribe()

    async def tail(self, messages: int) -> list[StreamedEvent]:
        """The events of this shard among the last messages of the stream, as their headers tell them."""
        async with asyncio.timeout(_SECONDS):
            state = (await self._jetstream.stream_info(STREAM)).state
            config = ConsumerConfig(
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=max(state.first_seq, state.last_seq - messages + 1, 1),
                headers_only=True,
                ack_policy=AckPolicy.NONE,
                mem_storage=True,
                num_replicas=1,
                inactive_threshold=_SECONDS,
            )
            consumer = await self._jetstream.add_consumer(STREAM, config)
            found = []
            if consumer.num_pending:
                subscription = await self._jetstream.pull_subscribe_bind(consumer.name, STREAM)
                for message in await subscription.fetch(consumer.num_pending, timeout=_NO_LIMIT):
                    headers, place = parse_event_headers(message.headers), parse_event_subject(message.subject)
                    if headers and place and place[0] == self._shard:
                        found.append(StreamedEvent(place[1], headers))
                await subscription.unsubscribe()
            await self._jetstream.delete_consumer(STREAM, consumer.name)
        return found

    def _subject(self, event: OutboxEvent) -> str:
        return event_subject(self._shard, event.poll_id)


async def _next_headers(answers: "asyncio.Queue[Msg]") -> dict[str, str]:
    # For each message, not for all: those of old polls are far apart on the disk.
    async with asyncio.timeout(_SECONDS):
        return (await answers.get()).headers or {}


def _traces(info: StreamInfo) -> _Traces:
    # The first sequence of an empty stream is 0 or 1, depending on its past.
    return _Traces(info.created, max(info.state.first_seq, 1), info.state.num_deleted or 0)


def _required(config: StreamConfig) -> StreamConfig:
    window = _DUPLICATE_WINDOW_SECONDS
    return config.evolve(
        subjects=[ALL_EVENTS],
        # NATS allows no longer one.
        duplicate_window=min(window, config.max_age or window),
        allow_atomic=True,
        allow_direct=True,
    )


def _unusable(config: StreamConfig) -> list[str]:
    """What an operator has to change about a stream, because it would lose events or refuse them."""
    limits = {
        "max_msgs": config.max_msgs,
        "max_bytes": config.max_bytes,
        "max_msgs_per_subject": config.max_msgs_per_subject if config.discard_new_per_subject else None,
    }
    full = [name for name, limit in limits.items() if limit and limit > 0]
    reasons = {
        f"its retention is {config.retention}, and must be limits": config.retention != RetentionPolicy.LIMITS,
        "it is kept in memory, and must be kept in files": config.storage != StorageType.FILE,
        f"it refuses new events once it has {', '.join(full)}: set discard to old": config.discard == DiscardPolicy.NEW
        and full,
        f"max_msg_size must be at least {MAX_EVENT_BYTES:,}, or -1": 0 < (config.max_msg_size or 0) < MAX_EVENT_BYTES,
        f"max_bytes must be at least {_LEAST_BYTES:,}, or -1": 0 < (config.max_bytes or 0) < _LEAST_BYTES,
        "max_consumers must be -1": (config.max_consumers or 0) > 0,
        "it must acknowledge messages: set no_ack to false": config.no_ack,
        "it acknowledges what is not on disk yet: set persist_mode to default": config.persist_mode
        == PersistMode.ASYNC,
        "it is sealed": config.sealed,
        "it is a mirror of another stream": config.mirror,
        "it takes messages from other streams": config.sources,
        "it changes the subjects of messages": config.subject_transform,
        "it is a counter": config.allow_msg_counter,
    }
    return [reason for reason, applies in reasons.items() if applies]
