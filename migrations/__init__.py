"""The schemas of the write and the read database, as numbered SQL files. A released file is never edited."""

from importlib.resources import files

from runtime import postgres

# The first Postgres whose RETURNING tells the row as it was before: votes that take the place of others need it.
WRITE_VERSION = 18
WRITE = files(__name__) / "write"
# Each read model in the read database has a schema of its own, named like it, so that it can be replaced as a whole:
# `tally rebuild` makes another schema from the same files and puts it in this one's place.
READ = {folder.name: folder for folder in (files(__name__) / "read").iterdir() if folder.is_dir()}


async def migrate_write(dsn: str) -> list[str]:
    """Brings a write database up to date; returns the names of the files that it lacked."""
    return await postgres.migrate(dsn, WRITE, version=WRITE_VERSION)


async def migrate_read(dsn: str) -> list[str]:
    """Brings every read model of a read database up to date; returns the files that it lacked, as `views/0001_…`."""
    applied = {schema: await postgres.migrate(dsn, folder, schema) for schema, folder in READ.items()}
    return [f"{schema}/{name}" for schema, names in applied.items() for name in names]
