"""Records on screens of any width: nothing is cut, ids stay whole, and no line is longer than the screen."""

from __future__ import annotations

import random
import re
from uuid import uuid4

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType
from tally.poll.v1.poll_pb2 import VotingMethod
from tally.query.v1.query_service_pb2 import OptionCount, Results

from clients.charts import change_chart, results_table
from clients.listings import Column, Fields, Listing
from clients.output import shown

TITLES = [
    "Lunch?",
    "How should the residents' association spend the surplus of the year, given that the roof leaks?",
    "日本語のとても長い選択肢です。屋根を修理しません。",
    "👨‍👩‍👧 family day 🎉🇩🇪❤️",
    "תיקון הגג של מחסן האופניים",
    "می‌خواهم",
    "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen",
    "",
    "two\nlines",
]


def printed(renderable: RenderableType, width: int) -> str:
    screen = Console(width=width, file=None, highlight=False, markup=False, emoji=False)
    with screen.capture() as capture:
        screen.print(renderable)
    return capture.get()


def letters(text: str) -> str:
    """What is left without the white space and lines between which a text is folded."""
    return re.sub(r"[\s│┃━─┏┓┗┛┡┩╇┳├┤┼┴└┘]", "", text)


@pytest.mark.parametrize("width", [20, 36, 40, 60, 80, 100, 120, 200])
def test_a_listing_shows_all_of_every_cell(width: int) -> None:
    columns = [Column("poll_id"), Column("options", right=True), Column("title", folds=True), Column("outcome", True)]
    rows = [(str(uuid4()), f"{10**n:,}", shown(title), shown(title[::-1])) for n, title in enumerate(TITLES)]
    for size in (0, 1, len(rows)):
        text = printed(Listing(columns, rows[:size]), width)
        assert all(cell_len(line) <= width for line in text.splitlines()), text
        for poll_id, number, _, _ in rows[:size]:
            assert (poll_id in text) or width < 36, text
            assert str(number) in text
        # Cells of one row are beside each other in a table; where they are below each other each is whole.
        if width < 80:
            for row, title in zip(rows[:size], TITLES, strict=False):
                assert letters(title) in letters(text), row


def test_a_table_is_as_wide_as_there_is_room() -> None:
    columns = [Column("poll_id"), Column("title", folds=True)]
    rows = [(str(uuid4()), title) for title in TITLES[:2]]
    wide, narrow = printed(Listing(columns, rows), 200), printed(Listing(columns, rows), 60)
    assert TITLES[1] in wide
    assert "┃" in narrow
    assert TITLES[1] not in narrow
    # Without room for lines between them, columns are still beside each other.
    assert re.search(rf"^{rows[0][0]}  Lunch\?", printed(Listing(columns, rows), 52), re.MULTILINE)
    assert printed(Listing(columns, rows[:1]), 42) == f"{rows[0][0]}\n  title  Lunch?\n"


def test_random_listings_fit_any_screen() -> None:
    chance = random.Random(5)
    for _ in range(200):
        columns = [
            Column(f"{'name ' * chance.randint(1, 3)}{n}", folds=chance.random() < 0.5, right=chance.random() < 0.5)
            for n in range(chance.randint(1, 7))
        ]
        rows = [[chance.choice([*TITLES, "1", str(uuid4())]) for _ in columns] for _ in range(chance.randint(0, 4))]
        width = chance.randint(12, 150)
        footer = ["sum"] * len(columns) if chance.random() < 0.5 else []
        text = printed(Listing(columns, rows, footer, borders=chance.random() < 0.5), width)
        assert all(cell_len(line) <= width for line in text.splitlines()), (width, text)
        everything = letters(text)
        for cell in {cell for row in rows for cell in row}:
            for character in letters(cell):
                assert character in everything


@pytest.mark.parametrize("width", [30, 40, 60, 80])
def test_fields_keep_an_id_whole(width: int) -> None:
    poll_id = str(uuid4())
    text = printed(Fields({"poll_id": poll_id, "a long name of a field": TITLES[1], "none": ""}), width)
    assert (poll_id in text) == (width >= 36)
    assert all(cell_len(line) <= width for line in text.splitlines()), text
    assert letters(TITLES[1]) in letters(text)


@pytest.mark.parametrize("width", [40, 60, 80, 160])
@pytest.mark.parametrize("rows", [6, 12, 22])
def test_a_chart_fits_the_screen_and_says_what_it_leaves_out(width: int, rows: int) -> None:
    counts = [OptionCount(option_id=str(n), label=label or "-", count=10**n) for n, label in enumerate(TITLES * 2)]
    results = Results(poll_id="p", counts=counts, total_votes=10**18, total_weight=10**18)
    method = VotingMethod.VOTING_METHOD_APPROVAL
    text = printed(change_chart(results, method, rows, "A title of a poll"), width)
    lines = text.splitlines()
    assert all(cell_len(line) <= width for line in lines), text
    assert "A title" in text
    named = sum(letters(option.label)[:4] in letters(text) for option in counts)
    assert named >= 1
    if width >= 60:
        assert len(lines) <= rows
        left_out = re.search(r"and (\d+) more options", text)
        assert left_out
        assert printed(results_table(results, method), width).count("%") == len(counts)


def test_two_labels_that_differ_at_their_end_can_be_told_apart() -> None:
    labels = [f"Repair the roof of the bicycle shed, with solar panels, {end}" for end in ("in favour", "against")]
    counts = [OptionCount(option_id=str(n), label=label, count=1) for n, label in enumerate(labels)]
    results = Results(counts=counts, total_votes=2, total_weight=2)
    for width in (40, 80):
        text = printed(change_chart(results, VotingMethod.VOTING_METHOD_SINGLE_CHOICE, 20), width)
        assert "favour" in text
        assert "against" in text
