"""What the read side's stores raise, and what a caller is told about it."""

from google.rpc.status_pb2 import Status
from redis.exceptions import RedisError

from contracts.failures import refusal_of
from runtime import postgres

# Redis may also answer that it does not serve: it is a replica, loads its data, or has no memory left.
STORE_FAILURES = (*postgres.UNAVAILABLE, RedisError)


def status_of(error: Exception) -> Status:
    """The `google.rpc.Status` for whatever a handler raised."""
    return refusal_of(error, STORE_FAILURES).status()
