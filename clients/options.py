"""Arguments and options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from clients.output import ListOutput, Output

ValueT = TypeVar("ValueT")


def read_by(parse: Callable[[str], ValueT]) -> Callable[[str], ValueT]:
    """A parser for an option that says what the ValueError says; Typer would repeat the value and no more."""

    def parser(text: str) -> ValueT:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return parser


CommandAddress = Annotated[
    str | None,
    typer.Option(
        envvar="TALLY_COMMAND_ADDRESS",
        metavar="HOST:PORT",
        help="The command server. Default: that of the `tally up` that runs in --data-dir.",
    ),
]
QueryAddress = Annotated[
    str | None,
    typer.Option(
        envvar="TALLY_QUERY_ADDRESS",
        metavar="HOST:PORT",
        help="The query server. Default: that of the `tally up` that runs in --data-dir.",
    ),
]
DataDir = Annotated[Path, typer.Option(help="Where a `tally up` on this machine keeps its data and its run.json.")]
DEFAULT_DATA_DIR = Path(".tally")
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="Text for people or JSON for programs.")]
ListOutputOption = Annotated[
    ListOutput,
    typer.Option(
        "--output",
        "-o",
        help="Text for people, JSON for programs, or CSV for spreadsheets, in which a text that would be a formula"
        " begins with an apostrophe.",
    ),
]
Fresh = Annotated[
    str,
    typer.Option(metavar="TOKEN", help="A consistency_token: wait until that command's effect can be seen."),
]
POLL_HELP = "The poll's id, or its beginning: 4 characters or more that no other poll's id begins with."
PollId = Annotated[str, typer.Argument(metavar="POLL", help=POLL_HELP, show_default=False)]
RetryFor = Annotated[float, typer.Option(metavar="SECONDS", min=0, help="How long to retry a lost connection.")]
ReadDsn = Annotated[
    str | None,
    typer.Option(
        envvar="TALLY_READ_DSN", show_envvar=True, help="The read database. Default: that of the running `tally up`."
    ),
]
RedisUrl = Annotated[
    str | None,
    typer.Option(envvar="TALLY_REDIS_URL", show_envvar=True, help="Redis. Default: that of the running `tally up`."),
]
NatsUrl = Annotated[
    str | None,
    typer.Option(envvar="TALLY_NATS_URL", show_envvar=True, help="NATS. Default: that of the running `tally up`."),
]
