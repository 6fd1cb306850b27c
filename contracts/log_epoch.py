"""The log epoch: names one history of the event log, so that versions of different histories are never compared.

A restore of the write database, or the promotion of a standby that lacks the last commits, makes the log hand out the
same versions again, with other content. So every position is a pair (log_epoch, version), compared in this order.
Epochs are UUIDs of version 7, which grow with time: `migrations/write/0006_log_epoch.sql` begins them.
"""

from typing import NamedTuple
from uuid import UUID

# The epoch of an installation that is older than epochs, and of everything that carries none.
ZERO = UUID(int=0)


def parse(text: str) -> UUID:
    """An epoch from its text form; the empty text stands for ZERO. Raises ValueError for anything else."""
    if not text:
        return ZERO
    epoch = UUID(text)
    if epoch != ZERO and epoch.version != 7:
        raise ValueError(f"not a log epoch: {text}")
    return epoch


def text(log_epoch: UUID) -> str:
    """An epoch as `parse` reads it, which is how messages carry it: empty for ZERO."""
    return "" if log_epoch == ZERO else str(log_epoch)


class LogPosition(NamedTuple):
    """How far a poll is in the log. Whole positions are compared: a later epoch is further, at whichever version."""

    log_epoch: UUID
    version: int


# Before the first event of any poll.
NOWHERE = LogPosition(ZERO, 0)
