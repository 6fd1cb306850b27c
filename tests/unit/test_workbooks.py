"""What a workbook has beyond what a person sees in it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from clients.ballots import BallotFile
from clients.files import UnusableFile
from clients.voters import RollFile


@pytest.fixture
def book() -> Iterator[Any]:
    """A workbook with four ballots; saved as book.xlsx by the test."""
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    sheet.title = "Votes"
    for row in (["id", "choice", "note"], ["1", "a", "x"], ["2", "b", "x"], ["3", "a", "x"], ["4", "b", "x"]):
        sheet.append(row)
    yield book
    book.close()


def told(book: Any, tmp_path: Path) -> dict[str, list[str]]:
    path = tmp_path / "book.xlsx"
    book.save(path)
    findings = BallotFile(path, ("choice",), "id").survey().findings
    assert findings.stop(yes=False) == bool(findings.kinds)
    assert not findings.stop(yes=True)
    return {name.split(",")[0]: finding.examples for name, finding in findings.kinds.items()}


def test_a_plain_worksheet_conceals_nothing(book: Any, tmp_path: Path) -> None:
    book.create_sheet("Empty")
    book.create_sheet("Other").append(["name", "town"])
    book["Votes"].merge_cells("C2:C5")
    book["Votes"]["C2"] = "=A2"
    assert told(book, tmp_path) == {}


def test_rows_that_a_filter_hides_are_told(book: Any, tmp_path: Path) -> None:
    for number in (3, 5):
        book["Votes"].row_dimensions[number].hidden = True
    assert told(book, tmp_path) == {"hidden rows": ["line 3: is not shown", "line 5: is not shown"]}


def test_a_choice_that_is_shown_over_several_rows_is_told(book: Any, tmp_path: Path) -> None:
    book["Votes"].merge_cells("B2:B4")
    assert told(book, tmp_path) == {"merged cells": ["line 2: B2:B4"]}


def test_other_worksheets_with_the_same_columns_are_told(book: Any, tmp_path: Path) -> None:
    book.create_sheet("More").append(["choice", "id"])
    hidden = book.create_sheet("Hidden")
    hidden.append(["choice", "id"])
    hidden.sheet_state = "hidden"
    assert told(book, tmp_path) == {"other worksheets with the same columns": ["'More'"]}


@pytest.mark.parametrize("column", ["A", "B"])
def test_a_formula_without_its_value_is_no_blank_cell(book: Any, tmp_path: Path, column: str) -> None:
    book["Votes"][f"{column}3"] = "=C3"
    path = tmp_path / "book.xlsx"
    book.save(path)
    with pytest.raises(UnusableFile, match="line 3: the file has a formula there, and not its value"):
        BallotFile(path, ("choice",), "id").survey()
    with pytest.raises(UnusableFile, match="line 3: the file has a formula"):
        RollFile(path, "choice", "id").survey()
