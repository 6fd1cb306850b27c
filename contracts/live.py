"""Names in Redis: the live counters, which exist in copies so that they can be rebuilt while they are read.

Each copy has a name, its generation, and everything that belongs to it is called `tally:live:<generation>:…`.
GENERATION_KEY names the one copy that readers read and the projector writes: whoever changes that key switches to
another copy. Where there is no such key, as in an empty Redis, it is FIRST_GENERATION.

In a copy each poll is one hash, `live_key`: `version` is the latest event it contains, `results` a serialized
tally.query.v1.GetResultsResponse (which has the same bytes as a WatchResultsResponse). Each change is published on
`live_channel`, the same whatever the copy, as those same bytes: so the counters are encoded once, whatever the number
of readers.

A copy that begins from nothing, as after Redis was wiped, is filled from the oldest event on. Until it has everything
that there was when it began it is not for readers: `filling_key` says so, nothing is published, and an empty message
on each channel tells who is subscribed that Redis has nothing to say for now.

While a poll hides its results, `results`, and what is published, is `hidden_results` in their place: no query server
ever holds what it must not tell. The projector keeps what it counts on from in `counted`, which nobody else reads.
"""

import re
from struct import Struct
from uuid import UUID

from contracts import log_epoch
from contracts.log_epoch import ZERO, LogPosition

GENERATION_KEY = "tally:live:generation"
FIRST_GENERATION = "0"
# The copy that a rebuild is making.
FRESH_GENERATION_KEY = "tally:live:fresh-generation"

# What the projector says of itself and of the copy in use: a serialized tally.query.v1.GetReadModelStatusResponse; see
# contracts/status.py.
STATUS_KEY = "tally:live:status"

# The deployment that this Redis belongs to, a UUID: a projector of another one writes nothing here.
DEPLOYMENT_KEY = "tally:live:deployment"

# More digits are no number that a stream counts with.
_MAX_DIGITS = 18
_GENERATION = re.compile(rb"[0-9a-f]{1,32}")


def parse_generation(value: bytes | None) -> str:
    """The copy that GENERATION_KEY or FRESH_GENERATION_KEY names. Raises ValueError for what is no name of a copy."""
    if value is None:
        return FIRST_GENERATION
    if not _GENERATION.fullmatch(value):
        raise ValueError(f"not a generation: {value[:40]!r}")
    return value.decode()


def position_key(generation: str) -> str:
    """How far into the stream a copy is, and of which log epoch, as `dump_position` writes it."""
    return f"tally:live:{generation}:position"


def dump_position(sequence: int, stored_at: int, epoch: UUID) -> str:
    """A position in the stream: `<sequence> <stored_at> <log_epoch>`, without the epoch where it is ZERO. The columns
    of stream_position in migrations/read/views/0001_views.sql are the same."""
    return f"{sequence} {stored_at} {log_epoch.text(epoch)}".rstrip()


def parse_position(value: bytes) -> tuple[int, int, UUID]:
    """What `dump_position` wrote: sequence, stored_at, log_epoch. Raises ValueError for anything else."""
    match value.decode("ascii").split(" "):
        case [sequence, stored_at]:
            epoch = ""
        case [sequence, stored_at, epoch]:
            pass
        case _:
            raise ValueError(f"not a position: {value[:40]!r}")
    if not (sequence.isdigit() and stored_at.isdigit() and max(len(sequence), len(stored_at)) <= _MAX_DIGITS):
        raise ValueError(f"not a position: {value[:40]!r}")
    return int(sequence), int(stored_at), log_epoch.parse(epoch)


def epoch_of(position: bytes) -> UUID:
    """The log epoch that a copy is made from, in what is at its `position_key`. Raises ValueError as above."""
    return parse_position(position)[2]


def frozen_key(generation: str) -> str:
    """While there is this key, nothing in a copy is changed: it is about to be replaced."""
    return f"tally:live:{generation}:frozen"


def filling_key(generation: str) -> str:
    """While there is this key, readers find nothing in a copy. query_server/live.lua makes this name, too."""
    return f"tally:live:{generation}:filling"


def dead_letters_key(generation: str) -> str:
    """The hash of the polls that stand still in a copy: poll_id → contracts.dead_letters.DeadLetter."""
    return f"tally:live:{generation}:dead-letters"


def set_aside_key(generation: str, poll_id: UUID | str) -> str:
    """Where the hash of a poll is kept for some days that could not be read, and was made anew."""
    return f"tally:live:{generation}:set-aside-{poll_id}"


def live_key(generation: str, poll_id: UUID | str) -> str:
    """The hash of a poll's live counters. query_server/live.lua makes this name, too."""
    return f"tally:live:{generation}:{poll_id}"


def live_channel(poll_id: UUID | str, database: int = 0) -> str:
    """The channel of a poll's live counters. `database`: the number in the address of Redis. Keys belong to a database,
    channels do not: two copies of one installation, in two databases of one Redis, must not hear each other."""
    return f"tally:{database}:live:{poll_id}" if database else f"tally:live:{poll_id}"


# No protobuf message begins with a zero byte. Of a log without epochs there is the version only.
_HIDDEN = Struct(">xQ")
_EPOCH_BYTES = 16


def hidden_results(version: int, epoch: UUID = ZERO) -> bytes:
    """What stands in the place of the results of a poll that hides them."""
    return _HIDDEN.pack(version) + (b"" if epoch == ZERO else epoch.bytes)


def are_hidden(results: bytes) -> bool:
    """Whether these are `hidden_results`."""
    return results.startswith(b"\0")


def hidden_position(results: bytes) -> LogPosition:
    """The position in `hidden_results`. Raises ValueError for what only begins like them."""
    epoch = results[_HIDDEN.size :]
    if len(results) < _HIDDEN.size or len(epoch) not in (0, _EPOCH_BYTES):
        raise ValueError("neither results nor hidden ones")
    (version,) = _HIDDEN.unpack_from(results)
    return LogPosition(UUID(bytes=epoch) if epoch else ZERO, version)
