"""The live counters twice: the copy in use, and a fresh one under another prefix that is to take its place."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, Self

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from contracts.live import FRESH_GENERATION_KEY, GENERATION_KEY, frozen_key, live_key
from projector.live import SECONDS, Live, client, generation_in_use
from projector.read_model import Displaced
from projector.session import is_poll_id

log = structlog.get_logger()

# A copy that was frozen by a process that died is thawed after this.
_FROZEN_MILLISECONDS = 5000
# Keys that Redis looks at in one step, while it does nothing else.
_PAGE = 1000
_SWITCH = (files(__package__) / "switch.lua").read_text()


class LiveCopies:
    """See projector.rebuild.Copies; made by `open`."""

    def __init__(self, redis: Redis, generation: str) -> None:
        self.in_use = Live(redis, generation)
        self.fresh = Live(redis, secrets.token_hex(4), FRESH_GENERATION_KEY)
        self._redis = redis
        self._switch = redis.register_script(_SWITCH)

    @classmethod
    @asynccontextmanager
    async def open(cls, redis_url: str) -> AsyncIterator[Self]:
        """Begins a fresh copy, which is removed at the end unless it is the one in use by then."""
        async with client(redis_url) as redis:
            copies = cls(redis, await generation_in_use(redis))
            async with asyncio.timeout(SECONDS):
                await redis.set(FRESH_GENERATION_KEY, copies.fresh.generation)
            try:
                await copies._remove_others()
                yield copies
            finally:
                await copies._end()

    async def ahead(self) -> AsyncIterator[dict[str, int]]:
        copy = self.in_use.generation
        async for keys in self._keys(live_key(copy, "*")):
            poll_ids = [poll_id for key in keys if is_poll_id(poll_id := key.rpartition(":")[2])]
            async with self._redis.pipeline(transaction=False) as pipeline:
                for poll_id in poll_ids:
                    pipeline.hget(live_key(copy, poll_id), "version")
                    pipeline.hget(live_key(self.fresh.generation, poll_id), "version")
                async with asyncio.timeout(SECONDS):
                    versions = [int(version or 0) for version in await pipeline.execute()]
            found = zip(poll_ids, versions[::2], versions[1::2], strict=True)
            yield {poll_id: used for poll_id, used, fresh in found if used > fresh}

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        key = frozen_key(self.in_use.generation)
        async with asyncio.timeout(SECONDS):
            await self._redis.set(key, self.fresh.generation, px=_FROZEN_MILLISECONDS)
        try:
            yield
        finally:
            async with asyncio.timeout(SECONDS):
                await self._redis.delete(key)

    async def switch(self) -> None:
        keys = [GENERATION_KEY, FRESH_GENERATION_KEY, frozen_key(self.in_use.generation)]
        async with asyncio.timeout(SECONDS):
            arguments = [self.in_use.generation, self.fresh.generation, self.in_use.channels]
            unexpected = await self._switch(keys=keys, args=arguments)
        if unexpected:
            raise Displaced(f"{unexpected.decode()} is not as this process left it")

    async def _end(self) -> None:
        try:
            async with asyncio.timeout(SECONDS):
                if _text(await self._redis.get(FRESH_GENERATION_KEY)) == self.fresh.generation:
                    await self._redis.delete(FRESH_GENERATION_KEY)
            await self._remove_others()
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("a copy was not removed; the next rebuild does it", error=repr(error))

    async def _remove_others(self) -> None:
        """Removes what is neither of the copy in use nor of the one that somebody is making."""
        async with asyncio.timeout(SECONDS):
            kept = [await generation_in_use(self._redis), _text(await self._redis.get(FRESH_GENERATION_KEY))]
        async for keys in self._keys(live_key("*", "*")):
            if others := [key for key in keys if key.split(":")[2] not in kept]:
                async with asyncio.timeout(SECONDS):
                    await self._redis.unlink(*others)

    async def _keys(self, pattern: str) -> AsyncIterator[list[str]]:
        cursor = 0
        while True:
            async with asyncio.timeout(SECONDS):
                cursor, keys = await self._redis.scan(cursor, match=pattern, count=_PAGE)
            yield list(map(_text, keys))
            if not cursor:
                return


def _text(value: Any) -> str:
    return value.decode() if value else ""
