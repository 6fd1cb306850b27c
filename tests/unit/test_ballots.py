"""The CSV files that an import reads."""

import csv
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from tally.command.v1.command_service_pb2 import CastVotesRequest

import clients.batches
from clients.ballots import MAX_LABEL, MAX_OPTIONS, Ballot, BallotFile, Survey, label, option_id
from clients.files import UnusableFile
from clients.findings import Weight
from clients.importing import batches

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: str | bytes, name: str = "votes.csv") -> Path:
        path = tmp_path / name
        data = content.encode() if isinstance(content, str) else content
        match path.suffix.lower():
            case ".gz":
                data = gzip.compress(data)
            case ".xz":
                data = lzma.compress(data)
        path.write_bytes(data)
        return path

    return write


def read(file: BallotFile) -> list[Ballot]:
    return list(file.ballots(file.survey()))


def told(survey: Survey) -> dict[str, list[str]]:
    """What was found, by kind."""
    return {name: finding.examples for name, finding in survey.findings.kinds.items()}


def every_line(survey: Survey) -> list[str]:
    """What was found, without the kinds."""
    return [example for examples in told(survey).values() for example in examples]


def test_votes_are_rows_whose_choice_is_neither_blank_nor_ignored(write: Write) -> None:
    path = write("id,choice\na,red\nb,\nc,blue\nd,overvote\ne,red\nf,  \n")
    file = BallotFile(path, ("choice",), "id", frozenset({"overvote"}))
    survey = file.survey()
    assert survey.choices == {"red": 2, "blue": 1}
    assert (survey.votes, survey.blank, survey.ignored, survey.faulty) == (3, 2, 1, 0)
    assert read(file) == [(2, "a", ["red"], ""), (4, "c", ["blue"], ""), (6, "e", ["red"], "")]


def test_every_choice_column_marks_a_choice_and_the_same_one_twice_marks_it_once(write: Write) -> None:
    path = write("id,1st,2nd,3rd\na,red,blue,red\nb,,green, \nc,,overvote,\nd,overvote,blue,\ne,,,\n,red,,\n,,,\n")
    file = BallotFile(path, ("1st", "2nd", "3rd"), "id", frozenset({"overvote"}))
    survey = file.survey()
    assert list(survey.choices.items()) == [("red", 1), ("blue", 2), ("green", 1)]
    assert (survey.votes, survey.blank, survey.ignored, survey.faulty) == (3, 2, 1, 1)
    assert read(file)[:3] == [(2, "a", ["red", "blue"], ""), (3, "b", ["green"], ""), (5, "d", ["blue"], "")]
    assert [(line, bool(fault)) for line, _, _, fault in read(file)[3:]] == [(7, True)]


def test_choices_come_as_the_file_first_names_them_whatever_their_counts(write: Write) -> None:
    path = write("choice\nb\na\nc\nc\n")
    assert list(BallotFile(path, ("choice",)).survey().choices) == ["b", "a", "c"]
    told = BallotFile(path, ("choice",), options=("d", "c"))
    assert list(told.survey().choices.items()) == [("d", 0), ("c", 2), ("b", 1), ("a", 1)]


def test_a_row_is_known_by_the_line_it_begins_on(write: Write) -> None:
    path = write('id,note,choice\na,"one\ntwo\nthree",red\n\nb,x,blue\nc,"\n",red')
    assert [ballot[0] for ballot in read(BallotFile(path, ("choice",), "id"))] == [2, 6, 7]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_line_ends_byte_order_mark_and_other_alphabets_are_read(write: Write, line_end: str) -> None:
    content = "\ufeff" + line_end.join(["id,escolha", "a,São João", "b,東京", ""])
    assert read(BallotFile(write(content), ("escolha",), "id")) == [(2, "a", ["São João"], ""), (3, "b", ["東京"], "")]


@pytest.mark.parametrize("name", ["votes.csv.gz", "votes.csv.xz", "VOTES.CSV.GZ"])
def test_a_compressed_file_is_the_same_file(write: Write, name: str) -> None:
    content = "choice\nred\nblue\n"
    plain, packed = BallotFile(write(content), ("choice",)), BallotFile(write(content, name), ("choice",))
    assert packed.survey() == plain.survey()
    assert read(packed) == read(plain)


def test_without_a_voter_column_content_and_line_name_the_voter(write: Write) -> None:
    first, again = write("choice\nred\nred\n", "a.csv"), write("choice\nred\nred\n", "b.csv")
    other = write("choice\nred\nblue\n", "c.csv")
    voters = [{ballot[1] for ballot in read(BallotFile(path, ("choice",)))} for path in (first, again, other)]
    assert voters[0] == voters[1]
    assert len(voters[0] | voters[2]) == 4
    assert all(1 <= len(voter) <= 256 for voter in voters[0])


def test_a_row_without_a_usable_voter_is_faulty_unless_it_is_no_ballot(write: Write) -> None:
    path = write(f"id,choice\n,red\n,\n,overvote\n{'x' * 257},red\n{'x' * 256},red\n")
    file = BallotFile(path, ("choice",), "id", frozenset({"overvote"}))
    survey = file.survey()
    assert (survey.votes, survey.blank, survey.ignored, survey.faulty) == (1, 1, 1, 2)
    ballots = read(file)
    assert [ballot[0] for ballot in ballots if ballot[3]] == [2, 5]
    assert all("voter_id" in ballot[3] for ballot in ballots if ballot[3])


def test_a_row_with_more_cells_is_faulty_and_offers_no_choice(write: Write) -> None:
    path = write("id,choice,rank\na,red,1\nb,STROUD, JR.,1\nc,red,1,,\n")
    file = BallotFile(path, ("choice",), "id")
    assert file.survey().choices == {"red": 2}
    assert [(line, bool(fault)) for line, _, _, fault in read(file)] == [(2, False), (3, True), (4, False)]


def test_the_missing_cells_of_a_short_row_are_blank_which_is_told_where_they_are_wanted(write: Write) -> None:
    path = write("id,1st,2nd,note\na,red,blue\nb,red\nc\nd,,blue,x\n")
    file = BallotFile(path, ("1st", "2nd"), "id")
    survey = file.survey()
    assert (survey.choices, survey.votes, survey.blank, survey.faulty) == ({"red": 2, "blue": 2}, 3, 1, 0)
    assert told(survey) == {
        "short rows: their missing cells are read as blank": ["line 3: 2 of 4 cells", "line 4: 1 of 4 cells"]
    }
    assert not survey.findings.stop(yes=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("id,choice\n", "no row below the header"),
        ("id,choice\n\n\n", "no row below the header"),
        ("id,vote\na,red\n", "no column 'choice'; the columns are 'id', 'vote'"),
        ("id,choice,choice\na,red,blue\n", "names 'choice' more than once: say which one by its place, #2 or #3"),
        ("id,choice,id\na,red,b\n", "names 'id' more than once: say which one by its place, #1 or #3"),
        ("id,Choice\na,red\n", "no column 'choice'; the columns are 'id', 'Choice'; do you mean 'Choice'?"),
        ("id,ch\u00f6ice\na,red\nb,".encode() + b"\xff\n", "line 3: not valid UTF-8 at byte 3"),
        (b"id,choice\na,red\nb,\x81\n", "line 3: not valid UTF-8 at byte 3, and not Windows-1252"),
        (b"\xff\xfei\x00d", "line 1: not valid UTF-16"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 100, "an old Excel workbook"),
        (b"\0\0\0\1" * 100, "holds zero bytes and is no text"),
        ('id,choice\na,red\nb,"blue\nc,red\n', "line 3: not valid CSV"),
        ('id,choice\na,"red"dish\n', "line 2: not valid CSV"),
        (b"id,choice\na," + b"x" * (2 << 20), "line 2: longer than"),
        (
            "id,choice\n" + "".join(f"{n},{n}\n" for n in range(MAX_OPTIONS + 1)),
            "column 'choice' holds more than 1,000 different choices",
        ),
    ],
)
def test_an_unusable_file_is_refused_in_one_line(write: Write, content: str | bytes, message: str) -> None:
    path = write(content)
    with pytest.raises(UnusableFile) as refused:
        BallotFile(path, ("choice",), "id").survey()
    assert message in str(refused.value)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


def test_a_file_with_the_most_options_that_a_poll_can_have_is_read(write: Write) -> None:
    path = write("choice\n" + "".join(f"{n}\n" for n in range(MAX_OPTIONS)))
    assert BallotFile(path, ("choice",)).survey().votes == MAX_OPTIONS


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableFile, match="No such file"):
        BallotFile(tmp_path / "none.csv", ("choice",)).survey()
    with pytest.raises(UnusableFile, match="not a file"):
        BallotFile(tmp_path, ("choice",)).survey()
    with pytest.raises(UnusableFile, match="File name too long"):
        BallotFile(tmp_path / ("x" * 256), ("choice",)).survey()


@pytest.mark.parametrize("name", ["votes.csv.gz", "votes.csv.xz"])
def test_a_damaged_archive_is_refused(write: Write, name: str) -> None:
    path = write("choice\n" + "red\nblue\n" * 10_000, name)
    whole = path.read_bytes()
    for damaged in (whole[:-12], b"no archive", whole[:20] + b"\0\0\0\0" + whole[24:]):
        path.write_bytes(damaged)
        with pytest.raises(UnusableFile):
            BallotFile(path, ("choice",)).survey()


def test_a_file_that_changes_while_it_is_imported_is_noticed(write: Write) -> None:
    path = write("choice\nred\nblue\n")
    file = BallotFile(path, ("choice",))
    survey = file.survey()
    path.write_text("choice\nred\nblue\nred\n")
    with pytest.raises(UnusableFile, match="changed"):
        list(file.ballots(survey))


def test_nameless_columns_of_spreadsheets_are_in_nobodys_way(write: Write) -> None:
    assert read(BallotFile(write("id,choice,,\na,red,,\n"), ("choice",), "id")) == [(2, "a", ["red"], "")]


def test_a_choice_that_is_too_long_for_an_option_id_gets_one() -> None:
    longest, longer, other = "x" * 100, "x" * 101, "x" * 101 + "y"
    assert option_id(longest) == longest
    assert len(option_id(longer)) == 100
    assert len({option_id(longest), option_id(longer), option_id(other)}) == 3
    assert label("x" * MAX_LABEL) == "x" * MAX_LABEL
    # Two labels of a poll that begin alike must not look the same.
    assert len({label("x" * 300), label("x" * 301)}) == 2


def test_batches_hold_every_ballot_once_in_order_with_its_line() -> None:
    ballots: list[Ballot] = [(line, f"voter{line}", ["red"], "") for line in range(2, 12)]
    ballots[4] = (6, "", (), "the row is faulty")
    made = list(batches(iter(ballots), "poll", 4))
    assert [len(batch.request.votes) for batch in made] == [4, 3, 2]
    assert [line for batch in made for line in batch.lines] == [2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert [vote.voter_id for batch in made for vote in batch.request.votes][4] == "voter7"
    assert {batch.request.poll_id for batch in made} == {"poll"}
    assert [rejection for batch in made for rejection in batch.faulty] == [(6, "INVALID_REQUEST", "the row is faulty")]


def test_a_batch_stays_below_the_size_that_a_server_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients.batches, "MAX_BATCH_BYTES", 1_000)
    ballots: list[Ballot] = [(line, f"{line:0256}", ["red"], "") for line in range(2, 12)]
    made = list(batches(iter(ballots), "poll", 2_000))
    assert all(len(CastVotesRequest.SerializeToString(batch.request)) <= 1_000 for batch in made)
    assert [line for batch in made for line in batch.lines] == list(range(2, 12))
    assert [int(vote.voter_id) for batch in made for vote in batch.request.votes] == list(range(2, 12))


def test_the_shipped_election_has_the_known_count() -> None:
    path = Path(__file__).parents[2] / "examples" / "minneapolis-2013-mayor.csv.gz"
    survey = BallotFile(path, ("choice_1",), "ballot_id", frozenset({"overvote"})).survey()
    most = sorted(survey.choices.items(), key=lambda item: -item[1])[:3]
    assert dict(most) == {
        "BETSY HODGES": 28_935,
        "MARK ANDREW": 19_584,
        "DON SAMUELS": 8_335,
    }
    assert (survey.votes, survey.blank, survey.ignored, survey.faulty) == (79_174, 834, 93, 0)
    with gzip.open(path, "rt", newline="") as file:
        assert sum(1 for _ in csv.DictReader(file)) == 80_101


def test_what_was_told_and_fits_nothing_is_suspicious(write: Write) -> None:
    path = write("id,choice\n1,red\n2,blue\n3,overvote\n4,Overvote\n")
    survey = BallotFile(path, ("choice",), "id", frozenset({"overvote", "spoilt"}), separator=";").survey()
    assert told(survey) == {
        "names given with --ignore-choice that no row has": ["'spoilt'"],
        "a --choice-separator that no cell has": ["';'"],
        "choices that look like one given with --ignore-choice": ["line 5: 'Overvote' looks like 'overvote'"],
    }
    assert survey.findings.stop(yes=False)
    assert not survey.findings.stop(yes=True)


def test_a_name_with_a_comma_is_one_choice(write: Write) -> None:
    path = write('choice\n"Smith, John"\n"Doe, Jane"\n"The ""Rock"""\n')
    survey = BallotFile(path, ("choice",)).survey()
    assert list(survey.choices) == ["Smith, John", "Doe, Jane", 'The "Rock"']
    assert not survey.findings.kinds


def test_a_choice_is_kept_as_it_is_seen(write: Write) -> None:
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    path = write(f"choice\n{family}\n\ufeff{family} \n2\u00b2\n22\nred\u00a0 wine\n\u200b\nde\x07af\n")
    survey = BallotFile(path, ("choice",)).survey()
    assert survey.choices == {family: 2, "2\u00b2": 1, "22": 1, "red wine": 1}
    assert (survey.blank, survey.faulty) == (1, 1)
    assert "line 8: choice: character 3 is U+0007, a control character" in every_line(survey)


def test_choices_that_look_the_same_are_refused_or_merged_into_the_first_or_the_named_one(write: Write) -> None:
    path = write("id,choice\n1,YES\n2,yes\n3,no\n4,\uff39es\n5,YES\n")
    survey = BallotFile(path, ("choice",), "id").survey()
    assert survey.findings.stop(yes=True)
    assert every_line(survey) == [
        "line 3: 'yes' looks like 'YES' on line 2",
        "line 5: '\uff39es' looks like 'YES' on line 2",
    ]
    merged = BallotFile(path, ("choice",), "id", merge_similar=True)
    assert merged.survey().choices == {"YES": 4, "no": 1}
    assert [ballot[2] for ballot in read(merged)] == [["YES"], ["YES"], ["no"], ["YES"], ["YES"]]
    named = BallotFile(path, ("choice",), "id", options=("no", "Yes"), merge_similar=True)
    assert named.survey().choices == {"no": 1, "Yes": 4}
    assert [ballot[2] for ballot in read(named)] == [["Yes"], ["Yes"], ["no"], ["Yes"], ["Yes"]]


def test_choices_of_one_shape_are_suspicious_and_merged_when_told(write: Write) -> None:
    path = write("id,choice\n1,O'Neil\n2,\u041eO\n3,O\u2019Neil\n4,o\u041e\n5,OO\n")
    file = BallotFile(path, ("choice",), "id")
    survey = file.survey()
    assert survey.findings.stop(yes=False)
    assert not survey.findings.stop(yes=True)
    assert every_line(survey) == [
        "line 4: 'O\u2019Neil' looks like \"O'Neil\" on line 2: U+2019 RIGHT SINGLE QUOTATION MARK",
        "line 5: 'o\u041e' looks like '\u041eO' on line 3: U+041E CYRILLIC CAPITAL LETTER O",
        "line 6: 'OO' looks like '\u041eO' on line 3: U+041E CYRILLIC CAPITAL LETTER O",
    ]
    merged = BallotFile(path, ("choice",), "id", merge_similar=True)
    assert merged.survey().choices == {"O'Neil": 2, "\u041eO": 3}
    assert not merged.survey().findings.stop(yes=False)
    named = BallotFile(path, ("choice",), "id", options=("OO", "\u041e\u041e"))
    assert "'\u041e\u041e' looks" not in " ".join(every_line(named.survey()))


def test_cells_that_programs_wrote_are_no_candidates_unless_told(write: Write) -> None:
    path = write(
        'id,choice\n1,a\n2,b\n3,N/A\n4, "c"\n5,M\u00c3\u00bcller\n6,null\n7,It\u00e2\u20ac\u2122s\n8,Não\n9,-1\n'
    )
    survey = BallotFile(path, ("choice",), "id").survey()
    assert survey.findings.stop(yes=False)
    assert not survey.findings.stop(yes=True)
    suspicious = [each.examples for each in survey.findings.kinds.values() if each.weight is Weight.SUSPICION]
    assert sorted(line for lines in suspicious for line in lines) == [
        "line 4: 'N/A'",
        "line 5: ' \"c\"'",
        "line 6: 'M\u00c3\u00bcller'",
        "line 7: 'null'",
        "line 8: 'It\u00e2\u20ac\u2122s'",
    ]
    path = write("id,choice\n1,a\n2,b\n3,N/A\n4,null\n")
    told = BallotFile(path, ("choice",), "id", frozenset({"N/A"}), ("null",)).survey()
    assert not told.findings.stop(yes=False)


def test_the_example_of_the_documentation_is_what_is_printed(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write('Timestamp,Email Address,Dates\n1,a@x,"Mon, Tue"\n2,b@x,Tue\n3,c@x,tue\n')
    example = Path("docs/files.md").read_text().split("```\n")[1].splitlines()
    monkeypatch.chdir(path.parent)
    file = BallotFile(Path("votes.csv"), ("Dates",), "Email Address")
    assert file.understood(file.survey()) == example[1:-1]


def test_options_that_look_the_same_are_refused_without_a_line(write: Write) -> None:
    path = write("choice\nTea\n")
    survey = BallotFile(path, ("choice",), options=("Tea", "Milk", "tea")).survey()
    assert every_line(survey) == ["'tea' looks like 'Tea' among the options"]
    assert survey.findings.stop(yes=True)
