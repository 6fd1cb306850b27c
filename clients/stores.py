"""How commands for operators find the stores behind the servers."""

import json
from pathlib import Path
from typing import Annotated

import typer

from clients.failures import Failure

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


def find_store(variable: str, given: str | None, data_dir: Path) -> str:
    """The address that was given, or that of the `tally up` whose data are in `data_dir`. Raises Failure."""
    if given:
        return given
    record = data_dir / "run.json"
    try:
        return str(json.loads(record.read_text())[variable.removeprefix("TALLY_").lower()])
    except (OSError, ValueError, LookupError, TypeError):
        raise Failure(
            f"set {variable}, or run `tally up` in this directory ({record} does not say where that store is)"
        ) from None
