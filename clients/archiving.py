"""`tally poll archive` and `tally poll verify-archive`: ended polls move from the write database into files."""

import asyncio
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer

from clients.databases import FAILURES, find_store, reason, say_warnings
from clients.failures import Failure
from clients.listings import Column, Listing
from clients.moments import duration
from clients.options import DEFAULT_DATA_DIR, DataDir, OutputOption, QueryAddress
from clients.output import Output, console, print_json, say, shown
from clients.poll_ids import find_polls
from clients.progress import Progress
from command_server import archive_file
from command_server.archive import Archive, NotArchivable
from command_server.archive_file import Damaged
from runtime.replicas import connect_primary

_INTERRUPTED = 130
_SOME_FAILED = 3

_COUNTS = Column("votes", right=True), Column("events", right=True)

WriteDsn = Annotated[
    str | None,
    typer.Option(
        envvar="TALLY_WRITE_DSN", show_envvar=True, help="The write database. Default: that of the running `tally up`."
    ),
]


def archive(
    folder: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="The folder for the files; it is made if need be.")
    ],
    poll: Annotated[
        list[str] | None,
        typer.Argument(metavar="[POLL]...", help="The polls' ids, or beginnings of them.", show_default=False),
    ] = None,
    ended_before: Annotated[
        timedelta | None,
        typer.Option(parser=duration, metavar="DURATION", help="All polls that ended so long ago, for instance 90d."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the polls that would be archived.")] = False,
    write_dsn: WriteDsn = None,
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Move the votes and events of ended polls from the write database into files, one for each poll.

    Only CERTIFIED and CANCELLED polls are archived. What they came to stays readable: results, certification and the
    document are as before; who voted and the turnout over time are only in the file. Each file is counted again before
    anything is removed. Interrupted at any time, nothing is lost; run it again to go on.

    Exit code: 0 if all are archived, 3 if some could not be, 1 after an error, 2 for wrong usage, 130 if interrupted.
    """
    if bool(poll) == (ended_before is not None):
        raise typer.BadParameter("give either polls or --ended-before")
    say_warnings()
    wanted = [UUID(poll_id) for poll_id in find_polls(poll or (), query_address, data_dir)]
    work = _Archiving(find_store("TALLY_WRITE_DSN", write_dsn, data_dir), folder, dry_run)
    try:
        asyncio.run(work.run(wanted, ended_before))
    except KeyboardInterrupt:
        say("interrupted; run it again to go on")
        sys.exit(_INTERRUPTED)
    if output is Output.JSON:
        print_json({"polls": work.archived, "failed": work.failed, "dry_run": dry_run})
    else:
        columns = [Column("poll_id"), *_COUNTS, Column("file", folds=True)]
        rows = [
            (row["poll_id"], _number(row["votes"]), _number(row["events"]), shown(row["file"])) for row in work.archived
        ]
        console().print(Listing(columns, rows))
        for failure in work.failed:
            say(f"poll {failure['poll_id']} was not archived: {failure['reason']}")
    if work.failed:
        sys.exit(_SOME_FAILED)


def verify_archive(
    file: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files that `tally poll archive` wrote.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Count the votes and events in archive files again, and compare them with what was certified.

    Exit code: 0 if all of them agree, 3 if one does not.
    """
    verified: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    for path in file:
        try:
            summary = archive_file.verify(path)
        except (Damaged, OSError) as error:
            failed.append({"file": str(path), "reason": str(error)})
            continue
        verified.append(
            {
                "file": str(path),
                "poll_id": str(summary.poll_id),
                "title": summary.title,
                "state": summary.state,
                "version": summary.version,
                "events": summary.events,
                "voters": summary.voters,
                "votes": summary.recount.total_votes,
                "counts": list(summary.recount.counts),
                "sha256": summary.digest.hex(),
            }
        )
    if output is Output.JSON:
        print_json({"verified": verified, "failed": failed})
    else:
        columns = Column("file", folds=True), Column("state"), Column("votes", right=True), Column("events", right=True)
        rows = [
            (row["file"], row["state"], _number(row["votes"]), _number(row["events"]), row["title"]) for row in verified
        ]
        console().print(Listing([*columns, Column("title", folds=True)], rows))
        for failure in failed:
            say(f"{failure['file']} is not in order: {failure['reason']}")
    if failed:
        sys.exit(_SOME_FAILED)


class _Archiving:
    """One run of `tally poll archive`."""

    def __init__(self, write_dsn: str, folder: Path, dry_run: bool) -> None:
        self.archived: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []
        # Polls that were dealt with, for the progress, and rows that were written or removed.
        self.done = 0
        self._rows = 0
        self._write_dsn = write_dsn
        self._folder = folder
        self._dry_run = dry_run
        self._started = time.monotonic()

    @property
    def pace(self) -> str:
        return f"{self._rows / (time.monotonic() - self._started):,.0f} rows/s"

    async def run(self, wanted: list[UUID], age: timedelta | None) -> None:
        """Archives the polls that are named, or all that ended before `age`. Raises Failure."""
        try:
            if not self._dry_run:
                self._folder.mkdir(parents=True, exist_ok=True)
            connection = await connect_primary(
                self._write_dsn, timeout=10, server_settings={"application_name": "archive"}
            )
            try:
                archive = Archive(connection, self._folder, self._count)
                polls = wanted if age is None else await archive.ended(age)
                if self._dry_run:
                    self.archived = [self._row(poll_id) for poll_id in polls]
                    return
                with Progress(self, len(polls), unit="polls") as progress:
                    for poll_id in polls:
                        await self._archive(archive, poll_id)
                        self.done += 1
                        progress.went_on()
            finally:
                connection.terminate()
        except FAILURES as error:
            raise Failure(f"archiving was broken off; run it again to go on: {reason(error)}") from None

    async def _archive(self, archive: Archive, poll_id: UUID) -> None:
        try:
            archived = await archive.archive(poll_id)
        except (NotArchivable, Damaged) as error:
            self.failed.append({"poll_id": str(poll_id), "reason": str(error)})
            return
        summary = archived.summary
        self.archived.append(
            self._row(poll_id)
            | {
                "file": str(archived.path),
                "votes": summary.recount.total_votes if summary else None,
                "events": summary.events if summary else None,
            }
        )

    def _row(self, poll_id: UUID) -> dict[str, Any]:
        return {"poll_id": str(poll_id), "votes": None, "events": None, "file": ""}

    def _count(self, rows: int) -> None:
        self._rows += rows


def _number(count: int | None) -> str:
    return "" if count is None else f"{count:,}"
