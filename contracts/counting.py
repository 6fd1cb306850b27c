"""What a VotesCast event does to the counts of its poll: said once, for the read models and for the recount."""

from collections import Counter

from tally.event.v1.event_pb2 import VotesCast

from contracts.voters import KEY_BYTES


def cast_votes(votes: VotesCast) -> int:
    """How many voters voted, for the first time or anew; each with one mark or several."""
    return len(votes.voter_keys) // KEY_BYTES


def added_votes(votes: VotesCast) -> int:
    """How many more voters have a counted vote."""
    return cast_votes(votes) - votes.replaced


def added_weight(votes: VotesCast) -> int | None:
    """What they add to the sum of the weights of all counted votes, each voter's weight once.

    None where that is not known: an older event does not tell the weight of the votes that it replaced.
    """
    if not votes.weights:
        return added_votes(votes)
    if votes.replaced and not votes.replaced_weight:
        return None
    return sum(votes.weights) - votes.replaced_weight


def count_changes(votes: VotesCast) -> Counter[int]:
    """What is added to the count of each option, by number; below 0 where votes were changed."""
    if votes.count_changes:
        return Counter({change.option_number: change.change for change in votes.count_changes})
    return Counter(votes.option_numbers)
