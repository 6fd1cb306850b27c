"""Polls as documents: everything that GetPoll and GetResults say, in one JSON value."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any
from uuid import UUID, uuid4

import pytest
from google.protobuf.json_format import MessageToDict
from tally.command.v1.command_service_pb2 import (
    CancelPollRequest,
    CastVoteRequest,
    CertifyPollRequest,
    ClosePollRequest,
    CreatePollRequest,
    OpenPollRequest,
    RegisterVotersRequest,
    UpdatePollRequest,
    Voter,
)
from tally.poll.v1.poll_pb2 import (
    ELIGIBILITY_ROLL,
    POLL_STATE_CERTIFIED,
    RESULTS_VISIBILITY_AFTER_CLOSE,
    VOTING_METHOD_APPROVAL,
    VOTING_METHOD_SINGLE_CHOICE,
    PollOption,
    PollSpec,
)
from tally.query.v1.query_service_pb2 import GetPollDocumentRequest, GetPollRequest, GetResultsRequest

from contracts.freshness import token
from tests.processes import eventually
from tests.servers import refused, sql
from tests.system import System

OPTIONS = [PollOption(option_id="tea", label="Tea 🍵"), PollOption(option_id="milk", label='Milk \\ "cold"')]


async def document(system: System, poll_id: str, consistency_token: str = "") -> dict[str, Any]:
    request = GetPollDocumentRequest(poll_id=poll_id, at_least_as_fresh=consistency_token)
    answer = await system.query.GetPollDocument(request, timeout=10)
    found: dict[str, Any] = json.loads(answer.document)
    assert (answer.poll_id, answer.version) == (poll_id, found["version"])
    return found


async def agrees(system: System, poll_id: str, consistency_token: str) -> dict[str, Any]:
    """The document, which says what GetPoll and GetResults say at the same version."""
    found = await document(system, poll_id, consistency_token)
    fresh = {"poll_id": poll_id, "at_least_as_fresh": consistency_token}
    poll = (await system.query.GetPoll(GetPollRequest(**fresh), timeout=10)).poll
    results = (await system.query.GetResults(GetResultsRequest(**fresh), timeout=10)).results
    assert found["version"] == poll.version == results.version
    told = MessageToDict(poll, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    for name, value in told.items():
        if name not in ("version", "options"):
            assert found[name] == value, name
    assert {name for name, value in found.items() if value is not None} >= told.keys()
    assert [(option["option_id"], option["label"], option["count"]) for option in found["options"]] == [
        (count.option_id, count.label, count.count) for count in results.counts
    ]
    assert found["as_of"] == results.as_of.ToJsonString()
    turnout = {name: getattr(results, name) for name in ("total_votes", "total_weight", "eligible_voters")}
    assert found["turnout"] == turnout
    if results.HasField("certification"):
        certification = found["certification"]
        assert [row["count"] for row in certification["counts"]] == [row.count for row in results.certification.counts]
        assert certification["certified_at"] == results.certification.certified_at.ToJsonString()
        assert certification["agreed"] is results.certification.agreed
    else:
        assert found["certification"] is None
    return found


async def test_a_document_says_what_the_other_queries_say(system: System) -> None:
    commands = system.command
    spec = PollSpec(title="Tea?", options=OPTIONS, method=VOTING_METHOD_SINGLE_CHOICE)
    spec.closes_at.FromJsonString("2999-01-01T00:00:00Z")
    created = await commands.CreatePoll(CreatePollRequest(poll=spec))
    poll_id = created.poll_id
    found = await agrees(system, poll_id, created.consistency_token)
    assert found["closes_at"] == "2999-01-01T00:00:00Z"

    other = PollSpec(
        title="Tea or milk?",
        options=OPTIONS,
        method=VOTING_METHOD_APPROVAL,
        eligibility=ELIGIBILITY_ROLL,
        allow_vote_change=True,
    )
    request = UpdatePollRequest(poll_id=poll_id, poll=other)
    request.update_mask.paths[:] = ["title", "method", "eligibility", "closes_at", "allow_vote_change"]
    found = await agrees(system, poll_id, (await commands.UpdatePoll(request)).consistency_token)
    # What a later event takes away is no longer told.
    assert (found["title"], found["closes_at"]) == ("Tea or milk?", None)
    voters = [Voter(voter_id="ada", weight=3), Voter(voter_id="bob")]
    registered = await commands.RegisterVoters(iter([RegisterVotersRequest(poll_id=poll_id, voters=voters)]))
    await agrees(system, poll_id, registered.consistency_token)
    await agrees(system, poll_id, (await commands.OpenPoll(OpenPollRequest(poll_id=poll_id))).consistency_token)

    for voter, options in (("ada", ["milk"]), ("bob", ["tea", "milk"]), ("ada", ["tea"])):
        vote = CastVoteRequest(poll_id=poll_id, voter_id=voter, option_ids=options)
        found = await agrees(system, poll_id, (await commands.CastVote(vote)).consistency_token)
    assert [option["count"] for option in found["options"]] == [4, 1]
    # A changed vote has its weight once.
    assert found["turnout"] == {"total_votes": 2, "total_weight": 4, "eligible_voters": 2}
    [row] = await sql(system["read_dsn"], "SELECT total_weight FROM views.polls WHERE poll_id = $1", poll_id)
    assert row["total_weight"] == 4
    assert found["outcome"] is None

    found = await agrees(
        system, poll_id, (await commands.ClosePoll(ClosePollRequest(poll_id=poll_id))).consistency_token
    )
    assert found["outcome"] == {"leaders": ["tea"], "leader_count": 1, "certified": False}
    asked = await commands.CertifyPoll(CertifyPollRequest(poll_id=poll_id))

    async def is_certified() -> None:
        answer = await system.query.GetResults(GetResultsRequest(poll_id=poll_id), timeout=10)
        assert answer.results.state == POLL_STATE_CERTIFIED

    await eventually(is_certified)
    results = (await system.query.GetResults(GetResultsRequest(poll_id=poll_id), timeout=10)).results
    assert asked.consistency_token != results.consistency_token
    found = await agrees(system, poll_id, results.consistency_token)
    assert found["outcome"] == {"leaders": ["tea"], "leader_count": 1, "certified": True}

    # From nothing it is the same again.
    await sql(system["read_dsn"], "TRUNCATE documents.documents, documents.stream_position")

    async def is_there_again() -> None:
        rows = await sql(system["read_dsn"], "SELECT document FROM documents.documents WHERE poll_id = $1", poll_id)
        assert [json.loads(row["document"]) for row in rows] == [found]

    await eventually(is_there_again)


@pytest.mark.parametrize("ends_by", ["close", "cancel"])
async def test_a_document_does_not_tell_hidden_counts(system: System, ends_by: str) -> None:
    commands = system.command
    spec = PollSpec(
        title="Which?",
        options=OPTIONS,
        method=VOTING_METHOD_SINGLE_CHOICE,
        results_visibility=RESULTS_VISIBILITY_AFTER_CLOSE,
    )
    poll_id = (await commands.CreatePoll(CreatePollRequest(poll=spec))).poll_id
    await commands.OpenPoll(OpenPollRequest(poll_id=poll_id))
    for number in range(3):
        vote = CastVoteRequest(poll_id=poll_id, voter_id=f"voter {number}", option_ids=["tea"])
        cast = await commands.CastVote(vote)
    found = await document(system, poll_id, cast.consistency_token)
    plain = [{"option_id": option.option_id, "label": option.label} for option in OPTIONS]
    assert (found["results_hidden"], found["options"]) == (True, plain)
    assert found["turnout"]["total_votes"] == 3
    if ends_by == "close":
        closed = await commands.ClosePoll(ClosePollRequest(poll_id=poll_id))
        found = await agrees(system, poll_id, closed.consistency_token)
        assert (found["results_hidden"], found["options"][0]["count"]) == (False, 3)
    else:
        cancelled = await commands.CancelPoll(CancelPollRequest(poll_id=poll_id))
        found = await document(system, poll_id, cancelled.consistency_token)
        assert (found["results_hidden"], found["options"], found["outcome"]) == (True, plain, None)


async def test_a_document_that_is_not_there_is_refused(system: System) -> None:
    poll_id = uuid4()
    refusal = await refused(system.query.GetPollDocument(GetPollDocumentRequest(poll_id=str(poll_id)), timeout=10))
    assert refusal.reason == "POLL_NOT_FOUND"
    # Of a later history of the log than any: one of an earlier history is satisfied by what is there.
    later = token(poll_id, 1, UUID("ffffffff-ffff-7fff-bfff-ffffffffffff"))
    request = GetPollDocumentRequest(poll_id=str(poll_id), at_least_as_fresh=later)
    refusal = await refused(system.query.GetPollDocument(request, timeout=2))
    assert refusal.reason == "READ_MODEL_BEHIND"


async def test_the_command_line_prints_the_document(system: System) -> None:
    spec = PollSpec(title="Which?", options=OPTIONS, method=VOTING_METHOD_SINGLE_CHOICE)
    created = await system.command.CreatePoll(CreatePollRequest(poll=spec))
    found = await document(system, created.poll_id, created.consistency_token)
    command = [sys.executable, "-c", "from clients.cli import main; main()", "poll", "document", created.poll_id]
    for options in ((), ("--output", "json")):
        child = await asyncio.create_subprocess_exec(
            *command, "--query-address", system["query_address"], *options, stdout=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(30):
            out, _ = await child.communicate()
        assert child.returncode == 0
        if options:
            assert json.loads(out) == found
        else:
            assert "Tea 🍵" in out.decode()
