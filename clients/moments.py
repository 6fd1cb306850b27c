"""Moments as people write them."""

import re
from datetime import date, datetime, timedelta

_RELATIVE = re.compile(r"\+(?=\d)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def moment(text: str) -> datetime:
    """`2026-05-01T20:15+02:00`, without an offset in local time; `+90s`, `+10m`, `+1h30m` or `+2d` from now on.

    Raises ValueError for anything else.
    """
    try:
        if _RELATIVE.fullmatch(text):
            return datetime.now().astimezone() + duration(text[1:])
        if not _is_date(text):
            return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{text!r} is not a time such as 2026-05-01T20:15+02:00 or +10m")


def duration(text: str) -> timedelta:
    """`90s`, `10m`, `1h30m` or `2d`. Raises ValueError for anything else."""
    found = _RELATIVE.fullmatch(f"+{text}")
    if not found:
        raise ValueError(f"{text!r} is not a length of time such as 10m or 1h30m")
    days, hours, minutes, seconds = (int(number or 0) for number in found.groups())
    try:
        return timedelta(days, seconds, hours=hours, minutes=minutes)
    except OverflowError:
        raise ValueError(f"{text!r} is too long") from None


def _is_date(text: str) -> bool:
    # Whether a day begins or ends a poll is not for us to guess.
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True
