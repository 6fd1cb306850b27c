"""The polls that a command server looks up: many by one read, each once for all who ask."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from tally.command.v1 import command_service_pb2 as pb

from command_server import polls
from command_server.polls import Polls
from contracts.refusals import Refusal, reason_name
from runtime import postgres
from tests.integration.test_command_server import draft_poll, open_poll
from tests.processes import eventually
from tests.servers import command_server


class Reads:
    """Polls of a real database, and what each read asks for. Its answer waits for `go`."""

    def __init__(self, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.polls = Polls(pool)
        self.reads: list[list[UUID]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.error: Exception | None = None
        read = Polls._read

        async def reading(polls: Polls, poll_ids: list[UUID]) -> Any:
            rows = await read(polls, poll_ids)
            self.reads.append(poll_ids)
            await self.go.wait()
            if self.error:
                raise self.error
            return rows

        monkeypatch.setattr(Polls, "_read", reading)

    async def have_read(self, reads: int) -> None:
        assert len(self.reads) == reads

    async def find(self, *poll_ids: str) -> list[str]:
        """What callers who ask at once hear: the state of their poll, or why not."""
        return await asyncio.gather(*map(self._find, poll_ids))

    async def _find(self, poll_id: str) -> str:
        try:
            return (await self.polls.find(poll_id)).state
        except Refusal as refusal:
            return reason_name(refusal.reason)


@pytest.fixture
async def reads(write_dsn: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Reads]:
    pool = await postgres.connect_pool(write_dsn, size=2, application="tests")
    yield Reads(pool, monkeypatch)
    pool.terminate()


async def test_a_crowd_in_many_polls_is_few_reads(
    reads: Reads, write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polls, "READ_POLLS", 100)
    async with command_server(write_dsn) as server:
        known = [await open_poll(server) for _ in range(20)] + [await draft_poll(server) for _ in range(20)]
    unknown = [str(uuid4()) for _ in range(260)]
    found = await reads.find(*known, *unknown, *known, *unknown)
    assert found == 2 * [*["OPEN"] * 20, *["DRAFT"] * 20, *["POLL_NOT_FOUND"] * 260]
    assert [len(read) for read in reads.reads] == [100, 100, 100]


async def test_large_polls_are_left_to_the_next_read(
    reads: Reads, write_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polls, "READ_BYTES", 1)
    async with command_server(write_dsn) as server:
        known = [await open_poll(server) for _ in range(4)]
    unknown = str(uuid4())
    assert await reads.find(*known, unknown) == [*["OPEN"] * 4, "POLL_NOT_FOUND"]
    assert [len(read) for read in reads.reads] == [5, 3, 2, 1]


async def test_what_changes_while_it_is_read_is_read_again(reads: Reads, write_dsn: str) -> None:
    async with command_server(write_dsn) as server:
        polls = [await draft_poll(server) for _ in range(2)]
        reads.go.clear()
        early = asyncio.create_task(reads.find(*polls))
        await eventually(lambda: reads.have_read(1))
        for poll_id in polls:
            await server.OpenPoll(pb.OpenPollRequest(poll_id=poll_id))
            reads.polls.changed(UUID(poll_id))
    # One is asked for before that read has ended, the other after it.
    late = asyncio.create_task(reads.find(polls[0]))
    await asyncio.sleep(0)
    reads.go.set()
    assert await early == ["DRAFT", "DRAFT"]
    assert await reads.find(polls[1]) == ["OPEN"]
    assert await late == ["OPEN"]


async def test_a_read_that_fails_is_told_to_those_who_asked_and_not_remembered(reads: Reads, write_dsn: str) -> None:
    async with command_server(write_dsn) as server:
        poll_id = await open_poll(server)
    reads.error = asyncpg.DataCorruptedError("a damaged page")
    outcomes = await asyncio.gather(
        *(reads.polls.find(each) for each in (poll_id, poll_id, str(uuid4()))), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [asyncpg.DataCorruptedError] * 3
    reads.error = None
    assert await reads.find(poll_id) == ["OPEN"]


async def test_callers_that_wait_for_polls_are_bounded(reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polls, "WAITING", 3)
    reads.go.clear()
    waiting = [asyncio.create_task(reads.find(str(uuid4()))) for _ in range(3)]
    await eventually(lambda: reads.have_read(1))
    assert await reads.find(str(uuid4())) == ["OVERLOADED"]
    # One whose caller hangs up makes room, and takes the answer from none.
    waiting.pop().cancel()
    await asyncio.sleep(0)
    waiting.append(asyncio.create_task(reads.find(str(uuid4()))))
    await asyncio.sleep(0)
    reads.go.set()
    assert await asyncio.gather(*waiting) == [["POLL_NOT_FOUND"]] * 3
