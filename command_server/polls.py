"""What taking votes needs to know of each poll, kept in memory."""

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
    """Looks polls up by id. Only what cannot change is remembered: an open poll's options.

    That an open poll was closed in the meantime is found by the statement that logs the votes; `forget` it then.
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        # By the usual spelling of their ids, as one poll's id has many. The one that was used last comes last.
        self._open: OrderedDict[str, Poll] = OrderedDict()
        self._options = 0

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
        row = await patiently(lambda: self._read(uuid), PATIENCE_SECONDS)
        if row is None:
            raise poll_not_found(poll_id)
        spec = PollSpec.FromString(row["spec"])
        numbers = {option.option_id: number for number, option in enumerate(spec.options)}
        markings = {option_id: ballots.marking([number]) for option_id, number in numbers.items()}
        poll = Poll(uuid, row["poll_no"], row["state"], spec, numbers, markings)
        if poll.state == OPEN:
            self._remember(poll)
        return poll

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
