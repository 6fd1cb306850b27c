"""The CSV files that a registration reads."""

import gzip
from pathlib import Path

import pytest

from clients.files import UnusableFile
from clients.findings import Weight
from clients.voters import RollFile, RollSurvey, Voter


def read(file: RollFile) -> list[Voter]:
    survey = file.survey()
    voters = list(file.voters(survey))
    assert len(voters) == survey.people
    return voters


def test_a_roll_has_voters_and_weights_in_columns_of_any_order(tmp_path: Path) -> None:
    path = tmp_path / "roll.csv"
    path.write_text("shares,name,id\n2,Ada,a\n\n1000000,Bob,b\n")
    assert read(RollFile(path, "id", "shares")) == [(2, "a", 2), (4, "b", 1_000_000)]
    assert read(RollFile(path, "id")) == [(2, "a", 1), (4, "b", 1)]


def test_a_plain_list_has_no_header(tmp_path: Path) -> None:
    path = tmp_path / "roll.csv.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbfada\r\n"bob, jr."\r\ncleo'))
    assert read(RollFile(path)) == [(1, "ada", 1), (2, "bob, jr.", 1), (3, "cleo", 1)]


def test_every_faulty_row_is_known_by_its_line(tmp_path: Path) -> None:
    weights = ["0", "1000001", "", "-1", "1.5", "1 0", "1_0", "²", "9" * 5_000, "0" * 19 + "15"]
    path = tmp_path / "roll.csv"
    rows = [*(f"v{number},{weight}" for number, weight in enumerate(weights)), ",1", f"{'x' * 257},1", "a", "good,7"]
    path.write_text("id,weight\n" + "\n".join(rows))
    file = RollFile(path, "id", "weight")
    survey = file.survey()
    assert (survey.people, survey.faulty) == (1, len(rows) - 1)
    assert [fault.partition(": ")[0] for fault in survey.faults] == [f"line {n}" for n in range(2, len(rows) + 1)]
    assert "weight: '0' is not a whole number from 1 to 1,000,000" in survey.faults[0]
    assert "voter_id: must have 1 to 256 characters, has 0" in survey.faults[-3]
    assert "weight: '' is not" in survey.faults[-1]
    assert read(file) == [(15, "good", 7)]


def test_many_faults_are_counted_and_few_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "roll.csv"
    path.write_text("a\x07b\n" * 1_000)
    survey = RollFile(path).survey()
    assert (survey.faulty, len(survey.faults)) == (1_000, 100)


def test_an_unusable_roll_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "roll.csv"
    path.write_text("id\n")
    with pytest.raises(UnusableFile, match="no voter"):
        RollFile(path, "id").survey()
    with pytest.raises(UnusableFile, match="no column 'weight'; the columns are 'id'"):
        RollFile(path, "id", "weight").survey()
    file = RollFile(path)
    survey = file.survey()
    path.write_text("id\nada\n")
    with pytest.raises(UnusableFile, match="changed"):
        list(file.voters(survey))


def told(survey: RollSurvey, weight: Weight) -> list[str]:
    """The lines that were found, of this weight."""
    kinds = [finding for finding in survey.findings.kinds.values() if finding.weight is weight]
    return [example for finding in kinds for example in finding.examples]


def test_every_spelling_of_one_voter_is_one_voter_and_told_by_line(tmp_path: Path) -> None:
    path = tmp_path / "roll.csv"
    spellings = [
        "ada@example.org ",
        "ada@example.org\u00a0",
        "\u200bada@example.org",
        "ada\u00ad@example.org",
        "\ufeffada@example.org",
    ]
    path.write_text("voter\nada@example.org\n" + "\n".join(spellings) + "\nJos\u00e9\nJose\u0301\n")
    file = RollFile(path, "voter")
    survey = file.survey()
    assert (survey.rows, survey.people) == (8, 2)
    assert {voter for _, voter, _ in read(file)} == {"ada@example.org", "José"}
    notes = told(survey, Weight.NOTE)
    assert notes[0] == "line 3: 'ada@example.org ' is 'ada@example.org'"
    assert [note.partition(":")[0] for note in notes] == [
        *(f"line {n}" for n in (3, 4, 5, 6, 7, 9)),
        *(f"line {n}" for n in (3, 4, 5, 6, 7, 9)),
    ]
    assert not survey.findings.stop(yes=False)


@pytest.mark.parametrize("first", ["Ada@example.org", "ada@example.org"])
def test_ids_that_differ_in_case_are_suspicious_unless_case_is_folded(tmp_path: Path, first: str) -> None:
    path = tmp_path / "roll.csv"
    second = "ADA@example.org"
    path.write_text(f"{first}\nbob@example.org\n{second}\n")
    survey = RollFile(path).survey()
    assert told(survey, Weight.SUSPICION) == [f"line 3: {second!r} looks like {first!r} on line 1"]
    assert survey.findings.stop(yes=False)
    assert not survey.findings.stop(yes=True)
    folded = RollFile(path, fold_case=True)
    assert folded.survey().people == 2
    assert not folded.survey().findings.stop(yes=False)
    assert {voter for _, voter, _ in read(folded)} == {"ada@example.org", "bob@example.org"}


def test_ids_with_letters_of_another_script_are_suspicious(tmp_path: Path) -> None:
    path = tmp_path / "roll.csv"
    path.write_text('id\nada@x\n\u0430da@x\n"bob"\nM\u00c3\u00bcller\n "cid"\n', encoding="utf-8")
    assert told(RollFile(path, "id").survey(), Weight.SUSPICION) == [
        "line 3: '\u0430da@x' looks like 'ada@x' on line 2: U+0430 CYRILLIC SMALL LETTER A",
        "line 5: 'M\u00c3\u00bcller'",
        "line 6: ' \"cid\"'",
    ]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("<!DOCTYPE html>\n<p>Sign in\n", "a web page"),
        ("\ufeff\n <HTML>\nada\n", "a web page"),
        ('{"voters": [\n"ada"]}\n', "JSON"),
        ('[\n"ada"\n]\n', "JSON"),
        ("{\\rtf1\\ansi\nada\\par}\n", "RTF"),
        ("%PDF-1.4\nada\n", "a PDF"),
    ],
)
def test_what_is_no_table_is_no_list_of_voters(tmp_path: Path, content: str, kind: str) -> None:
    path = tmp_path / "roll.csv"
    for encoding in ("utf-8", "utf-16"):
        path.write_text(content, encoding=encoding)
        with pytest.raises(UnusableFile, match=rf"{kind}.*, not a table"):
            RollFile(path).survey()
    path.write_text("<ada@example.org>\n[x]\n{y}\n")
    assert len(read(RollFile(path))) == 3


def test_letters_that_no_case_joins_are_not_folded(tmp_path: Path) -> None:
    path = tmp_path / "roll.csv"
    path.write_text("k\u0131sa\nkisa\nstra\u00dfe\n", encoding="utf-8")
    assert RollFile(path, fold_case=True).survey().people == 3
    path.write_text("\uff21\uff11\na1\n", encoding="utf-8")
    assert len(told(RollFile(path).survey(), Weight.SUSPICION)) == 1


@pytest.mark.parametrize("numbers", [("00123", "123"), ("123", "0123"), ("\uff11\uff12", "012"), ("0", "000")])
def test_numbers_that_differ_in_zeros_in_front_are_suspicious(tmp_path: Path, numbers: tuple[str, str]) -> None:
    path = tmp_path / "roll.csv"
    path.write_text("id\n" + "\n".join(numbers), encoding="utf-8")
    survey = RollFile(path, "id").survey()
    assert told(survey, Weight.SUSPICION) == [f"line 3: {numbers[1]!r} looks like {numbers[0]!r} on line 2"]
    assert {voter for _, voter, _ in read(RollFile(path, "id"))} == set(numbers)


def test_two_weights_of_one_voter_are_refused_and_the_same_one_is_told(tmp_path: Path) -> None:
    path = tmp_path / "roll.csv"
    path.write_text("voter,weight\nada,3\nbob,1\n ada,35\nbob,1\nADA,3\n")
    survey = RollFile(path, "voter", "weight").survey()
    assert told(survey, Weight.CONTRADICTION) == ["line 4: 'ada' has weight 35, and 3 on line 2"]
    assert "line 5: 'bob' is on line 3 too" in told(survey, Weight.NOTE)
    assert told(survey, Weight.SUSPICION) == ["line 6: 'ADA' looks like 'ada' on line 2"]
    assert survey.findings.stop(yes=True)


@pytest.mark.parametrize(
    ("rows", "likely"),
    [
        (["email", "ada@example.org"], True),
        (["Wer darf w\u00e4hlen?", "ada@example.org", "bob@example.org"], True),
        (["Matrikel", "1001", "1002"], True),
        (["VOTER ID", "x-1"], True),
        (["anna", "bert"], False),
        (["ada@example.org", "bob"], False),
        (["1001", "1002"], False),
        (["email"], False),
    ],
)
def test_a_header_of_a_plain_list_is_not_taken_for_a_voter(tmp_path: Path, rows: list[str], likely: bool) -> None:
    path = tmp_path / "roll.csv"
    path.write_text("\n".join(rows))
    assert bool(told(RollFile(path).survey(), Weight.SUSPICION)) == likely


def test_numbers_that_a_spreadsheet_changed_are_not_taken_for_voters(tmp_path: Path) -> None:
    path = tmp_path / "roll.csv"
    path.write_text("id\n1.23457E+12\n12345.0\n#N/A\nM\ufffdller\n12345\n7E10\n1,2E+05\n")
    survey = RollFile(path, "id", delimiter="\t").survey()
    assert told(survey, Weight.CONTRADICTION) == ["line 2: '1.23457E+12'", "line 8: '1,2E+05'"]
    assert [line.partition(":")[0] for line in told(survey, Weight.SUSPICION)] == ["line 3", "line 4", "line 5"]


def test_a_list_with_several_columns_asks_for_the_voters(tmp_path: Path) -> None:
    path = tmp_path / "roll.csv"
    path.write_text("email;shares\nada@example.org;3\n")
    with pytest.raises(UnusableFile, match=r"has 2 columns \('email', 'shares'\): --voter-column"):
        RollFile(path).survey()
    assert read(RollFile(path, "email", "shares")) == [(2, "ada@example.org", 3)]


def test_a_header_in_the_middle_of_a_list_is_not_taken_for_a_voter(tmp_path: Path) -> None:
    path = tmp_path / "roll.csv"
    path.write_text("E-Mail,name\nada@x,Ada\ne-mail,Name\nbob@x,Bob\n")
    assert told(RollFile(path, "E-Mail").survey(), Weight.SUSPICION) == ["line 3: 'e-mail' would be a voter"]
