"""The command line, run as people run it, against everything that `tally up` starts."""

import asyncio
import csv
import gzip
import io
import json
import lzma
import os
import pty
import re
import shlex
import signal
import socket
import sysconfig
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from copy import copy
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import asyncpg
import grpc
import pytest
import structlog
from rich.cells import cell_len
from tally.command.v1.command_service_pb2 import (
    CancelPollRequest,
    CastVoteRequest,
    ClosePollRequest,
    CreatePollRequest,
    OpenPollRequest,
)
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub
from tally.poll.v1.poll_pb2 import Eligibility, PollOption, PollSpec, ResultsVisibility, VotingMethod
from tally.query.v1.query_service_pb2 import GetPollRequest, GetResultsRequest, ListPollsRequest
from tally.query.v1.query_service_pb2_grpc import QueryServiceStub
from typer.testing import CliRunner

from clients.cli import app
from clients.failures import Failure
from command_server.ballots import key_range
from tests.proxy import proxy as network

TALLY = str(Path(sysconfig.get_path("scripts")) / "tally")
ELECTION = Path(__file__).parents[2] / "examples" / "minneapolis-2013-mayor.csv.gz"
FIRST_CHOICES = ("--choice-column", "choice_1", "--ignore-choice", "overvote")
NOBODY = "127.0.0.1:9"
WITHOUT_TALLY = {name: None for name in os.environ if name.startswith("TALLY_")}
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("TALLY_")}


class Ended(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


class Cli:
    """Runs `tally` commands against one stack."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run_record = json.loads((directory / ".tally" / "run.json").read_text())
        # What a test needs, but is not about, is done without the command line: each start of it costs 0.4 s.
        addresses = self.run_record["command_address"], self.run_record["query_address"]
        self._channels = [grpc.aio.insecure_channel(address) for address in addresses]
        self.commands = CommandServiceStub(self._channels[0])
        self.queries = QueryServiceStub(self._channels[1])

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def start(self, *arguments: str, stderr: int = PIPE, variables: Mapping[str, str] = ENVIRONMENT) -> Process:
        return await asyncio.create_subprocess_exec(
            TALLY, *arguments, cwd=self.directory, env=variables, stdout=PIPE, stderr=stderr
        )

    async def run(self, *arguments: str, **variables: str) -> Ended:
        """The outcome, whatever it is; a traceback is never one."""
        async with asyncio.timeout(60):
            return await ended(await self.start(*arguments, variables=ENVIRONMENT | variables))

    async def data(self, *arguments: str) -> Any:
        """What the command prints as JSON; it must succeed."""
        outcome = await self.run(*arguments, "--output", "json")
        assert outcome.code == 0, outcome
        return outcome.data

    async def refused(self, *arguments: str, **variables: str) -> str:
        """The one line with which the command must fail."""
        outcome = await self.run(*arguments, **variables)
        assert outcome.code == 1, outcome
        assert outcome.out == ""
        assert outcome.err.endswith("\n")
        assert outcome.err.count("\n") == 1, outcome.err
        return outcome.err.strip()

    async def open_poll(self, *options: str, **fields: Any) -> str:
        fields = {"method": VotingMethod.VOTING_METHOD_SINGLE_CHOICE, **fields}
        choices = [PollOption(option_id=option, label=option) for option in options]
        spec = PollSpec(options=choices, **{"title": f"Which? {uuid4()}", **fields})
        poll_id = (await self.commands.CreatePoll(CreatePollRequest(poll=spec))).poll_id
        token = (await self.commands.OpenPoll(OpenPollRequest(poll_id=poll_id))).consistency_token
        await self.queries.GetPoll(GetPollRequest(poll_id=poll_id, at_least_as_fresh=token), timeout=10)
        return poll_id

    async def polls(self) -> list[str]:
        listed = await self.queries.ListPolls(ListPollsRequest(page_size=1000))
        return [poll.poll_id for poll in listed.polls]

    async def vote(self, poll_id: str, voter_id: str, *option_ids: str) -> str:
        request = CastVoteRequest(poll_id=poll_id, voter_id=voter_id, option_ids=option_ids)
        return (await self.commands.CastVote(request)).consistency_token


async def ended(process: Process) -> Ended:
    out, err = await process.communicate()
    assert process.returncode is not None
    outcome = Ended(process.returncode, out.decode(), (err or b"").decode())
    assert "Traceback" not in outcome.err, outcome.err
    return outcome


@pytest.fixture(scope="module")
async def cli(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cli]:
    directory = tmp_path_factory.mktemp("cli")
    log = directory / "up.log"
    with log.open("wb") as output:
        up = await asyncio.create_subprocess_exec(
            *(TALLY, "up", "--command-port", "0", "--query-port", "0"),
            cwd=directory,
            env=ENVIRONMENT,
            stdout=output,
            stderr=output,
        )
    try:
        async with asyncio.timeout(60):
            while not (directory / ".tally" / "run.json").exists():
                assert up.returncode is None, log.read_text()
                await asyncio.sleep(0.05)
        running = Cli(directory)
        yield running
        await running.close()
    finally:
        if up.returncode is None:
            up.terminate()
        async with asyncio.timeout(20):
            await up.wait()


def election() -> Counter[str]:
    """The first choices of the shipped election, counted without Tally."""
    with gzip.open(ELECTION, "rt", newline="") as file:
        counted = Counter(row["choice_1"] for row in csv.DictReader(file))
    return Counter({choice: count for choice, count in counted.items() if choice not in ("", "overvote")})


def counts(results: Any) -> Counter[str]:
    return Counter({option["option_id"]: option["count"] for option in results["counts"]})


def continuation(outcome: Ended) -> list[str]:
    """The arguments of the command with which an import says it can go on."""
    found = re.search(r"^to go on: tally (.+)$", outcome.err, re.MULTILINE)
    assert found, outcome.err
    return shlex.split(found[1])


async def told_poll(process: Process) -> str:
    """The poll that an import creates, as soon as it says so."""
    assert process.stderr
    while not (line := (await next_line(process.stderr)).decode()).startswith("poll "):
        pass
    return line.split()[-1]


async def test_a_poll_lives_from_draft_to_certified(cli: Cli) -> None:
    title = f"Tea or coffee? {uuid4()}"
    created = await cli.data("poll", "create", "--title", title, "--option", "Tea", "--option", "c=Coffee = black")
    poll_id = created["poll_id"]

    shown, listed, complaint = await asyncio.gather(
        cli.data("poll", "show", poll_id, "--at-least-as-fresh", created["consistency_token"]),
        cli.data("poll", "list", "--state", "draft"),
        cli.refused("vote", poll_id, "anna", "c"),
    )
    assert (shown["poll"]["title"], shown["poll"]["state"], shown["poll"]["version"]) == (title, "POLL_STATE_DRAFT", 1)
    assert shown["poll"]["options"] == [
        {"option_id": "Tea", "label": "Tea"},
        {"option_id": "c", "label": "Coffee = black"},
    ]
    assert poll_id in [poll["poll_id"] for poll in listed["polls"]]
    assert complaint.startswith("POLL_NOT_OPEN: ")

    await cli.data("poll", "open", poll_id)
    vote, complaint = await asyncio.gather(
        cli.data("vote", poll_id, "anna", "c"), cli.refused("poll", "update", poll_id, "--title", "Late?")
    )
    assert complaint.startswith("POLL_NOT_DRAFT: ")
    results = (await cli.data("results", poll_id, "--at-least-as-fresh", vote["consistency_token"]))["results"]
    assert (results["version"], results["total_votes"], counts(results)) == (3, 1, {"Tea": 0, "c": 1})

    assert (await cli.refused("poll", "certify", poll_id)).startswith("POLL_NOT_CLOSED: ")
    closed = await cli.data("poll", "close", poll_id)
    results, complaint, other = await asyncio.gather(
        cli.data("results", poll_id, "--at-least-as-fresh", closed["consistency_token"]),
        cli.refused("vote", poll_id, "bert", "Tea"),
        cli.refused("poll", "cancel", poll_id),
    )
    assert results["results"]["state"] == "POLL_STATE_CLOSED"
    assert complaint.startswith("POLL_NOT_OPEN: ")
    assert other.startswith("POLL_NOT_OPEN: ")

    certified = (await cli.data("poll", "certify", poll_id))["results"]
    assert (certified["state"], certified["certification"]["agreed"]) == ("POLL_STATE_CERTIFIED", True)
    assert counts(certified["certification"]) == counts(certified) == {"Tea": 0, "c": 1}
    listed, watched = await asyncio.gather(cli.data("poll", "list", "--state", "certified"), cli.run("watch", poll_id))
    assert poll_id in [poll["poll_id"] for poll in listed["polls"]]
    assert watched.out == f"{title} ({poll_id})\nversion 6 CERTIFIED: 1 votes · Coffee = black 1 · Tea 0\n"


async def test_every_property_of_a_poll_is_set_shown_and_changed(cli: Cli) -> None:
    created = await cli.data(
        *("poll", "create", "--title", "Old", "--description", "Why", "--option=a", "--option=b", "--option=c"),
        *("--approval", "--max-choices", "2", "--allow-vote-change", "--roll"),
        *("--opens-at", "2100-01-01T12:00+01:00", "--closes-at", "+40000d"),
    )
    poll_id, token = created["poll_id"], created["consistency_token"]
    as_data, as_text, listed = await asyncio.gather(
        cli.data("poll", "show", poll_id, "--at-least-as-fresh", token),
        cli.run("poll", "show", poll_id, "--at-least-as-fresh", token),
        cli.run("poll", "list", "--limit", "1000"),
    )
    poll = as_data["poll"]
    expected = {
        "title": "Old",
        "description": "Why",
        "method": "VOTING_METHOD_APPROVAL",
        "max_choices": 2,
        "allow_vote_change": True,
        "eligibility": "ELIGIBILITY_ROLL",
        "opens_at": "2100-01-01T11:00:00Z",
    }
    assert {name: poll[name] for name in expected} == expected
    closes_at = datetime.fromisoformat(poll["closes_at"])
    assert timedelta(days=39_999) < closes_at - datetime.now(UTC) < timedelta(days=40_000)
    for field in ("method +APPROVAL, up to 2 options", "vote changes +allowed", "eligibility +ROLL", "closes_at +21"):
        assert re.search(field, as_text.out)
    assert re.search(rf"{poll_id}.*opens 2100-01-01 11:00:00Z.*Old", listed.out)

    arguments = ("poll", "update", poll_id, "--title", "New", "--single-choice", "--no-vote-change", "--no-roll")
    updated = await cli.data(*arguments, "--no-opens-at", "--closes-at", "2100-01-02T00:00Z")
    changed = (await cli.data("poll", "show", poll_id, "--at-least-as-fresh", updated["consistency_token"]))["poll"]
    expected = {
        "title": "New",
        "description": "Why",
        "method": "VOTING_METHOD_SINGLE_CHOICE",
        "max_choices": 0,
        "allow_vote_change": False,
        "eligibility": "ELIGIBILITY_OPEN",
        "closes_at": "2100-01-02T00:00:00Z",
        "options": poll["options"],
    }
    assert {name: changed[name] for name in expected} == expected
    assert changed["opens_at"] is None

    complaint = await cli.refused("poll", "update", poll_id, "--max-choices", "2")
    assert complaint.startswith("INVALID_REQUEST: poll: max_choices is for APPROVAL polls"), complaint
    cancelled = await cli.run("poll", "cancel", poll_id)
    assert re.search(r"state +CANCELLED", cancelled.out)


async def test_a_poll_opens_and_closes_by_itself(cli: Cli) -> None:
    arguments = ("--title", "Quick", "--option", "a", "--option", "b", "--opens-at", "+0s", "--closes-at", "+2s")
    created = await cli.data("poll", "create", *arguments)
    watched = await cli.run("watch", created["poll_id"], "--at-least-as-fresh", created["consistency_token"])
    assert watched.code == 0, watched
    assert watched.out.splitlines()[-1].startswith("version 3 CLOSED: 0 votes")
    poll = (await cli.queries.GetPoll(GetPollRequest(poll_id=created["poll_id"]), timeout=10)).poll
    assert poll.opens_at.ToDatetime() <= poll.opened_at.ToDatetime() <= poll.closed_at.ToDatetime()
    assert poll.closes_at.ToDatetime() <= poll.closed_at.ToDatetime()
    asked = await cli.data("poll", "certify", created["poll_id"], "--no-wait")
    request = GetResultsRequest(poll_id=created["poll_id"], at_least_as_fresh=asked["consistency_token"])
    assert (await cli.queries.GetResults(request, timeout=10)).results.version >= 4


async def test_an_approval_poll_with_a_roll_counts_every_choice_and_the_turnout(cli: Cli, tmp_path: Path) -> None:
    roll = tmp_path / "roll.csv"
    roll.write_text("anna\nbert\ncarl\ndora\n")
    fields = ("--approval", "--max-choices", "2", "--roll", "--allow-vote-change", "--open")
    created = await cli.data("poll", "create", "--title", "?", *("--option=a", "--option=b", "--option=c"), *fields)
    poll_id = created["poll_id"]
    registered = await cli.run("register", poll_id, str(roll))
    assert re.search(r"^registered +4\b", registered.out, re.MULTILINE), registered
    votes = {
        ("anna", "a", "b"): "",
        ("bert", "a"): "",
        ("carl", "a", "b", "c"): "TOO_MANY_CHOICES: ",
        ("eve", "a"): "VOTER_NOT_ELIGIBLE: ",
    }
    outcomes = await asyncio.gather(*(cli.run("vote", poll_id, *vote, "-o", "json") for vote in votes))
    for outcome, refusal in zip(outcomes, votes.values(), strict=True):
        assert outcome.err.startswith(refusal)
        assert outcome.code == bool(refusal)
    changed = await cli.data("vote", poll_id, "bert", "c", "b")

    # An import of such votes: eve is not on the roll, dora marks one choice twice, and carl none.
    path = tmp_path / "votes.csv"
    path.write_text("who,1st,2nd,3rd\neve,a,,\ndora,b,,b\ncarl,,,none\n")
    columns = [word for column in ("1st", "2nd", "3rd") for word in ("--choice-column", column)]
    outcome = await cli.run(
        *("import", str(path), "--poll", poll_id, *columns, "--voter-column", "who", "--ignore-choice", "none"),
        *("--output", "json"),
    )
    assert outcome.code == 3, outcome
    assert [(r["line"], r["reason"]) for r in outcome.data["rejections"]] == [(2, "VOTER_NOT_ELIGIBLE")]
    assert (outcome.data["accepted"], outcome.data["blank"], outcome.data["ignored"]) == (1, 0, 1)
    assert counts(outcome.data["results"]) == {"a": 1, "b": 3, "c": 1}

    printed = await cli.run("results", poll_id, "--at-least-as-fresh", changed["consistency_token"])
    assert [re.search(rf" {option}\W+\d\W+([\d.]+)%", printed.out)[1] for option in "abc"] == ["33.3", "100.0", "33.3"]  # type: ignore[index]
    assert "turnout 75.0% of 4 eligible voters" in printed.out
    watcher = await cli.start("watch", poll_id)
    assert watcher.stdout
    assert (await next_line(watcher.stdout)).decode() == f"? ({poll_id})\n"
    line = (await next_line(watcher.stdout)).decode()
    assert re.fullmatch(r"version \d OPEN: 3 votes of 4 voters \(75\.0%\) · b 3 · a 1 · c 1\n", line)
    await cli.commands.CancelPoll(CancelPollRequest(poll_id=poll_id))
    async with asyncio.timeout(30):
        outcome = await ended(watcher)
    assert (outcome.code, outcome.out.count("\n"), " CANCELLED: " in outcome.out) == (0, 1, True)


async def test_ballots_with_several_choices_make_an_approval_poll(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "votes.csv"
    path.write_text("1st,2nd\nred,blue\nblue,\n,green\ngreen,green\n,\n")
    arguments = ("import", str(path), "--title", f"Colours {uuid4()}", "--choice-column", "1st")
    several, one = await asyncio.gather(
        cli.data(*arguments, "--choice-column", "2nd"), cli.data(*arguments, "--approval")
    )
    assert (several["accepted"], several["blank"], counts(several["results"])) == (
        4,
        1,
        {"blue": 2, "green": 2, "red": 1},
    )
    assert counts(one["results"]) == {"red": 1, "blue": 1, "green": 1}
    polls = [await cli.queries.GetPoll(GetPollRequest(poll_id=made["poll_id"])) for made in (several, one)]
    assert {answer.poll.method for answer in polls} == {VotingMethod.VOTING_METHOD_APPROVAL}


async def test_a_roll_is_registered_whole_or_its_faults_are_told(cli: Cli, tmp_path: Path) -> None:
    poll_id = await cli.open_poll("yes", "no", eligibility=Eligibility.ELIGIBILITY_ROLL)
    faulty, good = tmp_path / "faulty.csv", tmp_path / "good.csv.xz"
    faulty.write_text("id,shares\nanna,5\nbert,0\n,1\n")
    good.write_bytes(lzma.compress(b"id,shares\nanna,5\nbert,1\nanna,5\n"))
    arguments = ("register", poll_id, "--voter-column", "id", "--weight-column", "shares")
    outcome = await cli.run(*arguments, str(faulty))
    assert outcome.code == 1
    assert [line.partition(": ")[0] for line in outcome.err.splitlines()][-3:] == ["line 3", "line 4", str(faulty)]

    first = await cli.data(*arguments, str(good))
    assert (first["rows"], first["people"], first["registered"], first["already_registered"]) == (3, 2, 2, 0)
    again, no_roll = await asyncio.gather(
        cli.data(*arguments, str(good)),
        cli.run("register", await cli.open_poll("yes", "no"), str(good), "--voter-column", "id"),
    )
    assert (again["registered"], again["already_registered"]) == (0, 2)
    assert no_roll.code == 1
    assert no_roll.err.splitlines()[-1].startswith("INVALID_REQUEST: ")
    await cli.vote(poll_id, "bert", "no")
    token = await cli.vote(poll_id, "anna", "yes")
    printed = await cli.run("results", poll_id, "--at-least-as-fresh", token)
    # Weights count; of the votes in a single choice poll there is never more than all.
    assert re.search(r"yes\W+5\W+83\.3%", printed.out), printed.out
    assert "share of votes' weight" in printed.out
    assert "turnout 100.0% of 2 eligible voters; counted votes 2, weight 6" in printed.out


async def test_a_lost_connection_registers_everybody_all_the_same(cli: Cli, tmp_path: Path) -> None:
    poll_id = await cli.open_poll("yes", "no", eligibility=Eligibility.ELIGIBILITY_ROLL)
    path = tmp_path / "roll.csv"
    path.write_text("".join(f"a voter whose name is rather long {number}\n" for number in range(60_000)))
    async with Proxy(cli.run_record["command_address"], [1_000_000, 1, 2_000_000]).running() as proxy:
        outcome = await cli.run("register", poll_id, str(path), "--command-address", proxy.address, "-o", "json")
    assert outcome.code == 0, outcome
    assert "trying again" in outcome.err
    assert "those registered before that count as already registered" in outcome.err
    assert outcome.data["rows"] == 60_000
    assert outcome.data["attempts"] >= 3
    assert outcome.data["registered"] + outcome.data["already_registered"] == 60_000
    request = GetResultsRequest(poll_id=poll_id, at_least_as_fresh=outcome.data["consistency_token"])
    assert (await cli.queries.GetResults(request, timeout=10)).results.eligible_voters == 60_000

    async with Proxy(cli.run_record["command_address"], [1_000_000, 0]).running() as proxy:
        arguments = ("register", poll_id, str(path), "--command-address", proxy.address, "--retry-for", "0.3")
        given_up = await cli.run(*arguments)
    assert given_up.code == 1
    assert given_up.err.splitlines()[-1].startswith("UNAVAILABLE: the command server at")


async def test_a_recount_that_does_not_agree_is_told_everywhere(cli: Cli) -> None:
    poll_id = await cli.open_poll("yes", "no")
    for voter, option in (("anna", "yes"), ("bert", "yes"), ("carl", "no")):
        await cli.vote(poll_id, voter, option)
    await cli.commands.ClosePoll(ClosePollRequest(poll_id=poll_id))
    connection = await asyncpg.connect(cli.run_record["write_dsn"])
    try:
        poll_no = await connection.fetchval("SELECT poll_no FROM polls WHERE poll_id = $1::text::uuid", poll_id)
        poll = "ballot_key > $1 AND ballot_key <= $2"
        lost = await connection.fetch(
            f"DELETE FROM votes WHERE {poll} AND choices = '\\x0001' RETURNING *", *key_range(poll_no)
        )
        assert len(lost) == 1
        outcome = await cli.run("poll", "certify", poll_id)
        assert outcome.code == 4, outcome
        warning = "WARNING: the recount does not agree: it found 2 votes, the count is of 3"
        assert warning in outcome.out
        assert re.search(r"yes\W+2\W+2\W+66\.7%", outcome.out)
        assert re.search(r"no\W+1\W+≠ 0\W+33\.3%", outcome.out)
        printed, watched = await asyncio.gather(cli.run("results", poll_id), cli.run("watch", poll_id))
        assert warning in printed.out
        assert "CLOSED, version 8" in printed.out
        assert re.fullmatch(rf"Which\? .*\nversion 8 CLOSED: 3 votes .*{warning}.*\n", watched.out)
        assert (printed.code, watched.code) == (0, 0)

        # The next recount is not taken for the one before it.
        columns, places = ", ".join(lost[0].keys()), ", ".join(f"${number + 1}" for number in range(len(lost[0])))
        await connection.execute(f"INSERT INTO votes ({columns}) VALUES ({places})", *lost[0].values())
    finally:
        await connection.close()
    recounted = await cli.run("poll", "certify", poll_id)
    assert recounted.code == 0, recounted
    assert "WARNING" not in recounted.out
    assert "CERTIFIED, version 10" in recounted.out
    assert re.search(r"no\W+1\W+1\W+33\.3%", recounted.out)


async def test_a_vote_counts_once_and_a_refused_one_changes_nothing(cli: Cli) -> None:
    poll_id = await cli.open_poll("yes", "no")
    first = await cli.data("vote", poll_id, "anna", "yes")
    refused = {
        ("vote", poll_id, "anna", "no"): "ALREADY_VOTED: ",
        ("vote", poll_id, "bert", "maybe"): "UNKNOWN_OPTION: ",
        ("vote", poll_id, "", "yes"): "INVALID_REQUEST: voter_id: ",
        ("vote", str(uuid4()), "anna", "yes"): "POLL_NOT_FOUND: ",
        ("results", str(uuid4())): "POLL_NOT_FOUND: ",
    }
    again, *complaints = await asyncio.gather(
        cli.data("vote", poll_id, "anna", "yes"), *(cli.refused(*arguments) for arguments in refused)
    )
    assert again["receipt"] == first["receipt"]
    assert (first["already_recorded"], again["already_recorded"]) == (False, True)
    assert isinstance(first["receipt"]["version"], int)
    for complaint, beginning in zip(complaints, refused.values(), strict=True):
        assert complaint.startswith(beginning)
    results = (await cli.data("results", poll_id, "--at-least-as-fresh", first["consistency_token"]))["results"]
    assert counts(results) == {"yes": 1, "no": 0}


async def test_text_for_people_names_what_was_asked_for(cli: Cli) -> None:
    created = await cli.run("poll", "create", "--title", "Colour?", "--option", "r=Red", "--option", "b=Blue", "--open")
    poll_id = re.search(r"[0-9a-f-]{36}", created.out)
    assert poll_id
    voted = await cli.run("vote", poll_id[0], "anna", "r")
    assert "receipt_id" in voted.out
    token = (await cli.data("vote", poll_id[0], "anna", "r"))["consistency_token"]
    printed, shown, listed = await asyncio.gather(
        cli.run("results", poll_id[0], "--at-least-as-fresh", token),
        cli.run("poll", "show", poll_id[0]),
        cli.run("poll", "list", "--limit", "1000"),
    )
    assert re.search(r"Red\W+1\W+100\.0%", printed.out)
    assert "OPEN, version 3" in printed.out
    assert "Colour?" in shown.out
    assert poll_id[0] in listed.out


async def test_hidden_results_are_told_when_the_poll_is_closed(cli: Cli, tmp_path: Path) -> None:
    title = f"Secret? {uuid4()}"
    created = await cli.data(
        *("poll", "create", "--title", title, "--option", "tea", "--option", "milk", "--results-after-close", "--open")
    )
    hidden, shown, missing = created["poll_id"], await cli.open_poll("a", "b"), str(uuid4())
    voter = f"voter-{uuid4()}"
    await cli.vote(shown, voter, "b")
    token = await cli.vote(hidden, voter, "tea")
    fresh = ("--at-least-as-fresh", token)
    refused, several, chart, turnout, listed, votes, poll = await asyncio.gather(
        cli.refused("results", hidden, *fresh),
        cli.run("results", hidden, shown, missing, "--output", "json"),
        cli.run("turnout", hidden, *fresh),
        cli.data(
            "turnout", hidden, *fresh, "--bucket", "1h", "--from", "2026-01-01T12:00Z", "--to", "2026-01-01T15:00Z"
        ),
        cli.run("votes", voter, *fresh),
        cli.data("votes", voter, *fresh, "--limit", "1"),
        cli.run("poll", "show", hidden, *fresh),
    )
    assert refused.startswith("RESULTS_HIDDEN: ")
    assert "; tally turnout tells how many have voted" in refused
    assert (several.code, several.data["hidden_poll_ids"], several.data["missing_poll_ids"]) == (3, [hidden], [missing])
    assert [counts(results) for results in several.data["results"]] == [{"a": 0, "b": 1}]
    assert re.search(r":\d0 +1 +█{40} +1\n", chart.out), chart.out
    assert "1 votes, each line 0:00:10, times in UTC; version 3" in chart.out
    # What came after is not before, and an hour without a vote is there too.
    assert [bucket["cumulative_votes"] for bucket in turnout["buckets"]] == [0, 0, 0]
    assert (turnout["bucket"], turnout["total_votes"]) == ("3600s", 1)
    assert re.search(rf"{hidden} .*OPEN .* {re.escape(title)}", listed.out)
    assert [vote["receipt"]["poll_id"] for vote in votes["votes"]] == [shown]
    assert "there are more" not in listed.err
    assert votes["next_page_token"]
    assert re.search(r"results +AFTER_CLOSE", poll.out)

    closed = await cli.data("poll", "close", hidden)
    fresh = ("--at-least-as-fresh", closed["consistency_token"])
    results, listed = await asyncio.gather(cli.data("results", hidden, *fresh), cli.run("votes", voter, *fresh))
    assert counts(results["results"]) == {"tea": 1, "milk": 0}
    assert "tea 1; 1 votes" in listed.out

    file = tmp_path / "secret.csv"
    file.write_text("choice\nred\nblue\nred\n")
    arguments = ("import", str(file), "--choice-column", "choice", "--title", title, "--results-after-close")
    first = await cli.data(*arguments)
    assert (first["accepted"], first["results"], first["results_hidden"]) == (3, None, True)
    second = await cli.data(*arguments, "--close")
    assert (second["poll_id"], second["already_recorded"]) == (first["poll_id"], 3)
    assert (counts(second["results"]), second["results_hidden"]) == ({"red": 2, "blue": 1}, False)


async def test_a_hidden_poll_is_watched_as_turnout(cli: Cli) -> None:
    hidden = ResultsVisibility.RESULTS_VISIBILITY_AFTER_CLOSE
    closed, cancelled = [
        await cli.open_poll("tea", "milk", results_visibility=hidden, eligibility=Eligibility.ELIGIBILITY_OPEN)
        for _ in range(2)
    ]
    token = await cli.vote(closed, "anna", "tea")
    as_text = await cli.start("watch", closed, "--at-least-as-fresh", token)
    as_data = await cli.start("watch", closed, "-o", "json")
    given_up = await cli.start("watch", cancelled)
    assert as_text.stdout
    assert as_data.stdout
    assert given_up.stdout
    title = (await next_line(as_text.stdout)).decode()
    assert re.fullmatch(rf"Which\? .* \({closed}\)\n", title)
    assert (
        await next_line(as_text.stdout)
        == "version 3: 1 votes · the counts are hidden until the poll is closed\n".encode()
    )
    seen = json.loads(await next_line(as_data.stdout))
    assert (seen["total_votes"], seen["results_hidden"], "counts" in seen) == (1, True, False)
    assert seen["title"] in title
    await cli.vote(closed, "bert", "milk")
    # It is told while the poll is open.
    assert b": 2 votes \xc2\xb7 the counts are hidden" in await next_line(as_text.stdout)
    await next_line(given_up.stdout)
    await cli.commands.ClosePoll(ClosePollRequest(poll_id=closed))
    await cli.commands.CancelPoll(CancelPollRequest(poll_id=cancelled))
    async with asyncio.timeout(30):
        text, data, other = await ended(as_text), await ended(as_data), await ended(given_up)
    assert (text.code, data.code, other.code) == (0, 0, 0)
    assert text.out.splitlines()[-1] == "version 5 CLOSED: 2 votes · tea 1 · milk 1"
    assert counts(json.loads(data.out.splitlines()[-1])) == {"tea": 1, "milk": 1}
    assert other.err == "the poll was cancelled; its counts stay hidden\n"
    assert "tea" not in other.out


async def test_a_poll_is_named_by_the_beginning_of_its_id(cli: Cli, tmp_path: Path) -> None:
    poll_id = await cli.open_poll("a", "b", eligibility=Eligibility.ELIGIBILITY_ROLL)
    prefix = poll_id[:9].upper()
    roll = tmp_path / "roll.csv"
    roll.write_text("anna\nbert\n")
    registered = await cli.data("register", prefix, str(roll))
    assert registered["poll_id"] == poll_id
    vote = await cli.data("vote", prefix, "anna", "a")
    assert vote["receipt"]["poll_id"] == poll_id
    fresh = ("--at-least-as-fresh", vote["consistency_token"])
    votes = tmp_path / "votes.csv"
    votes.write_text("who,vote\nbert,b\n")
    columns = ("--choice-column", "vote", "--voter-column", "who")
    results, shown, turnout, document, imported = await asyncio.gather(
        cli.data("results", prefix, *fresh),
        cli.data("poll", "show", prefix),
        cli.data("turnout", prefix, *fresh),
        cli.data("poll", "document", prefix),
        cli.data("import", str(votes), "--poll", prefix, *columns),
    )
    assert {results["results"]["poll_id"], shown["poll"]["poll_id"], document["poll_id"]} == {poll_id}
    assert (turnout["poll_id"], imported["poll_id"]) == (poll_id, poll_id)
    closed = await cli.data("poll", "close", prefix)
    assert closed["poll_id"] == poll_id
    certified = await cli.data("poll", "certify", prefix)
    assert counts(certified["results"]) == {"a": 1, "b": 1}
    several = await cli.data("results", prefix, poll_id, prefix[:-1])
    assert several["results"]["poll_id"] == poll_id
    watched = await cli.run("watch", prefix)
    assert poll_id in watched.out

    # Of several polls that begin like this none is taken.
    similar = [await cli.open_poll("a", "b", title=f"Similar {number}\x1b?") for number in range(2)]
    connection = await asyncpg.connect(cli.run_record["read_dsn"])
    try:
        for number, other in enumerate(similar):
            await connection.execute(
                "UPDATE views.polls SET poll_id = $1::text::uuid WHERE poll_id = $2::text::uuid",
                f"abcdef0{number}-0000-4000-8000-000000000000",
                other,
            )
        commands = [("poll", "close"), ("poll", "cancel"), ("results",), ("watch",), ("turnout",)]
        outcomes = await asyncio.gather(*(cli.run(*command, "abcdef") for command in commands))
        for outcome in outcomes:
            assert (outcome.code, outcome.out) == (2, "")
            lines = outcome.err.splitlines()
            assert lines[0] == "abcdef begins the ids of several polls; give more of it:"
            assert sorted(lines[1:]) == [
                f"  abcdef0{number}-0000-4000-8000-000000000000  Similar {number}\ufffd?" for number in range(2)
            ]
        assert (await cli.data("poll", "show", "abcdef01"))["poll"]["title"].startswith("Similar 1")
    finally:
        await connection.execute("DELETE FROM views.polls WHERE poll_id::text LIKE 'abcdef0_-0000-4000%'")
        await connection.close()
    assert await cli.refused("results", "abcdef") == "there is no poll whose id begins with abcdef"
    for wrong in ("abc", "no-poll", "", poll_id + "0", poll_id[1:], "%bcd"):
        outcome = await cli.run("poll", "show", wrong)
        assert (outcome.code, outcome.out) == (2, "")
        assert "is not the id of a poll" in outcome.err
    # A whole id needs no query server.
    again = await cli.data("vote", poll_id, "anna", "a", "--query-address", NOBODY)
    assert again["already_recorded"]
    away = await cli.refused("vote", prefix, "cleo", "a", "--query-address", NOBODY)
    assert away.startswith("UNAVAILABLE: the query server")


async def test_rows_are_exported_as_csv(cli: Cli) -> None:
    options = [
        PollOption(option_id=str(n), label=label) for n, label in enumerate(('=HYPERLINK("x")', "+1", "-", "a,b"))
    ]
    spec = PollSpec(title="@SUM(A1)\nor not", options=options, method=VotingMethod.VOTING_METHOD_APPROVAL)
    poll_id = (await cli.commands.CreatePoll(CreatePollRequest(poll=spec))).poll_id
    await cli.commands.OpenPoll(OpenPollRequest(poll_id=poll_id))
    await cli.vote(poll_id, "csv-anna", "0", "1")
    token = await cli.vote(poll_id, "csv-bert", "1")
    results, listed, turnout, votes, dead = await asyncio.gather(
        cli.run("results", poll_id, "--at-least-as-fresh", token, "-o", "csv"),
        cli.run("poll", "list", "-o", "csv", "--limit", "1000"),
        cli.run("turnout", poll_id, "--at-least-as-fresh", token, "-o", "csv"),
        cli.run("votes", "csv-anna", "--at-least-as-fresh", token, "-o", "csv"),
        cli.run("dead-letters", "list", "-o", "csv"),
    )
    rows = list(csv.DictReader(io.StringIO(results.out)))
    assert [(row["option_id"], row["label"], row["count"], row["share"]) for row in rows] == [
        ("0", '\'=HYPERLINK("x")', "1", "0.5"),
        ("1", "+1", "2", "1.0"),
        ("2", "'-", "0", "0.0"),
        ("3", "a,b", "0", "0.0"),
    ]
    assert {(row["poll_id"], row["total_votes"], row["share_of"], row["recounted"]) for row in rows} == {
        (poll_id, "2", "voters", "")
    }
    [poll] = [row for row in csv.DictReader(io.StringIO(listed.out)) if row["poll_id"] == poll_id]
    assert (poll["title"], poll["state"], poll["closed_at"]) == ("'@SUM(A1)\nor not", "OPEN", "")
    assert sum(int(row["votes"]) for row in csv.DictReader(io.StringIO(turnout.out))) == 2
    [vote] = csv.DictReader(io.StringIO(votes.out))
    assert (vote["poll_id"], vote["outcome"]) == (poll_id, "")
    assert dead.out.startswith("read_model,poll_id,version,")
    assert all(outcome.code == 0 for outcome in (results, listed, turnout, votes, dead))


@pytest.mark.parametrize("width", [40, 60, 80])
async def test_on_a_narrow_screen_nothing_is_cut(cli: Cli, width: int) -> None:
    label = "Repair the roof of the bicycle shed, with solar panels, in favour"
    poll_id = await cli.open_poll("a", "b", title=f"{label}? 日本語 שלום")
    options = [PollOption(option_id="x", label=label), PollOption(option_id="y", label=label[:-9] + "against")]
    spec = PollSpec(title=label, options=options, method=VotingMethod.VOTING_METHOD_SINGLE_CHOICE)
    other = (await cli.commands.CreatePoll(CreatePollRequest(poll=spec))).poll_id
    await cli.commands.OpenPoll(OpenPollRequest(poll_id=other))
    await cli.vote(poll_id, f"narrow-{width}", "a")
    token = await cli.vote(other, f"narrow-{width}", "y")
    fresh = ("--at-least-as-fresh", token)
    commands: dict[tuple[str, ...], list[str]] = {
        ("poll", "list", "--limit", "2"): [poll_id, other],
        ("poll", "show", other, *fresh): [other],
        ("poll", "document", other, *fresh): [other],
        ("results", other, poll_id): [other, poll_id],
        ("votes", f"narrow-{width}", *fresh): [poll_id, other],
        ("turnout", other, *fresh): [],
        ("status",): [],
        ("dead-letters", "list"): [],
    }
    for command, ids in commands.items():
        text = await screen_of(cli, width, *command)
        assert all(cell_len(line) <= width for line in text.splitlines()), text
        assert all(shown in text for shown in ids), text
        assert "…" not in text
        if ids:
            # Every word of the title is there, also where it is folded.
            assert set(label.split()) <= set(re.sub(r"[│?]", " ", text).split()), text
    await cli.commands.ClosePoll(ClosePollRequest(poll_id=other))
    watched = await screen_of(cli, width, "watch", other)
    assert {"against", "favour"} <= set(watched.split())
    assert "Repair the roof" in watched


async def test_the_version_is_told(cli: Cli) -> None:
    outcome = await cli.run("--version")
    assert outcome == (0, f"tally {version('tally-voting')}\n", "")


async def test_an_import_reports_every_row_and_counts_none_twice(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "votes.csv"
    path.write_text('id,note,vote\na,"two\nlines",red\nb,,blue\na,,blue\n,,red\nc,,\nd,,overvote\nb,,blue\ne,,red,,x\n')
    arguments = (
        *("import", str(path), "--title", f"Colours {uuid4()}", "--choice-column", "vote", "--voter-column", "id"),
        *("--ignore-choice", "overvote", "--output", "json"),
    )
    outcome = await cli.run(*arguments)
    assert outcome.code == 3
    first = outcome.data
    assert {name: first[name] for name in ("rows", "accepted", "already_recorded", "rejected", "blank", "ignored")} == {
        "rows": 8,
        "accepted": 2,
        "already_recorded": 1,
        "rejected": 3,
        "blank": 1,
        "ignored": 1,
    }
    reasons = {rejection["line"]: rejection["reason"] for rejection in first["rejections"]}
    assert reasons == {5: "ALREADY_VOTED", 6: "INVALID_REQUEST", 10: "INVALID_REQUEST"}
    for line, reason in reasons.items():
        assert re.search(rf"^line {line}: {reason}: \S", outcome.err, re.MULTILINE)
    assert first["complete"]
    assert counts(first["results"]) == {"red": 1, "blue": 1}

    second = (await cli.run(*arguments)).data
    assert (second["poll_id"], second["accepted"], second["already_recorded"]) == (first["poll_id"], 0, 3)
    assert second["results"]["total_votes"] == 2

    other = (await cli.run(*arguments, "--new-poll")).data
    assert other["poll_id"] != first["poll_id"]
    assert other["accepted"] == 2


async def test_the_real_election_is_counted_exactly_also_the_second_time(cli: Cli) -> None:
    arguments = ("import", str(ELECTION), "--title", f"Mayor {uuid4()}", *FIRST_CHOICES)
    first = await cli.data(*arguments)
    assert (first["accepted"], first["blank"], first["ignored"], first["rejected"]) == (79_174, 834, 93, 0)
    assert counts(first["results"]) == election()
    second = await cli.data(*arguments, "--close")
    assert (second["poll_id"], second["accepted"], second["already_recorded"]) == (first["poll_id"], 0, 79_174)
    assert counts(second["results"]) == election()
    assert second["results"]["state"] == "POLL_STATE_CLOSED"
    complaint, certified = await asyncio.gather(
        cli.run(*arguments), cli.run("poll", "certify", second["poll_id"], "-o", "json")
    )
    assert (complaint.code, "takes no more votes" in complaint.err) == (1, True)
    assert certified.code == 0, certified
    assert counts(certified.data["results"]["certification"]) == election()


async def test_an_import_goes_on_with_a_poll_that_somebody_made(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "votes.csv"
    path.write_text("vote\nred\nred\ngreen\n")
    poll_id = await cli.open_poll("red", "blue")
    arguments = ("import", str(path), "--poll", poll_id, "--choice-column", "vote", "--output", "json")
    for accepted, already_recorded in ((2, 0), (0, 2)):
        outcome = await cli.run(*arguments)
        assert outcome.code == 3
        assert (outcome.data["accepted"], outcome.data["already_recorded"]) == (accepted, already_recorded)
        assert [(r["line"], r["reason"]) for r in outcome.data["rejections"]] == [(4, "UNKNOWN_OPTION")]
        assert counts(outcome.data["results"]) == {"red": 2, "blue": 0}


async def test_an_import_into_a_poll_that_takes_no_votes_says_so(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "votes.csv"
    path.write_text("vote\nred\nblue\n")
    draft = (await cli.data("poll", "create", "--title", "Later", "--option", "red", "--option", "blue"))["poll_id"]
    reasons = {draft: "POLL_NOT_OPEN", str(uuid4()): "POLL_NOT_FOUND"}
    outcomes = await asyncio.gather(
        *(cli.run("import", str(path), "--poll", poll_id, "--choice-column", "vote") for poll_id in reasons)
    )
    for outcome, reason in zip(outcomes, reasons.values(), strict=True):
        assert outcome.code == 1
        assert re.search(rf"^{reason}: ", outcome.err, re.MULTILINE)
        assert "to go on" not in outcome.err


async def test_an_unusable_file_is_one_line_and_changes_nothing(cli: Cli, tmp_path: Path) -> None:
    unusable = {
        b"": "the file is empty",
        b"vote\n": "no row below the header",
        "vote\nred\nbl\u00fce\n".encode() + b"\xff\n": "line 4: not valid UTF-8",
        b"choice\nred\nblue\n": "there is no column 'vote'; the columns are 'choice'",
        b"vote,vote\nred,blue\n": "names 'vote' more than once",
        b'vote\nred\n"blue\n': "line 3: not valid CSV",
        b"vote\nred\nred\n": "a poll needs two or more",
    }
    before = await cli.polls()
    for number, content in enumerate(unusable):
        (tmp_path / f"{number}.csv").write_bytes(content)
    files = [tmp_path / f"{number}.csv" for number in range(len(unusable) + 1)]
    arguments = ("--title", "Bad", "--choice-column", "vote", "--data-dir", str(cli.directory / ".tally"))
    for file, message in zip(files, [*unusable.values(), "No such file"], strict=True):
        outcome = CliRunner().invoke(app, ["import", str(file), *arguments])
        assert isinstance(outcome.exception, Failure)
        assert message in str(outcome.exception)
        assert "\n" not in str(outcome.exception)
    assert message in await cli.refused("import", str(file), *arguments)
    assert await cli.polls() == before


def test_wrong_usage_is_exit_code_2() -> None:
    imported = ("import", "votes.csv")
    created = ("poll", "create", "--title", "A", "--option", "a", "--option", "b")
    wrong = [
        (*imported, "--choice-column", "vote"),
        (*imported, "--choice-column", "vote", "--title", "A", "--poll", "B"),
        (*imported, "--choice-column", "vote", "--poll", "B", "--new-poll"),
        (*imported, "--title", "A"),
        (*imported, "--choice-column", "vote", "--title", "A", "--option", "\u200b"),
        (*imported, "--choice-column", "vote", "--title", "A", "--delimiter", "::"),
        (*imported, "--choice-column", "vote", "--title", "A", "--batch-size", "20001"),
        ("poll", "list", "--state", "ajar"),
        ("poll", "create", "--title", "A"),
        (*created, "--closes-at", "tomorrow"),
        (*created, "--max-choices", "1001"),
        ("poll", "update", "B"),
        ("poll", "update", "B", "--closes-at", "+1h", "--no-closes-at"),
        ("vote", "B", "anna"),
        ("register", "B", "roll.csv", "--weight-column", "shares"),
        ("migrate",),
    ]
    outcomes = [CliRunner(env=WITHOUT_TALLY).invoke(app, arguments) for arguments in wrong]
    assert [(outcome.exit_code, outcome.stdout) for outcome in outcomes] == [(2, "")] * len(wrong)
    # They ran in this process: what other tests log must not go to a stderr that is closed by now.
    assert not structlog.is_configured()


async def test_what_is_not_utf_8_is_wrong_usage_unless_it_names_a_file(cli: Cli, tmp_path: Path) -> None:
    assert await cli.run("vote", str(uuid4()), "ann\udce9", "yes") == (2, "", "argument 3 is not valid UTF-8\n")
    outcome = await cli.run("poll", "list", TALLY_QUERY_ADDRESS="caf\udce9:1")
    assert (outcome.code, outcome.err) == (2, "TALLY_QUERY_ADDRESS is not valid UTF-8\n")
    roll = tmp_path / "caf\udce9.csv"
    roll.write_text("anna\n")
    assert "POLL_NOT_FOUND" in (await cli.run("register", str(uuid4()), str(roll))).err


async def test_servers_are_found_in_three_ways(cli: Cli, tmp_path: Path) -> None:
    elsewhere = copy(cli)
    elsewhere.directory = tmp_path
    complaint = await elsewhere.refused("results", str(uuid4()))
    assert all(way in complaint for way in ("--query-address", "TALLY_QUERY_ADDRESS", "tally up"))

    listed = await cli.polls()
    address = cli.run_record["query_address"]
    command = ("poll", "list", "--limit", "1000", "-o", "json")
    found = await asyncio.gather(
        elsewhere.run(*command, "--query-address", address),
        elsewhere.run(*command, TALLY_QUERY_ADDRESS=address),
        elsewhere.run(*command, "--data-dir", str(cli.directory / ".tally")),
    )
    for outcome in found:
        assert [poll["poll_id"] for poll in outcome.data["polls"]] == listed

    (tmp_path / ".tally").mkdir()
    (tmp_path / ".tally" / "run.json").write_text("[]")
    assert "does not say where" in await elsewhere.refused("poll", "list")


async def test_a_server_that_is_away_is_named(cli: Cli) -> None:
    commands, *queries = await asyncio.gather(
        cli.refused("vote", str(uuid4()), "anna", "yes", "--command-address", NOBODY),
        cli.refused("results", str(uuid4()), TALLY_QUERY_ADDRESS=NOBODY),
        cli.refused("status", "--query-address", NOBODY),
    )
    assert commands.startswith(f"UNAVAILABLE: the command server at {NOBODY} does not answer")
    for refusal in queries:
        assert refusal.startswith(f"UNAVAILABLE: the query server at {NOBODY} does not answer")


async def test_a_command_whose_answer_is_lost_takes_effect_once(cli: Cli) -> None:
    title = f"Once {uuid4()}"
    a_poll_id = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-")
    async with Proxy(cli.run_record["command_address"], loses=a_poll_id).running() as proxy:
        arguments = ("--title", title, "--option", "yes", "--option", "no", "--command-address", proxy.address)
        created = await cli.data("poll", "create", *arguments)
        assert proxy.connections == 2
    request = GetPollRequest(poll_id=created["poll_id"], at_least_as_fresh=created["consistency_token"])
    await cli.queries.GetPoll(request, timeout=10)
    listed = (await cli.queries.ListPolls(ListPollsRequest(page_size=1000))).polls
    assert [poll.poll_id for poll in listed if poll.title == title] == [created["poll_id"]]


async def test_a_watcher_hears_of_every_vote_until_the_poll_is_closed(cli: Cli) -> None:
    poll_id = await cli.open_poll("yes", "no")
    as_json, as_text = await cli.start("watch", poll_id, "-o", "json"), await cli.start("watch", poll_id)
    assert as_json.stdout
    versions = []
    for voter in ("anna", "bert", "carl"):
        seen = json.loads(await next_line(as_json.stdout))
        versions.append(seen["version"])
        assert seen["total_votes"] == len(versions) - 1
        await cli.vote(poll_id, voter, "yes")
    await cli.commands.ClosePoll(ClosePollRequest(poll_id=poll_id))
    async with asyncio.timeout(30):
        rest, text = await ended(as_json), await ended(as_text)
    last = json.loads(rest.out.splitlines()[-1])
    assert (rest.code, text.code) == (0, 0)
    assert versions == sorted(set(versions))
    assert (last["state"], counts(last)) == ("POLL_STATE_CLOSED", {"yes": 3, "no": 0})
    assert re.fullmatch(r"version \d+ CLOSED: 3 votes · yes 3 · no 0", text.out.splitlines()[-1])


async def test_a_watcher_is_ended_cleanly_by_ctrl_c(cli: Cli) -> None:
    poll_id = await cli.open_poll("yes", "no")
    watcher = await cli.start("watch", poll_id)
    assert watcher.stdout
    await next_line(watcher.stdout)
    watcher.send_signal(signal.SIGINT)
    async with asyncio.timeout(30):
        outcome = await ended(watcher)
    assert outcome.code == 130
    assert outcome.err == ""


async def test_a_watcher_goes_on_after_a_lost_connection(cli: Cli) -> None:
    poll_id = await cli.open_poll("yes", "no")
    # The first attempt after the first cut fails too.
    async with Proxy(cli.run_record["query_address"], [1_000_000, 1]).running() as proxy:
        watcher = await cli.start("watch", poll_id, "-o", "json", "--query-address", proxy.address)
        assert watcher.stdout
        versions = [json.loads(await next_line(watcher.stdout))["version"]]
        for voter in ("anna", "bert"):
            proxy.cut()
            await cli.vote(poll_id, voter, "yes")
            versions.append(json.loads(await next_line(watcher.stdout))["version"])
        await cli.commands.ClosePoll(ClosePollRequest(poll_id=poll_id))
        async with asyncio.timeout(30):
            outcome = await ended(watcher)
    assert versions == [2, 3, 4]
    assert outcome.code == 0
    assert [json.loads(line)["version"] for line in outcome.out.splitlines()] == [5]
    assert "trying again" in outcome.err


async def test_a_watched_status_goes_on_after_the_server_was_away(cli: Cli) -> None:
    host, _, port = cli.run_record["query_address"].rpartition(":")
    async with network(int(port)) as proxy:
        place = ("--query-address", f"{host}:{proxy.port}", "-o", "json")
        watcher = await cli.start("status", "--watch", *place)
        assert watcher.stdout
        assert watcher.stderr
        await next_line(watcher.stdout)
        await proxy.cut()
        while b"trying again" not in await next_line(watcher.stderr):
            pass
        # Without --watch, it is patient for a moment only.
        complaint = await cli.refused("status", *place)
        await proxy.restore()
        for _ in range(3):
            assert "read_models" in json.loads(await next_line(watcher.stdout))
        watcher.send_signal(signal.SIGINT)
        assert (await ended(watcher)).code == 130
    assert complaint.startswith("UNAVAILABLE")


async def test_on_a_terminal_the_count_is_a_chart_that_grows(cli: Cli) -> None:
    ours, theirs = pty.openpty()
    try:
        process = await cli.start(
            *("import", str(ELECTION), "--title", f"Chart {uuid4()}", *FIRST_CHOICES, "--watch", "-o", "json"),
            stderr=theirs,
            variables=ENVIRONMENT | {"COLUMNS": "100", "LINES": "30", "TERM": "xterm"},
        )
        os.close(theirs)
        drawn = asyncio.create_task(asyncio.to_thread(read_terminal, ours))
        async with asyncio.timeout(60):
            outcome, screen = await ended(process), await drawn
    finally:
        os.close(ours)
    assert outcome.code == 0
    assert re.search(r"\d of 79,174 rows", screen)
    assert re.search(r"BETSY HODGES .*█", screen)
    assert screen.rstrip().rindex("\x1b[?25h") > screen.rindex("█"), "the cursor is not given back"
    assert outcome.data["results"]["total_votes"] == 79_174


async def test_a_lost_connection_loses_and_doubles_nothing(cli: Cli) -> None:
    async with Proxy(cli.run_record["command_address"], [300_000, 1, 400_000, 500_000]).running() as proxy:
        outcome = await cli.run(
            *("import", str(ELECTION), "--title", f"Cut {uuid4()}", *FIRST_CHOICES, "--batch-size", "500"),
            *("--command-address", proxy.address, "--output", "json"),
        )
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("trying again") >= 2
    assert outcome.data["rejected"] == 0
    assert outcome.data["accepted"] + outcome.data["already_recorded"] == 79_174
    assert counts(outcome.data["results"]) == election()


async def test_an_import_that_gives_up_says_how_to_go_on(cli: Cli) -> None:
    title = f"Given up {uuid4()}"
    async with Proxy(cli.run_record["command_address"], [300_000, 0]).running() as proxy:
        outcome = await cli.run(
            *("import", str(ELECTION), "--title", title, *FIRST_CHOICES, "--batch-size", "500"),
            *("--command-address", proxy.address, "--retry-for", "0.3"),
        )
    assert outcome.code == 1
    assert re.search(rf"^UNAVAILABLE: the command server at {proxy.address} does not answer", outcome.err, re.MULTILINE)
    answered = re.search(r"^([\d,]+) of 79,174 votes answered", outcome.err, re.MULTILINE)
    assert answered
    assert 0 < int(answered[1].replace(",", "")) < 79_174

    arguments = continuation(outcome)
    arguments[arguments.index("--command-address") + 1] = cli.run_record["command_address"]
    finished = await cli.data(*arguments)
    assert finished["already_recorded"] >= int(answered[1].replace(",", ""))
    assert counts(finished["results"]) == election()


async def test_ctrl_c_waits_for_answers_and_says_how_to_go_on(cli: Cli) -> None:
    process = await cli.start(
        *("import", str(ELECTION), "--title", f"Stopped {uuid4()}", *FIRST_CHOICES),
        *("--batch-size", "20", "--in-flight", "1"),
    )
    assert process.stderr
    while b"rows (" not in await next_line(process.stderr):
        pass
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(30):
        outcome = await ended(process)
    assert outcome.code == 130
    answered = re.search(r"^([\d,]+) of 79,174 votes answered", outcome.err, re.MULTILINE)
    assert answered
    finished = await cli.data(*continuation(outcome))
    assert finished["already_recorded"] == int(answered[1].replace(",", ""))
    assert counts(finished["results"]) == election()


async def test_ctrl_c_after_the_poll_is_closed_says_so(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "votes.csv"
    path.write_text("vote\nred\nblue\n")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = await cli.start(
            *("import", str(path), "--title", f"Closed {uuid4()}", "--choice-column", "vote", "--close"),
            *("--query-address", f"127.0.0.1:{silent.getsockname()[1]}"),
        )
        assert process.stderr
        poll_id = await told_poll(process)
        async with asyncio.timeout(30):
            while (await cli.data("poll", "show", poll_id))["poll"]["state"] != "POLL_STATE_CLOSED":
                pass
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(30):
            outcome = await ended(process)
    assert outcome.code == 130
    assert f"every row was answered and the poll is closed; see tally results {poll_id}" in outcome.err
    assert "to go on" not in outcome.err


@pytest.mark.parametrize("during", [True, False], ids=["while it is read", "after an interruption"])
async def test_a_file_that_changed_is_not_counted_again(cli: Cli, tmp_path: Path, during: bool) -> None:
    """Without a column of voters a row's voter is its place in the content: another content would be other voters."""
    path, content = tmp_path / "votes.csv", "vote\n" + "red\nblue\n" * 20_000
    path.write_text(content)
    process = await cli.start(
        *("import", str(path), "--title", f"Changed {uuid4()}", "--choice-column", "vote"),
        *("--batch-size", "50", "--in-flight", "1"),
    )
    assert process.stderr
    poll_id = await told_poll(process)
    while b"rows (" not in await next_line(process.stderr):
        pass
    if during:
        with path.open("a") as file:
            file.write("red\n")
    else:
        process.send_signal(signal.SIGINT)
    async with asyncio.timeout(60):
        outcome = await ended(process)
    if during:
        assert outcome.code == 1
        assert "to go on" not in outcome.err
        assert re.search(rf"the file changed.*tally poll cancel {poll_id}", outcome.err, re.DOTALL)
        return
    again = continuation(outcome)
    path.write_text(content + "red\n")
    assert "has changed since that import" in await cli.refused(*again)
    path.write_text(content)
    assert counts((await cli.data(*again))["results"]) == {"red": 20_000, "blue": 20_000}


async def test_a_poll_that_is_closed_under_an_import_ends_it(cli: Cli) -> None:
    process = await cli.start(
        *("import", str(ELECTION), "--title", f"Closed {uuid4()}", *FIRST_CHOICES),
        *("--batch-size", "20", "--in-flight", "1"),
    )
    assert process.stderr
    poll_id = await told_poll(process)
    while b"rows (" not in await next_line(process.stderr):
        pass
    closed = await cli.data("poll", "close", poll_id)
    async with asyncio.timeout(30):
        outcome = await ended(process)
    assert outcome.code == 1
    assert re.search("^POLL_NOT_OPEN: ", outcome.err, re.MULTILINE)
    assert "to go on" not in outcome.err
    answered = re.search(r"^([\d,]+) of 79,174 votes answered", outcome.err, re.MULTILINE)
    results = await cli.data("results", poll_id, "--at-least-as-fresh", closed["consistency_token"])
    assert answered
    assert results["results"]["total_votes"] == int(answered[1].replace(",", ""))


async def test_migrate_brings_a_database_up_to_date(cli: Cli) -> None:
    dsns = {name: cli.run_record[f"{name}_dsn"] for name in ("write", "read")}
    migrated = await cli.data("migrate", "--write-dsn", dsns["write"], "--read-dsn", dsns["read"])
    assert migrated == {"applied": {"write": [], "read": []}}
    complaint = await cli.refused("migrate", "--write-dsn", "postgresql://tally:guess-me@127.0.0.1:9/none")
    assert complaint.startswith("the write database was not migrated: ")
    assert "guess-me" not in complaint


async def test_help_does_not_keep_people_waiting() -> None:
    process = await asyncio.create_subprocess_exec(TALLY, "import", "--help", env=ENVIRONMENT, stdout=PIPE, stderr=PIPE)
    outcome = await ended(process)
    assert outcome.code == 0
    assert re.search(r"3\s+if\s+some\s+rows\s+were\s+rejected", outcome.out)


async def next_line(stream: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(30):
        line = await stream.readline()
    assert line, "the command ended"
    return line


async def screen_of(cli: Cli, width: int, *arguments: str) -> str:
    """What a command shows on a terminal with this many columns."""
    ours, theirs = pty.openpty()
    try:
        variables = ENVIRONMENT | {"COLUMNS": str(width), "LINES": "30", "TERM": "xterm", "NO_COLOR": "1"}
        process = await asyncio.create_subprocess_exec(
            *(TALLY, *arguments), cwd=cli.directory, env=variables, stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        drawn = asyncio.create_task(asyncio.to_thread(read_terminal, ours))
        async with asyncio.timeout(60):
            code, screen = await process.wait(), await drawn
    finally:
        os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.replace("\r", ""))
    assert code == 0, text
    return text


def read_terminal(descriptor: int) -> str:
    """Everything that is written to a terminal until the other side is closed."""
    drawn = b""
    while True:
        try:
            data = os.read(descriptor, 1 << 16)
        except OSError:
            return drawn.decode()
        drawn += data


class Proxy:
    """A TCP proxy whose connections are reset: the n-th one after `cut_after[n]` bytes to the server, all by `cut`.

    Where the last number is 0, every later connection is reset at once; otherwise later ones live on. The first answer
    that `loses` matches is not passed on: its connection is reset in its place.
    """

    def __init__(self, target: str, cut_after: Sequence[int] = (), loses: re.Pattern[bytes] | None = None) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._limits = list(cut_after)
        self._loses = loses
        self._writers: set[asyncio.StreamWriter] = set()
        self.address = ""
        self.connections = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Proxy"]:
        async with asyncio.TaskGroup() as tasks:
            server = await asyncio.start_server(lambda *ends: tasks.create_task(self._serve(*ends)), "127.0.0.1", 0)
            self.address = "{}:{}".format(*server.sockets[0].getsockname())
            yield self
            server.close()
            self.cut()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        limit: float = 0 if self._limits == [0] else self._limits.pop(0) if self._limits else float("inf")
        upstream_reader, upstream_writer = await asyncio.open_connection(self._host, self._port)
        ends = {writer, upstream_writer}
        self._writers |= ends
        with suppress(OSError, ExceptionGroup):
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._ask(reader, upstream_writer, limit))
                pumps.create_task(self._answer(upstream_reader, writer))
        self._writers -= ends
        for end in ends:
            end.transport.abort()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: float) -> None:
        asked = 0
        while (data := await reader.read(1 << 14)) and (asked := asked + len(data)) <= limit:
            writer.write(data)
            await writer.drain()
        # One end is gone: the other one goes too.
        raise ConnectionResetError

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 14):
            if self._loses and self._loses.search(data):
                self._loses = None
                break
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError
