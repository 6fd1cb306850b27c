"""How a batch tells its callers what became of their ballots."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from tally.poll.v1.poll_pb2 import PollSpec

from command_server.ballot_queue import BallotQueue, Recorded, Submission, Verdicts
from command_server.poll import OPEN, not_open
from command_server.polls import Poll
from command_server.vote_log import TOLD_AT_ONCE, Batch


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("callers", [1, TOLD_AT_ONCE, 10 * TOLD_AT_ONCE + 1])
async def test_a_crowd_is_told_in_turns(callers: int, fails: bool) -> None:
    loop = asyncio.get_running_loop()
    poll = Poll(UUID(int=1), 1, OPEN, PollSpec(), {}, {})
    queue = BallotQueue(poll)
    submissions = [Submission([n.to_bytes(22)], 0.0, loop.create_future()) for n in range(callers)]
    for submission in submissions:
        queue.put(submission)
    told: list[object] = []

    async def wait(submission: Submission) -> None:
        try:
            told.append((await submission.verdicts).of(0))
        except TimeoutError as error:
            told.append(error)

    waiting = [asyncio.create_task(wait(submission)) for submission in submissions]
    await asyncio.sleep(0)
    batch = Batch(poll, queue.take())
    refused = not_open("CLOSED")
    if fails:
        batch.fail(TimeoutError("no answer"))
    else:
        batch.settle(Verdicts(Recorded(7, Timestamp(), already=False), dict.fromkeys(range(1, callers, 2), refused)))
    turns = []
    while len(told) < callers:
        before = len(told)
        await asyncio.sleep(0)
        turns.append(len(told) - before)
    assert max(turns) <= TOLD_AT_ONCE, "other work has its turn in between"
    await asyncio.gather(*waiting)
    if not fails:
        assert [outcome is refused for outcome in told] == [n % 2 == 1 for n in range(callers)]
