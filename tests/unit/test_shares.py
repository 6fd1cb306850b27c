"""What the counts are shares of: never above 1, never of nothing, and always named."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from rich.console import Console
from tally.poll.v1.poll_pb2 import VotingMethod
from tally.query.v1.query_service_pb2 import OptionCount, Results

from clients.charts import change_chart, change_line, export, results_data, results_table
from clients.shares import base, percent, turnout

SINGLE, APPROVAL = VotingMethod.VOTING_METHOD_SINGLE_CHOICE, VotingMethod.VOTING_METHOD_APPROVAL
UNKNOWN = VotingMethod.VOTING_METHOD_UNSPECIFIED


def counted(*counts: int, **fields: Any) -> Results:
    options = [OptionCount(option_id=str(n), label=f"Option {n}", count=count) for n, count in enumerate(counts)]
    return Results(poll_id="p", counts=options, **fields)


@pytest.mark.parametrize(
    ("results", "method", "whole", "name"),
    [
        (counted(2, 1, total_votes=3, total_weight=3), SINGLE, 3, "votes"),
        (counted(500, 2, total_votes=3, total_weight=502), SINGLE, 502, "votes' weight"),
        (counted(2, 3, total_votes=3, total_weight=3), APPROVAL, 3, "voters"),
        (counted(500, 502, 1, total_votes=3, total_weight=502), APPROVAL, 502, "voters' weight"),
        # Where the method is not known, the base is the same.
        (counted(500, 502, 1, total_votes=3, total_weight=502), UNKNOWN, 502, "voters' weight"),
        # Where the weight of all votes is not known, nothing is guessed.
        (counted(500, 2, total_votes=3, eligible_voters=3), SINGLE, 502, "votes' weight"),
        (counted(2, 3, total_votes=3), APPROVAL, 3, "voters"),
        (counted(500, 502, 1, total_votes=3, eligible_voters=3), APPROVAL, 1003, "all marks"),
        (counted(500, 502, 1, total_votes=3), UNKNOWN, 1003, "all marks"),
        (counted(0, 0, total_votes=0, total_weight=0), APPROVAL, 0, "voters"),
        (counted(), SINGLE, 0, "votes"),
    ],
)
def test_the_base_is_what_no_count_can_exceed(
    results: Results, method: VotingMethod.ValueType, whole: int, name: str
) -> None:
    shares = base(results, method)
    assert (shares.whole, shares.name) == (whole, name)
    assert all((shares.share(option.count) or 0) <= 1 for option in results.counts)
    screen = Console(width=60, file=None)
    with screen.capture() as printed:
        screen.print(results_table(results, method), change_chart(results, method, 20))
    assert all(float(part) <= 100 for part in re.findall(r"([\d.]+)%", printed.get() + change_line(results)))
    assert name.rsplit(maxsplit=1)[-1] in printed.get()
    data = results_data(results, method)
    assert data["share_of"] == name
    assert [option["share"] for option in data["counts"]] == [shares.share(option.count) for option in results.counts]
    assert {row[-2] for row in export(results, method)} <= {name}


def test_any_weighted_approval_has_shares_of_one_at_most() -> None:
    chance = random.Random(3)
    for _ in range(300):
        weights = [chance.choice([1, 1, 1, 7, 1_000_000]) for _ in range(chance.randrange(12))]
        counts = [0] * 4
        for weight in weights:
            for option in chance.sample(range(4), chance.randint(1, 4)):
                counts[option] += weight
        fields = {"total_votes": len(weights), "eligible_voters": chance.choice([0, len(weights), 20])}
        known = {"total_weight": sum(weights)} if chance.random() < 0.7 else {}
        # Without a roll no vote has a weight above 1.
        fields |= {} if set(weights) <= {1} or known else {"eligible_voters": 20}
        results = counted(*counts, **fields, **known)
        for method in (APPROVAL, UNKNOWN):
            shares = base(results, method)
            assert all((shares.share(count) or 0) <= 1 for count in counts), results


def test_a_percentage_is_not_rounded_to_nothing_or_to_all() -> None:
    parts = [(0, 3), (1, 3), (3, 3), (1, 10_000), (9_999, 10_000), (1, 2_000), (1_999, 2_000), (1_998, 2_000), (0, 0)]
    shown = ["0.0%", "33.3%", "100.0%", "<0.1%", ">99.9%", "0.1%", ">99.9%", "99.9%", "-"]
    assert [percent(*part) for part in parts] == shown


def test_more_votes_than_voters_on_the_roll_are_no_percentage() -> None:
    assert turnout(2, 3) == "2 votes of 3 voters (66.7%)"
    assert turnout(10, 3) == "10 votes, 3 voters on the roll"
    assert turnout(10, 0) == "10 votes"
    results = counted(10, total_votes=10, total_weight=10, eligible_voters=3)
    screen = Console(width=100, file=None)
    with screen.capture() as printed:
        screen.print(results_table(results, SINGLE), change_chart(results, SINGLE, 20))
    assert "333" not in printed.get()
    assert printed.get().count("3 voters on the roll") == 2
