"""A gRPC server as every service runs it: bounded, validated, observed, with health and reflection."""

import asyncio
import inspect
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import grpc
import protovalidate
import structlog
from google.protobuf.message import DecodeError, Message
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status
from prometheus_client import REGISTRY

from runtime.call_metrics import CallMetrics

log = structlog.get_logger()

HandlerT = TypeVar("HandlerT", bound=Callable[..., Any])
MessageT = TypeVar("MessageT", bound=Message)

# A request above this is refused with a clear error.
MAX_REQUEST_BYTES = 4 << 20
# Above this gRPC itself breaks the call off, before the request is in memory.
_MAX_MESSAGE_BYTES = 16 << 20
_DRAIN_SECONDS = 5.0

_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # More calls than these at one moment are answered CANCELLED before anybody has seen them: room for a crowd.
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 40_000),
    # Clients may ping every 10 s, also without a call under way; one that pings more often is sent away.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]

_calls = CallMetrics()
REGISTRY.register(_calls)


class InvalidMessage(Exception):  # noqa: N818 - the caller's fault, not an error of ours
    """A request that cannot be read, or breaks the rules of its message; `fields` is path → rule."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__(str(fields))
        self.fields = fields


def checks_itself(handler: HandlerT) -> HandlerT:
    """Marks a unary handler that calls `check` unless it has seen for itself that the request keeps every rule."""
    handler.checks_itself = True  # type: ignore[attr-defined]
    return handler


def reads_bytes(handler: HandlerT) -> HandlerT:
    """Marks a stream's handler that is given its requests as bytes, and reads them by `read_message` or by itself."""
    handler.reads_bytes = True  # type: ignore[attr-defined]
    return handler


def read_message(kind: type[MessageT], data: bytes) -> MessageT:
    """The request, checked against its rules. Raises InvalidMessage."""
    request = _bounded(kind.FromString)(data)
    check(request)
    return cast(MessageT, request)


class _Unreadable(NamedTuple):
    """Stands for a request whose bytes are too many, or not of its message: the handler's wrapper refuses it."""

    problem: str


def add_service(
    server: grpc.aio.Server,
    add_servicer: Callable[[Any, Any], None],
    servicer: object,
    to_status: Callable[[Exception], Status],
) -> None:
    """Adds a service to a server: `add_servicer` is the generated add_…Servicer_to_server.

    Each request is checked against its size and its protovalidate rules before its handler sees it; the rules are left
    to a handler that is marked with `checks_itself`. Whatever a handler raises becomes the status that `to_status`
    gives. A handler may return serialized bytes in place of a message. Streaming handlers are coroutines that use
    `context.write`, not generators.
    """
    add_servicer(servicer, _Wrapping(server, to_status))


async def serve(
    server: grpc.aio.Server, listen: str, services: Sequence[str], stop: asyncio.Event, ready: Callable[[int], None]
) -> None:
    """Listens on `listen` (host:port) until `stop` is set, then finishes the calls under way, for 5 s at most.

    `services` are the full names that health and reflection list; `ready` is called with the port once it serves.
    """
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection([*services, "grpc.health.v1.Health", reflection.SERVICE_NAME], server)
    for name in ("", *services):
        await health.set(name, HealthCheckResponse.NOT_SERVING)
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError:
        sys.exit(f"cannot listen on {listen}: somebody else does, or it is no address of this machine")
    await server.start()
    for name in ("", *services):
        await health.set(name, HealthCheckResponse.SERVING)
    ready(port)
    try:
        await stop.wait()
    finally:
        log.info("draining", seconds=_DRAIN_SECONDS)
        await health.enter_graceful_shutdown()
        await server.stop(_DRAIN_SECONDS)


def new_server(*, share_port: bool = False, max_connection_age: float | None = None) -> grpc.aio.Server:
    """A server with our limits, without services yet. `share_port` lets several processes serve on one port; two that
    did so by accident would each get half of the calls.

    After `max_connection_age` seconds, a tenth more or less by chance, a client is told to make its next calls on a new
    connection, which may reach another process. Calls under way have a tenth of that time to end, then they get
    UNAVAILABLE.
    """
    options = [*_OPTIONS, ("grpc.so_reuseport", int(share_port))]
    if max_connection_age is not None:
        options.append(("grpc.max_connection_age_ms", int(max_connection_age * 1000)))
        options.append(("grpc.max_connection_age_grace_ms", int(max_connection_age * 100)))
    return grpc.aio.server(options=options)


class _Wrapping:
    """Takes the place of the server while generated code registers handlers, and wraps each of them."""

    def __init__(self, server: grpc.aio.Server, to_status: Callable[[Exception], Status]) -> None:
        self._server = server
        self._to_status = to_status

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Left out: the same handlers come again, by name, in add_registered_method_handlers."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        wrapped = {name: self._wrap(f"/{service}/{name}", handler) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, wrapped),))

    def _wrap(self, method: str, handler: Any) -> Any:
        read, write = _bounded(handler.request_deserializer), _serialize
        if getattr(handler.stream_stream, "reads_bytes", False):
            read = _bounded(bytes)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), read, write)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._watch(method, handler.unary_stream), read, write)
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(self._stream(method, handler.stream_stream), read, write)
        return grpc.stream_unary_rpc_method_handler(self._collect(method, handler.stream_unary), read, write)

    def _unary(self, method: str, handler: Any) -> Any:
        times = _calls.times(method)
        check_first = _check_readable if getattr(handler, "checks_itself", False) else check

        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            started = time.perf_counter()
            try:
                check_first(request)
                response = await handler(request, context)
            except asyncio.CancelledError:
                _calls.ended(method, "CANCELLED")
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets a status
                await self._refuse(method, context, error)
            times.add(time.perf_counter() - started)
            return response

        return call

    def _watch(self, method: str, handler: Any) -> Any:
        assert inspect.iscoroutinefunction(handler), f"{method} must write to its context"

        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            try:
                check(request)
                await handler(request, context)
            except asyncio.CancelledError:
                _calls.ended(method, "CANCELLED")
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets a status
                await self._refuse(method, context, error)
            _calls.ended(method, "OK")

        return call

    def _stream(self, method: str, handler: Any) -> Any:
        assert inspect.iscoroutinefunction(handler), f"{method} must write to its context"

        async def call(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> None:
            try:
                await handler(_checked(requests), context)
            except asyncio.CancelledError:
                _calls.ended(method, "CANCELLED")
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets a status
                await self._refuse(method, context, error)
            _calls.ended(method, "OK")

        return call

    def _collect(self, method: str, handler: Any) -> Any:
        async def call(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                response = await handler(_checked(requests), context)
            except asyncio.CancelledError:
                _calls.ended(method, "CANCELLED")
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets a status
                await self._refuse(method, context, error)
            _calls.ended(method, "OK")
            return response

        return call

    async def _refuse(self, method: str, context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        status = rpc_status.to_status(self._to_status(error))
        _calls.ended(method, status.code.name)
        await context.abort_with_status(status)


def _bounded(deserialize: Callable[[bytes], Message | bytes]) -> Callable[[bytes], Message | bytes | _Unreadable]:
    def read(data: bytes) -> Message | bytes | _Unreadable:
        if len(data) > MAX_REQUEST_BYTES:
            return _Unreadable(f"has {len(data):,} bytes; at most {MAX_REQUEST_BYTES:,} are allowed")
        try:
            return deserialize(data)
        except DecodeError:
            return _Unreadable("is not a valid message of its type")

    return read


def _serialize(response: Message | bytes) -> bytes:
    return response if isinstance(response, bytes) else response.SerializeToString()


def _check_readable(request: Any) -> None:
    if isinstance(request, _Unreadable):
        raise InvalidMessage({"": request.problem})


def check(request: Any) -> None:
    """Raises InvalidMessage where a request breaks a rule of its message."""
    _check_readable(request)
    if isinstance(request, bytes):
        # Whoever asked for bytes checks what it reads in them.
        return
    try:
        protovalidate.validate(request)
    except protovalidate.ValidationError as error:
        raise InvalidMessage(_fields(error.violations)) from error


def violations(message: Message) -> Mapping[str, str]:
    """The rules that a message breaks: path of the field → rule."""
    return _fields(protovalidate.collect_violations(message))


def _fields(broken: Iterable[protovalidate.Violation]) -> Mapping[str, str]:
    return {_path(violation): violation.proto.message for violation in broken}


async def _checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        check(request)
        yield request


def _path(violation: protovalidate.Violation) -> str:
    """The field that breaks a rule, as AIP-193 writes it: `poll.options[2].label`."""
    parts = []
    for element in violation.proto.field.elements if violation.proto.field else ():
        index = f"[{element.subscript.value}]" if element.subscript else ""
        parts.append(f"{element.field_name}{index}")
    return ".".join(parts)
