"""What operators are told of the read models, by a query server that has only their stores to ask."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sysconfig
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import REGISTRY
from tally.event.v1.event_pb2 import Event
from tally.query.v1.query_service_pb2 import (
    READ_MODEL_STATE_INTERRUPTED,
    READ_MODEL_STATE_READING,
    READ_MODEL_STATE_SILENT,
    READ_MODEL_STATE_UNAVAILABLE,
    GetReadModelStatusRequest,
    GetReadModelStatusResponse,
)
from tally.query.v1.query_service_pb2_grpc import QueryServiceStub

from contracts import status
from contracts.read_models import READ_MODELS
from projector.__main__ import ReadDatabaseSettings, RedisSettings, project
from projector.documents import Documents
from projector.live import Live
from projector.views import Views
from query_server.__main__ import QuerySettings
from query_server.__main__ import serve as serve_queries
from relay.__main__ import RelaySettings, relay
from runtime.embedded import Stores
from tests.event_log import EventLog
from tests.processes import eventually
from tests.servers import VOTER_SECRET, serving, sql

if TYPE_CHECKING:
    from tally.query.v1.query_service_pb2_grpc import QueryServiceAsyncStub

TALLY = str(Path(sysconfig.get_path("scripts")) / "tally")
# Those of a read model, which are absent while they are unknown.
FIGURES = ("version", "events_behind", "seconds_behind", "parked_polls", "gapped_polls")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("TALLY_")}


@pytest.fixture
def settings(write_dsn: str, read_dsn: str, nats_url: str, redis_url: str) -> dict[str, str]:
    """Where the stores are, by the names of the settings."""
    return {"write_dsn": write_dsn, "read_dsn": read_dsn, "nats_url": nats_url, "redis_url": redis_url}


class Asked:
    """A query server, asked for the status."""

    def __init__(self, address: str, stub: QueryServiceAsyncStub) -> None:
        self.address = address
        self._stub = stub

    async def status(self) -> GetReadModelStatusResponse:
        return await self._stub.GetReadModelStatus(GetReadModelStatusRequest(), timeout=8)

    async def tally(self, *options: str) -> tuple[int, str]:
        """`tally status`: its exit code and what it prints."""
        process = await asyncio.create_subprocess_exec(
            *(TALLY, "status", "--query-address", self.address, *options),
            env=ENVIRONMENT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(30):
            printed, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, printed.decode()


@asynccontextmanager
async def asking(settings: dict[str, str]) -> AsyncIterator[Asked]:
    listening = asyncio.get_running_loop().create_future()
    query = QuerySettings(query_listen="127.0.0.1:0", voter_secret=VOTER_SECRET, **settings)  # type: ignore[arg-type]

    def ready(port: int, told: Any) -> None:
        listening.set_result(port)
        told(port)

    async with serving(lambda stop, told: serve_queries(query, stop, lambda port: ready(port, told))) as channel:
        yield Asked(f"127.0.0.1:{await listening}", QueryServiceStub(channel))


@asynccontextmanager
async def running(settings: dict[str, str], *services: str) -> AsyncIterator[None]:
    """Some of relay, live, views and documents, in this process."""
    runners: dict[str, Any] = {
        "relay": lambda stop: relay(RelaySettings(**settings), stop),  # type: ignore[arg-type]
        "live": lambda stop: project(Live, RedisSettings(**settings), stop),  # type: ignore[arg-type]
        "views": lambda stop: project(Views, ReadDatabaseSettings(**settings), stop),  # type: ignore[arg-type]
        "documents": lambda stop: project(Documents, ReadDatabaseSettings(**settings), stop),  # type: ignore[arg-type]
    }
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for name in services:
            tasks.create_task(runners[name](stop))
        yield
        stop.set()


def metric(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


async def test_all_is_well_once_everything_is_applied(settings: dict[str, str], log: EventLog) -> None:
    poll = await log.poll()
    for _ in range(10):
        await log.cast(poll)
    async with asking(settings) as asked, running(settings, "relay", *READ_MODELS):

        async def well() -> None:
            answer = await asked.status()
            assert [model.name for model in answer.read_models] == [*READ_MODELS]
            for model in answer.read_models:
                assert model.state == READ_MODEL_STATE_READING
                assert (model.version, model.parked_polls, model.gapped_polls) == (12, 0, 0)
                assert model.HasField("events_behind")
                assert model.HasField("seconds_behind")
                assert (model.events_behind, model.seconds_behind) == (0, 0.0)
            assert (answer.stream.messages, answer.stream.last_sequence, answer.stream.consumers) == (12, 12, 3)
            assert [shard.events for shard in answer.outbox] == [0]

        await eventually(well)
        code, printed = await asked.tally("--output", "json")
        assert (code, json.loads(printed)["troubles"]) == (0, [])
        code, printed = await asked.tally()
        assert (code, "all is well" in printed) == (0, True)

        async def measured() -> None:
            for name in READ_MODELS:
                assert [metric(f"tally_status_{field}", read_model=name) for field in FIGURES] == [12, 0, 0, 0, 0]
                assert metric("tally_status_reading", read_model=name) == 1
            assert metric("tally_status_outbox_events") == metric("tally_status_outbox_oldest_seconds") == 0
            assert metric("tally_status_stream_messages") == 12

        await eventually(measured)
    for name in READ_MODELS:
        assert metric("tally_projector_stream_sequence", read_model=name) == 12
        assert metric("tally_projector_pending_messages", read_model=name) == 0
        assert metric("tally_projector_seconds_behind", read_model=name) == 0


async def test_what_waits_behind_a_dead_letter_is_behind(settings: dict[str, str], log: EventLog) -> None:
    poll = await log.poll()
    async with asking(settings) as asked:

        async def stands_still(events: int, *, seconds_known: bool) -> None:
            for model in (await asked.status()).read_models:
                assert (model.state, model.parked_polls, model.gapped_polls) == (READ_MODEL_STATE_READING, 1, 0)
                assert model.events_behind == events
                assert model.HasField("seconds_behind") is seconds_known
                assert model.seconds_behind > 1.0 or not seconds_known

        async with running(settings, "relay", *READ_MODELS):
            await eventually(lambda: _applied(asked, 2))
            # A change that nobody knows.
            await log.change(poll, "OPEN", Event())
            await log.cast(poll, votes=3)
            await log.cast(poll)
            await eventually(lambda: stands_still(3, seconds_known=True))
            await log.cast(poll)
            await eventually(lambda: stands_still(4, seconds_known=True))
            code, printed = await asked.tally("--max-behind", "1")
            assert (code, printed.count("1 polls are parked"), printed.count(": 4 events and ")) == (3, 3, 3)
        async with running(settings, "relay", *READ_MODELS):
            # They have never seen the read model complete.
            await eventually(lambda: stands_still(4, seconds_known=False))


async def _applied(asked: Asked, version: int) -> None:
    assert [model.version for model in (await asked.status()).read_models] == [version] * 3


async def test_what_nobody_reports_is_unknown_and_never_0(settings: dict[str, str]) -> None:
    async with asking(settings) as asked:
        answer = await asked.status()
        assert [model.state for model in answer.read_models] == [READ_MODEL_STATE_SILENT] * 3
        assert not answer.HasField("stream")
        assert not answer.outbox

        async def measured() -> None:
            for name in READ_MODELS:
                figures = [metric(f"tally_status_{field}", read_model=name) for field in FIGURES]
                assert all(figure is not None and math.isnan(figure) for figure in figures)
                assert metric("tally_status_reading", read_model=name) == 0
            assert math.isnan(metric("tally_status_outbox_events") or 0)
            assert math.isnan(metric("tally_status_stream_messages") or 0)

        await eventually(measured)
        code, printed = await asked.tally("--output", "json")
    assert code == 3
    data = json.loads(printed)
    assert [data["well"], data["outbox"], data["stream"]] == [False, [], None]
    for model in data["read_models"]:
        assert [model[field] for field in (*FIGURES, "reported_at", "last_error_at")] == [None] * 7


@pytest.mark.parametrize("read_model", ["views", "documents"])
@pytest.mark.parametrize(
    "fate", ["REVOKE USAGE ON SCHEMA {} FROM CURRENT_USER", "ALTER SCHEMA {} RENAME TO gone"], ids=["revoked", "gone"]
)
async def test_a_read_model_that_cannot_be_read_is_no_trouble_of_the_others(
    settings: dict[str, str], read_model: str, fate: str
) -> None:
    expected = dict.fromkeys(READ_MODELS, READ_MODEL_STATE_SILENT) | {read_model: READ_MODEL_STATE_UNAVAILABLE}
    # A server that starts would not serve before this is corrected: what one that serves says of it is asked here.
    async with asking(settings) as asked:
        await sql(settings["read_dsn"], fate.format(read_model))

        async def is_told() -> None:
            assert {model.name: model.state for model in (await asked.status()).read_models} == expected

        # On a busy machine Redis may miss the patience of the first question.
        await eventually(is_told)


async def test_while_nats_is_away_the_backlog_is_measured_and_the_projectors_say_why_they_wait(
    settings: dict[str, str], log: EventLog, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "SILENCE_SECONDS", 1.5)
    poll = await log.poll()
    async with asking(settings) as asked, running(settings, "relay", *READ_MODELS):

        async def well() -> None:
            answer = await asked.status()
            assert [model.events_behind for model in answer.read_models if model.HasField("events_behind")] == [0, 0, 0]

        await eventually(well)
        stores.nats_process.kill()
        await stores.nats_process.ended()
        for _ in range(5):
            await log.cast(poll)

        async def interrupted() -> None:
            answer = await asked.status()
            for model in answer.read_models:
                assert (model.state, model.version) == (READ_MODEL_STATE_INTERRUPTED, 2)
                assert model.last_error.startswith("NATS failed: ")
                assert not model.HasField("events_behind")
                assert not model.HasField("gapped_polls")
                assert model.seconds_behind > 1.0
            assert [metric("tally_outbox_events", shard="0"), metric("tally_projector_reading", read_model="live")] == [
                5,
                0,
            ]
            assert math.isnan(metric("tally_projector_pending_messages", read_model="live") or 0)

        await eventually(interrupted)
        await stores.nats_process.start()
        await eventually(well)


async def test_a_store_that_is_away_is_told_from_one_that_is_empty(
    settings: dict[str, str], log: EventLog, stores: Stores
) -> None:
    await log.poll()
    async with asking(settings) as asked, running(settings, "relay", *READ_MODELS):

        async def told_by_the_others() -> None:
            live, *stored = (await asked.status()).read_models
            for model in stored:
                assert (model.state, model.version, model.events_behind) == (READ_MODEL_STATE_READING, 2, 0)
            assert live.state == READ_MODEL_STATE_UNAVAILABLE
            assert not live.HasField("version")
            assert math.isnan(metric("tally_status_reading", read_model="live") or 0)
            assert metric("tally_status_version", read_model="documents") == 2

        stores.redis_process.kill()
        await stores.redis_process.ended()
        await eventually(told_by_the_others)
        await stores.redis_process.start()

        async def told_by_all() -> None:
            states = [model.state for model in (await asked.status()).read_models]
            assert states == [READ_MODEL_STATE_READING] * 3

        await eventually(told_by_all)
