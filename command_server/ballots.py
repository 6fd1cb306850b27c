"""Ballots as bytes: what the server does for every single vote happens here, and is paid 250,000 times a second.

A ballot is one vote within its poll: the voter's key (16 bytes), then the chosen options as Postgres' binary COPY wants
them (their length, 4 bytes, then 2 bytes for each option's number, ascending). So the rows of a batch are one `join`
around a constant, ballots sort by voter, and where each has one choice the columns of a batch come out of its bytes by
slices with a stride: no loop over votes in Python.

The ballot of a vote that came with an idempotency key is a keyed ballot: the hash of that key follows as one more
column for COPY (its length, 4 bytes, then 7 bytes). So a keyed ballot has an odd number of bytes, any other an even
one.

The ballots of plain votes are made, parted and put in order by compiled code, _ballots.c, where that was built.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from struct import unpack
from types import ModuleType
from typing import NamedTuple

import structlog
from asyncpg.pgproto.pgproto import UUID
from tally.event.v1.event_pb2 import CountChange, VotesCast

from contracts.voters import IDEMPOTENCY_BYTES, IDEMPOTENCY_PERSON, KEY_BYTES, PERSON, VoterKeys

compiled: ModuleType | None
try:
    compiled = import_module("command_server._ballots")
except ImportError:
    compiled = None

log = structlog.get_logger()

_LENGTH_BYTES = 4
_CHOICE_BYTES = 2
# A ballot with one choice.
_SINGLE_BYTES = KEY_BYTES + _LENGTH_BYTES + _CHOICE_BYTES
# What a keyed ballot has more than another one.
_HASH_BYTES = _LENGTH_BYTES + IDEMPOTENCY_BYTES

# What a row's key has of the voter's, behind the poll's number: the chance that two of a billion voters are the same is
# about 10^-11. A longer key, or two columns, would cost a quarter more: docs/adr/0008.
_ROW_KEY_BYTES = 12

COPY_COLUMNS = ("batch_id", "ballot_key", "choices")
KEYED_COPY_COLUMNS = (*COPY_COLUMNS, "idempotency_hash")
_COPY_HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
_COPY_TRAILER = b"\xff\xff"
_COPY_NULL = b"\xff\xff\xff\xff"


def marking(option_numbers: Sequence[int]) -> bytes:
    """The part of a ballot that follows the voter's key; the numbers ascend."""
    choices = b"".join(number.to_bytes(_CHOICE_BYTES) for number in option_numbers)
    return len(choices).to_bytes(_LENGTH_BYTES) + choices


def keyed(idempotency_hash: bytes) -> bytes:
    """The end of a keyed ballot, after its marking."""
    return IDEMPOTENCY_BYTES.to_bytes(_LENGTH_BYTES) + idempotency_hash


def any_keyed(ballots: Iterable[bytes]) -> bool:
    """Whether some of these are keyed ballots."""
    return any(length % 2 for length in set(map(len, ballots)))


def copy_columns(ballots: Iterable[bytes]) -> Sequence[str]:
    """The columns of the rows that `copy_rows` makes of these."""
    return KEYED_COPY_COLUMNS if any_keyed(ballots) else COPY_COLUMNS


def size(choices: int) -> int:
    """The bytes of a ballot with so many choices, without an idempotency hash."""
    return KEY_BYTES + _LENGTH_BYTES + choices * _CHOICE_BYTES


def voter(ballot: bytes) -> bytes:
    """Who voted, as far as the keys of the rows tell voters apart."""
    return ballot[:_ROW_KEY_BYTES]


def ballot_key(poll_no: int, voter_key: bytes) -> UUID:
    """The key of a voter's row in a poll, in the tables votes and roll; `voter` is enough of a voter key."""
    return UUID(poll_no.to_bytes(4) + voter_key[:_ROW_KEY_BYTES])


def voter_of(ballot_key: UUID) -> bytes:
    """The `voter` in the key of a row."""
    key: bytes = ballot_key.bytes
    return key[-_ROW_KEY_BYTES:]


def poll_and_voter_of(ballot_key: UUID) -> tuple[int, bytes]:
    """The poll_no and the `voter` in the key of a row."""
    key: bytes = ballot_key.bytes
    return int.from_bytes(key[:-_ROW_KEY_BYTES]), key[-_ROW_KEY_BYTES:]


def key_range(poll_no: int) -> tuple[UUID, UUID]:
    """All keys of a poll's rows are above the first and not above the second of these."""
    bits = 8 * _ROW_KEY_BYTES
    return UUID(((poll_no << bits) - 1).to_bytes(16)), UUID((((poll_no + 1) << bits) - 1).to_bytes(16))


def choices(ballot: bytes) -> bytes:
    """What was chosen, as the column votes.choices."""
    return _without_hash(ballot)[KEY_BYTES + _LENGTH_BYTES :]


def idempotency_hash(ballot: bytes) -> bytes | None:
    """The hash in a keyed ballot, as the column votes.idempotency_hash; None in any other."""
    return ballot[-IDEMPOTENCY_BYTES:] if len(ballot) % 2 else None


def _without_hash(ballot: bytes) -> bytes:
    return ballot[:-_HASH_BYTES] if len(ballot) % 2 else ballot


def option_numbers(choices: bytes) -> tuple[int, ...]:
    """The numbers in the column votes.choices."""
    return unpack(f">{len(choices) // _CHOICE_BYTES}H", choices)


class Envelope(NamedTuple):
    """What a CastVotesRequest says beside its votes, and how many these are."""

    batch_sequence: int
    poll_id: str
    votes: int
    idempotency_key: str


class Reader:
    """Makes ballots straight from a serialized CastVotesRequest, as far as its votes are plain: one known option, a
    voter id in printable ASCII. The rest is for the caller to read, and so is everything where nothing was compiled."""

    def __init__(self, voters: VoterKeys) -> None:
        if compiled is None:
            log.warning("command_server/_ballots.c was not compiled: CastVotes is slower than it could be")
        self._voters = compiled.keyed(voters.secret, PERSON) if compiled else b""
        self._hashes = compiled.keyed(voters.secret, IDEMPOTENCY_PERSON) if compiled else b""

    def envelope(self, request: bytes) -> Envelope | None:
        """The request without its votes; None where it is to be read otherwise."""
        found = compiled.envelope(request) if compiled else None
        return Envelope(*found) if found else None

    def mark(self, request: bytes, markings: dict[str, bytes], idempotency_key: str = "") -> list[bytes | None]:
        """A ballot for each vote of a request that has an envelope, None for one that is not plain; `markings` is
        option_id → `marking`, `idempotency_key` the envelope's."""
        assert compiled is not None, "no envelope without it"
        ballots: list[bytes | None] = compiled.mark(
            request, self._voters, markings, self._hashes, idempotency_key.encode()
        )
        return ballots


def by_range(ballots: list[bytes], ranges: int) -> list[list[bytes]]:
    """The ballots in each of so many (1 to 256) equal ranges of keys; within a range they stay in their order."""
    if compiled:
        parted: list[list[bytes]] = compiled.by_range(ballots, ranges)
        return parted
    parted = [[] for _ in range(ranges)]
    for ballot in ballots:
        parted[range_of(ballot, ranges)].append(ballot)
    return parted


def range_of(ballot: bytes, ranges: int) -> int:
    """The range that `by_range` puts a ballot in."""
    return ballot[0] * ranges // 256


def in_order(ballots: list[bytes]) -> list[bytes]:
    """The ballots in the order of their keys, as far as it matters: of keys that begin with the same 8 bytes any may be
    first."""
    if compiled:
        ordered: list[bytes] = compiled.in_order(ballots)
        return ordered
    return sorted(ballots)


def copy_rows(poll_no: int, batch_id: int, ballots: Sequence[bytes]) -> bytes:
    """The ballots as rows of the table votes (`copy_columns`), in Postgres' binary COPY format."""
    with_hash = any_keyed(ballots)
    lengths = set(map(len, ballots))
    before = b"".join(
        (
            len(KEYED_COPY_COLUMNS if with_hash else COPY_COLUMNS).to_bytes(2),
            (8).to_bytes(4) + batch_id.to_bytes(8),
            (4 + _ROW_KEY_BYTES).to_bytes(4) + poll_no.to_bytes(4),
        )
    )
    rows: Sequence[bytes | bytearray]
    if lengths in ({_SINGLE_BYTES}, {_SINGLE_BYTES + _HASH_BYTES}):
        rows = [_rows_of_equal_ballots(before, ballots, *lengths)]
    elif with_hash:
        rows = [
            before + ballot[:_ROW_KEY_BYTES] + ballot[KEY_BYTES:] + (b"" if len(ballot) % 2 else _COPY_NULL)
            for ballot in ballots
        ]
    else:
        rows = [before + ballot[:_ROW_KEY_BYTES] + ballot[KEY_BYTES:] for ballot in ballots]
    return b"".join((_COPY_HEADER, *rows, _COPY_TRAILER))


def _rows_of_equal_ballots(before: bytes, ballots: Sequence[bytes], length: int) -> bytearray:
    columns = b"".join(ballots)
    size = len(before) + length - KEY_BYTES + _ROW_KEY_BYTES
    rows = bytearray(before.ljust(size, b"\0") * len(ballots))
    kept = [*range(_ROW_KEY_BYTES), *range(KEY_BYTES, length)]
    for place, source in enumerate(kept, len(before)):
        rows[place::size] = columns[source::length]
    return rows


def votes_cast(
    batch_id: int,
    ballots: Sequence[bytes],
    weights: Mapping[bytes, int] | None = None,
    replaced: Mapping[bytes, bytes] | None = None,
) -> VotesCast:
    """The ballots as the event that tells of them.

    `weights` is `voter` → weight where votes are weighted; `replaced` is `voter` → choices of the vote whose place this
    one takes.
    """
    if any_keyed(ballots):
        ballots = [_without_hash(ballot) for ballot in ballots]
    columns = b"".join(ballots)
    if len(columns) == _SINGLE_BYTES * len(ballots) and weights is None and not replaced:
        return _single_choices(batch_id, columns, len(ballots))
    event = VotesCast(
        batch_id=batch_id, voter_keys=b"".join(ballot[:KEY_BYTES] for ballot in ballots), replaced=len(replaced or ())
    )
    counts = Counter[int]()
    several = False
    for ballot in ballots:
        key, numbers = voter(ballot), option_numbers(choices(ballot))
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
        event.weights.extend(weights[voter(ballot)] for ballot in ballots)
        event.replaced_weight = sum(weights[key] for key in replaced or ())
    event.count_changes.extend(
        CountChange(option_number=number, change=change) for number, change in sorted(counts.items())
    )
    return event


def voters(event: VotesCast) -> list[bytes]:
    """The `voter` of each vote in an event."""
    keys = event.voter_keys
    return [keys[start : start + _ROW_KEY_BYTES] for start in range(0, len(keys), KEY_BYTES)]


def _single_choices(batch_id: int, columns: bytes, votes: int) -> VotesCast:
    if votes == 1:
        # As most events where many polls have votes: slices with a stride would take ten times as long.
        number = int.from_bytes(columns[-_CHOICE_BYTES:])
        return VotesCast(batch_id=batch_id, voter_keys=columns[:KEY_BYTES], option_numbers=[number])
    keys = bytearray(KEY_BYTES * votes)
    for place in range(KEY_BYTES):
        keys[place::KEY_BYTES] = columns[place::_SINGLE_BYTES]
    high, low = columns[_SINGLE_BYTES - 2 :: _SINGLE_BYTES], columns[_SINGLE_BYTES - 1 :: _SINGLE_BYTES]
    numbers: Sequence[int] = low if not any(high) else [256 * h + n for h, n in zip(high, low, strict=True)]
    return VotesCast(batch_id=batch_id, voter_keys=bytes(keys), option_numbers=numbers)
