"""The live counters in Redis: each result is encoded once, stored, and sent to its subscribers in the same step."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, ClassVar, Self
from uuid import UUID

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from tally.poll.v1.poll_pb2 import PollOption
from tally.query.v1.query_service_pb2 import RESULTS_SOURCE_LIVE_CACHE, GetResultsResponse, OptionCount, Results

from contracts import dead_letters
from contracts.dead_letters import DeadLetter
from contracts.freshness import token
from contracts.live import (
    FIRST_GENERATION,
    GENERATION_KEY,
    STATUS_KEY,
    dead_letters_key,
    filling_key,
    frozen_key,
    hidden_results,
    live_channel,
    live_key,
    position_key,
)
from projector.fold import Tally
from projector.projection import Change, Displaced, Replaced
from projector.stream import Position
from runtime.addresses import InvalidAddress

SECONDS = 5.0
_SCRIPT = (files(__package__) / "live.lua").read_text()


class Live:
    """One copy of the read model `live`; the one in use is made by `connect`."""

    name: ClassVar[str] = "live"
    failures: ClassVar[tuple[type[Exception], ...]] = (RedisError, OSError, TimeoutError)
    refusals: ClassVar[tuple[type[Exception], ...]] = ()

    def __init__(self, redis: Redis, generation: str, named_by: str = GENERATION_KEY) -> None:
        """`named_by` is the key that names this copy; another value in it means that this is no longer the one."""
        self.generation = generation
        self._redis = redis
        self._named_by = named_by
        self._store = redis.register_script(_SCRIPT)

    @classmethod
    @asynccontextmanager
    async def connect(cls, redis_url: str) -> AsyncIterator[Self]:
        """Opens the read model for one session."""
        async with client(redis_url) as redis:
            yield cls(redis, await generation_in_use(redis))

    async def position(self) -> Position | None:
        async with asyncio.timeout(SECONDS):
            current, value = await self._redis.mget(self._named_by, position_key(self.generation))
        if _generation(current) != self.generation:
            raise Replaced("another copy is in use now")
        return Position(*map(int, value.split())) if value else None

    async def load(self, poll_ids: Sequence[str]) -> dict[str, Tally]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for poll_id in poll_ids:
                pipeline.hmget(live_key(self.generation, poll_id), "results", "counted")
            async with asyncio.timeout(SECONDS):
                values = await pipeline.execute()
        found = zip(poll_ids, values, strict=True)
        return {poll_id: _tally(results, counted) for poll_id, (results, counted) in found if results}

    async def dead_letters(self) -> list[DeadLetter]:
        async with asyncio.timeout(SECONDS):
            values = await self._redis.hvals(dead_letters_key(self.generation))
        return [dead_letters.parse(value) for value in values]

    async def store(
        self,
        changes: Sequence[Change],
        letters: Mapping[str, DeadLetter | None],
        old: Position | None,
        new: Position,
    ) -> None:
        copy = self.generation
        polls = [live_key(copy, change.poll_id) for change in changes]
        keys = [self._named_by, frozen_key(copy), position_key(copy), dead_letters_key(copy), filling_key(copy), *polls]
        # What is not in use yet is nobody's news.
        channels = live_channel("*") if self._named_by == GENERATION_KEY else ""
        arguments: list[str | bytes | int] = [copy, _text(old), _text(new), channels]
        for change in changes:
            results, counted = _results(change.poll_id, change.tally), b""
            if change.tally.hidden:
                results, counted = hidden_results(change.tally.version), results
            arguments += [change.before, change.tally.version, results, counted, live_channel(change.poll_id)]
        for poll_id, letter in letters.items():
            arguments += [poll_id, dead_letters.dump(letter) if letter else ""]
        async with asyncio.timeout(SECONDS):
            unexpected = await self._store(keys=keys, args=arguments)
        if unexpected:
            key = unexpected.decode()
            displaced = Replaced if key in (self._named_by, frozen_key(copy)) else Displaced
            raise displaced(f"{key} is not as this process left it")

    async def filled(self) -> None:
        async with asyncio.timeout(SECONDS):
            await self._redis.delete(filling_key(self.generation))

    async def report(self, status: bytes) -> None:
        async with asyncio.timeout(SECONDS):
            await self._redis.set(STATUS_KEY, status)


@asynccontextmanager
async def client(redis_url: str) -> AsyncIterator[Redis]:
    """A connection to Redis for one session."""
    # No retries below this: the session begins anew and finds out what was stored. No socket_timeout either: it uses
    # asyncio.wait_for, which in Python 3.11 can lose a cancellation; each question has its own limit.
    try:
        redis = Redis.from_url(redis_url, socket_connect_timeout=2, socket_timeout=None, retry=Retry(NoBackoff(), 0))
    except ValueError:
        raise InvalidAddress from None
    try:
        yield redis
    finally:
        await redis.aclose()


async def generation_in_use(redis: Redis) -> str:
    """The copy that readers read."""
    async with asyncio.timeout(SECONDS):
        return _generation(await redis.get(GENERATION_KEY))


def _generation(value: Any) -> str:
    return value.decode() if value else FIRST_GENERATION


def _results(poll_id: str, tally: Tally) -> bytes:
    results = Results(
        poll_id=poll_id,
        state=tally.state,
        version=tally.version,
        counts=[
            OptionCount(option_id=option.option_id, label=option.label, count=count)
            for option, count in zip(tally.options, tally.counts, strict=True)
        ],
        total_votes=tally.total_votes,
        total_weight=tally.total_weight,
        as_of=tally.as_of,
        source=RESULTS_SOURCE_LIVE_CACHE,
        eligible_voters=tally.eligible_voters,
        certification=tally.certification,
        consistency_token=token(UUID(poll_id), tally.version),
    )
    return GetResultsResponse(results=results).SerializeToString()


def _tally(shown: bytes, counted: bytes | None) -> Tally:
    results = GetResultsResponse.FromString(counted or shown).results
    return Tally(
        version=results.version,
        state=results.state,
        options=tuple(PollOption(option_id=option.option_id, label=option.label) for option in results.counts),
        counts=tuple(option.count for option in results.counts),
        as_of=results.as_of,
        total_votes=results.total_votes,
        total_weight=results.total_weight if results.HasField("total_weight") else None,
        eligible_voters=results.eligible_voters,
        certification=results.certification if results.HasField("certification") else None,
        hidden=bool(counted),
    )


def _text(position: Position | None) -> str:
    return f"{position.sequence} {position.stored_at}" if position else ""
