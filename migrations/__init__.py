"""The schemas of the write and the read database, as numbered SQL files. A released file is never edited."""

from importlib.resources import files

import asyncpg

from runtime import schema

WRITE = files(__name__) / "write"
# Each read model in the read database has a schema of its own, named like it, so that it can be replaced as a whole:
# `tally rebuild` makes another schema from the same files and puts it in this one's place.
READ = {folder.name: folder for folder in (files(__name__) / "read").iterdir() if folder.is_dir()}


async def migrate_write(dsn: str) -> list[str]:
    """Brings a write database up to date; returns the names of the files that it lacked."""
    return await schema.migrate(dsn, WRITE)


async def migrate_read(dsn: str) -> list[str]:
    """Brings every read model of a read database up to date; returns the files that it lacked, as `views/0001_…`."""
    applied = {name: await schema.migrate(dsn, folder, name) for name, folder in READ.items()}
    return [f"{name}/{file}" for name, files_ in applied.items() for file in files_]


async def check_write(connection: asyncpg.Connection) -> str:
    """The newest file that a write database has. Raises UnsupportedStore where this code cannot use its schema."""
    return await schema.check(connection, WRITE)


async def check_read(connection: asyncpg.Connection, read_model: str) -> str:
    """The same for a read model of a read database."""
    return await schema.check(connection, READ[read_model], read_model)
