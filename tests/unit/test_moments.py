"""Moments as people write them on the command line."""

import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest

from clients.moments import coming_moment, duration, in_both_zones, moment


@pytest.fixture
def in_nepal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time is five hours and three quarters ahead of UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "NPT-05:45")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture
def in_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes a zone the local one."""

    def use(zone: str) -> None:
        monkeypatch.setenv("TZ", zone)
        time.tzset()

    with monkeypatch.context():
        yield use
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("in_nepal")
@pytest.mark.parametrize(
    "text",
    [
        "2026-05-01T20:15:00Z",
        "2026-05-01T22:15+02:00",
        "2026-05-01T22:15:00.000+02:00",
        "2026-05-02T02:00",
        "2026-05-02 02:00",
    ],
)
def test_a_moment_has_an_offset_or_is_in_local_time(text: str) -> None:
    assert moment(text) == datetime(2026, 5, 1, 20, 15, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"), [("+0s", 0), ("+90s", 90), ("+10m", 600), ("+1h30m", 5_400), ("+2d", 172_800)]
)
def test_a_duration_counts_from_now_on(text: str, seconds: int) -> None:
    before = datetime.now(UTC)
    found = moment(text) - timedelta(seconds=seconds)
    assert before <= found <= datetime.now(UTC)


def test_a_duration_is_as_long_as_it_says() -> None:
    assert duration("1h30m") == timedelta(minutes=90)
    for text in ("", "10", "+10m", "1m1h", "999999999999d"):
        with pytest.raises(ValueError, match=r"is not a length of time|is too long"):
            duration(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        *((text, "is not a time such as") for text in ("", "soon", "+", "+10", "10m", "-10m", "+m", "+1m1h", "20:15")),
        *((text, "is not a time such as") for text in ("+999999999999d", "2026-W18-5T20:15", "1777669200", "1.5.2026")),
        ("2026-05-01", "is a date: write the time too"),
        ("20260501", "is a date: write the time too"),
        ("2026-05-01T24:00", "hours end at 23"),
        ("2026-13-01T00:00", "month must be in 1..12"),
        ("2026-02-29T00:00", "day is out of range"),
        ("9999-12-31T23:59-14:00", "is not a time"),
        ("0001-01-01T00:00+14:00", "is not a time"),
    ],
)
def test_anything_else_is_no_moment(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        moment(text)


@pytest.mark.parametrize(
    ("zone", "text", "problem", "ways"),
    [
        (
            "Europe/Berlin",
            "2027-03-28T02:30",
            "does not exist",
            ("02:30+02:00", "02:30+01:00", "00:30:00Z", "01:30:00Z"),
        ),
        ("Europe/Berlin", "2026-10-25T02:30", "exists twice", ("02:30+02:00", "02:30+01:00", "00:30:00Z", "01:30:00Z")),
        ("America/New_York", "2026-11-01T01:30", "exists twice", ("01:30-04:00", "01:30-05:00", "EDT", "EST")),
        ("Australia/Lord_Howe", "2027-04-04T01:45", "exists twice", ("01:45+11:00", "01:45+10:30")),
        ("Pacific/Apia", "2011-12-30 12:00", "does not exist", ("12:00+14:00", "12:00-10:00")),
    ],
)
def test_a_local_time_that_a_change_of_the_clock_leaves_out_or_repeats_is_refused_with_what_to_write(
    in_zone: Callable[[str], None], zone: str, text: str, problem: str, ways: tuple[str, ...]
) -> None:
    in_zone(zone)
    with pytest.raises(ValueError, match=problem) as refused:
        moment(text)
    assert all(way in str(refused.value) for way in ways), refused.value
    for way in ways[:2]:
        assert moment(text + way[5:])


def test_the_hours_beside_a_change_of_the_clock_are_times(in_zone: Callable[[str], None]) -> None:
    in_zone("Europe/Berlin")
    for text, hour in {
        "2027-03-28T01:59": 0,
        "2027-03-28T03:00": 1,
        "2026-10-25T01:59": 23,
        "2026-10-25T03:00": 2,
    }.items():
        assert moment(text).astimezone(UTC).hour == hour


def test_what_is_to_come_has_not_passed(in_zone: Callable[[str], None]) -> None:
    in_zone("Europe/Berlin")
    with pytest.raises(ValueError, match=r"2020-06-01T12:00:00\+02:00 CEST = 2020-06-01T10:00:00Z has passed"):
        coming_moment("2020-06-01T12:00")
    assert coming_moment("+0s") <= datetime.now(UTC)
    assert in_both_zones(coming_moment("9999-12-31T23:59Z")) == "9999-12-31T23:59:00Z"
