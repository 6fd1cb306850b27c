"""Ballots as bytes: what the server does for every single vote happens here, and is paid 250,000 times a second.

A ballot is one vote within its poll: the voter's key (16 bytes), then the chosen options as Postgres' binary COPY wants
them (their length, 4 bytes, then 2 bytes for each option's number, ascending). So the rows of a batch are one `join`
around a constant, ballots sort by voter, and where each has one choice the columns of a batch come out of its bytes by
slices with a stride: no loop over votes in Python.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from struct import unpack

from tally.event.v1.event_pb2 import CountChange, VotesCast

from contracts.voters import KEY_BYTES

_LENGTH_BYTES = 4
_CHOICE_BYTES = 2
# A ballot with one choice.
_SINGLE_BYTES = KEY_BYTES + _LENGTH_BYTES + _CHOICE_BYTES

COPY_COLUMNS = ("poll_no", "batch_id", "voter_key", "choices")
_COPY_HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
_COPY_TRAILER = b"\xff\xff"


def marking(option_numbers: Sequence[int]) -> bytes:
    """The part of a ballot that follows the voter's key; the numbers ascend."""
    choices = b"".join(number.to_bytes(_CHOICE_BYTES) for number in option_numbers)
    return len(choices).to_bytes(_LENGTH_BYTES) + choices


def voter_key(ballot: bytes) -> bytes:
    """Who voted."""
    return ballot[:KEY_BYTES]


def choices(ballot: bytes) -> bytes:
    """What was chosen, as the column votes.choices."""
    return ballot[KEY_BYTES + _LENGTH_BYTES :]


def option_numbers(choices: bytes) -> tuple[int, ...]:
    """The numbers in the column votes.choices."""
    return unpack(f">{len(choices) // _CHOICE_BYTES}H", choices)


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


def votes_cast(
    batch_id: int,
    ballots: Sequence[bytes],
    weights: Mapping[bytes, int] | None = None,
    replaced: Mapping[bytes, bytes] | None = None,
) -> VotesCast:
    """The ballots as the event that tells of them.

    `weights` is voter key → weight where votes are weighted; `replaced` is voter key → choices of the vote whose place
    this one takes.
    """
    columns = b"".join(ballots)
    if len(columns) == _SINGLE_BYTES * len(ballots) and weights is None and not replaced:
        return _single_choices(batch_id, columns, len(ballots))
    event = VotesCast(batch_id=batch_id, voter_keys=b"".join(map(voter_key, ballots)), replaced=len(replaced or ()))
    counts = Counter[int]()
    several = False
    for ballot in ballots:
        key, numbers = voter_key(ballot), option_numbers(choices(ballot))
        weight = 1 if weights is None else weights[key]
        several |= len(numbers) > 1
        event.option_numbers.extend(numbers)
        event.choices.append(len(numbers))
        counts.update(dict.fromkeys(numbers, weight))
        if replaced and key in replaced:
            counts.subtract(dict.fromkeys(option_numbers(replaced[key]), weight))
    if not several:
        event.ClearField("choices")
    if weights is not None:
        event.weights.extend(weights[voter_key(ballot)] for ballot in ballots)
    event.count_changes.extend(
        CountChange(option_number=number, change=change) for number, change in sorted(counts.items())
    )
    return event


def _single_choices(batch_id: int, columns: bytes, votes: int) -> VotesCast:
    keys = bytearray(KEY_BYTES * votes)
    for place in range(KEY_BYTES):
        keys[place::KEY_BYTES] = columns[place::_SINGLE_BYTES]
    high, low = columns[_SINGLE_BYTES - 2 :: _SINGLE_BYTES], columns[_SINGLE_BYTES - 1 :: _SINGLE_BYTES]
    numbers: Sequence[int] = low if not any(high) else [256 * h + n for h, n in zip(high, low, strict=True)]
    return VotesCast(batch_id=batch_id, voter_keys=bytes(keys), option_numbers=numbers)
