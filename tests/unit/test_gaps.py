from projector.gaps import Gaps
from projector.stream import BEGINNING


def test_a_gap_that_the_relay_was_long_asked_to_fill_is_hopeless() -> None:
    gaps, now = Gaps(), 0.0
    assert not gaps.hopeful
    gaps.update("poll", 1, 3, BEGINNING, now)
    asked = 0
    while gaps.hopeful:
        asked += len(gaps.due(now, 100))
        now += 0.1
    assert (asked, 3 < now < 10) == (5, True)
    # Part of it comes after all.
    gaps.update("poll", 2, 3, BEGINNING, now)
    assert gaps.hopeful
