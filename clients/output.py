"""What the command line prints: data on stdout, as text or as JSON, and what it says about its work on stderr."""

import csv
import json
import re
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.text import Text

from clients.listings import Fields

# Into a file or a pipe nothing is cut to the width of a screen that is not there.
_UNBOUNDED = 10_000

_LONG = {FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64}


class Output(StrEnum):
    """How a command prints its data."""

    TABLE = "table"
    JSON = "json"


class ListOutput(StrEnum):
    """How a command prints data that are rows."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


# What a spreadsheet takes for a formula: labels and titles are other people's words. Plain numbers are none.
_FORMULA = re.compile(r"(?![+-]?[\d.,]+$)\s*[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]")
# Joiners within words and emoji, which are not printable by themselves and cannot take a terminal over.
_JOINERS = "\u200c\u200d"


def console(*, stderr: bool = False) -> Console:
    """The terminal, or whatever stands in its place."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, markup=False, width=None if stream.isatty() else _UNBOUNDED)


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON data: proto field names, every field present, enums by name, int64 as numbers. A message or an
    optional field that is absent is null: an empty one or its 0 would be a value."""
    data: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    _complete(message.DESCRIPTOR, data)
    return data


def print_json(data: dict[str, Any], *, one_line: bool = False) -> None:
    """Prints one JSON object, where asked to on a line of its own."""
    text = json.dumps(data, indent=None if one_line else 2, ensure_ascii=sys.stdout.encoding.lower() != "utf-8")
    print(text, flush=True)


def print_fields(fields: dict[str, str]) -> None:
    """Prints names and values, one pair a line."""
    console().print(Fields({name: shown(value) for name, value in fields.items()}))


def print_csv(names: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints rows below a header: numbers without separators, times in UTC, empty where there is no value.

    A text that a spreadsheet would run as a formula gets an apostrophe in front. Into a file or a pipe they are UTF-8,
    whatever the terminal has.
    """
    if not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow(f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell for cell in row)
    sys.stdout.flush()


def say(text: str) -> None:
    """Says something about the work that is under way, or what came of it."""
    print(text, file=sys.stderr, flush=True)


def shown(text: str, style: str = "") -> Text:
    """Somebody else's words, without the control characters with which they could take the terminal over."""
    kept = "".join(c if c.isprintable() or c == "\n" or c in _JOINERS else "\ufffd" for c in text)
    return Text(kept, style=style, overflow="fold")


def one_line(text: str) -> str:
    """Somebody else's words in one line."""
    return " ".join(shown(text).plain.split())


def _complete(descriptor: Any, data: dict[str, Any]) -> None:
    """Adds what is absent, and turns int64 back from the strings that protobuf's JSON makes of them; in place."""
    for field in descriptor.fields:
        value = data.get(field.name)
        if value is None:
            data[field.name] = None
        elif field.cpp_type in _LONG:
            data[field.name] = [int(v) for v in value] if isinstance(value, list) else int(value)
        elif field.message_type:
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, dict):
                    _complete(field.message_type, part)
