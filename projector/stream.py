"""The stream of events, read from a position on, in order and without omissions, or not at all."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, StreamInfo
from nats.js.errors import NotFoundError

from contracts import log_epoch
from contracts.bus import DEPLOYMENT_METADATA, EPOCH_METADATA, STREAM, parse_event_headers

_SECONDS = 5.0
# What is asked of the server at once: it bounds what waits in this process while a batch is applied.
_PULL_MESSAGES = 1000
_PULL_BYTES = 2 << 20
_PULL_SECONDS = 30.0
_HEARTBEAT_SECONDS = 1.0
_SILENCE_SECONDS = 3.0
# An abandoned consumer is removed by the server after this.
_INACTIVE_SECONDS = 30.0


class Position(NamedTuple):
    """A place in the stream: a message's sequence, and when the stream stored it, in microseconds of Unix time; and the
    history of the log whose events are applied up to there.

    The time tells whether the stream is still the one that was read before: one that was made anew, or that lost its
    end, has another message in this place.
    """

    sequence: int
    stored_at: int
    log_epoch: UUID = log_epoch.ZERO


BEGINNING = Position(0, 0)


class Message(NamedTuple):
    """One event on the stream."""

    subject: str
    data: bytes
    # Its place, and the history that its event belongs to.
    position: Position
    # How many messages the stream has after this one.
    pending: int
    # The event's version, as the relay wrote it beside the event; 0: not the relay's message.
    version: int


class Origin(NamedTuple):
    """Which log the events come from. None: the stream does not say, because its relay is older than these."""

    log_epoch: UUID | None
    deployment_id: UUID | None


class Broken(nats.errors.Error):
    """Something between the stream and here is not as it should be: reading has to begin anew from the position."""


async def origin(connection: Client) -> tuple[Origin, Position]:
    """Where the events on the stream come from, and its last message. Raises NotFoundError where there is no stream."""
    jetstream = connection.jetstream(timeout=_SECONDS)
    info = await jetstream.stream_info(STREAM)
    last = BEGINNING
    if info.state.messages:
        with suppress(NotFoundError):
            message = await jetstream.get_msg(STREAM, seq=info.state.last_seq)
            if message.time is not None:
                last = Position(info.state.last_seq, _microseconds(message.time))
    return origin_of(info), last


def origin_of(info: StreamInfo) -> Origin:
    """Where the events on a stream come from, by its metadata."""
    metadata = info.config.metadata or {}
    return Origin(_uuid(metadata.get(EPOCH_METADATA)), _uuid(metadata.get(DEPLOYMENT_METADATA)))


@asynccontextmanager
async def read(connection: Client, position: Position, otherwise: Position = BEGINNING) -> AsyncIterator["Reader"]:
    """Reads what follows `position` or, where this stream has no such place, `otherwise`; `Reader.resumed` says which.
    Raises NotFoundError where there is no stream yet, Broken where it has neither place.
    """
    jetstream = connection.jetstream(timeout=_SECONDS)
    start, resumed = position, False
    if start.sequence > 0:
        consumer, backlog = await _consume(jetstream, start)
        # Only now: if the stream is replaced after this look, the consumer goes with it, and that is noticed.
        resumed = await _holds(jetstream, start)
        if not resumed:
            await jetstream.delete_consumer(STREAM, consumer)
    if not resumed:
        start = otherwise
        consumer, backlog = await _consume(jetstream, start)
        if start.sequence > 0 and not await _holds(jetstream, start):
            raise Broken("the stream has lost its last message meanwhile")
    reader = Reader(connection, consumer, start.sequence, resumed, backlog)
    await connection.subscribe(reader.inbox, cb=reader.on_message)
    try:
        yield reader
    finally:
        # Otherwise the server removes it a little later.
        with suppress(nats.errors.Error):
            await jetstream.delete_consumer(STREAM, consumer)


class Reader:
    """Takes messages from the stream as they come; made by `read`."""

    def __init__(self, connection: Client, consumer: str, start: int, resumed: bool, backlog: int) -> None:
        self.inbox = connection.new_inbox()
        self.resumed = resumed
        # Whether the stream has removed messages that were not read: it has limits, or somebody purged it.
        self.skipped = False
        # How many messages there were to be read when it began.
        self.backlog = backlog
        self._connection = connection
        self._next_subject = f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{consumer}"
        self._messages: list[Message] = []
        self._sequence = start
        self._delivered = 0
        self._expected = 0
        self._oversized = False
        self._problem = ""
        self._wake = asyncio.Event()
        self._heard_at = time.monotonic()

    async def next(self, seconds: float) -> list[Message]:
        """The messages that came since the last call; waits for the first up to `seconds`, then returns none.

        Raises Broken, after which there is nothing more to be had from this reader.
        """
        await self._pull()
        if not self._messages and not self._problem:
            self._wake.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._wake.wait()
            except TimeoutError:
                if time.monotonic() - self._heard_at > _SILENCE_SECONDS:
                    raise Broken(f"no message and no heartbeat for {_SILENCE_SECONDS:g} s") from None
        messages, self._messages = self._messages, []
        if self._problem and not messages:
            raise Broken(self._problem)
        # The next ones come while the caller is busy with these.
        await self._pull()
        return messages

    async def on_message(self, message: Msg) -> None:
        self._heard_at = time.monotonic()
        if message.reply:
            self._take(message)
        else:
            self._note(message.headers or {})
        self._wake.set()

    def _take(self, message: Msg) -> None:
        tokens = message.reply.split(".")
        sequence, place, stored_at, pending = map(int, tokens[5:9] if len(tokens) == 9 else tokens[7:11])
        self._delivered += 1
        if place != self._delivered:
            # What comes after a message that got lost on the way is not taken.
            self._problem = self._problem or f"message {self._delivered} of the consumer is missing"
        if not self._problem:
            self.skipped = self.skipped or sequence != self._sequence + 1
            self._sequence = sequence
            headers = parse_event_headers(message.headers)
            position = Position(sequence, stored_at // 1000, headers.log_epoch if headers else log_epoch.ZERO)
            version = headers.version if headers else 0
            self._messages.append(Message(message.subject, message.data, position, pending, version))

    def _note(self, headers: dict[str, str]) -> None:
        status, description = headers.get("Status", ""), headers.get("Description", "")
        if status == "100" or description == "Batch Completed":
            return
        if status == "408" or "MaxBytes" in description:
            # The request has ended before it was filled: its time is over, or the next message is too big for it.
            self._oversized = status == "409" and self._expected == self._delivered + _PULL_MESSAGES
            self._expected = self._delivered
            return
        self._problem = self._problem or f"{status} {description.strip()}"

    async def _pull(self) -> None:
        """Asks for more, unless what was asked for is still to come."""
        if self._delivered < self._expected or self._messages or self._problem:
            return
        request = {
            "expires": int(_PULL_SECONDS * 1e9),
            "idle_heartbeat": int(_HEARTBEAT_SECONDS * 1e9),
            "batch": 1 if self._oversized else _PULL_MESSAGES,
        }
        if not self._oversized:
            request["max_bytes"] = _PULL_BYTES
        self._expected = self._delivered + request["batch"]
        self._oversized = False
        self._heard_at = time.monotonic()
        await self._connection.publish(self._next_subject, json.dumps(request).encode(), reply=self.inbox)


async def _consume(jetstream: JetStreamContext, position: Position) -> tuple[str, int]:
    """A consumer, and the number of messages before it. Without acks, and gone with its reader: how far reading came is
    kept with the data, not by NATS."""
    config = ConsumerConfig(
        deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
        opt_start_seq=position.sequence + 1,
        ack_policy=AckPolicy.NONE,
        mem_storage=True,
        num_replicas=1,
        inactive_threshold=_INACTIVE_SECONDS,
    )
    consumer = await jetstream.add_consumer(STREAM, config)
    return consumer.name, consumer.num_pending or 0


async def _holds(jetstream: JetStreamContext, position: Position) -> bool:
    try:
        message = await jetstream.get_msg(STREAM, seq=position.sequence)
    except NotFoundError:
        return False
    return message.time is not None and _microseconds(message.time) == position.stored_at


def _microseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1_000_000)


def _uuid(text: str | None) -> UUID | None:
    with suppress(ValueError):
        return UUID(text) if text else None
    return None
