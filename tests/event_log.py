"""An event log that tests write by hand, with the statements that the command server uses."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import asyncpg
from tally.event.v1.event_pb2 import Event, PollClosed, PollCreated, PollOpened, VotesCast
from tally.poll.v1.poll_pb2 import VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec

from runtime.postgres import queries

sql = queries("command_server")


@dataclass
class WrittenPoll:
    """A poll as it was written: what every read model must arrive at."""

    poll_id: UUID
    poll_no: int
    spec: PollSpec
    # The history of the log that it is written in.
    log_epoch: UUID
    version: int = 1
    counts: list[int] = field(default_factory=list)
    # The voters, and the version that counts each.
    voters: dict[bytes, int] = field(default_factory=dict)


class EventLog:
    """Appends events to the write database; made by `event_log`."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection

    async def poll(self, options: int = 3, *, opened: bool = True) -> WrittenPoll:
        """A new poll."""
        choices = [PollOption(option_id=f"option-{number}", label=f"Option {number}") for number in range(options)]
        spec = PollSpec(title="Which?", description="…", method=VOTING_METHOD_SINGLE_CHOICE, options=choices)
        poll_id = uuid4()
        payload = Event(poll_created=PollCreated(poll=spec)).SerializeToString()
        await self.connection.execute(sql.insert_poll, poll_id, "DRAFT", spec.SerializeToString(), None, None, payload)
        poll_no = await self.connection.fetchval("SELECT poll_no FROM polls WHERE poll_id = $1", poll_id)
        epoch = await self.connection.fetchval("SELECT log_epoch FROM current_log_epoch")
        poll = WrittenPoll(poll_id, poll_no, spec, epoch, counts=[0] * options)
        if opened:
            await self.change(poll, "OPEN", Event(poll_opened=PollOpened()))
        return poll

    async def close(self, poll: WrittenPoll) -> None:
        await self.change(poll, "CLOSED", Event(poll_closed=PollClosed()))

    async def change(self, poll: WrittenPoll, state: str, event: Event) -> None:
        columns = (state, poll.spec.SerializeToString(), None, None, event.SerializeToString())
        poll.version = await self.connection.fetchval(sql.change_poll, poll.poll_no, *columns)

    async def cast(self, poll: WrittenPoll, votes: int = 1, marks: int = 1) -> None:
        """One event with so many votes of new voters, each with so many marks."""
        keys = sorted(os.urandom(16) for _ in range(votes))
        numbers = [number for _ in range(votes) for number in random.sample(range(len(poll.counts)), marks)]
        batch_id = random.getrandbits(62)
        cast = VotesCast(batch_id=batch_id, voter_keys=b"".join(keys), option_numbers=numbers)
        if marks > 1:
            cast.choices.extend([marks] * votes)
        payload = Event(votes_cast=cast).SerializeToString()
        row = await self.connection.fetchrow(sql.log_votes, poll.poll_no, batch_id, payload)
        poll.version = row["version"]
        poll.voters.update(dict.fromkeys(keys, poll.version))
        for number, count in Counter(numbers).items():
            poll.counts[number] += count

    async def waiting(self) -> int:
        """How many events the outbox holds."""
        count: int = await self.connection.fetchval("SELECT count(*) FROM outbox")
        return count

    async def events(self, poll: WrittenPoll) -> list[Event]:
        """The poll's events, whole."""
        rows = await self.connection.fetch(
            "SELECT version, recorded_at, payload FROM events WHERE poll_no = $1 ORDER BY version", poll.poll_no
        )
        events = []
        for row in rows:
            event = Event.FromString(row["payload"])
            event.MergeFrom(Event(poll_id=str(poll.poll_id), version=row["version"], recorded_at=row["recorded_at"]))
            events.append(event)
        return events


@asynccontextmanager
async def event_log(write_dsn: str) -> AsyncIterator[EventLog]:
    """The event log of a write database."""
    connection = await asyncpg.connect(write_dsn, timeout=10, command_timeout=30)
    try:
        yield EventLog(connection)
    finally:
        await connection.close()
