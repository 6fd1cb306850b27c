"""The life of a read model: events come from the stream, are added up, and are stored together with the position.

Each event is applied exactly once, because the read model stores a change only onto the version that the change was
computed from. A failure of any kind ends the session: the connections are closed, and after a pause everything begins
anew from the position that the read model holds. So there is one way to recover, whatever broke.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import ClassVar, NamedTuple, Protocol
from uuid import UUID

import structlog
from google.protobuf.message import DecodeError
from nats.aio.client import Client
from prometheus_client import Counter, Gauge
from tally.event.v1.event_pb2 import Event

from contracts.bus import REPUBLISH, republish_request
from projector import stream
from projector.fold import Tally, advance
from projector.gaps import Gaps
from projector.stream import BEGINNING, Message, Position
from runtime import nats
from runtime.failpoints import failpoint
from runtime.lifecycle import Backoff, reasons

log = structlog.get_logger()

# How often a quiet projector looks whether the read model is still as it left it, and asks again for what is missing.
_LOOK_SECONDS = 0.2
_CHECK_SECONDS = 1.0
_GOOD_SESSION_SECONDS = 10.0
# Polls are kept in memory as long as their options together are not more than these.
_CACHED_OPTIONS = 200_000

_LABELS = ["read_model"]
_events = Counter("tally_projector_events", "Events applied.", _LABELS)
_votes = Counter("tally_projector_votes", "Votes applied.", _LABELS)
_duplicates = Counter("tally_projector_duplicates", "Events skipped because they were applied before.", _LABELS)
_gaps = Counter("tally_projector_gaps", "Times that an event was missing before another.", _LABELS)
_open_gaps = Gauge("tally_projector_open_gaps", "Polls that wait for a missing event.", _LABELS)
_requests = Counter("tally_projector_republish_requests", "Requests to publish events again.", _LABELS)
_parked = Gauge("tally_projector_parked_polls", "Polls that stand still because of an event.", _LABELS)
_pending = Gauge("tally_projector_pending_messages", "Messages in the stream that are not applied yet.", _LABELS)
_behind = Gauge("tally_projector_seconds_behind", "Age of the latest applied event when it was applied.", _LABELS)
_failures = Counter("tally_projector_failures", "Sessions that ended by a failure.", _LABELS)


class Change(NamedTuple):
    """What became of a poll that the read model has at version `before` (0: not at all), by which events."""

    poll_id: str
    before: int
    tally: Tally
    events: Sequence[Event]


class Displaced(Exception):  # noqa: N818 - says what happened to the read model
    """The read model is not as this process left it: it was wiped, restored, or another process writes it too."""


class ReadModel(Protocol):
    """Where results are stored for readers."""

    name: ClassVar[str]
    # What its store raises when it is away, and when it is there but refuses data for what they are.
    failures: ClassVar[tuple[type[Exception], ...]]
    refusals: ClassVar[tuple[type[Exception], ...]]

    async def position(self) -> Position | None:
        """How far into the stream it is; None: nowhere."""

    async def load(self, poll_ids: Sequence[str]) -> dict[str, Tally]:
        """Those of the polls that it has."""

    async def store(self, changes: Sequence[Change], old: Position | None, new: Position) -> None:
        """Applies changes and moves the position, all or nothing. Raises Displaced, and then nothing is stored, where
        the position is not `old` or a poll is not at the version before its change."""


class Projection:
    """Keeps one read model up to the stream; `connect` opens its store, `ready` is called when events are applied."""

    def __init__(
        self,
        kind: type[ReadModel],
        connect: Callable[[], AbstractAsyncContextManager[ReadModel]],
        nats_url: str,
        ready: Callable[[], None],
    ) -> None:
        self._kind = kind
        self._connect = connect
        self._nats_url = nats_url
        self._ready = ready
        # Why polls stand still. In memory only: after a restart their next event shows it again.
        self._parked: dict[str, str] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Applies events until `stop` is set and the batch at hand is stored."""
        application = f"projector {self._kind.name}"
        expected: tuple[type[Exception], ...] = (*nats.UNAVAILABLE, *self._kind.failures, Displaced)
        backoff = Backoff(longest=1.0)
        while not stop.is_set():
            started = time.monotonic()
            try:
                async with nats.connect(self._nats_url, application=application) as bus, self._connect() as model:
                    await _Session(model, bus, self._parked, self._ready).run(stop)
            except* expected as failures:
                if time.monotonic() - started > _GOOD_SESSION_SECONDS:
                    backoff.reset()
                _failures.labels(self._kind.name).inc()
                log.warning("projecting failed", errors=reasons(failures), failures=backoff.failures + 1)
            else:
                continue
            # Not within except*, which would wrap a cancellation into a group.
            await backoff.wait()


class _Session:
    """One uninterrupted reading of the stream into the read model."""

    def __init__(self, model: ReadModel, bus: Client, parked: dict[str, str], ready: Callable[[], None]) -> None:
        self._model = model
        self._bus = bus
        self._parked = parked
        self._ready = ready
        self._tallies = _Tallies()
        self._gaps = Gaps()
        # What the read model holds, and how far the stream is read.
        self._stored = self._reached = BEGINNING
        self._checked_at = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        position = await self._model.position()
        if position is None:
            await self._model.store([], None, BEGINNING)
            position = BEGINNING
        self._stored = position
        async with stream.read(self._bus, position) as reader:
            if reader.resumed:
                self._reached = position
            else:
                log.info("reading the stream from its beginning", position=position.sequence)
                self._parked.clear()
                self._reached = BEGINNING
            self._ready()
            while not stop.is_set():
                messages = await reader.next(_LOOK_SECONDS)
                if messages:
                    await self._apply(messages)
                else:
                    await self._check()
                await self._ask()

    async def _apply(self, messages: Sequence[Message]) -> None:
        events = self._decode(messages)
        tallies = await self._load(events)
        changes: list[Change] = []
        for poll_id, batch in events.items():
            if poll_id in tallies:
                self._advance(poll_id, tallies[poll_id], batch, changes)
        self._reached = messages[-1].position
        failpoint("projector.before_store")
        # A restart from there meets the oldest open gap again, and asks for it again.
        changes = await self._store(changes, self._gaps.before_all if self._gaps else self._reached)
        failpoint("projector.after_store")
        for change in changes:
            self._tallies.keep(change.poll_id, change.tally)
        self._measure(changes, messages[-1].pending)

    def _decode(self, messages: Sequence[Message]) -> dict[str, list[Event]]:
        """The events by poll. A poll stands still from the first one that cannot be read."""
        events: dict[str, list[Event]] = {}
        for message in messages:
            poll_id = message.subject.rpartition(".")[2]
            if poll_id in self._parked:
                continue
            try:
                event = Event.FromString(message.data)
            except DecodeError:
                self._park(poll_id, f"message {message.position.sequence} is not an event")
                continue
            if event.poll_id == poll_id:
                events.setdefault(poll_id, []).append(event)
            else:
                self._park(poll_id, f"message {message.position.sequence} is of another poll: {event.poll_id}")
        return events

    async def _load(self, poll_ids: Iterable[str]) -> dict[str, Tally | None]:
        """The polls as the read model has them; None for one that it does not have."""
        tallies = {poll_id: self._tallies.get(poll_id) for poll_id in poll_ids}
        unknown = [poll_id for poll_id, tally in tallies.items() if tally is None]
        for poll_id in [poll_id for poll_id in unknown if not _is_uuid(poll_id)]:
            self._park(poll_id, "not the id of a poll")
            unknown.remove(poll_id)
            del tallies[poll_id]
        if unknown:
            loaded = await self._model.load(unknown)
            for poll_id, tally in loaded.items():
                self._tallies.keep(poll_id, tally)
            tallies.update(loaded)
        return tallies

    def _advance(self, poll_id: str, tally: Tally | None, events: list[Event], changes: list[Change]) -> None:
        result = advance(tally, events)
        before = tally.version if tally else 0
        if result.tally and result.applied:
            changes.append(Change(poll_id, before, result.tally, result.applied))
        _duplicates.labels(self._model.name).inc(result.duplicates)
        if result.error:
            self._park(poll_id, str(result.error))
            return
        version = result.tally.version if result.tally else 0
        if self._gaps.update(poll_id, version, result.beyond, self._reached, time.monotonic()):
            _gaps.labels(self._model.name).inc()
            log.info("an event is missing", poll_id=poll_id, version=version + 1, seen=result.beyond)

    async def _store(self, changes: list[Change], position: Position) -> list[Change]:
        """Stores the changes, but parks a poll whose change the store refuses; returns the others."""
        refusals = self._model.refusals
        try:
            await self._model.store(changes, self._stored, position)
        except refusals:
            accepted = []
            for change in changes:
                try:
                    await self._model.store([change], self._stored, self._stored)
                    accepted.append(change)
                except refusals as error:
                    self._park(change.poll_id, repr(error))
            await self._model.store([], self._stored, position)
            changes = accepted
        self._stored = position
        return changes

    async def _check(self) -> None:
        """Notices, while nothing happens, that the read model was wiped or replaced."""
        now = time.monotonic()
        if now - self._checked_at > _CHECK_SECONDS:
            self._checked_at = now
            if await self._model.position() != self._stored:
                raise Displaced("the position is not the one that was stored")

    async def _ask(self) -> None:
        for poll_id, version in self._gaps.due(time.monotonic()):
            _requests.labels(self._model.name).inc()
            await self._bus.publish(REPUBLISH, republish_request(UUID(poll_id), version))

    def _park(self, poll_id: str, reason: str) -> None:
        log.error("poll parked", poll_id=poll_id, reason=reason)
        self._parked[poll_id] = reason
        self._gaps.forget(poll_id)
        self._tallies.forget(poll_id)
        _parked.labels(self._model.name).set(len(self._parked))

    def _measure(self, changes: Sequence[Change], pending: int) -> None:
        name = self._model.name
        latest = 0.0
        for change in changes:
            _events.labels(name).inc(len(change.events))
            _votes.labels(name).inc(sum(len(event.votes_cast.option_numbers) for event in change.events))
            latest = max(latest, change.tally.as_of.seconds + change.tally.as_of.nanos / 1e9)
        if latest:
            _behind.labels(name).set(max(time.time() - latest, 0.0))
        _pending.labels(name).set(pending)
        _open_gaps.labels(name).set(len(self._gaps))
        _parked.labels(name).set(len(self._parked))


class _Tallies:
    """Polls as the read model has them, the latest used ones."""

    def __init__(self) -> None:
        self._tallies: OrderedDict[str, Tally] = OrderedDict()
        self._options = 0

    def get(self, poll_id: str) -> Tally | None:
        tally = self._tallies.get(poll_id)
        if tally is not None:
            self._tallies.move_to_end(poll_id)
        return tally

    def keep(self, poll_id: str, tally: Tally) -> None:
        self.forget(poll_id)
        self._tallies[poll_id] = tally
        self._options += len(tally.options)
        while self._options > _CACHED_OPTIONS:
            self.forget(next(iter(self._tallies)))

    def forget(self, poll_id: str) -> None:
        tally = self._tallies.pop(poll_id, None)
        if tally is not None:
            self._options -= len(tally.options)


def _is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False
