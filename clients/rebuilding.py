"""The rebuild of a read model, as a command."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from clients.databases import FAILURES, find_store, reason
from clients.failures import Failure
from clients.progress import Progress
from contracts.read_models import READ_MODELS
from projector import event_log
from projector.__main__ import KINDS
from projector.event_log import EventLog, Incomplete
from projector.read_model import Displaced
from projector.rebuild import Rebuild, copies

_FAILURES = (*FAILURES, RedisError, Displaced)


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
