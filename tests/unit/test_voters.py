"""The CSV files that a registration reads."""

import gzip
from pathlib import Path

import pytest

from clients.sheets import UnusableFile
from clients.voters import RollFile, Voter


def read(file: RollFile) -> list[Voter]:
    survey = file.survey()
    voters = list(file.voters(survey))
    assert len(voters) == survey.voters
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
    weights = ["0", "1000001", "", "-1", "1.5", " 1", "1_0", "²", "9" * 5_000, "0" * 19 + "15"]
    path = tmp_path / "roll.csv"
    rows = [*(f"v{number},{weight}" for number, weight in enumerate(weights)), ",1", f"{'x' * 257},1", "a", "good,7"]
    path.write_text("id,weight\n" + "\n".join(rows))
    file = RollFile(path, "id", "weight")
    survey = file.survey()
    assert (survey.voters, survey.faulty) == (1, len(rows) - 1)
    assert [fault.partition(": ")[0] for fault in survey.faults] == [f"line {n}" for n in range(2, len(rows) + 1)]
    assert "weight: '0' is not a whole number from 1 to 1,000,000" in survey.faults[0]
    assert "voter_id: has 0 characters" in survey.faults[-3]
    assert "1 cells and the header 2" in survey.faults[-1]
    assert read(file) == [(15, "good", 7)]


def test_many_faults_are_counted_and_few_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "roll.csv"
    path.write_text("a,b\n" * 1_000)
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
