"""The rebuild of a read model: the whole event log is applied to a fresh copy, which then replaces the one in use.

The fresh copy is made beside the one in use, which goes on serving readers and is kept up by its projector. Round after
round, the fresh copy gets what the log has got meanwhile, until a round is short. Then the copy in use is frozen: its
readers go on, its projector is held up. So nothing is missing in the fresh copy after one more round, and it cannot be
behind what any reader has seen. It takes the position of the frozen one, since whatever the stream holds up to there is
in the log; and the switch is one atomic step of the store. The projector notices, and goes on with the fresh copy.

Whatever ends a rebuild before the switch, the copy in use is as it was. The next rebuild begins anew: a half-made copy
may have been made by other code.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from contracts import log_epoch
from projector.event_log import EventLog, Incomplete, LoggedPoll
from projector.live_copies import LiveCopies
from projector.read_model import ReadModel
from projector.schema import Schema
from projector.schema_copies import SchemaCopies
from projector.session import Session
from projector.stream import Position
from runtime.failpoints import failpoint

# A round that takes no longer is as good as caught up; what it leaves is done while the copy in use is frozen.
_SHORT_SECONDS = 0.3
# How long the copy in use may be frozen: less than what its lock in Redis lasts.
_FROZEN_SECONDS = 3.0
_ATTEMPTS = 10


class Copies(Protocol):
    """The copy of a read model that is in use, and a fresh one that is to take its place."""

    @property
    def in_use(self) -> ReadModel: ...

    @property
    def fresh(self) -> ReadModel: ...

    def ahead(self) -> AsyncIterator[dict[str, int]]:
        """The polls of which the copy in use has a later version than the fresh one, with that version; in parts."""

    def frozen(self) -> AbstractAsyncContextManager[None]:
        """While it lasts, nothing in the copy in use is changed. Raises TimeoutError where that cannot be had now."""

    async def switch(self) -> None:
        """Within `frozen`: the fresh copy is the one in use from now on. Raises Displaced where something is not as
        this process left it, and then nothing is switched."""


def copies(kind: type[ReadModel], store: str) -> AbstractAsyncContextManager[Copies]:
    """The copies of a read model in its store. A fresh one that is not switched to is removed at the end."""
    return SchemaCopies.open(kind, store) if issubclass(kind, Schema) else LiveCopies.open(store)


class Rebuild:
    """One rebuild, and how far it is."""

    def __init__(self, log: EventLog, copies: Copies) -> None:
        self.events = 0
        self.votes = 0
        # The polls that stand still at an event that cannot be applied.
        self.parked = 0
        # For how long the projector was held up; None: there was no switch.
        self.frozen_seconds: float | None = None
        self._started = time.monotonic()
        self._log = log
        self._copies = copies
        self._log_epoch = log.origin.log_epoch or log_epoch.ZERO
        self._went_on: Callable[[], None] = lambda: None
        self._session = Session(copies.fresh)
        # All that was changed before it is in the fresh copy.
        self._horizon: str | None = None

    @property
    def done(self) -> int:
        """The events that are applied."""
        return self.events

    @property
    def seconds(self) -> float:
        """How long it has been under way."""
        return time.monotonic() - self._started

    @property
    def pace(self) -> str:
        return f"{self.events / self.seconds:,.0f} events/s, {self.votes / self.seconds:,.0f} votes/s"

    async def run(self, went_on: Callable[[], None], *, taking_back: bool = False) -> None:
        """Makes the fresh copy and switches to it; `went_on` is called whenever events were applied. `taking_back`:
        also where the copy in use has later versions, in the same history, than the log.

        Raises Incomplete, Displaced, or what a store raises.
        """
        self._went_on = went_on
        position = await self._copies.in_use.position()
        await self._claim(position)
        await self._catch_up()
        # Versions of another history are not comparable.
        if not taking_back and (position is None or position.log_epoch == self._log_epoch):
            await self._compare()
        for _ in range(_ATTEMPTS):
            try:
                await self._switch()
                break
            except TimeoutError as error:
                failure = error
            # What was cut off may have been stored, or not.
            self._session = Session(self._copies.fresh)
            await self._session.begin(self._log_epoch)
            await self._catch_up()
        else:
            raise failure

    async def _claim(self, position: Position | None) -> None:
        """Begins the fresh copy. Raises Incomplete where the copy in use is of another log than this one."""
        if position and position.log_epoch > self._log_epoch:
            raise Incomplete(f"this log is of the epoch {self._log_epoch}, and readers have seen {position.log_epoch}")
        await self._session.begin(self._log_epoch)
        if deployment_id := self._log.origin.deployment_id:
            if position and (owner := await self._copies.in_use.claim(deployment_id)) != deployment_id:
                raise Incomplete(f"this log is of the deployment {deployment_id}, and the read model of {owner}")
            await self._copies.fresh.claim(deployment_id)

    async def _catch_up(self) -> None:
        seconds = _SHORT_SECONDS
        while seconds >= _SHORT_SECONDS:
            started = time.monotonic()
            await self._round()
            seconds = time.monotonic() - started

    async def _round(self) -> None:
        """Applies what has changed since the horizon, and moves the horizon on."""
        horizon = await self._log.horizon()
        async for polls in self._log.changed_polls(self._horizon):
            await self._apply(polls)
        self._horizon = horizon

    async def _apply(self, polls: list[LoggedPoll]) -> None:
        tallies = await self._session.load([str(poll.poll_id) for poll in polls])
        known = {poll.poll_id: tally.version if (tally := tallies[str(poll.poll_id)]) else 0 for poll in polls}
        async for messages in self._log.events(polls, known):
            events, votes = await self._session.apply(messages)
            self.events += events
            self.votes += votes
            failpoint("rebuild.applied")
            self._went_on()

    async def _compare(self) -> None:
        """Raises Incomplete where the copy in use has what the log does not have: it may be another one's log."""
        ahead: dict[str, int] = {}
        async for part in self._copies.ahead():
            ahead |= part
        # The log has by now what the copy in use had before, if it is its log.
        await self._round()
        fresh = await self._copies.fresh.load(list(ahead))
        lost = {p: version for p, version in ahead.items() if p not in fresh or fresh[p].version < version}
        if lost:
            poll_id, version = next(iter(lost.items()))
            reached = fresh[poll_id].version if poll_id in fresh else 0
            raise Incomplete(
                f"{len(lost):,} polls would go back, for instance {poll_id} from version {version} to {reached}"
            )

    async def _switch(self) -> None:
        frozen_at = time.monotonic()
        async with asyncio.timeout(_FROZEN_SECONDS), self._copies.frozen():
            position = await self._copies.in_use.position()
            await self._round()
            if position:
                await self._session.move(position._replace(log_epoch=self._log_epoch))
            await self._copies.fresh.filled()
            self.parked = len(await self._copies.fresh.dead_letters())
            failpoint("rebuild.before_switch")
            await self._copies.switch()
        self.frozen_seconds = time.monotonic() - frozen_at
        failpoint("rebuild.after_switch")
