"""Watchers of results: one subscription to Redis for each watched poll, however many watch it, and the newest wins.

Each watched poll is a `Topic` that holds its newest results, as bytes that every watcher is sent. A watcher holds no
results, only which of its topics have news for it; so a slow reader costs nothing and gets the newest state, and
versions only grow, because a topic takes nothing over that is not newer than what it has. The one exception are results
of the same version that a rebuild has corrected.

Nothing is missed: a topic is read from Redis after Redis has confirmed its subscription. Until then, and while Redis
is away or has nothing, it is read again every second, from the read database where Redis does not help. Whoever waits
for a version is woken by whichever store has it first: the read database announces what it has.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from math import inf
from uuid import UUID

import structlog
from google.protobuf.message import DecodeError
from prometheus_client import Counter, Gauge
from redis.asyncio import Redis
from tally.poll.v1.error_reason_pb2 import ErrorReason
from tally.poll.v1.poll_pb2 import POLL_STATE_CANCELLED, POLL_STATE_CERTIFIED
from tally.query.v1.query_service_pb2 import GetResultsResponse

from contracts.failures import STORE_FAILURES
from contracts.live import are_hidden, live_channel
from contracts.read_database import VIEWS
from contracts.refusals import Refusal, poll_not_found, results_hidden
from query_server.announcements import Announcements
from query_server.freshness import behind
from query_server.live import FAILURES, LiveResults, version_of
from query_server.subscriptions import Subscriptions
from query_server.views import Views

log = structlog.get_logger()

MAX_WATCHERS = 50_000
MAX_TOPICS = 50_000

# A reader that takes no message for this long, or up to a quarter longer, is sent away; seconds.
STUCK = 30.0

# A poll in one of these states never changes again.
_FINAL = (POLL_STATE_CERTIFIED, POLL_STATE_CANCELLED)

# How often topics are read that Redis tells nothing about; seconds.
_SWEEP_SECONDS = 1.0
# Topics in one round trip.
_BATCH = 500

_watchers = Gauge("tally_query_watchers", "Streams, and calls that wait for a version.")
_topics = Gauge("tally_query_topics", "Polls that are watched.")
_updates = Counter("tally_query_updates", "Changes that arrived from Redis.")
_broken = Counter("tally_query_broken_results", "Values in Redis that are not results.")


class Topic:
    """A watched poll: its newest results, and who wants to hear of newer ones."""

    __slots__ = ("absence", "channel", "final", "live", "poll_id", "results", "version", "waiting", "watchers")

    def __init__(self, poll_id: UUID, channel: bytes) -> None:
        self.poll_id = poll_id
        self.channel = channel
        self.version = 0
        # A serialized GetResultsResponse, or what stands for hidden results.
        self.results = b""
        # Why there are no results: POLL_NOT_FOUND, STORE_UNAVAILABLE, or None for not yet known.
        self.absence: ErrorReason.ValueType | None = None
        self.watchers: set[Watcher] = set()
        # Those of them that wait for a certain version.
        self.waiting: set[Watcher] = set()
        # Redis had results after it had confirmed the subscription, and so tells of every change to them.
        self.live = False
        # The poll has ended: nothing newer will come.
        self.final = False

    def offer(self, version: int, results: bytes, *, final: bool = False, known: bytes | None = None) -> None:
        """Takes results over if they are newer, or correct those that are here: what arrives late or twice is dropped.

        `known` is what was here when a store was asked: it alone can be corrected, not what has come since.
        """
        corrects = 0 < version == self.version and known is self.results and _differ(known, results)
        if version > self.version or corrects:
            self.version, self.results, self.absence, self.final = version, results, None, final
            for watcher in self.watchers:
                watcher.notice(self)

    def lack(self, absence: ErrorReason.ValueType) -> None:
        """There are no results to be had now."""
        if not self.version:
            self.absence = absence
            for watcher in self.watchers:
                watcher.wake()


class Watcher:
    """Reads the results of some polls as they change; made by `Watchers.watch`."""

    __slots__ = (
        "_awake",
        "_hub",
        "_limit",
        "_min_interval",
        "_news",
        "_not_before",
        "_sleeping",
        "_writing_since",
        "topics",
        "wanted",
    )

    def __init__(
        self, hub: "Watchers", topics: Sequence[Topic], wanted: Mapping[UUID, int], min_interval: float
    ) -> None:
        self.topics = topics
        self.wanted = wanted
        self._hub = hub
        self._min_interval = min_interval
        # Topics that this watcher was not sent the newest results of, the one that has waited longest first.
        self._news: dict[Topic, None] = {}
        self._not_before: dict[Topic, float] = {}
        # Something has happened since it last looked; what it waits on otherwise. An asyncio.Event with a timeout costs
        # ten times as much, for each watcher at each change.
        self._awake = False
        self._sleeping: asyncio.Future[None] | None = None
        self._writing_since = inf
        self._limit = asyncio.timeout(None)

    def notice(self, topic: Topic) -> None:
        """A topic has newer results."""
        # Where the watcher knows already that there are some, it is on its way or lets min_interval pass.
        if topic not in self._news:
            self._news[topic] = None
            self.wake()

    def wake(self) -> None:
        """Something has happened to a topic or to the server."""
        self._awake = True
        if self._sleeping and not self._sleeping.done():
            self._sleeping.set_result(None)

    async def start(self, patience: float) -> None:
        """Waits until every topic has results, those in `wanted` at least of that version; see `Watchers.watch`."""
        try:
            async with asyncio.timeout(patience):
                for topic in self.topics:
                    while self.lacks(topic):
                        if topic.absence and topic.poll_id not in self.wanted:
                            raise _absence(topic)
                        self._news.clear()
                        await self._something()
        except TimeoutError:
            missing = topic.absence == ErrorReason.ERROR_REASON_POLL_NOT_FOUND
            if topic.poll_id in self.wanted and (topic.version or missing):
                raise behind(topic.version, self.wanted[topic.poll_id]) from None
            raise _absence(topic) from None
        for topic in self.topics:
            _check_shown(topic)
        self._news = dict.fromkeys(self.topics)

    async def forward(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Writes results as `next` returns them, until all polls have ended and their last results are written.

        Raises OVERLOADED once `write` has not returned for STUCK seconds.
        """
        now = asyncio.get_running_loop().time
        try:
            # A limit for each message would make it a tenth dearer: there is one, which `check` sets.
            async with self._limit:
                while self._news or not all(topic.final for topic in self.topics):
                    results = await self.next()
                    self._writing_since = now()
                    await write(results)
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

        Raises RESULTS_HIDDEN for a draft that was changed to hide them.
        """
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            for topic in self._news:
                if self._not_before.get(topic, now) <= now:
                    del self._news[topic]
                    if self._min_interval:
                        self._not_before[topic] = now + self._min_interval
                    _check_shown(topic)
                    return topic.results
            await self._something(min((self._not_before[topic] - now for topic in self._news), default=None))

    def lacks(self, topic: Topic) -> bool:
        """Whether the topic's results are missing, or older than wanted."""
        return topic.version < self.wanted.get(topic.poll_id, 1)

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

    def __init__(self, redis: Redis, live: LiveResults, views: Views, announcements: Announcements) -> None:
        self.stopping = False
        self._live = live
        self._views = views
        self._announcements = announcements
        self._topics: dict[bytes, Topic] = {}
        self._watchers: set[Watcher] = set()
        self._subscriptions = Subscriptions(redis, self._joined, self._heard, self._lost)
        self._unread_in_redis = _Pile()
        self._unread_in_views = _Pile()

    @asynccontextmanager
    async def watch(
        self, poll_ids: Iterable[UUID], wanted: Mapping[UUID, int], patience: float, min_interval: float = 0.0
    ) -> AsyncIterator[Watcher]:
        """A watcher of these polls, once each has results, and those in `wanted` at least of that version.

        Waits for that up to `patience` seconds. Raises POLL_NOT_FOUND for a poll that is not in `wanted`,
        READ_MODEL_BEHIND for one that is, RESULTS_HIDDEN for one whose results are hidden at that version,
        STORE_UNAVAILABLE, and OVERLOADED where there are too many watchers.
        """
        if len(self._watchers) >= MAX_WATCHERS or len(self._topics) >= MAX_TOPICS:
            raise Refusal(ErrorReason.ERROR_REASON_OVERLOADED, "this server has as many watchers as it can serve")
        watcher = Watcher(self, [self._topic(poll_id) for poll_id in dict.fromkeys(poll_ids)], wanted, min_interval)
        self._enter(watcher)
        try:
            with ExitStack() as waits:
                for topic in watcher.topics:
                    if watcher.lacks(topic) and topic.poll_id in wanted:
                        waits.enter_context(self._await_in_views(watcher, topic, wanted[topic.poll_id]))
                await watcher.start(patience)
            yield watcher
        finally:
            self._leave(watcher)

    def current(self, poll_id: UUID | str) -> bytes | None:
        """The results of a watched poll, as fresh as those in Redis, because Redis tells of every change; else None."""
        topic = self._topics.get(live_channel(poll_id).encode())
        return topic.results if topic and topic.live else None

    async def run(self, stop: asyncio.Event) -> None:
        """Keeps the topics up to date until `stop`, then sends every watcher away."""
        async with asyncio.TaskGroup() as tasks:
            loops = (self._subscriptions.run(), self._read_redis(), self._read_views(), self._sweep(), self._check())
            running = [tasks.create_task(loop) for loop in loops]
            await stop.wait()
            self.stopping = True
            for watcher in self._watchers:
                watcher.wake()
            for task in running:
                task.cancel()

    def _topic(self, poll_id: UUID) -> Topic:
        channel = live_channel(poll_id).encode()
        topic = self._topics.get(channel)
        if topic is None:
            topic = self._topics[channel] = Topic(poll_id, channel)
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
    def _await_in_views(self, watcher: Watcher, topic: Topic, version: int) -> Iterator[None]:
        """Reads the topic from the read database as soon as that has the version, for Redis may not bring it."""
        topic.waiting.add(watcher)
        if topic.version or topic.absence:
            # Redis was read before, and did not have it; but the read database may have announced it before.
            self._unread_in_views.add([topic])
        try:
            with self._announcements.expect(VIEWS, topic.poll_id, version, lambda: self._unread_in_views.add([topic])):
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
                topic.offer(version_of(results), results, known=known)
            else:
                news = GetResultsResponse.FromString(results).results
                topic.offer(news.version, results, final=news.state in _FINAL, known=known)
        except DecodeError:
            _broken.inc()
            log.error("redis has something else than results", poll_id=str(topic.poll_id))
            return False
        return True

    async def _read_redis(self) -> None:
        """Reads topics that are new, were joined anew, or that Redis does not tell about; else the views are asked."""
        while True:
            topics = await self._unread_in_redis.take()
            before = [(topic.channel in self._subscriptions, topic.results) for topic in topics]
            try:
                found = await self._live.counters([topic.poll_id for topic in topics])
            except Exception as error:
                if not isinstance(error, FAILURES):
                    log.exception("defect")
                found = {}
            for topic, (was_joined, known) in zip(topics, before, strict=True):
                results = found.get(topic.poll_id)
                has_results = results is not None and self._offer(topic, results, known)
                topic.live = has_results and was_joined and topic.channel in self._subscriptions
                if not has_results or any(watcher.lacks(topic) for watcher in topic.waiting):
                    self._unread_in_views.add([topic])

    async def _read_views(self) -> None:
        failing = False
        while True:
            topics = await self._unread_in_views.take()
            try:
                newer = await self._views.newer_results({topic.poll_id: topic.version for topic in topics})
            except Exception as error:
                # Whatever is wrong with some polls or with the database, the others go on.
                if not isinstance(error, STORE_FAILURES):
                    log.exception("defect")
                elif not failing:
                    log.warning("the read database does not answer", error=f"{type(error).__name__}: {error}")
                failing = True
                for topic in topics:
                    topic.lack(ErrorReason.ERROR_REASON_STORE_UNAVAILABLE)
                continue
            failing = False
            for topic in topics:
                if topic.poll_id in newer:
                    self._offer(topic, newer[topic.poll_id][1], b"")
                else:
                    topic.lack(ErrorReason.ERROR_REASON_POLL_NOT_FOUND)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self._unread_in_redis.add(topic for topic in self._topics.values() if not topic.live)

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


def _differ(known: bytes, results: bytes) -> bool:
    """Whether results of the same version tell different things, whichever store they are from."""
    if known == results or are_hidden(known) or are_hidden(results):
        return known != results
    one, other = (GetResultsResponse.FromString(each).results for each in (known, results))
    one.source = other.source
    return one != other


def _check_shown(topic: Topic) -> None:
    if are_hidden(topic.results):
        raise results_hidden(topic.poll_id)


def _absence(topic: Topic) -> Refusal:
    if topic.absence == ErrorReason.ERROR_REASON_POLL_NOT_FOUND:
        return poll_not_found(topic.poll_id)
    return Refusal(ErrorReason.ERROR_REASON_STORE_UNAVAILABLE, "no store answered in time; ask again")
