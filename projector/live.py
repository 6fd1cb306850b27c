"""The live counters in Redis: each result is encoded once, stored, and sent to its subscribers in the same step."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, ClassVar, Self
from uuid import UUID

import structlog
from google.protobuf.message import DecodeError
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from tally.poll.v1.poll_pb2 import PollOption
from tally.query.v1.query_service_pb2 import RESULTS_SOURCE_LIVE_CACHE, GetResultsResponse, OptionCount, Results

from contracts import dead_letters, log_epoch
from contracts.dead_letters import DeadLetter
from contracts.freshness import token
from contracts.live import (
    DEPLOYMENT_KEY,
    GENERATION_KEY,
    STATUS_KEY,
    dead_letters_key,
    dump_position,
    filling_key,
    frozen_key,
    hidden_results,
    live_channel,
    live_key,
    parse_generation,
    parse_position,
    position_key,
    set_aside_key,
)
from projector.fold import Tally
from projector.read_model import Change, Damaged, Displaced, Replaced
from projector.stream import Position
from runtime.addresses import InvalidAddress
from runtime.redis import check

log = structlog.get_logger()

SECONDS = 5.0
# How long a damaged poll is kept for who wants to find out what happened to it.
_SET_ASIDE_SECONDS = 7 * 24 * 3600
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
        self._database: int = redis.connection_pool.connection_kwargs.get("db", 0)

    @property
    def channels(self) -> str:
        """The channels of all polls, as a pattern of Redis."""
        return live_channel("*", self._database)

    @classmethod
    @asynccontextmanager
    async def connect(cls, redis_url: str) -> AsyncIterator[Self]:
        """Opens the read model for one session. Raises UnsupportedStore where Redis is too old, and
        NoPermissionError where it may not publish: a user of Redis 7 may not unless that is said, and the script, which
        Redis does not undo, would fail half-way."""
        async with client(redis_url) as redis:
            await check(redis)
            live = cls(redis, await generation_in_use(redis))
            async with asyncio.timeout(SECONDS):
                await redis.publish(live_channel(UUID(int=0), live._database), b"")
            yield live

    async def position(self) -> Position | None:
        key = position_key(self.generation)
        value = await _get(self._redis, key)
        if await _generation(self._redis, self._named_by) != self.generation:
            raise Replaced("another copy is in use now")
        try:
            return Position(*parse_position(value)) if value is not None else None
        except ValueError as error:
            await _remove(self._redis, key, error)
            return None

    async def claim(self, deployment_id: UUID) -> UUID:
        async with asyncio.timeout(SECONDS):
            await self._redis.set(DEPLOYMENT_KEY, str(deployment_id), nx=True)
        value = await _get(self._redis, DEPLOYMENT_KEY)
        try:
            return UUID((value or b"").decode("ascii"))
        except ValueError as error:
            await _remove(self._redis, DEPLOYMENT_KEY, error)
            raise Displaced("the deployment that this Redis belongs to was not known") from None

    async def load(self, poll_ids: Sequence[str]) -> dict[str, Tally]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for poll_id in poll_ids:
                pipeline.hmget(live_key(self.generation, poll_id), "version", "results", "counted")
            async with asyncio.timeout(SECONDS):
                values = await pipeline.execute(raise_on_error=False)
        tallies: dict[str, Tally] = {}
        damaged: dict[str, str] = {}
        for poll_id, value in zip(poll_ids, values, strict=True):
            try:
                if _is_wrong_type(value):
                    raise ValueError("the key does not hold a hash")
                if isinstance(value, Exception):
                    raise value
                if any(part is not None for part in value):
                    tallies[poll_id] = _tally(poll_id, *value)
            except (DecodeError, ValueError) as error:
                damaged[poll_id] = str(error)
        if damaged:
            raise Damaged(damaged)
        return tallies

    async def set_aside(self, poll_ids: Sequence[str]) -> None:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for poll_id in poll_ids:
                aside = set_aside_key(self.generation, poll_id)
                pipeline.rename(live_key(self.generation, poll_id), aside)
                pipeline.expire(aside, _SET_ASIDE_SECONDS)
            async with asyncio.timeout(SECONDS):
                await pipeline.execute(raise_on_error=False)

    async def dead_letters(self) -> list[DeadLetter]:
        key = dead_letters_key(self.generation)
        try:
            async with asyncio.timeout(SECONDS):
                values = await self._redis.hgetall(key)
        except ResponseError as error:
            if not _is_wrong_type(error):
                raise
            await _remove(self._redis, key, error)
            values = {}
        letters = []
        for poll_id, value in values.items():
            try:
                letters.append(dead_letters.parse(value))
            except ValueError as error:
                log.error("a dead letter cannot be read and is dropped", poll_id=repr(poll_id), error=str(error))
                async with asyncio.timeout(SECONDS):
                    await self._redis.hdel(key, poll_id)
        return letters

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
        channels = self.channels if self._named_by == GENERATION_KEY else ""
        arguments: list[str | bytes | int] = [copy, _text(old), _text(new), channels]
        for change in changes:
            results, counted = _results(change.poll_id, change.tally, new.log_epoch), b""
            if change.tally.hidden:
                results, counted = hidden_results(change.tally.version, new.log_epoch), results
            arguments += [
                change.before,
                change.tally.version,
                results,
                counted,
                live_channel(change.poll_id, self._database),
            ]
        for poll_id, letter in letters.items():
            arguments += [poll_id, dead_letters.dump(letter) if letter else ""]
        async with asyncio.timeout(SECONDS):
            unexpected = await self._store(keys=keys, args=arguments)
        if unexpected:
            key = unexpected.decode()
            if key == frozen_key(copy):
                await self._thaw(key)
            displaced = Replaced if key in (self._named_by, frozen_key(copy)) else Displaced
            raise displaced(f"{key} is not as this process left it")

    async def _thaw(self, key: str) -> None:
        """Removes what freezes the copy for ever: who replaces a copy freezes it for seconds."""
        async with asyncio.timeout(SECONDS):
            if await self._redis.pttl(key) == -1:
                await _remove(self._redis, key, ValueError("it does not expire"))

    async def filling(self) -> bool:
        async with asyncio.timeout(SECONDS):
            return bool(await self._redis.exists(filling_key(self.generation)))

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
        # The newer protocol needs Redis 6.
        redis = Redis.from_url(
            redis_url, socket_connect_timeout=2, socket_timeout=None, retry=Retry(NoBackoff(), 0), protocol=2
        )
    except ValueError:
        raise InvalidAddress from None
    try:
        yield redis
    finally:
        await redis.aclose()


async def generation_in_use(redis: Redis) -> str:
    """The copy that readers read."""
    return await _generation(redis, GENERATION_KEY)


async def _generation(redis: Redis, key: str) -> str:
    try:
        return parse_generation(await _get(redis, key))
    except ValueError as error:
        await _remove(redis, key, error)
        return parse_generation(None)


async def _get(redis: Redis, key: str) -> bytes | None:
    """The text under a key; what is no text is removed."""
    value: Any = None
    try:
        async with asyncio.timeout(SECONDS):
            value = await redis.get(key)
    except ResponseError as error:
        if not _is_wrong_type(error):
            raise
        await _remove(redis, key, error)
    return value if isinstance(value, bytes) else None


async def _remove(redis: Redis, key: str, error: Exception) -> None:
    """Removes a key that cannot be read: everything in Redis can be made anew."""
    log.error("a damaged key in redis is removed and made anew", key=key, error=str(error))
    async with asyncio.timeout(SECONDS):
        await redis.unlink(key)


def _is_wrong_type(answer: object) -> bool:
    return isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE")


def _results(poll_id: str, tally: Tally, epoch: UUID) -> bytes:
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
        consistency_token=token(UUID(poll_id), tally.version, epoch),
        log_epoch=log_epoch.text(epoch),
    )
    return GetResultsResponse(results=results).SerializeToString()


def _tally(poll_id: str, version: bytes | None, shown: bytes | None, counted: bytes | None) -> Tally:
    """The poll in a hash. Raises DecodeError or ValueError for what cannot have been stored as it is there."""
    results = GetResultsResponse.FromString(counted or shown or b"").results
    if results.poll_id != poll_id or version != b"%d" % results.version or results.version < 1:
        raise ValueError("the hash does not hold the results of this poll at its version")
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
    return dump_position(*position) if position else ""
