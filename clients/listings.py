"""Records as a screen takes them: a table where that fits, and otherwise each record by itself, a field below another.

What must stay whole to be of use, such as an id, is never cut, and not broken while the screen has room for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

# A column of text that is narrower than this cannot be read.
_LEAST_TEXT = 12
_INDENT = "  "
_GAP = "  "


class Column(NamedTuple):
    """A column of a listing."""

    name: str
    # Whether its cells are folded where the screen is narrow; ids, numbers and times are not.
    folds: bool = False
    right: bool = False


class Listing:
    """Records with the same fields, the first of which names the record."""

    def __init__(
        self,
        columns: Sequence[Column],
        rows: Sequence[Sequence[str | Text]],
        footer: Sequence[str | Text] = (),
        *,
        borders: bool = True,
    ) -> None:
        """`footer` are the cells of a last row with sums."""
        self._columns = columns
        self._rows = [[_text(cell) for cell in row] for row in rows]
        self._footer = [_text(cell) for cell in footer]
        self._borders = borders

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for borders in (True, False) if self._borders else (False,):
            # What the table takes beside its cells: two spaces for each column, and lines between and around them.
            number = len(self._columns)
            room = options.max_width - (3 * number + 1 if borders else 2 * (number - 1))
            widths = self._widths(room)
            if sum(widths) <= room:
                yield self._table(widths, borders=borders)
                return
        yield from self._records(console, options.max_width)

    def _widths(self, room: int) -> list[int]:
        """How wide each column is: what it needs at least, and of the room that is left as much as it has a use for."""
        least, widest = [], []
        for number, column in enumerate(self._columns):
            content = max((_width(row[number]) for row in [*self._rows, self._footer] if row), default=0)
            # The words of its name may be below each other.
            word = max(map(cell_len, column.name.split()), default=0)
            least.append(max(word, min(content, _LEAST_TEXT) if column.folds else content))
            widest.append(max(cell_len(column.name), content))
        widths, left = least[:], max(room - sum(least), 0)
        needs = sorted(range(len(least)), key=lambda number: widest[number] - least[number])
        for place, number in enumerate(needs):
            added = min(widest[number] - least[number], left // (len(needs) - place))
            widths[number] += added
            left -= added
        return widths

    def _table(self, widths: Sequence[int], *, borders: bool) -> Table:
        table = Table(show_footer=bool(self._footer), pad_edge=borders)
        if not borders:
            table.box = None
        for number, (column, width) in enumerate(zip(self._columns, widths, strict=True)):
            footer = self._footer[number] if self._footer else ""
            justify: Literal["left", "right"] = "right" if column.right else "left"
            table.add_column(column.name, footer, justify=justify, overflow="fold", width=width)
        for row in self._rows:
            table.add_row(*row)
        return table

    def _records(self, console: Console, width: int) -> Iterator[Text]:
        names = [column.name for column in self._columns]
        for head, *cells in [*self._rows, *([self._footer] if self._footer else [])]:
            name = head.copy()
            name.stylize("bold")
            yield name
            told = {name: cell for name, cell in zip(names[1:], cells, strict=True) if cell}
            yield from _fields(told, console, width, _INDENT)
        if not self._rows:
            yield Text("none", style="dim")


class Fields:
    """Names and values, one pair a line; a value that would be broken beside its name is below it."""

    def __init__(self, values: Mapping[str, str | Text]) -> None:
        self._values = {name: _text(value) for name, value in values.items()}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _fields(self._values, console, options.max_width, "")


def _fields(values: Mapping[str, Text], console: Console, width: int, indent: str) -> Iterator[Text]:
    column = max(map(cell_len, values), default=0)
    beside = width - len(indent) - column - len(_GAP)
    for name, value in values.items():
        if beside >= min(_width(value), _LEAST_TEXT) and beside >= _longest_word(value):
            head = f"{indent}{name}{' ' * (column - cell_len(name))}{_GAP}"
            below = " " * cell_len(head)
        else:
            yield Text(indent + name, style="dim", overflow="fold")
            # Not indented where only that leaves it the room that it needs.
            below = head = indent + _INDENT if _longest_word(value) <= width - len(indent + _INDENT) else ""
        for number, part in enumerate(value.wrap(console, max(width - cell_len(head), 1), overflow="fold")):
            part.rstrip()
            yield Text(below if number else head, style="dim", overflow="fold").append_text(
                Text("", style="not dim") + part
            )


def _text(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(cell, overflow="fold")


def _width(cell: Text) -> int:
    return max((cell_len(line) for line in cell.plain.split("\n")), default=0)


def _longest_word(cell: Text) -> int:
    return max(map(cell_len, cell.plain.split()), default=0)
