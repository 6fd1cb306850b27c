"""However much a request holds, the others go on: no single one has the event loop for long."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import blake2b
from time import perf_counter
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from tally.command.v1 import command_service_pb2 as pb
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub
from tally.poll.v1.poll_pb2 import (
    ELIGIBILITY_ROLL,
    VOTING_METHOD_APPROVAL,
    VOTING_METHOD_SINGLE_CHOICE,
    PollOption,
    PollSpec,
)

from command_server.roll import Roll
from command_server.turns import Turns
from runtime.serving import MAX_REQUEST_BYTES
from tests.pauses import longest_hold
from tests.servers import command_channel, refused

# What a busy machine makes of 20 ms; each request here took a second or more when it was read and checked at once.
MOST_SECONDS = 1.0
UNARY = "/tally.command.v1.CommandService/"
OPTIONS = [PollOption(option_id=f"{n}".ljust(100, "x"), label=f"{n}".ljust(200, "l")) for n in range(1000)]
SAME_LABELS = [PollOption(option_id=f"{n}", label="l" * 200) for n in range(1000)]
PIECE = pb.CreatePollRequest(poll=PollSpec(options=[PollOption()] * 900)).SerializeToString()


def spec(options: list[PollOption], method: Any = VOTING_METHOD_SINGLE_CHOICE, **fields: Any) -> PollSpec:
    return PollSpec(title="?", options=options, method=method, **fields)


@asynccontextmanager
async def loop_lag() -> AsyncIterator[list[float]]:
    """The longest time for which the event loop, also the server's, did nothing else; written into the list."""
    longest = [0.0]

    async def tick() -> None:
        last = perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = perf_counter()
            longest[0] = max(longest[0], now - last)
            last = now

    ticking = asyncio.create_task(tick())
    try:
        yield longest
    finally:
        ticking.cancel()


@pytest.mark.parametrize(
    ("rpc", "request_", "field"),
    [
        (
            "CreatePoll",
            pb.CreatePollRequest(poll=spec([PollOption(option_id="x", label="y")] * 100_000)),
            "poll.options",
        ),
        ("CreatePoll", PIECE * 1_000, "poll"),
        ("CreatePoll", b"\x7b\x7c" * 2_000_000, ""),
        ("CreatePoll", pb.CreatePollRequest(poll=spec(SAME_LABELS)), "poll.options[1].label"),
        ("UpdatePoll", pb.UpdatePollRequest(poll=spec([PollOption()] * 1_500_000)), "poll.options"),
        ("UpdatePoll", pb.UpdatePollRequest(update_mask=FieldMask(paths=["x"] * 1_000_000)), "update_mask.paths"),
        ("CastVote", pb.CastVoteRequest(option_ids=[""] * 1_500_000), "option_ids"),
    ],
)
async def test_a_request_with_too_much_in_it_is_refused_at_once(
    write_dsn: str, rpc: str, request_: Message | bytes, field: str
) -> None:
    data = request_ if isinstance(request_, bytes) else request_.SerializeToString()
    assert len(data) < MAX_REQUEST_BYTES
    async with command_channel(write_dsn) as channel:
        call: Any = channel.unary_unary(UNARY + rpc)
        async with loop_lag() as lag:
            refusal = await refused(call(data))
        assert refusal.reason == "INVALID_REQUEST"
        assert refusal.fields[0] == field
        assert lag[0] < MOST_SECONDS


async def test_the_largest_poll_is_made_beside_the_votes(write_dsn: str) -> None:
    async with command_channel(write_dsn) as channel:
        server = CommandServiceStub(channel)
        async with loop_lag() as lag:
            poll_id = (await server.CreatePoll(pb.CreatePollRequest(poll=spec(OPTIONS)))).poll_id
            await server.UpdatePoll(pb.UpdatePollRequest(poll_id=poll_id, poll=spec(OPTIONS[::-1])))
        assert lag[0] < MOST_SECONDS / 2


@pytest.mark.parametrize("voters", [1_500_000, 20_001])
async def test_too_many_voters_are_refused_at_once(write_dsn: str, voters: int) -> None:
    data = pb.RegisterVotersRequest(poll_id=str(uuid4()), voters=[pb.Voter()] * voters).SerializeToString()
    async with command_channel(write_dsn) as channel:
        register: Any = channel.stream_unary(UNARY + "RegisterVoters")
        async with loop_lag() as lag:
            refusal = await refused(register(iter([data])))
        assert (refusal.reason, refusal.fields) == ("INVALID_REQUEST", ["voters"])
        assert lag[0] < MOST_SECONDS


async def test_the_largest_roll_requests_take_their_time(write_dsn: str) -> None:
    async with command_channel(write_dsn) as channel:
        server = CommandServiceStub(channel)
        poll = spec(OPTIONS[:2], eligibility=ELIGIBILITY_ROLL)
        poll_id = (await server.CreatePoll(pb.CreatePollRequest(poll=poll))).poll_id
        broken = [pb.Voter(voter_id="" if n % 2 else f"{n}", weight=2_000_000) for n in range(20_000)]
        whole = [pb.Voter(voter_id=f"josé {n}", weight=n % 7) for n in range(20_000)]
        async with loop_lag() as lag:
            request = pb.RegisterVotersRequest(poll_id=poll_id, voters=broken)
            refusal = await refused(server.RegisterVoters(iter([request])))
            assert refusal.fields[:3] == ["voters[0].weight", "voters[1].voter_id", "voters[1].weight"]
            request = pb.RegisterVotersRequest(poll_id=poll_id, voters=whole)
            assert (await server.RegisterVoters(iter([request]))).registered == 20_000
        assert lag[0] < MOST_SECONDS


async def test_a_roll_is_written_in_pieces(write_dsn: str) -> None:
    async with command_channel(write_dsn) as channel:
        poll = spec(OPTIONS[:2], eligibility=ELIGIBILITY_ROLL)
        poll_id = UUID((await CommandServiceStub(channel).CreatePoll(pb.CreatePollRequest(poll=poll))).poll_id)
    # More than a request may have, so that one piece would be far too long: 0.1 s of the processor.
    keys = sorted(blake2b(f"{n}".encode(), digest_size=16).digest() for n in range(100_000))
    weights = {key: n % 7 + 1 for n, key in enumerate(keys)}
    async with asyncpg.create_pool(write_dsn, min_size=1, max_size=1) as pool:
        roll = Roll(Turns(pool))
        half = await roll.register(poll_id, dict(list(weights.items())[::2]))
        registering = asyncio.ensure_future(
            roll.register(poll_id, {key: weight + 1 for key, weight in weights.items()})
        )
        assert await longest_hold(registering) < 0.05
        registered = registering.result()
        rows = await pool.fetchrow("SELECT count(*) AS voters, sum(weight) AS weight FROM roll")
    assert (half.voters, registered.voters, registered.other_weights) == (50_000, 50_000, 50_000)
    assert rows["voters"] == 100_000
    firsts = sum(list(weights.values())[::2])
    assert rows["weight"] == firsts + sum(list(weights.values())[1::2]) + 50_000


@pytest.mark.parametrize(
    ("votes", "rejected"),
    [
        ([pb.Vote(voter_id="ö", option_ids=[""] * 1_500_000)], 1),
        ([pb.Vote(voter_id=f"ö{n}", option_ids=[o.option_id for o in OPTIONS[:30]]) for n in range(1_200)], 0),
        ([pb.Vote(voter_id=f"{n}", option_ids=["?"] * 40) for n in range(20_000)], 20_000),
        ([pb.Vote()] * 20_000, 20_000),
    ],
    ids=["one vote of millions", "many choices", "choices of no option", "empty votes"],
)
async def test_a_batch_of_odd_votes_is_judged_in_slices(write_dsn: str, votes: list[pb.Vote], rejected: int) -> None:
    async with command_channel(write_dsn) as channel:
        server = CommandServiceStub(channel)
        request = pb.CreatePollRequest(poll=spec(OPTIONS, VOTING_METHOD_APPROVAL))
        poll_id = (await server.CreatePoll(request)).poll_id
        await server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id))
        data = pb.CastVotesRequest(poll_id=poll_id, votes=votes).SerializeToString()
        assert len(data) < MAX_REQUEST_BYTES
        cast: Any = channel.stream_stream(UNARY + "CastVotes", None, pb.CastVotesResponse.FromString)
        async with loop_lag() as lag:
            [response] = [response async for response in cast(iter([data]))]
        assert (response.accepted, len(response.rejections)) == (len(votes) - rejected, rejected)
        assert [r.index for r in response.rejections] == list(range(rejected))
        assert sum(bool(r.message) for r in response.rejections) == min(rejected, 1_000)
        assert lag[0] < MOST_SECONDS
