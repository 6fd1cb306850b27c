"""Results as people look at them: a table, a chart that fits the screen, a line."""

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from tally.poll.v1.poll_pb2 import PollState, VotingMethod
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
    """Every option with its count, its share of the votes and, after the final recount, what that found."""
    recounted = {option.option_id: option.count for option in results.certification.counts}
    table = Table(show_footer=True)
    table.add_column("option", footer="voters")
    table.add_column("votes", footer=f"{results.total_votes:,}", justify="right")
    if recounted:
        table.add_column("recounted", footer=f"{results.certification.total_votes:,}", justify="right")
    table.add_column("share", justify="right")
    for option in leaders(results):
        cells = [f"{option.count:,}"]
        if recounted:
            again = recounted.get(option.option_id, 0)
            cells.append(f"{again:,}" if again == option.count else f"≠ {again:,}")
        table.add_row(shown(option.label), *cells, _share(option, results, method))
    return Group(table, Text(_provenance(results), style="dim"), *_warnings(results))


def bar_chart(results: Results, method: "VotingMethod.ValueType", rows: int) -> RenderableType:
    """The leading options as bars, in `rows` lines of text; those that do not fit are summed up in the last."""
    warnings = _warnings(results)
    rows -= len(warnings)
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
        grid.add_row(label, bar, f"{option.count:,}", _share(option, results, method))
    lines: list[RenderableType] = [
        Text(f"{_votes(results)} · {state_name(results.state)} · version {results.version}", style="bold"),
        *warnings,
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
    head = f"version {results.version} {state_name(results.state)}: {_votes(results)}"
    warning = [text] if (text := disagreement(results)) else []
    return " ".join(" · ".join([head, *named, *warning]).split())


def _votes(results: Results) -> str:
    """How many voted, and of how many who might."""
    turnout = f" of {results.eligible_voters:,} voters ({_turnout(results)})" if results.eligible_voters else ""
    return f"{results.total_votes:,} votes{turnout}"


def _turnout(results: Results) -> str:
    return f"{results.total_votes / results.eligible_voters:.1%}"


def _share(option: OptionCount, results: Results, method: "VotingMethod.ValueType") -> str:
    """The option's part of all votes; where voters mark several options the parts are more than one whole."""
    whole = results.total_votes
    if method == VotingMethod.VOTING_METHOD_SINGLE_CHOICE:
        # The same, unless votes have weights.
        whole = sum(option.count for option in results.counts)
    return f"{option.count / whole:.1%}" if whole else "-"


def _warnings(results: Results) -> list[Text]:
    text = disagreement(results)
    return [Text(text, style="bold red")] if text else []


def _provenance(results: Results) -> str:
    source = ResultsSource.Name(results.source).removeprefix("RESULTS_SOURCE_").replace("_", " ").lower()
    as_of = results.as_of.ToJsonString() if results.HasField("as_of") else "-"
    origin = f"{state_name(results.state)}, version {results.version}, as of {as_of}, from the {source}"
    if not results.eligible_voters:
        return origin
    return f"{origin}\nturnout {_turnout(results)} of {results.eligible_voters:,} eligible voters"
