"""Excel workbooks (.xlsx): the rows of the first worksheet, each cell as the text that Excel shows."""

import io
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, time
from pathlib import Path
from typing import Any

from clients.files import UnusableFile, file_name, workbook

_MOST_BYTES = 64 << 20
_MOST_UNPACKED_BYTES = 1 << 30
# Excel keeps 15 digits of a number: the rest of a longer one is lost, and what is left may be another person's number.
_EXACT = 10**15
_LEADING_ZEROS = re.compile(r"0{2,30}")


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
        self._sheet = sheets[0]
        self.told = f"Excel worksheet {self._sheet.title!r}"
        if others := [repr(sheet.title) for sheet in sheets[1:]]:
            self.told += f" (not read: {', '.join(others[:5])}{', …' if len(others) > 5 else ''})"

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Each row that is not empty, with its number in Excel. Raises UnusableFile."""
        with self._readable():
            # What a program wrote about the size of the sheet may be wrong.
            self._sheet.reset_dimensions()
            for number, cells in enumerate(self._sheet.iter_rows(), 1):
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
