"""What part of the votes an option has, and what that is a part of: for every table, chart and export."""

from typing import NamedTuple

from tally.poll.v1.poll_pb2 import VotingMethod
from tally.query.v1.query_service_pb2 import Results


class Base(NamedTuple):
    """What the counts of a poll are shares of."""

    # The sum of all shares that are possible for one option; 0 without votes.
    whole: int
    # Its name, as in "shares of the votes".
    name: str
    # Whether some vote counts more than 1.
    weighted: bool

    def share(self, count: int) -> float | None:
        """The part that a count is, from 0 to 1; None without votes."""
        return count / self.whole if self.whole else None

    def percent(self, count: int) -> str:
        """The same for people: 33.3%."""
        return percent(count, self.whole)


def base(results: Results, method: "VotingMethod.ValueType") -> Base:
    """What the counts are shares of: the weight of all counted votes, each voter's once, so that no share is above 1.

    `method` may be VOTING_METHOD_UNSPECIFIED where it is not known. Where the server does not know the weight of all
    votes, only single choices and polls without an electoral roll have that base, and the rest are shares of all marks.
    """
    votes, marks = results.total_votes, sum(option.count for option in results.counts)
    single = method == VotingMethod.VOTING_METHOD_SINGLE_CHOICE
    of = "votes" if single else "voters"
    if results.HasField("total_weight"):
        whole = results.total_weight
    elif single:
        whole = marks
    elif method == VotingMethod.VOTING_METHOD_APPROVAL and not results.eligible_voters:
        whole = votes
    else:
        return Base(marks, "all marks", weighted=False)
    weighted = whole != votes
    return Base(whole, f"{of}' weight" if weighted else of, weighted)


def percent(part: int, whole: int) -> str:
    """A part of a whole in percent: never 0.0% for something, nor 100.0% for less than all; "-" of nothing."""
    if not whole:
        return "-"
    if part and part / whole < 0.0005:
        return "<0.1%"
    if part < whole and part / whole >= 0.9995:
        return ">99.9%"
    return f"{part / whole:.1%}"


def turnout(votes: int, eligible_voters: int) -> str:
    """How many counted votes there are, and of how many voters who may vote: `2 votes of 3 voters (66.7%)`."""
    voted = f"{votes:,} votes"
    if not eligible_voters:
        return voted
    if votes > eligible_voters:
        # More than are on the roll can vote where the poll was opened to all after its roll was filled.
        return f"{voted}, {eligible_voters:,} voters on the roll"
    return f"{voted} of {eligible_voters:,} voters ({percent(votes, eligible_voters)})"
