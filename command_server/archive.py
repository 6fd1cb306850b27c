"""The archive of ended polls: their votes and events move from the write database into files.

First the whole poll is written into a file, counted and put on the disk. Then, in one transaction under the poll's
lock, an event `poll_archived` is appended that holds all that the poll came to. Only after that the votes, the roll and
the earlier events are removed, page by page. Killed anywhere in between, nothing is lost: before the event the poll is
as it was, and after it the next run goes on with the removal.
"""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
from google.protobuf.timestamp_pb2 import Timestamp
from tally.event.v1.event_pb2 import Event, PollArchived, Recount
from tally.poll.v1.poll_pb2 import PollSpec, PollState

from command_server import archive_file
from command_server.archive_file import SUFFIX, Summary
from command_server.ballots import key_range
from command_server.poll import CANCELLED, CERTIFIED, Change
from command_server.poll_log import append, lock
from runtime.failpoints import failpoint
from runtime.postgres import queries

sql = queries(__package__, "archive.sql")

_STATEMENT_SECONDS = 60.0
_EVENTS_OF_A_PAGE = 100
_VOTES_OF_A_PAGE = 10_000
# One page of these is one transaction, in which the poll is locked.
_REMOVED_AT_ONCE = 10_000


class NotArchivable(Exception):  # noqa: N818 - says what the poll is
    """The poll is not there, has not ended, or changed meanwhile."""


class Archived(NamedTuple):
    """A poll that is archived now."""

    poll_id: UUID
    path: Path
    # None where only an interrupted removal was finished.
    summary: Summary | None


class _History:
    """What the events of a poll tell, as far as `poll_archived` repeats it."""

    def __init__(self) -> None:
        self.told = PollArchived()

    def add(self, event: Event, recorded_at: Timestamp) -> None:
        match event.WhichOneof("change"):
            case "poll_created":
                self.told.created_at.CopyFrom(recorded_at)
            case "poll_opened":
                self.told.opened_at.CopyFrom(recorded_at)
            case "poll_closed" | "poll_cancelled":
                self.told.closed_at.CopyFrom(recorded_at)
            case "poll_certified":
                self.told.certified_at.CopyFrom(recorded_at)
            case "voters_registered":
                self.told.eligible_voters += event.voters_registered.voters


class Archive:
    """Archives polls of one write database into one folder."""

    def __init__(self, connection: "asyncpg.Connection[Any]", folder: Path, went_on: Callable[[int], None]) -> None:
        """`went_on` is called with the number of rows that were written, or removed, since it was called last."""
        self._connection = connection
        self._folder = folder
        self._went_on = went_on

    async def ended(self, age: timedelta) -> list[UUID]:
        """The polls that ended so long ago and are not archived, or not removed to the end; the oldest first."""
        rows = await self._connection.fetch(sql.ended_polls, age, timeout=_STATEMENT_SECONDS)
        return [row["poll_id"] for row in rows]

    async def archive(self, poll_id: UUID) -> Archived:
        """Archives one poll, or finishes what an earlier run began. Raises NotArchivable, and Damaged where its votes
        and events do not agree: then everything stays where it is."""
        row = await self._connection.fetchrow(sql.poll, poll_id, timeout=_STATEMENT_SECONDS)
        if row is None:
            raise NotArchivable("there is no such poll")
        path = self._folder / f"{poll_id}{SUFFIX}"
        summary = None
        if not row["snapshot_version"]:
            if row["state"] not in (CERTIFIED, CANCELLED):
                raise NotArchivable(f"it is {row['state']}; only a CERTIFIED or a CANCELLED poll can be archived")
            summary, history = await self._write(path, poll_id, row)
            failpoint("archive.written")
            await self._append(poll_id, summary, history)
            failpoint("archive.appended")
        await self._remove(poll_id, row["poll_no"])
        return Archived(poll_id, path, summary)

    async def _write(self, path: Path, poll_id: UUID, row: asyncpg.Record) -> tuple[Summary, _History]:
        poll_no, version, spec = row["poll_no"], row["version"], PollSpec.FromString(row["spec"])
        first, last = key_range(poll_no)
        history = _History()
        with archive_file.create(path, poll_id, row["state"], version, spec) as file:
            written = 0
            while page := await self._page(sql.events, poll_no, written, version, _EVENTS_OF_A_PAGE):
                for event in page:
                    file.event(event["version"], event["recorded_at"], event["batch_id"], event["payload"])
                    recorded_at = Timestamp()
                    recorded_at.FromDatetime(event["recorded_at"])
                    history.add(Event.FromString(event["payload"]), recorded_at)
                written = page[-1]["version"]
            after = first
            while page := await self._page(sql.voters, after, last, _VOTES_OF_A_PAGE):
                for voter in page:
                    file.voter(voter["ballot_key"].bytes, voter["weight"])
                after = page[-1]["ballot_key"]
            after = first
            while page := await self._page(sql.votes, after, last, _VOTES_OF_A_PAGE):
                for vote in page:
                    file.vote(vote["ballot_key"].bytes, vote["choices"], vote["weight"], vote["batch_id"])
                after = page[-1]["ballot_key"]
            summary = file.end()
        # Read back from the disk: what is removed below is nowhere else.
        if await asyncio.to_thread(archive_file.verify, path) != summary:
            raise archive_file.Damaged("the file is not what was written")
        history.told.MergeFrom(
            PollArchived(
                poll=spec,
                state=PollState.Value(f"POLL_STATE_{summary.state}"),
                recount=Recount(counts=summary.recount.counts, total_votes=summary.recount.total_votes),
                total_weight=summary.weight,
                sha256=summary.digest,
            )
        )
        return summary, history

    async def _append(self, poll_id: UUID, summary: Summary, history: _History) -> None:
        async with self._connection.transaction():
            locked = await lock(self._connection, poll_id)
            if locked.version != summary.version:
                raise NotArchivable("it changed while it was archived; run it again")
            event = Event(poll_archived=history.told, ignorable=True)
            await append(self._connection, locked, Change(locked.poll.state, event, locked.poll.spec))
            await self._connection.execute(sql.mark_archived, locked.poll_no)

    async def _remove(self, poll_id: UUID, poll_no: int) -> None:
        first, last = key_range(poll_no)
        for statement in (sql.remove_votes, sql.remove_voters):
            while removed := await self._removed(statement, first, last, _REMOVED_AT_ONCE):
                self._went_on(removed)
                failpoint("archive.removing")
        while True:
            async with self._connection.transaction():
                locked = await lock(self._connection, poll_id)
                row = await self._connection.fetchrow(sql.poll, poll_id)
                removed = await self._connection.fetchval(
                    sql.remove_events, locked.poll_no, row["snapshot_version"], _REMOVED_AT_ONCE
                )
            if not removed:
                return
            self._went_on(removed)

    async def _page(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        rows: list[asyncpg.Record] = await self._connection.fetch(statement, *arguments, timeout=_STATEMENT_SECONDS)
        self._went_on(len(rows))
        # Others in this process: the terminal's progress, and Ctrl-C.
        await asyncio.sleep(0)
        return rows

    async def _removed(self, statement: str, *arguments: object) -> int:
        status: str = await self._connection.execute(statement, *arguments, timeout=_STATEMENT_SECONDS)
        return int(status.rpartition(" ")[2])
