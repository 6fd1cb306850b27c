"""`tally status`: how far the read side is behind, as a table, as JSON, and as an exit code."""

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Annotated, Any, NoReturn

import typer
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text
from tally.query.v1.query_service_pb2 import (
    GetReadModelStatusRequest,
    GetReadModelStatusResponse,
    OutboxStatus,
    ReadModelState,
    ReadModelStatus,
    StreamStatus,
)

from clients.connection import Address, QueryServer, find_address
from clients.listings import Column, Fields, Listing
from clients.options import DEFAULT_DATA_DIR, DataDir, OutputOption, QueryAddress, RetryFor
from clients.output import Output, console, plain, print_json, say, shown
from contracts.status import age, is_fresh

_NOT_WELL = 3
_UNKNOWN = "?"


def status(
    max_behind: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How far behind a read model may be and still be well.")
    ] = 10.0,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again each second, until Ctrl-C.")] = False,
    retry_for: RetryFor = 60.0,
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Tell how far events have come on their way from the event log to the readers, and what holds them up.

    What nobody knows at the moment is shown as "?", and is null in JSON. With --watch and --output json: one JSON
    object on each line. Only --watch tries again for --retry-for seconds.

    Exit code: 0 if all is well, 3 if something is behind, parked, silent or unknown, 1 if the query server does not
    answer.
    """
    address = find_address("query", query_address, data_dir)
    if watch:
        asyncio.run(_watch(address, max_behind, retry_for, output))
    elif not asyncio.run(_once(address, max_behind, output)):
        sys.exit(_NOT_WELL)


async def _once(address: Address, max_behind: float, output: Output) -> bool:
    async with QueryServer(address) as queries:
        answer = await queries.call(queries.stub.GetReadModelStatus, GetReadModelStatusRequest())
    troubles = list(troubles_of(answer, max_behind))
    if output is Output.JSON:
        print_json(_data(answer, troubles))
    else:
        console().print(_screen(answer, troubles))
    return not troubles


async def _watch(address: Address, max_behind: float, retry_for: float, output: Output) -> NoReturn:
    terminal = console()
    live = Live(console=terminal, auto_refresh=False)
    as_screen = terminal.is_terminal and output is Output.TABLE
    async with QueryServer(address) as queries:
        with live if as_screen else nullcontext():
            while True:
                request = GetReadModelStatusRequest()
                answer = await queries.call(queries.stub.GetReadModelStatus, request, retry_for=retry_for, on_lost=say)
                troubles = list(troubles_of(answer, max_behind))
                if output is Output.JSON:
                    print_json(_data(answer, troubles), one_line=True)
                elif as_screen:
                    live.update(_screen(answer, troubles), refresh=True)
                else:
                    print(time.strftime("%H:%M:%SZ", time.gmtime()), "; ".join(troubles) or "all is well", flush=True)
                await asyncio.sleep(1.0)


def troubles_of(answer: GetReadModelStatusResponse, max_behind: float) -> Iterator[str]:
    """What an operator should look at, one line each; nothing where all is well."""
    at = answer.answered_at
    for model in answer.read_models:
        yield from (f"{model.name}: {trouble}" for trouble in _troubles(model, at, max_behind))
    if not answer.HasField("stream"):
        yield "stream: unknown"
    for shard in answer.outbox:
        name = f"outbox {shard.shard}" if shard.shards > 1 else "outbox"
        if not is_fresh(shard.reported_at, at):
            yield f"{name}: {_silence('the relay', shard.reported_at, at)}"
        elif shard.problem:
            yield f"{name}: nothing is published: {shard.problem}"
        elif shard.oldest_seconds > max_behind:
            yield f"{name}: {shard.events:,} events wait, the first for {shard.oldest_seconds:,.1f} s"
    if not answer.outbox or len(answer.outbox) < answer.outbox[0].shards:
        yield "outbox: a relay was never heard of"


def _troubles(model: ReadModelStatus, at: Timestamp, max_behind: float) -> Iterator[str]:
    match model.state:
        case ReadModelState.READ_MODEL_STATE_UNAVAILABLE:
            yield "its store does not answer"
        case ReadModelState.READ_MODEL_STATE_SILENT:
            yield _silence("its projector", model.reported_at, at)
        case ReadModelState.READ_MODEL_STATE_INTERRUPTED:
            yield f"its projector is interrupted: {model.last_error or 'it has just begun'}"
        case ReadModelState.READ_MODEL_STATE_FILLING:
            yield "it is being filled, and is not read until it has everything"
        case ReadModelState.READ_MODEL_STATE_REBUILDING:
            yield "it is being rebuilt for the newest log epoch; until then it shows an earlier history"
        case _ if not model.HasField("events_behind"):
            yield "it is not known how far it is behind"
    if model.events_behind and model.seconds_behind > max_behind:
        yield f"{model.events_behind:,} events and {model.seconds_behind:,.1f} s behind"
    if model.parked_polls:
        yield f"{model.parked_polls:,} polls are parked: an event cannot be applied"


def _silence(who: str, heard_at: Timestamp, at: Timestamp) -> str:
    return f"{who} was last heard of {_ago(heard_at, at)}" if heard_at.seconds else f"{who} was never heard of"


def _data(answer: GetReadModelStatusResponse, troubles: list[str]) -> dict[str, Any]:
    return {"well": not troubles, "troubles": troubles, **plain(answer)}


def _screen(answer: GetReadModelStatusResponse, troubles: list[str]) -> RenderableType:
    at = answer.answered_at
    numbers = ("version", "events behind", "seconds behind", "parked", "gapped", "heard")
    columns = [
        Column("read model"),
        Column("state"),
        *(Column(name, right=True) for name in numbers),
        Column("last error", folds=True),
    ]
    rows = [
        (
            shown(model.name),
            ReadModelState.Name(model.state).removeprefix("READ_MODEL_STATE_").lower(),
            _figure(model, "version"),
            _figure(model, "events_behind"),
            _figure(model, "seconds_behind", ",.1f"),
            _figure(model, "parked_polls"),
            _figure(model, "gapped_polls"),
            _ago(model.reported_at, at),
            shown(f"{model.last_error}, {_ago(model.last_error_at, at)}" if model.last_error else ""),
        )
        for model in answer.read_models
    ]
    way: dict[str, str | Text] = {
        f"outbox {shard.shard}" if shard.shards > 1 else "outbox": _waiting(shard, at) for shard in answer.outbox
    }
    way = way or {"outbox": _UNKNOWN}
    way["stream"] = _stream(answer.stream, at) if answer.HasField("stream") else _UNKNOWN
    verdict = [shown(trouble, style="yellow") for trouble in troubles] or [Text("all is well", style="green")]
    return Group(Listing(columns, rows, borders=False), Text(), Fields(way), Text(), *verdict)


def _waiting(shard: OutboxStatus, at: Timestamp) -> Text:
    oldest = f", the first for {shard.oldest_seconds:,.1f} s" if shard.events else ""
    return Text(f"{shard.events:,} events wait{oldest}; heard {_ago(shard.reported_at, at)}")


def _stream(stream: StreamStatus, at: Timestamp) -> Text:
    return Text(
        f"{stream.messages:,} messages, {stream.first_sequence:,} to {stream.last_sequence:,}, {stream.bytes:,} bytes,"
        f" {stream.consumers:,} consumers; seen {_ago(stream.reported_at, at)}"
    )


def _figure(model: ReadModelStatus, field: str, form: str = ",") -> str:
    return format(getattr(model, field), form) if model.HasField(field) else _UNKNOWN  # type: ignore[arg-type]


def _ago(moment: Timestamp, at: Timestamp) -> str:
    """How long before `at` something was; a Timestamp that is not set is 0."""
    if not moment.seconds:
        return "never"
    return f"{age(moment, at):,.1f} s ago"
