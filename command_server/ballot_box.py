"""The ballot box: collects ballots, and has those of one poll recorded together.

Group commit: ballots that arrive while commits are under way form the next batch.
"""

import asyncio
from itertools import takewhile
from math import inf

import structlog
from prometheus_client import Gauge, Histogram
from tally.poll.v1.error_reason_pb2 import ErrorReason

from command_server.ballot_queue import BallotQueue, Piece, Submission, Verdicts
from command_server.polls import Poll
from command_server.vote_log import Batch, VoteLog
from contracts.refusals import Refusal
from runtime.postgres import UNAVAILABLE

log = structlog.get_logger()

# Commits under way at once: while one waits for the disk, the next one copies its rows.
COMMITTERS = 3
# After a small commit the next one of its poll begins so many seconds later for each of its ballots, up to a limit.
# While fewer than 2,500 votes a second come, no vote waits longer for that than for the commit under way; above that,
# the pauses grow to the limit: larger batches, and more of the processors for the calls.
PACE_SECONDS_PER_BALLOT = 0.0004
PACE_SECONDS = 0.004
# The most ballots that wait: about 100 bytes each, and two more for each choice of an approval. Those of a request are
# kept until all of them are recorded, so up to twice as many are in memory.
CAPACITY = 400_000
# How long a request may wait for its first commit, and how often it is looked for those that waited longer, in seconds.
WAIT_SECONDS = 15.0
LOOK_SECONDS = 1.0

_commit_seconds = Histogram("tally_commit_seconds", "Time of one commit, with its retries.")
_waiting = Gauge("tally_votes_waiting", "Votes in the queue.")


class BallotBox:
    """Takes ballots of any poll and says what became of them, once that is durable."""

    def __init__(self, votes: VoteLog) -> None:
        self._votes = votes
        # Polls with ballots that wait, or a commit under way; by poll_no and the state in which the poll was found. A
        # ballot for a draft must not wait together with one for the poll once it is open: its options were others.
        self._queues: dict[tuple[int, str], BallotQueue] = {}
        # Those that are due, each once, in the order in which they are served.
        self._ready: asyncio.Queue[BallotQueue] = asyncio.Queue()
        # The submissions of which no commit has taken a ballot, oldest first; a dict for its order.
        self._unbegun: dict[Submission, None] = {}
        # Ballots that wait or are being committed, and the event that there are fewer than before.
        self._ballots = 0
        self._fewer = asyncio.Event()

    async def run(self) -> None:
        """Commits until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(COMMITTERS):
                tasks.create_task(self._commit_forever())
            tasks.create_task(self._give_up_forever())

    async def drain(self) -> None:
        """Returns when no ballot waits any more."""
        while self._ballots:
            await self._until_fewer()

    def cast(self, poll: Poll, ballot: bytes, deadline: float = inf) -> "asyncio.Future[Verdicts]":
        """Accepts one ballot, and returns the future that says what became of it. Raises OVERLOADED where the queue is
        full.

        To cancel the future says that its caller has gone; `deadline`, by the loop's clock, that it will have.
        """
        if self._ballots >= CAPACITY:
            raise Refusal(ErrorReason.ERROR_REASON_OVERLOADED, "too many votes wait to be recorded; try again")
        return self._submit(poll, [ballot], deadline)

    async def cast_all(self, poll: Poll, batch: list[bytes], deadline: float = inf) -> "asyncio.Future[Verdicts]":
        """Waits for room, accepts the ballots, and returns the future that says what became of them."""
        while self._ballots >= CAPACITY:
            await self._until_fewer()
        return self._submit(poll, batch, deadline)

    async def _until_fewer(self) -> None:
        self._fewer.clear()
        await self._fewer.wait()

    def _submit(self, poll: Poll, batch: list[bytes], deadline: float) -> "asyncio.Future[Verdicts]":
        loop = asyncio.get_running_loop()
        queue = self._queues.get((poll.poll_no, poll.state))
        if queue is None:
            queue = self._queues[poll.poll_no, poll.state] = BallotQueue(poll)
        submission = Submission(batch, loop.time(), loop.create_future(), deadline)
        queue.put(submission)
        self._unbegun[submission] = None
        self._ballots += len(batch)
        self._offer(queue)
        return submission.verdicts

    def _offer(self, queue: BallotQueue) -> None:
        if queue.due:
            queue.offered = True
            self._ready.put_nowait(queue)

    async def _commit_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            queue = await self._ready.get()
            # Ballots whose requests have arrived, but were not read yet, come into this batch too.
            await asyncio.sleep(0)
            started = loop.time()
            queue.offered = False
            pieces = queue.take()
            taken = sum([len(piece.ballots) for piece in pieces])
            queue.committing += 1
            if not queue.paced:
                queue.paced = True
                pause = min(PACE_SECONDS_PER_BALLOT * taken, PACE_SECONDS)
                loop.call_later(pause, self._end_pace, queue)
            self._offer(queue)
            _waiting.set(self._ballots)
            try:
                await self._commit(Batch(queue.poll, self._begin(pieces)))
            finally:
                queue.committing -= 1
                self._offer(queue)
                self._forget_if_idle(queue)
                self._ballots -= taken
                self._fewer.set()
                _commit_seconds.observe(loop.time() - started)

    def _begin(self, pieces: list[Piece]) -> list[Piece]:
        """Those of submissions that somebody still waits for."""
        for piece in pieces:
            self._unbegun.pop(piece.submission, None)
        return [piece for piece in pieces if not piece.submission.verdicts.done()]

    async def _give_up_forever(self) -> None:
        """Watches how long submissions wait, also while all committers are held up."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._give_up(asyncio.get_running_loop().time())

    def _give_up(self, now: float) -> None:
        """Fails the submissions that have waited for too long. That is a reason only before the first commit of one:
        after it, a repeat would be mostly repeated votes."""
        for submission in list(takewhile(lambda submission: submission.since < now - WAIT_SECONDS, self._unbegun)):
            del self._unbegun[submission]
            submission.fail(TimeoutError("no commit began in time"))

    def _end_pace(self, queue: BallotQueue) -> None:
        queue.paced = False
        self._offer(queue)
        self._forget_if_idle(queue)

    def _forget_if_idle(self, queue: BallotQueue) -> None:
        if queue.idle:
            del self._queues[queue.poll.poll_no, queue.poll.state]

    async def _commit(self, batch: Batch) -> None:
        if not batch.pieces:
            return
        try:
            await self._votes.record([batch])
        except Exception as error:
            if not isinstance(error, UNAVAILABLE):
                log.error("defect", exc_info=error)
            for piece in batch.pieces:
                piece.submission.fail(error)
            return
        assert batch.verdicts is not None, "a batch that was recorded without verdicts"
        start = 0
        for piece in batch.pieces:
            piece.submission.settle(piece, batch.verdicts.part(start, len(piece.ballots)))
            start += len(piece.ballots)
