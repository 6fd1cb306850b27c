"""The command line `tally`: its commands by name, and where each is defined."""

import os
import sys
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from clients.deferred import CommandGroup
from clients.failures import Failure, WrongUsage


class TallyCommands(CommandGroup):
    """`tally …`"""

    deferred: ClassVar = {
        "up": (
            "clients.up:up",
            "Start everything on this machine: Postgres, NATS, Redis and Tally's services, until Ctrl-C.",
        ),
        "vote": (
            "clients.vote:vote",
            "Cast one vote. To repeat the same vote is harmless, and prints the first receipt again.",
        ),
        "results": (
            "clients.results:results",
            "Print the counts of a poll, or of several in one go.",
        ),
        "watch": (
            "clients.results:watch",
            "Show the counts of a poll as they grow, until it is closed or cancelled or you press Ctrl-C"
            " (exit code 130).",
        ),
        "turnout": (
            "clients.history:turnout",
            "Show how many voted when, also while the results of the poll are hidden. Times are UTC.",
        ),
        "votes": (
            "clients.history:votes",
            "List where somebody voted and what became of it. What was chosen is nowhere to be read.",
        ),
        "status": (
            "clients.status:status",
            "Tell how far events have come on their way from the event log to the readers, and what holds them up.",
        ),
        "import": (
            "clients.file_commands:import_file",
            "Create a poll from a file of ballots, with the distinct choices as options, and cast every row.",
        ),
        "register": (
            "clients.file_commands:register",
            "Put voters on the electoral roll of a poll that has one (--roll), while it is a draft or open.",
        ),
        "migrate": (
            "clients.migrating:migrate",
            "Bring the schemas of your own databases up to date. Safe to repeat; `tally up` does it by itself.",
        ),
        "rebuild": (
            "clients.rebuilding:rebuild",
            "Make a read model anew from the event log in the write database, while it is read and kept up.",
        ),
    }


class PollCommands(CommandGroup):
    """`tally poll …`"""

    deferred: ClassVar = {
        "create": (
            "clients.polls:create",
            "Create a poll.",
        ),
        "update": (
            "clients.polls:update",
            "Change a draft: what is given changes, the rest stays. Options are given all together.",
        ),
        "open": (
            "clients.polls:open_poll",
            "Let a poll take votes.",
        ),
        "close": (
            "clients.polls:close",
            "End a poll for good: no vote is accepted after it, and it cannot be opened again.",
        ),
        "cancel": (
            "clients.polls:cancel",
            "Give a poll up for good, draft or open: no vote is accepted after it, and its counts decide nothing.",
        ),
        "certify": (
            "clients.polls:certify",
            "Recount a closed poll from its votes. It is CERTIFIED if the recount agrees, and stays CLOSED if not.",
        ),
        "list": (
            "clients.polls:list_polls",
            "List polls, newest first. Times are UTC.",
        ),
        "show": (
            "clients.polls:show",
            "Show a poll and its options.",
        ),
        "document": (
            "clients.polls:document",
            "Show a poll whole, with its counts, turnout and outcome; with --output json as the document that it is.",
        ),
        "archive": (
            "clients.archiving:archive",
            "Move the votes and events of ended polls from the write database into files, one for each poll.",
        ),
        "verify-archive": (
            "clients.archiving:verify_archive",
            "Count the votes and events in archive files again, and compare them with what was certified.",
        ),
    }


class DeadLetterCommands(CommandGroup):
    """`tally dead-letters …`"""

    deferred: ClassVar = {
        "list": (
            "clients.dead_letters:list_letters",
            "List the events that parked polls wait for, by read model.",
        ),
        "show": (
            "clients.dead_letters:show",
            "Show all that is known of the event that parked a poll, in each read model.",
        ),
        "replay": (
            "clients.dead_letters:replay",
            "Try events again that could not be applied, after what was wrong with them or with the projector is"
            " mended.",
        ),
    }


# Without rich_markup_mode, Typer imports rich for help and for errors, which costs more than all the rest.
app = typer.Typer(
    name="tally",
    cls=TallyCommands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Tally: durable votes, exact counts, live results.",
)
app.add_typer(
    typer.Typer(
        cls=PollCommands,
        no_args_is_help=True,
        help="Create, change, open, close, certify, archive and look at polls.",
    ),
    name="poll",
)
app.add_typer(
    typer.Typer(
        cls=DeadLetterCommands,
        no_args_is_help=True,
        help="Look at events that a read model could not apply, and try them again. Their polls are parked for"
        " readers.",
    ),
    name="dead-letters",
)


def main() -> None:
    """The console script: what goes wrong is one line on stderr, never a traceback."""
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - it is open until the end
    try:
        _prepare()
        try:
            app()
        finally:
            sys.stdout.flush()
    except Failure as failure:
        print(failure, file=sys.stderr)
        sys.exit(failure.code)
    except OSError as error:
        # Commands tell of their files and connections themselves. Python would try this again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"standard output cannot be written: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)


def _prepare() -> None:
    """Raises Failure where the command cannot be understood, or what it prints cannot be read."""
    if sys.stdout is None:
        raise Failure("standard output is closed")
    for stream in (sys.stdout, sys.stderr):
        # A label that the terminal's encoding does not have must not end a count.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if unreadable := _unreadable():
        raise WrongUsage(f"{unreadable} is not valid UTF-8")


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
        # It loads parsers of mail, which cost every command a tenth of its start.
        from importlib.metadata import version  # noqa: PLC0415

        print(f"tally {version('tally-voting')}")
        raise typer.Exit


@app.callback()
def tally(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version of Tally and exit.")
    ] = False,
) -> None:
    """Tally: durable votes, exact counts, live results."""


if __name__ == "__main__":
    main()
