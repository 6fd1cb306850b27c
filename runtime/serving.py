"""A gRPC server as every service runs it: bounded, validated, observed, with health and reflection."""

import asyncio
import inspect
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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

from runtime import wire
from runtime.call_metrics import CallMetrics
from runtime.draining import Drain
from runtime.stores import Store, until_supported
from runtime.wire import InvalidMessage

log = structlog.get_logger()

HandlerT = TypeVar("HandlerT", bound=Callable[..., Any])
MessageT = TypeVar("MessageT", bound=Message)
ResultT = TypeVar("ResultT")

# A request above this is refused with a clear error.
MAX_REQUEST_BYTES = 4 << 20
# Above this gRPC itself breaks the call off, before the request is in memory.
_MAX_MESSAGE_BYTES = 16 << 20
# In a request up to this size there is no room for many entries of a list; one up to the second is checked at once.
_SMALL_BYTES = 1 << 10
_QUICKLY_CHECKED_BYTES = 1 << 13
_STOP_SECONDS = 1.0

_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # More calls than these at one moment are answered CANCELLED before anybody has seen them: room for a crowd.
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 40_000),
    # A stream's caller may send this much ahead of what the server reads. gRPC would let it grow with the throughput
    # to what a fast network holds: 40 MB for each stream (docs/adr/0014).
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 16),
    # Clients may ping every 10 s, also without a call under way; one that pings more often is sent away.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]

# One thread: what is done there takes turns with the event loop, and two of them would take twice as many.
_workshop = ThreadPoolExecutor(1, "workshop")
_calls = CallMetrics()
REGISTRY.register(_calls)


def checks_itself(handler: HandlerT) -> HandlerT:
    """Marks a unary handler that calls `check` unless it has seen for itself that the request keeps every rule."""
    handler.checks_itself = True  # type: ignore[attr-defined]
    return handler


def reads_bytes(handler: HandlerT) -> HandlerT:
    """Marks a stream's handler that is given its requests as bytes, and reads them by `read_message` or by itself."""
    handler.reads_bytes = True  # type: ignore[attr-defined]
    return handler


def read_message(kind: type[MessageT], data: bytes) -> MessageT:
    """The request, or a message in it. Raises InvalidMessage where the bytes are not of that message; its rules are not
    checked."""
    request = _bounded(kind.FromString)(data)
    _check_readable(request)
    return cast(MessageT, request)


class _Unreadable(NamedTuple):
    """Stands for a request that is too much to read, or not of its message: the handler's wrapper refuses it."""

    fields: Mapping[str, str]


class Server(NamedTuple):
    """A gRPC server, and the calls that it has under way."""

    grpc: grpc.aio.Server
    drain: Drain


def add_service(
    server: Server,
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
    server: Server,
    listen: str,
    services: Sequence[str],
    stores: Sequence[Store],
    stop: asyncio.Event,
    ready: Callable[[int], None],
) -> None:
    """Listens on `listen` (host:port) until `stop` is set, then finishes the calls under way, for 5 s at most; what is
    not finished or not begun by then ends with UNAVAILABLE.

    `services` are the full names that health and reflection list. They are NOT_SERVING until the `stores` can be used;
    then `ready` is called with the port. What happens to the stores after that changes neither.
    """
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server.grpc)
    reflection.enable_server_reflection([*services, "grpc.health.v1.Health", reflection.SERVICE_NAME], server.grpc)
    for name in ("", *services):
        await health.set(name, HealthCheckResponse.NOT_SERVING)
    try:
        port = server.grpc.add_insecure_port(listen)
    except RuntimeError:
        sys.exit(f"cannot listen on {listen}: somebody else does, or it is no address of this machine")
    await server.grpc.start()
    try:
        if await _before(stop, until_supported(stores)):
            for name in ("", *services):
                await health.set(name, HealthCheckResponse.SERVING)
            ready(port)
            await stop.wait()
    finally:
        log.info("draining")
        await health.enter_graceful_shutdown()
        await server.drain.run(port)
        await server.grpc.stop(_STOP_SECONDS)


async def _before(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Whether `work` ended before `stop` was set."""
    async with asyncio.TaskGroup() as tasks:
        working, stopping = tasks.create_task(work), tasks.create_task(stop.wait())
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
        done = working.done()
        working.cancel()
        stopping.cancel()
    return done


def new_server(*, share_port: bool = False, max_connection_age: float | None = None) -> Server:
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
    return Server(grpc.aio.server(options=options), Drain())


class _Wrapping:
    """Takes the place of the server while generated code registers handlers, and wraps each of them."""

    def __init__(self, server: Server, to_status: Callable[[Exception], Status]) -> None:
        self._server = server.grpc
        self._drain = server.drain
        self._to_status = to_status

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Left out: the same handlers come again, by name, in add_registered_method_handlers."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        wrapped = {name: self._wrap(f"/{service}/{name}", handler) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, wrapped),))

    def _wrap(self, method: str, handler: Any) -> Any:
        read, write = _bounded(handler.request_deserializer), _serialize
        if getattr(handler.stream_stream or handler.stream_unary, "reads_bytes", False):
            read = _bounded(bytes)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), read, write)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._watch(method, handler.unary_stream), read, write)
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(self._stream(method, handler.stream_stream), read, write)
        return grpc.stream_unary_rpc_method_handler(self._collect(method, handler.stream_unary), read, write)

    def _unary(self, method: str, handler: Any) -> Any:
        times, drain = _calls.times(method), self._drain
        check_first = not getattr(handler, "checks_itself", False)

        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            started = time.perf_counter()
            try:
                if drain.holding:
                    await drain.hold()
                _check_readable(request)
                drain.calls += 1
                try:
                    if check_first:
                        await _check_apart(request)
                    response = await handler(request, context)
                finally:
                    drain.calls -= 1
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
                with self._drain.stream():
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

        async def call(_: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> None:
            try:
                with self._drain.stream():
                    await handler(_Requests(context, self._drain), context)
            except asyncio.CancelledError:
                _calls.ended(method, "CANCELLED")
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets a status
                await self._refuse(method, context, error)
            _calls.ended(method, "OK")

        return call

    def _collect(self, method: str, handler: Any) -> Any:
        async def call(_: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                with self._drain.stream():
                    response = await handler(_Requests(context, self._drain), context)
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
        task = asyncio.current_task()
        if task and task.cancelling():
            # The caller hung up, for which gRPC cancels the handler, and what was written meanwhile failed: no defect.
            _calls.ended(method, "CANCELLED")
            raise asyncio.CancelledError
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        status = rpc_status.to_status(self._to_status(error))
        _calls.ended(method, status.code.name)
        await context.abort_with_status(status)


def _bounded(deserialize: Callable[[bytes], Message | bytes]) -> Callable[[bytes], Message | bytes | _Unreadable]:
    # A generated FromString belongs to its class.
    kind = getattr(deserialize, "__self__", None)
    descriptor = kind.DESCRIPTOR if kind else None

    def read(data: bytes) -> Message | bytes | _Unreadable:
        if len(data) > _SMALL_BYTES:
            if len(data) > MAX_REQUEST_BYTES:
                return _Unreadable({"": f"has {len(data):,} bytes; at most {MAX_REQUEST_BYTES:,} are allowed"})
            if descriptor and (fields := wire.excess(data, descriptor)):
                return _Unreadable(fields)
        try:
            return deserialize(data)
        except DecodeError:
            return _Unreadable({"": "is not a valid message of its type"})

    return read


def _serialize(response: Message | bytes) -> bytes:
    return response if isinstance(response, bytes) else response.SerializeToString()


def _check_readable(request: Any) -> None:
    if isinstance(request, _Unreadable):
        raise InvalidMessage(request.fields)


def check(request: Any) -> None:
    """Raises InvalidMessage where a request breaks a rule of its message."""
    _check_readable(request)
    try:
        protovalidate.validate(request)
    except protovalidate.ValidationError as error:
        raise InvalidMessage(_fields(error.violations)) from error


def violations(message: Message) -> Mapping[str, str]:
    """The rules that a message breaks: path of the field → rule."""
    return _fields(protovalidate.collect_violations(message))


def _fields(broken: Iterable[protovalidate.Violation]) -> Mapping[str, str]:
    return {_path(violation): violation.proto.message for violation in broken}


async def apart(work: Callable[..., ResultT], *arguments: Any) -> ResultT:
    """What `work` returns, done beside the event loop: for long computations, one after the other."""
    return await asyncio.get_running_loop().run_in_executor(_workshop, work, *arguments)


async def _check_apart(request: Any) -> None:
    if request.ByteSize() > _QUICKLY_CHECKED_BYTES:
        await apart(check, request)
    else:
        check(request)


class _Requests:
    """The requests of a stream, checked. It keeps none: gRPC's own iterator, which keeps the latest until the next one
    comes, would hold 4 MiB for each stream whose caller waits, or is made to wait."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], drain: Drain) -> None:
        self._read = context.read
        self._drain = drain

    def __aiter__(self) -> "_Requests":
        return self

    async def __anext__(self) -> Any:
        request = await self._drain.read(self._read)
        if request is grpc.aio.EOF:
            raise StopAsyncIteration
        _check_readable(request)
        if not isinstance(request, bytes):
            await _check_apart(request)
        return request


def _path(violation: protovalidate.Violation) -> str:
    """The field that breaks a rule, as AIP-193 writes it: `poll.options[2].label`."""
    parts = []
    for element in violation.proto.field.elements if violation.proto.field else ():
        index = f"[{element.subscript.value}]" if element.subscript else ""
        parts.append(f"{element.field_name}{index}")
    return ".".join(parts)
