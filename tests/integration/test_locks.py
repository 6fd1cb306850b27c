"""What waits for one poll, one voter or one request takes nothing that others need, and is told why it waited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import asyncpg
import grpc
import pytest
from tally.command.v1 import command_service_pb2 as pb
from tally.poll.v1.poll_pb2 import ELIGIBILITY_ROLL

from command_server import ballot_box, ballot_queue, caretaker, poll_log, roll, turns
from command_server.ballots import ballot_key
from command_server.vote_log import Batch, VoteLog
from contracts.voters import VoterKeys
from tests.integration.test_every_kind_of_poll import after, close, draft, open_poll, read, spec, until, vote
from tests.processes import eventually
from tests.servers import VOTER_SECRET, command_server, refused, sql

if TYPE_CHECKING:
    from tally.command.v1.command_service_pb2_grpc import CommandServiceAsyncStub


@pytest.fixture
async def server(write_dsn: str) -> AsyncIterator[CommandServiceAsyncStub]:
    async with command_server(write_dsn) as stub:
        yield stub


@asynccontextmanager
async def locked(dsn: str, *poll_ids: str, lock: str = "UPDATE") -> AsyncIterator[asyncpg.Connection]:
    """A session elsewhere that has locked the rows of these polls."""
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            query = f"SELECT FROM polls WHERE poll_id = ANY ($1::text[]::uuid[]) FOR {lock}"
            await connection.execute(query, poll_ids)
            yield connection
    finally:
        connection.terminate()


async def batch(server: CommandServiceAsyncStub, poll_id: str, voters: list[str]) -> pb.CastVotesResponse:
    votes = [pb.Vote(voter_id=voter, option_ids=["a"]) for voter in voters]
    [response] = [r async for r in server.CastVotes(iter([pb.CastVotesRequest(poll_id=poll_id, votes=votes)]))]
    return response


async def test_votes_go_on_beside_any_number_of_locked_polls(server: CommandServiceAsyncStub, write_dsn: str) -> None:
    polls = [await open_poll(server, allow_vote_change=n % 2 == 0) for n in range(12)]
    free = await open_poll(server)
    for poll_id in polls:
        await server.CastVote(vote(poll_id, "first", "a"))
    async with locked(write_dsn, *polls):
        # Single votes and batches, first votes and changes.
        waiting: list[asyncio.Future[pb.CastVoteResponse]]
        waiting = [asyncio.ensure_future(server.CastVote(vote(poll_id, "first", "b"))) for poll_id in polls[::2]]
        waiting += [asyncio.ensure_future(server.CastVote(vote(poll_id, "next", "b"))) for poll_id in polls]
        many = [asyncio.create_task(batch(server, p, [f"voter-{n}" for n in range(500)])) for p in polls[:6]]
        await eventually(lambda: all_held(polls))
        for n in range(20):
            await server.CastVote(vote(free, f"voter-{n}", "a"), timeout=5)
            await batch(server, free, [f"{n}-{v}" for v in range(300)])
        assert not any(task.done() for task in waiting)
        assert not any(task.done() for task in many)
    await asyncio.gather(*waiting)
    assert [(await task).accepted for task in many] == [500] * 6
    for poll_id in polls:
        await read(write_dsn, poll_id)


async def all_held(polls: list[str]) -> None:
    assert ballot_box._locked_polls._value.get() == len(polls)


async def test_a_vote_in_a_poll_that_stays_locked_is_told_so(
    server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poll_id = await open_poll(server)
    monkeypatch.setattr(ballot_box, "WAIT_SECONDS", 0.5)
    monkeypatch.setattr(ballot_box, "LOOK_SECONDS", 0.05)
    async with locked(write_dsn, poll_id):
        calls = [refused(server.CastVote(vote(poll_id, f"voter-{n}", "a"), timeout=10)) for n in range(30)]
        for refusal in await asyncio.gather(*calls):
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "LOCKED")
            assert refusal.retry_after
    assert not (await server.CastVote(vote(poll_id, "voter-1", "b"))).already_recorded, "nothing was recorded before"


async def are_done(calls: Sequence[asyncio.Future[Any]], number: int) -> None:
    assert sum(call.done() for call in calls) == number


@pytest.mark.parametrize("change", [False, True])
async def test_a_vote_that_is_locked_holds_up_no_other_voter(
    server: CommandServiceAsyncStub, write_dsn: str, change: bool
) -> None:
    """As by a server that stopped in the middle of a commit."""
    poll_id, other = await open_poll(server, allow_vote_change=change), await open_poll(server)
    [row] = await sql(write_dsn, "SELECT poll_no FROM polls WHERE poll_id = $1::text::uuid", poll_id)
    connection = await asyncpg.connect(write_dsn)
    transaction = connection.transaction()
    await transaction.start()
    for voter in ("ada", "bob"):
        key = ballot_key(row["poll_no"], VoterKeys(VOTER_SECRET).voter_key(voter))
        await connection.execute("INSERT INTO votes VALUES (1, $1, '\\x0000')", key)
    stuck = [asyncio.ensure_future(server.CastVote(vote(poll_id, voter, "b"))) for voter in ("ada", "bob")]
    beside = [asyncio.ensure_future(server.CastVote(vote(poll_id, f"voter-{n}", "a"), timeout=10)) for n in range(50)]
    for n in range(10):
        await server.CastVote(vote(other, f"voter-{n}", "a"), timeout=5)
    await asyncio.gather(*beside)
    await server.CastVote(vote(poll_id, "late", "a"), timeout=5)
    assert not any(task.done() for task in stuck)
    await transaction.rollback()
    connection.terminate()
    assert not any(answer.already_recorded for answer in await asyncio.gather(*stuck))
    assert (await read(write_dsn, poll_id)).voters == 53


async def test_a_voter_has_few_votes_that_wait(
    server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ballot_queue, "VOTER_BALLOTS", 5)
    poll_id = await open_poll(server, allow_vote_change=True)
    await server.CastVote(vote(poll_id, "first", "a"))
    async with locked(write_dsn, poll_id):
        held = asyncio.ensure_future(server.CastVote(vote(poll_id, "first", "b")))
        await eventually(lambda: all_held([poll_id]))
        calls = [asyncio.ensure_future(server.CastVote(vote(poll_id, "hasty", "ab"[n % 2]))) for n in range(20)]
        await eventually(lambda: are_done(calls, 15))
        for call in [call for call in calls if call.done()]:
            calls.remove(call)
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
            assert refusal.retry_after
        others = [asyncio.ensure_future(server.CastVote(vote(poll_id, f"voter-{n}", "a"))) for n in range(20)]
    await asyncio.gather(held, *calls, *others)
    assert (await read(write_dsn, poll_id)).voters == 22


async def test_a_request_has_few_calls_that_wait(
    server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "WAITING", 3)
    request = pb.CreatePollRequest(request_id=str(uuid4()), poll=spec())
    async with locked(write_dsn) as connection:
        number = ~(int.from_bytes(UUID(request.request_id).bytes[:8]) >> 1)
        await connection.execute("SELECT pg_advisory_xact_lock($1)", number)
        calls = [asyncio.ensure_future(server.CreatePoll(request)) for _ in range(10)]
        await eventually(lambda: are_done(calls, 7))
        for call in [call for call in calls if call.done()]:
            calls.remove(call)
            assert (await refused(call)).reason == "OVERLOADED"
        await server.CreatePoll(pb.CreatePollRequest(request_id=str(uuid4()), poll=spec()), timeout=5)
    assert len({answer.poll_id for answer in await asyncio.gather(*calls)}) == 1


async def test_commands_that_wait_for_one_poll_or_request_leave_the_others_alone(
    server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((poll_log, "COMMAND_SECONDS"), (roll, "_REGISTER_SECONDS")):
        monkeypatch.setattr(module, name, 3.0)
    polls = [await open_poll(server, eligibility=ELIGIBILITY_ROLL) for _ in range(6)]
    cold = [await open_poll(server) for _ in range(10)]
    request = str(uuid4())
    async with locked(write_dsn, *polls) as connection:
        number = ~(int.from_bytes(UUID(request).bytes[:8]) >> 1)
        await connection.execute("SELECT pg_advisory_xact_lock($1)", number)
        calls = [refused(server.ClosePoll(pb.ClosePollRequest(poll_id=p))) for p in polls for _ in range(5)]
        voters = [pb.Voter(voter_id="ada")]
        calls += [
            refused(server.RegisterVoters(iter([pb.RegisterVotersRequest(poll_id=p, voters=voters)])))
            for p in polls
            for _ in range(5)
        ]
        calls += [refused(server.CreatePoll(pb.CreatePollRequest(request_id=request))) for _ in range(3)]
        spec = pb.CreatePollRequest(request_id=request)
        spec.poll.CopyFrom((await read(write_dsn, cold[0])).events[0].poll_created.poll)
        calls += [refused(server.CreatePoll(spec)) for _ in range(20)]
        waiting = asyncio.gather(*calls)
        for poll_id in cold:
            await draft(server)
            await server.CastVote(vote(poll_id, "ada", "a"), timeout=3)
            await close(server, poll_id)
        assert not waiting.done()
        refusals = await waiting
    reasons = [refusal.reason for refusal in refusals]
    assert {reason for reason in reasons if reason != "INVALID_REQUEST"} == {"LOCKED"}
    assert reasons.count("INVALID_REQUEST") == 3
    await close(server, polls[0])


async def test_a_due_poll_that_is_locked_is_named_and_keeps_no_other(
    server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(caretaker.log, "warning", lambda _, **fields: told.append(fields.get("poll_id", "")))
    stuck = await open_poll(server, closes_at=after(0.5))
    opening = [await draft(server, opens_at=after(1)) for _ in range(3)]
    closing = [await open_poll(server, closes_at=after(1)) for _ in range(3)]
    async with locked(write_dsn, stuck):
        for poll_id in opening:
            await until(write_dsn, poll_id, "poll_opened")
        for poll_id in closing:
            await until(write_dsn, poll_id, "poll_closed")

        async def named() -> None:
            assert stuck in told
            assert caretaker._locked_polls._value.get() == 1

        await eventually(named)
    await until(write_dsn, stuck, "poll_closed")


async def test_a_locked_recount_keeps_no_other(server: CommandServiceAsyncStub, write_dsn: str) -> None:
    polls = [await open_poll(server) for _ in range(3)]
    for poll_id in polls:
        await server.CastVote(vote(poll_id, "ada", "a"))
        await close(server, poll_id)
    # As an update does it: a recount can still be asked for.
    async with locked(write_dsn, polls[0], lock="NO KEY UPDATE"):
        for seconds, poll_id in enumerate(polls):
            await sql(
                write_dsn,
                "INSERT INTO recounts SELECT poll_no, now() + $2 * interval '1 ms' FROM polls"
                " WHERE poll_id = $1::text::uuid",
                poll_id,
                seconds,
            )
        for poll_id in polls[1:]:
            await until(write_dsn, poll_id, "poll_certified")
    await until(write_dsn, polls[0], "poll_certified")


async def test_a_due_poll_whose_event_is_refused_keeps_no_other(
    server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Due polls advance together; where that fails they do one by one."""
    # To draw a traceback takes longer than all the rest.
    monkeypatch.setattr(caretaker.log, "exception", lambda *_, **__: None)
    monkeypatch.setattr("command_server.caretaker._SKIP_SECONDS", 0.5)
    drafts = [await draft(server, opens_at=after(3600)) for _ in range(5)]
    await sql(
        write_dsn,
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$",
    )
    [row] = await sql(write_dsn, "SELECT poll_no FROM polls WHERE poll_id = $1::text::uuid", drafts[2])
    await sql(
        write_dsn,
        "CREATE TRIGGER refuse BEFORE INSERT ON events FOR EACH ROW"
        f" WHEN (NEW.poll_no = {row['poll_no']}) EXECUTE FUNCTION refuse()",
    )
    await sql(write_dsn, "UPDATE polls SET opens_at = now()")
    for poll_id in drafts[:2] + drafts[3:]:
        await until(write_dsn, poll_id, "poll_opened")
    assert len((await read(write_dsn, drafts[2])).events) == 1
    await sql(write_dsn, "DROP TRIGGER refuse ON events")
    await until(write_dsn, drafts[2], "poll_opened")


async def test_many_due_polls_advance_by_pages(
    server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("command_server.caretaker._PAGE", 7)
    drafts = [await draft(server, opens_at=after(3600)) for _ in range(30)]
    await sql(write_dsn, "UPDATE polls SET opens_at = now()")
    for poll_id in drafts:
        log = await until(write_dsn, poll_id, "poll_opened")
        assert (log.changes, len(log.events)) == (["poll_created", "poll_opened"], 2)


async def test_a_batch_fails_no_other_that_shares_its_commit(write_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside polls in which a voter has voted or votes twice, and polls that are closed, locked or have a roll."""
    async with command_server(write_dsn) as server, command_server(write_dsn) as elsewhere:
        plain, repeated, twice, closed, stuck = [
            [await open_poll(server, allow_vote_change=change) for change in (False, True)] for _ in range(5)
        ]
        rolls = [await open_poll(server, eligibility=ELIGIBILITY_ROLL) for _ in range(2)]
        for poll_id in rolls:
            voters = [pb.Voter(voter_id="ada", weight=3)]
            await server.RegisterVoters(iter([pb.RegisterVotersRequest(poll_id=poll_id, voters=voters)]))
        polls = [*plain, *repeated, *twice, *closed, *stuck, *rolls]
        for poll_id in polls:
            # The server knows all of them as open.
            await server.CastVote(vote(poll_id, "first", "a")) if poll_id not in rolls else None
        for poll_id in repeated:
            await elsewhere.CastVote(vote(poll_id, "ada", "a"))
        for poll_id in closed:
            await close(elsewhere, poll_id)
        commits: list[int] = []
        record = VoteLog.record

        async def counting(log: VoteLog, batches: list[Batch]) -> None:
            commits.append(len(batches))
            await record(log, batches)

        monkeypatch.setattr(VoteLog, "record", counting)
        monkeypatch.setattr(ballot_box, "PACE_SECONDS", 0.2)
        monkeypatch.setattr(ballot_box, "PACE_SECONDS_PER_BALLOT", 0.2)
        async with locked(write_dsn, *stuck):
            await server.CastVote(vote(plain[0], "pace", "a"))
            calls = {p: asyncio.ensure_future(server.CastVote(vote(p, "ada", "b"))) for p in polls}
            seconds = {p: asyncio.ensure_future(server.CastVote(vote(p, "ada", "c"))) for p in twice}
            await asyncio.wait([call for p, call in calls.items() if p not in stuck], timeout=10)
            assert max(commits) >= len(polls), "they shared a commit"
            assert [p for p, call in calls.items() if not call.done()] == stuck
        for poll_id in (*plain, *stuck, repeated[1], twice[1], *rolls):
            assert not (await calls[poll_id]).already_recorded
        assert (await refused(calls[repeated[0]])).reason == "ALREADY_VOTED"
        for poll_id in closed:
            assert (await refused(calls[poll_id])).reason == "POLL_NOT_OPEN"
        outcomes = [
            calls[twice[0]].exception(),
            await asyncio.wait([seconds[twice[0]]]) and seconds[twice[0]].exception(),
        ]
        assert sorted(error is None for error in outcomes) == [False, True], "one of them counts"
        await seconds[twice[1]]
        for poll_id in polls:
            log = await read(write_dsn, poll_id)
            expected = {**dict.fromkeys(closed, 1), **dict.fromkeys(rolls, 1), plain[0]: 3}
            assert log.voters == expected.get(poll_id, 2)
