"""Results as people look at them: a table, a chart that fits the screen, a line."""

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from tally.poll.v1.poll_pb2 import PollState
from tally.query.v1.query_service_pb2 import OptionCount, Results, ResultsSource

from clients.output import shown

_NAMED_IN_A_LINE = 5
_LONGEST_LABEL = 40


def state_name(state: "PollState.ValueType") -> str:
    """The state without its prefix: OPEN."""
    return PollState.Name(state).removeprefix("POLL_STATE_")


def leaders(results: Results) -> list[OptionCount]:
    """The options, most votes first; equal ones in the poll's order."""
    return sorted(results.counts, key=lambda option: -option.count)


def results_table(results: Results) -> RenderableType:
    """Every option with its count and its share of the votes."""
    table = Table(show_footer=True, caption=_provenance(results), caption_justify="left")
    table.add_column("option", footer="total")
    table.add_column("votes", footer=f"{results.total_votes:,}", justify="right")
    table.add_column("share", justify="right")
    for option in leaders(results):
        table.add_row(shown(option.label), f"{option.count:,}", _share(option, results))
    return table


def bar_chart(results: Results, rows: int) -> RenderableType:
    """The leading options as bars, in `rows` lines of text; those that do not fit are summed up in the last."""
    ranked = leaders(results)
    named = ranked if len(ranked) <= rows - 1 else ranked[: max(rows - 2, 1)]
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(max_width=_LONGEST_LABEL, no_wrap=True, overflow="ellipsis")
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    for option in named:
        label = shown(option.label.replace("\n", " "))
        bar = Bar(size=max(ranked[0].count, 1), begin=0, end=option.count, color="cyan")
        grid.add_row(label, bar, f"{option.count:,}", _share(option, results))
    lines: list[RenderableType] = [
        Text(f"{results.total_votes:,} votes · {state_name(results.state)} · version {results.version}", style="bold"),
        grid,
    ]
    if len(named) < len(ranked):
        others = sum(option.count for option in ranked[len(named) :])
        lines.append(Text(f"{len(ranked) - len(named):,} more options: {others:,}", style="dim"))
    return Group(*lines)


def change_line(results: Results) -> str:
    """The state of the count in one line, with the leading options."""
    ranked = leaders(results)
    named = [f"{shown(option.label)} {option.count:,}" for option in ranked[:_NAMED_IN_A_LINE]]
    if len(ranked) > _NAMED_IN_A_LINE:
        named.append(f"and {len(ranked) - _NAMED_IN_A_LINE:,} more")
    head = f"version {results.version} {state_name(results.state)}: {results.total_votes:,} votes"
    return " ".join(" · ".join([head, *named]).split())


def _share(option: OptionCount, results: Results) -> str:
    return f"{option.count / results.total_votes:.1%}" if results.total_votes else "-"


def _provenance(results: Results) -> str:
    source = ResultsSource.Name(results.source).removeprefix("RESULTS_SOURCE_").replace("_", " ").lower()
    as_of = results.as_of.ToJsonString() if results.HasField("as_of") else "-"
    return f"{state_name(results.state)}, version {results.version}, as of {as_of}, from the {source}"
