"""Where votes may be changed, an acknowledged later vote never loses: whatever is late, lost or repeated, and where."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import asyncpg
import grpc
import pytest
from tally.command.v1 import command_service_pb2 as pb
from tally.poll.v1.error_reason_pb2 import ErrorReason
from tally.poll.v1.poll_pb2 import VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec

from command_server import vote_log
from command_server.ballot_box import BallotBox
from command_server.ballot_queue import Recorded
from command_server.ballots import ballot_key, keyed, marking
from command_server.polls import Poll, Polls
from command_server.vote_log import VoteLog
from contracts.voters import IDEMPOTENCY_BYTES
from runtime import postgres
from tests.proxy import Proxy, proxy, through
from tests.servers import command_server, refused, sql, vote_rows

if TYPE_CHECKING:
    from tally.command.v1.command_service_pb2_grpc import CommandServiceAsyncStub

CONFLICT = ErrorReason.ERROR_REASON_VOTE_CONFLICT
OPTIONS = 500
SPEC = PollSpec(
    title="Which?",
    method=VOTING_METHOD_SINGLE_CHOICE,
    options=[PollOption(option_id=f"o{n}", label=f"Option {n}") for n in range(OPTIONS)],
    allow_vote_change=True,
)


async def open_poll(dsn: str) -> str:
    async with command_server(dsn) as server:
        poll_id = (await server.CreatePoll(pb.CreatePollRequest(poll=SPEC))).poll_id
        await server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id))
    return poll_id


@dataclass
class Station:
    """A ballot box whose way to the database can be broken."""

    box: BallotBox
    network: Proxy


@asynccontextmanager
async def station(dsn: str) -> AsyncIterator[Station]:
    port = urlsplit(dsn).port
    assert port
    async with proxy(port) as network:
        pool = await postgres.connect_pool(through(dsn, network.port), size=6, application="station", lock_seconds=0.1)
        box = BallotBox(VoteLog(pool, Polls(pool)))
        running = asyncio.create_task(box.run())
        try:
            yield Station(box, network)
        finally:
            running.cancel()
            await asyncio.wait([running])
            pool.terminate()


@dataclass
class Voter:
    """Keeps to the contract: repeats a vote with its idempotency key, at any station, until it is acknowledged; then
    sends the next one."""

    key: bytes
    chance: Random
    acknowledged: int | None = None
    calls: int = 0
    refusals: list[object] = field(default_factory=list)

    async def vote(self, poll: Poll, stations: list[Station], choices: list[int]) -> None:
        for choice in choices:
            ballot = self.key + marking([choice]) + keyed(self.chance.randbytes(IDEMPOTENCY_BYTES))
            while self.acknowledged != choice:
                self.calls += 1
                try:
                    async with asyncio.timeout(self.chance.uniform(0.02, 0.4)):
                        box = self.chance.choice(stations).box
                        verdict = (await box.cast(poll, ballot)).of(0)
                except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                    continue
                if isinstance(verdict, Recorded):
                    self.acknowledged = choice
                else:
                    self.refusals.append(verdict)
                    return


async def disturb(stations: list[Station], dsn: str, poll: Poll, chance: Random) -> None:
    """Delays, cuts and locks, one after the other at any station, until it is cancelled."""
    connection = await asyncpg.connect(dsn)
    try:
        while True:
            chosen = chance.choice(stations).network
            kind = chance.choice(["silence", "silence", "cut", "lock"])
            if kind == "lock":
                async with connection.transaction():
                    await connection.execute("SELECT FROM polls WHERE poll_no = $1 FOR UPDATE", poll.poll_no)
                    await asyncio.sleep(chance.uniform(0, 0.3))
            elif kind == "silence":
                chosen.silence()
                await asyncio.sleep(chance.uniform(0, 0.5))
            else:
                await chosen.cut()
                await asyncio.sleep(chance.uniform(0, 0.2))
            await chosen.restore()
    finally:
        connection.terminate()


@pytest.mark.parametrize("seed", range(4))
async def test_no_order_of_delays_lets_an_acknowledged_later_vote_lose(
    write_dsn: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(vote_log, "ATTEMPT_SECONDS", 0.4)
    monkeypatch.setattr(vote_log, "PATIENCE_SECONDS", 3.0)
    chance = Random(seed)
    poll_id = await open_poll(write_dsn)
    async with AsyncExitStack() as stack:
        stations = [await stack.enter_async_context(station(write_dsn)) for _ in range(3)]
        pool = await stack.enter_async_context(await postgres.connect_pool(write_dsn, size=1, application="test"))
        poll = await Polls(pool).find(poll_id)
        voters = [Voter(chance.randbytes(16), Random(chance.random())) for _ in range(24)]
        disturbing = asyncio.create_task(disturb(stations, write_dsn, poll, chance))
        async with asyncio.timeout(50), asyncio.TaskGroup() as tasks:
            for voter in voters:
                # Each choice once, so that a vote which stands tells which one it was.
                tasks.create_task(voter.vote(poll, stations, chance.sample(range(OPTIONS), 12)))
        disturbing.cancel()
        await asyncio.wait([disturbing])
        for each in stations:
            await each.network.restore()
            # The ghosts: what is still tried for callers who have gone.
            async with asyncio.timeout(20):
                await each.box.drain()
        stand = {key: int.from_bytes(choices) for key, choices in (await vote_rows(write_dsn, poll.poll_no)).items()}
    assert [voter.refusals for voter in voters] == [[]] * len(voters), "none of them conflicts with its own ghost"
    lost = [voter for voter in voters if stand[ballot_key(poll.poll_no, voter.key)] != voter.acknowledged]
    assert not lost
    assert sum(voter.calls for voter in voters) > 1.2 * 12 * len(voters), "calls were given up, and left ghosts"


Ask = Callable[["CommandServiceAsyncStub", str, str], Awaitable[object]]


async def unary(server: CommandServiceAsyncStub, poll_id: str, option: str) -> object:
    return await server.CastVote(pb.CastVoteRequest(poll_id=poll_id, voter_id="ada", option_ids=[option]), timeout=0.5)


async def stream(server: CommandServiceAsyncStub, poll_id: str, option: str) -> object:
    votes = [pb.Vote(voter_id=voter, option_ids=[option]) for voter in ("ada", "bob")]
    # The second request waits behind the first one's: both are given up.
    batches = [pb.CastVotesRequest(poll_id=poll_id, votes=votes) for _ in range(2)]
    return [answer async for answer in server.CastVotes(iter(batches), timeout=0.5)]


@pytest.mark.parametrize("ask", [unary, stream])
async def test_a_vote_whose_caller_has_gone_replaces_nothing(write_dsn: str, ask: Ask) -> None:
    """Server one cannot reach its database while the caller gives up, votes again elsewhere, and then otherwise."""
    port = urlsplit(write_dsn).port
    assert port
    poll_id = await open_poll(write_dsn)
    async with (
        proxy(port) as network,
        command_server(through(write_dsn, network.port)) as one,
        command_server(write_dsn) as two,
    ):
        await ask(one, poll_id, "o1")
        network.silence()
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(one, poll_id, "o2")
        await ask(two, poll_id, "o2")
        await ask(two, poll_id, "o3")
        await network.restore()
        # A vote behind the ghost at the same server shows that the ghost's turn has passed.
        await one.CastVote(pb.CastVoteRequest(poll_id=poll_id, voter_id="eve", option_ids=["o1"]), timeout=10)
        [poll] = await sql(write_dsn, "SELECT poll_no FROM polls WHERE poll_id = $1::text::uuid", poll_id)
        choices = [int.from_bytes(row) for row in (await vote_rows(write_dsn, poll["poll_no"])).values()]
        assert sorted(choices) == ([1, 3] if ask is unary else [1, 3, 3])


async def test_of_two_votes_at_one_moment_the_one_that_finds_the_other_is_told(
    write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poll_id = await open_poll(write_dsn)
    async with command_server(write_dsn) as one, command_server(write_dsn) as two:

        def vote(option: str, voter: str = "ada") -> pb.CastVoteRequest:
            key = f"the key of {option} of {voter}"
            return pb.CastVoteRequest(poll_id=poll_id, voter_id=voter, option_ids=[option], idempotency_key=key)

        await one.CastVote(vote("o1"))
        await one.CastVote(vote("o1", "bob"))
        drop, elsewhere = VoteLog._drop_gone, ["o5", "o3"]

        first: VoteLog | None = None

        async def drop_late(votes: VoteLog, batch: vote_log.Batch) -> None:
            nonlocal first
            first = first or votes
            await drop(votes, batch)
            if votes is first and elsewhere:
                await two.CastVote(vote(elsewhere.pop()))

        monkeypatch.setattr(VoteLog, "_drop_gone", drop_late)
        refusal = await refused(one.CastVote(vote("o2")))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "VOTE_CONFLICT")
        assert refusal.retry_after is None, "only the voter can say which of the two is meant"
        # In a batch only that vote is rejected.
        votes = [pb.Vote(voter_id=voter, option_ids=["o4"]) for voter in ("ada", "bob")]
        [answer] = [a async for a in one.CastVotes(iter([pb.CastVotesRequest(poll_id=poll_id, votes=votes)]))]
        assert (answer.accepted, [(r.index, r.reason) for r in answer.rejections]) == (1, [(0, CONFLICT)])
        assert not elsewhere
        assert (await one.CastVote(vote("o5"))).already_recorded, "the vote that stands can be repeated"


async def test_an_attempt_that_ends_before_it_is_known_who_waits_does_not_count(
    write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poll_id = await open_poll(write_dsn)
    async with command_server(write_dsn) as one, command_server(write_dsn) as two:
        await unary(one, poll_id, "o1")
        [poll] = await sql(write_dsn, "SELECT poll_no FROM polls WHERE poll_id = $1::text::uuid", poll_id)
        request = pb.CastVoteRequest(poll_id=poll_id, voter_id="ada", option_ids=["o2"])
        call = one.CastVote(request)
        attempt, drop, ended = VoteLog._attempt, VoteLog._drop_gone, False
        first: VoteLog | None = None

        async def late(votes: VoteLog, connection: asyncpg.Connection, batches: list[vote_log.Batch]) -> None:
            nonlocal first
            if batches[0].changes and not first:
                first = votes
                call.cancel()
                await unary(two, poll_id, "o3")
            await attempt(votes, connection, batches)

        async def end(votes: VoteLog, batch: vote_log.Batch) -> None:
            nonlocal ended
            if votes is first and not ended:
                ended = True
                raise TimeoutError
            await drop(votes, batch)

        monkeypatch.setattr(VoteLog, "_attempt", late)
        monkeypatch.setattr(VoteLog, "_drop_gone", end)
        with suppress(asyncio.CancelledError):
            await call
        await one.CastVote(pb.CastVoteRequest(poll_id=poll_id, voter_id="eve", option_ids=["o1"]), timeout=10)
        choices = [int.from_bytes(row) for row in (await vote_rows(write_dsn, poll["poll_no"])).values()]
        assert sorted(choices) == [1, 3]
        assert ended
