"""`tally migrate`: the schemas of databases that an operator brings."""

import asyncio
from typing import Annotated

import typer

from clients import databases
from clients.options import OutputOption
from clients.output import Output, print_fields, print_json


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
    dsns = {"write": write_dsn, "read": read_dsn}
    if not any(dsns.values()):
        raise typer.BadParameter("give --write-dsn, --read-dsn or both")
    databases.say_warnings()
    applied = {name: asyncio.run(databases.migrate(name, dsn)) for name, dsn in dsns.items() if dsn}
    if output is Output.JSON:
        print_json({"applied": applied})
    else:
        print_fields({name: ", ".join(files) or "is up to date" for name, files in applied.items()})
