"""The schemas of databases that an operator brings."""

import asyncpg

from clients.failures import Failure
from migrations import READ, WRITE
from runtime import postgres

_FOLDERS = {"write": WRITE, "read": READ}


async def migrate(name: str, dsn: str) -> list[str]:
    """Brings the `write` or `read` database up to date; returns the files that it lacked. Raises Failure."""
    try:
        return await postgres.migrate(dsn, _FOLDERS[name])
    except (OSError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        # Neither of them names the password.
        raise Failure(
            f"the {name} database was not migrated: {' '.join(str(error).split()) or type(error).__name__}"
        ) from None
