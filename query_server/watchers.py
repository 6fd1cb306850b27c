"""Watchers of results: one subscription to Redis for each watched poll, however many watch it, and the newest wins.

Each watched poll is a `Topic` that holds its newest results, as bytes that every watcher is sent. A watcher holds no
results, only which of its topics have news for it; so a slow reader costs nothing and gets the newest state, and
versions only grow, because a topic takes nothing over that is not newer than what it has, or than what this server has
answered before. The one exception are results of the same version that a rebuild has corrected.

Nothing is missed: a topic is read from Redis after Redis has confirmed its subscription. Until then, and while Redis
is away, has nothing or lags behind, it is read again every second, from the read database where Redis does not help.
A call that waits for a version is woken by the store that has it first: the read database announces what it has.

Watchers hear of a change a few at a time, so that a crowd of them holds up no other call.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager, nullcontext
from math import inf
from uuid import UUID

import structlog
from google.protobuf.message import DecodeError
from prometheus_client import Counter, Gauge
from redis.asyncio import Redis
from tally.poll.v1.error_reason_pb2 import ErrorReason
from tally.poll.v1.poll_pb2 import POLL_STATE_CANCELLED, POLL_STATE_CERTIFIED
from tally.query.v1.query_service_pb2 import GetResultsResponse

from contracts import log_epoch
from contracts.live import are_hidden, hidden_position, live_channel
from contracts.log_epoch import NOWHERE, LogPosition
from contracts.read_database import VIEWS
from contracts.refusals import ReadModelBehind, Refusal, poll_not_found, results_hidden
from query_server.announcements import Announcements
from query_server.answered import Answered
from query_server.failures import STORE_FAILURES
from query_server.freshness import Wanted, behind
from query_server.live import FAILURES, LiveResults
from query_server.outgoing import LARGE
from query_server.pace import Pace
from query_server.subscriptions import Subscriptions
from query_server.views import Found, ReadModelFilling, Views

log = structlog.get_logger()

MAX_WATCHERS = 50_000
MAX_TOPICS = 50_000

# (bytes, seconds): makes room for an answer, query_server.outgoing.
Room = Callable[[int, float], AbstractAsyncContextManager[None]]
_NO_ROOM_NEEDED = nullcontext()

# A reader that takes no message for this long, or up to a quarter longer, is sent away; seconds.
STUCK = 30.0

# Why a watch that asks for no certain version ends at once; a read model that is being filled is waited for.
_ANSWERS = (ErrorReason.ERROR_REASON_POLL_NOT_FOUND, ErrorReason.ERROR_REASON_STORE_UNAVAILABLE)
# A poll in one of these states never changes again.
_FINAL = (POLL_STATE_CERTIFIED, POLL_STATE_CANCELLED)

# How often topics are read that Redis tells nothing about; seconds.
_SWEEP_SECONDS = 1.0
# Topics in one round trip, and those whose results are read from the read database at once.
_BATCH = 500
_STORED_BATCH = 10
# Watchers that hear of a change in one turn of the loop, each of which costs some 0.1 ms; an answer needs ten turns.
_TOLD_AT_ONCE = 16

_watchers = Gauge("tally_query_watchers", "Streams, and calls that wait for a version.")
_topics = Gauge("tally_query_topics", "Polls that are watched.")
_updates = Counter("tally_query_updates", "Changes that arrived from Redis.")
_broken = Counter("tally_query_broken_results", "Values in Redis that are not results.")


class Topic:
    """A watched poll: its newest results, and who wants to hear of newer ones."""

    __slots__ = (
        "_changed",
        "absence",
        "changes",
        "channel",
        "final",
        "least",
        "live",
        "poll_id",
        "position",
        "results",
        "waiting",
        "watchers",
    )

    def __init__(
        self, poll_id: UUID, channel: bytes, changed: Callable[["Topic"], None], least: LogPosition = NOWHERE
    ) -> None:
        """`changed` is called with each change; what is before `least` is none."""
        self.poll_id = poll_id
        self.channel = channel
        self.least = least
        # How far a store has it.
        self.position = NOWHERE
        # A serialized GetResultsResponse, or what stands for hidden results; empty where no store has it at `least`.
        self.results = b""
        # Why there are no results: POLL_NOT_FOUND, STORE_UNAVAILABLE, READ_MODEL_BEHIND, or None for not yet known.
        self.absence: ErrorReason.ValueType | None = None
        # How often any of these has changed.
        self.changes = 0
        self.watchers: set[Watcher] = set()
        # Those of them that wait for a certain version.
        self.waiting: set[Watcher] = set()
        # Redis had results after it had confirmed the subscription, and so tells of every change to them.
        self.live = False
        # The poll has ended: nothing newer will come.
        self.final = False
        self._changed = changed

    def offer(self, position: LogPosition, results: bytes, *, final: bool = False, known: bytes | None = None) -> None:
        """Takes results over if they are newer, or correct those that are here: what arrives late or twice is dropped.

        `known` is what was here when a store was asked: it alone can be corrected, not what has come since.
        """
        corrects = position == self.position and self.results and known is self.results and _differ(known, results)
        if self.position < position < self.least:
            self.position = position
            self.lack(ErrorReason.ERROR_REASON_READ_MODEL_BEHIND)
        elif position > self.position or corrects:
            self.position, self.results, self.absence, self.final = position, results, None, final
            self.changes += 1
            self._changed(self)

    def lack(self, absence: ErrorReason.ValueType, position: LogPosition = NOWHERE) -> None:
        """There are no results to be had now; where the poll is not found, in a store that is at `position`."""
        if absence == ErrorReason.ERROR_REASON_POLL_NOT_FOUND:
            if position < self.least:
                absence = ErrorReason.ERROR_REASON_READ_MODEL_BEHIND
            elif position > self.position:
                # A later history of the log does not have the poll.
                self.position, self.results, self.final = position, b"", False
        if not self.results:
            self.absence = absence
            self.changes += 1
            self._changed(self)


class Watcher:
    """Reads the results of some polls as they change; made by `Watchers.watch`."""

    __slots__ = (
        "_awake",
        "_hub",
        "_limit",
        "_min_interval",
        "_news",
        "_not_before",
        "_sent",
        "_sleeping",
        "_writing_since",
        "topics",
        "wanted",
    )

    def __init__(self, hub: "Watchers", topics: Sequence[Topic], wanted: Wanted, min_interval: float) -> None:
        self.topics = topics
        self.wanted = wanted
        self._hub = hub
        self._min_interval = min_interval
        # Topics that this watcher was not sent the newest results of, the one that has waited longest first.
        self._news: dict[Topic, None] = {}
        self._not_before: dict[Topic, float] = {}
        # Which change of each topic it was sent last: who begins to watch between a change and the moment at which all
        # watchers hear of it has it already.
        self._sent: dict[Topic, int] = {}
        # Something has happened since it last looked; what it waits on otherwise. An asyncio.Event with a timeout costs
        # ten times as much, for each watcher at each change.
        self._awake = False
        self._sleeping: asyncio.Future[None] | None = None
        self._writing_since = inf
        self._limit = asyncio.timeout(None)

    def notice(self, topic: Topic) -> None:
        """A topic has newer results."""
        # Where the watcher knows already that there are some, it is on its way or lets min_interval pass.
        if topic not in self._news and self._sent.get(topic) != topic.changes:
            self._news[topic] = None
            self.wake()

    def wake(self) -> None:
        """Something has happened to a topic or to the server."""
        self._awake = True
        if self._sleeping and not self._sleeping.done():
            self._sleeping.set_result(None)

    async def start(self, patience: float) -> None:
        """Waits until every topic has results, those in `wanted` at least of that position; see `Watchers.watch`."""
        try:
            async with asyncio.timeout(patience):
                for topic in self.topics:
                    while self.lacks(topic):
                        if topic.absence in _ANSWERS and topic.position >= self.wanted.get(topic.poll_id, NOWHERE):
                            raise _absence(topic)
                        self._news.clear()
                        await self._something()
        except TimeoutError:
            missing = topic.absence in (
                ErrorReason.ERROR_REASON_POLL_NOT_FOUND,
                ErrorReason.ERROR_REASON_READ_MODEL_BEHIND,
            )
            if topic.poll_id in self.wanted and (topic.results or missing):
                raise behind(topic.position, self.wanted[topic.poll_id]) from None
            raise _absence(topic) from None
        for topic in self.topics:
            _check_shown(topic)
        self._news = dict.fromkeys(self.topics)

    async def forward(self, write: Callable[[bytes], Awaitable[None]], room: Room) -> None:
        """Writes results as `next` returns them, until all polls have ended and their last results are written.

        Raises OVERLOADED once `write` has not returned for STUCK seconds, or `room`, within which it writes large
        results, has not come for as long.
        """
        now = asyncio.get_running_loop().time
        try:
            # A limit for each message would make it a tenth dearer: there is one, which `check` sets.
            async with self._limit:
                while self._news or not all(topic.final for topic in self.topics):
                    topic = await self._next_topic()
                    async with room(len(topic.results), STUCK) if len(topic.results) >= LARGE else _NO_ROOM_NEEDED:
                        # By now there may be newer ones.
                        self._news.pop(topic, None)
                        self._sent[topic] = topic.changes
                        _check_shown(topic)
                        self._writing_since = now()
                        await write(topic.results)
                        self._writing_since = inf
        except TimeoutError:
            message = f"this reader took no message for {STUCK:g} s; watch again"
            raise Refusal(ErrorReason.ERROR_REASON_OVERLOADED, message) from None

    def check(self, now: float) -> None:
        """Ends `forward` where its reader is stuck."""
        if now - self._writing_since > STUCK:
            self._writing_since = inf
            self._limit.reschedule(now)

    async def next(self) -> bytes:
        """The newest results of the topic with the oldest news, as a serialized WatchResultsResponse.

        Raises RESULTS_HIDDEN for a draft that was changed to hide them, and POLL_NOT_FOUND for a poll that a later
        history of the log does not have.
        """
        return (await self._next_topic()).results

    async def _next_topic(self) -> Topic:
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            for topic in self._news:
                if self._not_before.get(topic, now) <= now:
                    del self._news[topic]
                    self._sent[topic] = topic.changes
                    if self._min_interval:
                        self._not_before[topic] = now + self._min_interval
                    _check_shown(topic)
                    return topic
            await self._something(min((self._not_before[topic] - now for topic in self._news), default=None))

    def lacks(self, topic: Topic) -> bool:
        """Whether the topic's results are missing, or older than wanted."""
        return not topic.results or topic.position < self.wanted.get(topic.poll_id, NOWHERE)

    async def _something(self, seconds: float | None = None) -> None:
        """Returns when something has happened since the last time, or after `seconds`."""
        if self._hub.stopping:
            raise Refusal(ErrorReason.ERROR_REASON_STORE_UNAVAILABLE, "this server is stopping; ask again")
        if not self._awake:
            loop = asyncio.get_running_loop()
            self._sleeping = loop.create_future()
            timer = loop.call_later(seconds, self.wake) if seconds is not None else None
            try:
                await self._sleeping
            finally:
                if timer:
                    timer.cancel()
        self._awake = False


class Watchers:
    """All watchers of this process, and what they watch. `run` keeps the topics up to date."""

    def __init__(
        self, redis: Redis, live: LiveResults, views: Views, announcements: Announcements, answered: Answered
    ) -> None:
        self.stopping = False
        self._live = live
        self._views = views
        self._announcements = announcements
        self._answered = answered
        self._database: int = redis.connection_pool.connection_kwargs.get("db", 0)
        self._topics: dict[bytes, Topic] = {}
        self._watchers: set[Watcher] = set()
        self._subscriptions = Subscriptions(redis, self._joined, self._heard, self._lost)
        self._unread_in_redis = _Pile()
        self._unread_in_views = _Pile()
        # The topics whose watchers have to hear of a change.
        self._untold = _Pile()

    @asynccontextmanager
    async def watch(
        self, poll_ids: Iterable[UUID], wanted: Wanted, patience: float, min_interval: float = 0.0
    ) -> AsyncIterator[Watcher]:
        """A watcher of these polls, once each has results, those in `wanted` at least of that position, and none older
        than what this server has answered.

        Waits for that up to `patience` seconds. Raises POLL_NOT_FOUND for a poll that is neither in `wanted` nor was
        answered before; READ_MODEL_BEHIND for one that is or was, and while the read model is being filled;
        RESULTS_HIDDEN for one whose results are hidden at that version; STORE_UNAVAILABLE; and OVERLOADED where there
        are too many watchers.
        """
        if len(self._watchers) >= MAX_WATCHERS or len(self._topics) >= MAX_TOPICS:
            raise Refusal(ErrorReason.ERROR_REASON_OVERLOADED, "this server has as many watchers as it can serve")
        poll_ids = dict.fromkeys(poll_ids)
        answered = {poll_id: self._answered.position(poll_id) for poll_id in poll_ids}
        least = {
            poll_id: max(wanted.get(poll_id, NOWHERE), position)
            for poll_id, position in answered.items()
            if poll_id in wanted or position != NOWHERE
        }
        watcher = Watcher(self, [self._topic(poll_id) for poll_id in poll_ids], least, min_interval)
        self._enter(watcher)
        try:
            with ExitStack() as waits:
                for topic in watcher.topics:
                    if watcher.lacks(topic) and topic.poll_id in wanted:
                        waits.enter_context(self._await_in_views(watcher, topic, least[topic.poll_id]))
                await watcher.start(patience)
            yield watcher
        finally:
            self._leave(watcher)

    def current(self, poll_id: UUID | str) -> Found | None:
        """The results of a watched poll, as fresh as those in Redis, because Redis tells of every change; else None."""
        topic = self._topics.get(self._channel(poll_id))
        return Found(topic.position, topic.results) if topic and topic.live and topic.results else None

    def learn(self, poll_id: UUID, found: Found) -> None:
        """Somebody was answered this: who watches the poll, or does so later, is shown nothing older."""
        self._answered.note(poll_id, found.position)
        topic = self._topics.get(self._channel(poll_id))
        if topic and found.results and found.position > topic.position:
            self._offer(topic, found.results, b"")

    async def run(self, stop: asyncio.Event) -> None:
        """Keeps the topics up to date until `stop`, then sends every watcher away."""
        async with asyncio.TaskGroup() as tasks:
            reading = (self._subscriptions.run(), self._read_redis(), self._read_views(), self._sweep())
            loops = (*reading, self._tell(), self._check())
            running = [tasks.create_task(loop) for loop in loops]
            await stop.wait()
            self.stopping = True
            for watcher in self._watchers:
                watcher.wake()
            for task in running:
                task.cancel()

    def _channel(self, poll_id: UUID | str) -> bytes:
        return live_channel(poll_id, self._database).encode()

    def _topic(self, poll_id: UUID) -> Topic:
        channel = self._channel(poll_id)
        topic = self._topics.get(channel)
        if topic is None:
            topic = self._topics[channel] = Topic(poll_id, channel, self._changed, self._answered.position(poll_id))
            _topics.set(len(self._topics))
            self._subscriptions.want(channel)
            # Otherwise it is read once the subscription is confirmed: a millisecond later, and then nothing is missed.
            if channel in self._subscriptions or not self._subscriptions.connected:
                self._unread_in_redis.add([topic])
        return topic

    def _enter(self, watcher: "Watcher") -> None:
        self._watchers.add(watcher)
        _watchers.set(len(self._watchers))
        for topic in watcher.topics:
            topic.watchers.add(watcher)

    def _leave(self, watcher: "Watcher") -> None:
        self._watchers.discard(watcher)
        _watchers.set(len(self._watchers))
        for topic in watcher.topics:
            topic.watchers.discard(watcher)
            if not topic.watchers:
                del self._topics[topic.channel]
                self._subscriptions.leave(topic.channel)
        _topics.set(len(self._topics))

    @contextmanager
    def _await_in_views(self, watcher: Watcher, topic: Topic, least: LogPosition) -> Iterator[None]:
        """Reads the topic from the read database as soon as that is so far, for Redis may not bring it."""
        topic.waiting.add(watcher)
        if topic.results or topic.absence:
            # Redis was read before, and did not have it; but the read database may have announced it before.
            self._unread_in_views.add([topic])
        try:
            with self._announcements.expect(VIEWS, topic.poll_id, least, lambda: self._unread_in_views.add([topic])):
                yield
        finally:
            topic.waiting.discard(watcher)

    def _joined(self, channel: bytes) -> None:
        self._live.redis_is_back()
        if topic := self._topics.get(channel):
            self._unread_in_redis.add([topic])

    def _heard(self, channel: bytes, results: bytes) -> None:
        _updates.inc()
        if topic := self._topics.get(channel):
            if results:
                self._offer(topic, results, topic.results)
            else:
                # Redis was wiped, and is being filled.
                topic.live = False

    def _lost(self) -> None:
        for topic in self._topics.values():
            topic.live = False

    def _offer(self, topic: Topic, results: bytes, known: bytes) -> bool:
        try:
            if are_hidden(results):
                position, final = hidden_position(results), False
            else:
                news = GetResultsResponse.FromString(results).results
                position, final = LogPosition(log_epoch.parse(news.log_epoch), news.version), news.state in _FINAL
        except (DecodeError, ValueError):
            _broken.inc()
            log.error("redis has something else than results", poll_id=str(topic.poll_id))
            return False
        topic.offer(position, results, final=final, known=known)
        return True

    def _changed(self, topic: Topic) -> None:
        if topic.results:
            self._answered.note(topic.poll_id, topic.position)
        if len(topic.watchers) > _TOLD_AT_ONCE:
            self._untold.add([topic])
            return
        for watcher in topic.watchers:
            watcher.notice(topic)

    async def _tell(self) -> None:
        """Tells crowds of watchers of changes, a few at a time."""
        while True:
            for topic in await self._untold.take():
                watchers = tuple(topic.watchers)
                for start in range(0, len(watchers), _TOLD_AT_ONCE):
                    for watcher in watchers[start : start + _TOLD_AT_ONCE]:
                        watcher.notice(topic)
                    # They run before this goes on, and so does what has come for others.
                    await asyncio.sleep(0)

    async def _read_redis(self) -> None:
        """Reads topics that are new, were joined anew, or that Redis does not tell about; else the views are asked."""
        turns = asyncio.Lock()
        while True:
            topics = await self._unread_in_redis.take()
            before = [(topic.channel in self._subscriptions, topic.results) for topic in topics]
            try:
                found = await self._live.counters([topic.poll_id for topic in topics])
            except Exception as error:
                if not isinstance(error, FAILURES):
                    log.exception("defect")
                found = {}
            pace = Pace(turns)
            for topic, (was_joined, known) in zip(topics, before, strict=True):
                counters = found.get(topic.poll_id)
                has_results = bool(counters and counters.results and self._offer(topic, counters.results, known))
                topic.live = has_results and was_joined and topic.channel in self._subscriptions
                if not topic.results or any(watcher.lacks(topic) for watcher in topic.waiting) or not has_results:
                    self._unread_in_views.add([topic])
                await pace()

    async def _read_views(self) -> None:
        failing = False
        while True:
            topics = await self._unread_in_views.take()
            try:
                # Which of them have news, and then these, which may be large.
                positions = await self._views.positions(VIEWS, [topic.poll_id for topic in topics])
                for topic in topics:
                    if not positions[topic.poll_id].version:
                        topic.lack(ErrorReason.ERROR_REASON_POLL_NOT_FOUND, positions[topic.poll_id])
                news = [topic for topic in topics if positions[topic.poll_id] > topic.position]
                for batch in _batches(news):
                    await self._take_over(batch)
            except Exception as error:
                # Whatever is wrong with some polls or with the database, the others go on.
                absence = ErrorReason.ERROR_REASON_STORE_UNAVAILABLE
                if isinstance(error, ReadModelBehind):
                    absence = ErrorReason.ERROR_REASON_READ_MODEL_BEHIND
                elif not isinstance(error, STORE_FAILURES):
                    log.exception("defect")
                elif not failing:
                    log.warning("the read database does not answer", error=f"{type(error).__name__}: {error}")
                failing = True
                for topic in topics:
                    topic.lack(absence)
                continue
            failing = False

    async def _take_over(self, topics: Sequence[Topic]) -> None:
        """Reads these from the read database."""
        newer = await self._views.newer_results({topic.poll_id: topic.position for topic in topics})
        for topic in topics:
            if (news := newer.get(topic.poll_id)) and news.results:
                self._offer(topic, news.results, b"")

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            topics = self._topics.values()
            self._unread_in_redis.add(topic for topic in topics if not topic.live)
            self._unread_in_views.add(
                topic for topic in topics if self._live.lag or topic.position.log_epoch < self._live.log_epoch
            )

    async def _check(self) -> None:
        while True:
            await asyncio.sleep(STUCK / 4)
            now = asyncio.get_running_loop().time()
            for watcher in self._watchers:
                watcher.check(now)


class _Pile:
    """Topics that are to be read, each once."""

    def __init__(self) -> None:
        self._topics: dict[Topic, None] = {}
        self._filled = asyncio.Event()

    def add(self, topics: Iterable[Topic]) -> None:
        self._topics.update(dict.fromkeys(topics))
        if self._topics:
            self._filled.set()

    async def take(self) -> list[Topic]:
        """The next batch of them; waits until there is one."""
        while True:
            await self._filled.wait()
            batch = list(itertools.islice(self._topics, _BATCH))
            for topic in batch:
                del self._topics[topic]
            if not self._topics:
                self._filled.clear()
            # Those that nobody watches any more are no work.
            if watched := [topic for topic in batch if topic.watchers]:
                return watched


def _batches(topics: Sequence[Topic]) -> Iterator[Sequence[Topic]]:
    """What is read of the read database at once."""
    for start in range(0, len(topics), _STORED_BATCH):
        yield topics[start : start + _STORED_BATCH]


def _differ(known: bytes, results: bytes) -> bool:
    """Whether results of the same version tell different things, whichever store they are from."""
    if known == results or are_hidden(known) or are_hidden(results):
        return known != results
    one, other = (GetResultsResponse.FromString(each).results for each in (known, results))
    one.source = other.source
    return one != other


def _check_shown(topic: Topic) -> None:
    if not topic.results:
        raise _absence(topic)
    if are_hidden(topic.results):
        raise results_hidden(topic.poll_id)


def _absence(topic: Topic) -> Refusal:
    match topic.absence:
        case ErrorReason.ERROR_REASON_POLL_NOT_FOUND:
            return poll_not_found(topic.poll_id)
        case ErrorReason.ERROR_REASON_READ_MODEL_BEHIND:
            return ReadModelFilling()
    return Refusal(ErrorReason.ERROR_REASON_STORE_UNAVAILABLE, "no store answered in time; ask again")
