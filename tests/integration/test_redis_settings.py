"""What an operator may choose in Redis: its database, and what its user may do."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError
from tally.event.v1.event_pb2 import Event, PollCancelled, PollCreated, PollOpened
from tally.poll.v1.poll_pb2 import POLL_STATE_DRAFT, POLL_STATE_OPEN, PollOption, PollSpec
from tally.query.v1 import query_service_pb2 as query
from tally.query.v1.query_service_pb2_grpc import QueryServiceStub

from contracts.live import live_channel
from projector.fold import Tally, fold
from projector.live import Live
from projector.live_copies import LiveCopies
from projector.read_model import Change
from projector.stream import BEGINNING
from tests.servers import query_channel

_OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
_NOON = Timestamp()
_NOON.FromDatetime(datetime(2026, 5, 1, 12, tzinfo=UTC))


async def _watch(channel: grpc.aio.Channel, poll_id: str) -> Any:
    stub: Any = QueryServiceStub(channel)
    watch = stub.WatchResults(query.WatchResultsRequest(poll_ids=[poll_id]), timeout=30)
    assert (await watch.read()).results.state == POLL_STATE_DRAFT
    return watch


class _Poll:
    """A poll and its first events."""

    def __init__(self) -> None:
        self.poll_id = str(uuid4())
        spec = PollSpec(title="?", options=[PollOption(option_id="a"), PollOption(option_id="b")])
        self.created = self._event(1, poll_created=PollCreated(poll=spec))
        self.opened = self._event(2, poll_opened=PollOpened())
        self.cancelled = self._event(3, poll_cancelled=PollCancelled())

    def _event(self, version: int, **change: Any) -> Event:
        return Event(poll_id=self.poll_id, version=version, recorded_at=_NOON, **change)


async def _store_first(live: Live, poll: _Poll) -> Tally:
    """Fills an empty store with the poll's first event."""
    await live.store([], {}, None, BEGINNING)
    await live.filled()
    draft = fold(None, poll.created)
    await live.store([Change(poll.poll_id, 0, draft, [poll.created])], {}, BEGINNING, BEGINNING)
    return draft


@asynccontextmanager
async def _user(redis_url: str, *rules: str) -> AsyncIterator[str]:
    """The address for a user with these rules."""
    parts = urlsplit(redis_url)
    async with Redis.from_url(redis_url) as admin:
        await admin.execute_command("ACL", "SETUSER", "tally", "on", ">password", *rules)  # type: ignore[no-untyped-call]
        try:
            yield urlunsplit(parts._replace(netloc=f"tally:password@{parts.netloc.rpartition('@')[2]}"))
        finally:
            await admin.execute_command("ACL", "DELUSER", "tally")  # type: ignore[no-untyped-call]


async def test_the_documented_permissions_are_enough(read_dsn: str, redis_url: str) -> None:
    [rules] = re.findall(r"^ACL SETUSER tally on >PASSWORD (.+)$", _OPERATIONS.read_text(), re.MULTILINE)
    poll = _Poll()
    async with _user(redis_url, *rules.split()) as url, Live.connect(url) as live:
        draft = await _store_first(live, poll)
        async with query_channel(read_dsn, url) as channel:
            watch = await _watch(channel, poll.poll_id)
            opened = fold(draft, poll.opened)
            await live.store([Change(poll.poll_id, 1, opened, [poll.opened])], {}, BEGINNING, BEGINNING)
            assert (await watch.read()).results.state == POLL_STATE_OPEN


async def test_a_projector_that_may_not_publish_writes_nothing(redis_url: str) -> None:
    async with _user(redis_url, "~tally:*", "resetchannels", "+@all") as url:
        with pytest.raises(NoPermissionError, match="channel"):
            async with Live.connect(url) as live:
                await _store_first(live, _Poll())
    async with Redis.from_url(redis_url) as redis:
        assert await redis.keys("*") == []


async def test_databases_of_one_redis_do_not_hear_each_other(read_dsn: str, redis_url: str) -> None:
    """An installation and its copy, with the same polls, which have gone different ways since."""
    poll = _Poll()
    copy_url = redis_url.removesuffix("/0") + "/7"
    async with Live.connect(redis_url) as one, Live.connect(copy_url) as other:
        draft = await _store_first(one, poll)
        await _store_first(other, poll)
        async with query_channel(read_dsn, redis_url) as first, query_channel(read_dsn, copy_url) as second:
            watches = [await _watch(channel, poll.poll_id) for channel in (first, second)]
            # The copy is ahead: what it has would be believed.
            here = fold(draft, poll.opened)
            there = fold(here, poll.cancelled)
            ahead = Change(poll.poll_id, 1, there, [poll.opened, poll.cancelled])
            await other.store([ahead], {}, BEGINNING, BEGINNING)
            assert (await watches[1].read()).results.version == 3
            await one.store([Change(poll.poll_id, 1, here, [poll.opened])], {}, BEGINNING, BEGINNING)
            results = (await watches[0].read()).results
            assert (results.version, results.state) == (2, POLL_STATE_OPEN)


async def test_a_rebuild_tells_the_watchers_of_its_database_only(redis_url: str) -> None:
    poll = _Poll()
    copy_url = redis_url.removesuffix("/0") + "/7"
    async with (
        Redis.from_url(redis_url) as client,
        client.pubsub(ignore_subscribe_messages=True) as channel,
        LiveCopies.open(copy_url) as copies,
    ):
        names = [live_channel(poll.poll_id, database) for database in (0, 7)]
        await channel.subscribe(*names)
        await _store_first(copies.fresh, poll)
        async with copies.frozen():
            await copies.switch()
        message = None
        while message is None:
            message = await channel.get_message(timeout=5)
        assert message["channel"].decode() == names[1]
        assert await channel.get_message(timeout=0.1) is None
