"""A schema that vanishes, or loses a part, while servers run: STORE_UNAVAILABLE, and nothing is a defect."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from uuid import uuid4

import grpc
import pytest
from structlog.testing import capture_logs
from tally.command.v1 import command_service_pb2 as commands
from tally.poll.v1.poll_pb2 import VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec
from tally.query.v1 import query_service_pb2 as queries
from tally.query.v1.query_service_pb2_grpc import QueryServiceStub

import migrations
from tests.processes import eventually
from tests.servers import command_server, query_channel, refused, sql

# What is taken away, and how it is given back.
WRITE_LOSSES = {
    "schema": ("ALTER SCHEMA public RENAME TO lost", "ALTER SCHEMA lost RENAME TO public"),
    "table": ("ALTER TABLE polls RENAME TO lost", "ALTER TABLE lost RENAME TO polls"),
    "column": ("ALTER TABLE polls RENAME state TO lost", "ALTER TABLE polls RENAME lost TO state"),
    "right": ("REVOKE ALL ON polls FROM CURRENT_USER", "GRANT ALL ON polls TO CURRENT_USER"),
}
FUNCTION = "FUNCTION {}(integer, bigint, uuid[], bytea[], bytea)"
READ_LOSSES = {
    "schema": ("ALTER SCHEMA views RENAME TO lost", "ALTER SCHEMA lost RENAME TO views"),
    "table": ("ALTER TABLE views.polls RENAME TO lost", "ALTER TABLE views.lost RENAME TO polls"),
    "column": ("ALTER TABLE views.polls RENAME version TO lost", "ALTER TABLE views.polls RENAME lost TO version"),
    "right": ("REVOKE ALL ON views.polls FROM CURRENT_USER", "GRANT ALL ON views.polls TO CURRENT_USER"),
}


def create() -> commands.CreatePollRequest:
    options = [PollOption(option_id=option, label=option) for option in "ab"]
    return commands.CreatePollRequest(poll=PollSpec(title="?", method=VOTING_METHOD_SINGLE_CHOICE, options=options))


async def works(call: Callable[[], Awaitable[Any]]) -> bool:
    try:
        await call()
    except grpc.aio.AioRpcError as error:
        return error.code() != grpc.StatusCode.UNAVAILABLE
    return True


@pytest.mark.parametrize("loss", WRITE_LOSSES)
async def test_commands_are_told_that_the_store_is_unavailable(write_dsn: str, loss: str) -> None:
    take, give = WRITE_LOSSES[loss]
    async with command_server(write_dsn) as server:
        poll_id = (await server.CreatePoll(create())).poll_id
        with capture_logs() as logs:
            await sql(write_dsn, take)
            for call in (
                server.CreatePoll(create()),
                server.OpenPoll(commands.OpenPollRequest(poll_id=poll_id)),
                server.CastVote(commands.CastVoteRequest(poll_id=poll_id, voter_id="ada", option_ids=["a"])),
            ):
                refusal = await refused(call)
                assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
        assert any("run `tally migrate`" in line["event"] for line in logs)
        assert not [line for line in logs if line["event"] == "defect"]
        await sql(write_dsn, give)
        await eventually(lambda: works(lambda: server.CreatePoll(create())))


async def test_votes_wait_for_a_function_that_a_migration_replaces(write_dsn: str) -> None:
    async with command_server(write_dsn) as server:
        poll_id = (await server.CreatePoll(create())).poll_id
        await server.OpenPoll(commands.OpenPollRequest(poll_id=poll_id))
        votes = [commands.CastVoteRequest(poll_id=poll_id, voter_id=f"v{n}", option_ids=["a"]) for n in range(2)]
        await server.CastVote(votes[0])
        with capture_logs() as logs:
            await sql(write_dsn, f"ALTER {FUNCTION.format('record_votes')} RENAME TO lost")
            waiting = asyncio.ensure_future(server.CastVote(votes[1]))
            await eventually(lambda: logged(logs, "commit failed"))
            await sql(write_dsn, f"ALTER {FUNCTION.format('lost')} RENAME TO record_votes")
            assert (await waiting).receipt.version == 4


async def logged(logs: list[Any], event: str) -> bool:
    return event in [line["event"] for line in logs]


def questions(poll_id: str) -> dict[str, Any]:
    return {
        "GetPoll": queries.GetPollRequest(poll_id=poll_id),
        "ListPolls": queries.ListPollsRequest(),
        "GetResults": queries.GetResultsRequest(poll_id=poll_id),
        "GetVote": queries.GetVoteRequest(poll_id=poll_id, voter_id="ada"),
        "GetTurnout": queries.GetTurnoutRequest(poll_id=poll_id),
        "ListVoterVotes": queries.ListVoterVotesRequest(voter_id="ada"),
    }


@pytest.mark.parametrize("loss", READ_LOSSES)
async def test_readers_are_told_that_the_store_is_unavailable(read_dsn: str, redis_url: str, loss: str) -> None:
    take, give = READ_LOSSES[loss]
    async with query_channel(read_dsn, redis_url) as channel:
        stub = QueryServiceStub(channel)
        with capture_logs() as logs:
            await sql(read_dsn, take)
            for name, request in questions(str(uuid4())).items():
                refusal = await refused(getattr(stub, name)(request))
                assert refusal.code == grpc.StatusCode.UNAVAILABLE, name
        assert not [line for line in logs if line["event"] == "defect"]
        await sql(read_dsn, give)
        answered = await refused(stub.GetPoll(queries.GetPollRequest(poll_id=str(uuid4()))))
        assert answered.reason in ("POLL_NOT_FOUND", "READ_MODEL_BEHIND")


async def test_nobody_meets_a_schema_that_is_half_made(read_dsn: str, redis_url: str) -> None:
    """Readers ask all the time while the schema is gone and made anew, as a projector makes it."""
    asked: Counter[grpc.StatusCode] = Counter()

    async def ask(stub: Any, name: str, request: Any) -> None:
        while running:
            refusal = await refused(getattr(stub, name)(request))
            asked[refusal.code] += 1
            assert refusal.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND), refusal.message

    running = True
    async with query_channel(read_dsn, redis_url) as channel, asyncio.TaskGroup() as tasks:
        with capture_logs() as logs:
            stub = QueryServiceStub(channel)
            wanted = questions(str(uuid4()))
            for name in ("GetPoll", "GetTurnout", "GetVote", "GetResults"):
                tasks.create_task(ask(stub, name, wanted[name]))
            for number in range(3):
                await sql(read_dsn, f"ALTER SCHEMA views RENAME TO lost_{number}")
                await eventually(partial(more, asked, asked.total()))
                await migrations.migrate_read(read_dsn)
            running = False
        assert not [line for line in logs if line["event"] == "defect" or "UndefinedColumn" in str(line)]


async def more(asked: Counter[grpc.StatusCode], before: int) -> bool:
    return asked.total() > before + 4
