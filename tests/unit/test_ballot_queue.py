"""What goes into one commit."""

import asyncio
from uuid import UUID

from tally.poll.v1.poll_pb2 import PollSpec

from command_server import ballot_box, ballots
from command_server.ballot_box import _Queue, _Submission
from command_server.poll import OPEN
from command_server.polls import Poll


async def test_a_commit_has_no_more_bytes_than_its_event_may_have() -> None:
    queue = _Queue(Poll(UUID(int=1), 1, OPEN, PollSpec(), {}, {}))
    short, long = b"v" * 16 + ballots.marking([0]), b"v" * 16 + ballots.marking(range(1000))
    # In an approval poll the first ballot of a request says nothing about those that follow.
    for _ in range(10):
        queue.put(_Submission([short, *[long] * 500], asyncio.get_running_loop().create_future(), 0.0))
    sizes = []
    while taken := queue.take():
        sizes.append(sum(len(ballot) for submission in taken for ballot in submission.ballots))
    assert len(sizes) > 1
    assert max(sizes) <= ballot_box.BATCH_BYTES
    assert queue.ballots == 0
