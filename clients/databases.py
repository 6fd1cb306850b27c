"""The schemas of databases that an operator brings."""

import asyncpg

from clients.failures import Failure
from migrations import migrate_read, migrate_write

_MIGRATE = {"write": migrate_write, "read": migrate_read}


async def migrate(name: str, dsn: str) -> list[str]:
    """Brings the `write` or `read` database up to date; returns the files that it lacked. Raises Failure."""
    try:
        return await _MIGRATE[name](dsn)
    except (OSError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        # Neither of them names the password.
        raise Failure(
            f"the {name} database was not migrated: {' '.join(str(error).split()) or type(error).__name__}"
        ) from None
