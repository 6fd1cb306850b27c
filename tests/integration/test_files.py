"""`tally import` and `tally register` with files as people have them: what was understood is said, or it is refused."""

from __future__ import annotations

import asyncio
import io
import json
import lzma
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import openpyxl
import pytest
from tally.command.v1 import command_service_pb2 as command
from tally.poll.v1.poll_pb2 import ELIGIBILITY_ROLL, VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec, VotingMethod
from tally.query.v1 import query_service_pb2 as query

from clients.ballots import BallotFile
from clients.importing import Import
from tests.servers import refused
from tests.system import System

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("TALLY_")}

Write = Callable[[str | bytes], Path]


class Ended(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: str | bytes) -> Path:
        path = tmp_path / f"{uuid4()}.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


async def tally(system: System, *arguments: str, stdin: bytes = b"", **variables: str) -> Ended:
    """Runs a command to its end; a traceback is never one."""
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-c",
            "from clients.cli import main; main()",
            *arguments,
            "--data-dir",
            str(system.directory),
        ),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=ENVIRONMENT | variables,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate(stdin)
    assert process.returncode is not None
    assert b"Traceback" not in err, err.decode()
    return Ended(process.returncode, out.decode(), err.decode())


async def imported(system: System, path: Path | str, *arguments: str, stdin: bytes = b"") -> Ended:
    title = f"File {uuid4()}"
    return await tally(system, "import", str(path), "--title", title, *arguments, "-o", "json", stdin=stdin)


def counts(outcome: Ended) -> list[tuple[str, int]]:
    """The options of the poll that an import created, in their order, with their counts."""
    assert outcome.code == 0, outcome
    results = json.loads(outcome.out)["results"]
    return [(option["label"], option["count"]) for option in results["counts"]]


async def polls(system: System) -> list[str]:
    listed = await system.query.ListPolls(query.ListPollsRequest(page_size=1000))
    return [poll.poll_id for poll in listed.polls]


async def with_roll(system: System) -> str:
    """An open poll with an electoral roll."""
    options = [PollOption(option_id=name, label=name) for name in ("yes", "no")]
    spec = PollSpec(title="?", method=VOTING_METHOD_SINGLE_CHOICE, options=options, eligibility=ELIGIBILITY_ROLL)
    poll_id = (await system.command.CreatePoll(command.CreatePollRequest(poll=spec))).poll_id
    await system.command.OpenPoll(command.OpenPollRequest(poll_id=poll_id))
    return poll_id


def workbook(rows: Sequence[Sequence[Any]], others: Sequence[str] = ()) -> bytes:
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    for row in rows:
        sheet.append(list(row))
    for name in others:
        book.create_sheet(name)
    data = io.BytesIO()
    book.save(data)
    return data.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


TABLE = [("id", "choice", "note"), ("1", "M\u00fcller", "a, b; c"), ("2", "Wei\u00df", ""), ("3", "M\u00fcller", "")]


def table(delimiter: str, end: str = "\r\n") -> str:
    return "".join(delimiter.join(f'"{cell}"' if delimiter in cell else cell for cell in row) + end for row in TABLE)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (table(",").encode(), "UTF-8, comma"),
        (table(";").encode("utf-8-sig"), "UTF-8, semicolon"),
        (table("\t").encode("utf-16"), "UTF-16, tab"),
        (table("\t").encode("utf-16-be"), "UTF-16BE, tab"),
        (table(";").encode("utf-16-le"), "UTF-16LE, semicolon"),
        (table("|").encode("cp1252"), "Windows-1252, as it is not UTF-8 (line 2: 'Müller'), pipe"),
        (table(",", "\r").encode(), "UTF-8, comma"),
        (b"sep=;\r\n" + table(";").encode(), "UTF-8, semicolon"),
        (lzma.compress(table(",").encode("cp1252")), "Windows-1252"),
        (zipped({"votes.csv": table(";").encode(), "__MACOSX/._votes.csv": b"\0\1"}), "UTF-8, semicolon"),
        (workbook(TABLE, ["Old"]), "Excel worksheet 'Sheet' (not read: 'Old')"),
        (zipped({"votes.xlsx": workbook(TABLE)}), "Excel worksheet 'Sheet'"),
    ],
    ids=["comma", "BOM", "UTF-16", "UTF-16BE", "UTF-16LE", "1252", "CR", "sep", "xz", "zip", "xlsx", "xlsx in zip"],
)
async def test_what_spreadsheets_save_is_read_and_how_it_was_read_is_said(
    system: System, write: Write, content: bytes, told: str
) -> None:
    outcome = await imported(system, write(content), "--choice-column", "choice", "--voter-column", "id")
    assert counts(outcome) == [("Müller", 2), ("Weiß", 1)]
    assert told in outcome.err
    assert "columns: choice 'choice' (#2), voter 'id' (#1); not used: 'note'" in outcome.err
    assert "3 votes of 3 people; 0 blank, 0 ignored, 0 faulty" in outcome.err
    assert "\n  Müller: 2\n  Weiß: 1\n" in outcome.err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(1000), "an old Excel workbook (.xls)"),
        (
            zipped({"a.csv": b"x", "b.csv": b"y"}),
            "a zip archive is read with one file in it; this has 2: 'a.csv', 'b.csv'",
        ),
        (zipped({"xl/workbook.xml": b"<workbook/>"}), "not an Excel workbook that can be read"),
        (zipped({"mimetype": b"x", "content.xml": b"y"}), "an OpenDocument spreadsheet"),
        ("id,chöice\n1,a\n".encode() + b"2,\xfc\n", "line 3: not valid UTF-8 at byte 3"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\1\0\0\0\1\0", "holds zero bytes and is no text"),
    ],
    ids=["xls", "two files", "half a workbook", "ods", "damaged", "picture"],
)
async def test_what_cannot_be_read_says_what_to_save_and_creates_nothing(
    system: System, write: Write, content: bytes, told: str
) -> None:
    before = await polls(system)
    outcome = await imported(system, write(content), "--choice-column", "choice")
    assert (outcome.code, outcome.out) == (1, "")
    assert told in outcome.err
    assert outcome.err.count("\n") == 1
    assert await polls(system) == before


async def test_ballots_and_voters_come_through_a_pipe(system: System, tmp_path: Path) -> None:
    columns = ("--choice-column", "choice", "--voter-column", "id")
    outcome = await imported(system, "-", *columns, stdin=table(";").encode("utf-16"))
    assert counts(outcome) == [("Müller", 2), ("Weiß", 1)]
    assert outcome.err.startswith("standard input: UTF-16, semicolon")

    poll_id = await with_roll(system)
    fifo = tmp_path / "voters"
    os.mkfifo(fifo)
    registering = asyncio.create_task(tally(system, "register", poll_id, str(fifo), "-o", "json"))
    await asyncio.to_thread(fifo.write_text, "ada\nbob\n")
    registered = await registering
    assert (registered.code, json.loads(registered.out)["registered"]) == (0, 2), registered


async def test_cells_of_a_workbook_are_read_as_excel_shows_them(system: System, write: Write) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    rows = [("member", "choice"), (7, "yes"), (12345, True), ("x", date(2027, 5, 1)), (3.0, "yes")]
    for row in rows:
        sheet.append(list(row))
    sheet["A2"].number_format = "00000"
    data = io.BytesIO()
    book.save(data)
    arguments = ("--choice-column", "choice", "--voter-column", "member")
    outcome = await imported(system, write(data.getvalue()), *arguments)
    assert counts(outcome) == [("yes", 2), ("TRUE", 1), ("2027-05-01", 1)]
    poll_id = json.loads(outcome.out)["poll_id"]
    for voter_id in ("00007", "12345", "x", "3"):
        await system.query.GetVote(query.GetVoteRequest(poll_id=poll_id, voter_id=voter_id), timeout=10)

    sheet["A3"] = 1234567890123456
    data = io.BytesIO()
    book.save(data)
    outcome = await imported(system, write(data.getvalue()), *arguments, "--yes")
    assert outcome.code == 1
    assert "numbers that a spreadsheet shortened" in outcome.err
    assert "line 3: '1.23457E+15'" in outcome.err


@pytest.mark.parametrize(
    ("content", "arguments", "told", "solution", "expected"),
    [
        (
            "1,yes\n2,Yes\n3,YES\n4,no\n",
            (),
            ("choices that look the same", "line 3: 'Yes' looks like 'yes' on line 2", "line 4: 'YES' looks like"),
            ("--merge-similar",),
            [("yes", 3), ("no", 1)],
        ),
        (
            '1,"Mon, Tue"\n2,Tue\n3,"Wed,Mon"\n',
            (),
            ("cells that may hold several choices: --choice-separator ','", "line 2: 'Mon, Tue'", "line 4: 'Wed,Mon'"),
            ("--choice-separator", ","),
            [("Mon", 2), ("Tue", 2), ("Wed", 1)],
        ),
        (
            '1,"Mon, 1 Dec;Tue, 2 Dec;"\n2,"Wed, 3 Dec"\n',
            (),
            ("--choice-separator ';' takes them apart at each semicolon", "line 2: 'Mon, 1 Dec;Tue, 2 Dec;'"),
            ("--choice-separator", ";"),
            [("Mon, 1 Dec", 1), ("Tue, 2 Dec", 1), ("Wed, 3 Dec", 1)],
        ),
        (
            "1,red\n2,blue\n3,Overvote\n",
            ("--ignore-choice", "overvote"),
            (
                "names given with --ignore-choice that no row has (1)\n  'overvote'",
                "line 4: 'Overvote' looks like 'overvote'",
            ),
            ("--ignore-choice", "Overvote", "--yes"),
            [("red", 1), ("blue", 1)],
        ),
        (
            "1,red\n2,blue\nid,choice\n3,red\n",
            (),
            ("a header that is also a choice", "line 1: 'choice'"),
            ("--ignore-choice", "choice"),
            [("red", 2), ("blue", 1)],
        ),
        (
            "ada@x,red\nbob@x,blue\nADA@x,red\n",
            (),
            ("voters who differ only in letter case", "line 4: 'ADA@x' looks like 'ada@x' on line 2"),
            ("--fold-case",),
            [("red", 1), ("blue", 1)],
        ),
        (
            "1,red\n2,#N/A\n3,blue\n",
            (),
            ("choices that a spreadsheet or a wrong encoding damaged", "line 3: '#N/A'"),
            ("--yes",),
            [("red", 1), ("#N/A", 1), ("blue", 1)],
        ),
    ],
    ids=["look-alikes", "list", "forms", "ignored", "header twice", "case", "damaged"],
)
async def test_what_is_suspicious_creates_nothing_until_it_is_said_what_is_meant(
    system: System,
    write: Write,
    content: str,
    arguments: Sequence[str],
    told: Sequence[str],
    solution: Sequence[str],
    expected: list[tuple[str, int]],
) -> None:
    path = write("id,choice\n" + content)
    before = await polls(system)
    columns = ("--choice-column", "choice", "--voter-column", "id")
    outcome = await imported(system, path, *columns, *arguments)
    assert (outcome.code, outcome.out) == (1, "")
    for text in told:
        assert text in outcome.err, outcome.err
    assert "nothing is imported" in outcome.err.splitlines()[-1]
    assert await polls(system) == before

    outcome = await imported(system, path, *columns, *solution, *arguments)
    assert counts(outcome) == expected
    poll_id = json.loads(outcome.out)["poll_id"]
    again = await tally(system, "import", str(path), "--poll", poll_id, *columns, *solution, *arguments, "-o", "json")
    assert (again.code, json.loads(again.out)["accepted"]) == (0, 0), again


async def test_options_stand_in_the_order_of_the_file_after_those_that_were_named(system: System, write: Write) -> None:
    path = write("choice\nc\nb\nb\na\na\na\n")
    outcome = await imported(system, path, "--choice-column", "choice", "--option", "z", "--option", "b")
    assert counts(outcome) == [("z", 0), ("b", 2), ("c", 1), ("a", 3)]

    hidden = await imported(system, path, "--choice-column", "choice", "--results-after-close")
    assert hidden.code == 0, hidden
    poll = (await system.query.GetPoll(query.GetPollRequest(poll_id=json.loads(hidden.out)["poll_id"]))).poll
    assert [option.label for option in poll.options] == ["c", "b", "a"]
    # Who may see the job's output, may see no count before the poll is closed.
    assert "\n  c\n  b\n  a\n" in hidden.err


async def test_a_file_that_another_version_imported_with_other_options_is_not_imported_again(
    system: System, write: Write
) -> None:
    path = write("choice\nb\na\na\n")
    ballots = BallotFile(path, ("choice",))
    title = f"File {uuid4()}"
    plan = Import(ballots, ballots.survey(), title=title)
    # An earlier version sorted the options by their counts.
    options = [PollOption(option_id=name, label=name) for name in ("a", "b")]
    spec = PollSpec(title=title, method=VOTING_METHOD_SINGLE_CHOICE, options=options)
    await system.command.CreatePoll(command.CreatePollRequest(request_id=str(plan.request_id), poll=spec))
    arguments = ("import", str(path), "--title", title, "--choice-column", "choice", "-o", "json")
    outcome = await tally(system, *arguments)
    assert outcome.code == 1, outcome
    assert "another version of tally imported this file" in outcome.err
    assert (await tally(system, *arguments, "--new-poll")).code == 0


async def test_several_columns_and_separators_make_an_approval_poll(system: System, write: Write) -> None:
    path = write("1,a | b,c\n2,b,b\n")
    arguments = ("--no-header", "--choice-column", "#2", "--choice-column", "#3", "--voter-column", "#1")
    outcome = await imported(system, path, *arguments, "--choice-separator", "|")
    assert counts(outcome) == [("a", 1), ("b", 2), ("c", 1)]
    poll = (await system.query.GetPoll(query.GetPollRequest(poll_id=json.loads(outcome.out)["poll_id"]))).poll
    assert poll.method == VotingMethod.VOTING_METHOD_APPROVAL


async def test_a_roll_of_spellings_registers_each_person_once_who_votes_by_the_plain_id(
    system: System, write: Write
) -> None:
    poll_id = await with_roll(system)
    path = write("e-mail\nAda@x.org \n\u00a0ada@x.org\nada\u00ad@x.org\nJose\u0301@x.org\nbob@x.org\u3000\n")
    arguments = ("register", poll_id, str(path), "--voter-column", "e-mail", "-o", "json")
    stopped = await tally(system, *arguments)
    assert stopped.code == 1
    assert "line 3: 'ada@x.org' looks like 'Ada@x.org' on line 2" in stopped.err
    assert "no voter is registered" in stopped.err

    registered = await tally(system, *arguments, "--fold-case")
    assert registered.code == 0, registered
    answer = json.loads(registered.out)
    assert (answer["rows"], answer["people"], answer["registered"], answer["already_registered"]) == (5, 3, 3, 0)
    assert "3 people" in registered.err
    for line in (2, 3, 4, 5, 6):
        assert f"\n  line {line}: " in registered.err
    for voter_id in ("ada@x.org", "jos\u00e9@x.org", "bob@x.org"):
        await system.command.CastVote(
            command.CastVoteRequest(poll_id=poll_id, voter_id=voter_id, option_ids=["yes"]), timeout=10
        )
    other = system.command.CastVote(
        command.CastVoteRequest(poll_id=poll_id, voter_id="ada@x.org ", option_ids=["yes"]), timeout=10
    )
    assert (await refused(other)).reason == "INVALID_REQUEST"


async def test_a_list_with_other_weights_than_the_roll_has_is_told(system: System, write: Write) -> None:
    poll_id = await with_roll(system)
    arguments = ("--voter-column", "id", "--weight-column", "weight")
    first = await tally(system, "register", poll_id, str(write("id,weight\nada,3\nbob,1\n")), *arguments)
    assert first.code == 0, first
    second = await tally(system, "register", poll_id, str(write("id,weight\nada,35\nbob,1\neve,2\n")), *arguments)
    assert second.code == 3, second
    assert second.err.splitlines()[-1] == "1 voters stay on the roll with another weight than the file gives them"
    again = await tally(system, "register", poll_id, str(write("id,weight\nada,3\neve,2\n")), *arguments)
    assert again.code == 0, again


@pytest.mark.parametrize(
    ("content", "arguments", "told", "accepted"),
    [
        (
            "voter,weight\nada,3\nbob,1\nada,35\n",
            ("--voter-column", "voter", "--weight-column", "weight"),
            "line 4",
            False,
        ),
        ("id\n1.23457E+12\n7\n", ("--voter-column", "id"), "numbers that a spreadsheet shortened", False),
        ("id\n12345.0\n7\n", ("--voter-column", "id"), "line 2: '12345.0'", True),
        ("Email\nada@x.org\n", (), "line 1: 'Email' would be a voter", True),
        ("ada\nAda\n", (), "line 2: 'Ada' looks like 'ada' on line 1", True),
    ],
    ids=["two weights", "shortened", "fraction", "header", "case"],
)
async def test_yes_accepts_what_is_suspicious_and_never_what_is_contradictory(
    system: System, write: Write, content: str, arguments: Sequence[str], told: str, accepted: bool
) -> None:
    poll_id = await with_roll(system)
    path = write(content)
    stopped = await tally(system, "register", poll_id, str(path), *arguments)
    assert (stopped.code, stopped.out) == (1, "")
    assert told in stopped.err
    turnout = await system.query.GetTurnout(query.GetTurnoutRequest(poll_id=poll_id), timeout=10)
    assert turnout.eligible_voters == 0
    told_so = await tally(system, "register", poll_id, str(path), *arguments, "--yes", "-o", "json")
    assert told_so.code == (0 if accepted else 1), told_so
    if accepted:
        assert json.loads(told_so.out)["registered"] == 2


async def test_a_closing_time_is_shown_in_both_zones_or_refused(system: System) -> None:
    arguments = ("poll", "create", "--title", "t", "--option", "y", "--option", "n", "--closes-at")
    created = await tally(system, *arguments, "2027-07-01 18:00", TZ="Europe/Berlin")
    assert created.code == 0, created
    assert "2027-07-01T18:00:00+02:00 CEST = 2027-07-01T16:00:00Z" in created.out
    data = await tally(system, *arguments, "2027-07-01T18:00Z", "-o", "json", TZ="Asia/Kathmandu")
    assert "poll_id" in json.loads(data.out)
    assert data.err == "closes_at: 2027-07-01T23:45:00+05:45 +0545 = 2027-07-01T18:00:00Z\n"
    for when, zone in (("2027-03-28T02:30", "Europe/Berlin"), ("2020-01-01T00:00", "UTC"), ("2027-05-01", "UTC")):
        refusal = await tally(system, *arguments, when, TZ=zone, COLUMNS="300")
        assert (refusal.code, refusal.out) == (2, "")
        assert any(words in refusal.err for words in ("does not exist", "has passed", "is a date"))
