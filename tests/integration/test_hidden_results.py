"""Results that are shown after the poll is closed: the whole way, and no side door."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import grpc
import pytest
import redis.asyncio
from tally.command.v1 import command_service_pb2 as command
from tally.poll.v1.poll_pb2 import (
    POLL_STATE_CERTIFIED,
    POLL_STATE_CLOSED,
    RESULTS_VISIBILITY_AFTER_CLOSE,
    VOTING_METHOD_SINGLE_CHOICE,
    PollOption,
    PollSpec,
)
from tally.query.v1 import query_service_pb2 as query

from contracts.live import live_channel, live_key
from projector.live import generation_in_use
from tests.processes import eventually
from tests.servers import Refused, refused
from tests.system import System


@pytest.fixture
async def live(system: System) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.Redis.from_url(system["redis_url"]) as client:
        yield client


async def draft(system: System, **fields: Any) -> str:
    """A poll that readers have heard of."""
    options = [PollOption(option_id=option, label=option.title()) for option in ("hush-a", "hush-b")]
    spec = PollSpec(title="Secret?", method=VOTING_METHOD_SINGLE_CHOICE, options=options, **fields)
    created = await system.command.CreatePoll(command.CreatePollRequest(poll=spec))
    fresh = query.GetPollRequest(poll_id=created.poll_id, at_least_as_fresh=created.consistency_token)
    return (await system.query.GetPoll(fresh, timeout=10)).poll.poll_id


async def open_poll(system: System, poll_id: str) -> str:
    return (await system.command.OpenPoll(command.OpenPollRequest(poll_id=poll_id))).consistency_token


async def open_hidden(system: System) -> str:
    poll_id = await draft(system, results_visibility=RESULTS_VISIBILITY_AFTER_CLOSE)
    await open_poll(system, poll_id)
    return poll_id


async def vote(system: System, poll_id: str, voter_id: str, option: str = "hush-a") -> str:
    request = command.CastVoteRequest(poll_id=poll_id, voter_id=voter_id, option_ids=[option])
    return (await system.command.CastVote(request)).consistency_token


async def close(system: System, poll_id: str) -> str:
    return (await system.command.ClosePoll(command.ClosePollRequest(poll_id=poll_id))).consistency_token


async def results(system: System, poll_id: str, token: str = "") -> query.Results:
    request = query.GetResultsRequest(poll_id=poll_id, at_least_as_fresh=token)
    return (await system.query.GetResults(request, timeout=10)).results


async def watch_refused(system: System, *poll_ids: str, token: str = "") -> Refused:
    request = query.WatchResultsRequest(poll_ids=poll_ids, at_least_as_fresh=token)
    return await refused(system.query.WatchResults(request, timeout=10).read())


def is_hidden(refusal: Refused) -> None:
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "RESULTS_HIDDEN")
    assert refusal.retry_after is None
    assert "after it has been closed" in refusal.message


async def test_results_are_hidden_until_the_poll_is_closed(system: System) -> None:
    poll_id, other = await open_hidden(system), await draft(system)
    await open_poll(system, other)
    token = await vote(system, poll_id, "ann")
    seen = await results(system, other, await vote(system, other, "ann"))
    poll = (await system.query.GetPoll(query.GetPollRequest(poll_id=poll_id, at_least_as_fresh=token))).poll
    assert poll.results_visibility == RESULTS_VISIBILITY_AFTER_CLOSE
    is_hidden(await refused(results(system, poll_id)))
    is_hidden(await refused(results(system, poll_id, token)))
    is_hidden(await watch_refused(system, poll_id))
    is_hidden(await watch_refused(system, other, poll_id))
    is_hidden(await watch_refused(system, poll_id, token=token))
    missing = str(uuid4())
    batch = await system.query.BatchGetResults(query.BatchGetResultsRequest(poll_ids=[poll_id, missing, other]))
    assert list(batch.hidden_poll_ids) == [poll_id]
    assert list(batch.missing_poll_ids) == [missing]
    [shown] = batch.results
    # Either store may have been the first to show it.
    seen.source = shown.source
    assert shown == seen

    # Whoever has the token of the closing waits, and is shown everything.
    closed = await results(system, poll_id, await close(system, poll_id))
    assert (closed.state, [count.count for count in closed.counts]) == (POLL_STATE_CLOSED, [1, 0])
    batch = await system.query.BatchGetResults(query.BatchGetResultsRequest(poll_ids=[other, poll_id]))
    assert list(batch.results) == [seen, closed]
    await system.command.CertifyPoll(command.CertifyPollRequest(poll_id=poll_id))
    async with asyncio.timeout(15):
        async for response in system.query.WatchResults(query.WatchResultsRequest(poll_ids=[poll_id])):
            if response.results.state == POLL_STATE_CERTIFIED:
                break
    assert response.results.certification.agreed
    assert [count.count for count in response.results.certification.counts] == [1, 0]


async def test_what_is_no_visibility_is_refused(system: System) -> None:
    refusal = await refused(draft(system, results_visibility=7))
    assert (refusal.reason, refusal.fields) == ("INVALID_REQUEST", ["poll.results_visibility"])


async def test_a_cancelled_poll_shows_nothing_ever(system: System) -> None:
    poll_id = await open_hidden(system)
    await vote(system, poll_id, "ann")
    token = (await system.command.CancelPoll(command.CancelPollRequest(poll_id=poll_id))).consistency_token
    is_hidden(await refused(results(system, poll_id, token)))
    is_hidden(await watch_refused(system, poll_id, token=token))


async def test_nothing_that_a_query_server_gets_from_redis_tells_the_counts(
    system: System, live: redis.asyncio.Redis
) -> None:
    poll_id = await open_hidden(system)
    # Other tests of this system rebuild the read models.
    key = live_key(await generation_in_use(live), poll_id)
    async with live.pubsub(ignore_subscribe_messages=True) as channel:
        await channel.subscribe(live_channel(poll_id))
        token = ""
        for voter in range(10):
            token = await vote(system, poll_id, f"voter-{voter}")
        is_hidden(await refused(results(system, poll_id, token)))
        published = b""
        said = set()

        async def all_is_said() -> bool:
            nonlocal published
            if message := await channel.get_message(timeout=0.1):
                published = message["data"]
            stored = await live.hget(key, "results")
            said.update({published, stored})
            return bool(stored == published)

        await eventually(all_is_said)
    # A zero byte, the version and the log epoch: no room for anything else.
    assert {len(data) for data in said if data} == {25}


async def test_a_draft_that_is_changed_to_hide_them_ends_its_watchers(system: System) -> None:
    poll_id = await draft(system)
    stream = system.query.WatchResults(query.WatchResultsRequest(poll_ids=[poll_id]), timeout=10)
    await stream.read()
    changes = PollSpec(results_visibility=RESULTS_VISIBILITY_AFTER_CLOSE)
    request = command.UpdatePollRequest(poll_id=poll_id, poll=changes)
    token = (await system.command.UpdatePoll(request)).consistency_token
    is_hidden(await refused(stream.read()))
    is_hidden(await refused(results(system, poll_id, token)))
