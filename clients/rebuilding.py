"""`tally rebuild`: a read model made anew."""

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from redis.exceptions import RedisError

from clients.databases import FAILURES, find_store, reason, say_warnings
from clients.failures import Failure
from clients.options import DEFAULT_DATA_DIR, DataDir, OutputOption
from clients.output import Output, print_fields, print_json, say
from clients.progress import Progress
from contracts.read_models import READ_MODELS
from projector import event_log
from projector.__main__ import KINDS
from projector.event_log import EventLog, Incomplete
from projector.read_model import Displaced
from projector.rebuild import Rebuild, copies

_INTERRUPTED = 130
_SOME_PARKED = 3
_FAILURES = (*FAILURES, RedisError, Displaced)


def rebuild(
    read_model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The read model: live, views or documents.", show_default=False)
    ],
    write_dsn: Annotated[
        str | None, typer.Option(envvar="TALLY_WRITE_DSN", show_envvar=True, help="The write database.")
    ] = None,
    read_dsn: Annotated[
        str | None, typer.Option(envvar="TALLY_READ_DSN", show_envvar=True, help="The read database, as its owner.")
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option(envvar="TALLY_REDIS_URL", show_envvar=True, help="Redis, for the read model live.")
    ] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a read model anew from the event log in the write database, while it is read and kept up.

    Use it after a fix of how events are counted, or where a read model is not to be trusted. A fresh copy is made
    beside the one in use, and takes its place in one step once it has caught up; then the old one is removed. Readers
    and voters notice nothing. The stream is not needed. Stores that are not given are those of the `tally up` that runs
    in --data-dir.

    It may be interrupted at any time, and run again: then it begins anew.

    Exit code: 0 when the fresh copy is in use, 3 if polls are parked in it at an event that cannot be applied, 1 after
    an error, 2 for wrong usage, 130 if interrupted.
    """
    if read_model not in READ_MODELS:
        raise typer.BadParameter(f"there is no read model {read_model}; there are {', '.join(READ_MODELS)}")
    say_warnings()
    given = {"TALLY_WRITE_DSN": write_dsn, "TALLY_READ_DSN": read_dsn, "TALLY_REDIS_URL": redis_url}
    rebuilding = Rebuilding(read_model, given, data_dir)
    try:
        asyncio.run(rebuilding.run())
    except KeyboardInterrupt:
        say("interrupted: " + ("the fresh copy is in use" if rebuilding.switched else f"{read_model} is as it was"))
        sys.exit(_INTERRUPTED)
    outcome = rebuilding.outcome
    if output is Output.JSON:
        print_json(outcome)
    else:
        print_fields({name: _rounded(value) for name, value in outcome.items()})
    if outcome["parked_polls"]:
        say("some polls are parked at an event that cannot be applied; see tally dead-letters list")
        sys.exit(_SOME_PARKED)


class Rebuilding:
    """One run of `tally rebuild`. Raises Failure where it is not known where the stores are."""

    def __init__(self, read_model: str, given: Mapping[str, str | None], data_dir: Path) -> None:
        """`given` are addresses of stores, by setting; the others are those of the `tally up` in `data_dir`."""
        self.read_model = read_model
        self.switched = False
        self.outcome: dict[str, Any] = {}
        self._write_dsn, self._store = (
            find_store(setting, given[setting], data_dir) for setting in ("TALLY_WRITE_DSN", READ_MODELS[read_model])
        )

    async def run(self) -> None:
        """Rebuilds, with a progress bar. Raises Failure; `outcome` is what came of it, once `switched`."""
        try:
            async with event_log.connect(self._write_dsn) as log:
                await self._rebuild(log)
        except Incomplete as error:
            raise Failure(
                f"{self.read_model} was not switched: TALLY_WRITE_DSN lacks events that readers have seen: {error}"
            ) from None
        except _FAILURES as error:
            after = "was switched, but the old copy is left" if self.switched else "is as it was; run it again"
            raise Failure(f"the rebuild was broken off, {self.read_model} {after}: {reason(error)}") from None

    async def _rebuild(self, log: EventLog) -> None:
        if not await log.lead(self.read_model):
            raise Failure(f"another rebuild of {self.read_model} is under way")
        polls, events = await log.size()
        async with copies(KINDS[self.read_model], self._store) as both:
            work = Rebuild(log, both)
            with Progress(work, events, unit="events") as progress:
                await work.run(progress.went_on)
            self.switched = True
            seconds = work.seconds
            self.outcome = {
                "read_model": self.read_model,
                "polls": polls,
                "events": work.events,
                "votes": work.votes,
                "parked_polls": work.parked,
                "seconds": seconds,
                "events_per_second": work.events / seconds,
                "votes_per_second": work.votes / seconds,
                "frozen_seconds": work.frozen_seconds,
            }


def _rounded(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
