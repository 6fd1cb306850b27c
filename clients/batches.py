"""Rows on their way to a server: as many to a request as it may have."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from google.protobuf.message import Message

MAX_BATCH_BYTES = 4 << 20

RowT = TypeVar("RowT")
RequestT = TypeVar("RequestT", bound=Message)


def divided(
    rows: Sequence[RowT], build: Callable[[Sequence[RowT]], RequestT]
) -> Iterator[tuple[RequestT, Sequence[RowT]]]:
    """All rows, in order, in as few halves of halves as the server's limit of 4 MiB asks for; each with its request."""
    request = build(rows)
    # A batch's number may not be in it yet, and takes up to 11 bytes.
    if request.ByteSize() + 11 <= MAX_BATCH_BYTES or len(rows) <= 1:
        yield request, rows
        return
    middle = len(rows) // 2
    yield from divided(rows[:middle], build)
    yield from divided(rows[middle:], build)
