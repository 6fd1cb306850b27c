"""The results of a poll: the live counters in Redis; where these have nothing, lag behind or do not answer, the read
database."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from math import inf
from typing import Any
from uuid import UUID

import structlog
from prometheus_client import Counter
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from contracts.live import GENERATION_KEY, STATUS_KEY, epoch_of
from contracts.log_epoch import NOWHERE, ZERO, LogPosition
from contracts.refusals import ReadModelBehind
from query_server.failures import STORE_FAILURES
from query_server.views import Found, Views

log = structlog.get_logger()

# Everything in which Redis can fail a reader; none of it is a reason to fail the caller.
FAILURES = (RedisError, OSError, TimeoutError)

# Redis answers well within a millisecond, or something is wrong with it; seconds.
PATIENCE = 0.5
# How long Redis is left alone after a failure: while it is dead, one call a second waits for it, not every call.
_PAUSE = 1.0
_CONNECTIONS = 32
# After a question the next one waits so long for each call that it answered, up to a limit; seconds. A call that comes
# alone hardly waits; under load this makes one round trip, and one burst of answers, of what would be many.
_PAUSE_PER_CALL = 0.0004
_LONGEST_PAUSE = 0.004
# What is said of a poll that no store of a log without epochs has.
_NONE = Found(NOWHERE, None)
# Polls in one round trip, and after how many bytes it ends: what is read in one go holds up all others.
_BATCH = 500
_BATCH_BYTES = 1 << 22
# Polls that the read database is asked for at once where it can be that not all are wanted.
_STORED_BATCH = 10

_failures = Counter("tally_query_redis_failures", "Questions that Redis did not answer.")
_fallbacks = Counter("tally_query_fallbacks", "Results that were read from the read database instead of Redis.")


def connect(redis_url: str) -> Redis:
    """A client that connects when it is used, and leaves all patience and repetition to its user."""
    pool = BlockingConnectionPool.from_url(
        redis_url,
        max_connections=_CONNECTIONS,
        timeout=PATIENCE,
        # Whoever asks sets a limit. The driver's own limit uses asyncio.wait_for, which in Python 3.11 can lose a
        # cancellation.
        socket_timeout=None,
        retry=Retry(NoBackoff(), 0),
        # The newer protocol begins each connection with questions that we have no use for.
        protocol=2,
    )
    return Redis.from_pool(pool)


class _Question:
    """The polls that are asked for next, and what Redis has of them."""

    def __init__(self) -> None:
        self.polls: dict[UUID, None] = {}
        # How many wait for the answer.
        self.calls = 0
        self.asked = asyncio.Event()
        self.answer: asyncio.Future[dict[UUID, Found | None]] = asyncio.get_running_loop().create_future()
        # Where all who asked have gone away, nobody hears of a failure.
        self.answer.add_done_callback(lambda answer: answer.cancelled() or answer.exception())


class LiveResults:
    """Results as the serialized GetResultsResponse that the projector made, not parsed on their way to the caller."""

    def __init__(self, redis: Redis, views: Views) -> None:
        self._redis = redis
        self._results = redis.register_script((files(__package__) / "live.lua").read_text())
        self._views = views
        # Whether the live counters may be behind the views, and the latest history of the log that a read model is of:
        # query_server.status finds out.
        self.lag = False
        self.log_epoch = ZERO
        self._left_alone_until = 0.0
        self._next = _Question()

    async def run(self) -> None:
        """Asks Redis, one question after the other, until it is cancelled. Whoever wants to know something while a
        question is under way shares the next one: under load one round trip answers many calls, and each of them
        sees what Redis had after it came."""
        while True:
            await self._next.asked.wait()
            question, self._next = self._next, _Question()
            try:
                question.answer.set_result(await self._read(list(question.polls)[:_BATCH]))
            except Exception as error:  # noqa: BLE001 - whoever asked hears of it
                question.answer.set_exception(error)
            finally:
                # Nobody waits for ever, whatever ended this.
                question.answer.cancel()
            await asyncio.sleep(min(_PAUSE_PER_CALL * question.calls, _LONGEST_PAUSE))

    async def find_all(self, wanted: Mapping[UUID, LogPosition], most: float = inf) -> dict[UUID, Found]:
        """The latest results of polls: those of Redis where they are as far as `wanted`, else the further ones of both
        stores, which may be less far.

        Once they are more than `most` bytes, those that were not read by then are missing. Raises ReadModelBehind where
        no store can tell whether there is such a poll, and one of STORE_FAILURES where none answers.
        """
        poll_ids = list(wanted)
        try:
            found = await self.counters(poll_ids, most)
        except FAILURES:
            found = {}
        if behind := {poll: each for poll, each in found.items() if self.lag or each.position < wanted[poll]}:
            found |= await self._newer(behind)
        missing = [poll_id for poll_id in poll_ids if poll_id not in found]
        for start in range(0, len(missing), _STORED_BATCH):
            if _bytes(found) > most:
                break
            batch = missing[start : start + _STORED_BATCH]
            _fallbacks.inc(len(batch))
            found |= dict.fromkeys(batch, _NONE)
            found |= await self._views.newer_results(dict.fromkeys(batch, NOWHERE))
        return found

    async def counters(self, poll_ids: Sequence[UUID], most: float = inf) -> dict[UUID, Found]:
        """The results that Redis has, up to `most` bytes or so; `run` must be running. Raises one of FAILURES."""
        found: dict[UUID, Found] = {}
        unread = poll_ids
        # A question is answered for as many polls as one round trip is good for.
        while unread and _bytes(found) <= most:
            question = self._next
            question.polls.update(dict.fromkeys(unread))
            question.calls += 1
            question.asked.set()
            # Shielded: a caller that goes away does not take the others' answer with it.
            answer = await asyncio.shield(question.answer)
            found |= {poll_id: results for poll_id in unread if (results := answer.get(poll_id))}
            unread = [poll_id for poll_id in unread if poll_id not in answer]
        return found

    async def _newer(self, counters: Mapping[UUID, Found]) -> dict[UUID, Found]:
        """Those that the read database has further than Redis; none where it does not answer."""
        newer: dict[UUID, Found] = {}
        polls = list(counters)
        with suppress(*STORE_FAILURES, ReadModelBehind):
            for start in range(0, len(polls), _STORED_BATCH):
                batch = polls[start : start + _STORED_BATCH]
                newer |= await self._views.newer_results({poll: counters[poll].position for poll in batch})
        return newer

    async def _read(self, poll_ids: Sequence[UUID]) -> dict[UUID, Found | None]:
        arguments: list[str | int] = [_BATCH_BYTES, *map(str, poll_ids)]
        position, *answer = await self._ask(lambda: self._results(keys=[GENERATION_KEY], args=arguments))
        try:
            log_epoch = epoch_of(position) if position else ZERO
        except ValueError:
            # The history of these counters is unknown: the projector makes them anew.
            log.error("redis has something else than a position", position=position[:100])
            return dict.fromkeys(poll_ids)
        return {
            poll_id: _found(log_epoch, version, results)
            for poll_id, version, results in zip(poll_ids, answer[::2], answer[1::2], strict=False)
        }

    async def status(self) -> bytes | None:
        """What the projector says of itself, as it has stored it. Raises one of FAILURES."""
        status: bytes | None = await self._ask(lambda: self._redis.get(STATUS_KEY))
        return status

    def redis_is_back(self) -> None:
        """Somebody has heard from Redis: there is no reason to leave it alone any longer."""
        self._left_alone_until = 0.0

    async def _ask(self, question: Callable[[], Awaitable[Any]]) -> Any:
        if time.monotonic() < self._left_alone_until:
            raise RedisConnectionError("left alone after a failure")
        try:
            async with asyncio.timeout(PATIENCE):
                return await question()
        except FAILURES as error:
            self._left_alone_until = time.monotonic() + _PAUSE
            _failures.inc()
            log.warning("redis does not answer", error=f"{type(error).__name__}: {error}", left_alone_seconds=_PAUSE)
            if isinstance(error, ResponseError):
                # It loads its data, or it is a replica without its master: another server may be the one by now.
                await self._redis.connection_pool.disconnect(inuse_connections=False)
            raise


def _found(log_epoch: UUID, version: bytes | None, results: bytes | None) -> Found | None:
    if not results or not version or not version.isdigit():
        return None
    return Found(LogPosition(log_epoch, int(version)), results)


def _bytes(found: Mapping[UUID, Found]) -> int:
    return sum(len(each.results or b"") for each in found.values())
