"""Ballots in a CSV file, one row each, read from the disk as often as needed and never held in memory."""

import codecs
import csv
import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clients.failures import Failure

MAX_OPTIONS = 1_000
MAX_OPTION_ID = 100
MAX_LABEL = 200
MAX_VOTER_ID = 256
_MAX_LINE = 1 << 20
_SHOWN_COLUMNS = 20

# line (where the row begins; the header is on line 1), voter_id, option_id, fault ("": the ballot is good).
Ballot = tuple[int, str, str, str]


class UnusableFile(Failure):
    """The file cannot be imported; the text says where it is wrong."""


@dataclass(frozen=True)
class Survey:
    """What the first reading of a file found. Every row is a vote, faulty, blank or ignored."""

    digest: str
    """BLAKE2b of the decompressed content, 32 hexadecimal digits: the same for votes.csv and votes.csv.gz."""
    choices: dict[str, int]
    """How many good ballots name each choice, most chosen first."""
    faulty: int
    blank: int
    ignored: int

    @property
    def votes(self) -> int:
        return sum(self.choices.values())


@dataclass(frozen=True)
class BallotFile:
    """A file (.csv, .csv.gz or .csv.xz; UTF-8) and the meaning of its columns.

    Without `voter_column`, the file's content and the line name the voter. Rows whose choice is blank or `ignored` are
    not ballots.
    """

    path: Path
    choice_column: str
    voter_column: str | None = None
    ignored: frozenset[str] = frozenset()

    def survey(self) -> Survey:
        """Reads the whole file once, to find every fault before anything is sent. Raises UnusableFile."""
        if self.path.exists() and not self.path.is_file():
            raise UnusableFile(f"{self.path}: not a file that can be read twice")
        digest = hashlib.blake2b(digest_size=16)
        choices: dict[str, int] = {}
        blank = ignored = faulty = 0
        for _, choice, _, fault in self._rows(digest):
            if fault:
                faulty += 1
            elif choice in choices:
                choices[choice] += 1
            elif not choice.strip():
                blank += 1
            elif choice in self.ignored:
                ignored += 1
            elif len(choices) == MAX_OPTIONS:
                raise UnusableFile(
                    f"{self.path}: column {self.choice_column!r} holds more than {MAX_OPTIONS:,} different choices,"
                    " which is the most that a poll can have"
                )
            else:
                choices[choice] = 1
        if not (choices or blank or ignored or faulty):
            raise UnusableFile(f"{self.path}: there is no row below the header")
        ranked = dict(sorted(choices.items(), key=lambda item: -item[1]))
        return Survey(digest.hexdigest(), ranked, faulty, blank, ignored)

    def ballots(self, survey: Survey) -> Iterator[Ballot]:
        """Reads the file again. Raises UnusableFile at its end where it is not the file that was surveyed."""
        digest = hashlib.blake2b(digest_size=16)
        option_ids = {choice: option_id(choice) for choice in survey.choices}
        for line, choice, voter_id, fault in self._rows(digest, survey.digest):
            if fault:
                yield line, "", "", fault
            elif choice in option_ids:
                yield line, voter_id, option_ids[choice], ""
        if digest.hexdigest() != survey.digest:
            raise UnusableFile(f"{self.path}: the file changed while it was being imported")

    def _rows(self, digest: "hashlib.blake2b", voter_prefix: str = "") -> Iterator[tuple[int, str, str, str]]:
        """Each row below the header as line, choice, voter_id, fault; `digest` takes in what is read."""
        # Strict: an unclosed quote would otherwise swallow the rest of the file, silently.
        reader = csv.reader(self._lines(digest), strict=True)
        line = 1
        try:
            header = next(reader, None)
            if header is None:
                raise UnusableFile(f"{self.path}: the file is empty")
            choice_at = self._column(header, self.choice_column)
            voter_at = None if self.voter_column is None else self._column(header, self.voter_column)
            width = len(header)
            line = reader.line_num + 1
            for row in reader:
                if len(row) == width:
                    choice = row[choice_at]
                    if voter_at is None:
                        yield line, choice, f"{voter_prefix}:{line}", ""
                    elif 1 <= len(voter_id := row[voter_at]) <= MAX_VOTER_ID or self._is_no_ballot(choice):
                        yield line, choice, voter_id, ""
                    else:
                        yield line, choice, "", f"voter_id: has {len(voter_id)} characters, not 1 to {MAX_VOTER_ID}"
                elif row:
                    yield line, "", "", f"the row has {len(row)} cells and the header {width}"
                line = reader.line_num + 1
        except csv.Error as error:
            raise UnusableFile(f"{self.path}: line {line}: not valid CSV: {error}") from None

    def _is_no_ballot(self, choice: str) -> bool:
        return choice in self.ignored or not choice.strip()

    def _column(self, header: list[str], name: str) -> int:
        for column in header:
            # Spreadsheets leave nameless columns at the end; those are in nobody's way.
            if column and header.count(column) > 1:
                raise UnusableFile(f"{self.path}: the header names {column!r} more than once")
        if name not in header:
            columns = ", ".join(repr(column[:MAX_OPTION_ID]) for column in header[:_SHOWN_COLUMNS])
            more = f" and {len(header) - _SHOWN_COLUMNS} more" if len(header) > _SHOWN_COLUMNS else ""
            raise UnusableFile(f"{self.path}: there is no column {name!r}; the columns are {columns}{more}")
        return header.index(name)

    def _lines(self, digest: "hashlib.blake2b") -> Iterator[str]:
        number = 0
        try:
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


def option_id(choice: str) -> str:
    """The option that stands for a choice: the choice itself, or its beginning and a digest where it is too long."""
    if len(choice) <= MAX_OPTION_ID:
        return choice
    return f"{choice[: MAX_OPTION_ID - 13]}~{hashlib.blake2b(choice.encode(), digest_size=6).hexdigest()}"


def _open(path: Path) -> io.BufferedReader:
    match path.suffix.lower():
        case ".gz":
            return io.BufferedReader(gzip.open(path))
        case ".xz":
            return io.BufferedReader(lzma.open(path))
        case _:
            return path.open("rb")
