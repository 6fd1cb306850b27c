"""CSV files, read row by row from the disk as often as needed and never held in memory."""

import codecs
import csv
import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clients.failures import Failure

_MAX_LINE = 1 << 20
_SHOWN_COLUMNS = 20
_SHOWN_NAME = 100

# line (where the row begins; the first line of the file is 1), the wanted cells, fault ("": the row has them all).
Row = tuple[int, Sequence[str], str]


class UnusableFile(Failure):
    """The file cannot be used; the text says where it is wrong."""


class ChangedFile(UnusableFile):
    """The file is not the one that was read before."""


@dataclass(frozen=True)
class Sheet:
    """A file (.csv, .csv.gz or .csv.xz; UTF-8) of which some columns are wanted.

    Its first line names the columns. Without any that are wanted it is a plain list: no such line, one cell a row.
    """

    path: Path
    columns: tuple[str, ...]

    def rows(self, digest: "hashlib.blake2b") -> Iterator[Row]:
        """Every row that is not empty. `digest` takes in the decompressed content. Raises UnusableFile."""
        # Strict: an unclosed quote would otherwise swallow the rest of the file, silently.
        reader = csv.reader(self._lines(digest), strict=True)
        line = 1
        try:
            places, width = self._layout(reader) if self.columns else ([0], 1)
            line = reader.line_num + 1
            for row in reader:
                if len(row) == width:
                    yield line, [row[place] for place in places], ""
                elif row:
                    wanted = f"the header {width}" if self.columns else "a plain list 1"
                    yield line, (), f"the row has {len(row)} cells and {wanted}"
                line = reader.line_num + 1
        except csv.Error as error:
            raise UnusableFile(f"{self.path}: line {line}: not valid CSV: {error}") from None

    def rows_again(self, digest: str) -> Iterator[Row]:
        """The same rows. Raises ChangedFile at their end where the content is not the one with this digest, in hex."""
        read = new_digest()
        yield from self.rows(read)
        if read.hexdigest() != digest:
            raise ChangedFile(f"{self.path}: the file changed while it was being read")

    def _layout(self, reader: Iterator[list[str]]) -> tuple[list[int], int]:
        """Where the wanted columns are, and how many there are in all."""
        header = next(reader, None)
        if header is None:
            raise UnusableFile(f"{self.path}: the file is empty")
        for column in header:
            # Spreadsheets leave nameless columns at the end; those are in nobody's way.
            if column and header.count(column) > 1:
                raise UnusableFile(f"{self.path}: the header names {column!r} more than once")
        for name in self.columns:
            if name not in header:
                columns = ", ".join(repr(column[:_SHOWN_NAME]) for column in header[:_SHOWN_COLUMNS])
                more = f" and {len(header) - _SHOWN_COLUMNS} more" if len(header) > _SHOWN_COLUMNS else ""
                raise UnusableFile(f"{self.path}: there is no column {name!r}; the columns are {columns}{more}")
        return [header.index(name) for name in self.columns], len(header)

    def _lines(self, digest: "hashlib.blake2b") -> Iterator[str]:
        number = 0
        try:
            if self.path.exists() and not self.path.is_file():
                raise UnusableFile(f"{self.path}: not a file that can be read twice")
            with _open(self.path) as file:
                while data := file.readline(_MAX_LINE):
                    number += 1
                    if len(data) == _MAX_LINE:
                        raise UnusableFile(f"{self.path}: line {number}: longer than {_MAX_LINE:,} bytes")
                    digest.update(data)
                    yield (data.removeprefix(codecs.BOM_UTF8) if number == 1 else data).decode()
        except UnicodeDecodeError as error:
            raise UnusableFile(f"{self.path}: line {number}: not valid UTF-8 at byte {error.start + 1}") from None
        except OSError as error:
            raise UnusableFile(f"{self.path}: {error.strerror or error}") from None
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise UnusableFile(f"{self.path}: damaged after line {number}: {error}") from None


def new_digest() -> "hashlib.blake2b":
    """Takes in a file's content; 32 hexadecimal digits, the same for votes.csv and votes.csv.gz."""
    return hashlib.blake2b(digest_size=16)


def _open(path: Path) -> io.BufferedReader:
    match path.suffix.lower():
        case ".gz":
            return io.BufferedReader(gzip.open(path))
        case ".xz":
            return io.BufferedReader(lzma.open(path))
        case _:
            return path.open("rb")
