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


def count_changes(votes: VotesCast) -> Counter[int]:
    """What is added to the count of each option, by number; below 0 where votes were changed."""
    if votes.count_changes:
        return Counter({change.option_number: change.change for change in votes.count_changes})
    return Counter(votes.option_numbers)
