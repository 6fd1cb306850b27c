"""`tally poll …`: the life of a poll."""

import asyncio
import json
import sys
import uuid
from collections.abc import Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Annotated, Final

import typer
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from tally.command.v1.command_service_pb2 import (
    CancelPollRequest,
    CancelPollResponse,
    CertifyPollRequest,
    CertifyPollResponse,
    ClosePollRequest,
    ClosePollResponse,
    CreatePollRequest,
    CreatePollResponse,
    OpenPollRequest,
    OpenPollResponse,
    UpdatePollRequest,
    UpdatePollResponse,
)
from tally.poll.v1.poll_pb2 import Eligibility, PollSpec, PollState, ResultsVisibility, VotingMethod
from tally.query.v1.query_service_pb2 import (
    GetPollDocumentRequest,
    GetPollRequest,
    ListPollsRequest,
    ListPollsResponse,
    Poll,
    Results,
)

from clients import specs
from clients.charts import disagreement, results_data, results_table, state_name
from clients.connection import Address, CommandServer, QueryServer, Refused, command, find_address, not_opened, query
from clients.listings import Column, Listing
from clients.options import (
    DEFAULT_DATA_DIR,
    CommandAddress,
    DataDir,
    Fresh,
    ListOutputOption,
    OutputOption,
    PollId,
    QueryAddress,
    RetryFor,
)
from clients.output import ListOutput, Output, console, plain, print_csv, print_fields, print_json, say, shown
from clients.poll_ids import find_poll
from clients.watchers import describe, watch

# A page stays well within what one answer may have, also where polls have many options.
_PAGE = 100
_NO_AGREEMENT = 4
_TIMES: Final = ("created_at", "opens_at", "opened_at", "closes_at", "closed_at")
_EXPORTED = ("poll_id", "state", "options", *_TIMES, "title")
_STATES = ("draft", "open", "closed", "certified", "cancelled")


def create(
    title: Annotated[str, typer.Option(help="What voters are asked.")],
    option: specs.Options,
    description: specs.Description = None,
    approval: specs.Approval = None,
    max_choices: specs.MaxChoices = None,
    allow_vote_change: specs.AllowVoteChange = None,
    roll: specs.Roll = None,
    results_after_close: specs.ResultsAfterClose = None,
    opens_at: specs.OpensAt = None,
    closes_at: specs.ClosesAt = None,
    open_: Annotated[bool, typer.Option("--open", help="Open it at once.")] = False,
    command_address: CommandAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Create a poll."""
    fields = specs.given(
        title=title,
        option=option,
        description=description,
        approval=bool(approval),
        max_choices=max_choices,
        allow_vote_change=allow_vote_change,
        roll=roll,
        results_after_close=results_after_close,
        opens_at=opens_at,
        closes_at=closes_at,
    )
    address = find_address("command", command_address, data_dir)
    response = asyncio.run(_create(address, PollSpec(**fields), opened=open_))
    times = specs.times_shown(opens_at, closes_at)
    if output is Output.JSON:
        print_json(plain(response))
        _say_times(times)
    else:
        print_fields({"poll_id": response.poll_id, "state": "OPEN" if open_ else "DRAFT", **times})


def update(
    poll: PollId,
    title: Annotated[str | None, typer.Option(help="What voters are asked.")] = None,
    option: specs.Options = None,
    description: specs.Description = None,
    approval: specs.Approval = None,
    max_choices: specs.MaxChoices = None,
    allow_vote_change: specs.AllowVoteChange = None,
    roll: specs.Roll = None,
    results_after_close: specs.ResultsAfterClose = None,
    opens_at: specs.OpensAt = None,
    no_opens_at: Annotated[bool, typer.Option("--no-opens-at", help="It opens when it is told to.")] = False,
    closes_at: specs.ClosesAt = None,
    no_closes_at: Annotated[bool, typer.Option("--no-closes-at", help="It closes when it is told to.")] = False,
    command_address: CommandAddress = None,
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Change a draft: what is given changes, the rest stays. Options are given all together."""
    if (opens_at and no_opens_at) or (closes_at and no_closes_at):
        raise typer.BadParameter("a time cannot be set and cleared at once")
    fields = specs.given(
        title=title,
        option=option,
        description=description,
        approval=approval,
        max_choices=max_choices,
        allow_vote_change=allow_vote_change,
        roll=roll,
        results_after_close=results_after_close,
        opens_at=opens_at,
        closes_at=closes_at,
    )
    cleared = [name for name, clear in (("opens_at", no_opens_at), ("closes_at", no_closes_at)) if clear]
    if not fields and not cleared:
        raise typer.BadParameter("give what to change, such as --title")
    poll = find_poll(poll, query_address, data_dir)
    request = UpdatePollRequest(
        request_id=str(uuid.uuid4()),
        poll_id=poll,
        poll=PollSpec(**fields),
        update_mask=FieldMask(paths=[*fields, *cleared]),
    )
    address = find_address("command", command_address, data_dir)
    response = asyncio.run(command(address, lambda commands: commands.UpdatePoll, request))
    _print_change(poll, "DRAFT", response, output, specs.times_shown(opens_at, closes_at))


def open_poll(
    poll: PollId,
    command_address: CommandAddress = None,
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Let a poll take votes."""
    poll = find_poll(poll, query_address, data_dir)
    request = OpenPollRequest(request_id=str(uuid.uuid4()), poll_id=poll)
    address = find_address("command", command_address, data_dir)
    response = asyncio.run(command(address, lambda commands: commands.OpenPoll, request))
    _print_change(poll, "OPEN", response, output)


def close(
    poll: PollId,
    command_address: CommandAddress = None,
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """End a poll for good: no vote is accepted after it, and it cannot be opened again."""
    poll = find_poll(poll, query_address, data_dir)
    request = ClosePollRequest(request_id=str(uuid.uuid4()), poll_id=poll)
    address = find_address("command", command_address, data_dir)
    response = asyncio.run(command(address, lambda commands: commands.ClosePoll, request))
    _print_change(poll, "CLOSED", response, output)


def cancel(
    poll: PollId,
    command_address: CommandAddress = None,
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Give a poll up for good, draft or open: no vote is accepted after it, and its counts decide nothing."""
    poll = find_poll(poll, query_address, data_dir)
    request = CancelPollRequest(request_id=str(uuid.uuid4()), poll_id=poll)
    address = find_address("command", command_address, data_dir)
    response = asyncio.run(command(address, lambda commands: commands.CancelPoll, request))
    _print_change(poll, "CANCELLED", response, output)


def certify(
    poll: PollId,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait for the outcome, and print it beside the live counts.")
    ] = True,
    retry_for: RetryFor = 60.0,
    command_address: CommandAddress = None,
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Recount a closed poll from its votes. It is CERTIFIED if the recount agrees, and stays CLOSED if not.

    The recount goes on also if you stop to wait for it.

    Exit code: 0 if the recount agreed (with --no-wait: if it was asked for), 4 if it did not agree, 1 after an error,
    2 for wrong usage, 130 if interrupted.
    """
    poll = find_poll(poll, query_address, data_dir)
    address = find_address("command", command_address, data_dir)
    # Found before anything is asked for.
    readers = find_address("query", query_address, data_dir) if wait else None
    request = CertifyPollRequest(request_id=str(uuid.uuid4()), poll_id=poll)
    response = asyncio.run(command(address, lambda commands: commands.CertifyPoll, request))
    if readers is None:
        _print_change(poll, "CLOSED", response, output)
        return
    counted, described = asyncio.run(_recounted(readers, poll, response.consistency_token, retry_for))
    if output is Output.JSON:
        print_json({"results": results_data(counted, described.method, described.title)})
    else:
        console().print(shown(described.title, "bold"), results_table(counted, described.method), sep="\n")
    if disagreement(counted):
        sys.exit(_NO_AGREEMENT)


def list_polls(
    state: Annotated[str | None, typer.Option(metavar="|".join(_STATES), help="Only polls in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The most polls to print, newest first.")] = 50,
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: ListOutputOption = ListOutput.TABLE,
) -> None:
    """List polls, newest first. Times are UTC."""
    wanted = PollState.POLL_STATE_UNSPECIFIED
    if state is not None:
        if state.lower() not in _STATES:
            raise typer.BadParameter(
                f"{state!r} is not {', '.join(_STATES[:-1])} or {_STATES[-1]}", param_hint="--state"
            )
        wanted = PollState.Value(f"POLL_STATE_{state.upper()}")
    response = asyncio.run(_list(find_address("query", query_address, data_dir), wanted, limit))
    match output:
        case ListOutput.JSON:
            # It says itself whether there are more.
            print_json(plain(response))
            return
        case ListOutput.CSV:
            print_csv(_EXPORTED, map(_export, response.polls))
        case ListOutput.TABLE:
            columns = [Column("poll_id"), Column("state"), Column("options", right=True), Column("created")]
            rows = [
                (
                    poll.poll_id,
                    state_name(poll.state),
                    f"{len(poll.options):,}",
                    _second(poll.created_at),
                    _next(poll),
                    shown(poll.title),
                )
                for poll in response.polls
            ]
            console().print(Listing([*columns, Column("next", folds=True), Column("title", folds=True)], rows))
    if response.next_page_token:
        say(f"there are more than {limit:,} polls; see --limit")


def show(
    poll: PollId,
    at_least_as_fresh: Fresh = "",
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show a poll and its options."""
    poll = find_poll(poll, query_address, data_dir)
    request = GetPollRequest(poll_id=poll, at_least_as_fresh=at_least_as_fresh)
    address = find_address("query", query_address, data_dir)
    response = asyncio.run(query(address, lambda queries: queries.GetPoll, request))
    if output is Output.JSON:
        print_json(plain(response))
        return
    print_fields(_fields(response.poll))
    rows = [(shown(option.option_id), shown(option.label)) for option in response.poll.options]
    console().print(Listing([Column("option_id", folds=True), Column("label", folds=True)], rows))


def document(
    poll: PollId,
    at_least_as_fresh: Fresh = "",
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show a poll whole, with its counts, turnout and outcome; with --output json as the document that it is."""
    poll = find_poll(poll, query_address, data_dir)
    request = GetPollDocumentRequest(poll_id=poll, at_least_as_fresh=at_least_as_fresh)
    address = find_address("query", query_address, data_dir)
    response = asyncio.run(query(address, lambda queries: queries.GetPollDocument, request))
    content = json.loads(response.document)
    if output is Output.JSON:
        print_json(content)
        return
    options = content.pop("options")
    print_fields({name: value if isinstance(value, str) else json.dumps(value) for name, value in content.items()})
    rows = [
        (shown(option["option_id"]), shown(option["label"]), f"{option['count']:,}" if "count" in option else "")
        for option in options
    ]
    columns = [Column("option_id", folds=True), Column("label", folds=True), Column("count", right=True)]
    console().print(Listing(columns, rows))


def _fields(poll: Poll) -> dict[str, str]:
    texts = {"poll_id": poll.poll_id, "title": poll.title, "description": poll.description}
    moments = {name: getattr(poll, name).ToJsonString() for name in _TIMES if poll.HasField(name)}
    return {
        **{name: value for name, value in texts.items() if value},
        "state": state_name(poll.state),
        "version": str(poll.version),
        "method": _method(poll),
        "vote changes": "allowed" if poll.allow_vote_change else "no",
        "eligibility": "ROLL" if poll.eligibility == Eligibility.ELIGIBILITY_ROLL else "OPEN",
        "results": ResultsVisibility.Name(poll.results_visibility).removeprefix("RESULTS_VISIBILITY_"),
        **moments,
    }


def _export(poll: Poll) -> tuple[object, ...]:
    """The poll's fields that _EXPORTED names."""
    times = [getattr(poll, name).ToJsonString() if poll.HasField(name) else None for name in _TIMES]
    return (poll.poll_id, state_name(poll.state), len(poll.options), *times, poll.title)


def _method(poll: Poll) -> str:
    name = VotingMethod.Name(poll.method).removeprefix("VOTING_METHOD_")
    if poll.method != VotingMethod.VOTING_METHOD_APPROVAL:
        return name
    return f"{name}, up to {poll.max_choices or len(poll.options):,} options"


def _next(poll: Poll) -> str:
    """What happens to the poll by itself."""
    if poll.state == PollState.POLL_STATE_DRAFT and poll.HasField("opens_at"):
        return f"opens {_second(poll.opens_at)}"
    if poll.state in (PollState.POLL_STATE_DRAFT, PollState.POLL_STATE_OPEN) and poll.HasField("closes_at"):
        return f"closes {_second(poll.closes_at)}"
    return ""


def _second(moment: Timestamp) -> str:
    return moment.ToDatetime().strftime("%Y-%m-%d %H:%M:%SZ")


def _print_change(
    poll_id: str,
    state: str,
    response: UpdatePollResponse | OpenPollResponse | ClosePollResponse | CancelPollResponse | CertifyPollResponse,
    output: Output,
    times: Mapping[str, str] = MappingProxyType({}),
) -> None:
    if output is Output.JSON:
        print_json({"poll_id": poll_id, **plain(response)})
        _say_times(times)
    else:
        print_fields({"poll_id": poll_id, "state": state, **times})


def _say_times(times: Mapping[str, str]) -> None:
    """Beside data for programs, what a person who wrote a time in local time wants to see."""
    for name, when in times.items():
        say(f"{name}: {when}")


async def _create(address: Address, spec: PollSpec, *, opened: bool) -> CreatePollResponse:
    async with CommandServer(address) as commands:
        request = CreatePollRequest(request_id=str(uuid.uuid4()), poll=spec)
        response = await commands.call(commands.stub.CreatePoll, request)
        if opened:
            opening = OpenPollRequest(request_id=str(uuid.uuid4()), poll_id=response.poll_id)
            try:
                answer = await commands.call(commands.stub.OpenPoll, opening)
            except Refused as refused:
                raise not_opened(response.poll_id, refused) from None
            response.consistency_token = answer.consistency_token
        return response


async def _recounted(address: Address, poll_id: str, token: str, retry_for: float) -> tuple[Results, Poll]:
    """The results with the outcome of the recount that was asked for, and what is known of the poll."""

    def has_outcome(results: Results) -> bool:
        # The outcome is the latest event; before it comes, what is shown is that of a recount before this one.
        return results.HasField("certification") and results.certification.certified_at == results.as_of

    async with QueryServer(address) as queries:
        changes = watch(queries, poll_id, at_least_as_fresh=token, retry_for=retry_for, on_lost=say, until=has_outcome)
        async with aclosing(changes):
            *_, outcome = [results async for results in changes]
        return outcome, await describe(queries, poll_id)


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
