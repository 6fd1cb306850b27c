"""`tally turnout` and `tally votes`: how many voted when, and where somebody voted."""

import asyncio
from datetime import datetime, timedelta
from typing import Annotated

import typer
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from tally.query.v1.query_service_pb2 import (
    GetTurnoutRequest,
    GetTurnoutResponse,
    ListVoterVotesRequest,
    ListVoterVotesResponse,
    Outcome,
    VoterVote,
)

from clients.charts import state_name
from clients.connection import Address, QueryServer, find_address, query
from clients.listings import Column, Listing
from clients.moments import duration, moment
from clients.options import DEFAULT_DATA_DIR, DataDir, Fresh, ListOutputOption, PollId, QueryAddress, read_by
from clients.output import ListOutput, console, plain, print_csv, print_json, say, shown
from clients.poll_ids import find_poll
from clients.shares import turnout as told_turnout

_PAGE = 500
# Of a bar, in characters.
_LONGEST_BAR, _SHORTEST_BAR = 40, 4
_DAY = 86_400
# The most tied options that an outcome names; one that is older than leader_count may have had more.
_MOST_LEADERS = 10
_EXPORTED = ("poll_id", "state", "receipt_id", "title", "outcome")


def turnout(
    poll: PollId,
    bucket: Annotated[
        timedelta | None,
        typer.Option(
            parser=read_by(duration),
            metavar="DURATION",
            help="How long a line of the chart is: 10s, 5m, 1h, 1d. Default: at most 100 lines.",
        ),
    ] = None,
    begin: Annotated[
        datetime | None,
        typer.Option("--from", parser=read_by(moment), metavar="TIME", help="Default: when the poll was opened."),
    ] = None,
    end: Annotated[
        datetime | None,
        typer.Option(
            "--to", parser=read_by(moment), metavar="TIME", help="Default: when it was closed, or the last change."
        ),
    ] = None,
    at_least_as_fresh: Fresh = "",
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: ListOutputOption = ListOutput.TABLE,
) -> None:
    """Show how many voted when, also while the results of the poll are hidden. Times are UTC."""
    poll = find_poll(poll, query_address, data_dir)
    request = GetTurnoutRequest(poll_id=poll, at_least_as_fresh=at_least_as_fresh)
    if bucket is not None:
        request.bucket.FromTimedelta(bucket)
    for time, field in ((begin, request.start_time), (end, request.end_time)):
        if time is not None:
            field.FromDatetime(time)
    address = find_address("query", query_address, data_dir)
    response = asyncio.run(query(address, lambda queries: queries.GetTurnout, request))
    match output:
        case ListOutput.JSON:
            print_json(plain(response))
        case ListOutput.CSV:
            rows = ((b.start_time.ToJsonString(), b.votes, b.cumulative_votes) for b in response.buckets)
            print_csv(("start_time", "votes", "cumulative_votes"), rows)
        case ListOutput.TABLE:
            screen = console()
            screen.print(_chart(response, screen.width))


def votes(
    voter: Annotated[str, typer.Argument(metavar="VOTER", help="Who voted, in your own terms; 1 to 256 characters.")],
    limit: Annotated[int, typer.Option(min=1, help="The most votes to print, those in the newest polls first.")] = 50,
    at_least_as_fresh: Fresh = "",
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: ListOutputOption = ListOutput.TABLE,
) -> None:
    """List where somebody voted and what became of it. What was chosen is nowhere to be read."""
    address = find_address("query", query_address, data_dir)
    response = asyncio.run(_list(address, voter, limit, at_least_as_fresh))
    match output:
        case ListOutput.JSON:
            # It says itself whether there are more.
            print_json(plain(response))
            return
        case ListOutput.CSV:
            print_csv(_EXPORTED, map(_export, response.votes))
        case ListOutput.TABLE:
            columns = [Column("poll_id"), Column("state"), Column("receipt_id")]
            rows = [
                (
                    vote.receipt.poll_id,
                    state_name(vote.poll_state),
                    vote.receipt.receipt_id,
                    shown(vote.poll_title),
                    shown(_told(vote.outcome)) if vote.HasField("outcome") else "",
                )
                for vote in response.votes
            ]
            console().print(Listing([*columns, Column("title", folds=True), Column("outcome", folds=True)], rows))
    if response.next_page_token:
        say(f"there are more than {limit:,} votes; see --limit")


def _chart(turnout: GetTurnoutResponse, width: int) -> RenderableType:
    """A line for each bucket, with a bar where the screen has room for one."""
    length = turnout.bucket.seconds
    form = "%Y-%m-%d" if length % _DAY == 0 else "%Y-%m-%d %H:%M" if length % 60 == 0 else "%Y-%m-%d %H:%M:%S"
    rows = [
        (bucket.start_time.ToDatetime().strftime(form), f"{bucket.votes:,}", f"{bucket.cumulative_votes:,}")
        for bucket in turnout.buckets
    ]
    names = ("from (UTC)", "votes", "so far")
    taken = sum(max(len(row[number]) for row in [names, *rows]) for number in range(len(names)))
    bar = min(_LONGEST_BAR, width - taken - 2 * len(names))
    chart: RenderableType
    if bar < _SHORTEST_BAR:
        chart = Listing([Column(names[0]), *(Column(name, right=True) for name in names[1:])], rows, borders=False)
    else:
        most = max((bucket.votes for bucket in turnout.buckets), default=0) or 1
        chart = Table(box=None, pad_edge=False)
        for name in (names[0], names[1], "", names[2]):
            chart.add_column(name, justify="right" if name in names[1:] else "left", no_wrap=True)
        for (start, votes, so_far), bucket in zip(rows, turnout.buckets, strict=True):
            part = Bar(size=most, begin=0, end=bucket.votes, width=bar, color="cyan")
            chart.add_row(start, votes, part, so_far)
    voted = told_turnout(turnout.total_votes, turnout.eligible_voters)
    as_of = f"version {turnout.version}, as of {turnout.as_of.ToJsonString()}"
    return Group(chart, Text(f"{voted}, each line {timedelta(seconds=length)}, times in UTC; {as_of}", style="dim"))


def _told(outcome: Outcome) -> str:
    """What a poll came to, in one line. It names up to ten of the options that are tied, and counts the others."""
    total = f"{outcome.total_votes:,} votes"
    if not outcome.leaders:
        return f"no votes; {total}"
    named = [leader.label for leader in outcome.leaders]
    count = f"{outcome.leaders[0].count:,}"
    if len(named) == 1:
        return f"{named[0]} {count}; {total}"
    if outcome.leader_count > len(named):
        named.append(f"and {outcome.leader_count - len(named):,} more")
    elif not outcome.leader_count and len(named) == _MOST_LEADERS:
        named.append("and perhaps more")
    return f"tie of {', '.join(named)}, {count} each; {total}"


def _export(vote: VoterVote) -> tuple[object, ...]:
    """The vote's fields that _EXPORTED names."""
    receipt, outcome = vote.receipt, _told(vote.outcome) if vote.HasField("outcome") else None
    return (receipt.poll_id, state_name(vote.poll_state), receipt.receipt_id, vote.poll_title, outcome)


async def _list(address: Address, voter_id: str, limit: int, token: str) -> ListVoterVotesResponse:
    found = ListVoterVotesResponse()
    async with QueryServer(address) as queries:
        while True:
            request = ListVoterVotesRequest(
                voter_id=voter_id,
                page_size=min(_PAGE, limit - len(found.votes)),
                page_token=found.next_page_token,
                at_least_as_fresh=token,
            )
            page = await queries.call(queries.stub.ListVoterVotes, request)
            found.votes.extend(page.votes)
            found.next_page_token = page.next_page_token
            if not page.next_page_token or len(found.votes) >= limit:
                return found
