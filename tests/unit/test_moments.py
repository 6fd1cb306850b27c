"""Moments as people write them on the command line."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from clients.moments import duration, moment


@pytest.fixture
def in_nepal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time is five hours and three quarters ahead of UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "NPT-05:45")
        time.tzset()
        yield
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
    "text",
    [
        "",
        "soon",
        "+",
        "+10",
        "10m",
        "-10m",
        "+m",
        "+1m1h",
        "+999999999999d",
        "2026-05-01",
        "20260501",
        "20:15",
        "2026-13-01T00:00",
    ],
)
def test_anything_else_is_no_moment(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time such as"):
        moment(text)
