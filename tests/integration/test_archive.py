"""Archiving ended polls: what they came to stays readable, their votes and events are in a file, and nothing is lost on
the way, wherever it is interrupted."""

from __future__ import annotations

import json
import os
import sys
from asyncio.subprocess import PIPE, create_subprocess_exec
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from tally.command.v1.command_service_pb2 import (
    CancelPollRequest,
    CastVotesRequest,
    CertifyPollRequest,
    ClosePollRequest,
    CreatePollRequest,
    OpenPollRequest,
    RegisterVotersRequest,
    Vote,
    Voter,
)
from tally.poll.v1.poll_pb2 import (
    ELIGIBILITY_ROLL,
    POLL_STATE_CANCELLED,
    POLL_STATE_CERTIFIED,
    RESULTS_VISIBILITY_AFTER_CLOSE,
    VOTING_METHOD_APPROVAL,
    PollOption,
    PollSpec,
)
from tally.query.v1.query_service_pb2 import (
    GetPollDocumentRequest,
    GetPollRequest,
    GetResultsRequest,
    GetTurnoutRequest,
    GetVoteRequest,
    ListVoterVotesRequest,
    Poll,
    Results,
)

from tests.processes import eventually
from tests.servers import refused, sql
from tests.system import System

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("TALLY_")}
OPTIONS = [PollOption(option_id=name, label=name.title()) for name in ("tea", "coffee", "milk")]
LEFT = """SELECT
    (SELECT count(*) FROM events WHERE poll_no = polls.poll_no) AS events,
    (SELECT count(*) FROM votes WHERE substring(uuid_send(ballot_key) FOR 4) = int4send(polls.poll_no)) AS votes,
    (SELECT count(*) FROM roll WHERE substring(uuid_send(ballot_key) FOR 4) = int4send(polls.poll_no)) AS voters
FROM polls WHERE poll_id = $1"""


async def run(*arguments: str, failpoint: str = "") -> tuple[int, Any, str]:
    """A command of the command line: exit code, its JSON, and what it said."""
    process = await create_subprocess_exec(
        *(sys.executable, "-c", "from clients.cli import main; main()", *arguments, "--output", "json"),
        env={**ENVIRONMENT, "TALLY_FAILPOINT": failpoint},
        stdout=PIPE,
        stderr=PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, json.loads(out or b"null"), err.decode()


async def archive(system: System, folder: Path, *arguments: str, failpoint: str = "") -> tuple[int, Any, str]:
    return await run(
        *("poll", "archive", *arguments, "--to", str(folder), "--data-dir", str(system.directory)),
        failpoint=failpoint,
    )


async def ended_poll(system: System, *, cancelled: bool = False, **fields: Any) -> str:
    """A poll with weighted approvals of 30 voters on a roll of 40, certified or cancelled."""
    spec = PollSpec(
        title="Drinks 🍵", options=OPTIONS, method=VOTING_METHOD_APPROVAL, eligibility=ELIGIBILITY_ROLL, **fields
    )
    poll_id = (await system.command.CreatePoll(CreatePollRequest(poll=spec))).poll_id
    await system.command.OpenPoll(OpenPollRequest(poll_id=poll_id))
    voters = [Voter(voter_id=f"voter-{number}", weight=1 + number % 3) for number in range(40)]
    await system.command.RegisterVoters(iter([RegisterVotersRequest(poll_id=poll_id, voters=voters)]))
    for start in range(0, 30, 10):
        votes = [
            Vote(voter_id=f"voter-{number}", option_ids=["tea"] if number % 2 else ["coffee", "milk"])
            for number in range(start, start + 10)
        ]
        async for answer in system.command.CastVotes(iter([CastVotesRequest(poll_id=poll_id, votes=votes)])):
            assert answer.accepted == 10
    if cancelled:
        token = (await system.command.CancelPoll(CancelPollRequest(poll_id=poll_id))).consistency_token
    else:
        await system.command.ClosePoll(ClosePollRequest(poll_id=poll_id))
        token = (await system.command.CertifyPoll(CertifyPollRequest(poll_id=poll_id))).consistency_token
    state = POLL_STATE_CANCELLED if cancelled else POLL_STATE_CERTIFIED

    async def ended() -> None:
        assert (await shown(system, poll_id, token)).state == state

    await eventually(ended)
    return poll_id


async def shown(system: System, poll_id: str, token: str = "") -> Poll:
    request = GetPollRequest(poll_id=poll_id, at_least_as_fresh=token)
    return (await system.query.GetPoll(request, timeout=10)).poll


async def results(system: System, poll_id: str) -> Results:
    """Without what says where and when they were read."""
    found = (await system.query.GetResults(GetResultsRequest(poll_id=poll_id), timeout=10)).results
    for field in ("version", "as_of", "consistency_token", "source"):
        found.ClearField(field)
    return found


async def document(system: System, poll_id: str) -> dict[str, Any]:
    found = await system.query.GetPollDocument(GetPollDocumentRequest(poll_id=poll_id), timeout=10)
    told: dict[str, Any] = json.loads(found.document)
    return {name: value for name, value in told.items() if name not in ("version", "as_of", "archived_at")}


async def left(system: System, poll_id: str) -> dict[str, int]:
    [row] = await sql(system["write_dsn"], LEFT, UUID(poll_id))
    return dict(row)


async def archived_everywhere(system: System, poll_id: str, version: int) -> None:
    """Waits until every read model has the event that archives the poll."""

    async def applied() -> None:
        poll = await shown(system, poll_id)
        assert poll.HasField("archived_at")
        assert poll.version == version
        found = await system.query.GetPollDocument(GetPollDocumentRequest(poll_id=poll_id), timeout=10)
        assert json.loads(found.document)["archived_at"]
        live = (await system.query.GetResults(GetResultsRequest(poll_id=poll_id), timeout=10)).results
        assert live.version == version

    await eventually(applied)


async def test_what_a_poll_came_to_stays_and_its_votes_are_in_a_file(system: System, tmp_path: Path) -> None:
    poll_id = await ended_poll(system)
    before = await shown(system, poll_id), await results(system, poll_id), await document(system, poll_id)
    code, told, _ = await archive(system, tmp_path, poll_id[:13])
    assert code == 0
    [row] = told["polls"]
    assert (row["poll_id"], row["votes"], row["events"]) == (poll_id, 30, before[0].version)
    assert await left(system, poll_id) == {"events": 1, "votes": 0, "voters": 0}
    await archived_everywhere(system, poll_id, before[0].version + 1)

    after = await shown(system, poll_id)
    for field in ("version", "archived_at"):
        before[0].ClearField(field)
        after.ClearField(field)
    assert (after, await results(system, poll_id), await document(system, poll_id)) == before
    assert before[1].total_votes == 30
    assert before[1].certification.agreed

    for call in (
        system.query.GetVote(GetVoteRequest(poll_id=poll_id, voter_id="voter-1"), timeout=10),
        system.query.GetTurnout(GetTurnoutRequest(poll_id=poll_id), timeout=10),
    ):
        assert (await refused(call)).reason == "POLL_ARCHIVED"
    votes = await system.query.ListVoterVotes(ListVoterVotesRequest(voter_id="voter-1"), timeout=10)
    assert poll_id not in [vote.receipt.poll_id for vote in votes.votes]

    code, told, _ = await run("poll", "verify-archive", row["file"])
    assert code == 0
    [verified] = told["verified"]
    assert verified["counts"] == [count.count for count in before[1].counts]
    assert (verified["votes"], verified["voters"], verified["state"]) == (30, 40, "CERTIFIED")
    [(payload,)] = await sql(
        system["write_dsn"], "SELECT payload FROM events JOIN polls USING (poll_no) WHERE poll_id = $1", UUID(poll_id)
    )
    assert bytes.fromhex(verified["sha256"]) in payload, "the log says which file is the right one"
    # Once more: there is nothing left to do.
    assert (await archive(system, tmp_path, poll_id))[0] == 0


@pytest.mark.parametrize("failpoint", ["archive.written", "archive.appended", "archive.removing"])
async def test_killed_anywhere_it_goes_on_when_it_is_run_again(system: System, tmp_path: Path, failpoint: str) -> None:
    poll_id = await ended_poll(system)
    before = await results(system, poll_id)
    code, _, _ = await archive(system, tmp_path, poll_id, failpoint=failpoint)
    assert code == -9
    assert await results(system, poll_id) == before
    assert (await archive(system, tmp_path, "--ended-before", "0s"))[0] == 0
    assert await left(system, poll_id) == {"events": 1, "votes": 0, "voters": 0}
    assert await results(system, poll_id) == before
    [file] = [name for name in os.listdir(tmp_path) if name.startswith(poll_id)]
    assert (await run("poll", "verify-archive", str(tmp_path / file)))[0] == 0


async def test_a_read_model_is_rebuilt_from_what_is_left(system: System, tmp_path: Path) -> None:
    certified = await ended_poll(system)
    hidden = await ended_poll(system, cancelled=True, results_visibility=RESULTS_VISIBILITY_AFTER_CLOSE)
    version = (await shown(system, certified)).version
    before = await shown(system, certified), await results(system, certified), await document(system, certified)
    assert (await archive(system, tmp_path, certified, hidden))[0] == 0
    await archived_everywhere(system, certified, version + 1)
    for read_model in ("live", "views", "documents"):
        code, told, said = await run("rebuild", read_model, "--data-dir", str(system.directory))
        assert (code, told["parked_polls"]) == (0, 0), said

    async def same() -> None:
        assert await results(system, certified) == before[1]

    await eventually(same)
    assert await document(system, certified) == before[2]
    after = await shown(system, certified)
    assert (after.state, after.created_at, after.opened_at, after.closed_at) == (
        before[0].state,
        before[0].created_at,
        before[0].opened_at,
        before[0].closed_at,
    )
    assert after.HasField("archived_at")
    # A poll that was cancelled with hidden results keeps them hidden.
    assert (await refused(system.query.GetResults(GetResultsRequest(poll_id=hidden)))).reason == "RESULTS_HIDDEN"
    assert "count" not in (await document(system, hidden))["options"][0]
    found = await sql(
        system["read_dsn"],
        "SELECT count(*) FROM views.votes JOIN views.polls USING (poll_no) WHERE archived_at IS NOT NULL",
    )
    assert found[0][0] == 0


async def test_a_poll_that_has_not_ended_is_refused(system: System, tmp_path: Path) -> None:
    spec = PollSpec(title="Open", options=OPTIONS, method=VOTING_METHOD_APPROVAL)
    poll_id = (await system.command.CreatePoll(CreatePollRequest(poll=spec))).poll_id
    unknown = str(uuid4())
    await system.command.OpenPoll(OpenPollRequest(poll_id=poll_id))
    code, told, _ = await archive(system, tmp_path, poll_id, unknown)
    assert code == 3
    reasons = {failure["poll_id"]: failure["reason"] for failure in told["failed"]}
    assert "CERTIFIED or a CANCELLED" in reasons[poll_id]
    assert "no such poll" in reasons[unknown]
    await system.command.ClosePoll(ClosePollRequest(poll_id=poll_id))
    assert (await archive(system, tmp_path, poll_id))[0] == 3, "it is closed, but not certified"
    code, told, _ = await archive(system, tmp_path, "--ended-before", "0s", "--dry-run")
    assert code == 0
    assert poll_id not in [row["poll_id"] for row in told["polls"]]
    assert not os.listdir(tmp_path)


async def test_votes_that_do_not_agree_with_the_log_stay_where_they_are(system: System, tmp_path: Path) -> None:
    poll_id = await ended_poll(system)
    key = "(SELECT int4send(poll_no) FROM polls WHERE poll_id = $1)"
    await sql(
        system["write_dsn"],
        f"UPDATE votes SET choices = '\\x0002' WHERE substring(uuid_send(ballot_key) FOR 4) = {key}",
        UUID(poll_id),
    )
    before = await left(system, poll_id)
    code, told, _ = await archive(system, tmp_path, poll_id)
    assert code == 3
    assert "different counts" in told["failed"][0]["reason"]
    assert await left(system, poll_id) == before
    assert not os.listdir(tmp_path)
