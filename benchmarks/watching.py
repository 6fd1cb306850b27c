"""Watching results and asking for them, beside a bare stream and an empty RPC; and how soon a watcher sees a vote."""

import asyncio
import statistics
import sys
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import grpc
import psutil
from redis.asyncio import Redis
from tally.command.v1.command_service_pb2 import CancelPollRequest
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub
from tally.poll.v1.poll_pb2 import POLL_STATE_OPEN
from tally.query.v1 import query_service_pb2 as pb
from tally.query.v1.query_service_pb2_grpc import QueryServiceStub

from benchmarks import ingest, servers, unary
from benchmarks.driver import Driver, new_voters
from benchmarks.figures import Effort, Figure, cpu_seconds, figure, take_turns
from benchmarks.pipeline import LIVE, RELAY, VIEWS
from benchmarks.stage import Server, Stage
from contracts.freshness import token
from contracts.live import FIRST_GENERATION, live_channel, live_key

STREAMS = "benchmarks.streams"
METHOD = "/tally.query.v1.QueryService/WatchResults"
GET_RESULTS = "/tally.query.v1.QueryService/GetResults"

# Changes that a crowd sees, one after the other.
_CHANGES = 5
_STREAMS_PER_CONNECTION = 100
_CONCURRENT = 64
# Votes per second in ordinary times.
_VOTES = 1000.0
# How long a crowd may take to see a change, and a watcher to see the last vote; seconds.
_PATIENCE = 60.0


class Crowd(NamedTuple):
    """KiB of the server for each reader that waits, its µs for each message, and seconds until all saw a change."""

    memory: float
    cpu: float
    seconds: float


class Delays(NamedTuple):
    """How long after its acknowledgement a watcher sees a vote, in ms; and votes per second."""

    p50: float
    p99: float
    rate: float


async def run(stage: Stage, effort: Effort) -> list[Figure]:
    """Each figure beside a server that does nothing but send the same bytes, or none."""
    await stage.clear()
    async with _changes(stage) as changes:
        return [
            *await _crowds(stage, effort, changes),
            *await _questions(stage, effort, changes),
            *await _delays(stage, effort),
        ]


async def _crowds(stage: Stage, effort: Effort, changes: "_Changes") -> list[Figure]:
    async def ours() -> Crowd:
        poll_id, _ = await changes.new_poll()
        async with stage.server("query_server") as server:
            return await _crowd(server, METHOD, _request(poll_id), effort.watchers, lambda: changes.next(poll_id))

    async def limit() -> Crowd:
        _, results = await changes.new_poll()
        async with (
            stage.server("benchmarks.servers", "empty") as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            tell: Any = channel.unary_unary(servers.TELL)
            return await _crowd(server, servers.WATCH, results, effort.watchers, lambda: tell(b""))

    crowds, limits = await take_turns(effort.rounds, ours, limit)
    return [
        figure(
            "watch_messages",
            [1e6 / crowd.cpu for crowd in crowds],
            [1e6 / crowd.cpu for crowd in limits],
            unit="messages/s of one core",
            baseline_name="a bare stream",
            bound=0.85,
        ),
        figure(
            "watch_memory",
            [crowd.memory for crowd in crowds],
            [crowd.memory for crowd in limits],
            unit=f"KiB for each of {effort.watchers:,} watchers",
            baseline_name="a bare stream",
            bound=1.5,
            at_most=True,
        ),
        figure(
            "watch_crowd",
            [crowd.seconds for crowd in crowds],
            [crowd.seconds for crowd in limits],
            unit=f"s until {effort.watchers:,} watchers saw a change",
            baseline_name="a bare stream",
        ),
    ]


async def _crowd(
    server: Server, method: str, request: bytes, watchers: int, change: Callable[[], Awaitable[object]]
) -> Crowd:
    # What a server needs once, whatever the number of its readers, is not counted.
    await (await Driver.prepare(STREAMS, _orders(server, method, request, 1))).done()
    before = psutil.Process(server.pid).memory_info().rss
    driver = await Driver.prepare(STREAMS, _orders(server, method, request, watchers))
    memory = psutil.Process(server.pid).memory_info().rss - before
    idle = cpu_seconds(server.pid)
    times = []
    for _ in range(_CHANGES):
        async with asyncio.TaskGroup() as tasks:
            seeing = tasks.create_task(driver.go())
            started = time.perf_counter()
            await change()
            answer = await seeing
        assert answer["complete"], f"not all of {watchers} watchers have seen the change"
        times.append(answer["at"] - started)
    cpu = cpu_seconds(server.pid) - idle
    await driver.done()
    return Crowd(memory / watchers / 1024, cpu / (_CHANGES * watchers) * 1e6, statistics.median(times))


async def _questions(stage: Stage, effort: Effort, changes: "_Changes") -> list[Figure]:
    watched, _ = await changes.new_poll()
    unwatched, _ = await changes.new_poll()
    async with (
        stage.server("query_server") as server,
        stage.server("benchmarks.servers", "empty") as empty,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        watch = QueryServiceStub(channel).WatchResults(pb.WatchResultsRequest(poll_ids=[str(watched)]))
        await watch.read()

        def ask(poll_id: UUID) -> Awaitable[unary.Calls]:
            request = pb.GetResultsRequest(poll_id=str(poll_id)).SerializeToString()
            return unary.call(server, GET_RESULTS, effort.seconds, request=request, concurrent=_CONCURRENT)

        from_memory, from_redis, limits = await take_turns(
            effort.rounds,
            partial(ask, watched),
            partial(ask, unwatched),
            lambda: unary.call(empty, servers.METHOD, effort.seconds, concurrent=_CONCURRENT),
        )
        watch.cancel()
    return [
        figure(
            f"get_results_from_{source}{suffix}",
            [getattr(calls, part) for calls in answered],
            [getattr(calls, part) for calls in limits],
            unit=unit,
            baseline_name="an empty RPC",
            bound=None if suffix else bound,
            at_most=bool(suffix),
        )
        for source, answered, bound in (("memory", from_memory, 0.85), ("redis", from_redis, 0.6))
        for suffix, part, unit in (("", "per_second", "calls/s"), ("_cpu", "cpu", "µs/call (server)"))
    ]


async def _delays(stage: Stage, effort: Effort) -> list[Figure]:
    """The whole way from a vote to a watcher: command server, relay, stream, projector, Redis, query server."""
    ordinary: list[Delays] = []
    at_full_ingest: list[Delays] = []
    async with stage.server("command_server") as commands, stage.server("query_server") as queries:
        for _ in range(effort.rounds):
            await stage.clear()
            async with stage.service(*RELAY), stage.service(*LIVE), stage.service(*VIEWS):
                poll_id = await ingest.open_poll(commands.address)
                calls = unary.orders(
                    commands, unary.METHOD, effort.seconds, poll_ids=[poll_id], rate=_VOTES, acknowledged=True
                )
                ordinary.append(await _delay(commands, queries, poll_id, unary.CALLS, calls))
                poll_id = await ingest.open_poll(commands.address)
                load = ingest.orders(commands.address, [poll_id], effort.votes, new_voters())
                at_full_ingest.append(await _delay(commands, queries, poll_id, ingest.LOAD, load))
    return [
        figure(
            f"vote_to_watcher_{times}_{part}",
            [getattr(delays, part) for delays in measured],
            [delays.p50 for delays in measured],
            unit=f"ms at {statistics.median(delays.rate for delays in measured):,.0f} votes/s",
            baseline_name="p50",
        )
        for times, measured in (("ordinary", ordinary), ("full_ingest", at_full_ingest))
        for part in ("p50", "p99")
    ]


async def _delay(commands: Server, queries: Server, poll_id: str, module: str, orders: Mapping[str, object]) -> Delays:
    voting = await Driver.prepare(module, orders)
    # A poll that was created and opened.
    request = _request(UUID(poll_id), version=2)
    watching = await Driver.prepare(STREAMS, _orders(queries, METHOD, request, 1, messages=sys.maxsize))
    async with asyncio.TaskGroup() as tasks:
        seeing = tasks.create_task(watching.go())
        answer = await voting.go()
        # That ends the stream.
        async with grpc.aio.insecure_channel(commands.address) as channel:
            await CommandServiceStub(channel).CancelPoll(CancelPollRequest(poll_id=poll_id))
        times, versions = zip(*(await seeing)["seen"], strict=True)
    await voting.done()
    await watching.done()
    delays = sorted((times[bisect_left(versions, version)] - when) * 1e3 for when, version in answer["acknowledged"])
    votes = answer.get("accepted", len(delays))
    return Delays(delays[len(delays) // 2], delays[len(delays) * 99 // 100], votes / answer["seconds"])


class _Changes:
    """Makes polls in Redis and changes them, as a projector does."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._versions = count(1)

    async def new_poll(self) -> tuple[UUID, bytes]:
        """A poll, with its results as they are sent."""
        poll_id = uuid4()
        return poll_id, await self.next(poll_id)

    async def next(self, poll_id: UUID) -> bytes:
        """Changes a poll, and returns its results."""
        version = next(self._versions)
        counts = [pb.OptionCount(option_id=name, label=name, count=version) for name in ("yes", "no", "abstention")]
        results = pb.Results(
            poll_id=str(poll_id),
            state=POLL_STATE_OPEN,
            version=version,
            counts=counts,
            total_votes=3 * version,
            source=pb.RESULTS_SOURCE_LIVE_CACHE,
            consistency_token=token(poll_id, version),
        )
        message = pb.GetResultsResponse(results=results).SerializeToString()
        async with self._redis.pipeline() as pipeline:
            pipeline.hset(live_key(FIRST_GENERATION, poll_id), mapping={"version": version, "results": message})
            pipeline.publish(live_channel(poll_id), message)
            await pipeline.execute()
        return message


@asynccontextmanager
async def _changes(stage: Stage) -> AsyncIterator[_Changes]:
    async with Redis.from_url(stage.stores.redis_url) as redis:
        yield _Changes(redis)


def _request(poll_id: UUID, version: int = 0) -> bytes:
    fresh = token(poll_id, version) if version else ""
    return pb.WatchResultsRequest(poll_ids=[str(poll_id)], at_least_as_fresh=fresh).SerializeToString()


def _orders(server: Server, method: str, request: bytes, streams: int, messages: int = 1) -> dict[str, object]:
    """Orders for benchmarks.streams."""
    return {
        "address": server.address,
        "method": method,
        "request": request.hex(),
        "streams": streams,
        "connections": -(-streams // _STREAMS_PER_CONNECTION),
        "messages": messages,
        "seconds": _PATIENCE,
    }
