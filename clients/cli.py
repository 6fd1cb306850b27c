"""The command line `tally`."""

import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import aclosing, nullcontext
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from tally.command.v1.command_service_pb2 import CastVoteRequest
from tally.poll.v1.poll_pb2 import PollState
from tally.query.v1.query_service_pb2 import (
    BatchGetResultsRequest,
    BatchGetResultsResponse,
    GetResultsRequest,
    GetTurnoutResponse,
    Poll,
    Results,
)

from clients import dead_letters, polls
from clients.charts import (
    EXPORTED,
    change_chart,
    change_data,
    change_line,
    export,
    results_data,
    results_table,
)
from clients.connection import Address, QueryServer, command, find_address
from clients.failures import Failure
from clients.file_commands import import_file, register
from clients.history import turnout, votes
from clients.idempotency import idempotency_key
from clients.options import (
    DEFAULT_DATA_DIR,
    POLL_HELP,
    CommandAddress,
    DataDir,
    Fresh,
    ListOutputOption,
    OutputOption,
    PollId,
    QueryAddress,
    RetryFor,
)
from clients.output import (
    ListOutput,
    Output,
    console,
    one_line,
    plain,
    print_csv,
    print_fields,
    print_json,
    say,
    say_warnings,
    shown,
)
from clients.poll_ids import find_poll, find_polls
from clients.status import status
from clients.watchers import describe, watch_hidden
from contracts.read_models import READ_MODELS

_INTERRUPTED = 130
_WRONG_USAGE = 2
_SOME_MISSING = 3
_POLLS_OF_A_QUESTION = 100
# How many polls are described at once.
_AT_ONCE = 20
_SOME_PARKED = 3
_CHART_INTERVAL = 0.1

app = typer.Typer(
    name="tally",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Tally: durable votes, exact counts, live results.",
)
app.add_typer(polls.app, name="poll")
app.add_typer(dead_letters.app, name="dead-letters")
app.command()(status)
app.command()(turnout)
app.command()(votes)
app.command("import")(import_file)
app.command()(register)


def main() -> None:
    """The console script: what goes wrong is one line on stderr, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # A label that the terminal's encoding does not have must not end a count.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    say_warnings()
    if unreadable := _unreadable():
        say(f"{unreadable} is not valid UTF-8")
        sys.exit(_WRONG_USAGE)
    try:
        app()
    except Failure as failure:
        say(str(failure))
        sys.exit(failure.code)


def _unreadable() -> str:
    """Which argument or variable is not UTF-8; empty where all are, or are names of files, which may have any bytes."""
    given = {f"argument {number}": text for number, text in enumerate(sys.argv[1:], 1)}
    given |= {name: text for name, text in os.environ.items() if name.startswith("TALLY_")}
    for name, text in given.items():
        # Python puts a lone surrogate in the place of such a byte.
        if any("\ud800" <= c <= "\udfff" for c in text) and not os.path.lexists(text):
            return name
    return ""


def _version(asked: bool) -> None:
    if asked:
        print(f"tally {installed_version('tally-voting')}")
        raise typer.Exit


@app.callback()
def tally(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version of Tally and exit.")
    ] = False,
) -> None:
    """Tally: durable votes, exact counts, live results."""


@app.command()
def up(
    data_dir: Annotated[Path, typer.Option(help="Where data, logs and run.json are kept.")] = DEFAULT_DATA_DIR,
    command_port: Annotated[int, typer.Option(min=0, max=65535, help="CommandService; 0: any free port.")] = 50051,
    query_port: Annotated[int, typer.Option(min=0, max=65535, help="QueryService; 0: any free port.")] = 50052,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the logs of all processes.")] = False,
) -> None:
    """Start everything on this machine: Postgres, NATS, Redis and Tally's services, until Ctrl-C.

    A store whose TALLY_WRITE_DSN, TALLY_READ_DSN, TALLY_NATS_URL or TALLY_REDIS_URL is set is not started: that one is
    used instead.
    """
    # Here, for the other commands need no Postgres driver, and would start a third later.
    from clients.up import run  # noqa: PLC0415

    run(data_dir, command_port, query_port, verbose)


@app.command()
def vote(
    poll: PollId,
    voter: Annotated[str, typer.Argument(metavar="VOTER", help="Who votes, in your own terms; 1 to 256 characters.")],
    options: Annotated[
        list[str], typer.Argument(metavar="OPTION...", help="The option's id; several in an approval poll.")
    ],
    command_address: CommandAddress = None,
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Cast one vote. To repeat the same vote is harmless, and prints the first receipt again.

    Only a repeat by the same user on this machine, or with the same TALLY_IDEMPOTENCY_KEY, is told so; to any other
    caller a second vote is ALREADY_VOTED, whatever it chooses.
    """
    poll = find_poll(poll, query_address, data_dir)
    request = CastVoteRequest(poll_id=poll, voter_id=voter, option_ids=options, idempotency_key=idempotency_key())
    address = find_address("command", command_address, data_dir)
    response = asyncio.run(command(address, lambda commands: commands.CastVote, request))
    if output is Output.JSON:
        print_json(plain(response))
        return
    receipt = response.receipt
    print_fields(
        {
            "receipt_id": receipt.receipt_id,
            "recorded_at": receipt.recorded_at.ToJsonString(),
            "version": str(receipt.version),
            "already_recorded": "yes" if response.already_recorded else "no",
        }
    )


@app.command()
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


@app.command()
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


@app.command()
def migrate(
    write_dsn: Annotated[
        str | None, typer.Option(envvar="TALLY_WRITE_DSN", show_envvar=True, help="The write database, as its owner.")
    ] = None,
    read_dsn: Annotated[
        str | None, typer.Option(envvar="TALLY_READ_DSN", show_envvar=True, help="The read database, as its owner.")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Bring the schemas of your own databases up to date. Safe to repeat; `tally up` does it by itself."""
    from clients import databases  # noqa: PLC0415 - as above

    dsns = {"write": write_dsn, "read": read_dsn}
    if not any(dsns.values()):
        raise typer.BadParameter("give --write-dsn, --read-dsn or both")
    applied = {name: asyncio.run(databases.migrate(name, dsn)) for name, dsn in dsns.items() if dsn}
    if output is Output.JSON:
        print_json({"applied": applied})
    else:
        print_fields({name: ", ".join(files) or "is up to date" for name, files in applied.items()})


@app.command()
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

    Exit code: 0 when the fresh copy is in use, 3 if polls stand still in it at an event that cannot be applied, 1 after
    an error, 2 for wrong usage, 130 if interrupted.
    """
    if read_model not in READ_MODELS:
        raise typer.BadParameter(f"there is no read model {read_model}; there are {', '.join(READ_MODELS)}")
    from clients.rebuilding import Rebuilding  # noqa: PLC0415 - as above

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
        say("some polls stand still at an event that cannot be applied; see tally dead-letters list")
        sys.exit(_SOME_PARKED)


def _rounded(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


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


if __name__ == "__main__":
    main()
