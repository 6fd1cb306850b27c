"""Moments as people write them, and as they are shown: never guessed."""

import re
from datetime import UTC, datetime, timedelta

_RELATIVE = re.compile(r"\+(?=\d)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_DATE = re.compile(r"\d{4}-\d\d-\d\d|\d{8}")
# Our own form, as what fromisoformat takes differs between versions of Python: since 3.13 also 24:00.
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?)([Zz]|[+-]\d\d:\d\d)?")
_EXAMPLES = "such as 2026-05-01T20:15+02:00 or +10m"


def moment(text: str) -> datetime:
    """`2026-05-01T20:15+02:00`, without an offset in local time; `+90s`, `+10m`, `+1h30m` or `+2d` from now on.

    Raises ValueError for anything else, also for a local time that a change of the clock leaves out or repeats.
    """
    if _RELATIVE.fullmatch(text):
        try:
            return datetime.now().astimezone() + duration(text[1:])
        except (ValueError, OverflowError):
            raise ValueError(f"{text!r} is not a time {_EXAMPLES}") from None
    if _DATE.fullmatch(text):
        raise ValueError(f"{text!r} is a date: write the time too; a day begins at 00:00 and ends at 00:00 of the next")
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not a time {_EXAMPLES}")
    date, time, offset = found.groups()
    if time.startswith("24"):
        raise ValueError(f"{text!r}: hours end at 23; write the end of a day as 00:00 of the next")
    try:
        written = datetime.fromisoformat(f"{date}T{time}{(offset or '').upper().replace('Z', '+00:00')}")
        # Where the clock is changed around then, the offset before the change and the one after it.
        places = [written] if offset else [written.replace(fold=fold).astimezone() for fold in (0, 1)]
        # At the ends of the calendar UTC may have no year for it.
        written.replace(tzinfo=places[0].tzinfo).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{text!r} is not a time: {error}") from None
    if len({place.utcoffset() for place in places}) == 1:
        return places[0]
    meant = sorted(written.replace(tzinfo=place.tzinfo) for place in places)
    exists = "exists twice" if places[0].replace(tzinfo=None) == written else "does not exist"
    ways = " or ".join(f"{when.isoformat(timespec='minutes')} ({in_both_zones(when)})" for when in meant)
    raise ValueError(f"{text!r} {exists} in local time, as the clock is changed then: write {ways}")


def coming_moment(text: str) -> datetime:
    """A `moment` that has not passed, for what is to happen then. Raises ValueError."""
    when = moment(text)
    if not text.startswith("+") and when <= (now := datetime.now(UTC)):
        raise ValueError(f"{in_both_zones(when)} has passed; now it is {now:%Y-%m-%dT%H:%M:%SZ}")
    return when


def in_both_zones(when: datetime) -> str:
    """An instant in local time and in UTC: `2026-05-01T22:15:00+02:00 CEST = 2026-05-01T20:15:00Z`."""
    utc = when.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="seconds") + "Z"
    try:
        local = when.astimezone()
    except (ValueError, OverflowError):
        # At the ends of the calendar local time may have no year for it.
        return utc
    return f"{local.isoformat(timespec='seconds')} {local:%Z} = {utc}"


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
