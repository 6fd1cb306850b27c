"""Ballots in a CSV file, one row each."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clients.sheets import Row, Sheet, UnusableFile, new_digest
from clients.voters import voter_id_fault

MAX_OPTIONS = 1_000
MAX_OPTION_ID = 100
MAX_LABEL = 200

# line (where the row begins; the header is on line 1), voter_id, option_ids, fault ("": the ballot is good).
Ballot = tuple[int, str, Sequence[str], str]


@dataclass(frozen=True)
class Survey:
    """What the first reading of a file found. Every row is a vote, faulty, blank or ignored."""

    digest: str
    """BLAKE2b of the decompressed content, 32 hexadecimal digits: the same for votes.csv and votes.csv.gz."""
    choices: dict[str, int]
    """How many good ballots mark each choice, most chosen first."""
    votes: int
    faulty: int
    blank: int
    ignored: int


@dataclass(frozen=True)
class BallotFile:
    """A file (.csv, .csv.gz or .csv.xz; UTF-8) and the meaning of its columns.

    Each of `choice_columns` marks one choice, the same one twice in a row marks it once. Without `voter_column`, the
    file's content and the line name the voter. Choices that are blank or `ignored` mark nothing, and rows without any
    other are not ballots.
    """

    path: Path
    choice_columns: tuple[str, ...]
    voter_column: str | None = None
    ignored: frozenset[str] = frozenset()

    def survey(self) -> Survey:
        """Reads the whole file once, to find every fault before anything is sent. Raises UnusableFile."""
        digest = new_digest()
        choices: dict[str, int] = {}
        votes = blank = ignored = faulty = 0
        for _, cells, _, fault in self._rows(self._sheet.rows(digest)):
            if fault:
                faulty += 1
            elif marked := self._marked(cells):
                votes += 1
                for choice in marked:
                    choices[choice] = choices.get(choice, 0) + 1
                if len(choices) > MAX_OPTIONS:
                    raise UnusableFile(
                        f"{self.path}: {self.columns_named} more than {MAX_OPTIONS:,} different choices,"
                        " which is the most that a poll can have"
                    )
            elif any(cell.strip() for cell in cells):
                ignored += 1
            else:
                blank += 1
        if not (votes or blank or ignored or faulty):
            raise UnusableFile(f"{self.path}: there is no row below the header")
        ranked = dict(sorted(choices.items(), key=lambda item: -item[1]))
        return Survey(digest.hexdigest(), ranked, votes, faulty, blank, ignored)

    def ballots(self, survey: Survey) -> Iterator[Ballot]:
        """Reads the file again. Raises ChangedFile at its end where it is not the file that was surveyed."""
        option_ids = {choice: option_id(choice) for choice in survey.choices}
        for line, cells, voter_id, fault in self._rows(self._sheet.rows_again(survey.digest), survey.digest):
            if fault:
                yield line, "", (), fault
            # No option is blank or ignored.
            elif marked := dict.fromkeys([option_ids[cell] for cell in cells if cell in option_ids]):
                yield line, voter_id, list(marked), ""

    @property
    def columns_named(self) -> str:
        """The beginning of a sentence about the choices: `column 'vote' holds`."""
        columns = ", ".join(repr(column) for column in self.choice_columns)
        return f"columns {columns} hold" if len(self.choice_columns) > 1 else f"column {columns} holds"

    @property
    def _sheet(self) -> Sheet:
        voter_column = () if self.voter_column is None else (self.voter_column,)
        return Sheet(self.path, (*self.choice_columns, *voter_column))

    def _rows(self, rows: Iterator[Row], voter_prefix: str = "") -> Iterator[tuple[int, Sequence[str], str, str]]:
        """Each row as line, the cells with choices, voter_id, fault."""
        for line, cells, fault in rows:
            if fault:
                yield line, (), "", fault
            elif self.voter_column is None:
                yield line, cells, f"{voter_prefix}:{line}", ""
            else:
                *choices, voter_id = cells
                fault_of_voter = voter_id_fault(voter_id)
                if fault_of_voter and self._marked(choices):
                    yield line, (), "", fault_of_voter
                else:
                    yield line, choices, voter_id, ""

    def _marked(self, cells: Sequence[str]) -> dict[str, None]:
        return dict.fromkeys([cell for cell in cells if cell not in self.ignored and cell.strip()])


def option_id(choice: str) -> str:
    """The option that stands for a choice: the choice itself, or its beginning and a digest where it is too long."""
    if len(choice) <= MAX_OPTION_ID:
        return choice
    return f"{choice[: MAX_OPTION_ID - 13]}~{hashlib.blake2b(choice.encode(), digest_size=6).hexdigest()}"
