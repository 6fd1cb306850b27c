"""A command server under a flood of streams whose answers are not read stays small, and serves the others."""

import asyncio
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import psutil
from tally.command.v1 import command_service_pb2 as pb
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub
from tally.poll.v1.poll_pb2 import ELIGIBILITY_ROLL, VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec

from command_server.intake import MAX_VOTE_STREAMS
from runtime.embedded import free_port
from tests.processes import eventually, service
from tests.servers import VOTER_SECRET, command_server, refused

CAST_VOTES = "/tally.command.v1.CommandService/CastVotes"
MOST_MIB = 500


async def open_poll(server: Any, **fields: Any) -> str:
    options = [PollOption(option_id=option, label=option) for option in "ab"]
    spec = PollSpec(title="?", options=options, method=VOTING_METHOD_SINGLE_CHOICE, **fields)
    poll_id: str = (await server.CreatePoll(pb.CreatePollRequest(poll=spec))).poll_id
    await server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id))
    return poll_id


async def test_streams_that_are_not_read(write_dsn: str, tmp_path: Path) -> None:
    settings = {"command_listen": f"127.0.0.1:{free_port()}", "write_dsn": write_dsn, "voter_secret": VOTER_SECRET}
    address = settings["command_listen"]
    async with (
        service(tmp_path, "command_server", **settings) as process,
        grpc.aio.insecure_channel(address) as channel,
    ):
        server, memory = CommandServiceStub(channel), psutil.Process(process.pid).memory_info
        poll_id = await open_poll(server)
        votes = [pb.Vote(voter_id=f"voter-{n}", option_ids=["x" * 100]) for n in range(20_000)]
        raw = pb.CastVotesRequest(poll_id=poll_id, votes=votes).SerializeToString()
        local = [("grpc.use_local_subchannel_pool", 1)]
        hostile = [grpc.aio.insecure_channel(address, local) for _ in range(4)]
        calls: list[Any] = [hostile[n % 4].stream_stream(CAST_VOTES)() for n in range(60)]
        sent = 0

        async def flood(call: Any) -> None:
            nonlocal sent
            for _ in range(40):
                await call.write(raw)
                sent += 1

        floods = [asyncio.create_task(flood(call)) for call in calls]
        try:
            largest = 0
            for number in range(40):
                largest = max(largest, memory().rss >> 20)
                vote = pb.CastVoteRequest(poll_id=poll_id, voter_id=f"other-{number}", option_ids=["a"])
                await server.CastVote(vote, timeout=20)
                await asyncio.sleep(0.05)
            batch = pb.CastVotesRequest(poll_id=poll_id, votes=[pb.Vote(voter_id="last", option_ids=["b"])])
            async with asyncio.timeout(20):
                [answer] = [response async for response in server.CastVotes(iter([batch]))]
            assert answer.accepted == 1
            assert sent < 60 * 40, "the streams are held back"
            assert largest < MOST_MIB
        finally:
            for task in floods:
                task.cancel()
            await asyncio.gather(*floods, return_exceptions=True)
            for other in hostile:
                await other.close()


async def test_rolls_that_wait_for_a_poll(write_dsn: str, tmp_path: Path) -> None:
    settings = {"command_listen": f"127.0.0.1:{free_port()}", "write_dsn": write_dsn, "voter_secret": VOTER_SECRET}
    async with (
        service(tmp_path, "command_server", **settings) as process,
        grpc.aio.insecure_channel(settings["command_listen"]) as channel,
    ):
        server, memory = CommandServiceStub(channel), psutil.Process(process.pid).memory_info
        poll_id = await open_poll(server, eligibility=ELIGIBILITY_ROLL)
        tag = "v" * 100
        voters = [pb.Voter(voter_id=f"{tag}{n}") for n in range(20_000)]
        raw = pb.RegisterVotersRequest(poll_id=poll_id, voters=voters).SerializeToString()
        method: Any = channel.stream_unary("/tally.command.v1.CommandService/RegisterVoters")
        calls = [asyncio.ensure_future(method(iter([raw] * 20))) for _ in range(60)]
        largest = 0
        for _ in range(60):
            largest = max(largest, memory().rss >> 20)
            await server.CreatePoll(
                pb.CreatePollRequest(
                    poll=PollSpec(
                        title="?",
                        options=[PollOption(option_id=option, label=option) for option in "ab"],
                        method=VOTING_METHOD_SINGLE_CHOICE,
                    )
                ),
                timeout=20,
            )
            await asyncio.sleep(0.05)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert largest < MOST_MIB


async def test_a_stream_too_many_is_told_so(write_dsn: str) -> None:
    async with command_server(write_dsn) as server:
        poll_id = await open_poll(server)
        batch = pb.CastVotesRequest(poll_id=poll_id, votes=[pb.Vote(voter_id=str(uuid4()), option_ids=["a"])])
        open_calls = [server.CastVotes() for _ in range(MAX_VOTE_STREAMS)]
        for call in open_calls:
            await call.write(batch)
            await call.read()
        refusal = await refused(server.CastVotes(iter([batch])).read())
        assert (refusal.reason, refusal.retry_after) == ("OVERLOADED", 0.1)
        open_calls.pop().cancel()

        async def taken() -> bool:
            try:
                return bool([response async for response in server.CastVotes(iter([batch]))])
            except grpc.aio.AioRpcError:
                return False

        await eventually(taken)
        for call in open_calls:
            call.cancel()
