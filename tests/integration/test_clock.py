"""A clock of the write database that was ahead, and is right again: polls end when it says so, not when it said so."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp
from tally.command.v1 import command_service_pb2 as pb
from tally.poll.v1.poll_pb2 import VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec

from tests.processes import eventually
from tests.servers import command_server, refused, sql

if TYPE_CHECKING:
    from tally.command.v1.command_service_pb2_grpc import CommandServiceAsyncStub

AHEAD = "UPDATE polls SET recorded_at = now() + interval '1 hour'"


async def draft(server: "CommandServiceAsyncStub", **closes_in: float) -> str:
    closes_at = Timestamp()
    closes_at.FromDatetime(datetime.now(UTC) + timedelta(**closes_in))
    options = [PollOption(option_id=option, label=option) for option in "ab"]
    spec = PollSpec(title="?", method=VOTING_METHOD_SINGLE_CHOICE, options=options, closes_at=closes_at)
    return (await server.CreatePoll(pb.CreatePollRequest(poll=spec))).poll_id


def vote(poll_id: str, voter_id: str, key: str = "") -> pb.CastVoteRequest:
    return pb.CastVoteRequest(poll_id=poll_id, voter_id=voter_id, option_ids=["a"], idempotency_key=key)


async def test_a_poll_takes_votes_until_it_closes_though_its_latest_event_is_later(write_dsn: str) -> None:
    async with command_server(write_dsn) as server:
        polls = [await draft(server, minutes=30) for _ in range(4)]
        await sql(write_dsn, AHEAD)
        # Also a draft that was last changed in the future can be opened.
        for poll_id in polls:
            await server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id))
        first = await server.CastVote(vote(polls[0], "ada"))
        keyed = await server.CastVote(vote(polls[0], "ben", "a key of ben, 16+"))
        assert (
            datetime.now(UTC) < first.receipt.recorded_at.ToDatetime(UTC) <= keyed.receipt.recorded_at.ToDatetime(UTC)
        )
        # Many at once share commits with those of other polls.
        await asyncio.gather(*(server.CastVote(vote(poll_id, f"voter-{n}")) for poll_id in polls for n in range(25)))
        votes = [pb.Vote(voter_id=f"streamed-{n}", option_ids=["b"]) for n in range(200)]
        async for answer in server.CastVotes(iter([pb.CastVotesRequest(poll_id=polls[1], votes=votes)])):
            assert not answer.rejections
        assert [tuple(row) for row in await sql(write_dsn, "SELECT DISTINCT state FROM polls")] == [("OPEN",)]
        assert [tuple(row) for row in await sql(write_dsn, "SELECT count(*) FROM votes")] == [(302,)]
        fallen = "SELECT FROM events JOIN events AS later USING (poll_no) WHERE later.version > events.version"
        assert not await sql(write_dsn, f"{fallen} AND later.recorded_at < events.recorded_at")

        # The clock reaches the time: they are closed, and take no votes.
        await sql(write_dsn, "UPDATE polls SET closes_at = now()")
        for poll_id in polls:
            assert (await refused(server.CastVote(vote(poll_id, "late")))).reason == "POLL_NOT_OPEN"

        async def all_closed() -> bool:
            return {row["state"] for row in await sql(write_dsn, "SELECT state FROM polls")} == {"CLOSED"}

        await eventually(all_closed, 30)
        assert [tuple(row) for row in await sql(write_dsn, "SELECT count(*) FROM votes")] == [(302,)]
