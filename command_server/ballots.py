"""Ballots as bytes: what the server does for every single vote happens here, and is paid 250,000 times a second.

A ballot is one vote within its poll: the voter's key (16 bytes), then the option's number as Postgres' binary COPY
wants it (its length, 4 bytes, and its value, 2 bytes). So the rows of a batch are one `join` around a constant, ballots
sort by voter, and the columns of a batch come out of its bytes by slices with a stride: no loop over votes in Python.
"""

from collections.abc import Sequence

from tally.event.v1.event_pb2 import VotesCast

from contracts.voters import KEY_BYTES

_SMALLINT = b"\x00\x00\x00\x02"
BALLOT_BYTES = KEY_BYTES + len(_SMALLINT) + 2

COPY_COLUMNS = ("poll_no", "batch_id", "voter_key", "option_no")
_COPY_HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
_COPY_TRAILER = b"\xff\xff"


def marking(option_no: int) -> bytes:
    """The part of a ballot that follows the voter's key."""
    return _SMALLINT + option_no.to_bytes(2)


def voter_key(ballot: bytes) -> bytes:
    """Who voted."""
    return ballot[:KEY_BYTES]


def option_no(ballot: bytes) -> int:
    """What was chosen."""
    return int.from_bytes(ballot[-2:])


def copy_rows(poll_no: int, batch_id: int, ballots: Sequence[bytes]) -> bytes:
    """The ballots as rows of the table votes (COPY_COLUMNS), in Postgres' binary COPY format."""
    row = b"".join(
        (
            len(COPY_COLUMNS).to_bytes(2),
            (4).to_bytes(4) + poll_no.to_bytes(4),
            (8).to_bytes(4) + batch_id.to_bytes(8),
            KEY_BYTES.to_bytes(4),
        )
    )
    return b"".join((_COPY_HEADER, row, row.join(ballots), _COPY_TRAILER))


def votes_cast(batch_id: int, ballots: Sequence[bytes]) -> VotesCast:
    """The ballots as the event that tells of them."""
    columns = b"".join(ballots)
    keys = bytearray(KEY_BYTES * len(ballots))
    for place in range(KEY_BYTES):
        keys[place::KEY_BYTES] = columns[place::BALLOT_BYTES]
    high, low = columns[BALLOT_BYTES - 2 :: BALLOT_BYTES], columns[BALLOT_BYTES - 1 :: BALLOT_BYTES]
    numbers: Sequence[int] = low if not any(high) else [256 * h + n for h, n in zip(high, low, strict=True)]
    return VotesCast(batch_id=batch_id, voter_keys=bytes(keys), option_numbers=numbers)
