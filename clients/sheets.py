"""Tables in files: which rows and columns they have, read row by row as often as needed."""

import csv
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from clients.files import ChangedFile, Encoding, UnusableFile, examine, file_name, is_workbook, lines, new_digest
from clients.findings import Findings
from clients.workbooks import Workbook
from contracts.text import clean_label, look

_SHOWN_COLUMNS = 20
_SHOWN_NAME = 100
_SAMPLE_ROWS = 100

DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
# The line with which Excel is told of a delimiter.
_SEP_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
_PLACE = re.compile(r"#([1-9]\d{0,5})")

# line (where the row begins; the first line of the file is 1), the wanted cells, fault ("": the row can be used).
Row = tuple[int, Sequence[str], str]


class Form(NamedTuple):
    """How a file is written, and where the wanted columns are; as it was found, or told."""

    told: str
    """`UTF-8, comma between cells`."""
    encoding: Encoding | None
    """None: it is a workbook."""
    delimiter: str
    header_line: int
    """0: there is no header."""
    header: tuple[str, ...]
    """The names of all columns; without a header, empty ones."""
    places: tuple[int, ...]
    """Where the wanted columns are, from 0; of a plain list (0,)."""


@dataclass(frozen=True)
class Sheet:
    """A file with a table of which some columns are wanted: CSV in whatever dialect, or an .xlsx workbook.

    A column is named by its header, or `#3` is the third one. Without any that are wanted it is a plain list: no
    header, one cell a row. `encoding` and `delimiter` are found out where they are not given.
    """

    path: Path
    columns: tuple[str, ...]
    has_header: bool = True
    encoding: str | None = None
    delimiter: str | None = None

    def form(self) -> Form:
        """Finds out how the file is written. Raises UnusableFile."""
        if is_workbook(self.path):
            book = Workbook(self.path)
            return self._laid_out(book.told, None, "", book.rows())
        examined = examine(self.path, self.encoding)
        delimiter = self.delimiter or self._delimiter(examined.sample)
        name = next((name for name, each in DELIMITERS.items() if each == delimiter), repr(delimiter))
        told = f"{examined.encoding.told}, {name} between cells"
        records = _records(self.path, lines(self.path, examined.encoding, new_digest()), delimiter)
        return self._laid_out(told, examined.encoding, delimiter, records)

    def rows(self, form: Form, digest: "hashlib.blake2b", findings: Findings) -> Iterator[Row]:
        """Every row that is not empty. `digest` takes in the content. Raises UnusableFile."""
        if form.encoding is None:
            self._look_into(Workbook(self.path), form, findings)
        return self._rows(form, digest, findings)

    def rows_again(self, form: Form, digest: str) -> Iterator[Row]:
        """The same rows. Raises ChangedFile at their end where the content is not the one with this digest, in hex."""
        read = new_digest()
        yield from self._rows(form, read, Findings())
        if read.hexdigest() != digest:
            raise ChangedFile(f"{file_name(self.path)}: the file changed while it was being read")

    def columns_told(self, form: Form) -> str:
        """The columns that are not used, for a person to see; empty where all are."""
        names = [name or "(nameless)" for place, name in enumerate(form.header) if place not in form.places]
        shown = ", ".join(repr(name[:_SHOWN_NAME]) for name in names[:_SHOWN_COLUMNS])
        more = f" and {len(names) - _SHOWN_COLUMNS} more" if len(names) > _SHOWN_COLUMNS else ""
        return f"{shown}{more}"

    def _rows(self, form: Form, digest: "hashlib.blake2b", findings: Findings) -> Iterator[Row]:
        if form.encoding is None:
            book = Workbook(self.path)
            digest.update(book.content)
            records = book.rows()
        else:
            records = _records(self.path, lines(self.path, form.encoding, digest), form.delimiter)
        width, places = len(form.header), form.places
        last = max(places)
        for line, row in records:
            if line <= form.header_line:
                continue
            if len(row) == width:
                yield line, [row[place] for place in places], ""
            elif len(row) > width and any(cell.strip() for cell in row[width:]):
                wanted = f"the header {width}" if form.header_line else f"the first row {width}"
                yield line, (), f"the row has {len(row)} cells and {wanted}"
            elif len(row) > last:
                # Programs leave out empty cells at the end of a row, or add some.
                yield line, [row[place] for place in places], ""
            else:
                cells = f"{len(row)} of {width} cells"
                findings.note("short rows: their missing cells are read as blank", line, cells)
                yield line, [row[place] if place < len(row) else "" for place in places], ""

    def _look_into(self, book: Workbook, form: Form, findings: Findings) -> None:
        """Tells what a person who looks at a worksheet does not see, where it touches the wanted columns."""
        columns = {place + 1 for place in form.places}
        concealed = book.concealed()
        unvalued = [row for row, column in concealed.unvalued if column in columns and row > form.header_line]
        if unvalued:
            raise UnusableFile(
                f"{file_name(self.path)}: line {unvalued[0]}: the file has a formula there, and not its value"
                f" ({len(unvalued):,} such cells); open it in Excel and save it"
            )
        for row in concealed.hidden:
            if row > form.header_line:
                findings.suspect("hidden rows, which are read like the others", row, "is not shown")
        for area, rows, merged in concealed.merged:
            if rows[-1] > max(rows[0], form.header_line) and columns & set(merged):
                findings.suspect("merged cells, of which all but the first are read as blank", rows[0], area)
        wanted = {clean_label(name) for name in self.columns if not _PLACE.fullmatch(name)}
        for title, first in book.others():
            if wanted <= set(map(clean_label, first)):
                told = "other worksheets with the same columns, which are not read: save each as a file of its own"
                findings.suspect(told, 0, repr(title))

    def _laid_out(
        self, told: str, encoding: Encoding | None, delimiter: str, records: Iterator[tuple[int, list[str]]]
    ) -> Form:
        line, first = next(records, (0, []))
        if not first:
            raise UnusableFile(f"{file_name(self.path)}: the file is empty")
        if encoding is not None and len(first) == 1:
            told = f"{told.rpartition(',')[0]}, one column"
        if not self.columns:
            if len(first) > 1:
                cells = ", ".join(repr(cell[:_SHOWN_NAME]) for cell in first[:_SHOWN_COLUMNS])
                raise UnusableFile(
                    f"{file_name(self.path)}: has {len(first)} columns ({cells}): --voter-column says which one names"
                    " the voter; --delimiter, what is between cells"
                )
            return Form(told, encoding, delimiter, 0, ("",), (0,))
        names = [clean_label(cell) for cell in first] if self.has_header else [""] * len(first)
        # Spreadsheets leave nameless columns at the end.
        places = tuple(self._place(name, names) for name in self.columns)
        return Form(told, encoding, delimiter, line if self.has_header else 0, tuple(names), places)

    def _place(self, name: str, names: Sequence[str]) -> int:
        wanted = clean_label(name)
        found = [place for place, each in enumerate(names) if each == wanted and wanted]
        if len(found) == 1:
            return found[0]
        if found:
            places = [f"#{place + 1}" for place in found]
            raise UnusableFile(
                f"{file_name(self.path)}: the header names {name!r} more than once: say which one by its place,"
                f" {', '.join(places[:-1])} or {places[-1]}"
            )
        place = _PLACE.fullmatch(wanted)
        if place and int(place[1]) <= len(names):
            return int(place[1]) - 1
        columns = ", ".join(repr(column[:_SHOWN_NAME]) for column in names[:_SHOWN_COLUMNS])
        more = f" and {len(names) - _SHOWN_COLUMNS} more" if len(names) > _SHOWN_COLUMNS else ""
        alike = [each for each in names if look(each) == look(wanted)]
        hint = f"; do you mean {alike[0]!r}?" if len(alike) == 1 and self.has_header else ""
        if not self.has_header:
            columns, more = f"#1 to #{len(names)}", ""
        raise UnusableFile(
            f"{file_name(self.path)}: there is no column {name!r}; the columns are {columns}{more}{hint}"
        )

    def _delimiter(self, sample: str) -> str:
        """The delimiter under which the header has the wanted columns, and the most rows as many cells as it."""
        if found := _SEP_LINE.match(sample):
            return found[1]
        wanted = (
            {clean_label(name) for name in self.columns if not _PLACE.fullmatch(name)} if self.has_header else set()
        )

        def fit(delimiter: str) -> tuple[int, int, int]:
            rows = []
            try:
                for row in csv.reader(sample.splitlines(keepends=True), delimiter=delimiter):
                    rows += [row] if row else []
                    if len(rows) == _SAMPLE_ROWS:
                        break
            except csv.Error:
                pass
            header = rows[0] if rows else []
            named = len(wanted & set(map(clean_label, header)))
            alike = sum(len(row) == len(header) for row in rows) if len(header) > 1 else 0
            return named, alike, len(header)

        return max(DELIMITERS.values(), key=fit)


def _records(path: Path, text: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Each record of a CSV file that is not empty, with the line on which it begins."""
    # Strict: an unclosed quote would otherwise swallow the rest of the file, silently.
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    line = 1
    try:
        for row in reader:
            if row and not (line == 1 and _SEP_LINE.fullmatch(delimiter.join(row))):
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise UnusableFile(f"{file_name(path)}: line {line}: not valid CSV: {error}") from None
