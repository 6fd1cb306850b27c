"""Serialized protobuf messages, looked at before they are read.

A message of 4 MiB can hold two million empty entries. To read them, and more so to check them against the message's
rules, would hold up the event loop for seconds. So entries are counted first, no further than their limit, and a long
message is read entry by entry. Wire format: https://protobuf.dev/programming-guides/encoding
"""

import asyncio
from collections.abc import Mapping
from functools import cache
from time import perf_counter
from typing import NamedTuple

from buf.validate import validate_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor

# The most entries of a repeated field without a rule, and of all other fields of a message together, of which libraries
# write each one once.
_OTHER_ENTRIES = 1_000
# What a repeated field holds is looked into where an entry is larger; in a smaller one there is no room for much.
_LARGE_BYTES = 1 << 16
# How long one piece of work holds the event loop, and after how many entries it looks at the clock.
_TURN_SECONDS = 0.004
_ENTRIES_OF_A_TURN = 200
_VARINT, _FIXED64, _LENGTH, _GROUP, _END_GROUP, _FIXED32 = range(6)


class InvalidMessage(Exception):  # noqa: N818 - the caller's fault, not an error of ours
    """A request that cannot be read, or breaks the rules of its message; `fields` is path → rule."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__(str(fields))
        self.fields = fields


class _Field(NamedTuple):
    name: str
    most: int
    repeated: bool
    message: Descriptor | None


@cache
def _fields(message: Descriptor) -> Mapping[int, _Field]:
    """Field number → the field, for those that are repeated or messages."""
    fields = {}
    for field in message.fields:
        repeated = field.is_repeated
        is_message = field.type == FieldDescriptor.TYPE_MESSAGE
        if repeated or is_message:
            rules = field.GetOptions().Extensions[validate_pb2.field].repeated
            most = (rules.max_items or _OTHER_ENTRIES) if repeated else 1
            fields[field.number] = _Field(field.name, most, repeated, field.message_type if is_message else None)
    return fields


def most_entries(message: Descriptor, name: str) -> int:
    """How many entries a repeated field may have, by the message's rules."""
    return _fields(message)[message.fields_by_name[name].number].most


def too_many(most: int) -> str:
    """What is wrong with a list that has more entries, in protovalidate's words."""
    return f"must contain no more than {most} item(s)"


def excess(data: bytes, message: Descriptor) -> Mapping[str, str]:
    """What a serialized message has too much of: path of the field → rule. Empty where there is no such field, and
    where the bytes are no message. Takes time for as many entries as are allowed, and no more."""
    try:
        return _excess(data, 0, len(data), message, "")
    except IndexError:
        return {}


def _excess(data: bytes, at: int, end: int, message: Descriptor, path: str) -> Mapping[str, str]:
    fields = _fields(message)
    counts = dict.fromkeys(fields, 0)
    others = 0
    while at < end:
        number, at, start = _next(data, at)
        field = fields.get(number)
        if field is None:
            others += 1
            if others > _OTHER_ENTRIES:
                return {path: f"has more than {_OTHER_ENTRIES:,} fields beside its lists"}
            continue
        counts[number] += 1
        name = f"{path}.{field.name}" if path else field.name
        if counts[number] > field.most:
            return {name: too_many(field.most) if field.repeated else "must come once"}
        if field.message and start and (not field.repeated or at - start > _LARGE_BYTES):
            entry = f"{name}[{counts[number] - 1}]" if field.repeated else name
            if found := _excess(data, start, at, field.message, entry):
                return found
    return {}


async def split(data: bytes, message: Descriptor, name: str, pauses: "Pauses") -> tuple[bytes, list[bytes]]:
    """A serialized message without one of its lists of messages, and the entries of that list, serialized. Raises
    InvalidMessage where there are more than the message's rules allow, or too many other fields.

    Where the bytes are no message, what cannot be read is in the first part.
    """
    number = message.fields_by_name[name].number
    most = most_entries(message, name)
    rest, entries, at, end = list[bytes](), list[bytes](), 0, len(data)
    while at < end:
        before = at
        try:
            found, at, start = _next(data, at)
        except IndexError:
            found, at, start = 0, end, 0
        if found == number and start and at <= end:
            entries.append(data[start:at])
            if not len(entries) % _ENTRIES_OF_A_TURN:
                await pauses.pause()
            if len(entries) > most:
                raise InvalidMessage({name: too_many(most)})
        else:
            rest.append(data[before:at])
            if len(rest) > _OTHER_ENTRIES:
                raise InvalidMessage({"": f"has more than {_OTHER_ENTRIES:,} fields beside its lists"})
    return b"".join(rest), entries


class Pauses:
    """Divides a long piece of work on the event loop, so that other work goes on in between."""

    def __init__(self) -> None:
        self._since = perf_counter()

    async def pause(self) -> None:
        """To be called often: lets others go on where this has held the loop for long enough."""
        if perf_counter() - self._since > _TURN_SECONDS:
            await asyncio.sleep(0)
            self._since = perf_counter()


def _next(data: bytes, at: int) -> tuple[int, int, int]:
    """The field's number, where its entry ends, and where its value begins if it has a length, else 0. A group's begin
    and end count as entries, and so do those between. Raises IndexError where the data ends too early."""
    tag = data[at]
    at += 1
    if tag & 0x80:
        tag, at = _varint(data, at - 1)
    kind = tag & 7
    if kind == _LENGTH:
        size = data[at]
        at += 1
        if size & 0x80:
            size, at = _varint(data, at - 1)
        return tag >> 3, at + size, at
    if kind == _VARINT:
        while data[at] & 0x80:
            at += 1
        return tag >> 3, at + 1, 0
    if kind in (_GROUP, _END_GROUP):
        return tag >> 3, at, 0
    if kind in (_FIXED32, _FIXED64):
        return tag >> 3, at + (4 if kind == _FIXED32 else 8), 0
    raise IndexError("no such wire type")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if not byte & 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError("a number of more than 64 bits")
