"""The stores behind the servers: where they are, and the schemas of databases that an operator brings."""

import logging
import sys
from pathlib import Path

import asyncpg
import structlog
from asyncpg.exceptions import ClientConfigurationError

from clients.failures import Failure
from clients.run_record import read_address
from migrations import migrate_read, migrate_write
from runtime import postgres
from runtime.addresses import InvalidAddress

# What a database makes of an address that is wrong, or of being the wrong one, or away.
FAILURES = (*postgres.UNAVAILABLE, asyncpg.PostgresError, InvalidAddress)

_MIGRATE = {"write": migrate_write, "read": migrate_read}


def say_warnings() -> None:
    """What the machinery logs is said too, where it is a warning or worse."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        # What stderr is when something is said.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )


def find_store(setting: str, given: str | None, data_dir: Path) -> str:
    """The address that was given for a setting such as TALLY_READ_DSN, or that of the `tally up` whose data are in
    `data_dir`. Raises Failure."""
    if given:
        return given
    name = setting.removeprefix("TALLY_").lower()
    record = data_dir / "run.json"
    try:
        return read_address(record, name)
    except FileNotFoundError:
        option = f"--{name.replace('_', '-')}"
        raise Failure(
            f"give {option}, set {setting}, or run `tally up` in this directory (there is no {record})"
        ) from None
    except ValueError as error:
        raise Failure(f"{record} does not say what {setting} is ({error}); set it") from None


def reason(error: Exception) -> str:
    """Why a store cannot be used, in one line that names no password."""
    if isinstance(error, ClientConfigurationError):
        # It may quote a part of the address.
        error = InvalidAddress()
    return " ".join(str(error).split()) or type(error).__name__


async def migrate(name: str, dsn: str) -> list[str]:
    """Brings the `write` or `read` database up to date; returns the files that it lacked. Raises Failure."""
    try:
        return await _MIGRATE[name](dsn)
    except FAILURES as error:
        raise Failure(f"the {name} database was not migrated: {reason(error)}") from None
