"""Results as people look at them: a table, a chart that fits the screen, a line; and as programs take them."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from rich.bar import Bar
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text
from tally.poll.v1.poll_pb2 import PollState, VotingMethod
from tally.query.v1.query_service_pb2 import GetTurnoutResponse, OptionCount, Poll, Results, ResultsSource

from clients.listings import Column, Listing
from clients.output import one_line, plain, shown
from clients.shares import Base, base, percent, turnout

_NAMED_IN_A_LINE = 5
_LONGEST_LABEL = 40
_LEAST_LABEL, _LEAST_BAR = 10, 8

# The fields of a row of `export`.
EXPORTED = (
    *("poll_id", "state", "version", "as_of", "total_votes", "total_weight", "eligible_voters"),
    *("option_id", "label", "count", "share", "share_of", "recounted"),
)


def state_name(state: "PollState.ValueType") -> str:
    """The state without its prefix: OPEN."""
    return PollState.Name(state).removeprefix("POLL_STATE_")


def leaders(results: Results) -> list[OptionCount]:
    """The options, most votes first; equal ones in the poll's order."""
    return sorted(results.counts, key=lambda option: -option.count)


def disagreement(results: Results) -> str:
    """What to warn of where the final recount does not agree with these counts; empty where it does, and before it."""
    recount = results.certification
    if not results.HasField("certification") or (
        recount.agreed and recount.total_votes == results.total_votes and list(recount.counts) == list(results.counts)
    ):
        return ""
    return (
        f"WARNING: the recount does not agree: it found {recount.total_votes:,} votes, the count is of"
        f" {results.total_votes:,}; the poll's counts are not to be relied on"
    )


def results_table(results: Results, method: "VotingMethod.ValueType") -> RenderableType:
    """Every option with its count, its share and, after the final recount, what that found."""
    recounted = {option.option_id: option.count for option in results.certification.counts}
    shares = base(results, method)
    columns = [Column("option", folds=True), Column("votes by weight" if shares.weighted else "votes", right=True)]
    footer = ["voters", f"{results.total_votes:,}"]
    if recounted:
        columns.append(Column("recounted", right=True))
        footer.append(f"{results.certification.total_votes:,}")
    columns.append(Column(f"share of {shares.name}", right=True))
    rows: list[list[str | Text]] = []
    for option in leaders(results):
        cells = [f"{option.count:,}"]
        if recounted:
            again = recounted.get(option.option_id, 0)
            cells.append(f"{again:,}" if again == option.count else f"≠ {again:,}")
        rows.append([shown(option.label), *cells, shares.percent(option.count)])
    listing = Listing(columns, rows, [*footer, f"{shares.whole:,}" if shares.weighted else ""])
    return Group(listing, Text(_provenance(results, shares), style="dim"), *_warnings(results))


class _BarChart:
    """The leading options as bars, in `rows` lines of the screen; those that do not fit are summed up in the last."""

    def __init__(self, results: Results, method: "VotingMethod.ValueType", rows: int, title: str = "") -> None:
        self._results = results
        self._base = base(results, method)
        self._rows = rows
        self._title = title

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, results = options.max_width, self._results
        head = f"{_votes(results, self._base)} · {state_name(results.state)} · version {results.version}"
        above = [shown(one_line(self._title), "bold")] if self._title else []
        above += [Text(head, style="" if self._title else "bold"), *_warnings(results)]
        lines = [line for text in above for line in text.wrap(console, width, overflow="fold")]
        ranked = leaders(results)
        numbers = [(f"{option.count:,}", self._base.percent(option.count)) for option in ranked]
        columns = [max(map(len, column)) for column in zip(*numbers, strict=True)] if numbers else [0, 0]
        room = width - sum(columns) - 3
        label_width = max(min(_LONGEST_LABEL, max(map(_label_width, ranked), default=0), room - _LEAST_BAR), 1)
        if label_width < _LEAST_LABEL:
            # A bar that leaves no room for what it is about helps less than the label does.
            label_width = min(max(map(_label_width, ranked), default=0), max(room, 1))
        labels = [list(_label(option).wrap(console, label_width, overflow="fold")) for option in ranked]
        longest_tail = self._tail(ranked).wrap(console, width, overflow="fold")
        named = _fitting([len(label) for label in labels], self._rows - len(lines) - len(longest_tail))
        yield from lines
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(width=label_width)
        grid.add_column(ratio=1)
        grid.add_column(justify="right", no_wrap=True)
        grid.add_column(justify="right", no_wrap=True)
        for option, label, cells in list(zip(ranked, labels, numbers, strict=True))[:named]:
            bar = Bar(size=max(ranked[0].count, 1), begin=0, end=option.count, color="cyan")
            grid.add_row(Text("\n").join(label), bar, *cells)
        yield grid
        yield self._tail(ranked[named:])

    def _tail(self, others: Sequence[OptionCount]) -> Text:
        """What the chart is followed by: the options that it has no room for, and what the shares are parts of."""
        more = f"and {len(others):,} more options: {sum(option.count for option in others):,} · " if others else ""
        return Text(f"{more}shares of {self._base.name}", style="dim")


def change_chart(
    change: Results | GetTurnoutResponse, method: "VotingMethod.ValueType", rows: int, title: str = ""
) -> RenderableType:
    """A chart of the counts in `rows` lines of the screen; of hidden counts how many voted."""
    if isinstance(change, Results):
        return _BarChart(change, method, rows, title)
    return Group(*([shown(one_line(title), "bold")] if title else []), Text(_hidden_line(change)))


def change_data(change: Results | GetTurnoutResponse, poll: Poll) -> dict[str, Any]:
    """The same as JSON data."""
    if isinstance(change, Results):
        return results_data(change, poll.method, poll.title)
    fields = {name: value for name, value in plain(change).items() if name not in ("bucket", "buckets")}
    return {"title": poll.title or None, **fields, "results_hidden": True}


def change_line(change: Results | GetTurnoutResponse) -> str:
    """The same in one line, with the leading options."""
    return _counted_line(change) if isinstance(change, Results) else _hidden_line(change)


def _hidden_line(change: GetTurnoutResponse) -> str:
    voted = turnout(change.total_votes, change.eligible_voters)
    return f"version {change.version}: {voted} · the counts are hidden until the poll is closed"


def _counted_line(results: Results) -> str:
    ranked = leaders(results)
    named = [f"{shown(option.label)} {option.count:,}" for option in ranked[:_NAMED_IN_A_LINE]]
    if len(ranked) > _NAMED_IN_A_LINE:
        named.append(f"and {len(ranked) - _NAMED_IN_A_LINE:,} more")
    shares = base(results, VotingMethod.VOTING_METHOD_UNSPECIFIED)
    head = f"version {results.version} {state_name(results.state)}: {_votes(results, shares)}"
    warning = [text] if (text := disagreement(results)) else []
    return one_line(" · ".join([head, *named, *warning]))


def results_data(results: Results, method: "VotingMethod.ValueType", title: str = "") -> dict[str, Any]:
    """The results as JSON data, with the poll's title, the share of each option and what that is a part of."""
    shares = base(results, method)
    data = {"title": title or None, **plain(results), "share_of": shares.name}
    for option in data["counts"]:
        option["share"] = shares.share(option["count"])
    return data


def export(results: Results, method: "VotingMethod.ValueType") -> Iterator[Sequence[object]]:
    """A row for each option, in the poll's order, with the fields that EXPORTED names."""
    shares = base(results, method)
    recounted = {option.option_id: option.count for option in results.certification.counts}
    poll = (
        *(results.poll_id, state_name(results.state), results.version),
        results.as_of.ToJsonString() if results.HasField("as_of") else None,
        results.total_votes,
        results.total_weight if results.HasField("total_weight") else None,
        results.eligible_voters,
    )
    for option in results.counts:
        share = shares.share(option.count)
        rounded = None if share is None else round(share, 6)
        again = recounted.get(option.option_id) if recounted else None
        yield (*poll, option.option_id, option.label, option.count, rounded, shares.name, again)


def _fitting(heights: Sequence[int], rows: int) -> int:
    """How many of the first labels have room in this number of rows; at least 1."""
    used = list(accumulate(heights))
    return max(sum(end <= rows for end in used), min(len(heights), 1))


def _label(option: OptionCount) -> Text:
    return shown(one_line(option.label))


def _label_width(option: OptionCount) -> int:
    return cell_len(_label(option).plain)


def _votes(results: Results, shares: Base) -> str:
    """How many voted, with which weight, and of how many who may."""
    weight = f", weight {shares.whole:,}" if shares.weighted else ""
    return turnout(results.total_votes, results.eligible_voters) + weight


def _warnings(results: Results) -> list[Text]:
    text = disagreement(results)
    return [Text(text, style="bold red")] if text else []


def _provenance(results: Results, shares: Base) -> str:
    source = ResultsSource.Name(results.source).removeprefix("RESULTS_SOURCE_").replace("_", " ").lower()
    as_of = results.as_of.ToJsonString() if results.HasField("as_of") else "-"
    origin = f"{state_name(results.state)}, version {results.version}, as of {as_of}, from the {source}"
    weight = f", weight {shares.whole:,}" if shares.weighted else ""
    counted = f"counted votes {results.total_votes:,}{weight}"
    if not results.eligible_voters:
        return f"{origin}\n{counted}"
    if results.total_votes > results.eligible_voters:
        return f"{origin}\n{counted}; {results.eligible_voters:,} voters on the roll"
    part = percent(results.total_votes, results.eligible_voters)
    return f"{origin}\nturnout {part} of {results.eligible_voters:,} eligible voters; {counted}"
