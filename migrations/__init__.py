"""The schemas of the write and the read database, as numbered SQL files. A released file is never edited."""

from importlib.resources import files

WRITE = files(__name__) / "write"
READ = files(__name__) / "read"
