"""What taking votes needs to know of each poll, kept in memory."""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from uuid import UUID

import asyncpg
from tally.poll.v1.poll_pb2 import PollSpec

from command_server import ballots
from command_server.poll import OPEN, choose, has_roll
from contracts.refusals import poll_not_found
from runtime.postgres import POOL_SECONDS, patiently, queries

sql = queries(__package__)

# The most options of all polls that are remembered: with its part of a poll, an option has some 600 bytes.
OPTIONS = 50_000
PATIENCE_SECONDS = 5.0
# How long a poll that is not open, or does not exist, is not read again, how many of these are remembered, and how many
# connections read polls at once.
NOT_OPEN_SECONDS = 0.5
_NOT_OPEN = 1_000
_CONNECTIONS = 2


class Poll(NamedTuple):
    """A poll as the polling station sees it."""

    poll_id: UUID
    poll_no: int
    state: str
    spec: PollSpec
    # option_id → its place in the poll's options.
    option_numbers: Mapping[str, int]
    # option_id → what a ballot for it alone ends with.
    markings: dict[str, bytes]

    @property
    def has_roll(self) -> bool:
        """Whether only registered voters may vote, each with its weight."""
        return has_roll(self.spec)

    def mark(self, option_ids: Sequence[str]) -> bytes:
        """What a ballot for these options ends with; a Refusal where the poll does not allow them."""
        if len(option_ids) == 1 and (marking := self.markings.get(option_ids[0])):
            return marking
        return ballots.marking(choose(self.spec, self.option_numbers, option_ids))


class Polls:
    """Looks polls up by id. An open poll's options cannot change, so it is remembered; one that is not open, or that
    does not exist, for a moment: a crowd that comes too early or too late is one read.

    That an open poll was closed in the meantime is found by the statement that logs the votes; `forget` it then. What
    changed a poll at this server says so by `changed`.
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        # By the usual spelling of their ids, as one poll's id has many. The one that was used last comes last.
        self._open: OrderedDict[str, Poll] = OrderedDict()
        self._options = 0
        # Polls that are not open, None for those that do not exist, and when each is to be read again; oldest first.
        self._not_open: OrderedDict[str, tuple[float, Poll | None]] = OrderedDict()
        # Polls that are being read, once for all who ask.
        self._reading: dict[str, asyncio.Task[Poll | None]] = {}
        self._connections = asyncio.Semaphore(_CONNECTIONS)

    def known(self, poll_id: str) -> Poll | None:
        """The poll, if it is remembered: then `poll_id` is a UUID, in its usual spelling."""
        poll = self._open.get(poll_id)
        if poll is not None:
            self._open.move_to_end(poll_id)
        return poll

    async def find(self, poll_id: str) -> Poll:
        """The poll, or POLL_NOT_FOUND. `poll_id` is a UUID as the caller wrote it."""
        uuid = UUID(poll_id)
        poll = self.known(str(uuid))
        if poll is not None:
            return poll
        key = str(uuid)
        now = asyncio.get_running_loop().time()
        until, found = self._not_open.get(key, (0.0, None))
        if until <= now:
            reading = self._reading.get(key)
            if reading is None:
                reading = self._reading[key] = asyncio.create_task(self._look_up(uuid, key))
                # Whoever waits hears of a failure; it is no defect where all of them have gone.
                reading.add_done_callback(lambda task: task.cancelled() or task.exception())
            # Others may wait for it when this caller has gone.
            found = await asyncio.shield(reading)
        if found is None:
            raise poll_not_found(poll_id)
        return found

    def changed(self, poll_id: UUID) -> None:
        """A command has changed a poll: what was read before, or is being read, is not told to anybody who asks now."""
        self._not_open.pop(str(poll_id), None)
        self._reading.pop(str(poll_id), None)

    async def _look_up(self, poll_id: UUID, key: str) -> Poll | None:
        this = asyncio.current_task()
        try:
            async with asyncio.timeout(PATIENCE_SECONDS), self._connections:
                row = await patiently(lambda: self._read(poll_id), PATIENCE_SECONDS)
            poll = _poll(poll_id, row) if row else None
            if self._reading.get(key) is this:
                if poll and poll.state == OPEN:
                    self._remember(poll)
                else:
                    self._remember_not_open(key, poll)
            return poll
        finally:
            if self._reading.get(key) is this:
                del self._reading[key]

    def _remember_not_open(self, key: str, poll: Poll | None) -> None:
        self._not_open.pop(key, None)
        self._not_open[key] = (asyncio.get_running_loop().time() + NOT_OPEN_SECONDS, poll)
        while len(self._not_open) > _NOT_OPEN:
            self._not_open.popitem(last=False)

    def _remember(self, poll: Poll) -> None:
        # Many may have looked it up at once.
        self.forget(poll)
        self._open[str(poll.poll_id)] = poll
        self._options += len(poll.markings)
        while self._options > OPTIONS:
            self.forget(next(iter(self._open.values())))

    async def _read(self, poll_id: UUID) -> asyncpg.Record | None:
        async with self._pool.acquire(timeout=POOL_SECONDS) as connection:
            return await connection.fetchrow(sql.find_poll, poll_id)

    def forget(self, poll: Poll) -> None:
        """Look the poll up again next time."""
        if known := self._open.pop(str(poll.poll_id), None):
            self._options -= len(known.markings)


def _poll(poll_id: UUID, row: asyncpg.Record) -> Poll:
    spec = PollSpec.FromString(row["spec"])
    numbers = {option.option_id: number for number, option in enumerate(spec.options)}
    markings = {option_id: ballots.marking([number]) for option_id, number in numbers.items()}
    return Poll(poll_id, row["poll_no"], row["state"], spec, numbers, markings)
