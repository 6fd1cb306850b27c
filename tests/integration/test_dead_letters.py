"""Dead letters as an operator meets them: one poll is parked, is seen, and is replayed after the fix."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from tally.event.v1.event_pb2 import Event
from tally.query.v1.query_service_pb2 import (
    GetPollRequest,
    GetReadModelStatusRequest,
    GetResultsRequest,
    ReadModelStatus,
)

from clients import letters
from clients.failures import Failure
from contracts.dead_letters import DeadLetter
from runtime.embedded import Stores
from tests.event_log import EventLog, WrittenPoll, event_log, sql
from tests.processes import eventually
from tests.proxy import proxy
from tests.system import System

READ_MODELS = ["live", "views", "documents"]
# A change with the number 99.
UNKNOWN = b"\x9a\x06\x02\x08\x01"


async def tally(system: System, *arguments: str) -> tuple[int, Any]:
    """The exit code of `tally dead-letters …`, and the JSON that it prints."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from clients.cli import main; main()", "dead-letters", *arguments),
        *("--data-dir", str(system.directory), "--output", "json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if not name.startswith("TALLY_")},
    )
    async with asyncio.timeout(60):
        out, err = await child.communicate()
    assert b"Traceback" not in err, err.decode()
    return child.returncode or 0, json.loads(out) if out else err.decode()


async def poisoned(log: EventLog, payload: bytes) -> WrittenPoll:
    """A poll whose event 4 has this payload, and another event after it."""
    poll = await log.poll()
    await log.cast(poll, votes=3)
    columns = ("OPEN", poll.spec.SerializeToString(), None, None, payload)
    poll.version = await log.connection.fetchval(sql.change_poll, poll.poll_no, *columns)
    await log.cast(poll, votes=2)
    return poll


async def mend(log: EventLog, poll: WrittenPoll, payload: bytes) -> None:
    await log.connection.execute(
        "UPDATE events SET payload = $3 WHERE poll_no = $1 AND version = $2", poll.poll_no, 4, payload
    )


async def statuses(system: System) -> dict[str, ReadModelStatus]:
    answer = await system.query.GetReadModelStatus(GetReadModelStatusRequest(), timeout=10)
    return {status.name: status for status in answer.read_models}


async def test_a_poll_that_stands_still_is_seen_and_goes_on_after_the_fix(system: System) -> None:
    async with event_log(system["write_dsn"]) as log:
        bad, good = await poisoned(log, UNKNOWN), await log.poll()
        await log.cast(good, votes=3)

        async def are_parked() -> None:
            parked = {name: status.parked_polls for name, status in (await statuses(system)).items()}
            assert parked == dict.fromkeys(READ_MODELS, 1)

        await eventually(are_parked)
        answer = await system.query.GetResults(GetResultsRequest(poll_id=str(bad.poll_id)), timeout=10)
        assert (answer.results.version, answer.results.total_votes) == (3, 3)

        code, listed = await tally(system, "list")
        assert code == 0
        rows = [row for row in listed["dead_letters"] if row["poll_id"] == str(bad.poll_id)]
        assert [row["read_model"] for row in rows] == READ_MODELS
        assert {(row["version"], row["waiting"], row["event_type"]) for row in rows} == {(4, 1, "field 99")}
        code, shown = await tally(system, "show", str(bad.poll_id))
        assert (code, shown["dead_letters"]) == (0, rows)
        assert (await tally(system, "show", str(uuid4())))[0] == 1

        # Before the fix, and with new projectors: it is parked again.
        for number in range(len(READ_MODELS)):
            os.kill(system.pid("projector", number), signal.SIGKILL)
        code, outcome = await tally(system, "replay", str(bad.poll_id))
        assert code == 3
        assert [row["read_model"] for row in outcome["parked_again"]] == READ_MODELS
        # It came with another message, or out of the event log, which a projector compares with at its start.
        assert all(
            again["stream_sequence"] != row["stream_sequence"] and again["first_seen"] == row["first_seen"]
            for again, row in zip(outcome["parked_again"], rows, strict=True)
        )

        await mend(log, bad, Event(ignorable=True).SerializeToString() + UNKNOWN)
        code, outcome = await tally(system, "replay", "--all")
        assert (code, len(outcome["applied"])) == (0, len(READ_MODELS))
        assert (await tally(system, "list"))[1]["dead_letters"] == []
        answer = await system.query.GetResults(GetResultsRequest(poll_id=str(bad.poll_id)), timeout=10)
        assert (answer.results.version, answer.results.total_votes) == (bad.version, 5)
        poll = (await system.query.GetPoll(GetPollRequest(poll_id=str(bad.poll_id)), timeout=10)).poll
        assert poll.version == bad.version
        code, error = await tally(system, "replay", str(bad.poll_id))
        assert code == 1
        assert "no read model is parked" in error


async def test_what_cannot_be_replayed_is_said(system: System) -> None:
    code, error = await tally(system, "replay")
    assert code == 2
    assert "--all" in error
    code, outcome = await tally(system, "list", "--redis-url", "redis://127.0.0.1:9")
    assert code == 1
    assert (outcome["dead_letters"], list(outcome["unanswered"])) == ([], ["live"])
    # What the client of NATS logs is not among the data.
    for url, cause in (("nats://127.0.0.1:9", "Timeout"), ("nats://u:s3cr/et@h:1", "nats: invalid")):
        code, error = await tally(system, "replay", "--all", "--nats-url", url)
        assert (code, error.count("\n")) == (1, 1)
        assert error.startswith(f"NATS does not answer: {cause}")
        assert "s3cr" not in error


@pytest.mark.parametrize("lost", ["the store of live", "NATS"])
async def test_what_goes_away_during_a_replay_is_told(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    letter = DeadLetter(str(uuid4()), 4, 5, 7, "field 99", "unknown", datetime.now(UTC), UNKNOWN)
    found: dict[str, list[DeadLetter]] = {}
    server, _, port = stores.nats_url.rpartition(":")
    async with proxy(int(port)) as nats:

        async def read_all(_: Mapping[str, str]) -> tuple[dict[str, list[DeadLetter]], dict[str, str]]:
            if not found:
                found["live"] = [letter]
                return found, {}
            if lost == "NATS":
                await nats.cut()
                return found, {}
            return {}, {"live": "connection refused"}

        monkeypatch.setattr(letters, "read_all", read_all)
        with pytest.raises(Failure, match=f"^{lost} does not answer: "):
            await letters.replay({}, f"{server}:{nats.port}", None, 10)
