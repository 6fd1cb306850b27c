"""What this server has answered: how far each poll was, so that no later answer shows less.

A store can go back: it loses a poll, comes back as an older copy, or another standby is read that is further behind.
Callers were promised that versions never go backwards.
"""

from uuid import UUID

from contracts.log_epoch import NOWHERE, ZERO, LogPosition

# How many polls are remembered; each takes 16 bytes, whether or not it is there.
_POLLS = 1 << 18
# How many places a row of the table has. A poll's row and its key, 8 bytes, are taken from the random part of its id;
# in the same place of another table are 2 bytes for its log epoch and 6 for its version. The poll of a row that was
# answered last comes first, and the one that was answered longest ago is forgotten where the row is full.
_PLACES = 8
_BYTES = 8
_ROW = _PLACES * _BYTES
_VERSION_BITS = 48
_EPOCHS = 1 << 16


class Answered:
    """The latest position of each of the polls that were answered last."""

    def __init__(self, polls: int = _POLLS) -> None:
        self._rows = max(polls // _PLACES, 1)
        self._polls = bytearray(self._rows * _ROW)
        self._positions = bytearray(self._rows * _ROW)
        # By the number that stands for them.
        self._epochs = [ZERO]
        self._numbers = {ZERO: 0}

    def position(self, poll_id: UUID) -> LogPosition:
        """How far the poll was in the latest answer; NOWHERE if none is remembered."""
        _, _, place = self._find(poll_id)
        return self._read(place) if place >= 0 else NOWHERE

    def note(self, poll_id: UUID, position: LogPosition) -> None:
        """The poll was answered at this position; one below an earlier answer changes nothing.

        Version 0 stands for no such poll, which is remembered only where there was one.
        """
        key, row, place = self._find(poll_id)
        if place < 0 and not position.version:
            return
        known = self._read(place) if place >= 0 else NOWHERE
        if place == row and known >= position:
            return
        if place < 0:
            place = row + _ROW - _BYTES
        position = max(position, known)
        number = self._number(position.log_epoch) << _VERSION_BITS | position.version
        self._polls[row : place + _BYTES] = key + self._polls[row:place]
        self._positions[row : place + _BYTES] = number.to_bytes(_BYTES) + self._positions[row:place]

    def _find(self, poll_id: UUID) -> tuple[bytes, int, int]:
        """The poll's key, where its row begins, and where in the table it is: below 0 if it is not there."""
        key = (poll_id.int & 0xFFFF_FFFF_FFFF_FFFF).to_bytes(_BYTES)
        row = poll_id.int % self._rows * _ROW
        place = self._polls.find(key, row, row + _ROW)
        while place >= 0 and (place - row) % _BYTES:
            place = self._polls.find(key, place + 1, row + _ROW)
        return key, row, place

    def _read(self, place: int) -> LogPosition:
        number = int.from_bytes(self._positions[place : place + _BYTES])
        return LogPosition(self._epochs[number >> _VERSION_BITS], number & (1 << _VERSION_BITS) - 1)

    def _number(self, log_epoch: UUID) -> int:
        number = self._numbers.get(log_epoch)
        if number is None:
            if len(self._epochs) == _EPOCHS:
                # No log has that many histories; all else that is remembered is given up.
                self._polls[:] = bytes(len(self._polls))
                self._epochs, self._numbers = [ZERO], {ZERO: 0}
            number = self._numbers[log_epoch] = len(self._epochs)
            self._epochs.append(log_epoch)
        return number
