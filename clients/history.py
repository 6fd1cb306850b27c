"""`tally turnout` and `tally votes`: how many voted when, and where somebody voted."""

import asyncio
from datetime import datetime, timedelta
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from tally.query.v1.query_service_pb2 import (
    GetTurnoutRequest,
    GetTurnoutResponse,
    ListVoterVotesRequest,
    ListVoterVotesResponse,
    Outcome,
)

from clients.charts import state_name
from clients.connection import Address, QueryServer, find_address, query
from clients.moments import duration, moment
from clients.options import DEFAULT_DATA_DIR, DataDir, Fresh, OutputOption, PollId, QueryAddress, read_by
from clients.output import Output, console, plain, print_json, say, shown

_PAGE = 500
# The longest bar, in characters.
_BAR = 40
_DAY = 86_400


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
    output: OutputOption = Output.TABLE,
) -> None:
    """Show how many voted when, also while the results of the poll are hidden. Times are UTC."""
    request = GetTurnoutRequest(poll_id=poll, at_least_as_fresh=at_least_as_fresh)
    if bucket is not None:
        request.bucket.FromTimedelta(bucket)
    for time, field in ((begin, request.start_time), (end, request.end_time)):
        if time is not None:
            field.FromDatetime(time)
    address = find_address("query", query_address, data_dir)
    response = asyncio.run(query(address, lambda queries: queries.GetTurnout, request))
    if output is Output.JSON:
        print_json(plain(response))
    else:
        console().print(_chart(response))


def votes(
    voter: Annotated[str, typer.Argument(metavar="VOTER", help="Who voted, in your own terms; 1 to 256 characters.")],
    limit: Annotated[int, typer.Option(min=1, help="The most votes to print, those in the newest polls first.")] = 50,
    at_least_as_fresh: Fresh = "",
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """List where somebody voted and what became of it. What was chosen is nowhere to be read."""
    address = find_address("query", query_address, data_dir)
    response = asyncio.run(_list(address, voter, limit, at_least_as_fresh))
    if output is Output.JSON:
        print_json(plain(response))
        return
    table = Table("poll_id", "state", "receipt_id", "title", "outcome")
    for vote in response.votes:
        table.add_row(
            vote.receipt.poll_id,
            state_name(vote.poll_state),
            vote.receipt.receipt_id,
            shown(vote.poll_title),
            shown(_told(vote.outcome)) if vote.HasField("outcome") else "",
        )
    console().print(table)
    if response.next_page_token:
        say(f"there are more than {limit:,} votes; see --limit")


def _chart(turnout: GetTurnoutResponse) -> RenderableType:
    length = turnout.bucket.seconds
    form = "%Y-%m-%d" if length % _DAY == 0 else "%Y-%m-%d %H:%M" if length % 60 == 0 else "%Y-%m-%d %H:%M:%S"
    most = max((bucket.votes for bucket in turnout.buckets), default=0) or 1
    table = Table("from", "votes", "", "so far", box=None, pad_edge=False)
    for column in (1, 3):
        table.columns[column].justify = "right"
    for bucket in turnout.buckets:
        table.add_row(
            bucket.start_time.ToDatetime().strftime(form),
            f"{bucket.votes:,}",
            Text("█" * round(_BAR * bucket.votes / most), style="cyan"),
            f"{bucket.cumulative_votes:,}",
        )
    voted = f"{turnout.total_votes:,} votes"
    if turnout.eligible_voters:
        share = turnout.total_votes / turnout.eligible_voters
        voted += f" of {turnout.eligible_voters:,} voters ({share:.1%})"
    as_of = f"version {turnout.version}, as of {turnout.as_of.ToJsonString()}"
    return Group(table, Text(f"{voted}, each line {timedelta(seconds=length)}; {as_of}", style="dim"))


def _told(outcome: Outcome) -> str:
    leaders = ", ".join(f"{leader.label} {leader.count:,}" for leader in outcome.leaders) or "nobody voted"
    return f"{leaders}; {outcome.total_votes:,} votes"


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
