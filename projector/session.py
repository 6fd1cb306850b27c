"""A session: events are applied to a read model, each once and in order, and stored together with the position.

Each event is applied exactly once, because the read model stores a change only onto the version that the change was
computed from. What is wrong with one poll, an event that cannot be applied or a stored state that cannot be read, does
not block the others.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import NamedTuple
from uuid import UUID

import structlog
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from prometheus_client import Counter, Gauge
from tally.event.v1.event_pb2 import Event

from contracts.counting import cast_votes
from contracts.dead_letters import MAX_DATA_BYTES, MAX_ERROR_CHARACTERS, UNREADABLE, DeadLetter
from projector.fold import Tally, advance, fold
from projector.gaps import Gaps
from projector.read_model import Change, Damaged, ReadModel
from projector.stream import BEGINNING, Message, Position
from runtime.failpoints import failpoint

log = structlog.get_logger()

# Polls are kept in memory as long as their options together are not more than these.
_CACHED_OPTIONS = 200_000

# Polls are changed together as long as their options are not more than these: 20 of the largest ones, whose results are
# 1.2 MB each. How large they are is not known before they are loaded, so the first are as few as that.
_OPTIONS_AT_ONCE = 20_000
_FIRST_POLLS = 20

# What an event can raise that is at odds with the code that stores it: an enum's value that has no name here, say.
_DEFECTS = (ArithmeticError, LookupError, TypeError, ValueError)

_LABELS = ["read_model"]
_events = Counter("tally_projector_events", "Events applied.", _LABELS)
_votes = Counter("tally_projector_votes", "Votes applied.", _LABELS)
_duplicates = Counter("tally_projector_duplicates", "Events skipped because they were applied before.", _LABELS)
_gaps = Counter("tally_projector_gaps", "Times that an event was missing before another.", _LABELS)
_open_gaps = Gauge("tally_projector_open_gaps", "Polls that wait for a missing event.", _LABELS)
_parked = Gauge("tally_projector_parked_polls", "Polls that are parked at an event, a dead letter.", _LABELS)
_parkings = Counter("tally_projector_parkings", "Times that an event could not be applied.", _LABELS)
_strays = Counter("tally_projector_stray_messages", "Messages on the stream that are no poll's events.", _LABELS)
_damaged = Counter("tally_projector_damaged_polls", "Stored polls that could not be read and were made anew.", _LABELS)
_earlier = Counter(
    "tally_projector_earlier_epoch_messages", "Events skipped because they are of an earlier log epoch.", _LABELS
)


class Applied(NamedTuple):
    """How many events were new, and the votes in them."""

    events: int
    votes: int


class _Received(NamedTuple):
    """An event, and the message that brought it."""

    event: Event
    message: Message


class Session:
    """One uninterrupted application of events to a read model, wherever they come from: `begin`, then `apply`. Several
    tasks may use it: what they do to the read model is done one after the other."""

    def __init__(self, model: ReadModel) -> None:
        self._model = model
        self._tallies = _Tallies()
        self._polls_at_once = _FIRST_POLLS
        self._gaps = Gaps()
        # The parked polls, as the read model has them; and of the current batch what it does not have yet.
        self._parked: dict[str, DeadLetter] = {}
        self._letters: dict[str, DeadLetter | None] = {}
        # What the read model holds, and how far the events are read.
        self._stored = self._reached = BEGINNING
        # The position that is stored while something before `_reached` may be missing: a restart begins there.
        self._held: Position | None = None
        # Polls whose latest event came once more and was another one.
        self.suspects: set[str] = set()
        self._one_at_a_time = asyncio.Lock()

    @property
    def log_epoch(self) -> UUID:
        """The history of the log that the read model is of, since `begin`."""
        return self._stored.log_epoch

    async def begin(self, log_epoch: UUID) -> None:
        """Finds out what the read model holds; one that holds nothing begins with this history of the log."""
        async with self._one_at_a_time:
            position = await self._model.position()
            if position is None:
                position = BEGINNING._replace(log_epoch=log_epoch)
                await self._model.store([], {}, None, position)
            self._stored = self._reached = position
            self._parked = {letter.poll_id: letter for letter in await self._model.dead_letters()}
            _parked.labels(self._model.name).set(len(self._parked))

    async def apply(self, messages: Sequence[Message], reached: Position | None = None) -> Applied:
        """Applies events, each once and in order, those of so many polls at a time that memory holds these; returns how
        many were new. Those from the stream move the position to `reached`, the place of the last one."""
        events = votes = 0
        async with self._one_at_a_time:
            for part in self._parts(messages):
                changes = await self._apply(part, part[-1].position if reached else None)
                events += sum(len(change.events) for change in changes)
                votes += sum(cast_votes(event.votes_cast) for change in changes for event in change.events)
        return Applied(events, votes)

    def _parts(self, messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
        """The messages in parts of a few polls, as many as the size of those of the part before allows."""
        start, subjects = 0, set[str]()
        for place, message in enumerate(messages):
            subjects.add(message.subject)
            if len(subjects) > self._polls_at_once:
                yield messages[start:place]
                start, subjects = place, {message.subject}
        if start < len(messages):
            yield messages[start:]

    async def _apply(self, messages: Sequence[Message], reached: Position | None) -> list[Change]:
        received = self._decode(messages)
        tallies = await self._load(received)
        changes: list[Change] = []
        gapped = [poll for poll, batch in received.items() if self._advance(poll, tallies[poll], batch, changes)]
        if gapped:
            log.info("events are missing", polls=len(gapped), poll_id=gapped[0])
        if reached:
            self._reached = reached._replace(log_epoch=self.log_epoch)
        failpoint("projector.before_store")
        # A restart from there meets the oldest open gap again, and asks for it again.
        position = self._held or self._gaps.before_all or self._reached
        changes = await self._store(changes, tallies, received, position)
        failpoint("projector.after_store")
        for change in changes:
            self._tallies.keep(change.poll_id, change.tally)
        if changes:
            options = sum(len(change.tally.options) for change in changes)
            self._polls_at_once = max(_OPTIONS_AT_ONCE * len(changes) // max(options, 1), 1)
        self._measure(changes)
        return changes

    async def move(self, position: Position) -> None:
        """Notes that the read model contains the stream up to another position."""
        async with self._one_at_a_time:
            await self._model.store([], {}, self._stored, position)
            self._stored = position

    async def load(self, poll_ids: Iterable[str]) -> dict[str, Tally | None]:
        """The polls as the read model has them; None for one that it does not have."""
        async with self._one_at_a_time:
            return await self._load(poll_ids)

    async def look(self, poll_ids: Sequence[str]) -> dict[str, Tally]:
        """Those of the polls that the read model has at this moment, whatever this process left there."""
        async with self._one_at_a_time:
            found = await self._read(poll_ids)
            for poll_id in poll_ids:
                if poll_id not in found:
                    self._tallies.keep(poll_id, None)
                elif poll_id in self._tallies and self._tallies.get(poll_id) != found[poll_id]:
                    self._tallies.forget(poll_id)
            return found

    def hold(self) -> None:
        """Leaves the stored position where it is until `release`."""
        self._held = self._stored

    async def release(self) -> None:
        """Nothing is missing before what has been reached."""
        async with self._one_at_a_time:
            self._held = None
            await self._store([], {}, {}, self._gaps.before_all or self._reached)
            await self._model.filled()

    def stands_still(self, poll_id: str, version: int) -> bool:
        """Whether a poll at a version waits for the event of its dead letter."""
        letter = self._parked.get(poll_id)
        return letter is not None and letter.version == version + 1

    def _decode(self, messages: Sequence[Message]) -> dict[str, list[_Received]]:
        """The events by poll."""
        received: dict[str, list[_Received]] = {}
        for message in messages:
            if message.version and message.position.log_epoch < self.log_epoch:
                _earlier.labels(self._model.name).inc()
                continue
            poll_id = message.subject.rpartition(".")[2]
            event = _event(message, poll_id) if poll_id in received or is_poll_id(poll_id) else None
            if event is None or message.position.log_epoch != self.log_epoch:
                _strays.labels(self._model.name).inc()
                log.warning("stray message", subject=message.subject, sequence=message.position.sequence)
            else:
                received.setdefault(poll_id, []).append(_Received(event, message))
        return received

    async def _load(self, poll_ids: Iterable[str]) -> dict[str, Tally | None]:
        tallies = {poll_id: self._tallies.get(poll_id) for poll_id in poll_ids}
        unknown = [poll_id for poll_id in tallies if poll_id not in self._tallies]
        if unknown:
            loaded = await self._read(unknown)
            for poll_id, tally in loaded.items():
                self._tallies.keep(poll_id, tally)
            tallies.update(loaded)
        return tallies

    async def _read(self, poll_ids: Sequence[str]) -> dict[str, Tally]:
        """What the store has of polls; those that cannot be read are set aside, and made anew like missing ones."""
        try:
            return await self._model.load(poll_ids)
        except Damaged as damage:
            _damaged.labels(self._model.name).inc(len(damage.polls))
            for poll_id, reason in damage.polls.items():
                log.error("a stored poll cannot be read and is made anew", poll_id=poll_id, reason=reason)
            await self._model.set_aside(list(damage.polls))
            return await self._model.load(poll_ids)

    def _advance(self, poll_id: str, tally: Tally | None, received: list[_Received], changes: list[Change]) -> bool:
        """Adds what is to be stored of a poll to `changes`; whether an event is found to be missing."""
        result = advance(tally, (event for event, _ in received))
        if tally and any(_contradicts(event, tally) for event, _ in received):
            self.suspects.add(poll_id)
        before = tally.version if tally else 0
        version = result.tally.version if result.tally else 0
        if result.tally and result.applied:
            changes.append(Change(poll_id, before, result.tally, result.applied))
        if result.duplicates:
            _duplicates.labels(self._model.name).inc(result.duplicates)
        letter = self._parked.get(poll_id)
        if result.error:
            self._park(poll_id, version + 1, str(result.error), received)
        elif letter and before == version == letter.version - 1:
            # It is parked until that event comes again, and then is tried again.
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
                return True
        return False

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
                    before = tally.version if tally else 0
                    tally = fold(tally, event)
                    step = Change(change.poll_id, before, tally, [event])
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
        """Parks a poll before an event that cannot be applied."""
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
        _events.labels(name).inc(sum(len(change.events) for change in changes))
        _votes.labels(name).inc(sum(cast_votes(event.votes_cast) for change in changes for event in change.events))
        _open_gaps.labels(name).set(len(self._gaps))
        _parked.labels(name).set(len(self._parked))


class _Tallies:
    """Polls as the read model has them, the latest used ones; None for one that it does not have."""

    def __init__(self) -> None:
        self._tallies: OrderedDict[str, Tally | None] = OrderedDict()
        self._options = 0

    def __contains__(self, poll_id: str) -> bool:
        return poll_id in self._tallies

    def get(self, poll_id: str) -> Tally | None:
        tally = self._tallies.get(poll_id)
        if tally is not None:
            self._tallies.move_to_end(poll_id)
        return tally

    def keep(self, poll_id: str, tally: Tally | None) -> None:
        self.forget(poll_id)
        self._tallies[poll_id] = tally
        self._options += _options(tally)
        while self._options > _CACHED_OPTIONS:
            self.forget(next(iter(self._tallies)))

    def forget(self, poll_id: str) -> None:
        if poll_id in self._tallies:
            self._options -= _options(self._tallies.pop(poll_id))


def _options(tally: Tally | None) -> int:
    return len(tally.options) if tally else 1


def _contradicts(event: Event, tally: Tally) -> bool:
    """Whether an event is another one than the poll's latest, under the same name."""
    return event.version == tally.version and event.HasField("recorded_at") and event.recorded_at != tally.as_of


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
