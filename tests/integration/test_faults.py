"""Each failure leaves the others standing: real processes, one fault at a time, while voters and readers go on.

What callers were answered is recorded, and only that is judged: no count is above the votes that were sent by then or,
where a reader asked for it, below those that had been acknowledged; versions never fall; in the end all is counted.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

import grpc
import nats
import pytest
import redis.asyncio
from tally.command.v1 import command_service_pb2 as command
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub
from tally.poll.v1.poll_pb2 import VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec
from tally.query.v1 import query_service_pb2 as query
from tally.query.v1.query_service_pb2_grpc import QueryServiceStub

from contracts.bus import STREAM
from migrations import migrate_read, migrate_write
from runtime import embedded
from runtime.supervisor import Process
from tests.processes import eventually, service
from tests.proxy import Proxy, proxy
from tests.servers import VOTER_SECRET, refused

if TYPE_CHECKING:
    from tally.command.v1.command_service_pb2_grpc import CommandServiceAsyncStub
    from tally.query.v1.query_service_pb2_grpc import QueryServiceAsyncStub

LIVE, STORED = query.RESULTS_SOURCE_LIVE_CACHE, query.RESULTS_SOURCE_READ_DATABASE


class Deployment(NamedTuple):
    """Every process of Tally, each store for itself, and clients."""

    stores: embedded.Stores
    to_write_database: Proxy
    to_read_database: Proxy
    command_server: Process
    relay: Process
    command: CommandServiceAsyncStub
    query: QueryServiceAsyncStub


@pytest.fixture(scope="module")
async def deployment() -> AsyncIterator[Deployment]:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tally-faults-")))
        stores = await stack.enter_async_context(embedded.stores(folder, ["tally_write", "tally_read"]))
        await migrate_write(stores.dsn("tally_write"))
        await migrate_read(stores.dsn("tally_read"))
        port = int(stores.dsn("tally_write").rpartition("/")[0].rpartition(":")[2])
        to_write = await stack.enter_async_context(proxy(port))
        to_read = await stack.enter_async_context(proxy(port))
        write_dsn = stores.dsn("tally_write").replace(f":{port}/", f":{to_write.port}/")
        read_dsn = stores.dsn("tally_read").replace(f":{port}/", f":{to_read.port}/")
        nats_url, redis_url, secret = stores.nats_url, stores.redis_url, VOTER_SECRET
        listen = [f"127.0.0.1:{embedded.free_port()}" for _ in range(2)]
        services = [
            service(folder, "command_server", command_listen=listen[0], write_dsn=write_dsn, voter_secret=secret),
            service(folder, "relay", write_dsn=write_dsn, nats_url=nats_url),
            service(folder, "projector", "live", nats_url=nats_url, redis_url=redis_url),
            service(folder, "projector", "views", nats_url=nats_url, read_dsn=read_dsn),
            service(
                folder,
                "query_server",
                query_listen=listen[1],
                read_dsn=read_dsn,
                redis_url=redis_url,
                voter_secret=secret,
            ),
        ]
        processes = [await stack.enter_async_context(started) for started in services]
        # A server that comes back is to be found again at once.
        options = [("grpc.min_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100)]
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(address, options=options)) for address in listen
        ]
        yield Deployment(
            stores,
            to_write,
            to_read,
            processes[0],
            processes[1],
            CommandServiceStub(channels[0]),
            QueryServiceStub(channels[1]),
        )


class Traffic:
    """One poll with a voter who sends vote after vote, a reader who asks without end, and a watcher."""

    def __init__(self, deployment: Deployment, poll_id: str) -> None:
        self._deployment = deployment
        self.poll_id = poll_id
        self._stop = False
        self.sent = 0
        self.acknowledged = 0
        self.token = ""
        self.watched: list[query.Results] = []

    async def results(self, at_least_as_fresh: str = "", seconds: float = 5) -> query.Results:
        """What a reader is told, judged by what voters were told."""
        acknowledged = self.acknowledged if at_least_as_fresh else 0
        request = query.GetResultsRequest(poll_id=self.poll_id, at_least_as_fresh=at_least_as_fresh)
        results = (await self._deployment.query.GetResults(request, timeout=seconds)).results
        assert acknowledged <= results.total_votes <= self.sent
        return results

    async def votes_go_on(self, count: int = 10) -> None:
        before = self.acknowledged
        await reaches(lambda: self.acknowledged, before + count)

    async def watching_goes_on(self) -> None:
        """Returns once the watcher has been told of a vote that is acknowledged from now on."""
        before = self.acknowledged
        await reaches(lambda: self.watched[-1].total_votes, before + 1)

    async def read_from(self, source: query.ResultsSource.ValueType) -> None:
        """Waits until everything acknowledged can be read, and comes from this store."""

        async def there() -> None:
            results = await self.results(self.token)
            assert results.source == source

        await eventually(there)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Traffic]:
        """Runs while the context lasts; after that everything that was acknowledged must have been counted."""
        async with asyncio.TaskGroup() as tasks:
            voting, watching = tasks.create_task(self._vote()), tasks.create_task(self._watch())
            await reaches(lambda: len(self.watched), 1)
            yield self
            self._stop = True
            await voting
            await self.read_from(LIVE)
            await reaches(lambda: self.watched[-1].total_votes, self.acknowledged)
            watching.cancel()
        versions = [results.version for results in self.watched]
        assert versions == sorted(set(versions))
        request = query.GetPollRequest(poll_id=self.poll_id, at_least_as_fresh=self.token)
        await self._deployment.query.GetPoll(request, timeout=10)

    async def _vote(self) -> None:
        while not self._stop:
            self.sent += 1
            voter = f"voter-{self.sent}"
            request = command.CastVoteRequest(
                poll_id=self.poll_id, voter_id=voter, option_ids=["red"], idempotency_key="k" * 16
            )
            answer = await patiently(lambda request=request: self._deployment.command.CastVote(request, timeout=5))  # type: ignore[misc]
            self.token = answer.consistency_token
            self.acknowledged += 1
            await asyncio.sleep(0.01)

    async def _watch(self) -> None:
        request = query.WatchResultsRequest(poll_ids=[self.poll_id], at_least_as_fresh=self.token)
        async for response in self._deployment.query.WatchResults(request):
            assert response.results.total_votes <= self.sent
            self.watched.append(response.results)


async def patiently(call: Callable[[], Awaitable[command.CastVoteResponse]]) -> command.CastVoteResponse:
    """Sends the same vote until it is answered."""
    while True:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise
            await asyncio.sleep(0.02)


async def reaches(value: Callable[[], int], wanted: int) -> None:
    async def reached() -> None:
        assert value() >= wanted

    await eventually(reached)


@pytest.fixture
async def traffic(deployment: Deployment) -> AsyncIterator[Traffic]:
    options = [PollOption(option_id=name, label=name) for name in ("red", "blue")]
    spec = PollSpec(title="Which?", method=VOTING_METHOD_SINGLE_CHOICE, options=options)
    poll_id = (await deployment.command.CreatePoll(command.CreatePollRequest(poll=spec), timeout=10)).poll_id
    opened = await deployment.command.OpenPoll(command.OpenPollRequest(poll_id=poll_id), timeout=10)
    made = Traffic(deployment, str(UUID(poll_id)))
    made.token = opened.consistency_token
    async with made.running() as running:
        await running.votes_go_on(3)
        yield running


async def test_redis_dies_and_is_wiped(deployment: Deployment, traffic: Traffic) -> None:
    await traffic.read_from(LIVE)
    deployment.stores.redis_process.kill()
    await deployment.stores.redis_process.ended()
    await traffic.votes_go_on()
    await traffic.read_from(STORED)
    await traffic.watching_goes_on()
    await deployment.stores.redis_process.start()
    async with redis.asyncio.Redis.from_url(deployment.stores.redis_url) as client:
        await client.flushall()
    await traffic.read_from(LIVE)
    await traffic.watching_goes_on()


async def test_nats_dies_and_its_stream_is_deleted(deployment: Deployment, traffic: Traffic) -> None:
    deployment.stores.nats_process.kill()
    await deployment.stores.nats_process.ended()
    await traffic.votes_go_on()
    last, again = await traffic.results(), await traffic.results()
    # The last state, which says how old it is.
    assert last.version == again.version == traffic.watched[-1].version
    assert last.as_of == again.as_of
    behind = await refused(traffic.results(traffic.token, seconds=0.3))
    assert behind.reason == "READ_MODEL_BEHIND"
    await deployment.stores.nats_process.start()
    await traffic.watching_goes_on()
    bus = await nats.connect(deployment.stores.nats_url)
    await bus.jetstream().delete_stream(STREAM)
    await bus.close()
    await traffic.watching_goes_on()


async def test_the_whole_write_side_dies(deployment: Deployment, traffic: Traffic) -> None:
    await traffic.read_from(LIVE)
    for process in (deployment.command_server, deployment.relay):
        process.kill()
        await process.ended()
    await deployment.to_write_database.cut()
    assert (await traffic.results(traffic.token)).source == LIVE
    fresh = query.GetPollRequest(poll_id=traffic.poll_id, at_least_as_fresh=traffic.token)
    await deployment.query.GetPoll(fresh, timeout=5)
    request = query.GetVoteRequest(poll_id=traffic.poll_id, voter_id="voter-1")
    assert (await deployment.query.GetVote(request, timeout=5)).receipt.receipt_id
    assert len((await deployment.query.ListPolls(query.ListPollsRequest(), timeout=5)).polls) > 0
    # A watch that begins now.
    async for response in deployment.query.WatchResults(query.WatchResultsRequest(poll_ids=[traffic.poll_id])):
        assert response.results.total_votes >= traffic.acknowledged
        break
    await deployment.to_write_database.restore()
    for process in (deployment.command_server, deployment.relay):
        await process.start()
    await traffic.votes_go_on()


async def test_the_read_database_goes_away(deployment: Deployment, traffic: Traffic) -> None:
    await deployment.to_read_database.cut()
    await traffic.votes_go_on()
    await traffic.read_from(LIVE)
    await traffic.watching_goes_on()
    refusal = await refused(deployment.query.GetPoll(query.GetPollRequest(poll_id=traffic.poll_id), timeout=8))
    assert refusal.reason == "STORE_UNAVAILABLE"
    await deployment.to_read_database.restore()
