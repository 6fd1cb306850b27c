"""What a caller is told about whatever a handler raised: the one place where failures become refusals."""

import structlog
from google.rpc.status_pb2 import Status
from tally.poll.v1.error_reason_pb2 import ErrorReason

from contracts.refusals import Refusal, invalid_request
from runtime import postgres
from runtime.draining import Stopping
from runtime.wire import InvalidMessage

log = structlog.get_logger()


def refusal_of(error: Exception, store_failures: tuple[type[Exception], ...] = postgres.UNAVAILABLE) -> Refusal:
    """What a caller is told about whatever a handler raised; `store_failures`: what a store raises that does not serve.

    Defects are logged here and nothing of them leaves.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, InvalidMessage):
        return invalid_request(error.fields)
    if isinstance(error, Stopping):
        return Refusal(ErrorReason.ERROR_REASON_STORE_UNAVAILABLE, str(error))
    if isinstance(error, postgres.WITHOUT_SCHEMA):
        log.error("a database lacks its schema, or its role a right: run `tally migrate`", error=repr(error))
        return Refusal(ErrorReason.ERROR_REASON_STORE_UNAVAILABLE, "a database lacks its schema; try again later")
    if isinstance(error, store_failures):
        log.warning("a store did not answer", error=repr(error))
        return Refusal(ErrorReason.ERROR_REASON_STORE_UNAVAILABLE, "a database did not answer in time; try again")
    log.error("defect", exc_info=error)
    return Refusal(ErrorReason.ERROR_REASON_INTERNAL, "internal error")


def status_of(error: Exception) -> Status:
    """The `google.rpc.Status` for whatever a handler raised."""
    return refusal_of(error).status()
