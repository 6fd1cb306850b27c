"""What the projector and the query servers agree on about the read database, beyond its schema."""

from collections.abc import Sequence
from uuid import UUID

from contracts import log_epoch
from contracts.log_epoch import ZERO, LogPosition

# Turnout is counted by so many seconds: what GetTurnout answers is put together from these.
TURNOUT_GRAIN = 10

# What a vote's key has of its voter's: docs/adr/0008.
VOTER_BYTES = 12

# Where the projectors of all read models announce what they have committed, with NOTIFY.
CHANNEL = "tally_read_models"
VIEWS, DOCUMENTS = "views", "documents"
# Postgres allows 7,999 bytes in one; a poll takes up to 57.
_POLLS_OF_AN_ANNOUNCEMENT = 130


def vote_key(voter_key: bytes, poll_no: int) -> UUID:
    """The key of a voter's row in `votes`. Ascending poll_nos give ascending keys."""
    return UUID(bytes=voter_key[:VOTER_BYTES] + poll_no.to_bytes(4))


def announcements(read_model: str, versions: Sequence[tuple[str, int]], epoch: UUID = ZERO) -> list[str]:
    """What says that a read model has these polls at these versions of a log epoch."""
    head = f"{read_model} {log_epoch.text(epoch)}".rstrip()
    lines = [f"{poll_id} {version}" for poll_id, version in versions]
    starts = range(0, len(lines), _POLLS_OF_AN_ANNOUNCEMENT)
    return ["\n".join([head, *lines[start : start + _POLLS_OF_AN_ANNOUNCEMENT]]) for start in starts]


def parse_announcement(announcement: str) -> tuple[str, list[tuple[UUID, LogPosition]]]:
    """The read model, and its polls with how far they are. Raises ValueError for what is no announcement."""
    head, *lines = announcement.split("\n")
    read_model, _, epoch = head.partition(" ")
    parsed = log_epoch.parse(epoch)
    found = []
    for line in lines:
        poll_id, _, version = line.partition(" ")
        found.append((UUID(poll_id), LogPosition(parsed, int(version))))
    return read_model, found
