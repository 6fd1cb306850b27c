"""Voters in a CSV file: an electoral roll."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clients.sheets import Row, Sheet, UnusableFile, new_digest

MAX_VOTER_ID = 256
MAX_WEIGHT = 1_000_000
_KEPT_FAULTS = 100

# line, voter_id, weight
Voter = tuple[int, str, int]


@dataclass(frozen=True)
class RollSurvey:
    """What the first reading of a roll found."""

    digest: str
    voters: int
    """Good rows; one who is named twice counts twice here."""
    faults: list[str]
    """What is wrong with which line; the first 100."""
    faulty: int


@dataclass(frozen=True)
class RollFile:
    """A file (.csv, .csv.gz or .csv.xz; UTF-8) with one voter a row.

    Without `voter_column` it is a plain list of voter ids, without a header. Without `weight_column` each counts 1.
    """

    path: Path
    voter_column: str | None = None
    weight_column: str | None = None

    def survey(self) -> RollSurvey:
        """Reads the whole file once, to find every fault before anything is sent. Raises UnusableFile."""
        digest = new_digest()
        faults: list[str] = []
        good = faulty = 0
        for line, _, weight, fault in self._rows(self._sheet.rows(digest)):
            if weight:
                good += 1
                continue
            faulty += 1
            if len(faults) < _KEPT_FAULTS:
                faults.append(f"line {line}: {fault}")
        if not (good or faulty):
            raise UnusableFile(f"{self.path}: there is no voter in it")
        return RollSurvey(digest.hexdigest(), good, faults, faulty)

    def voters(self, survey: RollSurvey) -> Iterator[Voter]:
        """Reads the file again. Raises UnusableFile at its end where it is not the file that was surveyed."""
        for line, voter_id, weight, _ in self._rows(self._sheet.rows_again(survey.digest)):
            if weight:
                yield line, voter_id, weight

    @property
    def _sheet(self) -> Sheet:
        return Sheet(self.path, tuple(name for name in (self.voter_column, self.weight_column) if name is not None))

    def _rows(self, rows: Iterator[Row]) -> Iterator[tuple[int, str, int, str]]:
        """Each row as line, voter_id, weight, fault; the weight of a faulty row is 0."""
        for line, cells, fault in rows:
            if fault := fault or voter_id_fault(cells[0]):
                yield line, "", 0, fault
            elif self.weight_column is None:
                yield line, cells[0], 1, ""
            # Digits only: int() would also take " 7_0 ".
            elif (text := cells[1]).isdecimal() and len(text) <= 20 and 1 <= (weight := int(text)) <= MAX_WEIGHT:
                yield line, cells[0], weight, ""
            else:
                yield line, "", 0, f"weight: {text[:20]!r} is not a whole number from 1 to {MAX_WEIGHT:,}"


def voter_id_fault(voter_id: str) -> str:
    """What is wrong with a voter's id; empty where it can be used."""
    if 1 <= len(voter_id) <= MAX_VOTER_ID:
        return ""
    return f"voter_id: has {len(voter_id)} characters, not 1 to {MAX_VOTER_ID}"
