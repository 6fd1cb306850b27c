"""Reads from standbys of the read database, which lag, die and are promoted while readers and voters go on."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import grpc
import pytest
from tally.query.v1 import query_service_pb2 as pb
from tally.query.v1.query_service_pb2_grpc import QueryServiceStub

from contracts.freshness import token
from migrations import migrate_read
from projector.__main__ import ReadDatabaseSettings, project
from projector.views import Views
from query_server.__main__ import QuerySettings
from query_server.__main__ import serve as serve_queries
from relay.__main__ import RelaySettings, relay
from runtime import replicas
from runtime.embedded import Postgres
from tests import standby
from tests.event_log import EventLog, WrittenPoll
from tests.processes import eventually
from tests.servers import VOTER_SECRET, refused, serving, sql
from tests.standby import Server, Standby

if TYPE_CHECKING:
    from tally.query.v1.query_service_pb2_grpc import QueryServiceAsyncStub

STORED = pb.RESULTS_SOURCE_READ_DATABASE


class Pair(NamedTuple):
    """A read database on two servers."""

    primary: Server
    standby: Server

    @property
    def dsn(self) -> str:
        """The standby comes first: the order of the servers does not matter."""
        return standby.any_of(*(server.cluster.dsn("tally_read") for server in (self.standby, self.primary)))


@asynccontextmanager
async def a_pair() -> AsyncIterator[Pair]:
    with tempfile.TemporaryDirectory(prefix="tally-pair-") as folder:
        first, second = Path(folder, "first"), Path(folder, "second")
        cluster = Postgres(first, ["tally_read"], set(), shared_buffers="32MB")
        async with standby.serving(cluster, first) as primary:
            await cluster.provision()
            await migrate_read(cluster.dsn("tally_read"))
            async with standby.serving(Standby(second, cluster), second) as following:
                yield Pair(primary, following)


@pytest.fixture(scope="module")
async def pair() -> AsyncIterator[Pair]:
    """Shared by the tests that leave both as they were."""
    async with a_pair() as pair:
        yield pair


@asynccontextmanager
async def reading(pair: Pair, write_dsn: str, nats_url: str, redis_url: str) -> AsyncIterator[QueryServiceAsyncStub]:
    """A query server; votes come to the read database, and none to Redis."""
    query = QuerySettings(query_listen="127.0.0.1:0", read_dsn=pair.dsn, redis_url=redis_url, voter_secret=VOTER_SECRET)
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(relay(RelaySettings(write_dsn=write_dsn, nats_url=nats_url), stop))
        tasks.create_task(project(Views, ReadDatabaseSettings(read_dsn=pair.dsn, nats_url=nats_url), stop))
        async with serving(lambda stop, ready: serve_queries(query, stop, ready)) as channel:
            yield QueryServiceStub(channel)
        stop.set()


class Readers:
    """Callers that ask for a poll all the time, each never for less than it has seen; and one that watches it."""

    def __init__(self, stub: QueryServiceAsyncStub, poll: WrittenPoll) -> None:
        self._stub = stub
        self._poll = poll
        self._poll_id = str(poll.poll_id)
        self._stop = False
        self.failures: list[str] = []
        # What each was answered, version by version, in order.
        self.versions: list[list[int]] = []
        self.answers = 0

    @asynccontextmanager
    async def running(self, count: int = 4) -> AsyncIterator[Readers]:
        async with asyncio.TaskGroup() as tasks:
            for number in range(count):
                tasks.create_task(self._results() if number % 2 else self._view())
            watching = tasks.create_task(self._watch())
            yield self
            self._stop = True
            watching.cancel()
        assert self.failures == []
        for versions in self.versions:
            assert versions == sorted(versions)

    async def went_on(self, answers: int = 20) -> None:
        """Returns once so many more calls have been answered."""
        before = self.answers

        async def answered() -> None:
            assert self.answers >= before + answers

        await eventually(answered)

    async def _results(self) -> None:
        async def ask(fresh: str) -> tuple[int, str]:
            request = pb.GetResultsRequest(poll_id=self._poll_id, at_least_as_fresh=fresh)
            results = (await self._stub.GetResults(request, timeout=8)).results
            assert results.source == STORED
            return results.version, results.consistency_token

        await self._ask(ask)

    async def _view(self) -> None:
        async def ask(fresh: str) -> tuple[int, str]:
            request = pb.GetPollRequest(poll_id=self._poll_id, at_least_as_fresh=fresh)
            version = (await self._stub.GetPoll(request, timeout=8)).poll.version
            return version, _token(self._poll, version)

        await self._ask(ask)

    async def _ask(self, ask: Any) -> None:
        seen: list[int] = []
        self.versions.append(seen)
        fresh = ""
        while not self._stop:
            try:
                version, fresh = await ask(fresh)
            except grpc.aio.AioRpcError as error:
                self.failures.append(f"{error.code()}: {error.details()}")
            else:
                seen.append(version)
                self.answers += 1
            await asyncio.sleep(0.005)

    async def _watch(self) -> None:
        seen: list[int] = []
        self.versions.append(seen)
        async for response in self._stub.WatchResults(pb.WatchResultsRequest(poll_ids=[self._poll_id])):
            seen.append(response.results.version)


def _token(poll: WrittenPoll, version: int) -> str:
    return token(poll.poll_id, version, poll.log_epoch)


async def results_are(stub: QueryServiceAsyncStub, poll: WrittenPoll, version: int) -> None:
    """Waits until readers see this version."""
    request = pb.GetResultsRequest(poll_id=str(poll.poll_id), at_least_as_fresh=_token(poll, version))
    assert (await stub.GetResults(request, timeout=15)).results.version == version


async def test_reads_go_to_the_standby_and_to_the_primary_while_there_is_none(
    pair: Pair, log: EventLog, write_dsn: str, nats_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "_SPREAD_SECONDS", 0.2)
    poll = await log.poll()

    async def on(server: Server, other: Server) -> None:
        assert await server.sessions("query_server") > 0
        assert await other.sessions("query_server") == 0

    async with reading(pair, write_dsn, nats_url, redis_url) as stub:
        await results_are(stub, poll, 2)
        async with Readers(stub, poll).running() as readers:
            await eventually(lambda: on(pair.standby, pair.primary))
            assert await pair.primary.sessions("projector views") == 2
            for _ in range(10):
                await pair.standby.run(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'query_server'"
                )
                await readers.went_on(5)
            await pair.standby.die()
            await readers.went_on()
            assert await pair.primary.sessions("query_server") > 0
            await pair.standby.process.start()
            await eventually(lambda: on(pair.standby, pair.primary))
            await readers.went_on()


async def test_a_standby_that_lags_makes_readers_wait_and_never_go_back(
    pair: Pair, log: EventLog, write_dsn: str, nats_url: str, redis_url: str
) -> None:
    poll = await log.poll()
    async with reading(pair, write_dsn, nats_url, redis_url) as stub:
        await results_are(stub, poll, 2)
        async with Readers(stub, poll).running() as readers:
            await pair.standby.run("SELECT pg_wal_replay_pause()")
            try:
                await log.cast(poll)
                waiting = asyncio.gather(*fresh_reads(stub, poll, 3, seconds=15))
                # The primary has it, and has announced it.
                await eventually(lambda: primary_has(pair, poll.poll_id, 3))
                for read in fresh_reads(stub, poll, 3, seconds=0.4):
                    assert (await refused(read)).reason == "READ_MODEL_BEHIND"
                await readers.went_on()
                assert {versions[-1] for versions in readers.versions} == {2}
                assert not waiting.done()
            finally:
                await pair.standby.run("SELECT pg_wal_replay_resume()")
            assert await waiting == [3, 3]


def fresh_reads(
    stub: QueryServiceAsyncStub, poll: WrittenPoll, version: int, seconds: float
) -> list[Coroutine[Any, Any, int]]:
    """Calls for this version at least, which return the one that they got."""
    fields = {"poll_id": str(poll.poll_id), "at_least_as_fresh": _token(poll, version)}

    async def view() -> int:
        return (await stub.GetPoll(pb.GetPollRequest(**fields), timeout=seconds)).poll.version

    async def results() -> int:
        return (await stub.GetResults(pb.GetResultsRequest(**fields), timeout=seconds)).results.version

    return [view(), results()]


async def primary_has(pair: Pair, poll_id: UUID, version: int) -> None:
    rows = await sql(
        pair.primary.cluster.dsn("tally_read"), "SELECT version FROM views.polls WHERE poll_id = $1", poll_id
    )
    assert rows == [(version,)]


async def test_a_standby_is_promoted_while_readers_and_voters_go_on(
    log: EventLog, write_dsn: str, nats_url: str, redis_url: str
) -> None:
    poll = await log.poll()
    async with a_pair() as pair, reading(pair, write_dsn, nats_url, redis_url) as stub:
        await results_are(stub, poll, 2)
        async with Readers(stub, poll).running() as readers:
            for number in range(60):
                await log.cast(poll)
                if number == 20:
                    await pair.primary.die()
                    await readers.went_on()
                if number == 40:
                    await pair.standby.run("SELECT pg_promote()")
            await results_are(stub, poll, poll.version)
            await readers.went_on()
        results = (await stub.GetResults(pb.GetResultsRequest(poll_id=str(poll.poll_id)))).results
        assert [count.count for count in results.counts] == poll.counts
        [row] = await sql(
            pair.standby.cluster.dsn("tally_read"), "SELECT count(*), count(DISTINCT vote_key) FROM views.votes"
        )
        assert tuple(row) == (60, 60)
