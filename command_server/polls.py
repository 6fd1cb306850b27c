"""What taking votes needs to know of each poll, kept in memory."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from uuid import UUID

import asyncpg
from tally.poll.v1.poll_pb2 import ELIGIBILITY_ROLL, PollSpec

from command_server import ballots
from command_server.poll import OPEN, choose
from contracts.refusals import poll_not_found
from runtime.postgres import POOL_SECONDS, patiently, queries

sql = queries(__package__)

_CAPACITY = 10_000
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
        return self.spec.eligibility == ELIGIBILITY_ROLL

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
        self._open: OrderedDict[str, Poll] = OrderedDict()

    def known(self, poll_id: str) -> Poll | None:
        """The poll, if it is remembered: then `poll_id` is a UUID."""
        return self._open.get(poll_id)

    async def find(self, poll_id: str) -> Poll:
        """The poll, or POLL_NOT_FOUND. `poll_id` is a UUID as the caller wrote it."""
        poll = self._open.get(poll_id)
        if poll is not None:
            return poll
        row = await patiently(lambda: self._read(UUID(poll_id)), PATIENCE_SECONDS)
        if row is None:
            raise poll_not_found(poll_id)
        spec = PollSpec.FromString(row["spec"])
        numbers = {option.option_id: number for number, option in enumerate(spec.options)}
        markings = {option_id: ballots.marking([number]) for option_id, number in numbers.items()}
        poll = Poll(UUID(poll_id), row["poll_no"], row["state"], spec, numbers, markings)
        if poll.state == OPEN:
            self._open[poll_id] = poll
            if len(self._open) > _CAPACITY:
                self._open.popitem(last=False)
        return poll

    async def _read(self, poll_id: UUID) -> asyncpg.Record | None:
        async with self._pool.acquire(timeout=POOL_SECONDS) as connection:
            return await connection.fetchrow(sql.find_poll, poll_id)

    def forget(self, poll: Poll) -> None:
        """Look the poll up again next time."""
        for poll_id in [key for key, known in self._open.items() if known.poll_no == poll.poll_no]:
            del self._open[poll_id]
