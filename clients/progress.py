"""How long work goes, on stderr: a bar and a live chart on a terminal, now and then a line anywhere else."""

import time
from typing import Protocol, Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from tally.poll.v1.poll_pb2 import VotingMethod
from tally.query.v1.query_service_pb2 import Results

from clients.charts import change_chart, change_line
from clients.output import console, say, shown

_LINE_EVERY = 1.0
_CHART_ROWS = 14


class Work(Protocol):
    """What can be watched while it goes on: how many rows are done, and at which pace (`1,000 votes/s`)."""

    @property
    def done(self) -> int: ...

    @property
    def pace(self) -> str: ...


class Progress:
    """Shows work while it goes on, up to `total` rows or more: `with Progress(work, total) as progress: …`."""

    def __init__(
        self,
        work: Work,
        total: int,
        method: "VotingMethod.ValueType" = VotingMethod.VOTING_METHOD_UNSPECIFIED,
        unit: str = "rows",
    ) -> None:
        self._work = work
        self._total = total
        self._unit = unit
        self._method = method
        self._console = console(stderr=True)
        self._results: Results | None = None
        self._trouble = ""
        self._last_line = time.monotonic()
        self._last_chart = 0.0
        self._live = Live(console=self._console, get_renderable=self._screen, refresh_per_second=10, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Says something that stays."""
        if self._console.is_terminal:
            self._console.print(shown(text))
        else:
            say(shown(text).plain)

    def lost(self, trouble: str) -> None:
        """The connection is away; shown until the import goes on."""
        if trouble != self._trouble and not self._console.is_terminal:
            self.say(trouble)
        self._trouble = trouble

    def went_on(self) -> None:
        """More is done."""
        self._trouble = ""
        if not self._console.is_terminal and time.monotonic() - self._last_line >= _LINE_EVERY:
            self._last_line = time.monotonic()
            self.say(self._line())

    def counted(self, results: Results) -> None:
        """The read side has newer results."""
        self._results = results
        if not self._console.is_terminal and time.monotonic() - self._last_chart >= _LINE_EVERY:
            self._last_chart = time.monotonic()
            self.say(change_line(results))

    def _line(self) -> str:
        done = self._work.done
        total = max(self._total, done)
        share = done / total if total else 1.0
        return f"{done:,} of {total:,} {self._unit} ({share:.0%}), {self._work.pace}"

    def _screen(self) -> RenderableType:
        line = Table.grid(padding=(0, 2))
        line.add_row(ProgressBar(max(self._total, 1), self._work.done, width=30), self._line())
        parts: list[RenderableType] = [line]
        if self._trouble:
            parts.append(Text(self._trouble, style="yellow"))
        if self._results:
            parts.append(change_chart(self._results, self._method, min(_CHART_ROWS, self._console.height - 4)))
        return Group(*parts)
