"""The stores of a server at its start: it serves once they are what its code needs, and says what is missing."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import structlog

from runtime.lifecycle import Backoff

log = structlog.get_logger()

# How often the same problem is said again.
_TELL_SECONDS = 30.0
_LONGEST_PAUSE_SECONDS = 2.0


class UnsupportedStore(ConnectionError):  # noqa: N818 - says what the store is
    """A store answers, and its version or its schema is not what this code needs; the message says what to do.

    Nothing is asked of such a store: to those who use it, it is one that does not answer.
    """


class Store(NamedTuple):
    """A store under the name that an operator knows. `check` returns what was found, in words; it raises one of
    `refusals` where an operator has to change something, and one of `failures` where the store is away."""

    name: str
    check: Callable[[], Awaitable[str]]
    refusals: tuple[type[Exception], ...]
    failures: tuple[type[Exception], ...]


class Notice:
    """Decides when a problem is logged: at once when it changes, and every 30 s while it stays the same."""

    def __init__(self) -> None:
        self._problem = ""
        self._logged_at = 0.0

    def is_due(self, problem: str) -> bool:
        """Whether this problem is to be logged now; '' says that there is none."""
        now = time.monotonic()
        if problem == self._problem and now - self._logged_at < _TELL_SECONDS:
            return False
        self._problem, self._logged_at = problem, now
        return bool(problem)


class _Outcome(NamedTuple):
    """What a check found: in words, and whether the store can be used, or is only away."""

    words: str
    usable: bool
    away: bool = False


async def until_supported(stores: Sequence[Store]) -> None:
    """Returns once one of the stores is as the code needs it and each of the others is so, too, or is away.

    So a server does not wait for a store that it can do without, and takes no calls while a store answers and is the
    wrong one. It is asked until that is corrected.
    """
    notices = [Notice() for _ in stores]
    backoff = Backoff(first=0.1, longest=_LONGEST_PAUSE_SECONDS)
    while True:
        outcomes = await asyncio.gather(*map(_check, stores))
        for store, outcome, notice in zip(stores, outcomes, notices, strict=True):
            if notice.is_due("" if outcome.usable else outcome.words):
                log.error(f"{store.name} cannot be used", reason=outcome.words, failures=backoff.failures + 1)
        unusable = [outcome for outcome in outcomes if not outcome.usable]
        if all(outcome.away for outcome in unusable) and (not stores or len(unusable) < len(stores)):
            found = {store.name: outcome.words for store, outcome in zip(stores, outcomes, strict=True)}
            log.debug("the stores can be used", **found)
            return
        await backoff.wait()


async def _check(store: Store) -> _Outcome:
    try:
        return _Outcome(await store.check(), usable=True)
    except store.refusals as error:
        return _Outcome(_words(error), usable=False)
    except store.failures as error:
        return _Outcome(_words(error), usable=False, away=True)


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
