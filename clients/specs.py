"""What a poll is to be, as options of the commands that make and change one."""

from datetime import datetime
from typing import Annotated, Any

import typer
from google.protobuf.timestamp_pb2 import Timestamp
from tally.poll.v1.poll_pb2 import Eligibility, PollOption, ResultsVisibility, VotingMethod

from clients.moments import coming_moment, in_both_zones
from clients.options import read_by

_MOMENT = "TIME | +DURATION"
_MOMENT_HELP = "2026-05-01T20:15+02:00; without an offset: local time; +10m, +1h30m or +2d: from now on."

Options = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LABEL | ID=LABEL", help="What voters can choose; twice or more. Without ID, the label is the id."
    ),
]
Description = Annotated[str | None, typer.Option(help="Explains the poll to voters.")]
Approval = Annotated[
    bool | None,
    typer.Option("--approval/--single-choice", help="Whether a vote may mark several options. Default: one."),
]
MaxChoices = Annotated[
    int | None,
    typer.Option(min=0, max=1_000, help="The most options that an approval vote may mark; 0, the default: all."),
]
AllowVoteChange = Annotated[
    bool | None,
    typer.Option(
        "--allow-vote-change/--no-vote-change",
        help="Whether a voter may vote again with other choices: the last vote counts. Default: no.",
    ),
]
Roll = Annotated[
    bool | None,
    typer.Option("--roll/--no-roll", help="Whether only registered voters may vote, see tally register. Default: no."),
]
ResultsAfterClose = Annotated[
    bool | None,
    typer.Option(
        "--results-after-close/--results-live",
        help="Whether the counts stay hidden until the poll is closed; turnout is shown all the same. Default: live.",
    ),
]
OpensAt = Annotated[
    datetime | None,
    typer.Option(parser=read_by(coming_moment), metavar=_MOMENT, help=f"When the poll opens by itself. {_MOMENT_HELP}"),
]
ClosesAt = Annotated[
    datetime | None,
    typer.Option(
        parser=read_by(coming_moment), metavar=_MOMENT, help="When the poll closes by itself; written like --opens-at."
    ),
]


def given(
    *,
    title: str | None,
    option: list[str] | None,
    description: str | None,
    approval: bool | None,
    max_choices: int | None,
    allow_vote_change: bool | None,
    roll: bool | None,
    results_after_close: bool | None,
    opens_at: datetime | None,
    closes_at: datetime | None,
) -> dict[str, Any]:
    """The fields of PollSpec that were given, by name."""
    if approval is False and max_choices is None:
        # It would be left over from an approval poll, and refused.
        max_choices = 0
    fields = {
        "title": title,
        "options": [_option(text) for text in option] if option else None,
        "description": description,
        "method": None if approval is None else _METHODS[approval],
        "max_choices": max_choices,
        "allow_vote_change": allow_vote_change,
        "eligibility": None if roll is None else _ELIGIBILITIES[roll],
        "results_visibility": None if results_after_close is None else _VISIBILITIES[results_after_close],
        "opens_at": _timestamp(opens_at),
        "closes_at": _timestamp(closes_at),
    }
    return {name: value for name, value in fields.items() if value is not None}


def times_shown(opens_at: datetime | None, closes_at: datetime | None) -> dict[str, str]:
    """The times that were given, by name, as the instants that were understood."""
    times = {"opens_at": opens_at, "closes_at": closes_at}
    return {name: in_both_zones(when) for name, when in times.items() if when is not None}


_METHODS = {True: VotingMethod.VOTING_METHOD_APPROVAL, False: VotingMethod.VOTING_METHOD_SINGLE_CHOICE}
_ELIGIBILITIES = {True: Eligibility.ELIGIBILITY_ROLL, False: Eligibility.ELIGIBILITY_OPEN}
_VISIBILITIES = {
    True: ResultsVisibility.RESULTS_VISIBILITY_AFTER_CLOSE,
    False: ResultsVisibility.RESULTS_VISIBILITY_LIVE,
}


def _option(text: str) -> PollOption:
    name, separator, label = text.partition("=")
    return PollOption(option_id=name, label=label if separator else name)


def _timestamp(when: datetime | None) -> Timestamp | None:
    if when is None:
        return None
    timestamp = Timestamp()
    timestamp.FromDatetime(when)
    return timestamp
