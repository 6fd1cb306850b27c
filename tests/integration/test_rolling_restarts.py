"""Two servers that are restarted in turn under load: a client with the standard retry policy loses no call."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import psutil
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub
from tally.command.v1 import command_service_pb2 as command
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub
from tally.poll.v1.poll_pb2 import VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec
from tally.query.v1.query_service_pb2 import GetReadModelStatusRequest
from tally.query.v1.query_service_pb2_grpc import QueryServiceStub

from runtime.embedded import free_port
from runtime.supervisor import Process
from tests.processes import eventually, service
from tests.servers import VOTER_SECRET, sql

if TYPE_CHECKING:
    from tally.command.v1.command_service_pb2_grpc import CommandServiceAsyncStub

RETRY = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}
CALLERS = 10


class Pair:
    """Two servers, and a client of both. `ended` has how the calls ended that were not OK."""

    def __init__(self, servers: list[Process], channel: grpc.aio.Channel) -> None:
        self._servers = servers
        self.channel = channel
        self.ended = Counter[str]()
        self.answered = 0

    async def call_until_restarted(self, call: Callable[[str], Awaitable[object]], *streams: Any) -> None:
        """Makes calls, many at a time, while each server is restarted; `streams` run beside them."""
        done = False

        async def caller(number: int) -> None:
            count = 0
            while not done:
                count += 1
                try:
                    await call(f"{number}-{count}")
                except grpc.aio.AioRpcError as error:
                    self.ended[f"{error.code().name}: {error.details()}"] += 1
                self.answered += 1
                # The servers need the processor to start.
                await asyncio.sleep(0.02)

        async with asyncio.TaskGroup() as tasks:
            for number in range(CALLERS):
                tasks.create_task(caller(number))
            beside = [tasks.create_task(stream) for stream in streams]
            for server in self._servers:
                answered = self.answered
                while self.answered < answered + 20 * CALLERS:
                    await asyncio.sleep(0.01)
                assert await server.stop(8), "it was killed"
                await server.start()
                # The next one is stopped when the client is back, as an operator who restarts servers in turn waits.
                await eventually(lambda server=server: connected(server))  # type: ignore[misc]
            done = True
            for stream in beside:
                stream.cancel()


async def connected(server: Process) -> None:
    connections = psutil.Process(server.pid).net_connections("tcp")
    port = next(each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN)
    assert any(each.laddr.port == port for each in connections if each.status == psutil.CONN_ESTABLISHED)


@asynccontextmanager
async def pair(directory: Path, module: str, **settings: str) -> AsyncIterator[Pair]:
    listen = f"{module.partition('_')[0]}_listen"
    ports = [free_port(), free_port()]
    folders = [directory / str(port) for port in ports]
    for folder in folders:
        folder.mkdir()
    options: list[tuple[str, Any]] = [
        ("grpc.service_config", json.dumps(RETRY)),
        ("grpc.max_reconnect_backoff_ms", 100),
    ]
    async with (
        service(folders[0], module, **{listen: f"127.0.0.1:{ports[0]}"}, voter_secret=VOTER_SECRET, **settings) as one,
        service(folders[1], module, **{listen: f"127.0.0.1:{ports[1]}"}, voter_secret=VOTER_SECRET, **settings) as two,
        grpc.aio.insecure_channel(f"ipv4:127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}", options) as channel,
    ):
        yield Pair([one, two], channel)
        for process in (one, two):
            for line in process.log.read_text().splitlines():
                assert json.loads(line)["level"] in ("info", "warning"), line


async def test_no_vote_is_lost_and_streams_end_with_unavailable(tmp_path: Path, write_dsn: str) -> None:
    async with pair(tmp_path, "command_server", write_dsn=write_dsn) as servers:
        stub: CommandServiceAsyncStub = CommandServiceStub(servers.channel)
        spec = PollSpec(
            title="rolling",
            method=VOTING_METHOD_SINGLE_CHOICE,
            options=[PollOption(option_id=o, label=o) for o in "ab"],
        )
        poll_id = (await stub.CreatePoll(command.CreatePollRequest(poll=spec))).poll_id
        await stub.OpenPoll(command.OpenPollRequest(poll_id=poll_id))
        voted, ends = set[str](), Counter[str]()

        async def vote(voter: str) -> None:
            await stub.CastVote(command.CastVoteRequest(poll_id=poll_id, voter_id=voter, option_ids=["a"]), timeout=20)
            voted.add(voter)

        async def stream(name: str) -> None:
            number = 0
            while True:
                call = stub.CastVotes()
                try:
                    while True:
                        voters = [f"{name}-{number}-{n}" for n in range(50)]
                        votes = [command.Vote(voter_id=voter, option_ids=["b"]) for voter in voters]
                        await call.write(command.CastVotesRequest(batch_sequence=number, poll_id=poll_id, votes=votes))
                        answer = await call.read()
                        if answer is grpc.aio.EOF:
                            break
                        assert isinstance(answer, command.CastVotesResponse)
                        assert answer.accepted + answer.already_recorded == 50
                        voted.update(voters)
                        number += 1
                        await asyncio.sleep(0.01)
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    # The latter where it ends while the client writes.
                    pass
                ends[(await call.code()).name] += 1
                await asyncio.sleep(0.05)

        await servers.call_until_restarted(vote, stream("one"), stream("two"))
        assert servers.ended == {}
        assert set(ends) == {"UNAVAILABLE"}, ends
    [row] = await sql(write_dsn, "SELECT count(*) FROM votes")
    # Of a stream that was broken off, a batch may be recorded without an answer.
    assert len(voted) <= row["count"] <= len(voted) + 100 + CALLERS


async def test_no_read_is_lost_and_streams_end_with_unavailable(tmp_path: Path, read_dsn: str, redis_url: str) -> None:
    async with pair(tmp_path, "query_server", read_dsn=read_dsn, redis_url=redis_url) as servers:
        stub, health = QueryServiceStub(servers.channel), HealthStub(servers.channel)
        ends = Counter[str]()

        async def read(_: str) -> None:
            await stub.GetReadModelStatus(GetReadModelStatusRequest(), timeout=20)

        async def watch() -> None:
            while True:
                call = health.Watch(HealthCheckRequest())
                with suppress(grpc.aio.AioRpcError):
                    async for _ in call:
                        pass
                ends[(await call.code()).name] += 1

        await servers.call_until_restarted(read, watch(), watch())
        assert servers.ended == {}
        assert set(ends) == {"UNAVAILABLE"}, ends
