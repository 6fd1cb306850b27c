"""What a read model is for its projector: polls with their versions in a store, and a position in the stream.

The position and the data are stored together, so whatever is killed, the next session goes on from what was stored.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import ClassVar, NamedTuple, Protocol, Self
from uuid import UUID

from tally.event.v1.event_pb2 import Event

from contracts.dead_letters import DeadLetter
from projector.fold import Tally
from projector.stream import Position


class Change(NamedTuple):
    """What became of a poll that the read model has at version `before` (0: not at all), by which events."""

    poll_id: str
    before: int
    tally: Tally
    events: Sequence[Event]


class Displaced(Exception):  # noqa: N818 - says what happened to the read model
    """The read model is not as this process left it: it was wiped, restored, or another process writes it too."""


class Replaced(Displaced):
    """A rebuild puts another copy of the read model in the place of this one: the next session writes that one."""


class Outdated(Exception):  # noqa: N818 - says what the read model is
    """The read model is of another history of the log than the one that goes on: it has to be made anew."""


class Damaged(Exception):  # noqa: N818 - says what the stored polls are
    """Stored polls cannot be read: by poll_id, why."""

    def __init__(self, polls: Mapping[str, str]) -> None:
        super().__init__(f"{len(polls):,} polls cannot be read")
        self.polls = polls


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
        """How far into the stream it is, and of which log epoch; None: nowhere."""

    async def claim(self, deployment_id: UUID) -> UUID:
        """The deployment that it belongs to: from now on this one, where it has belonged to none. It has a position."""

    async def load(self, poll_ids: Sequence[str]) -> dict[str, Tally]:
        """Those of the polls that it has. Raises Damaged where some of them cannot be read."""

    async def set_aside(self, poll_ids: Sequence[str]) -> None:
        """Takes polls that cannot be read out of it: they are not there any more, and are made anew."""

    async def filling(self) -> bool:
        """Whether it began from nothing, and `filled` was not called since: it is not for readers yet."""

    async def filled(self) -> None:
        """Notes that it has everything that there was when it began."""

    async def dead_letters(self) -> list[DeadLetter]:
        """The events at which polls are parked. Letters that cannot be read are dropped: their polls show a gap."""

    async def store(
        self,
        changes: Sequence[Change],
        letters: Mapping[str, DeadLetter | None],
        old: Position | None,
        new: Position,
    ) -> None:
        """Applies changes, keeps the dead letters of polls (None: drops it), and moves the position, all or nothing.
        Raises Displaced, and then nothing is stored, where the position is not `old` or a poll is not at the version
        before its change; Replaced where this is not the copy to write any more. With `old` None it begins: from then
        on it is `filling`."""

    async def report(self, status: bytes) -> None:
        """Keeps what its projector says of itself, for readers: a GetReadModelStatusResponse."""
