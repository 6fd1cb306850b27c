"""The polls of which an event is missing: nothing is applied after a gap, and the relay is asked to fill it."""

from dataclasses import dataclass

from projector.stream import Position

_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 5.0


@dataclass(slots=True)
class _Gap:
    missing: int
    # The highest version that was seen beyond the gap.
    seen: int
    # What was applied of the stream before the gap came; None where the stream need not be read again from there.
    before: Position | None
    ask_at: float = 0.0
    pause: float = _FIRST_PAUSE_SECONDS


class Gaps:
    """Which version of which poll is missing, and when it is time to ask for it (again)."""

    def __init__(self) -> None:
        self._gaps: dict[str, _Gap] = {}

    def __len__(self) -> int:
        return len(self._gaps)

    @property
    def before_all(self) -> Position | None:
        """Where a restart has to resume the stream so that it meets the oldest gap again; None: anywhere."""
        return next((gap.before for gap in self._gaps.values() if gap.before), None)

    @property
    def hopeful(self) -> bool:
        """Whether one of them may still be filled: the relay was not asked in vain for long."""
        return any(gap.pause < _LONGEST_PAUSE_SECONDS for gap in self._gaps.values())

    def reopen(self, poll_id: str, missing: int, seen: int) -> None:
        """Asks for a version once more that was missing before, and is remembered elsewhere."""
        self._gaps[poll_id] = _Gap(missing, seen, None)

    def update(self, poll_id: str, version: int, beyond: int, before: Position, now: float) -> bool:
        """Notes that a poll has come to `version` while `beyond` was seen (0: nothing); says if a gap opened."""
        gap = self._gaps.get(poll_id)
        if gap is None:
            if beyond > version:
                self._gaps[poll_id] = _Gap(version + 1, beyond, before)
                return True
            return False
        gap.seen = max(gap.seen, beyond)
        if gap.seen <= version:
            del self._gaps[poll_id]
        elif gap.missing <= version:
            # Part of it came: the relay is there.
            gap.missing = version + 1
            gap.pause = _FIRST_PAUSE_SECONDS
            gap.ask_at = min(gap.ask_at, now + gap.pause)
        return False

    def forget(self, poll_id: str) -> None:
        self._gaps.pop(poll_id, None)

    def due(self, now: float, most: int) -> list[tuple[str, int]]:
        """The polls, up to `most`, and the first missing version of each, that are to be asked for now."""
        due = []
        for poll_id, gap in self._gaps.items():
            if gap.ask_at <= now:
                due.append((poll_id, gap.missing))
                gap.ask_at = now + gap.pause
                gap.pause = min(gap.pause * 2, _LONGEST_PAUSE_SECONDS)
                if len(due) == most:
                    break
        return due
