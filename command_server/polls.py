"""What taking votes needs to know of each poll, kept in memory."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple
from uuid import UUID

import asyncpg
from tally.poll.v1.poll_pb2 import PollSpec

from command_server.ballots import marking
from command_server.poll import OPEN, poll_not_found
from runtime.postgres import queries

sql = queries(__package__)

_CAPACITY = 10_000


class Poll(NamedTuple):
    """A poll as the polling station sees it."""

    poll_id: UUID
    poll_no: int
    state: str
    # option_id → its place in the poll's options.
    option_numbers: Mapping[str, int]
    # option_id → what a ballot for it ends with.
    markings: Mapping[str, bytes]


class Polls:
    """Looks polls up by id. Only what cannot change is remembered: an open poll's options.

    That an open poll was closed in the meantime is found by the statement that logs the votes; `forget` it then.
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._open: OrderedDict[str, Poll] = OrderedDict()

    async def find(self, poll_id: str) -> Poll:
        """The poll, or POLL_NOT_FOUND. `poll_id` is a UUID as the caller wrote it."""
        poll = self._open.get(poll_id)
        if poll is not None:
            return poll
        row = await self._pool.fetchrow(sql.find_poll, UUID(poll_id))
        if row is None:
            raise poll_not_found(poll_id)
        options = PollSpec.FromString(row["spec"]).options
        poll = Poll(
            UUID(poll_id),
            row["poll_no"],
            row["state"],
            {option.option_id: number for number, option in enumerate(options)},
            {option.option_id: marking(number) for number, option in enumerate(options)},
        )
        if poll.state == OPEN:
            self._open[poll_id] = poll
            if len(self._open) > _CAPACITY:
                self._open.popitem(last=False)
        return poll

    def forget(self, poll: Poll) -> None:
        """Look the poll up again next time."""
        for poll_id in [key for key, known in self._open.items() if known.poll_no == poll.poll_no]:
            del self._open[poll_id]
