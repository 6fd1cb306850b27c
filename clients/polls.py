"""`tally poll …`: the life of a poll."""

import asyncio
import uuid
from typing import Annotated

import typer
from rich.table import Table
from tally.command.v1.command_service_pb2 import (
    ClosePollRequest,
    ClosePollResponse,
    CreatePollRequest,
    CreatePollResponse,
    OpenPollRequest,
    OpenPollResponse,
)
from tally.poll.v1.poll_pb2 import PollOption, PollSpec, PollState, VotingMethod
from tally.query.v1.query_service_pb2 import GetPollRequest, GetPollResponse, ListPollsRequest, ListPollsResponse, Poll

from clients.charts import state_name
from clients.connection import Address, CommandServer, QueryServer, find_address
from clients.options import DEFAULT_DATA_DIR, CommandAddress, DataDir, Fresh, OutputOption, PollId, QueryAddress
from clients.output import Output, console, plain, print_fields, print_json, say, shown

app = typer.Typer(no_args_is_help=True, help="Create, open, close and look at polls.")

# A page stays well within what one answer may have, also where polls have many options.
_PAGE = 100


@app.command()
def create(
    title: Annotated[str, typer.Option(help="What voters are asked.")],
    option: Annotated[
        list[str],
        typer.Option(
            metavar="LABEL | ID=LABEL", help="What voters can choose; twice or more. Without ID, the label is the id."
        ),
    ],
    description: Annotated[str, typer.Option(help="Explains the poll to voters.")] = "",
    open_: Annotated[bool, typer.Option("--open", help="Open it at once.")] = False,
    command_address: CommandAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Create a poll."""
    spec = PollSpec(
        title=title,
        description=description,
        options=[_option(text) for text in option],
        method=VotingMethod.VOTING_METHOD_SINGLE_CHOICE,
    )
    address = find_address("command", command_address, data_dir)
    response = asyncio.run(_create(address, spec, opened=open_))
    if output is Output.JSON:
        print_json(plain(response))
    else:
        print_fields({"poll_id": response.poll_id, "state": "OPEN" if open_ else "DRAFT"})


@app.command("open")
def open_poll(
    poll: PollId,
    command_address: CommandAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Let a poll take votes."""
    response = asyncio.run(_open(find_address("command", command_address, data_dir), poll))
    _print_change(poll, "OPEN", response, output)


@app.command()
def close(
    poll: PollId,
    command_address: CommandAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """End a poll for good: no vote is accepted after it, and it cannot be opened again."""
    response = asyncio.run(_close(find_address("command", command_address, data_dir), poll))
    _print_change(poll, "CLOSED", response, output)


@app.command("list")
def list_polls(
    state: Annotated[str | None, typer.Option(metavar="draft|open|closed", help="Only polls in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The most polls to print, newest first.")] = 50,
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """List polls, newest first."""
    wanted = PollState.POLL_STATE_UNSPECIFIED
    if state is not None:
        name = f"POLL_STATE_{state.upper()}"
        if name not in PollState.keys() or name == "POLL_STATE_UNSPECIFIED":  # noqa: SIM118 - not a dict
            raise typer.BadParameter(f"{state!r} is not draft, open or closed", param_hint="--state")
        wanted = PollState.Value(name)
    response = asyncio.run(_list(find_address("query", query_address, data_dir), wanted, limit))
    if output is Output.JSON:
        print_json(plain(response))
        return
    table = Table("poll_id", "state", "options", "created", "title")
    for poll in response.polls:
        created = poll.created_at.ToDatetime().strftime("%Y-%m-%d %H:%M:%SZ")
        table.add_row(poll.poll_id, state_name(poll.state), f"{len(poll.options):,}", created, shown(poll.title))
    console().print(table)
    if response.next_page_token:
        say(f"there are more than {limit:,} polls; see --limit")


@app.command()
def show(
    poll: PollId,
    at_least_as_fresh: Fresh = "",
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show a poll and its options."""
    request = GetPollRequest(poll_id=poll, at_least_as_fresh=at_least_as_fresh)
    response = asyncio.run(_show(find_address("query", query_address, data_dir), request))
    if output is Output.JSON:
        print_json(plain(response))
        return
    print_fields(_fields(response.poll))
    table = Table("option_id", "label")
    for option in response.poll.options:
        table.add_row(shown(option.option_id), shown(option.label))
    console().print(table)


def _option(text: str) -> PollOption:
    name, separator, label = text.partition("=")
    return PollOption(option_id=name, label=label if separator else name)


def _fields(poll: Poll) -> dict[str, str]:
    moments = {
        name: getattr(poll, name).ToJsonString()
        for name in ("created_at", "opened_at", "closed_at")
        if poll.HasField(name)
    }
    fields = {"poll_id": poll.poll_id, "title": poll.title, "description": poll.description}
    fields = {name: value for name, value in fields.items() if value}
    return {**fields, "state": state_name(poll.state), "version": str(poll.version), **moments}


def _print_change(poll_id: str, state: str, response: OpenPollResponse | ClosePollResponse, output: Output) -> None:
    if output is Output.JSON:
        print_json({"poll_id": poll_id, **plain(response)})
    else:
        print_fields({"poll_id": poll_id, "state": state})


async def _create(address: Address, spec: PollSpec, *, opened: bool) -> CreatePollResponse:
    async with CommandServer(address) as commands:
        request = CreatePollRequest(request_id=str(uuid.uuid4()), poll=spec)
        response = await commands.call(commands.stub.CreatePoll, request)
        if opened:
            opening = OpenPollRequest(request_id=str(uuid.uuid4()), poll_id=response.poll_id)
            answer = await commands.call(commands.stub.OpenPoll, opening)
            response.consistency_token = answer.consistency_token
        return response


async def _open(address: Address, poll_id: str) -> OpenPollResponse:
    async with CommandServer(address) as commands:
        request = OpenPollRequest(request_id=str(uuid.uuid4()), poll_id=poll_id)
        return await commands.call(commands.stub.OpenPoll, request)


async def _close(address: Address, poll_id: str) -> ClosePollResponse:
    async with CommandServer(address) as commands:
        request = ClosePollRequest(request_id=str(uuid.uuid4()), poll_id=poll_id)
        return await commands.call(commands.stub.ClosePoll, request)


async def _list(address: Address, state: "PollState.ValueType", limit: int) -> ListPollsResponse:
    found = ListPollsResponse()
    async with QueryServer(address) as queries:
        while True:
            size = min(_PAGE, limit - len(found.polls))
            request = ListPollsRequest(state=state, page_size=size, page_token=found.next_page_token)
            page = await queries.call(queries.stub.ListPolls, request)
            found.polls.extend(page.polls)
            found.next_page_token = page.next_page_token
            if not page.next_page_token or len(found.polls) >= limit:
                return found


async def _show(address: Address, request: GetPollRequest) -> GetPollResponse:
    async with QueryServer(address) as queries:
        return await queries.call(queries.stub.GetPoll, request)
