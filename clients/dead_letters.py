"""`tally dead-letters …`: the events that could not be applied, and another attempt at them."""

import asyncio
import sys
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from clients import letters
from clients.databases import find_store, say_warnings
from clients.failures import Failure
from clients.listings import Column, Listing
from clients.options import (
    DEFAULT_DATA_DIR,
    POLL_HELP,
    DataDir,
    ListOutputOption,
    NatsUrl,
    OutputOption,
    PollId,
    ReadDsn,
    RedisUrl,
)
from clients.output import ListOutput, Output, console, print_csv, print_fields, print_json, say, shown
from clients.poll_ids import find_among
from contracts.dead_letters import DeadLetter
from contracts.read_models import READ_MODELS

_PARKED_AGAIN = 3

Polls = Annotated[list[str] | None, typer.Argument(metavar="[POLL]...", help=POLL_HELP, show_default=False)]
_COLUMNS = (
    *(Column("read model"), Column("poll_id"), Column("version", right=True), Column("waiting", right=True)),
    *(Column("event", folds=True), Column("since"), Column("error", folds=True)),
)
_OUTCOME_COLUMNS = (
    *(Column("read model"), Column("poll_id"), Column("version", right=True)),
    Column("outcome", folds=True),
)
# The fields of a dead letter that a row has room for.
_EXPORTED = ("read_model", "poll_id", "version", "waiting", "stream_sequence", "event_type", "first_seen", "error")


def list_letters(
    read_dsn: ReadDsn = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: ListOutputOption = ListOutput.TABLE,
) -> None:
    """List the events that parked polls wait for, by read model.

    Exit code: 0 if every read model could be looked at, 1 if not.
    """
    found, unanswered = asyncio.run(letters.read_all(_stores(read_dsn, redis_url, data_dir)))
    rows = [(name, letter) for name, kept in found.items() for letter in kept]
    data = [_data(name, letter) for name, letter in rows]
    match output:
        case ListOutput.JSON:
            print_json({"dead_letters": data, "unanswered": unanswered})
        case ListOutput.CSV:
            print_csv(_EXPORTED, ([letter[field] for field in _EXPORTED] for letter in data))
        case ListOutput.TABLE:
            cells = [
                (
                    *(name, letter.poll_id, f"{letter.version:,}", f"{letter.waiting:,}"),
                    *(shown(letter.event_type), f"{letter.first_seen:%Y-%m-%d %H:%M:%SZ}", shown(letter.error)),
                )
                for name, letter in rows
            ]
            console().print(Listing(_COLUMNS, cells))
    _complain(unanswered)


def show(
    poll: PollId,
    read_dsn: ReadDsn = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show all that is known of the event that parked a poll, in each read model.

    Exit code: 0 if there is such an event, 1 if there is none or a read model could not be looked at.
    """
    found, unanswered = asyncio.run(letters.read_all(_stores(read_dsn, redis_url, data_dir)))
    [poll] = find_among([poll], [letter.poll_id for kept in found.values() for letter in kept])
    rows = [(name, letter) for name, kept in found.items() for letter in kept if letter.poll_id == poll]
    if output is Output.JSON:
        print_json({"dead_letters": [_data(name, letter) for name, letter in rows], "unanswered": unanswered})
    for name, letter in rows if output is Output.TABLE else ():
        fields = _data(name, letter) | {"data": letter.data.hex(" ")}
        print_fields({field: str(value) for field, value in fields.items()})
    _complain(unanswered)
    if not rows:
        raise Failure(f"no read model is parked at an event of poll {poll}")


def replay(
    polls: Polls = None,
    all_: Annotated[bool, typer.Option("--all", help="Every parked poll.")] = False,
    wait: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="How long to wait for the projectors.")] = 30.0,
    read_dsn: ReadDsn = None,
    redis_url: RedisUrl = None,
    nats_url: NatsUrl = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Try events again that could not be applied, after what was wrong with them or with the projector is mended.

    The relay publishes them again out of the event log; the projectors take it from there. To do so is always safe.

    Exit code: 0 if all polls go on, 3 if some are parked again, 1 if a projector did not try in time or after another
    error, 2 for wrong usage.
    """
    if bool(polls) == all_:
        raise typer.BadParameter("give the polls, or --all")
    stores = _stores(read_dsn, redis_url, data_dir)
    nats = find_store("TALLY_NATS_URL", nats_url, data_dir)
    outcome = asyncio.run(letters.replay(stores, nats, polls, wait))
    if output is Output.JSON:
        states = {"applied": outcome.applied, "parked_again": outcome.parked_again, "untried": outcome.untried}
        print_json({state: [_data(*row) for row in rows] for state, rows in states.items()})
    else:
        told = [(row, "goes on") for row in outcome.applied]
        told += [(row, f"parked again: {row[1].error}") for row in outcome.parked_again]
        told += [(row, "not tried") for row in outcome.untried]
        cells = [(name, letter.poll_id, f"{letter.version:,}", shown(text)) for (name, letter), text in told]
        console().print(Listing(_OUTCOME_COLUMNS, cells))
    if outcome.untried:
        raise Failure("not every projector tried in time: are the relay and the projectors running?")
    if outcome.parked_again:
        sys.exit(_PARKED_AGAIN)


def _stores(read_dsn: str | None, redis_url: str | None, data_dir: Path) -> Mapping[str, str]:
    """Where each read model is, by name. Raises Failure."""
    say_warnings()
    given = {"TALLY_READ_DSN": read_dsn, "TALLY_REDIS_URL": redis_url}
    return {name: find_store(variable, given[variable], data_dir) for name, variable in READ_MODELS.items()}


def _data(read_model: str, letter: DeadLetter) -> dict[str, Any]:
    return {
        "read_model": read_model,
        "poll_id": letter.poll_id,
        "version": letter.version,
        "waiting": letter.waiting,
        "stream_sequence": letter.stream_sequence,
        "event_type": letter.event_type,
        "error": letter.error,
        "first_seen": letter.first_seen.isoformat(),
        "data": b64encode(letter.data).decode(),
    }


def _complain(unanswered: Mapping[str, str]) -> None:
    for name, error in unanswered.items():
        say(f"the store of {name} does not answer: {error}")
    if unanswered:
        sys.exit(1)
