"""What the code needs of a Redis, or of a Valkey, which answers with the version of Redis that it is like."""

import asyncio

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, RedisError

from runtime.stores import UnsupportedStore

# The first one whose scripts may ask who is subscribed and then write: before, they were replicated as scripts.
VERSION = (5, 0)
_SECONDS = 5.0

# What an operator has to change, and how Redis is away.
REFUSALS = (UnsupportedStore, AuthenticationError, AuthorizationError)
FAILURES = (RedisError, OSError, TimeoutError)


async def check(redis: Redis) -> str:
    """What the server says that it is. Raises UnsupportedStore where it is too old, and what FAILURES lists."""
    try:
        async with asyncio.timeout(_SECONDS):
            version = str((await redis.info("server"))["redis_version"])
    except (NoPermissionError, KeyError):
        return "Redis, which does not tell its version"
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < VERSION:
        raise UnsupportedStore(f"this is Redis {version}, and Tally needs {VERSION[0]}.{VERSION[1]} or newer")
    return f"Redis {version}"
