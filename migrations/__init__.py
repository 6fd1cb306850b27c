"""The databases' schemas, as numbered SQL files: `write` for commands, `read` for queries. Files are never edited once released."""

from importlib.resources import files

WRITE = files(__name__) / "write"
READ = files(__name__) / "read"
