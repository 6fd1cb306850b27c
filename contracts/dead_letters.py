"""Dead letters: an event that a read model cannot apply stops its poll there, and is kept with the read model's data.

A poll has one at most in each read model, because nothing after it is applied. In the read database it is a row of
`dead_letters`; in Redis a field of one hash, contracts.live.dead_letters_key, as JSON.
"""

import json
from base64 import b64decode, b64encode
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

# What is kept of an event, and of an error. The event log has the whole.
MAX_DATA_BYTES = 1024
MAX_ERROR_CHARACTERS = 500

UNREADABLE = "unreadable"


class DeadLetter(NamedTuple):
    """An event that cannot be applied, and what is known about it."""

    poll_id: str
    # The event's; the poll stands at the version before.
    version: int
    # The latest version of the poll that has come: latest - version events wait.
    latest: int
    # The message on the stream that brought the event; 0: it came from the event log.
    stream_sequence: int
    # The name of the change in tally.event.v1.Event, `field 99` for one that is unknown here, or `unreadable`.
    event_type: str
    error: str
    # When this event could not be applied for the first time, by the projector's clock.
    first_seen: datetime
    # The beginning of the message.
    data: bytes

    @property
    def waiting(self) -> int:
        """How many later events of the poll have come, and wait."""
        return self.latest - self.version


def dump(letter: DeadLetter) -> bytes:
    """A dead letter as Redis keeps it."""
    fields = letter._asdict() | {"first_seen": letter.first_seen.isoformat(), "data": b64encode(letter.data).decode()}
    return json.dumps(fields).encode()


def parse(value: bytes | str) -> DeadLetter:
    """What `dump` made. Raises ValueError for anything else."""
    try:
        fields = json.loads(value)
        fields |= {"first_seen": datetime.fromisoformat(fields["first_seen"]), "data": b64decode(fields["data"])}
        letter = DeadLetter(**fields)
        UUID(letter.poll_id)
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a dead letter: {value[:200]!r}") from error
    numbers = (letter.version, letter.latest, letter.stream_sequence)
    if not all(isinstance(number, int) for number in numbers) or not 1 <= letter.version <= letter.latest:
        raise ValueError(f"not a dead letter: {value[:200]!r}")
    return letter
