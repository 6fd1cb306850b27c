"""The life of a read model: events come from the stream, are added up, and are stored together with the position.

A failure of any kind ends the session: the connections are closed, and after a pause everything begins anew from the
position that the read model holds. So there is one way to recover, whatever broke. What the stream does not have comes
from the event log (projector/comparison.py); without TALLY_WRITE_DSN the relay is asked to publish it again. A read
model of another history of the log is made anew beside itself (projector/rebuild.py).
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from uuid import UUID

import structlog
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError
from prometheus_client import Counter

from contracts import log_epoch
from contracts.bus import REPUBLISH, republish_request
from contracts.status import REPORT_SECONDS
from projector import event_log, stream
from projector.comparison import CONNECT_SECONDS, LOG_FAILURES, WANTED, Comparison
from projector.event_log import Incomplete
from projector.progress import Progress
from projector.read_model import Displaced, Outdated, ReadModel, Replaced
from projector.rebuild import Rebuild, copies
from projector.session import Session
from projector.stream import BEGINNING, Origin, Position
from runtime import nats
from runtime.lifecycle import Backoff, reasons
from runtime.stores import Notice, UnsupportedStore

log = structlog.get_logger()

# How often a quiet projector looks whether the read model is still as it left it, and asks again for what is missing.
_LOOK_SECONDS = 0.2
_CHECK_SECONDS = 1.0
_GOOD_SESSION_SECONDS = 10.0
# Requests that go to the relay at once; the others follow.
_REQUESTS = 100
# How often all polls are compared at most because the stream has removed messages before they were read: with a limit
# for each poll it does so all the time, and then a later event of the same poll shows that one is missing.
_SKIPPED_SECONDS = 60.0
# A read model that is made anew from the stream alone has all of it when nothing has come for so long.
_QUIET_SECONDS = 15.0
# How long a relay may take to name the history of the events on a stream that it has made.
_NAMED_SECONDS = 3.0

_LABELS = ["read_model"]
_requests = Counter("tally_projector_republish_requests", "Requests to publish events again.", _LABELS)
_failures = Counter("tally_projector_failures", "Sessions that ended by a failure.", _LABELS)
_rebuilds = Counter("tally_projector_rebuilds", "Times that the read model was made anew beside itself.", _LABELS)


class Foreign(Exception):  # noqa: N818 - says what the stores are
    """The stores belong to different deployments: nothing is written until that is corrected."""


class Unsuitable(Exception):  # noqa: N818 - says what the log is
    """The read model cannot be made from this event log, or not now."""


class Projection:
    """Keeps one read model up to the stream; `store` is where it is, `ready` is called when events are applied.

    `write_dsn` is the event log's; empty: what the stream does not have is asked for from the relay.
    """

    def __init__(
        self, kind: type[ReadModel], store: str, nats_url: str, write_dsn: str, ready: Callable[[], None]
    ) -> None:
        self._kind = kind
        self._store = store
        self._nats_url = nats_url
        self._write_dsn = write_dsn
        self._ready = ready
        # Whether the polls that stood still when this process began were tried again.
        self._retried = False
        # Whether the store is known to be another deployment's.
        self._foreign = False
        # Since when the stream is known that does not name the history of its events.
        self._unnamed_since = 0.0
        self._progress = Progress(kind.name)
        self._notice, self._report_notice = Notice(), Notice()

    async def run(self, stop: asyncio.Event) -> None:
        """Applies events until `stop` is set and the current batch is stored."""
        async with asyncio.TaskGroup() as tasks:
            reporting = tasks.create_task(self._report())
            await self._project(stop)
            reporting.cancel()

    async def _project(self, stop: asyncio.Event) -> None:
        expected: tuple[type[Exception], ...] = (
            *(*nats.UNAVAILABLE, *self._kind.failures, *LOG_FAILURES),
            *(Displaced, Foreign, Unsuitable, Incomplete),
        )
        backoff = Backoff(longest=1.0)
        outdated = False
        while not stop.is_set():
            started = time.monotonic()
            try:
                if outdated:
                    outdated = False
                    await self._make_anew(stop)
                else:
                    await self._follow(stop)
            except* Replaced:
                log.info("the read model is replaced by another copy")
            except* Outdated as found:
                outdated = True
                self._progress.rebuilding(_cause(found))
                log.error("the read model is made anew", read_model=self._kind.name, reasons=reasons(found))
            except* expected as failures:
                if time.monotonic() - started > _GOOD_SESSION_SECONDS:
                    backoff.reset()
                _failures.labels(self._kind.name).inc()
                self._foreign = failures.subgroup(Foreign) is not None
                self._progress.interrupted(_cause(failures))
                errors = reasons(failures)
                if self._notice.is_due(str(errors)):
                    log.warning("projecting failed", errors=errors, failures=backoff.failures + 1)
            else:
                continue
            # Not within except*, which would wrap a cancellation into a group.
            if not outdated:
                await backoff.wait()

    async def _follow(self, stop: asyncio.Event) -> None:
        """Applies what comes on the stream. Raises Outdated where the read model has to be made anew."""
        async with AsyncExitStack() as stack:
            bus = await stack.enter_async_context(nats.connect(self._nats_url, application=self._application))
            model = await stack.enter_async_context(self._kind.connect(self._store))
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            looking = tasks.create_task(self._progress.look(bus))
            streamed, end = await stream.origin(bus)
            logged = await self._logged()
            newest = _newest(streamed, logged)
            position = await model.position()
            if position and newest.log_epoch is not None:
                _require_epoch(position.log_epoch, newest.log_epoch)
                if position.log_epoch > newest.log_epoch:
                    raise Unsuitable(
                        f"the read model is of the log epoch {position.log_epoch}, and the event log, as far as known,"
                        f" of an earlier one, {newest.log_epoch}. If it was restored, begin a later one there:"
                        f" SELECT begin_log_epoch('restored', '{position.log_epoch}')"
                    )
            self._require_named(newest, position)
            session = _Following(model, bus, self._progress, end if logged else BEGINNING, self._write_dsn)
            await session.begin(newest.log_epoch or log_epoch.ZERO)
            if newest.deployment_id and (owner := await model.claim(newest.deployment_id)) != newest.deployment_id:
                raise Foreign(
                    f"the store of {self._kind.name} belongs to the deployment {owner}, the events come from"
                    f" {newest.deployment_id}"
                )
            self._foreign = False
            await session.run(stop, self._begun, retry=not self._retried)
            looking.cancel()

    def _require_named(self, newest: Origin, position: Position | None) -> None:
        """Raises Unsuitable while an empty read model could begin with the wrong history: a stream that was just made
        does not name it yet, one of an earlier version's relay never does."""
        if newest.log_epoch is None and position is None:
            self._unnamed_since = self._unnamed_since or time.monotonic()
            if time.monotonic() - self._unnamed_since < _NAMED_SECONDS:
                raise Unsuitable("the stream does not name the history of its events yet")

    async def _make_anew(self, stop: asyncio.Event) -> None:
        """Makes the read model anew beside itself, unless `stop` is set before; it serves meanwhile."""
        self._ready()
        async with asyncio.TaskGroup() as tasks:
            making = tasks.create_task(self._from_log() if self._write_dsn else self._from_stream())
            stopping = tasks.create_task(stop.wait())
            await asyncio.wait([making, stopping], return_when=asyncio.FIRST_COMPLETED)
            making.cancel()
            stopping.cancel()

    async def _from_log(self) -> None:
        async with event_log.connect(self._write_dsn, self._application) as source:
            async with nats.connect(self._nats_url, application=self._application) as bus:
                newest = _newest((await stream.origin(bus))[0], source.origin)
            if newest.log_epoch != source.origin.log_epoch:
                raise Unsuitable("TALLY_WRITE_DSN is of an earlier log epoch than the stream: it is not the primary")
            if not await source.lead(self._kind.name):
                raise Unsuitable("another rebuild of the read model is under way")
            _, events = await source.size()
            async with copies(self._kind, self._store) as both:
                work = Rebuild(source, both)
                await work.run(lambda: self._progress.made(work.events, events), taking_back=True)
            _rebuilds.labels(self._kind.name).inc()
            log.info("the read model was made anew", read_model=self._kind.name, events=work.events, pace=work.pace)

    async def _from_stream(self) -> None:
        """From what the stream has and the relay publishes again: takes far longer than from the log."""
        async with AsyncExitStack() as stack:
            bus = await stack.enter_async_context(nats.connect(self._nats_url, application=self._application))
            both = await stack.enter_async_context(copies(self._kind, self._store))
            origin, _ = await stream.origin(bus)
            session = _Following(both.fresh, bus, self._progress, BEGINNING, "")
            await session.begin(origin.log_epoch or log_epoch.ZERO)
            if origin.deployment_id:
                await both.fresh.claim(origin.deployment_id)
            complete = asyncio.Event()
            await session.run(complete, lambda: None, retry=False, complete=complete)
            async with both.frozen():
                await both.switch()
            _rebuilds.labels(self._kind.name).inc()

    async def _logged(self) -> Origin | None:
        """Which log TALLY_WRITE_DSN leads to; None: none, or it does not answer now."""
        if not self._write_dsn:
            return None
        try:
            async with event_log.connect(self._write_dsn, self._application, CONNECT_SECONDS) as source:
                return source.origin
        except LOG_FAILURES as error:
            log.warning("the event log cannot be read", error=repr(error))
            return None

    async def _report(self) -> None:
        """Stores the progress each second, until cancelled: also while there is no session, which is worth knowing."""
        backoff = Backoff(first=REPORT_SECONDS)
        while True:
            try:
                async with self._kind.connect(self._store) as model:
                    while True:
                        report = self._progress.report()
                        # The other deployment's projector reports there.
                        if not self._foreign:
                            await model.report(report.SerializeToString())
                        backoff.reset()
                        await asyncio.sleep(REPORT_SECONDS)
            except self._kind.failures as failure:
                self._progress.report()
                if self._report_notice.is_due(repr(failure)):
                    log.warning("the status cannot be stored", error=repr(failure))
            await backoff.wait()

    def _begun(self) -> None:
        self._retried = True
        self._notice.is_due("")
        self._ready()

    @property
    def _application(self) -> str:
        return f"projector {self._kind.name}"


class _Following(Session):
    """A session that reads the stream."""

    def __init__(self, model: ReadModel, bus: Client, progress: Progress, end: Position, write_dsn: str) -> None:
        """Where the position is not in the stream any more, it is read after `end`, its last message, if the event log
        has what is before; else it is BEGINNING."""
        super().__init__(model)
        self._bus = bus
        self._progress = progress
        self._end = end
        self._comparison = Comparison(self, model.name, write_dsn, self._ask_relay) if write_dsn else None
        self._checked_at = 0.0
        self._skipped_at = -_SKIPPED_SECONDS

    async def run(
        self, stop: asyncio.Event, begun: Callable[[], None], *, retry: bool, complete: asyncio.Event | None = None
    ) -> None:
        """Applies events until `stop`; with `retry`, those first at which polls are parked. `begun` is called when
        events are applied; `complete` is set once nothing is missing as far as the stream tells."""
        await self._reopen(retry)
        async with stream.read(self._bus, self._stored, self._end) as reader, asyncio.TaskGroup() as tasks:
            filling = await self._model.filling()
            if not reader.resumed:
                log.info("reading the stream from another place", position=self._stored, place=self._end)
                self._reached = self._end._replace(log_epoch=self.log_epoch)
            if self._comparison:
                if filling or not reader.resumed:
                    self._comparison.hurry()
                comparing = tasks.create_task(self._comparison.run())
            begun()
            backlog, came_at = reader.backlog, time.monotonic()
            while not stop.is_set():
                if not self._comparison and filling and not (backlog > 0 or self._gaps.hopeful):
                    await self._model.filled()
                    filling = False
                messages = await reader.next(_LOOK_SECONDS)
                backlog -= len(messages)
                if reader.skipped and time.monotonic() >= self._skipped_at + _SKIPPED_SECONDS:
                    reader.skipped, self._skipped_at = False, time.monotonic()
                    log.warning("the stream has removed messages before they were read")
                    if self._comparison:
                        self._comparison.hurry()
                if messages:
                    came_at = time.monotonic()
                    await self.apply(messages, messages[-1].position)
                else:
                    await self._check()
                await self._ask()
                if complete and not filling and time.monotonic() - came_at > _QUIET_SECONDS:
                    complete.set()
                self._note(at_the_end=not messages or not messages[-1].pending, filling=filling)
            if self._comparison:
                comparing.cancel()

    def _note(self, *, at_the_end: bool, filling: bool) -> None:
        """Notes how far it is."""
        lacking = None
        if self._comparison:
            self._comparison.caught_up = at_the_end
            lacking = self._comparison.lacking if self._comparison.urgent else 0
            filling = filling and self._comparison.urgent
        self._progress.applied(
            self._held or self._gaps.before_all or self._reached,
            everything=at_the_end and not lacking,
            filling=filling,
            lacking=lacking,
            gapped=len(self._gaps),
            parked=self._parked.values(),
        )

    async def _reopen(self, retry: bool) -> None:
        """Asks for what comes next of the polls that stood still and go on; with `retry`, of all that stand still."""
        for poll_id, tally in (await self.load(self._parked)).items():
            letter, version = self._parked[poll_id], tally.version if tally else 0
            if retry or version >= letter.version:
                self._gaps.reopen(poll_id, version + 1, letter.latest)

    async def _check(self) -> None:
        """Notices, while nothing happens, that the read model was wiped or replaced, or that the log is another one."""
        now = time.monotonic()
        if now - self._checked_at > _CHECK_SECONDS:
            self._checked_at = now
            async with self._one_at_a_time:
                if await self._model.position() != self._stored:
                    raise Displaced("the position is not the one that was stored")

    async def _ask(self) -> None:
        """Has what is missing brought: from the log, or by the relay."""
        streamed = self._progress.stream_epoch
        if streamed is not None:
            _require_epoch(self.log_epoch, streamed)
        if self._comparison and self._comparison.available:
            self._comparison.want([poll_id for poll_id, _ in self._gaps.due(time.monotonic(), WANTED)])
        elif not self._comparison or self._comparison.available is False:
            for poll_id, version in self._gaps.due(time.monotonic(), _REQUESTS):
                await self._ask_relay(poll_id, version)
        if self.suspects:
            log.error("an event came again and is another one", polls=len(self.suspects), poll_id=min(self.suspects))
            if self._comparison:
                self._comparison.want(self.suspects)
            self.suspects.clear()

    async def _ask_relay(self, poll_id: str, version: int) -> None:
        _requests.labels(self._model.name).inc()
        await self._bus.publish(REPUBLISH, republish_request(UUID(poll_id), version))


def _newest(streamed: Origin, logged: Origin | None) -> Origin:
    """The newest history of the log that is known. Raises Foreign where stream and log are of different deployments."""
    if not logged:
        return streamed
    if streamed.deployment_id not in (None, logged.deployment_id):
        raise Foreign("TALLY_NATS_URL and TALLY_WRITE_DSN belong to different deployments")
    epochs = [epoch for epoch in (streamed.log_epoch, logged.log_epoch) if epoch is not None]
    return Origin(max(epochs, default=None), logged.deployment_id)


def _require_epoch(held: UUID, newest: UUID) -> None:
    """Raises Outdated where a read model holds an earlier history than the newest one."""
    if held < newest:
        raise Outdated(f"the read model is of the log epoch {held}, the event log of {newest}")


def _cause(failures: BaseExceptionGroup[BaseException]) -> str:
    """What interrupted a session, in words that may leave this process: who failed, and how it is called."""
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    if isinstance(failure, (Displaced, Foreign, Incomplete, Outdated, Unsuitable, UnsupportedStore)):
        return str(failure)
    if isinstance(failure, NotFoundError):
        return "there is no stream"
    who = "NATS" if isinstance(failure, NatsError) else "the store"
    return f"{who} failed: {type(failure).__name__}"
