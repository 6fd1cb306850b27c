"""Excel workbooks (.xlsx): the rows of the first worksheet, each cell as the text that Excel shows."""

import io
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, time
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from clients.files import UnusableFile, file_name, workbook

_MOST_BYTES = 64 << 20
_MOST_UNPACKED_BYTES = 1 << 30
# Excel keeps 15 digits of a number: the rest of a longer one is lost, and what is left may be another person's number.
_EXACT = 10**15
_LEADING_ZEROS = re.compile(r"0{2,30}")
_COLUMN = re.compile(r"[A-Z]{1,3}")


class Concealed(NamedTuple):
    """What a worksheet has that a person does not see in it, or that cannot be read; rows and columns from 1."""

    hidden: list[int]
    """Rows that a filter or a person hid."""
    unvalued: list[tuple[int, int]]
    """Row and column of cells with a formula whose value the program that wrote the file did not find out."""
    merged: list[tuple[str, range, range]]
    """Cells that are shown as one, as `B2:B4`, rows and columns; all but the first of them are blank."""


class Workbook:
    """A workbook that was read whole: what can be told of it, and its rows."""

    def __init__(self, path: Path) -> None:
        """Raises UnusableFile."""
        # Here, for only those who have such a file wait for it.
        from openpyxl import load_workbook  # noqa: PLC0415

        self._path = path
        self.content = workbook(path, _MOST_BYTES)
        with self._readable():
            with zipfile.ZipFile(io.BytesIO(self.content)) as archive:
                unpacked = sum(part.file_size for part in archive.infolist())
            if unpacked > _MOST_UNPACKED_BYTES:
                raise UnusableFile(f"{file_name(path)}: a workbook too large to be read; save it as CSV UTF-8")
            with warnings.catch_warnings():
                # Of parts of a workbook that are not read.
                warnings.simplefilter("ignore")
                book = load_workbook(io.BytesIO(self.content), read_only=True, data_only=True)
            sheets = [sheet for sheet in book.worksheets if sheet.sheet_state == "visible"]
        if not sheets:
            raise UnusableFile(f"{file_name(path)}: an Excel workbook without a worksheet; save it as CSV UTF-8")
        self._sheet: Any = sheets[0]
        self._others = sheets[1:]
        self.told = f"Excel worksheet {self._sheet.title!r}"
        if others := [repr(sheet.title) for sheet in self._others]:
            self.told += f" (not read: {', '.join(others[:5])}{', …' if len(others) > 5 else ''})"

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Each row that is not empty, with its number in Excel. Raises UnusableFile."""
        return self._rows(self._sheet)

    def others(self) -> Iterator[tuple[str, list[str]]]:
        """The titles of the other visible worksheets with something in them, and the first row of each."""
        for sheet in self._others:
            for _, row in self._rows(sheet):
                yield sheet.title, row
                break

    def concealed(self) -> Concealed:
        """What a look at the worksheet does not tell. Raises UnusableFile."""
        # Here, as above.
        from openpyxl.utils.cell import range_boundaries  # noqa: PLC0415

        found = Concealed([], [], [])
        number = 0
        with self._readable(), self._sheet._get_source() as part:
            for _, element in ElementTree.iterparse(part):
                match element.tag.rpartition("}")[2]:
                    case "row":
                        number = int(element.get("r", number + 1))
                        if element.get("hidden") in ("1", "true"):
                            found.hidden.append(number)
                        found.unvalued.extend((number, column) for column in _unvalued(element))
                        element.clear()
                    case "mergeCell":
                        area = element.get("ref", "")
                        left, top, right, bottom = (int(place or 1) for place in range_boundaries(area))
                        found.merged.append((area, range(top, bottom + 1), range(left, right + 1)))
        return found

    def _rows(self, sheet: Any) -> Iterator[tuple[int, list[str]]]:
        with self._readable():
            # What a program wrote about the size of the sheet may be wrong.
            sheet.reset_dimensions()
            for number, cells in enumerate(sheet.iter_rows(), 1):
                row = [_text(cell) for cell in cells]
                if any(row):
                    yield number, row

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except UnusableFile:
            raise
        except Exception as error:  # noqa: BLE001 - openpyxl raises whatever a damaged part does to its code
            problem = f"not an Excel workbook that can be read ({error}); save it as CSV UTF-8"
            raise UnusableFile(f"{file_name(self._path)}: {problem}") from None


def _unvalued(row: ElementTree.Element) -> Iterator[int]:
    """The columns of a row in which a formula has no value; that of a text may be empty."""
    from openpyxl.utils.cell import column_index_from_string  # noqa: PLC0415

    column = 0
    for cell in row.iterfind("{*}c"):
        place = _COLUMN.match(cell.get("r", ""))
        column = column_index_from_string(place[0]) if place else column + 1
        if cell.find("{*}f") is not None and not cell.findtext("{*}v") and cell.get("t") != "str":
            yield column


def _text(cell: Any) -> str:
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, int | float) and value == int(value):
        # The format 00000 shows numbers of members, postal codes and the like with their zeros.
        zeros = _LEADING_ZEROS.fullmatch(cell.number_format or "")
        return f"{value:.5E}" if abs(value) >= _EXACT else str(int(value)).zfill(len(zeros[0]) if zeros else 0)
    if isinstance(value, datetime):
        return value.isoformat(" ") if value.time() != time() else value.date().isoformat()
    return str(value)
