"""The read side against a real Postgres and Redis, which the tests fill the way the projectors do."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
import grpc
import psutil
import pytest
import redis.asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import REGISTRY
from tally.event.v1.event_pb2 import Event, PollCreated
from tally.poll.v1.poll_pb2 import PollOption, PollSpec, PollState, VoteReceipt
from tally.query.v1 import query_service_pb2 as pb
from tally.query.v1.query_service_pb2_grpc import QueryServiceStub

import projector.live
import projector.views
from clients.connection import Address, QueryServer
from clients.watchers import watch as watch_results
from contracts.freshness import token
from contracts.live import FIRST_GENERATION, STATUS_KEY, live_channel, live_key, position_key
from contracts.log_epoch import NOWHERE
from contracts.read_database import CHANNEL, VIEWS, announcements, vote_key
from contracts.status import now
from contracts.voters import VoterKeys
from projector.fold import fold
from projector.read_model import Change
from projector.stream import BEGINNING, Position
from query_server import announcements as announcing
from query_server import freshness, live, status, watchers
from query_server.__main__ import SERVICE
from query_server.live import LiveResults
from query_server.views import Views
from runtime.embedded import Stores, free_port
from tests.processes import eventually, service
from tests.proxy import Proxy, proxy
from tests.servers import VOTER_SECRET, Refused, query_channel, refused, views_of

if TYPE_CHECKING:
    from tally.query.v1.query_service_pb2_grpc import QueryServiceAsyncStub

LIVE, STORED = pb.RESULTS_SOURCE_LIVE_CACHE, pb.RESULTS_SOURCE_READ_DATABASE
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class ReadModels:
    """Does what the projectors do. At version v the poll has v - 1 votes, all for its first option."""

    def __init__(self, database: asyncpg.Pool, live: redis.asyncio.Redis) -> None:
        self.database = database
        self.live = live

    async def poll(
        self,
        version: int = 1,
        *,
        poll_id: UUID | None = None,
        state: str = "OPEN",
        created_at: datetime = NOON,
        options: int = 2,
    ) -> UUID:
        """A new poll in the read database."""
        poll_id = poll_id or uuid4()
        await self.database.execute(
            "INSERT INTO polls (poll_id, version, state, method, title, description, option_ids, option_labels, counts,"
            " total_votes, as_of, created_at, opened_at)"
            " VALUES ($1, $2, $3, 'SINGLE_CHOICE', 'Tea?', 'Or not.', $4, $5, $6, $7, $8, $8, $8)",
            poll_id,
            version,
            state,
            [f"option-{number}" for number in range(options)],
            [f"Option {number}" for number in range(options)],
            [version - 1] + [0] * (options - 1),
            version - 1,
            created_at,
        )
        return poll_id

    async def announce(self, poll_id: UUID, version: int, connection: Any = None) -> None:
        """Says that the read database has it, where there is a transaction: once that is committed."""
        [announcement] = announcements(VIEWS, [(str(poll_id), version)])
        await (connection or self.database).execute("SELECT pg_notify($1, $2)", CHANNEL, announcement)

    async def store(self, poll_id: UUID, version: int) -> None:
        """Moves a poll in the read database on."""
        await self.database.execute(
            "UPDATE polls SET version = $2::bigint, counts[1] = $2 - 1, total_votes = $2 - 1 WHERE poll_id = $1",
            poll_id,
            version,
        )
        await self.announce(poll_id, version)

    async def publish(self, poll_id: UUID, version: int, **fields: Any) -> bytes:
        """Moves a poll in Redis on, and tells the subscribers."""
        results = live_results(poll_id, version, **fields)
        async with self.live.pipeline(transaction=True) as pipeline:
            pipeline.hset(live_key(FIRST_GENERATION, poll_id), mapping={"version": version, "results": results})
            pipeline.publish(live_channel(poll_id), results)
            await pipeline.execute()
        return results

    async def vote(self, poll_id: UUID, voter_id: str, version: int) -> None:
        """Counts a vote in the read database."""
        await self.database.execute(
            "INSERT INTO votes (version, recorded_at, vote_key) VALUES ($1, $2, $3)",
            version,
            NOON,
            await self.vote_key(poll_id, voter_id),
        )

    @asynccontextmanager
    async def reports(self, **read_models: dict[str, Any]) -> AsyncIterator[None]:
        """Reports of projectors of these read models, renewed all the time, which say that they read the stream."""

        async def report() -> None:
            while True:
                for name, fields in read_models.items():
                    said = {"seconds_behind": 0.0, **fields}
                    model = pb.ReadModelStatus(name=name, state=pb.READ_MODEL_STATE_READING, reported_at=now(), **said)
                    message = pb.GetReadModelStatusResponse(read_models=[model]).SerializeToString()
                    if name == "live":
                        await self.live.set(STATUS_KEY, message)
                    else:
                        await self.database.execute(
                            "INSERT INTO projector_status (read_model, status) VALUES ($1, $2)"
                            " ON CONFLICT (read_model) DO UPDATE SET status = excluded.status",
                            name,
                            message,
                        )
                await asyncio.sleep(0.1)

        reporting = asyncio.ensure_future(report())
        try:
            yield
        finally:
            reporting.cancel()

    async def vote_key(self, poll_id: UUID, voter_id: str) -> UUID:
        """The key of a voter's row."""
        poll_no = await self.database.fetchval("SELECT poll_no FROM polls WHERE poll_id = $1", poll_id)
        return vote_key(VoterKeys(VOTER_SECRET).voter_key(voter_id), poll_no)


def created(poll_id: UUID) -> Event:
    """The first event of a poll."""
    spec = PollSpec(title="?", options=[PollOption(option_id="a"), PollOption(option_id="b")])
    return Event(poll_id=str(poll_id), version=1, recorded_at=NOON, poll_created=PollCreated(poll=spec))  # type: ignore[arg-type]


def live_results(
    poll_id: UUID,
    version: int,
    *,
    state: PollState.ValueType = PollState.POLL_STATE_OPEN,
    options: int = 2,
    certification: pb.Certification | None = None,
) -> bytes:
    counts = [
        pb.OptionCount(option_id=f"option-{number}", label=f"Option {number}", count=0 if number else version - 1)
        for number in range(options)
    ]
    results = pb.Results(
        poll_id=str(poll_id),
        state=state,
        version=version,
        counts=counts,
        total_votes=version - 1,
        source=LIVE,
        consistency_token=token(poll_id, version),
        certification=certification,
    )
    return pb.GetResultsResponse(results=results).SerializeToString()


@pytest.fixture
async def models(read_dsn: str, redis_url: str) -> AsyncIterator[ReadModels]:
    async with (
        asyncpg.create_pool(views_of(read_dsn), min_size=1, max_size=4) as pool,
        redis.asyncio.Redis.from_url(redis_url) as client,
    ):
        # The projector has read all that there is.
        await pool.execute("INSERT INTO stream_position (stream_sequence, stored_at) VALUES (0, 0)")
        await pool.execute("INSERT INTO documents.stream_position (stream_sequence, stored_at) VALUES (0, 0)")
        yield ReadModels(pool, client)


@pytest.fixture
async def server(read_dsn: str, redis_url: str) -> AsyncIterator[QueryServiceAsyncStub]:
    async with query_channel(read_dsn, redis_url) as channel:
        await until(lambda: REGISTRY.get_sample_value("tally_query_redis_subscribed") == 1)
        yield QueryServiceStub(channel)


class Network:
    """A query server that reaches its stores through proxies."""

    def __init__(self, stub: QueryServiceAsyncStub, to_redis: Proxy, to_database: Proxy) -> None:
        self.stub = stub
        self.to_redis = to_redis
        self.to_database = to_database


@pytest.fixture
async def network(read_dsn: str, redis_url: str) -> AsyncIterator[Network]:
    async with proxy(port_of(redis_url)) as to_redis, proxy(port_of(read_dsn)) as to_database:
        dsn, url = at_port(read_dsn, to_database.port), at_port(redis_url, to_redis.port)
        async with query_channel(dsn, url) as channel:
            await until(lambda: REGISTRY.get_sample_value("tally_query_redis_subscribed") == 1)
            yield Network(QueryServiceStub(channel), to_redis, to_database)


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port
    return port


def at_port(url: str, port: int) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition(":")[0] + f":{port}"))


async def until(condition: Callable[[], Any], seconds: float = 10) -> None:
    """Returns once the condition, which may be a coroutine function, holds."""
    async with asyncio.timeout(seconds):
        while True:
            holds = condition()
            if await holds if asyncio.iscoroutine(holds) else holds:
                return
            await asyncio.sleep(0.01)


async def get_results(stub: QueryServiceAsyncStub, poll_id: UUID, at_least_as_fresh: str = "") -> pb.Results:
    request = pb.GetResultsRequest(poll_id=str(poll_id), at_least_as_fresh=at_least_as_fresh)
    return (await stub.GetResults(request, timeout=5)).results


class Watch:
    """A WatchResults stream."""

    def __init__(self, stub: QueryServiceAsyncStub, *poll_ids: UUID, **fields: Any) -> None:
        timeout = fields.pop("timeout", None)
        request = pb.WatchResultsRequest(poll_ids=[str(poll_id) for poll_id in poll_ids], **fields)
        self.call = stub.WatchResults(request, timeout=timeout)

    async def next(self, seconds: float = 5) -> pb.Results:
        async with asyncio.timeout(seconds):
            response = await self.call.read()
        assert isinstance(response, pb.WatchResultsResponse), "the stream ended"
        return response.results

    async def up_to(self, version: int, seconds: float = 10) -> list[int]:
        """The versions that arrive until this one is there."""
        versions: list[int] = []
        async with asyncio.timeout(seconds):
            while not versions or versions[-1] < version:
                versions.append((await self.next()).version)
        assert versions == sorted(set(versions)), "the versions of a poll must grow"
        return versions

    async def ended(self) -> None:
        """The stream must end with OK, and send nothing before."""
        async with asyncio.timeout(5):
            assert await self.call.read() is grpc.aio.EOF
            assert await self.call.code() is grpc.StatusCode.OK

    async def refused(self) -> Refused:
        """What the stream tells the caller that it ends with; it must not send anything before."""

        async def read() -> Any:
            async with asyncio.timeout(10):
                return await self.call.read()

        return await refused(read())


# --- polls


async def test_a_poll_is_read_as_it_was_made(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    poll_id = await models.poll(version=7)
    poll = (await server.GetPoll(pb.GetPollRequest(poll_id=str(poll_id)))).poll
    assert (poll.poll_id, poll.title, poll.description) == (str(poll_id), "Tea?", "Or not.")
    assert [(option.option_id, option.label) for option in poll.options] == [
        ("option-0", "Option 0"),
        ("option-1", "Option 1"),
    ]
    assert (poll.state, poll.method, poll.version) == (PollState.POLL_STATE_OPEN, 1, 7)
    assert poll.created_at.ToDatetime(UTC) == poll.opened_at.ToDatetime(UTC) == NOON
    assert not poll.HasField("closed_at")


async def test_an_upper_case_id_names_the_same_poll(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    poll_id = await models.poll()
    await models.publish(poll_id, 2)
    upper = str(poll_id).upper()
    assert (await server.GetResults(pb.GetResultsRequest(poll_id=upper))).results.source == LIVE
    assert (await server.GetPoll(pb.GetPollRequest(poll_id=upper))).poll.poll_id == str(poll_id)


async def test_what_does_not_exist_is_not_found(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    unknown, known = str(uuid4()), str(await models.poll())
    for call in (
        server.GetPoll(pb.GetPollRequest(poll_id=unknown)),
        server.GetResults(pb.GetResultsRequest(poll_id=unknown)),
        server.GetVote(pb.GetVoteRequest(poll_id=unknown, voter_id="ann")),
    ):
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "POLL_NOT_FOUND")
    assert (await Watch(server, UUID(known), UUID(unknown)).refused()).reason == "POLL_NOT_FOUND"
    refusal = await refused(server.GetVote(pb.GetVoteRequest(poll_id=known, voter_id="ann")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "VOTE_NOT_FOUND")


async def test_requests_that_break_the_contract_are_refused(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    poll_id = str(await models.poll())
    for call, field in (
        (server.GetPoll(pb.GetPollRequest(poll_id="7")), "poll_id"),
        (server.GetVote(pb.GetVoteRequest(poll_id=poll_id)), "voter_id"),
        (server.ListPolls(pb.ListPollsRequest(page_size=1001)), "page_size"),
        (server.GetResults(pb.GetResultsRequest(poll_id=poll_id, at_least_as_fresh="?")), "at_least_as_fresh"),
        (
            server.GetPoll(pb.GetPollRequest(poll_id=poll_id, at_least_as_fresh=token(uuid4(), 1))),
            "at_least_as_fresh",
        ),
        (server.ListPolls(pb.ListPollsRequest(page_token="?")), "page_token"),
    ):
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert refusal.fields == [field]
    assert (await Watch(server).refused()).fields == ["poll_ids"]
    assert (await Watch(server, uuid4(), at_least_as_fresh=token(uuid4(), 1)).refused()).fields == ["at_least_as_fresh"]


async def test_pages_hold_each_poll_once_while_polls_are_added(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    # Several polls share a moment, so that the id has to tell them apart.
    moments = [NOON + timedelta(microseconds=number // 3) for number in range(20)]
    before = {str(await models.poll(created_at=moment)) for moment in moments}
    seen: list[pb.Poll] = []
    page_token = ""
    while True:
        page = await server.ListPolls(pb.ListPollsRequest(page_size=6, page_token=page_token))
        assert 0 < len(page.polls) <= 6
        seen += page.polls
        page_token = page.next_page_token
        if not page_token:
            break
        await models.poll(created_at=NOON + timedelta(days=1))
    assert [poll.poll_id for poll in seen] == [
        poll.poll_id
        for poll in sorted(seen, key=lambda poll: (poll.created_at.ToNanoseconds(), poll.poll_id), reverse=True)
    ]
    assert len(seen) == 20
    assert {poll.poll_id for poll in seen} == before


async def test_polls_are_listed_by_state(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    closed = [str(await models.poll(state="CLOSED", created_at=NOON + timedelta(hours=hour))) for hour in range(3)]
    await models.poll(state="OPEN")
    request = pb.ListPollsRequest(state=PollState.POLL_STATE_CLOSED, page_size=2)
    first = await server.ListPolls(request)
    request.page_token = first.next_page_token
    second = await server.ListPolls(request)
    assert [poll.poll_id for poll in [*first.polls, *second.polls]] == closed[::-1]
    assert not second.next_page_token
    request.state = PollState.POLL_STATE_OPEN
    assert (await refused(server.ListPolls(request))).fields == ["page_token"]
    assert len((await server.ListPolls(pb.ListPollsRequest())).polls) == 4


async def test_polls_are_listed_by_the_beginning_of_their_ids(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    ids = [
        UUID(text)
        for text in (
            "00000000-0000-4000-8000-000000000000",
            "00001000-0000-4000-8000-000000000000",
            "abcdef01-2345-4789-8bcd-ef0123456789",
            "abcdef01-2345-4789-8bcd-ef01234567ff",
            "abcdef01-2346-4789-8bcd-ef0123456789",
            "ffffffff-ffff-4fff-bfff-ffffffffffff",
        )
    ]
    for number, poll_id in enumerate(ids):
        await models.poll(poll_id=poll_id, state="CLOSED" if number % 2 else "OPEN")

    async def listed(prefix: str, **fields: Any) -> set[UUID]:
        page = await server.ListPolls(pb.ListPollsRequest(poll_id_prefix=prefix, **fields))
        return {UUID(poll.poll_id) for poll in page.polls}

    # Each beginning finds what begins with it, and nothing else.
    for poll_id in ids:
        for length in range(4, 37):
            prefix = str(poll_id)[:length]
            assert await listed(prefix.upper()) == {other for other in ids if str(other).startswith(prefix)}
    assert await listed("1234") == set()
    assert await listed("abcd", state=PollState.POLL_STATE_CLOSED) == {ids[3]}
    first = await server.ListPolls(pb.ListPollsRequest(poll_id_prefix="abcd", page_size=2))
    rest = await server.ListPolls(pb.ListPollsRequest(poll_id_prefix="ABCD", page_token=first.next_page_token))
    assert {UUID(poll.poll_id) for poll in [*first.polls, *rest.polls]} == set(ids[2:5])
    request = pb.ListPollsRequest(poll_id_prefix="abcde", page_token=first.next_page_token)
    assert (await refused(server.ListPolls(request))).fields == ["page_token"]
    for wrong in ("abc", "abcdef0-", "abcdef012", "abcd-", "ghij", "abcdef01--", f"{ids[2]}0", f"{{{ids[2]}", "%abc"):
        assert (await refused(server.ListPolls(pb.ListPollsRequest(poll_id_prefix=wrong)))).fields == ["poll_id_prefix"]


async def test_a_page_has_50_polls_and_never_more_than_a_client_takes(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    await models.poll(created_at=NOON - timedelta(days=1))
    await models.database.execute(
        "INSERT INTO polls (poll_id, version, state, method, title, description, option_ids, option_labels, counts,"
        " total_votes, as_of, created_at)"
        " SELECT gen_random_uuid(), 1, 'DRAFT', 'SINGLE_CHOICE', 'Big', '', ids, labels, counts, 0, $1, $1"
        " FROM generate_series(1, 60), (SELECT array_agg('o' || n) ids, array_agg(repeat('x', 100) || n) labels,"
        " array_agg(0::bigint) counts FROM generate_series(1, 800) n)",
        NOON,
    )
    small = await server.ListPolls(pb.ListPollsRequest(state=PollState.POLL_STATE_OPEN))
    assert len(small.polls) == 1
    listed, request = 0, pb.ListPollsRequest(page_size=1000)
    while True:
        page = await server.ListPolls(request)
        listed += len(page.polls)
        request.page_token = page.next_page_token
        if not request.page_token:
            break
    assert listed == 61
    await models.database.execute("UPDATE polls SET option_ids = '{a}', option_labels = '{A}', counts = '{0}'")
    assert len((await server.ListPolls(pb.ListPollsRequest())).polls) == 50


async def test_a_vote_has_the_receipt_that_the_voter_got(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    poll_id = await models.poll(version=3)
    await models.vote(poll_id, "ann", 2)
    receipt = (await server.GetVote(pb.GetVoteRequest(poll_id=str(poll_id), voter_id="ann"))).receipt
    voters = VoterKeys(VOTER_SECRET)
    receipt_id = voters.receipt_id(poll_id, voters.voter_key("ann"))
    assert receipt == VoteReceipt(poll_id=str(poll_id), receipt_id=receipt_id), "not when the vote came"
    assert (
        await refused(server.GetVote(pb.GetVoteRequest(poll_id=str(poll_id), voter_id="bob")))
    ).reason == "VOTE_NOT_FOUND"


# --- results


async def test_results_are_the_bytes_of_the_projector(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    poll_id = await models.poll()
    published = await models.publish(poll_id, 5)
    response = await server.GetResults(pb.GetResultsRequest(poll_id=str(poll_id)))
    assert response.SerializeToString() == published


async def test_results_come_from_the_read_database_where_redis_has_none(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    poll_id = await models.poll(version=4)
    results = await get_results(server, poll_id)
    assert (results.source, results.version, results.total_votes) == (STORED, 4, 3)
    assert [(count.option_id, count.label, count.count) for count in results.counts] == [
        ("option-0", "Option 0", 3),
        ("option-1", "Option 1", 0),
    ]
    assert results.state == PollState.POLL_STATE_OPEN
    assert results.as_of.ToDatetime(UTC) == NOON


async def test_results_come_from_the_read_database_while_redis_is_away(network: Network, models: ReadModels) -> None:
    poll_id = await models.poll(version=4)
    await models.publish(poll_id, 5)
    assert (await get_results(network.stub, poll_id)).source == LIVE
    await network.to_redis.cut()
    await models.store(poll_id, 5)
    results = await get_results(network.stub, poll_id)
    assert (results.source, results.version) == (STORED, 5)
    assert (await refused(get_results(network.stub, uuid4()))).reason == "POLL_NOT_FOUND"
    await network.to_redis.restore()
    await until(lambda: is_live(network.stub, poll_id))


async def is_live(stub: QueryServiceAsyncStub, poll_id: UUID) -> bool:
    return (await get_results(stub, poll_id)).source == LIVE


async def test_a_silent_redis_costs_one_call_its_patience_not_every_call(network: Network, models: ReadModels) -> None:
    poll_id = await models.poll(version=4)
    await models.publish(poll_id, 5)
    network.to_redis.silence()
    started = time.monotonic()
    for _ in range(100):
        assert (await get_results(network.stub, poll_id)).source == STORED
    # Not 100 times the half second that one call waits.
    assert time.monotonic() - started < 10
    await network.to_redis.restore()
    await until(lambda: is_live(network.stub, poll_id))


async def test_live_results_need_no_read_database(network: Network, models: ReadModels) -> None:
    poll_id = await models.poll()
    await models.publish(poll_id, 5)
    await network.to_database.cut()
    assert (await get_results(network.stub, poll_id)).version == 5
    assert (await get_results(network.stub, poll_id, token(poll_id, 5))).version == 5
    watch = Watch(network.stub, poll_id)
    assert (await watch.next()).version == 5
    await models.publish(poll_id, 6)
    assert (await watch.next()).version == 6
    refusal = await refused(network.stub.GetPoll(pb.GetPollRequest(poll_id=str(poll_id))))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
    assert refusal.retry_after
    await network.to_database.restore()
    assert (await network.stub.GetPoll(pb.GetPollRequest(poll_id=str(poll_id)))).poll.version == 1


async def test_without_any_store_the_caller_learns_no_detail(network: Network, models: ReadModels) -> None:
    poll_id = await models.poll()
    await network.to_redis.cut()
    await network.to_database.cut()
    for refusal in (
        await refused(get_results(network.stub, poll_id)),
        await Watch(network.stub, poll_id).refused(),
    ):
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
        assert refusal.retry_after
        assert "127.0.0.1" not in refusal.message
        assert str(network.to_redis.port) not in refusal.message


async def test_a_silent_read_database_is_given_up_and_used_again(network: Network, models: ReadModels) -> None:
    poll_id = await models.poll()
    request = pb.GetPollRequest(poll_id=str(poll_id))
    await network.stub.GetPoll(request)
    network.to_database.silence()
    started = time.monotonic()
    refusals = await asyncio.gather(*(refused(network.stub.GetPoll(request)) for _ in range(30)))
    assert {refusal.reason for refusal in refusals} == {"STORE_UNAVAILABLE"}
    assert time.monotonic() - started < 6
    await network.to_database.restore()
    await until(lambda: answers(network.stub.GetPoll(request)))


async def test_a_silent_read_database_is_told_of_before_the_deadline(network: Network, models: ReadModels) -> None:
    poll_id = await models.poll()
    name, fresh = str(poll_id), token(poll_id, 9)
    stub = network.stub
    calls = (
        lambda seconds: stub.GetPoll(pb.GetPollRequest(poll_id=name), timeout=seconds),
        lambda seconds: stub.GetPoll(pb.GetPollRequest(poll_id=name, at_least_as_fresh=fresh), timeout=seconds),
        lambda seconds: stub.GetTurnout(pb.GetTurnoutRequest(poll_id=name), timeout=seconds),
        lambda seconds: stub.ListPolls(pb.ListPollsRequest(), timeout=seconds),
        lambda seconds: stub.ListVoterVotes(pb.ListVoterVotesRequest(voter_id="ann"), timeout=seconds),
        lambda seconds: stub.GetResults(pb.GetResultsRequest(poll_id=name), timeout=seconds),
        lambda seconds: stub.BatchGetResults(pb.BatchGetResultsRequest(poll_ids=[name]), timeout=seconds),
    )
    # Each has a connection to wait on.
    await asyncio.gather(*(answers(call(1.6)) for call in calls))
    network.to_database.silence()
    refusals = await asyncio.gather(*(refused(call(1.6)) for call in calls))
    assert [refusal.reason for refusal in refusals] == ["STORE_UNAVAILABLE"] * len(calls)
    # What the other store knows is told in time.
    await models.live.set(STATUS_KEY, b"")
    status = await stub.GetReadModelStatus(pb.GetReadModelStatusRequest(), timeout=2.5)
    assert [model.state for model in status.read_models] == [
        pb.READ_MODEL_STATE_SILENT,
        pb.READ_MODEL_STATE_UNAVAILABLE,
        pb.READ_MODEL_STATE_UNAVAILABLE,
    ]


async def answers(call: Any) -> bool:
    try:
        await call
    except grpc.RpcError:
        return False
    return True


async def test_a_wiped_read_database_is_unavailable(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    poll_id = await models.poll()
    await models.database.execute("ALTER SCHEMA views RENAME TO gone")
    refusal = await refused(server.GetPoll(pb.GetPollRequest(poll_id=str(poll_id))))
    assert refusal.reason == "STORE_UNAVAILABLE"
    await models.database.execute("ALTER SCHEMA gone RENAME TO views")
    assert (await server.GetPoll(pb.GetPollRequest(poll_id=str(poll_id)))).poll.version == 1


# --- at_least_as_fresh


async def test_a_fresh_read_waits_for_the_read_database(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    poll_id = await models.poll(version=2)
    await models.vote(poll_id, "ann", 2)
    fresh = token(poll_id, 3)
    poll = asyncio.ensure_future(server.GetPoll(pb.GetPollRequest(poll_id=str(poll_id), at_least_as_fresh=fresh)))
    request = pb.GetVoteRequest(poll_id=str(poll_id), voter_id="bob", at_least_as_fresh=fresh)
    vote = asyncio.ensure_future(server.GetVote(request))
    done, _ = await asyncio.wait([poll, vote], timeout=0.2)
    assert not done
    async with models.database.acquire() as connection, connection.transaction():
        bob = await models.vote_key(poll_id, "bob")
        await connection.execute("INSERT INTO votes (version, recorded_at, vote_key) VALUES (3, $1, $2)", NOON, bob)
        await connection.execute("UPDATE polls SET version = 3 WHERE poll_id = $1", poll_id)
        await models.announce(poll_id, 3, connection)
    assert (await poll).poll.version == 3
    assert (await vote).receipt.receipt_id


async def test_a_fresh_read_waits_for_a_poll_that_is_not_there_yet(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    poll_id = uuid4()
    fresh = token(poll_id, 1)
    calls: list[asyncio.Future[Any]] = [
        asyncio.ensure_future(server.GetPoll(pb.GetPollRequest(poll_id=str(poll_id), at_least_as_fresh=fresh))),
        asyncio.ensure_future(get_results(server, poll_id, fresh)),
        asyncio.ensure_future(Watch(server, poll_id, at_least_as_fresh=fresh).next()),
    ]
    done, _ = await asyncio.wait(calls, timeout=0.2)
    assert not done
    there = await models.poll()
    await models.database.execute("UPDATE polls SET poll_id = $2 WHERE poll_id = $1", there, poll_id)
    await models.announce(poll_id, 1)
    poll, results, watched = await asyncio.gather(*calls)
    assert (poll.poll.version, results.version, watched.version) == (1, 1, 1)


async def test_a_forged_token_brings_no_empty_answer(
    server: QueryServiceAsyncStub, models: ReadModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freshness, "_DEFAULT_PATIENCE", 1.0)
    known, unknown = await models.poll(), uuid4()
    assert (await get_fresh(server, known, 0)).results.version == 1
    for poll_id, version in ((unknown, 0), (known, 2**64 - 1)):
        assert (await refused(get_fresh(server, poll_id, version))).reason == "READ_MODEL_BEHIND"


def get_fresh(stub: QueryServiceAsyncStub, poll_id: UUID, version: int) -> Any:
    return stub.GetResults(pb.GetResultsRequest(poll_id=str(poll_id), at_least_as_fresh=token(poll_id, version)))


async def test_past_the_deadline_the_caller_learns_how_far_behind(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    poll_id = await models.poll(version=2)
    await models.publish(poll_id, 3)
    fresh = token(poll_id, 9)
    name = str(poll_id)
    watch = server.WatchResults(pb.WatchResultsRequest(poll_ids=[name], at_least_as_fresh=fresh), timeout=1.6)
    refusals = await asyncio.gather(
        refused(server.GetPoll(pb.GetPollRequest(poll_id=name, at_least_as_fresh=fresh), timeout=1.6)),
        refused(server.GetVote(pb.GetVoteRequest(poll_id=name, voter_id="a", at_least_as_fresh=fresh), timeout=1.6)),
        refused(server.GetResults(pb.GetResultsRequest(poll_id=name, at_least_as_fresh=fresh), timeout=1.6)),
        refused(watch.read()),
    )
    for refusal, missing in zip(refusals, (7, 7, 6, 6), strict=True):
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "READ_MODEL_BEHIND")
        assert f" {missing} behind" in refusal.message
        assert refusal.retry_after


async def test_fresh_results_wake_on_the_update(network: Network, models: ReadModels) -> None:
    poll_id = await models.poll()
    await models.publish(poll_id, 2)
    # Nothing but Redis can bring the version.
    await network.to_database.cut()
    seconds = []
    for version in range(3, 20):
        read = asyncio.ensure_future(get_results(network.stub, poll_id, token(poll_id, version)))
        await until(lambda: is_subscribed(models, poll_id))
        await models.publish(poll_id, version)
        published = time.monotonic()
        assert (await read).version == version
        seconds.append(time.monotonic() - published)
        await until(lambda: is_free(models))
    assert statistics.median(seconds) < 0.2


async def is_subscribed(models: ReadModels, poll_id: UUID) -> bool:
    [(_, subscribers)] = await models.live.pubsub_numsub(live_channel(poll_id))
    return bool(subscribers)


async def nothing_is_watched(models: ReadModels) -> bool:
    """Redis has no subscription to a poll."""
    return not await models.live.pubsub_channels("tally:live:*")


async def is_free(models: ReadModels) -> bool:
    """Nobody watches anything, and Redis knows it."""
    return (
        await nothing_is_watched(models)
        and REGISTRY.get_sample_value("tally_query_topics") == 0
        and REGISTRY.get_sample_value("tally_query_watchers") == 0
    )


@pytest.fixture
def no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what Redis tells arrives: nothing is read again later."""
    monkeypatch.setattr(watchers, "_SWEEP_SECONDS", 3600.0)


@pytest.fixture
def no_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the read database announces is noticed."""
    monkeypatch.setattr(announcing, "_SAFETY_SECONDS", 3600.0)
    monkeypatch.setattr(announcing, "_PING_SECONDS", 3600.0)
    monkeypatch.setattr(status, "_MEASURE_SECONDS", 3600.0)


async def is_announced() -> bool:
    return REGISTRY.get_sample_value("tally_query_announced") == 1


def waiting() -> float:
    """How many waits there are for versions in the read database."""
    return REGISTRY.get_sample_value("tally_query_waiting") or 0


async def is_quiet(store: Proxy) -> bool:
    passed = store.passed
    await asyncio.sleep(0.1)
    return store.passed == passed


@pytest.mark.usefixtures("no_lookups", "no_sweep")
async def test_waiting_asks_nothing_and_wakes_on_the_update(network: Network, models: ReadModels) -> None:
    await until(is_announced)
    poll_id = await models.poll()
    latest: list[float] = []
    for version in range(2, 12):
        fresh = token(poll_id, version)
        request = pb.GetPollRequest(poll_id=str(poll_id), at_least_as_fresh=fresh)
        calls: list[asyncio.Future[Any]] = [asyncio.ensure_future(network.stub.GetPoll(request)) for _ in range(10)]
        calls.append(asyncio.ensure_future(get_results(network.stub, poll_id, fresh)))
        await until(lambda: waiting() == 11)
        # The last of them read once more, in vain.
        await until(partial(is_quiet, network.to_database))
        passed = network.to_database.passed
        done, _ = await asyncio.wait(calls, timeout=0.05)
        assert (len(done), network.to_database.passed) == (0, passed)
        await models.store(poll_id, version)
        stored = time.monotonic()
        *polls, results = await asyncio.gather(*calls)
        latest.append(time.monotonic() - stored)
        assert {response.poll.version for response in polls} == {results.version} == {version}
    # Nothing else would wake them; a busy machine takes its time.
    assert sorted(latest)[len(latest) // 2] < 0.5


@pytest.mark.usefixtures("no_lookups")
async def test_an_announcement_is_heard_of_what_the_projector_stores(
    server: QueryServiceAsyncStub, read_dsn: str
) -> None:
    await until(is_announced)
    # More polls than one announcement has room for.
    poll_ids = [uuid4() for _ in range(300)]
    changes = []
    for poll_id in poll_ids:
        event = created(poll_id)
        changes.append(Change(str(poll_id), 0, fold(None, event), [event]))
    calls = [
        asyncio.ensure_future(
            server.GetPoll(pb.GetPollRequest(poll_id=str(poll_id), at_least_as_fresh=token(poll_id, 1)))
        )
        for poll_id in poll_ids
    ]
    await until(lambda: waiting() == 300)
    async with projector.views.Views.connect(read_dsn) as model:
        await model.store(changes, {}, None, Position(1, 1))
        await model.filled()
    async with asyncio.timeout(3):
        assert {(await call).poll.poll_id for call in calls} == set(map(str, poll_ids))


async def test_a_lost_announcement_is_made_up_for(
    server: QueryServiceAsyncStub, models: ReadModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcing, "_SAFETY_SECONDS", 0.2)
    await until(is_announced)
    poll_id = await models.poll()
    call = asyncio.ensure_future(get_fresh(server, poll_id, 2))
    await until(lambda: waiting() == 1)
    await models.database.execute("UPDATE polls SET version = 2")
    assert (await call).results.version == 2


async def test_polls_that_cannot_be_looked_up_are_no_trouble_of_those_who_watch(
    server: QueryServiceAsyncStub, models: ReadModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcing, "_SAFETY_SECONDS", 0.1)
    await until(is_announced)
    poll_id = await models.poll()
    await models.publish(poll_id, 2)
    watch = Watch(server, poll_id)
    assert (await watch.next()).version == 2
    call = asyncio.ensure_future(
        server.GetPoll(pb.GetPollRequest(poll_id=str(poll_id), at_least_as_fresh=token(poll_id, 2)), timeout=30)
    )
    await until(lambda: waiting() == 1)
    # Meanwhile the call has read once more, in vain.
    before = looked_up()
    await until(lambda: looked_up() >= before + 3)
    await models.database.execute("REVOKE SELECT ON polls FROM CURRENT_USER")
    await until(lambda: looked_up() >= before + 6)
    await models.publish(poll_id, 3)
    assert (await watch.next()).version == 3
    await models.database.execute("GRANT ALL ON polls TO CURRENT_USER")
    await models.database.execute("UPDATE polls SET version = 2")
    assert (await call).poll.version == 2


def looked_up() -> float:
    return REGISTRY.get_sample_value("tally_query_version_lookups_total") or 0


@pytest.mark.usefixtures("no_lookups")
async def test_what_is_announced_while_nobody_listens_is_found(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    await until(is_announced)
    poll_id = await models.poll()
    call = asyncio.ensure_future(
        server.GetPoll(pb.GetPollRequest(poll_id=str(poll_id), at_least_as_fresh=token(poll_id, 2)))
    )
    await until(lambda: waiting() == 1)
    # It reads once more, in vain.
    await asyncio.sleep(0.05)
    async with models.database.acquire() as connection, connection.transaction():
        await connection.execute("UPDATE polls SET version = 2")
        await models.announce(poll_id, 2, connection)
        listener = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%announcements'"
        await models.database.execute(listener)
    assert (await call).poll.version == 2
    await until(is_announced)


@pytest.mark.usefixtures("no_lookups")
async def test_a_server_that_follows_the_one_that_announces_is_read_until_it_is_there(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    await until(is_announced)
    poll_id = await models.poll()
    await models.announce(poll_id, 2)
    call = asyncio.ensure_future(
        server.GetPoll(pb.GetPollRequest(poll_id=str(poll_id), at_least_as_fresh=token(poll_id, 2)))
    )
    await until(lambda: waiting() == 1)
    await models.announce(poll_id, 2)
    done, _ = await asyncio.wait([call], timeout=0.1)
    assert not done
    await models.database.execute("UPDATE polls SET version = 2")
    assert (await call).poll.version == 2


@pytest.mark.parametrize("fate", ["flushed", "restored"])
async def test_nobody_who_has_a_token_reads_what_is_older(
    server: QueryServiceAsyncStub, models: ReadModels, fate: str
) -> None:
    """Redis loses what a reader has seen, and the read database is behind too."""
    poll_id = await models.poll(version=2)
    await models.publish(poll_id, 3)
    dump = await models.live.dump(live_key(FIRST_GENERATION, poll_id))
    assert dump
    await models.publish(poll_id, 5)
    seen = await get_results(server, poll_id, token(poll_id, 5))
    assert seen.version == 5
    if fate == "flushed":
        await models.live.flushall()
    else:
        await models.live.restore(live_key(FIRST_GENERATION, poll_id), 0, dump, replace=True)
    for call in (
        server.GetResults(pb.GetResultsRequest(poll_id=str(poll_id), at_least_as_fresh=token(poll_id, 5)), timeout=1.6),
        Watch(server, poll_id, timeout=1.6, at_least_as_fresh=token(poll_id, 5)).call.read(),
    ):
        assert (await refused(call)).reason == "READ_MODEL_BEHIND"
    later: list[asyncio.Future[Any]] = [
        asyncio.ensure_future(get_results(server, poll_id, token(poll_id, 5))),
        asyncio.ensure_future(Watch(server, poll_id, at_least_as_fresh=token(poll_id, 5)).next()),
    ]
    await until(lambda: waiting() == 2)
    await models.publish(poll_id, 4)
    await models.store(poll_id, 3)
    done, _ = await asyncio.wait(later, timeout=0.1)
    assert not done
    await models.store(poll_id, 6)
    assert [results.version for results in await asyncio.gather(*later)] == [6, 6]


async def test_too_many_who_wait_are_refused(
    server: QueryServiceAsyncStub, models: ReadModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcing, "MAX_WAITING", 1)
    poll_id = await models.poll()
    first = asyncio.ensure_future(get_fresh(server, poll_id, 2))
    await until(lambda: waiting() == 1)
    request = pb.GetPollRequest(poll_id=str(poll_id), at_least_as_fresh=token(poll_id, 2))
    assert (await refused(server.GetPoll(request))).reason == "OVERLOADED"
    await models.store(poll_id, 2)
    assert (await first).results.version == 2
    await until(lambda: waiting() == 0)


async def test_fresh_results_come_from_the_read_database_where_redis_stays_behind(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    poll_id = await models.poll(version=3)
    await models.publish(poll_id, 2)
    results = await get_results(server, poll_id, token(poll_id, 3))
    assert (results.source, results.version) == (STORED, 3)


async def test_results_of_a_watched_poll_need_no_store(network: Network, models: ReadModels) -> None:
    poll_id = await models.poll()
    await models.publish(poll_id, 2)
    watch = Watch(network.stub, poll_id)
    assert (await watch.next()).version == 2
    # What Redis has now it has told nobody.
    await models.live.hset(live_key(FIRST_GENERATION, poll_id), "results", live_results(poll_id, 9))
    assert (await get_results(network.stub, poll_id, token(poll_id, 2))).version == 2
    published = await models.publish(poll_id, 3)
    assert (await watch.next()).version == 3
    assert await get_results(network.stub, poll_id) == pb.GetResultsResponse.FromString(published).results
    reading = asyncio.ensure_future(get_results(network.stub, poll_id, token(poll_id, 4)))
    assert not (await asyncio.wait([reading], timeout=0.1))[0]
    await models.publish(poll_id, 4)
    assert (await reading).version == 4
    # Without its subscription the server's memory is worth no more than any other last state.
    await models.store(poll_id, 5)
    await network.to_redis.cut()
    await until(lambda: REGISTRY.get_sample_value("tally_query_redis_subscribed") == 0)
    assert (await get_results(network.stub, poll_id)).version == 5


async def test_fresh_results_need_no_redis(network: Network, models: ReadModels) -> None:
    poll_id = await models.poll(version=2)
    await network.to_redis.cut()
    read = asyncio.ensure_future(get_results(network.stub, poll_id, token(poll_id, 3)))
    done, _ = await asyncio.wait([read], timeout=0.2)
    assert not done
    await models.store(poll_id, 3)
    results = await read
    assert (results.source, results.version) == (STORED, 3)


# --- nothing older than what was answered


async def test_results_never_go_back_when_redis_loses_a_poll(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    poll_id = await models.poll(version=9)
    await models.publish(poll_id, 9)
    assert (await get_results(server, poll_id)).version == 9
    # It is lost, and made anew from the beginning.
    await models.live.delete(live_key(FIRST_GENERATION, poll_id))
    assert (await get_results(server, poll_id)).version == 9
    await models.publish(poll_id, 2)
    results = await get_results(server, poll_id)
    assert (results.version, results.source) == (9, STORED)
    [batched] = (await server.BatchGetResults(pb.BatchGetResultsRequest(poll_ids=[str(poll_id)]), timeout=5)).results
    assert (batched.version, batched.source) == (9, STORED)
    watch = Watch(server, poll_id)
    assert (await watch.next()).version == 9


async def test_what_no_store_has_any_more_is_waited_for(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    poll_id = await models.poll(version=3)
    await models.publish(poll_id, 9)
    assert (await get_results(server, poll_id)).version == 9
    await models.live.flushdb()
    results, batch = pb.GetResultsRequest(poll_id=str(poll_id)), pb.BatchGetResultsRequest(poll_ids=[str(poll_id)])
    for stored in (3, None):
        if stored is None:
            await models.database.execute("DELETE FROM polls")
        refusals = await asyncio.gather(
            refused(server.GetResults(results, timeout=1.6)),
            refused(server.BatchGetResults(batch, timeout=1.6)),
            Watch(server, poll_id, timeout=1.6).refused(),
        )
        assert {(each.code, each.reason) for each in refusals} == {(grpc.StatusCode.UNAVAILABLE, "READ_MODEL_BEHIND")}
    watch = Watch(server, poll_id)
    waiting = [asyncio.ensure_future(watch.next()), asyncio.ensure_future(get_results(server, poll_id))]
    assert not (await asyncio.wait(waiting, timeout=0.1))[0]
    await models.publish(poll_id, 10)
    assert [results.version for results in await asyncio.gather(*waiting)] == [10, 10]


async def test_a_poll_that_was_shown_is_not_unknown_to_those_who_come_later(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    poll_id, other = await models.poll(version=3), await models.poll()
    request, page = pb.GetPollRequest(poll_id=str(poll_id)), pb.ListPollsRequest()
    turnout = pb.GetTurnoutRequest(poll_id=str(poll_id))
    assert (await server.GetPoll(request)).poll.version == 3
    # An older copy of the read database comes back.
    await models.store(poll_id, 2)
    vote = pb.GetVoteRequest(poll_id=str(poll_id), voter_id="ann")
    refusals = await asyncio.gather(
        refused(server.GetPoll(request, timeout=1.6)),
        refused(server.GetTurnout(turnout, timeout=1.6)),
        refused(server.GetVote(vote, timeout=1.6)),
        refused(server.ListPolls(page, timeout=1.6)),
    )
    assert {each.reason for each in refusals} == {"READ_MODEL_BEHIND"}
    await models.database.execute("DELETE FROM polls WHERE poll_id = $1", poll_id)
    assert (await refused(server.GetPoll(request, timeout=1.6))).reason == "READ_MODEL_BEHIND"
    assert (await server.GetPoll(pb.GetPollRequest(poll_id=str(other)))).poll.version == 1


async def test_a_read_model_that_is_being_filled_is_not_read_as_if_it_were_full(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    poll_id = await models.poll(version=3)
    await models.vote(poll_id, "ann", 2)
    fill = "UPDATE {}stream_position SET filling = $1"
    await models.database.execute(fill.format(""), True)
    await models.database.execute(fill.format("documents."), True)
    calls: list[tuple[Any, Any]] = [
        (server.GetPoll, pb.GetPollRequest(poll_id=str(poll_id))),
        (server.GetPoll, pb.GetPollRequest(poll_id=str(uuid4()))),
        (server.GetVote, pb.GetVoteRequest(poll_id=str(poll_id), voter_id="ann")),
        (server.GetVote, pb.GetVoteRequest(poll_id=str(poll_id), voter_id="bob")),
        (server.GetTurnout, pb.GetTurnoutRequest(poll_id=str(poll_id))),
        (server.GetPollDocument, pb.GetPollDocumentRequest(poll_id=str(poll_id))),
        (server.ListPolls, pb.ListPollsRequest()),
        (server.ListVoterVotes, pb.ListVoterVotesRequest(voter_id="ann")),
        (server.GetResults, pb.GetResultsRequest(poll_id=str(poll_id))),
        (server.BatchGetResults, pb.BatchGetResultsRequest(poll_ids=[str(poll_id)])),
    ]
    soon = Watch(server, poll_id, timeout=3)
    refusals = await asyncio.gather(soon.refused(), *(refused(call(request, timeout=3)) for call, request in calls))
    assert {(each.code, each.reason) for each in refusals} == {(grpc.StatusCode.UNAVAILABLE, "READ_MODEL_BEHIND")}
    # Who waits longer is answered.
    waiting = [asyncio.ensure_future(call(request, timeout=5)) for call, request in calls]
    watch = Watch(server, poll_id)
    assert not (await asyncio.wait(waiting, timeout=0.1))[0]
    await models.database.execute(fill.format(""), False)
    await models.database.execute(fill.format("documents."), False)
    assert (await watch.next()).version == 3
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    reasons = [Refused(answer).reason if isinstance(answer, grpc.RpcError) else "" for answer in answers]
    assert reasons == ["", "POLL_NOT_FOUND", "", "VOTE_NOT_FOUND", "", "POLL_NOT_FOUND", "", "", "", ""]


async def test_results_come_from_redis_while_the_read_database_is_being_filled(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    poll_id = await models.poll(version=2)
    await models.publish(poll_id, 5)
    await models.database.execute("DELETE FROM stream_position")
    assert (await get_results(server, poll_id)).version == 5
    assert (await Watch(server, poll_id).next()).version == 5


async def test_a_redis_whose_position_cannot_be_read_is_not_read(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    poll_id = await models.poll(version=2)
    await models.publish(poll_id, 3)
    for damage in (b"0 0 nonsense", b"0 0 " + b"x" * 1000):
        await models.live.set(position_key(FIRST_GENERATION), damage)
        results = await get_results(server, poll_id)
        assert (results.version, results.source) == (2, STORED)
    await models.live.set(position_key(FIRST_GENERATION), "7 8")
    results = await get_results(server, poll_id)
    assert (results.version, results.source) == (3, LIVE)


EARLIER, LATER = UUID("019ab000-0000-7000-8000-000000000001"), UUID("019ab000-0000-7001-8000-000000000000")


async def test_a_later_history_of_the_log_replaces_what_was_answered(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    """After a restore of the write database versions are smaller, and a poll may never have been there."""
    poll_id, lost = await models.poll(version=15), await models.poll(version=3)
    await models.database.execute("UPDATE stream_position SET log_epoch = $1", EARLIER)
    request, lost_request = pb.GetPollRequest(poll_id=str(poll_id)), pb.GetPollRequest(poll_id=str(lost))
    for each in (request, lost_request):
        await server.GetPoll(each)
    watch, lost_watch = Watch(server, poll_id), Watch(server, lost)
    results = await watch.next()
    assert (results.version, results.log_epoch) == (15, str(EARLIER))
    assert (await lost_watch.next()).version == 3
    before = results.consistency_token
    async with models.database.acquire() as connection, connection.transaction():
        await connection.execute("UPDATE stream_position SET log_epoch = $1", LATER)
        await connection.execute("UPDATE polls SET version = 9 WHERE poll_id = $1", poll_id)
        await connection.execute("DELETE FROM polls WHERE poll_id = $1", lost)
    results = await watch.next()
    assert (results.version, results.log_epoch) == (9, str(LATER))
    assert (await refused(lost_watch.next())).reason == "POLL_NOT_FOUND"
    assert (await server.GetPoll(request)).poll.version == 9
    assert (await get_results(server, poll_id)).version == 9
    # The write that this token stands for is lost with its history.
    assert (await get_results(server, poll_id, before)).version == 9
    assert (await refused(server.GetPoll(lost_request))).reason == "POLL_NOT_FOUND"
    assert (await refused(get_results(server, lost))).reason == "POLL_NOT_FOUND"
    # The earlier history does not come back.
    await models.database.execute("UPDATE stream_position SET log_epoch = $1", EARLIER)
    for call in (server.GetPoll(request, timeout=1.6), server.GetPoll(lost_request, timeout=1.6)):
        assert (await refused(call)).reason == "READ_MODEL_BEHIND"
    assert (await get_results(server, poll_id)).version == 9


async def test_a_watched_poll_that_a_later_history_does_not_have_is_not_found(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    poll_id = await models.poll(version=5)
    await models.publish(poll_id, 5)
    watch = Watch(server, poll_id)
    assert (await watch.next()).source == LIVE
    # Both read models are made anew for the later history, and nobody publishes a poll that is not there.
    await models.database.execute("UPDATE stream_position SET log_epoch = $1", LATER)
    await models.database.execute("DELETE FROM polls")
    await models.live.delete(live_key(FIRST_GENERATION, poll_id))
    async with models.reports(views={"log_epoch": str(LATER)}, live={"log_epoch": str(LATER)}):
        assert (await watch.refused()).reason == "POLL_NOT_FOUND"


# --- the fresher store answers


async def test_results_come_from_the_views_while_the_live_counters_are_left_behind(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    """Redis answers, but takes no writes, or its projector does nothing any more."""
    poll_id, quiet = await models.poll(version=5), await models.poll(version=3)
    for each, version in ((poll_id, 5), (quiet, 3)):
        await models.publish(each, version)
    watch = Watch(server, poll_id)
    assert (await watch.next()).version == 5
    async with models.reports(live={"version": 5}, views={"version": 5}):
        await models.store(poll_id, 6)
        # Both are alive, and the live counters are as far as the views: these are not asked.
        assert (await get_results(server, poll_id)).version == 5
    async with models.reports(views={"version": 9}):
        await until(lambda: is_stored(server, poll_id, 6))
        assert (await watch.next()).version == 6
        await models.store(poll_id, 7)
        assert (await watch.next()).version == 7
        await models.store(poll_id, 8)
        assert (await watch.next()).version == 8
        results = await server.BatchGetResults(pb.BatchGetResultsRequest(poll_ids=[str(quiet), str(poll_id)]))
        assert [(each.version, each.source) for each in results.results] == [(3, LIVE), (8, STORED)]
    await models.publish(poll_id, 9)
    assert (await watch.next()).source == LIVE


async def is_stored(stub: QueryServiceAsyncStub, poll_id: UUID, version: int) -> bool:
    results = await get_results(stub, poll_id)
    return (results.version, results.source) == (version, STORED)


# --- watching


async def test_a_watcher_gets_the_current_results_and_then_each_change(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    poll_id = await models.poll()
    await models.publish(poll_id, 2)
    watch = Watch(server, poll_id)
    first = await watch.next()
    assert (first.version, first.source) == (2, LIVE)
    for version in range(3, 10):
        await models.publish(poll_id, version)
        assert (await watch.next()).version == version
    await models.publish(poll_id, 10, state=PollState.POLL_STATE_CLOSED)
    assert (await watch.next()).state == PollState.POLL_STATE_CLOSED
    await models.publish(poll_id, 11, state=PollState.POLL_STATE_CLOSED)
    assert (await watch.next()).version == 11


@pytest.mark.usefixtures("no_sweep")
async def test_nothing_is_missed_around_the_start(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    for _ in range(60):
        poll_id = await models.poll()
        last = 12
        watch = Watch(server, poll_id)
        for version in range(2, last + 1):
            await models.publish(poll_id, version)
        versions = await watch.up_to(last)
        assert versions[-1] == last
        watch.call.cancel()


@pytest.mark.usefixtures("no_sweep")
async def test_a_watcher_that_follows_another_one_misses_nothing(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    """The last watcher leaves and the next comes while Redis is still told to unsubscribe."""
    poll_id = await models.poll()
    await models.publish(poll_id, 2)
    for version in range(3, 80):
        watch = Watch(server, poll_id)
        assert (await watch.next()).version >= version - 1
        publishing = asyncio.ensure_future(models.publish(poll_id, version))
        assert (await watch.up_to(version))[-1] == version
        watch.call.cancel()
        await publishing


async def test_versions_never_fall(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    poll_id = await models.poll()
    await models.publish(poll_id, 5)
    watch = Watch(server, poll_id)
    assert (await watch.next()).version == 5
    for version in (4, 5, 1, 6, 2, 6, 5, 7):
        await models.publish(poll_id, version)
    assert await watch.up_to(7) in ([6, 7], [7])
    # A watcher that comes later does not bring the older state of Redis back either.
    await models.publish(poll_id, 3)
    assert (await Watch(server, poll_id).next()).version == 7
    await models.publish(poll_id, 8)
    assert (await watch.next()).version == 8


async def test_what_is_no_result_is_ignored(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    poll_id = await models.poll(version=2)
    await models.live.hset(live_key(FIRST_GENERATION, poll_id), "results", b"\xff\xff")
    watch = Watch(server, poll_id)
    assert (await watch.next()).source == STORED
    await models.live.publish(live_channel(poll_id), b"\xff\xff")
    await models.live.publish(live_channel(poll_id), b"")
    await models.publish(poll_id, 3)
    assert (await watch.next()).version == 3


async def test_several_polls_share_a_stream(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    poll_ids = [await models.poll() for _ in range(5)]
    watch = Watch(server, *poll_ids)
    assert {(await watch.next()).poll_id for _ in poll_ids} == set(map(str, poll_ids))
    for version in range(2, 5):
        for poll_id in poll_ids:
            await models.publish(poll_id, version)
        assert {(await watch.next()).poll_id for _ in poll_ids} == set(map(str, poll_ids))


async def test_a_stream_of_several_polls_goes_on_where_another_server_left_off(
    read_dsn: str, redis_url: str, server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    poll_ids = [await models.poll(version=3) for _ in range(3)]
    for poll_id in poll_ids:
        await models.publish(poll_id, 9)
    watch = Watch(server, *poll_ids)
    seen = [(await watch.next()).consistency_token for _ in poll_ids]
    # Redis is lost, and the read database behind.
    await models.live.flushall()
    async with query_channel(read_dsn, redis_url) as channel:
        older = token(poll_ids[0], 3)
        again = Watch(
            QueryServiceStub(channel), *poll_ids, at_least_as_fresh=older, at_least_as_fresh_each=[*seen, older]
        )
        await until(lambda: waiting() == 3)
        for poll_id in poll_ids:
            await models.store(poll_id, 9)
        assert {(await again.next()).version for _ in poll_ids} == {9}
    refusal = await Watch(server, *poll_ids[1:], at_least_as_fresh_each=[seen[1], seen[0]]).refused()
    assert (refusal.reason, refusal.fields) == ("INVALID_REQUEST", ["at_least_as_fresh_each[1]"])


async def test_redis_has_one_subscription_whatever_the_number_of_watchers(
    server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    poll_id = await models.poll()
    watches = [Watch(server, poll_id) for _ in range(50)]
    await asyncio.gather(*(watch.next() for watch in watches))
    assert REGISTRY.get_sample_value("tally_query_watchers") == 50
    assert REGISTRY.get_sample_value("tally_query_topics") == 1
    [(_, subscribers)] = await models.live.pubsub_numsub(live_channel(poll_id))
    assert subscribers == 1
    await models.publish(poll_id, 2)
    assert {(await watch.next()).version for watch in watches} == {2}


async def test_min_interval_conflates(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    poll_id = await models.poll()
    watch = Watch(server, poll_id, min_interval=timedelta(milliseconds=300))
    await watch.next()
    started = time.monotonic()
    for version in range(2, 100):
        await models.publish(poll_id, version)
    versions = await watch.up_to(99)
    assert time.monotonic() - started > 0.25
    assert len(versions) <= 1 + (time.monotonic() - started) / 0.3


async def test_a_slow_reader_gets_the_newest_and_no_backlog(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    poll_id = await models.poll()
    watch = Watch(server, poll_id)
    await watch.next()
    # Far more than all buffers between server and client hold.
    last = 400
    for version in range(2, last + 1):
        await models.live.publish(live_channel(poll_id), live_results(poll_id, version, options=3000))
    versions = await watch.up_to(last)
    assert len(versions) < last / 2


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that takes nothing is soon taken for stuck."""
    monkeypatch.setattr(watchers, "STUCK", 0.2)


@pytest.mark.usefixtures("impatient")
async def test_a_stuck_reader_is_sent_away(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    poll_id = await models.poll()
    watch = Watch(server, poll_id)
    await watch.next()
    await until_sent_away(models, poll_id)

    async def read_on() -> None:
        while True:
            await watch.next()

    assert (await refused(read_on())).reason == "OVERLOADED"


async def until_sent_away(models: ReadModels, poll_id: UUID) -> None:
    """Changes the poll until nobody watches it any more."""
    version = 1

    async def sent_away() -> bool:
        nonlocal version
        version += 1
        await models.live.publish(live_channel(poll_id), live_results(poll_id, version, options=20_000))
        return REGISTRY.get_sample_value("tally_query_watchers") == 0

    await until(sent_away, seconds=30)


@pytest.mark.usefixtures("impatient")
async def test_a_reader_that_takes_nothing_is_freed_with_its_connection(
    read_dsn: str, redis_url: str, models: ReadModels
) -> None:
    poll_id = await models.poll()
    async with query_channel(read_dsn, redis_url, max_connection_age=1.5) as channel:
        await until(lambda: REGISTRY.get_sample_value("tally_query_redis_subscribed") == 1)
        watch = Watch(QueryServiceStub(channel), poll_id)
        await watch.next()
        await until_sent_away(models, poll_id)
        await until(lambda: handlers() == 0, seconds=5)


def handlers() -> int:
    """Streams that this process serves."""
    return sum("WatchResults" in task.get_name() for task in asyncio.all_tasks())


@asynccontextmanager
async def query_process(read_dsn: str, redis_url: str, directory: Path) -> AsyncIterator[tuple[str, int]]:
    """A query server whose memory is its own: its address and pid."""
    address = f"127.0.0.1:{free_port()}"
    settings = {"query_listen": address, "read_dsn": read_dsn, "redis_url": redis_url, "voter_secret": VOTER_SECRET}
    async with service(directory, "query_server", **settings) as process:
        assert process.pid
        yield address, process.pid


async def test_stuck_readers_cost_no_memory(read_dsn: str, redis_url: str, models: ReadModels, tmp_path: Path) -> None:
    poll_id = await models.poll()
    await models.publish(poll_id, 2)
    async with (
        query_process(read_dsn, redis_url, tmp_path) as (address, pid),
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = QueryServiceStub(channel)
        stuck = [Watch(stub, poll_id) for _ in range(20)]
        assert {(await watch.next()).version for watch in stuck} == {2}
        reader = Watch(stub, poll_id)
        before = psutil.Process(pid).memory_info().rss
        for version in range(3, 203):
            # A backlog of these would be 20 MB for each stuck reader.
            await models.publish(poll_id, version, options=3000)
            if version % 10 == 0:
                await reader.up_to(version)
        assert psutil.Process(pid).memory_info().rss - before < 100e6


async def test_stuck_readers_of_a_large_poll_share_its_results(
    read_dsn: str, redis_url: str, models: ReadModels, tmp_path: Path
) -> None:
    poll_id = await models.poll()
    size = len(await models.publish(poll_id, 2, options=40_000))
    async with query_process(read_dsn, redis_url, tmp_path) as (address, pid), AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
        stubs = [
            QueryServiceStub(await stack.enter_async_context(grpc.aio.insecure_channel(address, options)))
            for _ in range(16)
        ]
        reader = Watch(stubs[0], poll_id)
        await reader.next()
        before = psutil.Process(pid).memory_info().rss
        stuck = [Watch(stubs[number % 15 + 1], poll_id) for number in range(300)]
        for version in range(3, 20):
            await models.publish(poll_id, version, options=40_000)
            await reader.up_to(version)
        assert psutil.Process(pid).memory_info().rss - before < 100 * size < 300 * size / 2
        # A large answer to somebody else goes on, too.
        request = pb.GetResultsRequest(poll_id=str(poll_id))
        assert (await stubs[0].GetResults(request, timeout=5)).results.version == 19
        for watch in stuck:
            watch.call.cancel()


async def test_calls_that_come_meanwhile_share_a_question_to_redis(
    read_dsn: str, redis_url: str, models: ReadModels
) -> None:
    poll_ids = [uuid4() for _ in range(3)]
    for poll_id in poll_ids:
        await models.publish(poll_id, 2)
    client = live.connect(redis_url)
    async with asyncpg.create_pool(read_dsn, min_size=0, max_size=1) as pool:
        results = LiveResults(client, Views(pool))
        answering = asyncio.ensure_future(results.run())
        # From now on Redis knows the script.
        await results.counters(poll_ids)
        await models.live.config_resetstat()
        first = asyncio.ensure_future(results.counters(poll_ids[:1]))
        await asyncio.sleep(0.001)
        found = await asyncio.gather(*(results.counters([poll_ids[number % 3]]) for number in range(300)))
        statistics = await models.live.info("commandstats")
        assert [set(answer) for answer in found] == [{poll_ids[number % 3]} for number in range(300)]
        assert set(await first) == set(poll_ids[:1])
        # The one that was under way, and one for all who came meanwhile.
        assert statistics["cmdstat_evalsha"]["calls"] <= 2
        answering.cancel()
    await client.aclose()


async def test_a_caller_that_goes_away_takes_nobodys_answer_with_it(read_dsn: str, redis_url: str) -> None:
    client = live.connect(redis_url)
    async with asyncpg.create_pool(read_dsn, min_size=0, max_size=1) as pool:
        results = LiveResults(client, Views(pool))
        leaving, staying = (asyncio.ensure_future(results.counters([uuid4()])) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        answering = asyncio.ensure_future(results.run())
        async with asyncio.timeout(5):
            # Redis has nothing of that poll, and says so.
            assert await staying == {}
        answering.cancel()
    await client.aclose()


async def test_no_more_is_read_than_an_answer_holds(read_dsn: str, redis_url: str, models: ReadModels) -> None:
    in_redis, stored = [uuid4() for _ in range(100)], [await models.poll(options=2000) for _ in range(30)]
    for poll_id in in_redis:
        await models.publish(poll_id, 2, options=2000)
    size, most = len(live_results(uuid4(), 2, options=2000)), 200_000
    client = live.connect(redis_url)
    async with asyncpg.create_pool(views_of(read_dsn), min_size=0, max_size=1) as pool:
        results = LiveResults(client, Views(pool))
        answering = asyncio.ensure_future(results.run())
        read = await client.info("stats")
        for poll_ids, at_once in ((in_redis, 4 << 20), (stored, 10 * size)):
            found = await results.find_all(dict.fromkeys(poll_ids, NOWHERE), most)
            assert most < sum(len(each.results or b"") for each in found.values()) < at_once + 2 * size
        sent = (await client.info("stats"))["total_net_output_bytes"] - read["total_net_output_bytes"]
        assert sent < (4 << 20) + 4 * size
        # Who wants all of it has it, in as many round trips as that takes.
        assert len(await results.find_all(dict.fromkeys(in_redis, NOWHERE))) == 100
        answering.cancel()
    await client.aclose()


async def test_ten_thousand_cancelled_streams_leave_nothing_behind(
    read_dsn: str, redis_url: str, models: ReadModels, tmp_path: Path
) -> None:
    poll_ids = [await models.poll() for _ in range(10)]
    async with query_process(read_dsn, redis_url, tmp_path) as (address, pid), AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        stubs = [
            QueryServiceStub(await stack.enter_async_context(grpc.aio.insecure_channel(address, options)))
            for _ in range(5)
        ]

        async def open_and_cancel(streams: int) -> int:
            """The server's RSS, once all is over."""
            watches = [Watch(stubs[number % 5], poll_ids[number % 10]) for number in range(streams)]
            # Half of them are cancelled before their first answer, or at about that time.
            await asyncio.gather(*(watch.next(seconds=30) for watch in watches[::2]))
            for watch in watches:
                watch.call.cancel()
            await until(lambda: nothing_is_watched(models))
            return psutil.Process(pid).memory_info().rss

        # What gRPC keeps for the next streams, it keeps once; it goes up and down by 15 MB. A stream has 26 kB.
        rss = [await open_and_cancel(2000) for _ in range(6)]
        assert min(rss[-2:]) < rss[0] + 20e6, rss


async def test_a_watcher_survives_the_death_of_redis(
    stores: Stores, server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    poll_id = await models.poll()
    await models.publish(poll_id, 2)
    watch = Watch(server, poll_id)
    assert (await watch.next()).source == LIVE
    stores.redis_process.kill()
    try:
        await stores.redis_process.ended()
        for version in (4, 5):
            await models.store(poll_id, version)
            results = await watch.next()
            assert (results.version, results.source) == (version, STORED)
        late = await Watch(server, poll_id).next()
        assert (late.version, late.source) == (5, STORED)
    finally:
        await stores.redis_process.start()
        await models.live.connection_pool.disconnect()
    # Redis comes back with what it had, and is behind for a while.
    await models.publish(poll_id, 4)
    await until(lambda: is_subscribed(models, poll_id))
    await models.publish(poll_id, 6)
    results = await watch.next()
    assert (results.version, results.source) == (6, LIVE)
    await models.publish(poll_id, 7)
    assert (await watch.next()).version == 7


async def test_a_redis_that_is_being_filled_is_not_read(
    redis_url: str, server: QueryServiceAsyncStub, models: ReadModels
) -> None:
    poll_id = await models.poll(version=9)
    await models.publish(poll_id, 9)
    watch = Watch(server, poll_id)
    assert (await watch.next()).source == LIVE
    old = fold(None, created(poll_id))
    behind = Change(str(poll_id), 0, old, [])
    ahead = Change(str(poll_id), old.version, old._replace(version=11), [])
    beginning, middle, end = BEGINNING, Position(1, 1), Position(2, 2)
    async with projector.live.Live.connect(redis_url) as model:
        await models.live.flushdb()
        await model.store([], {}, None, beginning)
        await model.store([behind], {}, beginning, middle)
        results = await get_results(server, poll_id)
        assert (results.version, results.source) == (9, STORED)
        # Who watches is not left alone with what Redis had before it was wiped.
        await models.store(poll_id, 10)
        results = await watch.next()
        assert (results.version, results.source) == (10, STORED)
        await model.store([ahead], {}, middle, end)
        assert (await get_results(server, poll_id)).version == 10
        await model.filled()
        results = await watch.next()
        assert (results.version, results.source) == (11, LIVE)


@pytest.mark.usefixtures("no_sweep")
async def test_what_changes_while_redis_is_lost_arrives_when_it_is_back(network: Network, models: ReadModels) -> None:
    poll_id = await models.poll()
    await models.publish(poll_id, 2)
    watch = Watch(network.stub, poll_id)
    assert (await watch.next()).version == 2
    # Nothing but Redis can bring the change.
    await network.to_database.cut()
    for version in range(3, 6):
        await network.to_redis.cut()
        await models.publish(poll_id, version)
        # Whoever asks now makes the server leave Redis alone for a while.
        assert (await refused(get_results(network.stub, poll_id))).reason == "STORE_UNAVAILABLE"
        await network.to_redis.restore()
        assert (await watch.next()).version == version


async def test_a_redis_that_goes_silent_is_noticed(network: Network, models: ReadModels) -> None:
    poll_id = await models.poll()
    await models.publish(poll_id, 2)
    watch = Watch(network.stub, poll_id)
    assert (await watch.next()).version == 2
    network.to_redis.silence()
    await models.store(poll_id, 3)
    results = await watch.next(seconds=10)
    assert (results.version, results.source) == (3, STORED)
    await network.to_redis.restore()
    await models.publish(poll_id, 4)
    assert (await watch.next()).version == 4


async def test_a_watcher_outlives_both_stores(network: Network, models: ReadModels) -> None:
    poll_id = await models.poll()
    await models.publish(poll_id, 2)
    watch = Watch(network.stub, poll_id)
    assert (await watch.next()).version == 2
    await network.to_redis.cut()
    await network.to_database.cut()
    await models.publish(poll_id, 3)
    # The last state is still there for those who come now.
    assert (await Watch(network.stub, poll_id).next()).version == 2
    await network.to_redis.restore()
    assert (await watch.next()).version == 3


async def test_a_stream_ends_once_its_polls_have_ended(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    certified, cancelled = await models.poll(), await models.poll()
    watch, other = Watch(server, certified, cancelled), Watch(server, certified)
    for stream, polls in ((watch, 2), (other, 1)):
        for _ in range(polls):
            assert (await stream.next()).version == 1
    await models.publish(cancelled, 2, state=PollState.POLL_STATE_CANCELLED)
    # A recount that does not agree leaves the poll as it was: there will be another one.
    disagreement = pb.Certification(agreed=False)
    await models.publish(certified, 2, state=PollState.POLL_STATE_CLOSED, certification=disagreement)
    assert {(await watch.next()).version for _ in range(2)} == {2}
    assert (await other.next()).certification == disagreement
    await models.publish(certified, 3, state=PollState.POLL_STATE_CERTIFIED)
    for stream in (watch, other):
        assert (await stream.next()).state == PollState.POLL_STATE_CERTIFIED
        await stream.ended()
    # Who comes afterwards is told how it ended.
    late = Watch(server, cancelled)
    assert (await late.next()).state == PollState.POLL_STATE_CANCELLED
    await late.ended()


async def test_a_stream_from_the_read_database_ends_as_well(network: Network, models: ReadModels) -> None:
    poll_id = await models.poll(version=5, state="CERTIFIED")
    await network.to_redis.cut()
    watch = Watch(network.stub, poll_id)
    assert (await watch.next()).source == STORED
    await watch.ended()


async def test_a_watcher_does_not_notice_that_its_connection_is_replaced(
    read_dsn: str, redis_url: str, models: ReadModels
) -> None:
    poll_id = await models.poll()
    lost: list[str] = []
    seen: list[int] = []

    address = f"127.0.0.1:{free_port()}"

    async def watch() -> None:
        async with QueryServer(Address(address)) as queries:
            async for results in watch_results(queries, str(poll_id), on_lost=lost.append):
                seen.append(results.version)

    settings = {"query_listen": address, "max_connection_age": 0.4}
    async with query_channel(read_dsn, redis_url, **settings) as channel, asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(watch())
        stream = Watch(QueryServiceStub(channel), poll_id)
        assert (await stream.next()).version == 1
        # A stream that is not renewed is ended so that its caller asks again, and the next one is served.
        assert (await stream.refused()).code == grpc.StatusCode.UNAVAILABLE
        assert (await Watch(QueryServiceStub(channel), poll_id).next()).version == 1
        for version in range(2, 40):
            await models.publish(poll_id, version)
            await asyncio.sleep(0.02)
        await models.publish(poll_id, 40, state=PollState.POLL_STATE_CLOSED)
        async with asyncio.timeout(5):
            await watching
    assert lost == []
    assert seen == sorted(set(seen))
    assert seen[-1] == 40


async def test_counts_that_were_corrected_are_shown_again(read_dsn: str, redis_url: str, models: ReadModels) -> None:
    poll_id = await models.poll()
    await models.publish(poll_id, 2)
    address = f"127.0.0.1:{free_port()}"
    async with (
        query_channel(read_dsn, redis_url, query_listen=address),
        QueryServer(Address(address)) as queries,
        aclosing(watch_results(queries, str(poll_id))) as changes,
        asyncio.timeout(5),
    ):
        assert (await anext(changes)).version == 2
        await until(lambda: is_subscribed(models, poll_id))
        await models.publish(poll_id, 2)
        await models.publish(poll_id, 2, options=3)
        corrected = await anext(changes)
        assert (corrected.version, len(corrected.counts)) == (2, 3)
        await models.publish(poll_id, 3)
        assert (await anext(changes)).version == 3


async def test_connections_that_were_made_together_are_not_replaced_together(
    read_dsn: str, redis_url: str, models: ReadModels
) -> None:
    poll_id = await models.poll()
    address = f"127.0.0.1:{free_port()}"

    async def age() -> float:
        async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            watch = Watch(QueryServiceStub(channel), poll_id)
            await watch.next()
            began = time.monotonic()
            assert (await watch.refused()).code == grpc.StatusCode.UNAVAILABLE
            return time.monotonic() - began

    async with query_channel(read_dsn, redis_url, query_listen=address, max_connection_age=2):
        ages = await asyncio.gather(*(age() for _ in range(20)))
    # A tenth more or less, by chance.
    assert max(ages) - min(ages) > 0.1


async def test_cancelled_watchers_leave_nothing_behind(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    poll_ids = [await models.poll() for _ in range(10)]
    await until(lambda: is_free(models))
    before = len(asyncio.all_tasks())
    for _ in range(5):
        watches = [Watch(server, poll_ids[number % 10], poll_ids[(number + 1) % 10]) for number in range(200)]
        # Some are cancelled before their first answer, some after it.
        await asyncio.gather(*(watch.next() for watch in watches[::2]))
        assert (REGISTRY.get_sample_value("tally_query_watchers") or 0) >= 100
        for watch in watches:
            watch.call.cancel()
    await until(lambda: is_free(models))
    await until(lambda: len(asyncio.all_tasks()) <= before)


async def test_a_cancelled_call_is_counted(server: QueryServiceAsyncStub, models: ReadModels) -> None:
    labels = {"method": "/tally.query.v1.QueryService/WatchResults", "code": "CANCELLED"}

    def cancelled() -> float:
        return REGISTRY.get_sample_value("grpc_server_handled_total", labels) or 0

    before = cancelled()
    watch = Watch(server, await models.poll())
    await watch.next()
    watch.call.cancel()
    await until(lambda: cancelled() == before + 1)


async def test_a_subscription_that_nobody_waits_for_any_more_is_ended(network: Network, models: ReadModels) -> None:
    poll_id = await models.poll()
    network.to_redis.silence()
    watch = Watch(network.stub, poll_id)
    await until(lambda: REGISTRY.get_sample_value("tally_query_topics") == 1)
    watch.call.cancel()
    await until(lambda: REGISTRY.get_sample_value("tally_query_topics") == 0)
    await network.to_redis.restore()
    # The command was on its way, and takes effect now.
    assert (await Watch(network.stub, await models.poll()).next()).version == 1
    await until(lambda: is_unsubscribed(models, poll_id))


async def is_unsubscribed(models: ReadModels, poll_id: UUID) -> bool:
    return not await is_subscribed(models, poll_id)


async def test_too_many_watchers_are_refused(
    server: QueryServiceAsyncStub, models: ReadModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchers, "MAX_WATCHERS", 2)
    poll_id = await models.poll()
    watching = [Watch(server, poll_id) for _ in range(2)]
    await asyncio.gather(*(watch.next() for watch in watching))
    refusal = await Watch(server, poll_id).refused()
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    watching[0].call.cancel()
    await until(lambda: REGISTRY.get_sample_value("tally_query_watchers") == 1)
    assert (await Watch(server, poll_id).next()).version == 1


# --- the process


async def test_workers_share_a_port(read_dsn: str, redis_url: str, models: ReadModels, tmp_path: Path) -> None:
    poll_id = await models.poll()
    await models.publish(poll_id, 2)
    address = f"127.0.0.1:{free_port()}"
    settings = {"query_listen": address, "read_dsn": read_dsn, "redis_url": redis_url, "voter_secret": VOTER_SECRET}
    async with service(tmp_path, "query_server", workers="2", **settings), AsyncExitStack() as channels:
        # A channel has one connection, so several are needed to reach both workers.
        options = [("grpc.use_local_subchannel_pool", 1)]
        watches = [
            Watch(
                QueryServiceStub(await channels.enter_async_context(grpc.aio.insecure_channel(address, options))),
                poll_id,
            )
            for _ in range(20)
        ]
        assert {(await watch.next()).version for watch in watches} == {2}
        # Each process has a subscription of its own, and each watcher hears of each change.
        [(_, subscribers)] = await models.live.pubsub_numsub(live_channel(poll_id))
        assert subscribers == 2
        await models.publish(poll_id, 3)
        assert {(await watch.next()).version for watch in watches} == {3}


@asynccontextmanager
async def process(
    read_dsn: str, redis_url: str, until: str = "serving"
) -> AsyncIterator[tuple[asyncio.subprocess.Process, grpc.aio.Channel]]:
    """`python -m query_server`, once it has logged that it serves, or something else, and a channel to it."""
    address = f"127.0.0.1:{free_port()}"
    environment = {
        "PATH": os.environ["PATH"],
        "TALLY_QUERY_LISTEN": address,
        "TALLY_READ_DSN": read_dsn,
        "TALLY_REDIS_URL": redis_url,
        "TALLY_VOTER_SECRET": VOTER_SECRET,
    }
    running = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "query_server", env=environment, stderr=asyncio.subprocess.PIPE
    )
    assert running.stderr
    try:
        async with asyncio.timeout(20):
            async for line in running.stderr:
                if json.loads(line)["event"] == until:
                    break
        async with grpc.aio.insecure_channel(address) as channel:
            yield running, channel
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


async def test_streams_end_at_once_when_the_server_stops(read_dsn: str, redis_url: str, models: ReadModels) -> None:
    poll_id = await models.poll()
    async with process(read_dsn, redis_url) as (running, channel):
        stub = QueryServiceStub(channel)
        watch = Watch(stub, poll_id)
        await watch.next()
        waiting = asyncio.ensure_future(refused(get_results(stub, poll_id, token(poll_id, 9))))
        await until(lambda: is_subscribed(models, poll_id))
        started = time.monotonic()
        running.send_signal(signal.SIGTERM)
        for refusal in (await watch.refused(), await waiting):
            assert refusal.code == grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - started < 3
        async with asyncio.timeout(5):
            assert await running.wait() == 0


async def test_it_serves_as_soon_as_one_of_its_stores_does(read_dsn: str, redis_url: str, models: ReadModels) -> None:
    poll_id = await models.poll()
    await models.publish(poll_id, 2)
    async with proxy(port_of(redis_url)) as to_redis, proxy(port_of(read_dsn)) as to_database:
        await to_redis.cut()
        await to_database.cut()
        dsn, url = at_port(read_dsn, to_database.port), at_port(redis_url, to_redis.port)
        async with process(dsn, url, until="the read database cannot be used") as (_, channel):
            health = health_pb2_grpc.HealthStub(channel)

            async def all_are(status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> bool:
                checks = [health.Check(health_pb2.HealthCheckRequest(service=name)) for name in ("", SERVICE)]
                return {answer.status for answer in await asyncio.gather(*checks)} == {status}

            assert await all_are(health_pb2.HealthCheckResponse.NOT_SERVING)
            stub = QueryServiceStub(channel)
            assert (await refused(get_results(stub, poll_id))).reason == "STORE_UNAVAILABLE"
            await to_database.restore()
            await eventually(lambda: all_are(health_pb2.HealthCheckResponse.SERVING))
            assert (await get_results(stub, poll_id)).source == STORED
            watch = Watch(stub, poll_id)
            assert (await watch.next()).version == 1
            await to_redis.restore()
            results = await watch.next()
            assert (results.version, results.source) == (2, LIVE)
