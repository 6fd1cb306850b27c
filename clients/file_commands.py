"""`tally import` and `tally register`: ballots and voters from files."""

import asyncio
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from tally.command.v1.command_service_pb2 import RegisterVotersResponse
from tally.poll.v1.poll_pb2 import VotingMethod

from clients.ballots import BallotFile
from clients.charts import results_table
from clients.connection import Address, CommandServer, QueryServer, find_address
from clients.failures import Failure
from clients.files import ChangedFile, file_name
from clients.findings import Findings
from clients.importing import Import, Outcome, PollTakesNoVotes
from clients.options import (
    DEFAULT_DATA_DIR,
    CommandAddress,
    DataDir,
    OutputOption,
    PollId,
    QueryAddress,
    RetryFor,
    read_by,
)
from clients.output import Output, console, plain, print_fields, print_json, say, shown
from clients.poll_ids import find_poll
from clients.progress import Progress
from clients.registering import Registration
from clients.sheets import DELIMITERS
from clients.voters import RollFile
from contracts.text import clean_label

_INTERRUPTED = 130
_SOME_REJECTED = 3
_OTHER_WEIGHTS = 3


def _delimiter(text: str) -> str:
    delimiter = DELIMITERS.get(text, "\t" if text == "\\t" else text)
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise ValueError(f"{text!r} is not {', '.join(DELIMITERS)} or another single character")
    return delimiter


FoldCase = Annotated[
    bool,
    typer.Option(
        "--fold-case",
        help="Read voter ids in lower case, such as e-mail addresses; votes then have to be cast in lower case too.",
    ),
]
NoHeader = Annotated[
    bool, typer.Option("--no-header", help="The first row is data like the others; columns are named #1, #2, …")
]
Encoding = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Default: UTF-8 or UTF-16 if the file is that, or else Windows-1252."),
]
Delimiter = Annotated[
    str | None,
    typer.Option(
        parser=read_by(_delimiter),
        metavar="CHARACTER",
        help="What is between cells: comma, semicolon, tab, pipe or a character. Default: what fits the columns.",
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Accept what looks suspicious; what is contradictory stays refused.")]


def import_file(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Ballots, one a row: CSV (also as .gz, .xz or .zip) or .xlsx; -: standard input."
        ),
    ],
    choice_column: Annotated[
        list[str],
        typer.Option(
            help="The column with the choice, its name or #3 for the third; blank ones are skipped. Repeatable, for"
            " approval: each marks one choice."
        ),
    ],
    title: Annotated[str | None, typer.Option(help="The title of the poll to create.")] = None,
    voter_column: Annotated[
        str | None,
        typer.Option(help="The column that names the voter. Default: the file's content and the line do."),
    ] = None,
    ignore_choice: Annotated[
        list[str] | None, typer.Option(metavar="CHOICE", help="A choice that is no vote, such as overvote. Repeatable.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CHOICE",
            help="An option of the poll even if no row has it; these come first, in order. Repeatable.",
        ),
    ] = None,
    choice_separator: Annotated[
        str, typer.Option(metavar="TEXT", help="Take a cell with several choices apart; implies --approval.")
    ] = "",
    merge_similar: Annotated[
        bool, typer.Option("--merge-similar", help="Count choices that look the same as one: as the first of them.")
    ] = False,
    fold_case: FoldCase = False,
    no_header: NoHeader = False,
    encoding: Encoding = None,
    delimiter: Delimiter = None,
    yes: Yes = False,
    approval: Annotated[
        bool,
        typer.Option("--approval", help="Create an approval poll; implied where there are several choice columns."),
    ] = False,
    results_after_close: Annotated[
        bool, typer.Option("--results-after-close", help="Create a poll whose counts are hidden until it is closed.")
    ] = False,
    poll: Annotated[
        str | None,
        typer.Option(metavar="POLL", help="Cast into this poll instead of creating one.", show_default=False),
    ] = None,
    new_poll: Annotated[
        bool, typer.Option("--new-poll", help="Create another poll even where the file was imported before.")
    ] = False,
    content: Annotated[
        str | None,
        typer.Option(metavar="DIGEST", help="Refuse a file with another content; a command to go on with has it."),
    ] = None,
    close: Annotated[bool, typer.Option("--close/--keep-open", help="Close the poll after the last row.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show the counts as they grow, on stderr.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, max=20_000, help="Votes in a batch.")] = 2_000,
    in_flight: Annotated[int, typer.Option(min=1, max=100, help="Batches that wait for their answer at a time.")] = 8,
    retry_for: RetryFor = 60.0,
    command_address: CommandAddress = None,
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Create a poll from a file of ballots, with the distinct choices as options, and cast every row.

    The whole file is checked before anything is created, and what was understood is printed on stderr: encoding,
    delimiter, columns, options with counts, and everything that was read otherwise than it is written. Choices and
    voter ids are read in Unicode normal form C, without white space at their ends. Where something is suspicious,
    nothing is created unless an option says what is meant, or --yes that it is right.

    To run the same import again, after whatever happened, goes on with the same poll and counts no ballot twice.
    Rejected rows are reported by line (the header is line 1) and reason. Options are in the order in which the file
    names them.

    Exit code: 0 if every row is recorded or skipped, 3 if some rows were rejected, 1 after an error or if the file is
    suspicious, 2 for wrong usage, 130 if interrupted: a first Ctrl-C waits for the answers to what was sent.
    """
    if (title is None) == (poll is None) or (poll and new_poll):
        raise typer.BadParameter("give either --title, for a new poll, or --poll, to go on with one")
    if poll and results_after_close:
        raise typer.BadParameter("--results-after-close is for a new poll; the one that is there stays as it is")
    poll = poll and find_poll(poll, query_address, data_dir)
    if not all(map(clean_label, option or ())):
        raise typer.BadParameter("an option needs a text that is seen", param_hint="--option")
    addresses = find_address("command", command_address, data_dir), find_address("query", query_address, data_dir)
    ballots = BallotFile(
        file,
        tuple(dict.fromkeys(choice_column)),
        voter_column,
        frozenset(ignore_choice or ()),
        tuple(option or ()),
        choice_separator,
        merge_similar,
        fold_case,
        not no_header,
        encoding,
        delimiter,
    )
    survey = ballots.survey()
    if content not in (None, survey.digest):
        raise Failure(
            f"{file_name(file)}: the file has changed since that import; to go on would count its ballots anew"
        )
    _say_understood(ballots.understood(survey, with_counts=not results_after_close))
    _stop_at(survey.findings, yes, f"{file_name(file)}: nothing is imported")
    if poll is None and len(survey.choices) < 2:
        raise Failure(
            f"{file_name(file)}: {ballots.columns_named} {len(survey.choices)} choices; a poll needs two or more"
            " (--option names one that no row has)"
        )
    method = VotingMethod.VOTING_METHOD_SINGLE_CHOICE
    if approval or choice_separator or len(ballots.choice_columns) > 1:
        method = VotingMethod.VOTING_METHOD_APPROVAL
    plan = Import(
        ballots,
        survey,
        method,
        title or "",
        poll,
        new_poll,
        batch_size,
        in_flight,
        close,
        watch,
        retry_for,
        results_after_close,
    )
    outcome = Outcome()
    asyncio.run(_import(plan, *addresses, outcome))
    _report(plan, outcome, output)
    if outcome.interrupted or outcome.failure:
        if outcome.closed:
            say(f"every row was answered and the poll is closed; see tally results {outcome.poll_id}")
        elif outcome.poll_id and isinstance(outcome.failure, ChangedFile):
            say(f"what was cast counts in poll {outcome.poll_id}; to start over: tally poll cancel {outcome.poll_id}")
        elif outcome.poll_id and not isinstance(outcome.failure, PollTakesNoVotes):
            options = {"--command-address": command_address, "--query-address": query_address}
            say("to go on: " + shlex.join(_continuation(plan, outcome, options, data_dir, yes)))
        sys.exit(_INTERRUPTED if outcome.interrupted else 1)
    if outcome.rejected:
        sys.exit(_SOME_REJECTED)


def register(
    poll: PollId,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Voters, one a row: CSV (also as .gz, .xz or .zip) or .xlsx; -: standard input."
        ),
    ],
    voter_column: Annotated[
        str | None,
        typer.Option(
            help="The column that names the voter, or #2 for the second. Default: the file is a plain list, without a"
            " header."
        ),
    ] = None,
    weight_column: Annotated[
        str | None,
        typer.Option(help="The column with how much the vote counts, 1 to 1,000,000. Default: 1."),
    ] = None,
    fold_case: FoldCase = False,
    no_header: NoHeader = False,
    encoding: Encoding = None,
    delimiter: Delimiter = None,
    yes: Yes = False,
    retry_for: RetryFor = 60.0,
    command_address: CommandAddress = None,
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Put voters on the electoral roll of a poll that has one (--roll), while it is a draft or open.

    The whole file is checked before anybody is registered, and what was understood is printed on stderr: how many
    people these are, and every id that was read otherwise than it is written. Voter ids are read in Unicode normal form
    C, without invisible characters, and without white space at their ends. Where a row is wrong, or a voter has two
    weights, no voter is registered; where something is suspicious, such as ids that differ only in letter case, --yes
    is needed.

    To register the same voters again, after whatever happened, is safe: they stay on the roll, with their first weight.

    Exit code: 0 if everybody is on the roll, 3 if voters are on it with another weight than the file gives them, 1
    after an error or if the file is suspicious, 2 for wrong usage, 130 if interrupted.
    """
    if weight_column and not voter_column:
        raise typer.BadParameter("--weight-column needs --voter-column")
    poll = find_poll(poll, query_address, data_dir)
    address = find_address("command", command_address, data_dir)
    roll = RollFile(file, voter_column, weight_column, fold_case, not no_header, encoding, delimiter)
    survey = roll.survey()
    _say_understood(roll.understood(survey))
    if survey.faulty:
        _say_understood(survey.faults)
        if survey.faulty > len(survey.faults):
            say(f"and {survey.faulty - len(survey.faults):,} more")
        raise Failure(f"{file_name(file)}: {survey.faulty:,} of {survey.rows:,} rows are wrong; no voter is registered")
    _stop_at(survey.findings, yes, f"{file_name(file)}: no voter is registered")
    registration = Registration(roll, survey, poll, retry_for)
    response = asyncio.run(_register(registration, address))
    if output is Output.JSON:
        counts = {
            "rows": survey.rows,
            "people": survey.people,
            "seconds": registration.seconds,
            "attempts": registration.attempts,
        }
        print_json({"poll_id": poll, **plain(response), **counts})
    else:
        registered = {"registered": response.registered, "already_registered": response.already_registered}
        if response.other_weights:
            registered["other_weights"] = response.other_weights
        print_fields({"poll_id": poll, **{name: f"{count:,}" for name, count in registered.items()}})
    if registration.attempts > 1:
        say("the connection was lost: those registered before that count as already registered")
    if response.other_weights:
        say(f"{response.other_weights:,} voters stay on the roll with another weight than the file gives them")
        sys.exit(_OTHER_WEIGHTS)


def _say_understood(lines: list[str]) -> None:
    for line in lines:
        say(shown(line).plain)


def _stop_at(findings: Findings, yes: bool, outcome: str) -> None:
    """Raises Failure where the findings say so."""
    if findings.stop(yes=True):
        raise Failure(f"{outcome}: the file is contradictory")
    if findings.stop(yes):
        raise Failure(f"{outcome}: the file is suspicious; --yes says that it is right as it is")


async def _import(plan: Import, command_address: Address, query_address: Address, outcome: Outcome) -> None:
    with Progress(outcome, plan.survey.votes + plan.survey.faulty, plan.method) as progress:
        async with CommandServer(command_address) as commands, QueryServer(query_address) as queries:
            await plan.run(commands, queries, outcome, progress)


async def _register(registration: Registration, address: Address) -> RegisterVotersResponse:
    with Progress(registration, registration.survey.people) as progress:
        async with CommandServer(address) as commands:
            return await registration.run(commands, progress)


def _report(plan: Import, outcome: Outcome, output: Output) -> None:
    survey = plan.survey
    total = survey.votes + survey.faulty
    if output is Output.JSON and outcome.poll_id:
        print_json(
            {
                "poll_id": outcome.poll_id,
                "rows": total + survey.blank + survey.ignored,
                "accepted": outcome.accepted,
                "already_recorded": outcome.already_recorded,
                "rejected": outcome.rejected,
                "blank": survey.blank,
                "ignored": survey.ignored,
                "people": survey.people if plan.file.voter_column is not None else None,
                "rejections": [rejection._asdict() for rejection in outcome.rejections],
                "seconds": outcome.seconds,
                "votes_per_second": outcome.votes_per_second,
                "read_side_seconds": outcome.read_side_seconds,
                "complete": not (outcome.interrupted or outcome.failure),
                "results": plain(outcome.results) if outcome.results else None,
                "results_hidden": outcome.results_hidden,
            }
        )
    elif outcome.results:
        console().print(results_table(outcome.results, plan.method))
    elif outcome.results_hidden:
        say("the results are hidden until the poll is closed")
    if outcome.failure:
        say(str(outcome.failure))
    if outcome.interrupted:
        say("interrupted")
    if outcome.poll_id:
        say(
            f"{outcome.done:,} of {total:,} votes answered: {outcome.accepted:,} accepted,"
            f" {outcome.already_recorded:,} recorded before, {outcome.rejected:,} rejected;"
            f" skipped: {survey.blank:,} blank, {survey.ignored:,} ignored"
        )
    if outcome.seconds:
        say(f"{outcome.votes_per_second:,.0f} votes/s for {outcome.seconds:.2f} s")
    if outcome.read_side_seconds is not None:
        say(f"the read side showed all of them {outcome.read_side_seconds * 1000:,.0f} ms after the last answer")


def _continuation(
    plan: Import, outcome: Outcome, places: dict[str, str | None], data_dir: Path, yes: bool
) -> list[str]:
    """The command line that goes on with an import that ended early."""
    file = plan.file
    options = {
        "--poll": outcome.poll_id,
        "--voter-column": file.voter_column,
        "--encoding": file.encoding,
        "--delimiter": file.delimiter,
        "--choice-separator": file.separator or None,
        # Without that column, another content would make other voters, and every ballot count twice.
        "--content": plan.survey.digest if file.voter_column is None else None,
        **places,
        "--data-dir": None if data_dir == DEFAULT_DATA_DIR else str(data_dir),
    }
    words = ["tally", "import", str(file.path)]
    for name, value in options.items():
        words += [name, value] if value is not None else []
    for column in file.choice_columns:
        words += ["--choice-column", column]
    for choice in sorted(file.ignored):
        words += ["--ignore-choice", choice]
    for option in file.options:
        words += ["--option", option]
    flags = {"--merge-similar": file.merge_similar, "--fold-case": file.fold_case, "--no-header": not file.has_header}
    words += [flag for flag, given in {**flags, "--yes": yes}.items() if given]
    words += ["--approval"] if plan.method == VotingMethod.VOTING_METHOD_APPROVAL else []
    return [*words, "--close"] if plan.close else words
