"""The life of a read model: events come from the stream, are added up, and are stored together with the position.

Each event is applied exactly once, because the read model stores a change only onto the version that the change was
computed from. A failure of any kind ends the session: the connections are closed, and after a pause everything begins
anew from the position that the read model holds. So there is one way to recover, whatever broke.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from datetime import UTC, datetime
from typing import ClassVar, NamedTuple, Protocol, Self
from uuid import UUID

import structlog
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError
from prometheus_client import Counter, Gauge
from tally.event.v1.event_pb2 import Event

from contracts.bus import REPUBLISH, republish_request
from contracts.counting import cast_votes
from contracts.dead_letters import MAX_DATA_BYTES, MAX_ERROR_CHARACTERS, UNREADABLE, DeadLetter
from contracts.status import REPORT_SECONDS
from projector import stream
from projector.fold import Tally, advance, fold
from projector.gaps import Gaps
from projector.progress import Progress
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

# What an event can raise that is at odds with the code that stores it: an enum's value that has no name here, say.
_DEFECTS = (ArithmeticError, LookupError, TypeError, ValueError)

_LABELS = ["read_model"]
_events = Counter("tally_projector_events", "Events applied.", _LABELS)
_votes = Counter("tally_projector_votes", "Votes applied.", _LABELS)
_duplicates = Counter("tally_projector_duplicates", "Events skipped because they were applied before.", _LABELS)
_gaps = Counter("tally_projector_gaps", "Times that an event was missing before another.", _LABELS)
_open_gaps = Gauge("tally_projector_open_gaps", "Polls that wait for a missing event.", _LABELS)
_requests = Counter("tally_projector_republish_requests", "Requests to publish events again.", _LABELS)
_parked = Gauge("tally_projector_parked_polls", "Polls that stand still at an event, a dead letter.", _LABELS)
_parkings = Counter("tally_projector_parkings", "Times that an event could not be applied.", _LABELS)
_strays = Counter("tally_projector_stray_messages", "Messages on the stream that are no poll's events.", _LABELS)
_failures = Counter("tally_projector_failures", "Sessions that ended by a failure.", _LABELS)


class Change(NamedTuple):
    """What became of a poll that the read model has at version `before` (0: not at all), by which events."""

    poll_id: str
    before: int
    tally: Tally
    events: Sequence[Event]


class _Received(NamedTuple):
    """An event, and the message that brought it."""

    event: Event
    message: Message


class Displaced(Exception):  # noqa: N818 - says what happened to the read model
    """The read model is not as this process left it: it was wiped, restored, or another process writes it too."""


class Replaced(Displaced):
    """A rebuild puts another copy of the read model in the place of this one: the next session writes that one."""


class ReadModel(Protocol):
    """Where results are stored for readers."""

    name: ClassVar[str]
    # What its store raises when it is away, and when it is there but refuses data for what they are.
    failures: ClassVar[tuple[type[Exception], ...]]
    refusals: ClassVar[tuple[type[Exception], ...]]

    @classmethod
    def connect(cls, store: str, /) -> AbstractAsyncContextManager[Self]:
        """Opens it in its store for one session."""

    async def position(self) -> Position | None:
        """How far into the stream it is; None: nowhere."""

    async def load(self, poll_ids: Sequence[str]) -> dict[str, Tally]:
        """Those of the polls that it has."""

    async def filled(self) -> None:
        """Notes that it has everything that there was when the session began. Until then, one that was empty is not for
        readers that have something else to read."""

    async def dead_letters(self) -> list[DeadLetter]:
        """The events at which polls stand still."""

    async def store(
        self,
        changes: Sequence[Change],
        letters: Mapping[str, DeadLetter | None],
        old: Position | None,
        new: Position,
    ) -> None:
        """Applies changes, keeps the dead letters of polls (None: drops it), and moves the position, all or nothing.
        Raises Displaced, and then nothing is stored, where the position is not `old` or a poll is not at the version
        before its change; Replaced where this is not the copy to write any more."""

    async def report(self, status: bytes) -> None:
        """Keeps what its projector says of itself, for readers: a GetReadModelStatusResponse."""


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
        # Whether the polls that stood still when this process began were tried again.
        self._retried = False
        self._progress = Progress(kind.name)

    async def run(self, stop: asyncio.Event) -> None:
        """Applies events until `stop` is set and the batch at hand is stored."""
        async with asyncio.TaskGroup() as tasks:
            reporting = tasks.create_task(self._report())
            await self._project(stop)
            reporting.cancel()

    async def _project(self, stop: asyncio.Event) -> None:
        application = f"projector {self._kind.name}"
        expected: tuple[type[Exception], ...] = (*nats.UNAVAILABLE, *self._kind.failures, Displaced)
        backoff = Backoff(longest=1.0)
        while not stop.is_set():
            started = time.monotonic()
            try:
                async with (
                    nats.connect(self._nats_url, application=application) as bus,
                    self._connect() as model,
                    asyncio.TaskGroup() as tasks,
                ):
                    looking = tasks.create_task(self._progress.look(bus))
                    session = _StreamSession(model, bus, self._progress, self._begun)
                    await session.run(stop, retry=not self._retried)
                    looking.cancel()
            except* Replaced:
                log.info("the read model is replaced by another copy")
            except* expected as failures:
                if time.monotonic() - started > _GOOD_SESSION_SECONDS:
                    backoff.reset()
                _failures.labels(self._kind.name).inc()
                self._progress.interrupted(_cause(failures))
                log.warning("projecting failed", errors=reasons(failures), failures=backoff.failures + 1)
            else:
                continue
            # Not within except*, which would wrap a cancellation into a group.
            await backoff.wait()

    async def _report(self) -> None:
        """Stores the progress each second, until cancelled: also while there is no session, which is worth knowing."""
        backoff = Backoff(first=REPORT_SECONDS)
        while True:
            try:
                async with self._connect() as model:
                    while True:
                        await model.report(self._progress.report().SerializeToString())
                        backoff.reset()
                        await asyncio.sleep(REPORT_SECONDS)
            except self._kind.failures as failure:
                self._progress.report()
                log.warning("the status cannot be stored", error=repr(failure))
            await backoff.wait()

    def _begun(self) -> None:
        self._retried = True
        self._ready()


class Session:
    """One uninterrupted application of events to a read model, wherever they come from: `begin`, then `apply`."""

    def __init__(self, model: ReadModel) -> None:
        self._model = model
        self._tallies = _Tallies()
        self._gaps = Gaps()
        # The polls that stand still, as the read model has them; and of the batch at hand what it does not have yet.
        self._parked: dict[str, DeadLetter] = {}
        self._letters: dict[str, DeadLetter | None] = {}
        # What the read model holds, and how far the events are read.
        self._stored = self._reached = BEGINNING
        # When the latest of the applied events was recorded, in Unix seconds.
        self._recorded_at = 0.0

    async def begin(self) -> None:
        """Finds out what the read model holds."""
        position = await self._model.position()
        if position is None:
            await self._model.store([], {}, None, BEGINNING)
            position = BEGINNING
        self._stored = self._reached = position
        self._parked = {letter.poll_id: letter for letter in await self._model.dead_letters()}
        _parked.labels(self._model.name).set(len(self._parked))

    async def apply(self, messages: Sequence[Message]) -> list[Change]:
        """Applies events, each once and in order, and moves the position to that of the last one; returns what it
        changed."""
        received = self._decode(messages)
        tallies = await self.load(received)
        changes: list[Change] = []
        for poll_id, batch in received.items():
            self._advance(poll_id, tallies[poll_id], batch, changes)
        self._reached = messages[-1].position
        failpoint("projector.before_store")
        # A restart from there meets the oldest open gap again, and asks for it again.
        changes = await self._store(changes, tallies, received, self._gaps.before_all or self._reached)
        failpoint("projector.after_store")
        for change in changes:
            self._tallies.keep(change.poll_id, change.tally)
        self._measure(changes)
        return changes

    async def move(self, position: Position) -> None:
        """Notes that the read model contains the stream up to another position."""
        await self._model.store([], {}, self._stored, position)
        self._stored = position

    def _decode(self, messages: Sequence[Message]) -> dict[str, list[_Received]]:
        """The events by poll."""
        received: dict[str, list[_Received]] = {}
        for message in messages:
            poll_id = message.subject.rpartition(".")[2]
            event = _event(message, poll_id) if poll_id in received or is_poll_id(poll_id) else None
            if event is None:
                _strays.labels(self._model.name).inc()
                log.warning("stray message", subject=message.subject, sequence=message.position.sequence)
            else:
                received.setdefault(poll_id, []).append(_Received(event, message))
        return received

    async def load(self, poll_ids: Iterable[str]) -> dict[str, Tally | None]:
        """The polls as the read model has them; None for one that it does not have."""
        tallies = {poll_id: self._tallies.get(poll_id) for poll_id in poll_ids}
        unknown = [poll_id for poll_id, tally in tallies.items() if tally is None]
        if unknown:
            loaded = await self._model.load(unknown)
            for poll_id, tally in loaded.items():
                self._tallies.keep(poll_id, tally)
            tallies.update(loaded)
        return tallies

    def _advance(self, poll_id: str, tally: Tally | None, received: list[_Received], changes: list[Change]) -> None:
        result = advance(tally, (event for event, _ in received))
        before = tally.version if tally else 0
        version = result.tally.version if result.tally else 0
        if result.tally and result.applied:
            changes.append(Change(poll_id, before, result.tally, result.applied))
        _duplicates.labels(self._model.name).inc(result.duplicates)
        letter = self._parked.get(poll_id)
        if result.error:
            self._park(poll_id, version + 1, str(result.error), received)
        elif letter and before == version == letter.version - 1:
            # It stands still until that event comes again, and then is tried again.
            if result.beyond > letter.latest:
                self._letters[poll_id] = letter._replace(latest=result.beyond)
        else:
            beyond = result.beyond
            if letter:
                # Until the poll has all that came meanwhile, the letter is what remembers it.
                beyond = max(beyond, letter.latest)
                if version >= beyond:
                    log.info("poll goes on", poll_id=poll_id, version=version)
                    self._letters[poll_id] = None
            if self._gaps.update(poll_id, version, beyond, self._reached, time.monotonic()):
                _gaps.labels(self._model.name).inc()
                log.info("an event is missing", poll_id=poll_id, version=version + 1, seen=beyond)

    async def _store(
        self,
        changes: list[Change],
        tallies: Mapping[str, Tally | None],
        received: Mapping[str, list[_Received]],
        position: Position,
    ) -> list[Change]:
        """Stores the changes up to the first event of each poll that the store refuses; returns what it did not."""
        refusals: tuple[type[Exception], ...] = (*self._model.refusals, *_DEFECTS)
        try:
            await self._model.store(changes, self._letters, self._stored, position)
        except refusals:
            accepted: list[Change] = []
            for change in changes:
                tally = tallies[change.poll_id]
                for event in change.events:
                    tally = fold(tally, event)
                    step = Change(change.poll_id, event.version - 1, tally, [event])
                    try:
                        await self._model.store([step], {}, self._stored, self._stored)
                    except refusals as error:
                        self._park(change.poll_id, event.version, repr(error), received[change.poll_id])
                        break
                    accepted.append(step)
            await self._model.store([], self._letters, self._stored, position)
            changes = accepted
        self._stored = position
        for poll_id, letter in self._letters.items():
            if letter:
                self._parked[poll_id] = letter
            else:
                self._parked.pop(poll_id, None)
        self._letters = {}
        return changes

    def _park(self, poll_id: str, version: int, error: str, received: Sequence[_Received]) -> None:
        """Lets a poll stand still before an event that cannot be applied."""
        message = next(message for event, message in received if event.version == version)
        event_type = _event_type(message, poll_id)
        if event_type == UNREADABLE:
            error = f"message {message.position.sequence} is not an event of this poll"
        before = self._parked.get(poll_id)
        self._letters[poll_id] = DeadLetter(
            poll_id=poll_id,
            version=version,
            latest=max(before.latest if before else 0, *(event.version for event, _ in received)),
            stream_sequence=message.position.sequence,
            event_type=event_type,
            error=error[:MAX_ERROR_CHARACTERS],
            first_seen=before.first_seen if before and before.version == version else datetime.now(UTC),
            data=message.data[:MAX_DATA_BYTES],
        )
        self._gaps.forget(poll_id)
        _parkings.labels(self._model.name).inc()
        log.error("poll parked", poll_id=poll_id, version=version, event_type=event_type, reason=error)

    def _measure(self, changes: Sequence[Change]) -> None:
        name = self._model.name
        for change in changes:
            _events.labels(name).inc(len(change.events))
            _votes.labels(name).inc(sum(cast_votes(event.votes_cast) for event in change.events))
            self._recorded_at = max(self._recorded_at, change.tally.as_of.ToNanoseconds() / 1e9)
        _open_gaps.labels(name).set(len(self._gaps))
        _parked.labels(name).set(len(self._parked))


class _StreamSession(Session):
    """A session that reads the stream; `begun` is called when events are applied."""

    def __init__(self, model: ReadModel, bus: Client, progress: Progress, begun: Callable[[], None]) -> None:
        super().__init__(model)
        self._bus = bus
        self._progress = progress
        self._begun = begun
        self._checked_at = 0.0

    async def run(self, stop: asyncio.Event, *, retry: bool) -> None:
        """Applies events until `stop`; with `retry`, those first at which polls stand still."""
        await self.begin()
        await self._reopen(retry)
        async with stream.read(self._bus, self._stored) as reader:
            if not reader.resumed:
                log.info("reading the stream from its beginning", position=self._stored.sequence)
                self._reached = BEGINNING
            self._begun()
            filled, backlog = False, reader.backlog
            while not stop.is_set():
                if not (filled or backlog > 0 or self._gaps.hopeful):
                    await self._model.filled()
                    filled = True
                messages = await reader.next(_LOOK_SECONDS)
                backlog -= len(messages)
                if messages:
                    await self.apply(messages)
                else:
                    await self._check()
                await self._ask()
                self._progress.applied(
                    self._gaps.before_all or self._reached,
                    self._recorded_at,
                    everything=not messages or not messages[-1].pending,
                    gapped=len(self._gaps),
                    parked=self._parked.values(),
                )

    async def _reopen(self, retry: bool) -> None:
        """Asks for what comes next of the polls that stood still and go on; with `retry`, of all that stand still."""
        for poll_id, tally in (await self.load(self._parked)).items():
            letter, version = self._parked[poll_id], tally.version if tally else 0
            if retry or version >= letter.version:
                self._gaps.reopen(poll_id, version + 1, letter.latest)

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


def _cause(failures: BaseExceptionGroup[BaseException]) -> str:
    """What interrupted a session, in words that may leave this process: who failed, and how it is called."""
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    if isinstance(failure, Displaced):
        return str(failure)
    if isinstance(failure, NotFoundError):
        return "there is no stream"
    who = "NATS" if isinstance(failure, NatsError) else "the store"
    return f"{who} failed: {type(failure).__name__}"


def _event(message: Message, poll_id: str) -> Event | None:
    """The event in a message. In the place of one that cannot be read stands an unknown one; None: it has no place."""
    event = _read(message, poll_id)
    if event is None and message.version:
        return Event(poll_id=poll_id, version=message.version)
    return event


def _read(message: Message, poll_id: str) -> Event | None:
    with suppress(DecodeError):
        event = Event.FromString(message.data)
        if event.poll_id == poll_id:
            return event
    return None


def _event_type(message: Message, poll_id: str) -> str:
    event = _read(message, poll_id)
    if event is None:
        return UNREADABLE
    unknown = UnknownFieldSet(event)
    numbers = [unknown[place].field_number for place in range(len(unknown))]
    return event.WhichOneof("change") or ", ".join(f"field {number}" for number in numbers) or "nothing"


def is_poll_id(text: str) -> bool:
    """Whether this is a poll's id as Tally writes it."""
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False
