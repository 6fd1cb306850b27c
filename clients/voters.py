"""Voters in files: the people whom rows name, and electoral rolls."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from clients.files import UnusableFile, file_name, new_digest
from clients.findings import Findings
from clients.sheets import Form, Row, Sheet
from contracts.text import clean_voter_id, look, shape, substitute, voter_id_problem

MAX_WEIGHT = 1_000_000
_KEPT_FAULTS = 100

# What spreadsheets make of long numbers: digits are lost, and two people may have become one.
_SHORTENED = re.compile(r"\d([.,]\d+)?E\+\d+", re.IGNORECASE)
# A number that went through a program which takes all numbers for decimal ones.
_DECIMAL = re.compile(r"\d+[.,]0+")
# What a spreadsheet or a wrong encoding left in the place of a text.
DAMAGED = re.compile(
    r"#(N/A|NAME\?|REF!|VALUE!|DIV/0!|NUM!|NULL!|#+)|.*(\ufffd|[ÃÂ][\u0080-\u00bf\u0152-\u2122]|â€).*", re.DOTALL
)
# A quotation mark behind white space is part of the cell, in every CSV; programs that write one mean it otherwise.
QUOTED = re.compile(r'\s+".*"\s*', re.DOTALL)
# Headers of columns of voters, by their look; beside them, a header is known by how it differs from all other rows.
_HEADERS = {
    *("voter", "voters", "voter_id", "voter id", "voterid", "id", "name", "names", "user", "user id", "username"),
    *(
        "email",
        "e-mail",
        "mail",
        "email address",
        "e-mail address",
        "email addresses",
        "member",
        "members",
        "member id",
    ),
    *("participant", "participants", "student", "student id", "login", "account", "number", "first name", "last name"),
    *("e-mail-adresse", "wähler", "mitglied", "benutzer", "correo", "courriel", "adresse e-mail", "nom", "nombre"),
}

# line, voter_id, weight
Voter = tuple[int, str, int]


def voter_of(cell: str, fold_case: bool) -> tuple[str, str]:
    """The voter id that a cell names, and what is wrong with it; empty where nothing is."""
    voter_id = clean_voter_id(cell.lower() if fold_case else cell)
    problem = voter_id_problem(voter_id)
    return ("", f"voter_id: {problem}") if problem else (voter_id, "")


@dataclass
class People:
    """Who was named so far, and what a person has to know of it; some 200 bytes for each."""

    findings: Findings
    fold_case: bool = False
    # voter_id → the line that named it first, and a number of the caller's.
    _known: dict[str, tuple[int, int]] = field(default_factory=dict)
    # shape of a voter_id that is written otherwise → that voter_id.
    _written: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._known)

    def named(self, line: int, cell: str, voter_id: str, number: int = 0) -> tuple[int, int] | None:
        """Takes in the voter whom a row names, as `voter_of` read the cell. Returns line and number of the row that
        named the same one first, None for the first."""
        self._judge(line, cell, voter_id)
        if first := self._known.get(voter_id):
            return first
        written = shape(voter_id)
        if written.isdecimal():
            # Spreadsheets drop the zeros in front of a member's number.
            written = written.lstrip("0") or "0"
        other = self._written.get(written) or (written if written != voter_id and written in self._known else None)
        if other is not None:
            told = "voters who differ only in letter case, zeros in front, Unicode forms or letters of one shape"
            if not self.fold_case:
                told += "; --fold-case reads ids in lower case"
            alike = f"{voter_id!r} looks like {other!r} on line {self._known[other][0]}"
            self.findings.suspect(told, line, alike + substitute(voter_id, other))
        if written != voter_id:
            self._written.setdefault(written, voter_id)
        self._known[voter_id] = line, number
        return None

    def _judge(self, line: int, cell: str, voter_id: str) -> None:
        if voter_id != cell:
            told = "voter ids read without white space at the ends and invisible characters, in NFC"
            if self.fold_case:
                told += ", in lower case"
            self.findings.note(told, line, f"{cell!r} is {voter_id!r}")
            if QUOTED.fullmatch(cell):
                self.findings.suspect("voter ids with quotation marks, for white space precedes them", line, repr(cell))
        if not voter_id[0].isdigit() and voter_id[0] != "#" and voter_id.isascii():
            return
        if _SHORTENED.fullmatch(voter_id):
            told = "numbers that a spreadsheet shortened: format the column as text, and save the file anew"
            self.findings.refuse(told, line, repr(voter_id))
        elif _DECIMAL.fullmatch(voter_id):
            self.findings.suspect("numbers with a fraction of zero as voter ids", line, repr(voter_id))
        elif DAMAGED.fullmatch(voter_id):
            self.findings.suspect("voter ids that a spreadsheet or a wrong encoding damaged", line, repr(voter_id))


@dataclass(frozen=True)
class RollSurvey:
    """What the first reading of a roll found."""

    digest: str
    form: Form
    people: int
    """Different voters."""
    repeated: frozenset[int]
    """The lines of rows that name a voter again."""
    weight: int
    """Of all these people together."""
    faults: list[str]
    """What is wrong with which line; the first 100."""
    faulty: int
    findings: Findings

    @property
    def rows(self) -> int:
        """Rows that are not empty."""
        return self.people + len(self.repeated) + self.faulty


@dataclass(frozen=True)
class RollFile:
    """A file with one voter a row: CSV or .xlsx, see `Sheet`.

    Without `voter_column` it is a plain list of voter ids, without a header. Without `weight_column` each counts 1.
    """

    path: Path
    voter_column: str | None = None
    weight_column: str | None = None
    fold_case: bool = False
    has_header: bool = True
    encoding: str | None = None
    delimiter: str | None = None

    def survey(self) -> RollSurvey:
        """Reads the whole file once, to find every fault before anything is sent. Raises UnusableFile."""
        form = self._sheet.form()
        digest = new_digest()
        faults: list[str] = []
        findings = Findings()
        people = People(findings, self.fold_case)
        header = _Header()
        title = look(form.header[form.places[0]])
        repeated: set[int] = set()
        good = faulty = total = 0
        for line, cell, voter_id, weight, fault in self._rows(self._sheet.rows(form, digest, findings)):
            header.take(line, voter_id)
            if fault:
                faulty += 1
                if len(faults) < _KEPT_FAULTS:
                    faults.append(f"line {line}: {fault}")
                continue
            good += 1
            if self.voter_column is not None and look(voter_id) == title:
                told = "rows that repeat the header; lists put one behind the other have it twice"
                findings.suspect(told, line, f"{voter_id!r} would be a voter")
            first = people.named(line, cell, voter_id, weight)
            if first is None:
                total += weight
                continue
            repeated.add(line)
            if first[1] == weight:
                findings.note("rows that name a voter again", line, f"{voter_id!r} is on line {first[0]} too")
            else:
                told = "voters with two weights"
                findings.refuse(told, line, f"{voter_id!r} has weight {weight:,}, and {first[1]:,} on line {first[0]}")
        if not (good or faulty):
            raise UnusableFile(f"{file_name(self.path)}: there is no voter in it")
        if self.voter_column is None and header.is_likely():
            told = f"a first row that may be a header; --voter-column {header.first!r} takes it for one"
            findings.suspect(told, header.line, f"{header.first!r} would be a voter")
        return RollSurvey(digest.hexdigest(), form, len(people), frozenset(repeated), total, faults, faulty, findings)

    def voters(self, survey: RollSurvey) -> Iterator[Voter]:
        """Reads the file again, each voter once. Raises ChangedFile at its end where it is not the surveyed file."""
        for line, _, voter_id, weight, fault in self._rows(self._sheet.rows_again(survey.form, survey.digest)):
            if not fault and line not in survey.repeated:
                yield line, voter_id, weight

    def understood(self, survey: RollSurvey) -> list[str]:
        """What was read, as text for people."""
        told = [f"{file_name(self.path)}: {survey.form.told}, {survey.rows:,} rows"]
        if self.voter_column is not None:
            names = ["voter", "weight"]
            used = ", ".join(
                f"{name} {survey.form.header[place]!r} (#{place + 1})"
                for name, place in zip(names, survey.form.places, strict=False)
            )
            others = self._sheet.columns_told(survey.form)
            told.append(f"columns: {used}" + (f"; not used: {others}" if others else ""))
        weight = f" with a weight of {survey.weight:,} together" if self.weight_column is not None else ""
        told.append(f"{survey.people:,} people{weight}")
        return told + survey.findings.lines()

    @property
    def _sheet(self) -> Sheet:
        columns = tuple(name for name in (self.voter_column, self.weight_column) if name is not None)
        return Sheet(self.path, columns, self.has_header, self.encoding, self.delimiter)

    def _rows(self, rows: Iterator[Row]) -> Iterator[tuple[int, str, str, int, str]]:
        """Each row as line, cell of the voter, voter_id, weight, fault."""
        for line, cells, unreadable in rows:
            if unreadable:
                yield line, "", "", 0, unreadable
                continue
            if not cells[0].strip() and not any(cell.strip() for cell in cells):
                # Of a spreadsheet, a row without anything.
                continue
            voter_id, fault = voter_of(cells[0], self.fold_case)
            if fault or self.weight_column is None:
                yield line, cells[0], voter_id, 1, fault
            # Digits only: int() would also take "7_0".
            elif (
                (text := cells[1].strip()).isdecimal() and len(text) <= 20 and 1 <= (weight := int(text)) <= MAX_WEIGHT
            ):
                yield line, cells[0], voter_id, weight, ""
            else:
                wrong = f"weight: {text[:20]!r} is not a whole number from 1 to {MAX_WEIGHT:,}"
                yield line, cells[0], voter_id, 0, wrong


class _Header:
    """Whether the first row of a plain list looks like a header: it is called like one, or differs from all others."""

    def __init__(self) -> None:
        self.line = 0
        self.first = ""
        self._others = self._addresses = self._numbers = 0

    def take(self, line: int, voter_id: str) -> None:
        """The next row, in order."""
        if not self.line:
            self.line, self.first = line, voter_id
            return
        self._others += 1
        self._addresses += "@" in voter_id
        self._numbers += voter_id.isdecimal()

    def is_likely(self) -> bool:
        """Asked after the last row."""
        if not self.first or not self._others:
            return False
        lacks_at = self._addresses == self._others and "@" not in self.first
        lacks_digits = self._numbers == self._others and not any(map(str.isdecimal, self.first))
        return lacks_at or lacks_digits or look(self.first) in _HEADERS
