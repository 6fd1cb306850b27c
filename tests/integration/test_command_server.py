"""The write side against a real Postgres: what is acknowledged is there, once, in order."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import asyncpg
import grpc
import psutil
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from prometheus_client import REGISTRY
from structlog.testing import capture_logs
from tally.command.v1 import command_service_pb2 as pb
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub
from tally.event.v1.event_pb2 import Event
from tally.poll.v1.error_reason_pb2 import ErrorReason
from tally.poll.v1.poll_pb2 import VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec

from command_server import ballot_box, ballot_queue, ballots, intake, polls, vote_log
from contracts import freshness
from contracts.bus import MAX_PAYLOAD_BYTES
from contracts.voters import VoterKeys
from runtime.embedded import Stores, free_port
from runtime.schema import MIGRATION_LOCK
from runtime.serving import MAX_REQUEST_BYTES, violations
from tests.processes import service
from tests.proxy import proxy, through
from tests.servers import VOTER_SECRET, command_channel, command_server, refused, sql, vote_rows

if TYPE_CHECKING:
    from tally.command.v1.command_service_pb2_grpc import CommandServiceAsyncStub

# What a caller proves by that a vote was its own.
KEY = "the key of these tests' caller"

SPEC = PollSpec(
    title="Which day?",
    method=VOTING_METHOD_SINGLE_CHOICE,
    options=[PollOption(option_id="mon", label="Monday"), PollOption(option_id="tue", label="Tuesday")],
)


@pytest.fixture
async def server(write_dsn: str) -> AsyncIterator[CommandServiceAsyncStub]:
    async with command_server(write_dsn) as stub:
        yield stub


async def draft_poll(server: CommandServiceAsyncStub) -> str:
    return (await server.CreatePoll(pb.CreatePollRequest(poll=SPEC))).poll_id


async def open_poll(server: CommandServiceAsyncStub) -> str:
    poll_id = await draft_poll(server)
    await server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id))
    return poll_id


def vote(poll_id: str, voter_id: str, *option_ids: str, key: str = "") -> pb.CastVoteRequest:
    return pb.CastVoteRequest(poll_id=poll_id, voter_id=voter_id, option_ids=option_ids, idempotency_key=key)


def batch(poll_id: str, *votes: tuple[str, str], sequence: int = 0, key: str = "") -> pb.CastVotesRequest:
    cast = [pb.Vote(voter_id=voter, option_ids=[option] if option else []) for voter, option in votes]
    return pb.CastVotesRequest(batch_sequence=sequence, poll_id=poll_id, votes=cast, idempotency_key=key)


async def cast(server: CommandServiceAsyncStub, *batches: pb.CastVotesRequest) -> list[pb.CastVotesResponse]:
    return [response async for response in server.CastVotes(iter(batches))]


class Log:
    """What the write database holds of one poll."""

    def __init__(self, poll_no: int, events: list[Any], votes: dict[UUID, bytes], outbox: list[int]) -> None:
        self.poll_no = poll_no
        self.events = [Event.FromString(event["payload"]) for event in events]
        self.changes = [event.WhichOneof("change") for event in self.events]
        self.versions = [event["version"] for event in events]
        self.moments = [event["recorded_at"] for event in events]
        self.votes = {key: int.from_bytes(choices) for key, choices in votes.items()}
        self.rows = len(votes)
        self.outbox = outbox

    @property
    def cast(self) -> list[tuple[UUID, int]]:
        """The votes that the events tell of, with the keys that their rows have."""
        told: list[tuple[UUID, int]] = []
        for event in self.events:
            keys, numbers = event.votes_cast.voter_keys, event.votes_cast.option_numbers
            voters = (keys[16 * i : 16 * i + 16] for i in range(len(numbers)))
            told += zip((ballots.ballot_key(self.poll_no, voter) for voter in voters), numbers, strict=True)
        return told


async def read_log(dsn: str, poll_id: str) -> Log:
    [poll] = await sql(dsn, "SELECT poll_no, version FROM polls WHERE poll_id = $1::text::uuid", poll_id)
    number = poll["poll_no"]
    events = await sql(dsn, "SELECT version, recorded_at, payload FROM events WHERE poll_no = $1 ORDER BY 1", number)
    outbox = await sql(dsn, "SELECT version FROM outbox WHERE poll_no = $1 ORDER BY outbox_id", number)
    log = Log(number, events, await vote_rows(dsn, number), [row["version"] for row in outbox])
    # The invariants of every poll at every time: no gap, no clock that falls, nothing that the log and the votes
    # disagree on, and every event on its way to the readers in the order of its versions.
    assert log.versions == list(range(1, poll["version"] + 1))
    assert log.moments == sorted(log.moments)
    assert log.outbox == log.versions
    assert len(log.cast) == log.rows
    assert dict(log.cast) == log.votes
    return log


async def test_the_life_of_a_poll_is_its_log(server: CommandServiceAsyncStub, write_dsn: str) -> None:
    created = await server.CreatePoll(pb.CreatePollRequest(poll=SPEC))
    opened = await server.OpenPoll(pb.OpenPollRequest(poll_id=created.poll_id))
    answer = await server.CastVote(vote(created.poll_id, "ada", "tue"))
    closed = await server.ClosePoll(pb.ClosePollRequest(poll_id=created.poll_id))
    log = await read_log(write_dsn, created.poll_id)
    assert log.changes == ["poll_created", "poll_opened", "votes_cast", "poll_closed"]
    assert log.events[0].poll_created.poll == SPEC
    assert log.votes == {ballots.ballot_key(log.poll_no, VoterKeys(VOTER_SECRET).voter_key("ada")): 1}
    tokens = [answer.consistency_token for answer in (created, opened, answer, closed)]
    assert [freshness.parse(token).version for token in tokens] == [1, 2, 3, 4]
    assert answer.receipt.version == 3


async def test_illegal_transitions_are_refused(server: CommandServiceAsyncStub, write_dsn: str) -> None:
    poll_id = await draft_poll(server)
    early = await refused(server.ClosePoll(pb.ClosePollRequest(poll_id=poll_id)))
    assert (early.code, early.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "POLL_NOT_OPEN")
    await server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id))
    again = await refused(server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id)))
    assert (again.code, again.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "POLL_NOT_DRAFT")
    await server.ClosePoll(pb.ClosePollRequest(poll_id=poll_id))
    assert (await refused(server.ClosePoll(pb.ClosePollRequest(poll_id=poll_id)))).reason == "POLL_NOT_OPEN"
    assert (await refused(server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id)))).reason == "POLL_NOT_DRAFT"
    assert (await read_log(write_dsn, poll_id)).changes == ["poll_created", "poll_opened", "poll_closed"]


async def test_a_request_id_makes_a_command_happen_once(server: CommandServiceAsyncStub, write_dsn: str) -> None:
    create = pb.CreatePollRequest(request_id=str(uuid4()), poll=SPEC)
    answers = await asyncio.gather(*(server.CreatePoll(create) for _ in range(20)))
    assert len({answer.poll_id for answer in answers}) == 1
    assert len(await sql(write_dsn, "SELECT FROM polls")) == 1

    opening = pb.OpenPollRequest(request_id=str(uuid4()), poll_id=answers[0].poll_id)
    opened = await asyncio.gather(*(server.OpenPoll(opening) for _ in range(20)))
    assert len({answer.consistency_token for answer in opened}) == 1
    assert (await read_log(write_dsn, answers[0].poll_id)).changes == ["poll_created", "poll_opened"]


async def test_a_request_id_is_the_same_in_capitals(server: CommandServiceAsyncStub, write_dsn: str) -> None:
    create = pb.CreatePollRequest(request_id=str(uuid4()), poll=SPEC)
    first = await server.CreatePoll(create)
    # A hash that an earlier version kept is still that of this request: it took the id as it was written.
    body = create.DESCRIPTOR.full_name.encode() + b"\0" + create.SerializeToString(deterministic=True)
    [kept] = await sql(write_dsn, "SELECT fingerprint FROM command_requests")
    assert kept["fingerprint"] == blake2b(body, digest_size=32).digest()
    create.request_id = create.request_id.upper()
    assert await server.CreatePoll(create) == first


async def test_a_repeat_may_write_the_polls_id_in_capitals(server: CommandServiceAsyncStub, write_dsn: str) -> None:
    poll_id = await draft_poll(server)
    update = pb.UpdatePollRequest(request_id=str(uuid4()), poll_id=poll_id.upper(), poll=PollSpec(title="When?"))
    opening = pb.OpenPollRequest(request_id=str(uuid4()), poll_id=poll_id)
    for call, request in ((server.UpdatePoll, update), (server.OpenPoll, opening)):
        first = await call(request)  # type: ignore[arg-type]
        request.poll_id = poll_id if request.poll_id != poll_id else poll_id.upper()
        assert await call(request) == first  # type: ignore[arg-type]
    assert (await read_log(write_dsn, poll_id)).changes == ["poll_created", "poll_updated", "poll_opened"]


async def test_a_caller_that_hangs_up_is_no_defect(
    server: CommandServiceAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    poll_id = await open_poll(server)
    answered, hung_up, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
    answer = intake._Batch.answer

    async def late(batch: Any) -> bytes:
        answered.set()
        try:
            await asyncio.shield(hung_up.wait())
        except asyncio.CancelledError:
            # As where the end of the call comes in the middle of a write.
            ended.set()
            raise RuntimeError("what gRPC says of a write that failed") from None
        return await answer(batch)

    monkeypatch.setattr(intake._Batch, "answer", late)
    with capture_logs() as logs:
        call = server.CastVotes(iter([batch(poll_id, ("ada", "mon"))]))
        async with asyncio.timeout(10):
            reading = asyncio.ensure_future(call.read())
            await answered.wait()
            call.cancel()
            await ended.wait()
            await asyncio.wait([reading])
        await server.CastVote(vote(poll_id, "bob", "mon"))
    assert [line for line in logs if line["log_level"] == "error"] == []


async def test_no_request_id_has_the_number_of_another_lock(server: CommandServiceAsyncStub, write_dsn: str) -> None:
    holder = await asyncpg.connect(write_dsn)
    try:
        await holder.execute("SELECT pg_advisory_lock($1)", MIGRATION_LOCK)
        same_number = str(UUID(bytes=MIGRATION_LOCK.to_bytes(8) + bytes(8)))
        assert (await server.CreatePoll(pb.CreatePollRequest(request_id=same_number, poll=SPEC))).poll_id
    finally:
        await holder.close()


@pytest.mark.parametrize("other", ["another body", "another command"])
async def test_a_request_id_cannot_be_used_for_something_else(server: CommandServiceAsyncStub, other: str) -> None:
    create = pb.CreatePollRequest(request_id=str(uuid4()), poll=SPEC)
    poll_id = (await server.CreatePoll(create)).poll_id
    if other == "another body":
        create.poll.title = "Which month?"
        refusal = await refused(server.CreatePoll(create))
    else:
        refusal = await refused(server.OpenPoll(pb.OpenPollRequest(request_id=create.request_id, poll_id=poll_id)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert refusal.fields == ["request_id"]


async def test_a_refused_command_can_be_repeated_when_it_is_due(server: CommandServiceAsyncStub) -> None:
    poll_id = await draft_poll(server)
    close = pb.ClosePollRequest(request_id=str(uuid4()), poll_id=poll_id)
    assert (await refused(server.ClosePoll(close))).reason == "POLL_NOT_OPEN"
    await server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id))
    await server.ClosePoll(close)


async def test_no_event_is_larger_than_the_bus_takes(server: CommandServiceAsyncStub, write_dsn: str) -> None:
    poll_id = await draft_poll(server)
    # As an earlier version kept it: full of a field that nobody knows.
    await sql(write_dsn, "UPDATE polls SET spec = spec || $1", b"\x82\x7d\x03any" * (MAX_PAYLOAD_BYTES // 6))
    refusal = await refused(server.UpdatePoll(pb.UpdatePollRequest(poll_id=poll_id, poll=PollSpec(title="When?"))))
    assert (refusal.reason, refusal.fields) == ("INVALID_REQUEST", ["poll"])
    insert = "INSERT INTO events (poll_no, version, recorded_at, payload) VALUES (1, $1, now(), $2)"
    await sql(write_dsn, insert, 2, bytes(MAX_PAYLOAD_BYTES))
    with pytest.raises(asyncpg.CheckViolationError):
        await sql(write_dsn, insert, 3, bytes(MAX_PAYLOAD_BYTES + 1))


async def test_one_vote_each(server: CommandServiceAsyncStub, write_dsn: str) -> None:
    poll_id = await open_poll(server)
    first = await server.CastVote(vote(poll_id, "ada", "mon", key=KEY))
    assert not first.already_recorded
    again = await server.CastVote(vote(poll_id, "ada", "mon", key=KEY))
    assert again.already_recorded
    assert again.receipt == first.receipt
    other = await refused(server.CastVote(vote(poll_id, "ada", "tue", key=KEY)))
    assert (other.code, other.reason) == (grpc.StatusCode.ALREADY_EXISTS, "ALREADY_VOTED")
    assert list((await read_log(write_dsn, poll_id)).votes.values()) == [0]


async def test_the_same_voter_votes_in_every_poll(server: CommandServiceAsyncStub) -> None:
    receipts = [(await server.CastVote(vote(await open_poll(server), "ada", "mon"))).receipt for _ in range(2)]
    assert receipts[0].receipt_id != receipts[1].receipt_id


async def test_a_repeat_is_answered_even_after_closing(server: CommandServiceAsyncStub, write_dsn: str) -> None:
    poll_id = await open_poll(server)
    first = await server.CastVote(vote(poll_id, "ada", "mon", key=KEY))
    await server.ClosePoll(pb.ClosePollRequest(poll_id=poll_id))
    again = await server.CastVote(vote(poll_id, "ada", "mon", key=KEY))
    assert again.receipt == first.receipt
    for voter, option, reason in [("ada", "tue", "ALREADY_VOTED"), ("bob", "mon", "POLL_NOT_OPEN")]:
        assert (await refused(server.CastVote(vote(poll_id, voter, option, key=KEY)))).reason == reason
    assert (await read_log(write_dsn, poll_id)).changes[-1] == "poll_closed"


@pytest.mark.parametrize("compiled", [True, False])
async def test_a_batch_is_judged_vote_by_vote(
    server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr(ballots, "compiled", None)
    poll_id = await open_poll(server)
    await server.CastVote(vote(poll_id, "ada", "mon", key=KEY))
    long = "v" * 257
    votes = [("ada", "mon"), ("bob", "tue"), ("ada", "tue"), ("", "mon"), ("bob", "tue"), ("bob", "mon"), ("cleo", "")]
    votes += [("cleo", "sun"), (long, "mon"), ("dan", "mon")]
    [response] = await cast(server, batch(poll_id, *votes, sequence=42, key=KEY))
    assert (response.batch_sequence, response.accepted, response.already_recorded) == (42, 2, 2)
    assert {rejection.index: ErrorReason.Name(rejection.reason) for rejection in response.rejections} == {
        2: "ERROR_REASON_ALREADY_VOTED",
        3: "ERROR_REASON_INVALID_REQUEST",
        5: "ERROR_REASON_ALREADY_VOTED",
        6: "ERROR_REASON_INVALID_REQUEST",
        7: "ERROR_REASON_UNKNOWN_OPTION",
        8: "ERROR_REASON_INVALID_REQUEST",
    }
    assert all(rejection.message for rejection in response.rejections)
    assert freshness.parse(response.consistency_token).version == 4
    assert Counter((await read_log(write_dsn, poll_id)).votes.values()) == {0: 2, 1: 1}


async def test_a_batch_that_goes_into_several_commits_gets_one_answer(
    server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ballot_queue, "BATCH_BALLOTS", 30)
    poll_id = await open_poll(server)
    await cast(server, batch(poll_id, *((f"early-{v}", "mon") for v in range(10)), key=KEY))
    votes = [(f"{v}", ("mon", "tue")[v % 2]) for v in range(300)]
    for v in range(10):
        votes[30 * v] = (f"early-{v}", "mon")
        votes[30 * v + 7] = (f"early-{v}", "tue")
        votes[30 * v + 9] = (f"{30 * v + 9}", "sun")
        # The first vote of a voter in a batch counts, whichever option it names.
        votes[30 * v + 20] = (f"{30 * v + 11}", "mon")
    responses = await cast(server, *(batch(poll_id, *votes, sequence=n, key=KEY) for n in range(2)))
    log = await read_log(write_dsn, poll_id)
    assert log.rows == 10 + 300 - 40
    assert max(len(event.votes_cast.option_numbers) for event in log.events) <= 30
    rejected = {30 * v + place for v in range(10) for place in (7, 9, 20)}
    for response in responses:
        assert {rejection.index for rejection in response.rejections} == rejected
    assert [(r.accepted, r.already_recorded) for r in responses] == [(260, 10), (0, 270)]
    assert {freshness.parse(r.consistency_token).version for r in responses} == {log.versions[-1]}


async def test_a_bad_vote_never_fails_its_batch_or_stream(server: CommandServiceAsyncStub, write_dsn: str) -> None:
    poll_id, draft = await open_poll(server), await draft_poll(server)
    responses = await cast(
        server,
        batch(poll_id, ("ada", "mon"), sequence=1),
        batch(str(uuid4()), ("ada", "mon"), ("bob", "mon"), sequence=2),
        batch(draft, ("ada", "mon"), sequence=3),
        batch(poll_id, ("bob", "mon"), sequence=4),
    )
    assert [response.batch_sequence for response in responses] == [1, 2, 3, 4]
    assert [response.accepted for response in responses] == [1, 0, 0, 1]
    reasons = [{ErrorReason.Name(r.reason) for r in response.rejections} for response in responses]
    assert reasons == [set(), {"ERROR_REASON_POLL_NOT_FOUND"}, {"ERROR_REASON_POLL_NOT_OPEN"}, set()]
    assert (await read_log(write_dsn, poll_id)).rows == 2


@pytest.mark.parametrize("option", ["n" * 190, "\1" * 190, "🗳" * 47])
async def test_an_answer_is_never_larger_than_what_a_client_takes(server: CommandServiceAsyncStub, option: str) -> None:
    poll_id = await open_poll(server)
    invalid = [(f"{n}", option) for n in range(19_999)]
    request = batch(poll_id, ("ada", "mon"), *invalid)
    assert 0.9 < request.ByteSize() / MAX_REQUEST_BYTES < 1
    [response] = await cast(server, request)
    assert (response.accepted, len(response.rejections)) == (1, len(invalid))


async def test_what_came_before_a_broken_request_is_answered(server: CommandServiceAsyncStub, write_dsn: str) -> None:
    poll_id = await open_poll(server)
    call = server.CastVotes(iter([batch(poll_id, ("ada", "mon"), sequence=1), batch("no uuid", ("bob", "mon"))]))
    answered = []
    with pytest.raises(grpc.aio.AioRpcError) as error:  # noqa: PT012
        async for response in call:
            answered.append(response.batch_sequence)
    assert answered == [1]
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (await read_log(write_dsn, poll_id)).rows == 1


HUGE = "x" * 10_000_000
NUL = PollSpec(title="a\0b", method=VOTING_METHOD_SINGLE_CHOICE, options=SPEC.options)
TWICE = PollSpec(title="?", method=VOTING_METHOD_SINGLE_CHOICE, options=[SPEC.options[0]] * 2)


@pytest.mark.parametrize(
    ("method", "request_", "code", "reason", "fields"),
    [
        ("CreatePoll", pb.CreatePollRequest(), "INVALID_ARGUMENT", "INVALID_REQUEST", ["poll"]),
        ("CreatePoll", pb.CreatePollRequest(request_id="1", poll=SPEC), "INVALID_ARGUMENT", "INVALID_REQUEST",
         ["request_id"]),
        ("CreatePoll", pb.CreatePollRequest(poll=NUL), "INVALID_ARGUMENT", "INVALID_REQUEST", ["poll.title"]),
        ("CreatePoll", pb.CreatePollRequest(poll=TWICE),
         "INVALID_ARGUMENT", "INVALID_REQUEST", ["poll.options"]),
        ("OpenPoll", pb.OpenPollRequest(poll_id="7"), "INVALID_ARGUMENT", "INVALID_REQUEST", ["poll_id"]),
        ("OpenPoll", pb.OpenPollRequest(poll_id=str(uuid4())), "NOT_FOUND", "POLL_NOT_FOUND", []),
        ("ClosePoll", pb.ClosePollRequest(poll_id=str(uuid4())), "NOT_FOUND", "POLL_NOT_FOUND", []),
        ("CastVote", vote("", "ada", "mon"), "INVALID_ARGUMENT", "INVALID_REQUEST", ["poll_id"]),
        ("CastVote", vote("OPEN", "", "mon"), "INVALID_ARGUMENT", "INVALID_REQUEST", ["voter_id"]),
        ("CastVote", vote("OPEN", "ada"), "INVALID_ARGUMENT", "INVALID_REQUEST", ["option_ids"]),
        ("CastVote", vote("OPEN", "ada", "sun"), "INVALID_ARGUMENT", "UNKNOWN_OPTION", []),
        ("CastVote", vote("OPEN", "ada", "mon", "tue"), "INVALID_ARGUMENT", "TOO_MANY_CHOICES", []),
        ("CastVote", vote(str(uuid4()), "ada", "mon"), "NOT_FOUND", "POLL_NOT_FOUND", []),
        ("CastVote", vote("DRAFT", "ada", "mon"), "FAILED_PRECONDITION", "POLL_NOT_OPEN", []),
        ("CastVote", vote("OPEN", HUGE, "mon"), "INVALID_ARGUMENT", "INVALID_REQUEST", [""]),
    ],
)  # fmt: skip
async def test_bad_input_gets_a_clear_error_and_changes_nothing(
    server: CommandServiceAsyncStub,
    write_dsn: str,
    method: str,
    request_: Any,
    code: str,
    reason: str,
    fields: list[str],
) -> None:
    known = {"OPEN": await open_poll(server), "DRAFT": await draft_poll(server)}
    if getattr(request_, "poll_id", "") in known:
        request_ = type(request_).FromString(request_.SerializeToString())
        request_.poll_id = known[request_.poll_id]
    counting = "SELECT (SELECT count(*) FROM polls), (SELECT count(*) FROM events), (SELECT count(*) FROM votes)"
    before = await sql(write_dsn, counting)
    refusal = await refused(getattr(server, method)(request_))
    assert (refusal.code.name, refusal.reason, refusal.domain) == (code, reason, "tally")
    assert refusal.fields == fields
    assert refusal.message
    assert await sql(write_dsn, counting) == before


@pytest.mark.parametrize("sent", ["poll", "option", "mask"])
async def test_an_error_about_much_input_arrives_with_its_reason(server: CommandServiceAsyncStub, sent: str) -> None:
    poll_id, long = await open_poll(server), "é\x01" * 10_000
    if sent == "poll":
        bare = [PollOption(option_id="\0", label="\0" * 201)] * 1000
        refusal = await refused(server.CreatePoll(pb.CreatePollRequest(poll=PollSpec(options=bare))))
        assert len(refusal.fields) == 21
        assert "more fields" in refusal.message
    elif sent == "option":
        refusal = await refused(server.CastVote(vote(poll_id, "ada", long)))
    else:
        mask = FieldMask(paths=[long, "title"])
        refusal = await refused(server.UpdatePoll(pb.UpdatePollRequest(poll_id=poll_id, update_mask=mask)))
    assert refusal.reason == ("UNKNOWN_OPTION" if sent == "option" else "INVALID_REQUEST")
    # gRPC begins to drop what is above 8 KiB, and the message goes twice, as text and in the details.
    assert len(refusal.message) < 2_500


async def test_a_vote_in_a_poll_at_hand_keeps_the_rules_of_its_message(server: CommandServiceAsyncStub) -> None:
    """The server sees for itself that the usual vote keeps them: protovalidate, asked here, must say the same."""
    poll_id = await open_poll(server)
    await server.CastVote(vote(poll_id, "ada", "mon"))
    votes = product(["", "v", "v" * 256, "v" * 257, "ö" * 256, "ö" * 257], [(), ("mon",), ("mon",) * 1001])
    for voter_id, option_ids in votes:
        request = vote(poll_id, voter_id, *option_ids)
        if broken := violations(request):
            refusal = await refused(server.CastVote(request))
            # What is too much is not read any further.
            told = ["option_ids"] if len(option_ids) > 1_000 else list(broken)
            assert (refusal.reason, refusal.fields) == ("INVALID_REQUEST", told)
            assert all(broken[field] in refusal.message for field in told)
        else:
            assert (await server.CastVote(request)).receipt.poll_id == poll_id


class TestRemembered:
    """Which polls the server looks up again."""

    @pytest.fixture
    def looked_up(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        seen: list[str] = []
        read = polls.Polls._read

        async def reading(self: polls.Polls, poll_ids: list[UUID]) -> Any:
            seen.extend(map(str, poll_ids))
            return await read(self, poll_ids)

        monkeypatch.setattr(polls.Polls, "_read", reading)
        return seen

    async def test_a_poll_is_one_however_its_id_is_written(
        self, server: CommandServiceAsyncStub, looked_up: list[str]
    ) -> None:
        poll_id = await open_poll(server)
        for spelling in (poll_id.upper(), poll_id, poll_id.title()):
            await server.CastVote(vote(spelling, "ada", "mon", key=KEY))
            [answer] = await cast(server, batch(spelling, ("ada", "mon"), key=KEY))
            assert answer.already_recorded == 1
        assert looked_up == [poll_id]

    @pytest.fixture
    def room_for_three(self, monkeypatch: pytest.MonkeyPatch) -> None:
        row = {"spec": SPEC.SerializeToString(), "poll_no": 1, "state": "OPEN"}
        monkeypatch.setattr(polls, "BYTES", 3 * polls._poll(uuid4(), row).size)

    @pytest.mark.usefixtures("room_for_three")
    async def test_those_used_again_stay(self, server: CommandServiceAsyncStub, looked_up: list[str]) -> None:
        hot, *others = [await open_poll(server) for _ in range(6)]
        for poll_id in others:
            await server.CastVote(vote(poll_id, "ada", "mon", key=KEY))
            await server.CastVote(vote(hot, "ada", "mon", key=KEY))
        assert looked_up == [others[0], hot, *others[1:]]
        await asyncio.gather(*(server.CastVote(vote(others[0], f"{n}", "mon")) for n in range(50)))
        for poll_id in (hot, others[1], others[0]):
            await server.CastVote(vote(poll_id, "ada", "mon", key=KEY))
        assert set(looked_up[6:]) == {others[0]}, "to look a poll up many times at once makes no other forgotten"

    @pytest.mark.usefixtures("room_for_three")
    async def test_one_too_many_is_no_cliff(self, server: CommandServiceAsyncStub, looked_up: list[str]) -> None:
        in_turn = [await open_poll(server) for _ in range(4)]
        for _ in range(10):
            for poll_id in in_turn:
                await server.CastVote(vote(poll_id, "ada", "mon", key=KEY))
        # If the newest poll took the place of the oldest, each of the 40 votes would read its poll.
        assert 4 < len(looked_up) <= 24

    @pytest.mark.usefixtures("room_for_three")
    async def test_polls_that_are_used_take_the_place_of_others(
        self, server: CommandServiceAsyncStub, looked_up: list[str]
    ) -> None:
        for poll_id in [await open_poll(server) for _ in range(3)] * 2:
            await server.CastVote(vote(poll_id, "ada", "mon", key=KEY))
        later = [await open_poll(server) for _ in range(3)]
        for _ in range(3 * polls._COMES_TO_STAY):
            looked_up.clear()
            for poll_id in later:
                await server.CastVote(vote(poll_id, "ada", "mon", key=KEY))
        assert looked_up == []


async def test_bytes_that_are_no_message_are_refused(write_dsn: str) -> None:
    async with command_channel(write_dsn) as channel:
        raw: Any = channel.unary_unary("/tally.command.v1.CommandService/CastVote")
        refusal = await refused(raw(b"\x0a\xff\xff\xff"))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


async def test_many_voters_at_once_over_both_calls_count_once(server: CommandServiceAsyncStub, write_dsn: str) -> None:
    poll_id = await open_poll(server)
    choices = random.Random(2013)
    receipts: dict[str, set[str]] = {}
    refusals = Counter[str]()

    async def unary(voter: str, option: str) -> None:
        try:
            answer = await server.CastVote(vote(poll_id, voter, option, key=KEY))
        except grpc.aio.AioRpcError as error:
            refusals[error.code().name] += 1
        else:
            receipts.setdefault(voter, set()).add(answer.receipt.receipt_id + str(answer.receipt.version))

    async def stream(votes: list[tuple[str, str]]) -> int:
        responses = await cast(server, *(batch(poll_id, *votes[i : i + 7]) for i in range(0, len(votes), 7)))
        assert {r.reason for response in responses for r in response.rejections} <= {8}, "only ALREADY_VOTED"
        return sum(response.accepted for response in responses)

    attempts = [(f"voter-{n}", choices.choice(["mon", "tue"])) for n in range(200) for _ in range(5)]
    choices.shuffle(attempts)
    await asyncio.gather(*(unary(*attempt) for attempt in attempts[:500]), stream(attempts[500:]), stream(attempts))
    assert set(refusals) <= {"ALREADY_EXISTS"}
    assert all(len(receipt) == 1 for receipt in receipts.values())
    assert (await read_log(write_dsn, poll_id)).rows == 200


async def test_overlapping_batches_of_several_servers_never_deadlock_or_double(write_dsn: str) -> None:
    async with command_server(write_dsn) as one, command_server(write_dsn) as two:
        poll_id = await open_poll(one)
        voters = [f"voter-{n}" for n in range(3000)]
        shuffled = [random.Random(seed).sample(voters, len(voters)) for seed in range(8)]
        calls = [
            cast(
                server,
                *(batch(poll_id, *((v, "mon") for v in order[i : i + 500]), key=KEY) for i in range(0, 3000, 500)),
            )
            for server, order in zip([one, two] * 4, shuffled, strict=True)
        ]
        responses = [response for answered in await asyncio.gather(*calls) for response in answered]
        assert sum(response.accepted for response in responses) == 3000
        assert sum(response.already_recorded for response in responses) == 7 * 3000
        assert (await read_log(write_dsn, poll_id)).rows == 3000


async def test_nothing_is_accepted_after_the_close(server: CommandServiceAsyncStub, write_dsn: str) -> None:
    poll_id = await open_poll(server)
    accepted = 0
    refusals = set[str]()
    closing = asyncio.Event()

    async def keep_casting(name: str) -> None:
        nonlocal accepted
        for n in range(10_000):
            try:
                await server.CastVote(vote(poll_id, f"{name}-{n}", "mon"))
            except grpc.aio.AioRpcError as error:
                refusals.add(error.details() or "")
                return
            accepted += 1
            if n == 5:
                closing.set()

    async def close() -> str:
        await closing.wait()
        return (await server.ClosePoll(pb.ClosePollRequest(poll_id=poll_id))).consistency_token

    token, *_ = await asyncio.gather(close(), *(keep_casting(f"caster-{n}") for n in range(20)))
    assert refusals == {"the poll is CLOSED; it takes no votes"}
    log = await read_log(write_dsn, poll_id)
    assert log.changes[-1] == "poll_closed"
    assert log.versions[-1] == freshness.parse(str(token)).version
    assert log.rows == accepted > 0


async def test_a_terminated_connection_loses_and_doubles_nothing(
    server: CommandServiceAsyncStub, write_dsn: str
) -> None:
    poll_id = await open_poll(server)
    streaming = asyncio.create_task(
        cast(server, *(batch(poll_id, *((f"{b}-{v}", "tue") for v in range(200)), sequence=b) for b in range(100)))
    )
    terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'command_server'"
    killed = 0
    while killed < 10 and not streaming.done():
        killed += len(await sql(write_dsn, terminate))
        await asyncio.sleep(0.02)
    responses = await streaming
    assert killed > 0
    assert [response.batch_sequence for response in responses] == list(range(100))
    # A batch whose first attempt had committed unseen is found by the second, and counts as accepted all the same.
    assert sum(response.accepted for response in responses) == 20_000
    assert (await read_log(write_dsn, poll_id)).rows == 20_000


async def test_a_vote_for_a_draft_does_not_hold_up_those_after_its_opening(
    server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = asyncio.Event()
    judge = vote_log.VoteLog._record_none

    async def judge_late(*arguments: Any) -> Any:
        await released.wait()
        return await judge(*arguments)

    monkeypatch.setattr(vote_log.VoteLog, "_record_none", judge_late)
    poll_id = await draft_poll(server)
    early = asyncio.create_task(refused(server.CastVote(vote(poll_id, "ada", "mon"))))
    while not ballot_box._waiting._value.get():
        await asyncio.sleep(0.005)
    await server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id))
    await server.CastVote(vote(poll_id, "bob", "mon"), timeout=5)
    released.set()
    assert (await early).reason == "POLL_NOT_OPEN"
    assert (await read_log(write_dsn, poll_id)).rows == 1


async def test_a_full_queue_refuses_a_vote_and_holds_a_stream(
    server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ballot_box, "CAPACITY_BYTES", 1_000)
    poll_id = await open_poll(server)
    connection = await asyncpg.connect(write_dsn)
    async with connection.transaction():
        # As long as the poll's row is locked, no batch can commit.
        await connection.execute("SELECT FROM polls FOR UPDATE")
        streaming = asyncio.create_task(
            cast(server, *(batch(poll_id, *((f"{b}-{v}", "mon") for v in range(5)), sequence=b) for b in range(20)))
        )
        refusal = None
        async with asyncio.timeout(10):
            while refusal is None:
                try:
                    await server.CastVote(vote(poll_id, "late", "tue"), timeout=0.2)
                except grpc.aio.AioRpcError as error:
                    if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                        refusal = error
        assert not streaming.done()
    await connection.close()
    assert (await refused(_raise(refusal))).reason == "OVERLOADED"
    assert (await refused(_raise(refusal))).retry_after
    assert [response.batch_sequence for response in await streaming] == list(range(20))
    assert (await read_log(write_dsn, poll_id)).rows >= 100


async def test_what_no_commit_takes_in_time_is_refused_while_all_committers_are_busy(
    write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = urlsplit(write_dsn).port
    assert port
    async with proxy(port) as network, command_server(through(write_dsn, network.port)) as server:
        polls = [await open_poll(server) for _ in range(ballot_box.COMMITTERS + 1)]
        for poll_id in polls:
            await server.CastVote(vote(poll_id, "first", "mon"))
        *busy, other = polls
        network.silence()
        # More than share a commit.
        voters = [f"voter-{n}" for n in range(ballot_queue.SMALL_BATCH + 1)]
        streams = [asyncio.create_task(cast(server, batch(p, *((v, "mon") for v in voters)))) for p in busy]
        while ballot_box._waiting._value.get() < len(busy) * len(voters):
            await asyncio.sleep(0.01)
        monkeypatch.setattr(ballot_box, "WAIT_SECONDS", 0.2)
        refusal = await refused(server.CastVote(vote(other, "ada", "mon"), timeout=5))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
        await network.restore()
        # A commit of theirs had begun: they are not given up.
        assert [answer[0].accepted for answer in await asyncio.gather(*streams)] == [len(voters)] * len(busy)
        assert (await read_log(write_dsn, other)).rows == 1


async def _raise(error: BaseException) -> None:
    raise error


async def test_an_unreachable_database_is_said_so_and_the_vote_can_be_repeated(
    stores: Stores, write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = write_dsn.partition("?")[0].rpartition("/")[2]
    async with command_server(write_dsn) as server:
        poll_id = await open_poll(server)
        monkeypatch.setattr(vote_log, "PATIENCE_SECONDS", 0.3)
        monkeypatch.setattr(polls, "PATIENCE_SECONDS", 0.3)
        await sql(stores.admin_dsn, f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
        await sql(
            stores.admin_dsn, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", database
        )
        for call in (
            server.CastVote(vote(poll_id, "ada", "mon")),
            server.ClosePoll(pb.ClosePollRequest(poll_id=poll_id)),
        ):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
            assert refusal.retry_after
            assert database not in refusal.message, "nothing of the driver's text"
        monkeypatch.undo()
        await sql(stores.admin_dsn, f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")
        assert not (await server.CastVote(vote(poll_id, "ada", "mon"))).already_recorded
    assert (await read_log(write_dsn, poll_id)).rows == 1


@pytest.mark.parametrize("place", ["command.before_commit", "command.after_commit"])
async def test_a_server_killed_while_it_commits_loses_and_doubles_nothing(write_dsn: str, place: str) -> None:
    async with command_server(write_dsn) as server:
        poll_id = await open_poll(server)
        votes = batch(poll_id, *((f"voter-{n}", "mon") for n in range(500)), key=KEY)
        await kill_while_casting(write_dsn, place, votes)
        committed = place == "command.after_commit"
        assert (await read_log(write_dsn, poll_id)).rows == (500 if committed else 0)
        [again] = await cast(server, votes)
        assert (again.accepted, again.already_recorded) == ((0, 500) if committed else (500, 0))
        assert (await read_log(write_dsn, poll_id)).rows == 500


async def kill_while_casting(write_dsn: str, place: str, votes: pb.CastVotesRequest) -> None:
    """Casts votes at a server process that dies at the failpoint, before it can answer."""
    environment = {
        **os.environ,
        "TALLY_COMMAND_LISTEN": "127.0.0.1:0",
        "TALLY_WRITE_DSN": write_dsn,
        "TALLY_VOTER_SECRET": VOTER_SECRET,
        "TALLY_FAILPOINT": place,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "command_server", env=environment, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    port = int((await process.stderr.readline()).split(b'"port": ')[1].split(b",")[0])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        refusal = await refused(anext(aiter(CommandServiceStub(channel).CastVotes(iter([votes])))))
    assert refusal.code == grpc.StatusCode.UNAVAILABLE
    await process.communicate()
    assert process.returncode == -signal.SIGKILL


async def test_workers_share_a_port_and_are_replaced(write_dsn: str, tmp_path: Path) -> None:
    settings = {"command_listen": f"127.0.0.1:{free_port()}", "write_dsn": write_dsn, "voter_secret": VOTER_SECRET}
    async with service(tmp_path, "command_server", workers="3", **settings) as parent:
        children = psutil.Process(parent.pid).children()
        assert len(children) == 3
        # A channel has one connection, so several are needed to reach several workers.
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(settings["command_listen"], options) for _ in range(12)]
        servers = [CommandServiceStub(channel) for channel in channels]
        poll_id = await open_poll(servers[0])
        votes = [(f"voter-{n}", "mon") for n in range(600)]
        await asyncio.gather(*(cast(server, batch(poll_id, *votes[n::4])) for n, server in enumerate(servers)))
        assert (await read_log(write_dsn, poll_id)).rows == 600
        used = [child.pid for child in children if sum(child.cpu_times()[:2]) > 0]
        assert len(used) == 3

        children[0].kill()
        async with asyncio.timeout(20):
            while len(alive := psutil.Process(parent.pid).children()) < 3 or children[0] in alive:
                await asyncio.sleep(0.05)
        for channel in channels:
            await channel.close()
    assert not [child for child in [*children, *alive] if child.is_running() and child.status() != "zombie"]


async def test_a_stream_that_is_not_read_holds_up_no_other(
    server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "BYTES_IN_FLIGHT", 1 << 20)
    poll_id = await open_poll(server)
    sent = [0]

    def counted(batch: pb.CastVotesRequest, times: int) -> Iterator[pb.CastVotesRequest]:
        for _ in range(times):
            sent[0] += 1
            yield batch

    unread = server.CastVotes(counted(batch(poll_id, *((f"{n}", "sun") for n in range(20_000))), 60))
    seen, looks = -1, 0
    async with asyncio.timeout(60):
        # Its share of bytes is under way, and no more comes.
        while (held := REGISTRY.get_sample_value("tally_stream_bytes_in_flight") or 0.0) < 1 << 20 or looks < 50:
            looks = looks + 1 if held >= 1 << 20 and sent[0] == seen else 0
            seen = sent[0]
            await asyncio.sleep(0.01)
        assert sent[0] < 60, "the stream is held back"
        responses = await cast(server, *(batch(poll_id, (f"voter-{n}", "mon"), sequence=n) for n in range(50)))
    assert [(r.batch_sequence, r.accepted) for r in responses] == [(n, 1) for n in range(50)]

    # Once it has gone, another may have several requests under way.
    unread.cancel()
    taken = 0
    cast_all = ballot_box.BallotBox.cast_all

    async def counting(*arguments: Any) -> Any:
        nonlocal taken
        taken += 1
        return await cast_all(*arguments)

    monkeypatch.setattr(ballot_box.BallotBox, "cast_all", counting)
    connection = await asyncpg.connect(write_dsn)
    async with connection.transaction(), asyncio.timeout(10):
        await connection.execute("SELECT FROM polls FOR UPDATE")
        streaming = asyncio.create_task(cast(server, *(batch(poll_id, (f"late-{n}", "mon")) for n in range(20))))
        while taken < 20:
            await asyncio.sleep(0.01)
    await connection.close()
    assert [response.accepted for response in await streaming] == [1] * 20


@pytest.mark.parametrize("invalid", [1, 5000])
async def test_a_producer_faster_than_the_database_fills_no_memory(
    write_dsn: str, tmp_path: Path, invalid: int
) -> None:
    """The poll's row is locked, so nothing can be recorded; several streams send all they can, and are not read. So
    many votes of each 5,000 are invalid."""
    settings = {"command_listen": f"127.0.0.1:{free_port()}", "write_dsn": write_dsn, "voter_secret": VOTER_SECRET}
    connection = await asyncpg.connect(write_dsn)
    async with (
        service(tmp_path, "command_server", **settings) as process,
        grpc.aio.insecure_channel(settings["command_listen"]) as channel,
    ):
        server = CommandServiceStub(channel)
        poll_id = await open_poll(server)
        sent = [0]

        def flood(name: str) -> Iterator[pb.CastVotesRequest]:
            for number in range(400):
                sent[0] += 1
                options = ["sun"] * invalid + ["mon"] * (5000 - invalid)
                yield batch(poll_id, *((f"{name}-{number}-{n}", option) for n, option in enumerate(options)))

        async with connection.transaction():
            await connection.execute("SELECT FROM polls FOR UPDATE")
            streams = [server.CastVotes(flood(f"stream-{n}")) for n in range(6)]
            memory: list[int] = []
            seen = -1
            async with asyncio.timeout(60):
                # Until nothing more is taken from the streams.
                while sent[0] > seen or len(memory) < 10:
                    seen = sent[0]
                    await asyncio.sleep(0.2)
                    memory.append(psutil.Process(process.pid).memory_info().rss >> 20)
            assert sent[0] < 6 * 400, "the streams are held back"
            assert max(memory) < 400, f"RSS in MiB: {memory}"
            for stream in streams:
                stream.cancel()
    await connection.close()


@pytest.mark.parametrize("exists", [True, False])
async def test_a_crowd_that_comes_too_early_is_one_read(
    server: CommandServiceAsyncStub, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    poll_id = await draft_poll(server) if exists else str(uuid4())
    read, reads = polls.Polls._read, 0

    async def counting(*arguments: Any) -> Any:
        nonlocal reads
        reads += 1
        return await read(*arguments)

    monkeypatch.setattr(polls, "NOT_OPEN_SECONDS", 60.0)
    monkeypatch.setattr(polls.Polls, "_read", counting)
    for _ in range(2):
        crowd = [refused(server.CastVote(vote(poll_id, f"voter-{n}", "mon"))) for n in range(200)]
        reason = "POLL_NOT_OPEN" if exists else "POLL_NOT_FOUND"
        assert {refusal.reason for refusal in await asyncio.gather(*crowd)} == {reason}
    assert reads == 1
    if exists:
        await server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id))
        await server.CastVote(vote(poll_id, "ada", "mon"))


async def test_calls_that_wait_are_bounded_and_one_poll_leaves_room_for_others(
    server: CommandServiceAsyncStub, write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ballot_box, "CALLS", 20)
    poll_id, other = await open_poll(server), await open_poll(server)
    await server.CastVote(vote(other, "first", "mon"))
    await server.CastVote(vote(poll_id, "first", "mon"))
    connection = await asyncpg.connect(write_dsn)
    async with connection.transaction():
        await connection.execute("SELECT FROM polls WHERE poll_id = $1::text::uuid FOR UPDATE", poll_id)
        crowd = [asyncio.ensure_future(server.CastVote(vote(poll_id, f"voter-{n}", "mon"))) for n in range(40)]
        for n in range(5):
            await server.CastVote(vote(other, f"voter-{n}", "mon"), timeout=5)
    await connection.close()
    outcomes = await asyncio.gather(*crowd, return_exceptions=True)
    refusals = [await refused(_raise(error)) for error in outcomes if isinstance(error, grpc.aio.AioRpcError)]
    assert len(refusals) == 30
    assert {refusal.reason for refusal in refusals} == {"OVERLOADED"}
    assert (await read_log(write_dsn, poll_id)).rows == 11
