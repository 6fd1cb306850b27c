"""The comparison of a read model with the event log: what the read model lacks, and the stream does not have, is here.

It goes over the polls by their number, page by page, for as long as the projector runs. Where something is known to be
missing, because the read model began empty or the stream does not have what follows the position, it goes without
pauses: an empty read model is filled this way, many polls at a time. Otherwise it takes a small share of the time, and
finds what was lost unnoticed: a key that Redis evicted, a row that somebody removed.

The log is read beside the stream. It may be away for any time: then the relay is asked for what is missing, and the
comparison goes on when the log is back.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC
from typing import TypeVar
from uuid import UUID

import asyncpg
import structlog
from prometheus_client import Counter, Gauge

from projector import event_log
from projector.event_log import EventLog, Incomplete, LoggedPoll
from projector.fold import Tally
from projector.read_model import Outdated
from projector.session import Session
from runtime import postgres
from runtime.lifecycle import Backoff

log = structlog.get_logger()

# What the event log raises when it is away, or not migrated yet.
LOG_FAILURES = (*postgres.UNAVAILABLE, asyncpg.PostgresError)
CONNECT_SECONDS = 3.0

# A page has as many polls as are compared in about this time, with and without haste: the events on the stream wait for
# it, and large polls must not fill the memory.
_URGENT_PAGE_SECONDS, _PAGE_SECONDS = 0.2, 0.02
_SMALLEST_PAGE, _LARGEST_PAGE = 20, 1000
# While nothing is known to be missing, a page is followed by a pause of this many times what it took, and all pages by
# one of this many seconds.
_PAUSE_FACTOR = 20
_PAUSE_SECONDS = 5.0
# How long an event may be on its way through the stream before it is taken from the log.
_ON_ITS_WAY_SECONDS = 1.0
# How long a log that contradicts the read model may take to begin a new epoch, as its relay has it do.
_EPOCH_SECONDS = 20.0
_PROGRESS_SECONDS = 5.0
# Polls whose missing events are read together.
WANTED = 1000

_LABELS = ["read_model"]
_compared = Counter("tally_projector_compared_polls", "Polls that were compared with the event log.", _LABELS)
_recovered = Counter("tally_projector_log_events", "Events that came from the event log, not the stream.", _LABELS)
_connected = Gauge("tally_projector_log_connected", "1 while the event log can be read, 0 while not.", _LABELS)

T = TypeVar("T")


class _Away(Exception):  # noqa: N818 - says what the log is
    """The event log does not answer, or is not the one to read."""


class Comparison:
    """Brings what a session's read model lacks from the event log, while `run` runs."""

    def __init__(
        self, session: Session, read_model: str, write_dsn: str, ask_relay: Callable[[str, int], Awaitable[None]]
    ) -> None:
        """`ask_relay` has the relay look at a poll from a version on."""
        self._session = session
        self._read_model = read_model
        self._write_dsn = write_dsn
        self._ask_relay = ask_relay
        # Whether the event log answers: then the relay need not be asked for what is missing. None: not known yet.
        self.available: bool | None = None
        # Whether something is known to be missing, and the stored position held until it is found.
        self.urgent = False
        # Whether the stream is read up to its end.
        self.caught_up = False
        self._wanted: dict[str, None] = {}
        self._wake = asyncio.Event()
        # The polls up to this number are compared.
        self._after = 0
        self._page = _SMALLEST_PAGE
        # Of the comparison that is under way: the events of all polls (None: unknown), those of the polls that are
        # compared, and those that the read model lacked.
        self._total: int | None = None
        self._passed = self._events = 0
        self._started_at = self._told_at = 0.0

    def hurry(self) -> None:
        """Compares all polls from the first one on, without pauses: something may be missing anywhere."""
        if not self.urgent:
            log.info("comparing with the event log: events may be missing", read_model=self._read_model)
            self._session.hold()
        self.urgent = True
        self._after = self._passed = self._events = 0
        self._total = None
        self._started_at = self._told_at = time.monotonic()
        self._wake.set()

    def want(self, poll_ids: Iterable[str]) -> None:
        """Compares these polls next."""
        self._wanted.update(dict.fromkeys(poll_ids))
        self._wake.set()

    @property
    def lacking(self) -> int | None:
        """About how many events of the log are not compared yet, while that is `urgent`; None: unknown."""
        return None if self._total is None else max(self._total - self._passed, 0)

    async def run(self) -> None:
        """Compares until it is cancelled. Raises Outdated, or what the read model raises."""
        backoff = Backoff(first=0.2)
        while True:
            try:
                async with AsyncExitStack() as stack:
                    connection = event_log.connect(self._write_dsn, f"projector {self._read_model}", CONNECT_SECONDS)
                    source = await _from_log(stack.enter_async_context(connection))
                    self._check_epoch(source.origin.log_epoch)
                    self._set_available(True)
                    while True:
                        await self._step(source)
                        backoff.reset()
            except _Away as error:
                log.warning("the event log cannot be read", error=str(error), failures=backoff.failures + 1)
            finally:
                self._set_available(False)
            await backoff.wait()

    async def _step(self, source: EventLog) -> None:
        """Compares the polls that are wanted, or else a page; both while something is known to be missing.

        The relay may make polls wanted as fast as they are brought, and a page brings many.
        """
        if self._wanted:
            wanted = list(self._wanted)[:WANTED]
            for poll_id in wanted:
                del self._wanted[poll_id]
            polls = await _from_log(source.polls(wanted))
            await self._bring(source, polls, await self._look(polls), wanted=True)
            if not self.urgent:
                return
        if self.urgent:
            await self._page_of(source)
        elif not self.caught_up:
            # What is missing may be in the stream.
            await self._pause(_ON_ITS_WAY_SECONDS)
        else:
            started = time.monotonic()
            await self._page_of(source)
            await self._pause((time.monotonic() - started) * _PAUSE_FACTOR if self._after else _PAUSE_SECONDS)

    async def _page_of(self, source: EventLog) -> None:
        """Compares the next polls; after the last one it begins again with the first."""
        started, after = time.monotonic(), self._after
        if not after:
            self._check_epoch(await _from_log(source.log_epoch()))
            if self.urgent:
                _, self._total = await _from_log(source.size())
        page = await _from_log(source.page(after, self._page))
        if not page:
            await self._end()
            return
        # What waits for the relay comes by itself.
        polls = [poll for poll, waiting in page if self.urgent or not waiting]
        tallies = await self._look(polls)
        goal = _URGENT_PAGE_SECONDS if self.urgent else _PAGE_SECONDS
        fitting = int(self._page * goal / (time.monotonic() - started)) + 1
        self._page = max(_SMALLEST_PAGE, min(_LARGEST_PAGE, self._page * 2, fitting))
        lacking = _differing(polls, tallies)
        if lacking and not self.urgent:
            await self._pause(_ON_ITS_WAY_SECONDS)
            tallies = await self._look(lacking)
        await self._bring(source, lacking, tallies)
        _compared.labels(self._read_model).inc(len(page))
        # Unless it was told to begin anew meanwhile.
        if self._after == after:
            self._after = page[-1][0].poll_no
            self._passed += sum(poll.version for poll, _ in page)
        self._tell()

    async def _end(self) -> None:
        if self.urgent:
            await self._session.release()
            seconds = time.monotonic() - self._started_at
            log.info(
                "the read model has what the event log had",
                read_model=self._read_model,
                events=self._events,
                seconds=round(seconds, 1),
            )
        self.urgent = False
        self._after = 0

    async def _look(self, polls: Collection[LoggedPoll]) -> dict[str, Tally]:
        """Those of the polls that the read model has."""
        return await self._session.look([str(poll.poll_id) for poll in polls])

    async def _bring(
        self, source: EventLog, polls: Collection[LoggedPoll], tallies: dict[str, Tally], *, wanted: bool = False
    ) -> None:
        """Applies the events of polls that the read model lacks, which has them as they are in `tallies`."""
        polls = _differing(polls, tallies)
        if contradicting := await self._contradicting(source, polls, tallies):
            await self._settle(source, contradicting)
            return
        known: dict[UUID, int] = {}
        for poll in polls:
            poll_id = str(poll.poll_id)
            version = tallies[poll_id].version if poll_id in tallies else 0
            if wanted or not self._session.stands_still(poll_id, version):
                known[poll.poll_id] = version
        await self._apply(source, [poll for poll in polls if poll.poll_id in known], known)

    async def _apply(self, source: EventLog, polls: Sequence[LoggedPoll], known: dict[UUID, int]) -> None:
        chunks = source.events(polls, known)
        try:
            while messages := await _from_log(anext(chunks, None)):
                await self._session.apply(messages)
                self._events += len(messages)
                _recovered.labels(self._read_model).inc(len(messages))
                self._tell()
        except Incomplete as error:
            # The others of the page are not to suffer.
            if len(polls) == 1:
                log.error("the event log lacks events of a poll", poll_id=str(polls[0].poll_id), error=str(error))
                return
            for poll in polls:
                await self._apply(source, [poll], known)

    async def _contradicting(
        self, source: EventLog, polls: Collection[LoggedPoll], tallies: dict[str, Tally]
    ) -> list[LoggedPoll]:
        """The polls whose latest event in the read model is not in the log, or is another one there."""
        # Of a poll that was archived, the log has only the latest events.
        have = {
            poll: tally
            for poll in polls
            if (tally := tallies.get(str(poll.poll_id))) and tally.version >= poll.snapshot_version
        }
        if not have:
            return []
        logged = await _from_log(source.recorded_at({poll.poll_no: tally.version for poll, tally in have.items()}))
        return [poll for poll, tally in have.items() if logged.get(poll.poll_no) != tally.as_of.ToDatetime(UTC)]

    async def _settle(self, source: EventLog, polls: Collection[LoggedPoll]) -> None:
        """Waits until the log begins a new epoch, or does not contradict the read model. Raises Outdated."""
        started = time.monotonic()
        while True:
            tallies = await self._look(polls)
            polls = await self._contradicting(source, polls, tallies)
            if not polls:
                self._set_available(True)
                return
            self._check_epoch(await _from_log(source.log_epoch()))
            poll_id = str(next(iter(polls)).poll_id)
            version = tallies[poll_id].version
            if self.available:
                log.error(
                    "the event log contradicts the read model: it is of another history",
                    read_model=self._read_model,
                    polls=len(polls),
                    poll_id=poll_id,
                    version=version,
                )
            self._set_available(False)
            if time.monotonic() - started > _EPOCH_SECONDS:
                raise Outdated(f"version {version} of poll {poll_id} is not the event that the log has")
            await self._ask_relay(poll_id, version + 1)
            await asyncio.sleep(_ON_ITS_WAY_SECONDS)

    def _check_epoch(self, logged: UUID | None) -> None:
        """Raises Outdated where the log is of a later epoch than the read model, _Away where of an earlier one."""
        if logged is None or logged == self._session.log_epoch:
            return
        if logged > self._session.log_epoch:
            raise Outdated(f"the event log is of the epoch {logged}, the read model of {self._session.log_epoch}")
        raise _Away(f"TALLY_WRITE_DSN is of an earlier log epoch than the read model: {logged}")

    def _set_available(self, available: bool) -> None:
        self.available = available
        _connected.labels(self._read_model).set(available)

    def _tell(self) -> None:
        """Says in the log, every few seconds, how far it is."""
        now = time.monotonic()
        if self.urgent and now - self._told_at >= _PROGRESS_SECONDS:
            self._told_at = now
            log.info(
                "comparing with the event log",
                read_model=self._read_model,
                events=self._passed,
                of=self._total,
                missing=self._events,
            )

    async def _pause(self, seconds: float) -> None:
        self._wake.clear()
        if self._wanted:
            return
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass


def _differing(polls: Collection[LoggedPoll], tallies: dict[str, Tally]) -> list[LoggedPoll]:
    """The polls that are not in the read model as they are in the log."""
    return [poll for poll in polls if not _is_same(poll, tallies.get(str(poll.poll_id)))]


def _is_same(poll: LoggedPoll, tally: Tally | None) -> bool:
    return bool(tally and tally.version == poll.version and tally.as_of.ToDatetime(UTC) == poll.recorded_at)


async def _from_log(question: Awaitable[T]) -> T:
    try:
        return await question
    except LOG_FAILURES as error:
        raise _Away(repr(error)) from error
