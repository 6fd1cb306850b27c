"""`tally results` and `tally watch`: the counts of polls, once and as they grow."""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import aclosing, nullcontext
from typing import Annotated

import typer
from rich.live import Live
from tally.poll.v1.poll_pb2 import PollState
from tally.query.v1.query_service_pb2 import (
    BatchGetResultsRequest,
    BatchGetResultsResponse,
    GetResultsRequest,
    GetTurnoutResponse,
    Poll,
    Results,
)

from clients.charts import EXPORTED, change_chart, change_data, change_line, export, results_data, results_table
from clients.connection import Address, QueryServer, find_address
from clients.options import (
    DEFAULT_DATA_DIR,
    POLL_HELP,
    DataDir,
    Fresh,
    ListOutputOption,
    OutputOption,
    PollId,
    QueryAddress,
    RetryFor,
)
from clients.output import ListOutput, Output, console, one_line, plain, print_csv, print_json, say, shown
from clients.poll_ids import find_poll, find_polls
from clients.watchers import describe, watch_hidden

_SOME_MISSING = 3
_POLLS_OF_A_QUESTION = 100
# How many polls are described at once.
_AT_ONCE = 20
_CHART_INTERVAL = 0.1


def results(
    poll: Annotated[list[str], typer.Argument(metavar="POLL...", help=POLL_HELP, show_default=False)],
    at_least_as_fresh: Fresh = "",
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: ListOutputOption = ListOutput.TABLE,
) -> None:
    """Print the counts of a poll, or of several in one go.

    A share is a part of all votes, or in an approval poll of all voters who voted; with weights, of all their weight.

    Of several polls, those that do not exist or hide their results are named on stderr (with --output json among the
    data), and the exit code is 3.
    """
    address = find_address("query", query_address, data_dir)
    if len(poll) > 1 and at_least_as_fresh:
        raise typer.BadParameter("a token is for one poll", param_hint="--at-least-as-fresh")
    polls = find_polls(poll, query_address, data_dir)
    if len(polls) > 1:
        _print_batch(*asyncio.run(_batch(address, polls)), output)
        return
    request = GetResultsRequest(poll_id=polls[0], at_least_as_fresh=at_least_as_fresh)
    counted, described = asyncio.run(_results(address, request))
    if output is ListOutput.JSON:
        print_json({"results": results_data(counted, described.method, described.title)})
    else:
        _print_results([(counted, described)], output)


def watch(
    poll: PollId,
    min_interval: Annotated[
        float | None,
        typer.Option(min=0, max=60, metavar="SECONDS", help="Least time between two updates; 0.1 on a terminal."),
    ] = None,
    at_least_as_fresh: Fresh = "",
    retry_for: RetryFor = 60.0,
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show the counts of a poll as they grow, until it is closed or cancelled or you press Ctrl-C (exit code 130).

    On a terminal this is a bar chart; elsewhere one line for each change, and with --output json one JSON object on
    each line. While the poll hides its results, it shows how many have voted.
    """
    poll = find_poll(poll, query_address, data_dir)
    address = find_address("query", query_address, data_dir)
    asyncio.run(_watch(address, poll, min_interval, at_least_as_fresh, retry_for, output))


async def _results(address: Address, request: GetResultsRequest) -> tuple[Results, Poll]:
    async with QueryServer(address) as queries:
        response = await queries.call(queries.stub.GetResults, request)
        return response.results, await describe(queries, request.poll_id)


async def _batch(address: Address, poll_ids: list[str]) -> tuple[BatchGetResultsResponse, list[Poll]]:
    """The results of several polls, and what is known of each poll that has some."""
    found = BatchGetResultsResponse()
    described: list[Poll] = []
    async with QueryServer(address) as queries:
        for start in range(0, len(poll_ids), _POLLS_OF_A_QUESTION):
            request = BatchGetResultsRequest(poll_ids=poll_ids[start : start + _POLLS_OF_A_QUESTION])
            found.MergeFrom(await queries.call(queries.stub.BatchGetResults, request))
        for start in range(0, len(found.results), _AT_ONCE):
            some = found.results[start : start + _AT_ONCE]
            described += await asyncio.gather(*(describe(queries, results.poll_id) for results in some))
    return found, described


def _print_batch(found: BatchGetResultsResponse, described: Sequence[Poll], output: ListOutput) -> None:
    pairs = list(zip(found.results, described, strict=True))
    if output is ListOutput.JSON:
        results = [results_data(counted, poll.method, poll.title) for counted, poll in pairs]
        print_json({**plain(found), "results": results})
    else:
        _print_results(pairs, output)
        for poll_id in found.missing_poll_ids:
            say(f"there is no poll {poll_id}")
        for poll_id in found.hidden_poll_ids:
            say(f"poll {poll_id} shows its results only after it has been closed; see tally turnout {poll_id}")
    if found.missing_poll_ids or found.hidden_poll_ids:
        sys.exit(_SOME_MISSING)


def _print_results(polls: Sequence[tuple[Results, Poll]], output: ListOutput) -> None:
    if output is ListOutput.CSV:
        print_csv(EXPORTED, (row for counted, poll in polls for row in export(counted, poll.method)))
        return
    for counted, poll in polls:
        console().print(shown(poll.title, "bold"), shown(counted.poll_id, "dim"), sep="\n")
        console().print(results_table(counted, poll.method))


async def _watch(
    address: Address, poll_id: str, min_interval: float | None, token: str, retry_for: float, output: Output
) -> None:
    terminal = console()
    screen = Live(console=terminal, auto_refresh=False)
    as_chart = terminal.is_terminal and output is Output.TABLE
    as_lines = not terminal.is_terminal and output is Output.TABLE
    if min_interval is None and as_chart:
        min_interval = _CHART_INTERVAL
    async with QueryServer(address) as queries:
        changes = watch_hidden(
            queries, poll_id, min_interval=min_interval, at_least_as_fresh=token, retry_for=retry_for, on_lost=say
        )
        poll: Poll | None = None
        cancelled = False
        async with aclosing(changes):
            with screen if as_chart else nullcontext():
                async for seen in changes:
                    # A draft can still become another one.
                    if poll is None or poll.state == PollState.POLL_STATE_DRAFT:
                        named = poll.title if poll else ""
                        shows = seen.consistency_token if isinstance(seen, Results) else token
                        poll = await describe(queries, poll_id, shows)
                        if as_lines and poll.title != named:
                            print(f"{one_line(poll.title)} ({poll_id})", flush=True)
                    if output is Output.JSON:
                        print_json(change_data(seen, poll), one_line=True)
                    elif as_lines:
                        print(change_line(seen), flush=True)
                    else:
                        chart = change_chart(seen, poll.method, terminal.height - 2, poll.title)
                        screen.update(chart, refresh=True)
                    cancelled = isinstance(seen, GetTurnoutResponse)
        if cancelled:
            say("the poll was cancelled; its counts stay hidden")
