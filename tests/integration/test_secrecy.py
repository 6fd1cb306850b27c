"""A caller who only knows a voter's id learns nothing of what the voter chose."""

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from tally.command.v1 import command_service_pb2 as pb
from tally.poll.v1.poll_pb2 import (
    ELIGIBILITY_ROLL,
    RESULTS_VISIBILITY_AFTER_CLOSE,
    VOTING_METHOD_APPROVAL,
    VOTING_METHOD_SINGLE_CHOICE,
    PollOption,
    PollSpec,
)

from command_server import ballot_queue, ballots
from tests.servers import command_server, refused, sql

if TYPE_CHECKING:
    from tally.command.v1.command_service_pb2_grpc import CommandServiceAsyncStub

OPTIONS = "abcde"
KEY, OTHER_KEY = "what the caller of a vote knows", "what another caller knows"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "change": {"allow_vote_change": True},
    "hidden": {"results_visibility": RESULTS_VISIBILITY_AFTER_CLOSE},
    "roll": {"eligibility": ELIGIBILITY_ROLL},
    "approval": {"method": VOTING_METHOD_APPROVAL},
}


@pytest.fixture(params=[True, False], ids=["compiled", "python"])
async def server(write_dsn: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    if not request.param:
        monkeypatch.setattr(ballots, "compiled", None)
    async with command_server(write_dsn) as server:
        yield server


async def open_poll(server: "CommandServiceAsyncStub", **kind: Any) -> str:
    options = [PollOption(option_id=letter, label=letter.upper()) for letter in OPTIONS]
    kind = {"method": VOTING_METHOD_SINGLE_CHOICE} | kind
    spec = PollSpec(title="?", options=options, **kind)
    poll_id = (await server.CreatePoll(pb.CreatePollRequest(poll=spec))).poll_id
    if kind.get("eligibility"):
        roll = pb.RegisterVotersRequest(poll_id=poll_id, voters=[pb.Voter(voter_id="ada"), pb.Voter(voter_id="bob")])
        await server.RegisterVoters(iter([roll]))
    await server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id))
    return poll_id


def vote(poll_id: str, voter: str, option: str, key: str = "") -> pb.CastVoteRequest:
    return pb.CastVoteRequest(poll_id=poll_id, voter_id=voter, option_ids=list(option), idempotency_key=key)


async def one_by_one(server: "CommandServiceAsyncStub", poll_id: str, voter: str, key: str) -> list[Any]:
    """What the answer to a vote for each option says, but for what counts calls."""
    answers: list[Any] = []
    for option in OPTIONS:
        try:
            answer = await server.CastVote(vote(poll_id, voter, option, key))
        except grpc.aio.AioRpcError as error:
            answers.append((error.code(), error.details()))
        else:
            answers.append(answer.already_recorded)
    return answers


async def as_stream(server: "CommandServiceAsyncStub", poll_id: str, voter: str, key: str) -> list[Any]:
    """The same of a batch for each option."""
    votes = [[pb.Vote(voter_id=voter, option_ids=[option])] for option in OPTIONS]
    batches = [pb.CastVotesRequest(poll_id=poll_id, votes=cast, idempotency_key=key) for cast in votes]
    responses = [response async for response in server.CastVotes(iter(batches))]
    return [
        (response.accepted, response.already_recorded, [(r.reason, r.message) for r in response.rejections])
        for response in responses
    ]


@pytest.mark.parametrize("ended", ["", "ClosePoll", "CancelPoll"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_guess_is_answered_the_same_whatever_it_guesses(
    server: "CommandServiceAsyncStub", kind: str, ended: str
) -> None:
    poll_id = await open_poll(server, **KINDS[kind])
    await server.CastVote(vote(poll_id, "ada", "d", KEY))
    await server.CastVote(vote(poll_id, "bob", "d"))
    if ended:
        request = {"ClosePoll": pb.ClosePollRequest, "CancelPoll": pb.CancelPollRequest}[ended]
        await getattr(server, ended)(request(poll_id=poll_id))
    for guess in (one_by_one, as_stream):
        for voter in ("ada", "bob"):
            for key in ("", OTHER_KEY):
                answers = await guess(server, poll_id, voter, key)
                assert answers == answers[:1] * len(OPTIONS), f"{voter}, key {key!r}: {answers}"


async def test_a_change_without_the_key_is_a_new_vote_also_where_it_changes_nothing(
    server: "CommandServiceAsyncStub", write_dsn: str
) -> None:
    poll_id = await open_poll(server, allow_vote_change=True)
    first = await server.CastVote(vote(poll_id, "ada", "b", KEY))
    again = await server.CastVote(vote(poll_id, "ada", "b", KEY))
    assert (again.already_recorded, again.receipt) == (True, first.receipt)
    for key in ("", OTHER_KEY):
        other = await server.CastVote(vote(poll_id, "ada", "b", key))
        assert not other.already_recorded
        assert other.receipt.version > first.receipt.version
    # The vote that stands was cast with another key now.
    assert not (await server.CastVote(vote(poll_id, "ada", "b", KEY))).already_recorded
    assert len(await sql(write_dsn, "SELECT FROM votes")) == 1


@pytest.mark.parametrize("closed", [False, True])
async def test_who_has_the_key_gets_the_first_receipt_by_either_call(
    server: "CommandServiceAsyncStub", closed: bool
) -> None:
    poll_id = await open_poll(server)
    first = await server.CastVote(vote(poll_id, "ada", "b", KEY))
    votes = [pb.Vote(voter_id=f"v{n}", option_ids=["abcde"[n % 5]]) for n in range(1_000)]
    batch = pb.CastVotesRequest(poll_id=poll_id, votes=votes, idempotency_key=KEY)
    [cast] = [response async for response in server.CastVotes(iter([batch]))]
    assert cast.accepted == 1_000
    if closed:
        await server.ClosePoll(pb.ClosePollRequest(poll_id=poll_id))
    again = await server.CastVote(vote(poll_id, "ada", "b", KEY))
    assert (again.already_recorded, again.receipt) == (True, first.receipt)
    otherwise = await refused(server.CastVote(vote(poll_id, "ada", "c", KEY)))
    assert otherwise.reason == "ALREADY_VOTED"
    assert (await server.CastVote(vote(poll_id, "v3", "d", KEY))).already_recorded
    batch.votes.append(pb.Vote(voter_id="ada", option_ids=["b"]))
    [repeated] = [response async for response in server.CastVotes(iter([batch]))]
    assert (repeated.accepted, repeated.already_recorded) == (0, 1_001)


async def test_votes_with_and_without_keys_share_a_commit(
    server: "CommandServiceAsyncStub", write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ballot_queue, "SMALL_BATCH", 8)
    poll_id = await open_poll(server, method=VOTING_METHOD_APPROVAL)
    many = [vote(poll_id, f"v{n}", OPTIONS[: n % 5 + 1], KEY if n % 3 else "") for n in range(200)]
    await asyncio.gather(*(server.CastVote(request) for request in many))
    kept = await sql(write_dsn, "SELECT octet_length(idempotency_hash) AS size, count(*) FROM votes GROUP BY 1")
    assert {row["size"]: row["count"] for row in kept} == {None: 67, 7: 133}
    assert len(await sql(write_dsn, "SELECT DISTINCT idempotency_hash FROM votes")) == 134, (
        "it is hashed with the voter"
    )
    for request in many:
        if request.idempotency_key:
            assert (await server.CastVote(request)).already_recorded
        else:
            assert (await refused(server.CastVote(request))).reason == "ALREADY_VOTED"


@pytest.mark.parametrize("key", ["k" * 15, "k" * 65, "k" * 20 + "\n", "ключ" * 5])
async def test_what_is_no_key_is_refused_by_name(server: "CommandServiceAsyncStub", key: str) -> None:
    poll_id = await open_poll(server)
    await server.CastVote(vote(poll_id, "warm", "a"))
    refusal = await refused(server.CastVote(vote(poll_id, "ada", "a", key)))
    assert (refusal.reason, refusal.fields) == ("INVALID_REQUEST", ["idempotency_key"])
    batch = pb.CastVotesRequest(poll_id=poll_id, votes=[pb.Vote(voter_id="ada", option_ids=["a"])], idempotency_key=key)
    refusal = await refused(server.CastVotes(iter([batch])).read())
    assert (refusal.reason, refusal.fields) == ("INVALID_REQUEST", ["idempotency_key"])
