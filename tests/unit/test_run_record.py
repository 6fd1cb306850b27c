"""A run.json that says nothing of use: one line that names it, whatever is in it or in its place."""

import json
import os
from pathlib import Path

import pytest

from clients.connection import find_address
from clients.databases import find_store
from clients.failures import Failure

CONTENTS = {
    "empty": b"",
    "truncated": b'{"pid": 5, "command_address": "127.0',
    "binary": b"\xff\xfe\x00",
    "nested": b"[" * 100_000,
    "null": b"null",
    "number": b"5",
    "string": b'"command_address"',
    "list": b'["command_address", "read_dsn"]',
    "other fields": b'{"pid": 5, "processes": {}}',
    "null inside": b'{"command_address": null, "read_dsn": null}',
    "numbers inside": b'{"command_address": 50051, "read_dsn": 5}',
    "empty inside": b'{"command_address": "", "read_dsn": ""}',
    "objects inside": b'{"command_address": {"host": "h"}, "read_dsn": []}',
    "control characters": b'{"command_address": "h:1\\n\\u001b[2J", "read_dsn": "postgresql://h\\u0000/d"}',
}


def assert_refused(folder: Path, *words: str) -> None:
    for find in (lambda: find_address("command", None, folder), lambda: find_store("TALLY_READ_DSN", None, folder)):
        with pytest.raises(Failure) as failure:
            find()
        [line] = str(failure.value).splitlines()
        assert str(folder / "run.json") in line
        assert all(word in line for word in words)


@pytest.mark.parametrize("content", CONTENTS)
def test_a_record_that_does_not_say_it_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_bytes(CONTENTS[content])
    assert_refused(tmp_path, "does not say")


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    assert_refused(tmp_path, "cannot be read: Is a directory")
    (tmp_path / "run.json").rmdir()
    os.symlink(tmp_path / "run.json", tmp_path / "run.json")
    assert_refused(tmp_path, "cannot be read: ")


def test_a_record_that_says_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"command_address": "h:1", "read_dsn": "postgresql://h/d"}))
    assert find_address("command", None, tmp_path).target == "h:1"
    assert find_store("TALLY_READ_DSN", None, tmp_path) == "postgresql://h/d"
