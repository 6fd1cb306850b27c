"""Ballots in a file, one row each."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clients.files import UnusableFile, file_name, new_digest
from clients.findings import Findings
from clients.sheets import Form, Row, Sheet
from clients.voters import DAMAGED, QUOTED, People, voter_of
from contracts.text import clean_label, control_character, look, shape, substitute

MAX_OPTIONS = 1_000
MAX_OPTION_ID = 100
MAX_LABEL = 200

_SHOWN_OPTIONS = 40
# Cells whose choices are remembered; there are few different ones, unless a wrong column was named.
_REMEMBERED = 100_000
# What stands between several choices in one cell; the first one is nothing else in a cell.
_SEPARATORS = {";": "semicolon", "|": "pipe", ",": "comma"}

# What programs write where somebody answered nothing, or was not asked.
_NO_ANSWER = re.compile(r"n/a|<na>|null|nan|undefined|-+|[\u2013\u2014]|\\N", re.IGNORECASE)

# line (where the row begins; the header is on line 1), voter_id, option_ids, fault ("": the ballot is good).
Ballot = tuple[int, str, Sequence[str], str]


@dataclass(frozen=True)
class Survey:
    """What the first reading of a file found. Every row is a vote, faulty, blank or ignored."""

    digest: str
    """BLAKE2b of the decompressed content, 32 hexadecimal digits: the same for votes.csv and votes.csv.gz."""
    form: Form
    choices: dict[str, int]
    """How many good ballots mark each choice: those of `options` first, the others as the file first names them."""
    votes: int
    faulty: int
    blank: int
    ignored: int
    people: int
    """Different voters of the votes; 0 where no column names them."""
    merged: dict[str, str]
    """Each choice that looks like another one, and the other, which it counts for."""
    findings: Findings


@dataclass(frozen=True)
class BallotFile:
    """A file with one ballot a row, CSV or .xlsx (see `Sheet`), and the meaning of its columns.

    Each of `choice_columns` marks one choice, with a `separator` several; the same one twice in a row is marked once.
    Without `voter_column`, the file's content and the line name the voter. Choices that are blank or `ignored` mark
    nothing, and rows without any other are not ballots. `options` are choices whether or not a row marks them.
    """

    path: Path
    choice_columns: tuple[str, ...]
    voter_column: str | None = None
    ignored: frozenset[str] = frozenset()
    options: tuple[str, ...] = ()
    separator: str = ""
    merge_similar: bool = False
    fold_case: bool = False
    has_header: bool = True
    encoding: str | None = None
    delimiter: str | None = None

    def survey(self) -> Survey:
        """Reads the whole file once, to find every fault before anything is sent. Raises UnusableFile."""
        form = self._sheet.form()
        digest = new_digest()
        findings = Findings()
        people = People(findings, self.fold_case)
        choices = _Choices(self, findings)
        votes = blank = ignored = faulty = 0
        for line, cells, cell, unreadable in self._rows(self._sheet.rows(form, digest, findings)):
            row = choices.read(cells, line)
            voter_id, fault = self._voter(cell, row, unreadable or row.fault)
            if fault:
                faulty += 1
                findings.note("rows that cannot be counted, and will be rejected", line, fault)
            elif row.marked:
                votes += 1
                choices.count(row.marked, line)
                if self.voter_column is not None and (first := people.named(line, cell, voter_id)):
                    findings.note("rows that name a voter again", line, f"{voter_id!r} is on line {first[0]} too")
            elif row.ignored:
                ignored += 1
            else:
                blank += 1
        if not (votes or blank or ignored or faulty):
            raise UnusableFile(f"{file_name(self.path)}: there is no row below the header")
        choices.conclude(form)
        return Survey(
            digest.hexdigest(),
            form,
            choices.counts,
            votes,
            faulty,
            blank,
            ignored,
            len(people),
            choices.merged,
            findings,
        )

    def ballots(self, survey: Survey) -> Iterator[Ballot]:
        """Reads the file again. Raises ChangedFile at its end where it is not the file that was surveyed."""
        option_ids = {choice: option_id(choice) for choice in survey.choices}
        option_ids |= {choice: option_ids[other] for choice, other in survey.merged.items()}
        choices = _Choices(self, Findings())
        rows = self._sheet.rows_again(survey.form, survey.digest)
        for line, cells, cell, unreadable in self._rows(rows):
            row = choices.read(cells, line)
            voter_id, fault = self._voter(cell, row, unreadable or row.fault)
            if fault:
                yield line, "", (), fault
            elif row.marked:
                # A choice that is not known is one of a file that changed, which is said at its end.
                marked = dict.fromkeys([option_ids.get(choice, "") for choice in row.marked])
                yield line, voter_id or f"{survey.digest}:{line}", list(marked), ""

    def understood(self, survey: Survey, *, with_counts: bool = True) -> list[str]:
        """What was read, as text for people."""
        form = survey.form
        rows = survey.votes + survey.faulty + survey.blank + survey.ignored
        told = [f"{file_name(self.path)}: {form.told}, {rows:,} rows"]
        kinds = ["choice"] * len(self.choice_columns) + ["voter"] * (self.voter_column is not None)
        used = ", ".join(
            f"{kind} {form.header[place]!r} (#{place + 1})" for kind, place in zip(kinds, form.places, strict=True)
        )
        others = self._sheet.columns_told(form)
        told.append(f"columns: {used}" + (f"; not used: {others}" if others else ""))
        of_people = f" of {survey.people:,} people" if self.voter_column is not None else ""
        told.append(
            f"{survey.votes:,} votes{of_people}; {survey.blank:,} blank, {survey.ignored:,} ignored,"
            f" {survey.faulty:,} faulty"
        )
        told.append(f"options ({len(survey.choices):,}):")
        for choice, count in list(survey.choices.items())[:_SHOWN_OPTIONS]:
            told.append(f"  {choice[:MAX_LABEL]}" + (f": {count:,}" if with_counts else ""))
        if len(survey.choices) > _SHOWN_OPTIONS:
            told.append(f"  and {len(survey.choices) - _SHOWN_OPTIONS:,} more")
        return told + survey.findings.lines()

    @property
    def ways(self) -> list[str]:
        """How the file is read beyond the defaults: read otherwise, it is another import."""
        given = {
            "separator": self.separator,
            "encoding": self.encoding,
            "delimiter": self.delimiter,
            "merge similar": self.merge_similar,
            "fold case": self.fold_case,
            "no header": not self.has_header,
            **{f"option {number}": option for number, option in enumerate(self.options)},
        }
        return [f"{name}={value}" for name, value in given.items() if value]

    @property
    def columns_named(self) -> str:
        """The beginning of a sentence about the choices: `column 'vote' holds`."""
        columns = ", ".join(repr(column) for column in self.choice_columns)
        return f"columns {columns} hold" if len(self.choice_columns) > 1 else f"column {columns} holds"

    @property
    def _sheet(self) -> Sheet:
        voter_column = () if self.voter_column is None else (self.voter_column,)
        return Sheet(self.path, (*self.choice_columns, *voter_column), self.has_header, self.encoding, self.delimiter)

    def _voter(self, cell: str, row: "_Marked", fault: str) -> tuple[str, str]:
        """The voter of a ballot, and what is wrong with it; who handed in no ballot does not matter."""
        if fault or not row.marked or self.voter_column is None:
            return "", fault
        return voter_of(cell, self.fold_case)

    def _rows(self, rows: Iterator[Row]) -> Iterator[tuple[int, Sequence[str], str, str]]:
        """Each row as line, the cells with choices, the cell with the voter, why it cannot be read."""
        for line, cells, fault in rows:
            if fault:
                yield line, (), "", fault
            elif self.voter_column is None:
                yield line, cells, "", ""
            else:
                yield line, cells[:-1], cells[-1], ""


@dataclass(frozen=True)
class _Marked:
    """What cells say: the choices that they mark, each once; whether there are ignored ones; why they are unusable."""

    marked: tuple[str, ...] = ()
    ignored: bool = False
    fault: str = ""


@dataclass
class _Choices:
    """Reads cells with choices, and counts what they mark."""

    file: BallotFile
    findings: Findings
    counts: dict[str, int] = field(default_factory=dict)
    merged: dict[str, str] = field(default_factory=dict)
    # look and shape of a choice → the first one with it; choice → the line that named it first, 0: it was told.
    _looks: dict[str, str] = field(default_factory=dict)
    _shapes: dict[str, str] = field(default_factory=dict)
    _lines: dict[str, int] = field(default_factory=dict)
    _read: dict[str, _Marked] = field(default_factory=dict)
    # Choice → whether a row has it.
    _ignored: dict[str, bool] = field(default_factory=dict)
    _looks_of_ignored: dict[str, str] = field(default_factory=dict)
    _taken_apart: bool = False

    def __post_init__(self) -> None:
        self._ignored = dict.fromkeys(map(clean_label, self.file.ignored), False)
        self._looks_of_ignored = {look(choice): choice for choice in self._ignored}
        for option in self.file.options:
            self._counted_as(clean_label(option), 0)

    def read(self, cells: Sequence[str], line: int) -> _Marked:
        """What the cells of one row say together."""
        found = [self._read.get(cell) or self._read_cell(cell, line) for cell in cells]
        if len(found) == 1:
            return found[0]
        marked = dict.fromkeys(choice for each in found for choice in each.marked)
        fault = next((each.fault for each in found if each.fault), "")
        return _Marked(tuple(marked), any(each.ignored for each in found), fault)

    def count(self, marked: Iterable[str], line: int) -> None:
        """Counts a good ballot."""
        for choice in {self._counted_as(choice, line): None for choice in marked}:
            self.counts[choice] += 1

    def conclude(self, form: Form) -> None:
        """Looks at all choices together, after the last row."""
        for choice, met in self._ignored.items():
            if not met:
                self.findings.suspect("names given with --ignore-choice that no row has", 0, repr(choice))
        if self.file.separator and not self._taken_apart:
            self.findings.suspect("a --choice-separator that no cell has", 0, repr(self.file.separator))
        for place in form.places[: len(self.file.choice_columns)]:
            if (name := form.header[place]) in self._lines and self.counts.get(name):
                told = (
                    "a header that is also a choice; --no-header reads a file without one, with columns named #1, #2, …"
                )
                self.findings.suspect(told, form.header_line, repr(name))
        if not self.file.separator:
            self._suspect_lists()

    def _read_cell(self, cell: str, line: int) -> _Marked:
        marked: dict[str, None] = {}
        ignored = False
        fault = ""
        parts = cell.split(self.file.separator) if self.file.separator else [cell]
        self._taken_apart |= len(parts) > 1
        for part in parts:
            choice = clean_label(part)
            if not choice:
                continue
            if problem := control_character(choice):
                fault = f"choice: {problem}"
            elif choice in self._ignored:
                self._ignored[choice] = ignored = True
            else:
                marked[choice] = None
                if choice != part and not self.file.separator:
                    told = "spellings of choices read without white space and invisible characters at the ends, in NFC"
                    self.findings.note(told, line, f"{part!r} is {choice!r}")
                    if QUOTED.fullmatch(part):
                        told = "choices with quotation marks, for white space precedes them"
                        self.findings.suspect(told, line, repr(part))
        found = _Marked(tuple(marked), ignored, fault)
        if len(self._read) < _REMEMBERED:
            self._read[cell] = found
        return found

    def _counted_as(self, choice: str, line: int) -> str:
        """The choice as which a choice counts that may be a new one."""
        if choice in self.counts:
            return choice
        if other := self.merged.get(choice):
            return other
        first = self._looks.setdefault(look(choice), choice)
        meant = self._shapes.setdefault(shape(choice), first)
        if choice != meant:
            place = f"on line {self._lines[meant]}" if self._lines[meant] else "among the options"
            alike = f"{choice!r} looks like {meant!r} {place}{substitute(choice, meant)}"
            if self.file.merge_similar:
                self.merged[choice] = meant
                self.findings.note("choices that look the same, counted as one", line, alike)
                return meant
            if choice != first:
                told = "choices that look the same: --merge-similar counts them as one, or change the file"
                self.findings.refuse(told, line, alike)
            elif line:
                told = "choices of other characters that look the same: --merge-similar counts them as one"
                self.findings.suspect(told, line, alike)
        if len(self.counts) == MAX_OPTIONS:
            raise UnusableFile(
                f"{file_name(self.file.path)}: {self.file.columns_named} more than {MAX_OPTIONS:,} different choices,"
                " which is the most that a poll can have"
            )
        if line and (ignored_one := self._looks_of_ignored.get(look(choice))):
            told = "choices that look like one given with --ignore-choice"
            self.findings.suspect(told, line, f"{choice!r} looks like {ignored_one!r}")
        if line and DAMAGED.fullmatch(choice):
            self.findings.suspect("choices that a spreadsheet or a wrong encoding damaged", line, repr(choice))
        if line and _NO_ANSWER.fullmatch(choice):
            told = "choices with which programs write that there is no answer: --ignore-choice leaves them out"
            self.findings.suspect(told, line, repr(choice))
        self.counts[choice] = 0
        self._lines[choice] = line
        return choice

    def _suspect_lists(self) -> None:
        """Cells with several choices: a part of such a cell is a choice elsewhere, or stands behind a semicolon."""
        for separator, name in _SEPARATORS.items():
            parts = {
                choice: [look(clean_label(part)) for part in choice.split(separator) if part.strip()]
                for choice in self.counts
                if separator in choice and self._lines[choice]
            }
            elsewhere = {look(choice) for choice in self.counts if choice not in parts}
            met: dict[str, int] = {}
            for each in parts.values():
                for part in set(each):
                    met[part] = met.get(part, 0) + 1
            told = (
                f"cells that may hold several choices: --choice-separator '{separator}' takes them apart at each {name}"
            )
            lists = [
                choice
                for choice, each in parts.items()
                if separator == ";" or any(part in elsewhere or met[part] > 1 for part in each)
            ]
            for choice in lists:
                self.findings.suspect(told, self._lines[choice], repr(choice))
            if lists:
                return


def option_id(choice: str) -> str:
    """The option that stands for a choice: the choice itself, or its beginning and a digest where it is too long."""
    return _shortened(choice, MAX_OPTION_ID)


def label(choice: str) -> str:
    """What people see of a choice: the choice itself, or its beginning and a digest where it is too long."""
    return _shortened(choice, MAX_LABEL)


def _shortened(choice: str, length: int) -> str:
    if len(choice) <= length:
        return choice
    return f"{choice[: length - 13]}~{hashlib.blake2b(choice.encode(), digest_size=6).hexdigest()}"
