"""Approval, vote changes, electoral rolls, opening and closing on time, and the final recount."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from string import hexdigits
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import asyncpg
import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from tally.command.v1 import command_service_pb2 as pb
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub
from tally.event.v1.event_pb2 import CertificationFailed, Event, Recount
from tally.poll.v1.error_reason_pb2 import ErrorReason
from tally.poll.v1.poll_pb2 import (
    ELIGIBILITY_OPEN,
    ELIGIBILITY_ROLL,
    VOTING_METHOD_APPROVAL,
    VOTING_METHOD_SINGLE_CHOICE,
    PollOption,
    PollSpec,
)

from command_server import ballot_queue, caretaker, recount, vote_log
from command_server.ballots import option_numbers
from contracts import freshness
from contracts.counting import added_votes, count_changes
from runtime.embedded import free_port
from runtime.postgres import connect_pool, queries
from tests.processes import eventually, service
from tests.servers import VOTER_SECRET, command_server, refused, sql, vote_rows

if TYPE_CHECKING:
    from tally.command.v1.command_service_pb2_grpc import CommandServiceAsyncStub

OPTIONS = ("a", "b", "c", "d")
# With it a caller proves that a vote was its own.
KEY = "the key of these tests' caller"


@pytest.fixture
async def server(write_dsn: str) -> AsyncIterator[CommandServiceAsyncStub]:
    async with command_server(write_dsn) as stub:
        yield stub


def spec(**fields: object) -> PollSpec:
    options = [PollOption(option_id=option, label=option.upper()) for option in OPTIONS]
    return PollSpec(**{"title": "?", "method": VOTING_METHOD_SINGLE_CHOICE, "options": options, **fields})  # type: ignore[arg-type]


def after(seconds: float) -> Timestamp:
    moment = Timestamp()
    moment.FromDatetime(datetime.now(UTC) + timedelta(seconds=seconds))
    return moment


async def draft(server: CommandServiceAsyncStub, **fields: object) -> str:
    return (await server.CreatePoll(pb.CreatePollRequest(poll=spec(**fields)))).poll_id


async def open_poll(server: CommandServiceAsyncStub, **fields: object) -> str:
    poll_id = await draft(server, **fields)
    await server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id))
    return poll_id


async def close(server: CommandServiceAsyncStub, poll_id: str) -> None:
    await server.ClosePoll(pb.ClosePollRequest(poll_id=poll_id))


def vote(poll_id: str, voter_id: str, *option_ids: str) -> pb.CastVoteRequest:
    return pb.CastVoteRequest(poll_id=poll_id, voter_id=voter_id, option_ids=option_ids, idempotency_key=KEY)


async def cast(server: CommandServiceAsyncStub, poll_id: str, *votes: tuple[str, str]) -> pb.CastVotesResponse:
    """One batch of (voter, options as letters)."""
    cast = [pb.Vote(voter_id=v, option_ids=list(o)) for v, o in votes]
    batch = pb.CastVotesRequest(poll_id=poll_id, votes=cast, idempotency_key=KEY)
    [response] = [response async for response in server.CastVotes(iter([batch]))]
    return response


async def register(
    server: CommandServiceAsyncStub, poll_id: str, *batches: dict[str, int]
) -> pb.RegisterVotersResponse:
    requests = [
        pb.RegisterVotersRequest(poll_id=poll_id, voters=[pb.Voter(voter_id=v, weight=w) for v, w in batch.items()])
        for batch in batches
    ]
    return await server.RegisterVoters(iter(requests))


def reasons(response: pb.CastVotesResponse) -> dict[int, str]:
    return {r.index: ErrorReason.Name(r.reason).removeprefix("ERROR_REASON_") for r in response.rejections}


def lose_a_reply(monkeypatch: pytest.MonkeyPatch, way: str, meanwhile: Callable[[], Awaitable[None]]) -> None:
    """Has the next commit by this way of the vote log fail unseen: it takes effect, but its server does not hear of
    it, and something else happens before it tries again."""
    real, lost = getattr(vote_log.VoteLog, way), False

    async def losing(*arguments: Any) -> Any:
        nonlocal lost
        if lost:
            return await real(*arguments)
        lost = True
        with pytest.MonkeyPatch.context() as unheard:
            unheard.setattr(vote_log.Batch, "settle", lambda *_: None)
            await real(*arguments)
        await meanwhile()
        raise ConnectionResetError

    monkeypatch.setattr(vote_log.VoteLog, way, losing)


class Log:
    """A poll in the write database: its events, its votes, and what both come to."""

    def __init__(self, state: str, events: list[Event], votes: dict[UUID, tuple[int, ...]]) -> None:
        self.state = state
        self.events = events
        self.changes = [event.WhichOneof("change") for event in events]
        self.votes = votes
        self.counts: Counter[str] = Counter()
        self.voters = 0
        for event in events:
            self.voters += added_votes(event.votes_cast)
            for number, change in count_changes(event.votes_cast).items():
                self.counts[OPTIONS[number]] += change
        self.counts = +self.counts
        assert self.voters == len(votes)


async def read(dsn: str, poll_id: str) -> Log:
    [poll] = await sql(dsn, "SELECT poll_no, state, version FROM polls WHERE poll_id = $1::text::uuid", poll_id)
    number = poll["poll_no"]
    events = await sql(
        dsn,
        "SELECT version, payload FROM events WHERE poll_no = $1 AND version <= $2 ORDER BY version",
        number,
        poll["version"],
    )
    assert [event["version"] for event in events] == list(range(1, poll["version"] + 1))
    chosen = {key: option_numbers(choices) for key, choices in (await vote_rows(dsn, number)).items()}
    return Log(poll["state"], [Event.FromString(event["payload"]) for event in events], chosen)


async def until(dsn: str, poll_id: str, change: str) -> Log:
    """The poll once its log tells of a change."""
    async with asyncio.timeout(15):
        while change not in (log := await read(dsn, poll_id)).changes:
            await asyncio.sleep(0.02)
    return log


class TestUpdate:
    async def test_a_mask_says_what_changes(self, server: CommandServiceAsyncStub, write_dsn: str) -> None:
        poll_id = await draft(server, description="old", closes_at=after(3600))
        changes = PollSpec(title="New?", description="not named")
        mask = FieldMask(paths=["title", "closes_at"])
        await server.UpdatePoll(pb.UpdatePollRequest(poll_id=poll_id, poll=changes, update_mask=mask))
        log = await read(write_dsn, poll_id)
        updated = log.events[-1].poll_updated.poll
        assert (updated.title, updated.description, updated.HasField("closes_at")) == ("New?", "old", False)
        assert [option.option_id for option in updated.options] == list(OPTIONS)

    async def test_without_a_mask_what_is_given_changes(self, server: CommandServiceAsyncStub, write_dsn: str) -> None:
        poll_id = await draft(server, description="old")
        options = [PollOption(option_id="x", label="X"), PollOption(option_id="y", label="Y")]
        await server.UpdatePoll(pb.UpdatePollRequest(poll_id=poll_id, poll=PollSpec(options=options)))
        updated = (await read(write_dsn, poll_id)).events[-1].poll_updated.poll
        assert [option.option_id for option in updated.options] == ["x", "y"]
        assert updated.description == "old"
        await server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id))
        await server.CastVote(vote(poll_id, "ada", "y"))
        assert (await refused(server.CastVote(vote(poll_id, "bob", "a")))).reason == "UNKNOWN_OPTION"

    async def test_what_results_must_be_a_poll(self, server: CommandServiceAsyncStub, write_dsn: str) -> None:
        poll_id = await draft(server)
        mask = FieldMask(paths=["title"])
        refusal = await refused(server.UpdatePoll(pb.UpdatePollRequest(poll_id=poll_id, update_mask=mask)))
        assert (refusal.reason, refusal.fields) == ("INVALID_REQUEST", ["poll.title"])
        unknown = FieldMask(paths=["title.x"])
        refusal = await refused(server.UpdatePoll(pb.UpdatePollRequest(poll_id=poll_id, update_mask=unknown)))
        assert (refusal.reason, refusal.fields) == ("INVALID_REQUEST", ["update_mask"])
        assert len((await read(write_dsn, poll_id)).events) == 1

    async def test_only_a_draft(self, server: CommandServiceAsyncStub) -> None:
        poll_id = await open_poll(server)
        request = pb.UpdatePollRequest(poll_id=poll_id, poll=PollSpec(title="Late"))
        refusal = await refused(server.UpdatePoll(request))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "POLL_NOT_DRAFT")


class TestCancel:
    @pytest.mark.parametrize("opened", [False, True])
    async def test_ends_a_poll_for_good(self, server: CommandServiceAsyncStub, write_dsn: str, opened: bool) -> None:
        poll_id = await (open_poll if opened else draft)(server)
        await server.CancelPoll(pb.CancelPollRequest(poll_id=poll_id))
        assert (await refused(server.CastVote(vote(poll_id, "ada", "a")))).reason == "POLL_NOT_OPEN"
        assert (await refused(server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id)))).reason == "POLL_NOT_DRAFT"
        assert (await refused(server.ClosePoll(pb.ClosePollRequest(poll_id=poll_id)))).reason == "POLL_NOT_OPEN"
        assert (await refused(server.CancelPoll(pb.CancelPollRequest(poll_id=poll_id)))).reason == "POLL_NOT_OPEN"
        assert (await refused(server.CertifyPoll(pb.CertifyPollRequest(poll_id=poll_id)))).reason == "POLL_NOT_CLOSED"
        assert (await read(write_dsn, poll_id)).changes[-1] == "poll_cancelled"


class TestApproval:
    async def test_each_choice_counts_up_to_the_most(self, server: CommandServiceAsyncStub, write_dsn: str) -> None:
        poll_id = await open_poll(server, method=VOTING_METHOD_APPROVAL, max_choices=2)
        first = await server.CastVote(vote(poll_id, "ada", "c", "a"))
        again = await server.CastVote(vote(poll_id, "ada", "a", "c"))
        assert again.already_recorded, "the order in which options are named is no other choice"
        assert again.receipt == first.receipt
        response = await cast(
            server, poll_id, ("bob", "a"), ("cleo", "abc"), ("dan", "bb"), ("eve", "ax"), ("ada", "a")
        )
        assert response.accepted == 1
        assert reasons(response) == {
            1: "TOO_MANY_CHOICES",
            2: "INVALID_REQUEST",
            3: "UNKNOWN_OPTION",
            4: "ALREADY_VOTED",
        }
        log = await read(write_dsn, poll_id)
        assert (log.counts, log.voters) == (Counter(a=2, c=1), 2)

    async def test_without_a_most_all_may_be_chosen(self, server: CommandServiceAsyncStub, write_dsn: str) -> None:
        poll_id = await open_poll(server, method=VOTING_METHOD_APPROVAL)
        many = [(f"voter-{n}", "abcd"[: n % 4 + 1]) for n in range(1000)]
        assert (await cast(server, poll_id, *many)).accepted == 1000
        assert (await read(write_dsn, poll_id)).counts == Counter(a=1000, b=750, c=500, d=250)

    async def test_max_choices_is_for_approval(self, server: CommandServiceAsyncStub) -> None:
        refusal = await refused(server.CreatePoll(pb.CreatePollRequest(poll=spec(max_choices=2))))
        assert refusal.reason == "INVALID_REQUEST"


class TestVoteChange:
    async def test_the_last_vote_counts_and_the_log_keeps_all(
        self, server: CommandServiceAsyncStub, write_dsn: str
    ) -> None:
        poll_id = await open_poll(server, allow_vote_change=True)
        versions = []
        for option in ("a", "b", "b", "a"):
            answer = await server.CastVote(vote(poll_id, "ada", option))
            versions.append((answer.receipt.version, answer.already_recorded))
        assert versions == [(3, False), (4, False), (4, True), (5, False)]
        log = await read(write_dsn, poll_id)
        assert (log.counts, log.voters) == (Counter(a=1), 1)
        assert [list(event.votes_cast.option_numbers) for event in log.events[2:]] == [[0], [1], [0]]

    async def test_in_one_batch_the_last_one_counts(self, server: CommandServiceAsyncStub, write_dsn: str) -> None:
        poll_id = await open_poll(server, allow_vote_change=True)
        response = await cast(server, poll_id, ("ada", "a"), ("bob", "a"), ("ada", "b"), ("ada", "c"), ("bob", "a"))
        assert (response.accepted, response.already_recorded, len(response.rejections)) == (4, 1, 0)
        log = await read(write_dsn, poll_id)
        assert (log.counts, log.voters) == (Counter(c=1, a=1), 2)
        assert sum(len(event.votes_cast.option_numbers) for event in log.events) == 4, "every change is in the log"

    async def test_one_streams_order_is_kept(self, server: CommandServiceAsyncStub, write_dsn: str) -> None:
        poll_id = await open_poll(server, allow_vote_change=True)
        voters = [f"voter-{n}" for n in range(300)]
        batches = [
            pb.CastVotesRequest(poll_id=poll_id, votes=[pb.Vote(voter_id=v, option_ids=[option]) for v in voters])
            for option in "abcdabcdabcd"
        ]
        responses = [response async for response in server.CastVotes(iter(batches))]
        assert [response.accepted for response in responses] == [300] * 12
        log = await read(write_dsn, poll_id)
        assert (log.counts, log.voters) == (Counter(d=300), 300)

    @pytest.mark.parametrize("voters", [1, 3])
    async def test_votes_go_on_beside_thousands_of_changes(
        self, server: CommandServiceAsyncStub, write_dsn: str, voters: int
    ) -> None:
        polls = [await open_poll(server, allow_vote_change=True) for _ in range(3)]
        changes = [(f"hasty-{n % voters}", "ab"[n // voters % 2]) for n in range(20_000)]
        changing = [asyncio.create_task(cast(server, poll_id, *changes)) for poll_id in polls]
        other = await open_poll(server)
        for n in range(20):
            await server.CastVote(vote(other, f"voter-{n}", "a"), timeout=10)
            await server.CastVote(vote(polls[0], f"voter-{n}", "a"), timeout=10)
        for poll_id, response in zip(polls, await asyncio.gather(*changing), strict=True):
            waited = voters * ballot_queue.VOTER_BALLOTS
            assert response.accepted == waited
            # The first ones waited: those who sent more hear which of their votes do not count.
            assert [rejection.index for rejection in response.rejections] == list(range(waited, 20_000))
            assert {rejection.reason for rejection in response.rejections} == {ErrorReason.ERROR_REASON_OVERLOADED}
            counts = (await read(write_dsn, poll_id)).counts
            assert counts - Counter(a=20 if poll_id == polls[0] else 0) == Counter(b=voters)

    async def test_a_repeat_beside_a_change_is_never_refused(
        self, write_dsn: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with command_server(write_dsn) as one, command_server(write_dsn) as two:
            poll_id = await open_poll(one, allow_vote_change=True)
            await one.CastVote(vote(poll_id, "ada", "a"))
            standing, changes = vote_log.VoteLog._standing, list[asyncio.Future[Any]]()

            async def late(*arguments: Any) -> Any:
                if not changes:
                    changes.append(asyncio.ensure_future(two.CastVote(vote(poll_id, "ada", "b"))))
                    await asyncio.wait(changes, timeout=0.5)
                return await standing(*arguments)

            monkeypatch.setattr(vote_log.VoteLog, "_standing", late)
            assert (await one.CastVote(vote(poll_id, "ada", "a"))).already_recorded
            assert not (await changes[0]).already_recorded
            assert (await read(write_dsn, poll_id)).counts == Counter(b=1)

    @pytest.mark.parametrize(("closed", "early"), [(False, False), (True, False), (False, True)])
    async def test_a_change_beside_a_lost_reply_stands(
        self, write_dsn: str, monkeypatch: pytest.MonkeyPatch, closed: bool, early: bool
    ) -> None:
        async with command_server(write_dsn) as one, command_server(write_dsn) as two:
            poll_id = await open_poll(one, allow_vote_change=True)
            await one.CastVote(vote(poll_id, "bob", "a"))

            async def meanwhile() -> None:
                await two.CastVote(vote(poll_id, "ada", "b"))
                await two.CastVote(vote(poll_id, "bob", "b"))
                if closed:
                    await close(two, poll_id)

            lose_a_reply(monkeypatch, "_replace_some", meanwhile)
            look, looks = vote_log.VoteLog._recorded_unseen, 0

            async def look_early(*arguments: Any) -> Any:
                """As if the first attempt took effect only after the next one had looked for that."""
                nonlocal looks
                looks += 1
                return None if early and looks == 1 else await look(*arguments)

            monkeypatch.setattr(vote_log.VoteLog, "_recorded_unseen", look_early)
            response = await cast(one, poll_id, ("bob", "a"), ("ada", "a"), ("eve", "c"))
            assert (response.accepted, response.already_recorded, reasons(response)) == (2, 1, {})
            log = await read(write_dsn, poll_id)
            assert (log.counts, log.changes.count("votes_cast")) == (Counter(b=2, c=1), 4)

    async def test_a_change_after_the_close_is_late_and_a_repeat_is_answered(
        self, server: CommandServiceAsyncStub
    ) -> None:
        poll_id = await open_poll(server, allow_vote_change=True)
        await server.CastVote(vote(poll_id, "ada", "a"))
        await close(server, poll_id)
        assert (await refused(server.CastVote(vote(poll_id, "ada", "b")))).reason == "POLL_NOT_OPEN"
        assert (await server.CastVote(vote(poll_id, "ada", "a"))).already_recorded

    async def test_many_changes_at_once_add_up(self, write_dsn: str) -> None:
        async with command_server(write_dsn) as one, command_server(write_dsn) as two:
            poll_id = await open_poll(one, allow_vote_change=True, method=VOTING_METHOD_APPROVAL)
            votes = [(f"voter-{n % 50}", "abcd"[n % 3 : n % 3 + 1 + n % 2]) for n in range(1500)]
            calls = [cast(server, poll_id, *votes[n::6]) for n, server in enumerate([one, two] * 3)]
            await asyncio.gather(*calls)
            log = await read(write_dsn, poll_id)
            assert log.voters == 50
            standing = Counter(OPTIONS[number] for numbers in log.votes.values() for number in numbers)
            assert log.counts == standing


class TestRoll:
    async def test_only_the_registered_vote_each_with_its_weight(
        self, server: CommandServiceAsyncStub, write_dsn: str
    ) -> None:
        poll_id = await draft(server, eligibility=ELIGIBILITY_ROLL)
        answer = await register(server, poll_id, {"ada": 3, "bob": 0}, {"bob": 5, "cleo": 1})
        assert (answer.registered, answer.already_registered) == (3, 1)
        assert freshness.parse(answer.consistency_token).version == 3
        await server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id))
        await server.CastVote(vote(poll_id, "ada", "a"))
        stranger = await refused(server.CastVote(vote(poll_id, "eve", "a")))
        assert (stranger.code, stranger.reason) == (grpc.StatusCode.PERMISSION_DENIED, "VOTER_NOT_ELIGIBLE")
        response = await cast(server, poll_id, ("bob", "b"), ("eve", "b"), ("ada", "a"), ("cleo", "a"))
        assert (response.accepted, response.already_recorded) == (2, 1)
        assert reasons(response) == {1: "VOTER_NOT_ELIGIBLE"}
        log = await read(write_dsn, poll_id)
        assert (log.counts, log.voters) == (Counter(a=4, b=1), 3)

    async def test_registering_after_opening(self, server: CommandServiceAsyncStub, write_dsn: str) -> None:
        poll_id = await open_poll(server, eligibility=ELIGIBILITY_ROLL)
        assert (await refused(server.CastVote(vote(poll_id, "ada", "a")))).reason == "VOTER_NOT_ELIGIBLE"
        await register(server, poll_id, {"ada": 1})
        await server.CastVote(vote(poll_id, "ada", "a"))
        again = await register(server, poll_id, {"ada": 7})
        assert (again.registered, again.already_registered) == (0, 1)
        await close(server, poll_id)
        assert (await refused(register(server, poll_id, {"bob": 1}))).reason == "POLL_NOT_OPEN"
        assert (await read(write_dsn, poll_id)).counts == Counter(a=1)

    async def test_registering_beside_a_lost_reply(
        self, server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        poll_id = await open_poll(server, eligibility=ELIGIBILITY_ROLL)
        await register(server, poll_id, {"ada": 1})

        async def meanwhile() -> None:
            await register(server, poll_id, {"bob": 1})

        lose_a_reply(monkeypatch, "_record_first", meanwhile)
        votes = (("ada", "a"), ("bob", "a"), ("ada", "a"), ("ada", "b"))
        response = await cast(server, poll_id, *votes)
        assert (response.accepted, response.already_recorded) == (1, 1)
        assert reasons(response) == {1: "VOTER_NOT_ELIGIBLE", 3: "ALREADY_VOTED"}
        assert (await cast(server, poll_id, *votes)).accepted == 1
        assert (await read(write_dsn, poll_id)).counts == Counter(a=2)

    async def test_a_changed_vote_keeps_its_weight(self, server: CommandServiceAsyncStub, write_dsn: str) -> None:
        poll_id = await open_poll(server, eligibility=ELIGIBILITY_ROLL, allow_vote_change=True)
        await register(server, poll_id, {"ada": 10, "bob": 2})
        await cast(server, poll_id, ("ada", "a"), ("bob", "a"))
        await cast(server, poll_id, ("ada", "b"))
        assert (await read(write_dsn, poll_id)).counts == Counter(a=2, b=10)

    async def test_a_poll_open_to_all_has_no_roll(self, server: CommandServiceAsyncStub, write_dsn: str) -> None:
        refusal = await refused(register(server, await draft(server), {"ada": 1}))
        assert (refusal.reason, refusal.fields) == ("INVALID_REQUEST", ["poll_id"])
        assert (await refused(register(server, str(uuid4()), {"ada": 1}))).reason == "POLL_NOT_FOUND"
        assert not await sql(write_dsn, "SELECT FROM roll")

    async def test_a_hundred_thousand_in_one_call(self, server: CommandServiceAsyncStub, write_dsn: str) -> None:
        poll_id = await draft(server, eligibility=ELIGIBILITY_ROLL)
        batches = [
            {f"voter-{n}": 1 + n % 3 for n in range(start, start + 10_000)} for start in range(0, 100_000, 10_000)
        ]
        assert (await register(server, poll_id, *batches)).registered == 100_000
        [row] = await sql(write_dsn, "SELECT count(*) AS voters, sum(weight) AS weight FROM roll")
        registered = [event.voters_registered for event in (await read(write_dsn, poll_id)).events]
        assert row["voters"] == sum(event.voters for event in registered) == 100_000
        assert row["weight"] == sum(event.weight for event in registered)


class TestOnTime:
    async def test_a_poll_opens_and_closes_by_itself(self, server: CommandServiceAsyncStub, write_dsn: str) -> None:
        poll_id = await draft(server, opens_at=after(0.3), closes_at=after(1.5))
        await until(write_dsn, poll_id, "poll_opened")
        await server.CastVote(vote(poll_id, "ada", "a"))
        log = await until(write_dsn, poll_id, "poll_closed")
        assert log.state == "CLOSED"
        assert log.changes.count("poll_closed") == log.changes.count("poll_opened") == 1

    async def test_nobody_needs_to_close_a_poll_for_votes_to_end(
        self, server: CommandServiceAsyncStub, write_dsn: str
    ) -> None:
        """The caretaker is kept from its work; the database's clock refuses the votes by itself."""
        async with no_caretaker(write_dsn):
            poll_id = await open_poll(server, closes_at=after(1.0))
            accepted = 0
            async with asyncio.timeout(10):
                while True:
                    try:
                        await server.CastVote(vote(poll_id, f"voter-{accepted}", "a"))
                    except grpc.aio.AioRpcError as error:
                        assert "takes no votes" in str(error.details())  # noqa: PT017
                        break
                    accepted += 1
            assert (await cast(server, poll_id, *((f"late-{n}", "a") for n in range(500)))).accepted == 0
            assert (await read(write_dsn, poll_id)).voters == accepted > 0
            late = await sql(
                write_dsn, "SELECT FROM events JOIN polls USING (poll_no) WHERE events.recorded_at >= polls.closes_at"
            )
            assert not late

    async def test_one_caretaker_among_several_and_another_takes_over(self, write_dsn: str) -> None:
        async with command_server(write_dsn) as one:
            async with command_server(write_dsn):
                polls = [await draft(one, opens_at=after(0.2)) for _ in range(20)]
                for poll_id in polls:
                    assert (await until(write_dsn, poll_id, "poll_opened")).changes.count("poll_opened") == 1
                held = await sql(write_dsn, LEADERS)
                assert len(held) == 1
            # One of both is gone now, perhaps the one that led.
            poll_id = await draft(one, opens_at=after(0.1))
            await until(write_dsn, poll_id, "poll_opened")

    async def test_a_caretaker_that_loses_its_session_begins_anew(
        self, server: CommandServiceAsyncStub, write_dsn: str
    ) -> None:
        await until(write_dsn, await draft(server, opens_at=after(0.1)), "poll_opened")
        assert await sql(write_dsn, f"SELECT pg_terminate_backend(pid) FROM ({LEADERS})")
        await until(write_dsn, await draft(server, opens_at=after(0.1)), "poll_opened")

    async def test_a_caretaker_that_stands_still_is_replaced(self, write_dsn: str, tmp_path: Path) -> None:
        settings = {"command_listen": f"127.0.0.1:{free_port()}", "write_dsn": write_dsn, "voter_secret": VOTER_SECRET}

        async def leads() -> None:
            assert await sql(write_dsn, LEADERS)

        async with service(tmp_path, "command_server", **settings) as first:
            await eventually(leads)
            async with command_server(write_dsn) as second:
                first.signal(signal.SIGSTOP)
                try:
                    await until(write_dsn, await draft(second, opens_at=after(0.1)), "poll_opened")
                finally:
                    first.signal(signal.SIGCONT)
                poll_id = await draft(second, opens_at=after(0.5))
                assert (await until(write_dsn, poll_id, "poll_opened")).changes.count("poll_opened") == 1
                last = await draft(second, opens_at=after(1.0))
            await until(write_dsn, last, "poll_opened")

    async def test_a_draft_that_the_rules_of_today_refuse_opens_and_closes(
        self, server: CommandServiceAsyncStub, write_dsn: str
    ) -> None:
        poll_id = await draft(server)
        old = spec(title="x" * 300, opens_at=after(-1))
        await sql(write_dsn, "UPDATE polls SET spec = $1, opens_at = now()", old.SerializeToString())
        await until(write_dsn, poll_id, "poll_opened")
        await close(server, poll_id)
        update = pb.UpdatePollRequest(poll_id=await draft(server), poll=PollSpec(title="x" * 300))
        assert (await refused(server.UpdatePoll(update))).fields == ["poll.title"]

    async def test_answers_are_forgotten_after_seven_days(
        self, write_dsn: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("command_server.caretaker._FORGOTTEN_AT_ONCE", 2)
        await sql(
            write_dsn,
            "INSERT INTO command_requests SELECT gen_random_uuid(), '', '', now() - hours * interval '1 hour'"
            " FROM unnest($1::integer[]) AS hours",
            [0, 167, 169, 200, 300, 400, 500],
        )

        async def only_young_ones_are_left() -> None:
            assert len(await sql(write_dsn, "SELECT FROM command_requests")) == 2

        async with command_server(write_dsn):
            await eventually(only_young_ones_are_left)

    async def test_the_most_overdue_poll_is_the_first(self, write_dsn: str) -> None:
        async with command_server(write_dsn) as server:
            polls = [UUID(await draft(server)) for _ in range(4)]
        overdue = "now() - poll_no * interval '1 second'"
        await sql(write_dsn, f"UPDATE polls SET opens_at = {overdue} WHERE poll_no % 2 = 0")
        await sql(write_dsn, f"UPDATE polls SET state = 'OPEN', closes_at = {overdue} WHERE poll_no % 2 = 1")
        due = await sql(write_dsn, queries("command_server").due_polls, [polls[0]], 100)
        assert [row["poll_id"] for row in due] == polls[:0:-1]

    async def test_a_poll_that_is_damaged_keeps_no_other_one(
        self, server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("command_server.caretaker._SKIP_SECONDS", 0.5)
        closed = [await open_poll(server) for _ in range(2)]
        for poll_id in closed:
            await close(server, poll_id)
        drafts = [await draft(server, opens_at=after(1.0)) for _ in range(2)]
        specs = await sql(write_dsn, "SELECT poll_no, spec FROM polls")
        await sql(write_dsn, "UPDATE polls SET spec = '\\xffff' WHERE poll_id = ANY ($1)", [closed[0], drafts[0]])
        for poll_id in closed:
            await sql(
                write_dsn, "INSERT INTO recounts SELECT poll_no FROM polls WHERE poll_id = $1::text::uuid", poll_id
            )
        await until(write_dsn, drafts[1], "poll_opened")
        await until(write_dsn, closed[1], "poll_certified")
        for row in specs:
            await sql(write_dsn, "UPDATE polls SET spec = $2 WHERE poll_no = $1", *row)
        await until(write_dsn, drafts[0], "poll_opened")
        await until(write_dsn, closed[0], "poll_certified")

    async def test_times_must_make_sense(self, server: CommandServiceAsyncStub) -> None:
        request = pb.CreatePollRequest(poll=spec(opens_at=after(20), closes_at=after(10)))
        assert (await refused(server.CreatePoll(request))).reason == "INVALID_REQUEST"
        late = await draft(server, closes_at=after(-1))
        assert (await refused(server.OpenPoll(pb.OpenPollRequest(poll_id=late)))).reason == "POLL_NOT_OPEN"

    async def test_times_must_be_of_the_calendar(self, server: CommandServiceAsyncStub) -> None:
        times = [(10**15, 0), (253402300800, 0), (253402300799, 10**9 - 1), (5, -5), (5, 2 * 10**9), (-62135596800, 0)]
        for (seconds, nanos), field in product(times, ("opens_at", "closes_at")):
            poll = spec(**{field: Timestamp(seconds=seconds, nanos=nanos)})
            refusal = await refused(server.CreatePoll(pb.CreatePollRequest(poll=poll)))
            assert (refusal.reason, refusal.fields) == ("INVALID_REQUEST", [f"poll.{field}"])

    async def test_the_last_second_of_the_calendar_is_a_time(self, server: CommandServiceAsyncStub) -> None:
        await draft(server, opens_at=Timestamp(seconds=-62135596799), closes_at=Timestamp(seconds=253402300799))


LEADERS = """
    SELECT pid FROM pg_locks
    WHERE locktype = 'advisory' AND granted
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


@asynccontextmanager
async def no_caretaker(dsn: str) -> AsyncIterator[None]:
    """Leads in the caretaker's place, and does nothing."""
    connection = await asyncpg.connect(dsn)
    try:
        leading = asyncio.create_task(connection.execute("SELECT pg_advisory_lock($1)", caretaker._LOCK))
        while not leading.done():
            others = f"SELECT pg_terminate_backend(pid) FROM ({LEADERS}) WHERE pid <> $1"
            await sql(dsn, others, connection.get_server_pid())
            await asyncio.sleep(0.02)
        await leading
        yield
    finally:
        connection.terminate()


class Pages:
    """A pool that keeps what it fetched."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self.terminate = pool.terminate
        self.pages: list[list[asyncpg.Record]] = []
        self._pool = pool

    async def fetch(self, *arguments: Any) -> list[asyncpg.Record]:
        self.pages.append(await self._pool.fetch(*arguments))
        return self.pages[-1]


class TestCertification:
    async def election(self, server: CommandServiceAsyncStub) -> str:
        poll_id = await open_poll(
            server, method=VOTING_METHOD_APPROVAL, eligibility=ELIGIBILITY_ROLL, allow_vote_change=True
        )
        await register(server, poll_id, {f"voter-{n}": 1 + n % 2 for n in range(500)})
        await cast(server, poll_id, *((f"voter-{n}", "ab"[: 1 + n % 2]) for n in range(500)))
        await cast(server, poll_id, *((f"voter-{n}", "cd") for n in range(0, 500, 10)))
        return poll_id

    async def test_a_recount_of_the_votes_certifies_the_poll(
        self, server: CommandServiceAsyncStub, write_dsn: str
    ) -> None:
        poll_id = await self.election(server)
        early = await refused(server.CertifyPoll(pb.CertifyPollRequest(poll_id=poll_id)))
        assert (early.code, early.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "POLL_NOT_CLOSED")
        await close(server, poll_id)
        request = pb.CertifyPollRequest(poll_id=poll_id, request_id=str(uuid4()))
        answers = await asyncio.gather(*(server.CertifyPoll(request) for _ in range(5)))
        assert len({answer.consistency_token for answer in answers}) == 1
        log = await until(write_dsn, poll_id, "poll_certified")
        recount = log.events[-1].poll_certified.recount
        assert log.state == "CERTIFIED"
        assert log.changes.count("poll_certified") == 1
        assert dict(zip(OPTIONS, recount.counts, strict=True)) == {"a": 700, "b": 500, "c": 50, "d": 50}
        assert (recount.total_votes, log.counts) == (500, Counter(a=700, b=500, c=50, d=50))
        assert (await refused(server.CertifyPoll(pb.CertifyPollRequest(poll_id=poll_id)))).reason == "POLL_NOT_CLOSED"

    @pytest.mark.parametrize("eligibilities", [(ELIGIBILITY_OPEN,), (ELIGIBILITY_OPEN, ELIGIBILITY_ROLL)])
    @pytest.mark.parametrize("method", [VOTING_METHOD_SINGLE_CHOICE, VOTING_METHOD_APPROVAL])
    async def test_a_roll_weighs_only_where_the_poll_is_opened_with_one(
        self, server: CommandServiceAsyncStub, write_dsn: str, eligibilities: tuple[Any, ...], method: Any
    ) -> None:
        poll_id = await draft(server, eligibility=ELIGIBILITY_ROLL, method=method)
        await register(server, poll_id, {"ada": 5, "bob": 7})
        for eligibility in eligibilities:
            change = pb.UpdatePollRequest(poll_id=poll_id, poll=PollSpec(eligibility=eligibility))
            await server.UpdatePoll(change)
        await server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id))
        await cast(server, poll_id, ("ada", "a"), ("bob", "b"), ("eve", "a"))
        await close(server, poll_id)
        await server.CertifyPoll(pb.CertifyPollRequest(poll_id=poll_id))
        log = await until(write_dsn, poll_id, "poll_certified")
        weighted = eligibilities[-1] == ELIGIBILITY_ROLL
        assert log.counts == (Counter(a=5, b=7) if weighted else Counter(a=2, b=1))

    async def failure(self, write_dsn: str) -> CertificationFailed:
        """What the log says of the recount, once that is that it does not agree."""
        failed = Event()
        async with asyncio.timeout(15):
            while not failed.HasField("certification_failed"):
                [row] = await sql(write_dsn, "SELECT payload FROM events ORDER BY version DESC LIMIT 1")
                failed = Event.FromString(row["payload"])
                await asyncio.sleep(0.02)
        return failed.certification_failed

    @pytest.mark.parametrize(
        "damage",
        [
            "DELETE FROM votes WHERE ballot_key = (SELECT ballot_key FROM votes LIMIT 1)",
            "UPDATE votes SET choices = '\\x0003'"
            " WHERE ballot_key = (SELECT ballot_key FROM votes WHERE choices = '\\x0000' LIMIT 1)",
            "UPDATE votes SET choices = choices || '\\x00' WHERE ballot_key = (SELECT ballot_key FROM votes LIMIT 1)",
            "INSERT INTO votes SELECT batch_id, '00000001-0000-0000-0000-000000000000', choices FROM votes LIMIT 1",
        ],
    )
    async def test_votes_that_the_log_does_not_tell_of_are_found(
        self, server: CommandServiceAsyncStub, write_dsn: str, damage: str
    ) -> None:
        poll_id = await self.election(server)
        await close(server, poll_id)
        await sql(write_dsn, damage)
        await server.CertifyPoll(pb.CertifyPollRequest(poll_id=poll_id))
        failed = await self.failure(write_dsn)
        assert failed.recount != failed.log
        assert list(failed.log.counts) == [700, 500, 50, 50]
        [poll] = await sql(write_dsn, "SELECT state FROM polls")
        assert poll["state"] == "CLOSED"
        # It can be asked for again, once somebody has repaired the votes.
        await server.CertifyPoll(pb.CertifyPollRequest(poll_id=poll_id))

    @pytest.mark.parametrize("version", [2, 4], ids=["opened", "votes"])
    async def test_an_event_that_cannot_be_read_is_found(
        self, server: CommandServiceAsyncStub, write_dsn: str, version: int
    ) -> None:
        poll_id = await self.election(server)
        await close(server, poll_id)
        await sql(write_dsn, "UPDATE events SET payload = '\\xffff' WHERE version = $1", version)
        await server.CertifyPoll(pb.CertifyPollRequest(poll_id=poll_id))
        failed = await self.failure(write_dsn)
        assert failed.recount.total_votes == 500
        assert not failed.log.counts

    async def test_recounting_reads_in_pages(
        self, server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("command_server.recount._VOTES_OF_A_PAGE", 7)
        poll_id = await self.election(server)
        await close(server, poll_id)
        await server.CertifyPoll(pb.CertifyPollRequest(poll_id=poll_id))
        recount = (await until(write_dsn, poll_id, "poll_certified")).events[-1].poll_certified.recount
        assert list(recount.counts) == [700, 500, 50, 50]

    async def test_a_page_of_a_recount_keeps_nobody_waiting_for_long(
        self, server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("command_server.recount._MARKS_OF_A_PAGE", 60)
        monkeypatch.setattr("command_server.recount._EVENTS_OF_A_PAGE", 3)
        sixteen = spec(
            method=VOTING_METHOD_APPROVAL, options=[PollOption(option_id=o, label=o) for o in hexdigits[:16]]
        )
        poll_id = (await server.CreatePoll(pb.CreatePollRequest(poll=sixteen))).poll_id
        await server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id))
        await cast(server, poll_id, *((f"voter-{n}", "".join({*f"{n:x}"})) for n in range(0, 60_000, 97)))
        for n in range(9):
            await server.CastVote(vote(poll_id, f"one-{n}", "0"))
        pool = Pages(await connect_pool(write_dsn, size=1, application="test"))
        try:
            counted = await recount.recount_votes(pool, 1, sixteen)
            assert max(sum(len(row["choices"]) for row in page) / 2 for page in pool.pages) < 100
            pool.pages.clear()
            assert await recount.fold_log(pool, 1, 16) == counted
            assert max(map(len, pool.pages)) == 3
        finally:
            pool.terminate()

    async def test_a_caretaker_that_dies_half_way_is_replaced(self, write_dsn: str, tmp_path: Path) -> None:
        settings = {
            "command_listen": f"127.0.0.1:{free_port()}",
            "write_dsn": write_dsn,
            "voter_secret": VOTER_SECRET,
        }
        async with (
            service(tmp_path, "command_server", failpoint="caretaker.before_certified", **settings) as doomed,
            grpc.aio.insecure_channel(settings["command_listen"]) as channel,
        ):
            poll_id = await self.election(CommandServiceStub(channel))
            await close(CommandServiceStub(channel), poll_id)
            await CommandServiceStub(channel).CertifyPoll(pb.CertifyPollRequest(poll_id=poll_id))
            async with asyncio.timeout(20):
                await doomed.ended()
        log = await read(write_dsn, poll_id)
        assert log.changes[-1] == "certification_requested"
        async with command_server(write_dsn):
            log = await until(write_dsn, poll_id, "poll_certified")
        assert list(log.events[-1].poll_certified.recount.counts) == [700, 500, 50, 50]
        assert not await sql(write_dsn, "SELECT FROM recounts")

    async def test_a_caretaker_that_stood_still_tells_no_second_outcome(
        self, server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fold, begun, go_on = recount.fold_log, asyncio.Queue[None](), asyncio.Semaphore(0)

        async def fold_when_told(*arguments: Any) -> Recount:
            begun.put_nowait(None)
            await go_on.acquire()
            return await fold(*arguments)

        monkeypatch.setattr("command_server.caretaker.fold_log", fold_when_told)
        poll_id = await self.election(server)
        await close(server, poll_id)
        await server.CertifyPoll(pb.CertifyPollRequest(poll_id=poll_id))
        async with asyncio.timeout(15):
            await begun.get()
            # As if another one had ended it, without agreement, and had been asked anew.
            await sql(write_dsn, "UPDATE recounts SET requested_at = now()")
            go_on.release()
            # The next recount begins when this one has ended.
            await begun.get()
        assert "poll_certified" not in (await read(write_dsn, poll_id)).changes
        go_on.release()
        assert (await until(write_dsn, poll_id, "poll_certified")).changes.count("poll_certified") == 1

    async def test_votes_elsewhere_go_on_during_a_recount(
        self, server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("command_server.recount._VOTES_OF_A_PAGE", 2)
        counted, other = await self.election(server), await open_poll(server)
        await close(server, counted)
        await server.CertifyPoll(pb.CertifyPollRequest(poll_id=counted))
        voters = 0
        while "poll_certified" not in (await read(write_dsn, counted)).changes:
            await server.CastVote(vote(other, f"voter-{voters}", "a"), timeout=2)
            voters += 1
        assert (await read(write_dsn, other)).voters == voters > 3
