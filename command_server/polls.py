"""What taking votes needs to know of each poll, kept in memory."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from functools import cache
from sys import getsizeof
from typing import NamedTuple
from uuid import UUID

import asyncpg
from tally.poll.v1.error_reason_pb2 import ErrorReason
from tally.poll.v1.poll_pb2 import PollOption, PollSpec

from command_server import ballots
from command_server.poll import OPEN, choose, has_roll
from contracts.refusals import Refusal, poll_not_found
from runtime.postgres import POOL_SECONDS, patiently, queries
from runtime.wire import Pauses

sql = queries(__package__)

# The most bytes of all open polls that are remembered, as `Poll.size` says.
BYTES = 64 << 20
# What a poll takes in memory beside its option ids: its fields, its rules, the tables' own part and its place here.
_POLL_BYTES = 1_600
# What an option takes in the two tables of its poll, and in the rules.
_OPTION_BYTES = 110
# Where there is no room, a poll that comes new is the next to go unless it is asked for again soon. One in this many
# comes to stay: polls that are used take the place of those that are not any more.
_COMES_TO_STAY = 16
PATIENCE_SECONDS = 5.0
# How long a poll that is not open, or does not exist, is not read again, and how many of these are remembered.
NOT_OPEN_SECONDS = 0.5
_NOT_OPEN = 1_000
# The most polls of one read, and the bytes of their specs after which it leaves the others to the next one.
READ_POLLS = 500
READ_BYTES = 1 << 18
# The least seconds between the beginnings of two reads: the later one reads what was asked for meanwhile.
READ_PAUSE_SECONDS = 0.01
# One attempt to read, in seconds.
_ATTEMPT_SECONDS = 2.0
# The most calls that wait for polls to be read.
WAITING = 10_000


class Poll(NamedTuple):
    """A poll as the polling station sees it."""

    poll_id: UUID
    poll_no: int
    state: str
    # Its rules: what it was made of, without its texts. Its options are empty, as many as there are.
    spec: PollSpec
    # option_id → its place in the poll's options.
    option_numbers: Mapping[str, int]
    # option_id → what a ballot for it alone ends with.
    markings: dict[str, bytes]

    @property
    def size(self) -> int:
        """The bytes that it takes in memory, nearly."""
        return _POLL_BYTES + len(self.markings) * _OPTION_BYTES + sum(map(getsizeof, self.markings))

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
    does not exist, for a moment: a crowd that comes too early or too late is one read. Polls that are asked for while
    others are read are read together.

    That an open poll was closed in the meantime is found by the statement that logs the votes; `forget` it then. What
    changed a poll at this server says so by `changed`.
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        # By the usual spelling of their ids, as one poll's id has many. The first is the next to go.
        self._open: OrderedDict[str, Poll] = OrderedDict()
        self._bytes = 0
        self._newcomers = 0
        # Polls that are not open, None for those that do not exist, and when each is to be read again; oldest first.
        self._not_open: OrderedDict[str, tuple[float, Poll | None]] = OrderedDict()
        # The answers to come for those who ask now, and the polls of which no read has begun, with theirs.
        self._answers: dict[str, asyncio.Future[Poll | None]] = {}
        self._unread: deque[_Asked] = deque()
        self._reading: asyncio.Task[None] | None = None
        self._waiting = 0

    def known(self, poll_id: str) -> Poll | None:
        """The poll, if it is remembered: then `poll_id` is a UUID, in its usual spelling."""
        poll = self._open.get(poll_id)
        if poll is not None:
            self._open.move_to_end(poll_id)
        return poll

    async def find(self, poll_id: str) -> Poll:
        """The poll, or POLL_NOT_FOUND; OVERLOADED where too many calls wait for polls. `poll_id` is a UUID in any
        spelling."""
        uuid = UUID(poll_id)
        key = str(uuid)
        poll = self.known(key)
        if poll is not None:
            return poll
        until, found = self._not_open.get(key, (0.0, None))
        if until <= asyncio.get_running_loop().time():
            if self._waiting >= WAITING:
                raise Refusal(
                    ErrorReason.ERROR_REASON_OVERLOADED, "too many calls wait for polls to be read; try again"
                )
            self._waiting += 1
            try:
                # Others may wait for it when this caller has gone.
                found = await asyncio.shield(self._answers.get(key) or self._ask(uuid, key))
            finally:
                self._waiting -= 1
        if found is None:
            raise poll_not_found(poll_id)
        return found

    def changed(self, poll_id: UUID) -> None:
        """A command has changed a poll: what was read before, or is being read, is not told to anybody who asks now."""
        self._not_open.pop(str(poll_id), None)
        self._answers.pop(str(poll_id), None)

    def _ask(self, poll_id: UUID, key: str) -> asyncio.Future[Poll | None]:
        """Lets a poll be read; the answer to come."""
        answer: asyncio.Future[Poll | None] = asyncio.get_running_loop().create_future()
        # The callers hear of a failure; it is no defect where all of them have gone.
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._answers[key] = answer
        self._unread.append(_Asked(poll_id, key, answer))
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_all())
        return answer

    async def _read_all(self) -> None:
        """Reads until there is nothing left to read."""
        try:
            while self._unread:
                asked = [self._unread.popleft() for _ in range(min(len(self._unread), READ_POLLS))]
                try:
                    await self._read_some(asked)
                except Exception as error:  # noqa: BLE001 - the callers are told
                    for each in asked:
                        self._end(each, error)
                await asyncio.sleep(READ_PAUSE_SECONDS)
        finally:
            self._reading = None

    async def _read_some(self, asked: "list[_Asked]") -> None:
        rows = await patiently(lambda: self._read([each.poll_id for each in asked]), PATIENCE_SECONDS)
        found = {row["poll_id"]: row for row in rows}
        pauses = Pauses()
        for each in asked:
            row = found.get(each.poll_id)
            if row and row["spec"] is None:
                self._unread.appendleft(each)
                continue
            self._end(each, _poll(each.poll_id, row) if row else None)
            await pauses.pause()

    def _end(self, asked: "_Asked", outcome: Poll | Exception | None) -> None:
        """Tells those who asked for a poll; if it has not changed meanwhile, it is remembered."""
        if self._answers.get(asked.key) is asked.answer:
            del self._answers[asked.key]
            if isinstance(outcome, Poll) and outcome.state == OPEN:
                self._remember(outcome)
            elif not isinstance(outcome, Exception):
                self._remember_not_open(asked.key, outcome)
        if asked.answer.done():
            return
        if isinstance(outcome, Exception):
            asked.answer.set_exception(outcome)
        else:
            asked.answer.set_result(outcome)

    def _remember_not_open(self, key: str, poll: Poll | None) -> None:
        self._not_open.pop(key, None)
        self._not_open[key] = (asyncio.get_running_loop().time() + NOT_OPEN_SECONDS, poll)
        while len(self._not_open) > _NOT_OPEN:
            self._not_open.popitem(last=False)

    def _remember(self, poll: Poll) -> None:
        # Many may have looked it up at once.
        self.forget(poll)
        self._bytes += poll.size
        full = self._bytes > BYTES
        while self._open and self._bytes > BYTES:
            self.forget(next(iter(self._open.values())))
        key = str(poll.poll_id)
        self._open[key] = poll
        if full:
            # If the newest were the last to go, then of polls that vote in turn, and are a few too many, each would go
            # just before its next vote.
            self._newcomers += 1
            if self._newcomers % _COMES_TO_STAY:
                self._open.move_to_end(key, last=False)

    async def _read(self, poll_ids: list[UUID]) -> list[asyncpg.Record]:
        async with asyncio.timeout(_ATTEMPT_SECONDS), self._pool.acquire(timeout=POOL_SECONDS) as connection:
            return list(await connection.fetch(sql.find_polls, poll_ids, READ_BYTES))

    def forget(self, poll: Poll) -> None:
        """Look the poll up again next time."""
        if known := self._open.pop(str(poll.poll_id), None):
            self._bytes -= known.size


class _Asked(NamedTuple):
    """A poll that is to be read, and the answer to come."""

    poll_id: UUID
    key: str
    answer: asyncio.Future[Poll | None]


def _poll(poll_id: UUID, row: asyncpg.Record) -> Poll:
    spec = PollSpec.FromString(row["spec"])
    numbers = {option.option_id: number for number, option in enumerate(spec.options)}
    markings = {option_id: _marking(number) for option_id, number in numbers.items()}
    return Poll(poll_id, row["poll_no"], row["state"], _rules(spec), numbers, markings)


def _rules(spec: PollSpec) -> PollSpec:
    options = len(spec.options)
    for text in ("title", "description", "options"):
        spec.ClearField(text)
    # A copy, because what was cleared stays in the memory of a message.
    rules = PollSpec()
    rules.CopyFrom(spec)
    rules.options.extend([PollOption()] * options)
    return rules


@cache
def _marking(number: int) -> bytes:
    """The same bytes for the options of all polls that have this number; a poll has 1,000 at most."""
    return ballots.marking([number])
