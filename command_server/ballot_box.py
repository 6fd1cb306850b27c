"""The ballot box: collects ballots, and has those of one poll recorded together.

Group commit: ballots that arrive while commits are under way form the next batch. Small batches of many polls share a
commit; a large one has its own. A poll that another transaction has locked is put aside until it is free, and one in
which a commit found a voter's vote locked goes on by itself: no other poll waits for them.
"""

import asyncio
from itertools import islice, takewhile
from math import inf

import asyncpg
import structlog
from prometheus_client import Gauge, Histogram
from tally.poll.v1.error_reason_pb2 import ErrorReason

from command_server.ballot_queue import SMALL_BATCH, BallotQueue, Piece, Size, Submission, Verdicts, halves
from command_server.poll import locked
from command_server.polls import Poll
from command_server.vote_log import TOLD_AT_ONCE, Batch, Lock, VoteLog
from contracts.refusals import Refusal
from runtime.postgres import UNAVAILABLE

log = structlog.get_logger()

# Commits under way at once: while one waits for the disk, the next one copies its rows. And those of polls in which a
# commit found a lock: each may wait for as long as a statement waits for a lock.
COMMITTERS = 3
WARY_COMMITTERS = 2
# The most ballots, and the most polls, that share a commit.
SHARED_BALLOTS = 2_000
SHARED_POLLS = 500
# After a small commit the next one begins so many seconds later for each of its ballots, up to a limit. While fewer
# than 2,500 votes a second come, no vote waits longer for that than for the commit under way; above that, the pauses
# grow to the limit: larger batches, and more of the processors for the calls.
PACE_SECONDS_PER_BALLOT = 0.0004
PACE_SECONDS = 0.004
# Small commits come one after the other, for the same reason; but none waits longer for the one before.
SLOW_COMMIT_SECONDS = 0.02
# The bytes of ballots that wait: some 800,000 of one choice. Those of a request are kept until all of them are
# recorded, so up to twice as many are in memory.
CAPACITY_BYTES = 80 << 20
# The most single votes that wait: each is a call, which takes some 50 KiB where each is for another poll.
CALLS = 7_000
# How long a request may wait for its first commit, and how often it is looked for those that waited longer, in seconds.
WAIT_SECONDS = 15.0
LOOK_SECONDS = 1.0
# How often it is looked whether locked polls are free again, and how long a single ballot that found a lock pauses.
_LOOK_AT_LOCKED_SECONDS = 0.05
_PAUSE_SECONDS = 0.25

_commit_seconds = Histogram("tally_commit_seconds", "Time of one commit, with its retries.")
_waiting = Gauge("tally_votes_waiting", "Votes in the queue.")
_waiting_bytes = Gauge("tally_votes_waiting_bytes", "Memory that the votes in the queue take.")
_locked_polls = Gauge(
    "tally_commit_locked_polls", "Polls whose votes wait because another transaction has locked them."
)


class BallotBox:
    """Takes ballots of any poll and says what became of them, once that is durable."""

    def __init__(self, votes: VoteLog) -> None:
        self._votes = votes
        # Polls with ballots that wait, or a commit under way; by poll_no and the state in which the poll was found. A
        # ballot for a draft must not wait together with one for the poll once it is open: its options were others.
        self._queues: dict[tuple[int, str], BallotQueue] = {}
        # Those that are due, each once, in the order in which they are served: of few ballots, which share commits (a
        # dict for its order); of more, and None for a commit of the former; and those in which a commit found a lock.
        self._small: dict[BallotQueue, None] = {}
        self._due: asyncio.Queue[BallotQueue | None] = asyncio.Queue()
        self._wary: asyncio.Queue[BallotQueue] = asyncio.Queue()
        # Whether a small commit is due, how many are under way, and whether the pause after the latest is to end.
        self._small_due = False
        self._small_commits = 0
        self._paced = False
        # Polls that another transaction has locked, with their versions once these are known.
        self._held: dict[BallotQueue, int | None] = {}
        self._any_held = asyncio.Event()
        # The submissions of which no commit has taken a ballot, oldest first; a dict for its order.
        self._unbegun: dict[Submission, None] = {}
        # What waits or is being committed, and the event that there are fewer than before.
        self._size = Size()
        self._fewer = asyncio.Event()
        # Single votes that wait for their verdicts.
        self._calls = 0

    async def run(self) -> None:
        """Commits until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(COMMITTERS):
                tasks.create_task(self._commit_forever())
            for _ in range(WARY_COMMITTERS):
                tasks.create_task(self._commit_warily_forever())
            tasks.create_task(self._release_forever())
            tasks.create_task(self._give_up_forever())

    async def drain(self) -> None:
        """Returns when no ballot waits any more."""
        while self._size.ballots:
            await self._until_fewer()

    def cast(self, poll: Poll, ballot: bytes, deadline: float = inf) -> "asyncio.Future[Verdicts]":
        """Accepts one ballot, and returns the future that says what became of it. Raises OVERLOADED where the queue is
        full.

        To cancel the future says that its caller has gone; `deadline`, by the loop's clock, that it will have.
        """
        queue = self._queues.get((poll.poll_no, poll.state))
        if not self._has_room(poll) or (queue.calls if queue else 0) >= CALLS - self._calls:
            raise Refusal(ErrorReason.ERROR_REASON_OVERLOADED, "too many votes wait to be recorded; try again")
        verdicts = self._submit(poll, [ballot], deadline)
        queue = self._queues[poll.poll_no, poll.state]
        self._calls += 1
        queue.calls += 1

        def end(_: object) -> None:
            self._calls -= 1
            queue.calls -= 1

        verdicts.add_done_callback(end)
        return verdicts

    def _has_room(self, poll: Poll) -> bool:
        """Whether a poll may have more ballots wait: no more than there is room left for others."""
        queue = self._queues.get((poll.poll_no, poll.state))
        return (queue.size.bytes if queue else 0) < CAPACITY_BYTES - self._size.bytes

    async def cast_all(self, poll: Poll, batch: list[bytes], deadline: float = inf) -> "asyncio.Future[Verdicts]":
        """Waits for room, accepts the ballots, and returns the future that says what became of them."""
        while not self._has_room(poll):
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
        self._size = self._size.plus(queue.put(submission))
        if not submission.verdicts.done():
            self._unbegun[submission] = None
        self._offer(queue)
        return submission.verdicts

    def _offer(self, queue: BallotQueue) -> None:
        """Lets a poll wait for its next commit, if it is due."""
        if queue in self._small and queue.ballots > SMALL_BATCH:
            # It has grown while it waited to share one.
            del self._small[queue]
            queue.offered = False
        if queue.due:
            queue.offered = True
            if queue.wary:
                self._wary.put_nowait(queue)
            elif queue.ballots > SMALL_BATCH:
                self._due.put_nowait(queue)
            else:
                self._small[queue] = None
        self._offer_small()

    def _offer_small(self) -> None:
        if self._small and not (self._small_due or self._small_commits or self._paced):
            self._small_due = True
            self._due.put_nowait(None)

    async def _commit_forever(self) -> None:
        while True:
            queue = await self._due.get()
            # Ballots whose requests have arrived, but were not read yet, come into this batch too.
            await asyncio.sleep(0)
            if queue is None:
                await self._commit_small()
            else:
                await self._commit([queue])

    async def _commit_warily_forever(self) -> None:
        while True:
            await self._commit([await self._wary.get()])

    async def _commit_small(self) -> None:
        """One commit for polls with few ballots."""
        self._small_due = False
        queues: list[BallotQueue] = []
        ballots = 0
        for queue in self._small:
            if len(queues) == SHARED_POLLS or ballots + queue.ballots > SHARED_BALLOTS:
                break
            queues.append(queue)
            ballots += queue.ballots
        for queue in queues:
            del self._small[queue]
        loop = asyncio.get_running_loop()
        self._small_commits += 1
        self._paced = True
        loop.call_later(min(PACE_SECONDS_PER_BALLOT * ballots, PACE_SECONDS), self._end_pace)
        under_way = True

        def end() -> None:
            nonlocal under_way
            if under_way:
                under_way = False
                self._small_commits -= 1
                self._offer_small()

        slow = loop.call_later(SLOW_COMMIT_SECONDS, end)
        try:
            await self._commit(queues)
        finally:
            slow.cancel()
            end()

    def _end_pace(self) -> None:
        self._paced = False
        self._offer_small()

    async def _commit(self, queues: list[BallotQueue]) -> None:
        """Commits ballots of each of these polls."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        batches: list[tuple[BallotQueue, Batch]] = []
        taken = Size()
        for queue in queues:
            queue.offered = False
            pieces = queue.take()
            taken = taken.plus(queue.size_of(pieces))
            queue.committing += 1
            batches.append((queue, Batch(queue.poll, self._begin(pieces))))
        for queue in queues:
            self._offer(queue)
        self._show_size()
        try:
            await self._record([batch for _, batch in batches if batch.pieces])
            for queue, batch in batches:
                taken = taken.minus(self._take_back(queue, batch, len(batches)))
        finally:
            for queue in queues:
                queue.committing -= 1
                self._offer(queue)
                self._forget_if_idle(queue)
            self._size = self._size.minus(taken)
            self._show_size()
            self._fewer.set()
            _commit_seconds.observe(loop.time() - started)

    def _show_size(self) -> None:
        _waiting.set(self._size.ballots)
        _waiting_bytes.set(self._size.bytes)

    def _begin(self, pieces: list[Piece]) -> list[Piece]:
        """Those of submissions that somebody still waits for."""
        for piece in pieces:
            self._unbegun.pop(piece.submission, None)
        return [piece for piece in pieces if not piece.is_done]

    async def _record(self, batches: list[Batch]) -> None:
        try:
            await self._votes.record(batches)
        except Exception as error:
            if not isinstance(error, UNAVAILABLE):
                log.error("defect", exc_info=error)
            for batch in batches:
                if not batch.settled:
                    batch.fail(error)

    def _take_back(self, queue: BallotQueue, batch: Batch, shared: int) -> Size:
        """Puts the ballots of a batch that found a lock back into their queue; returns how many these are."""
        pieces = list(batch.pieces)
        if batch.lock is None:
            if not queue.has_returned:
                queue.wary = False
            return Size()
        if batch.lock is Lock.POLL:
            queue.give_back(pieces)
            self._hold(queue)
        elif shared > 1:
            queue.wary = True
            queue.give_back(pieces)
        elif len(batch.ballots) > 1:
            # Some voter's vote is locked. The others' are recorded once they are apart.
            queue.wary = True
            for half in reversed(halves(pieces)):
                queue.give_back(half)
        else:
            queue.wary = queue.pausing = True
            queue.give_back(pieces, last=True)
            asyncio.get_running_loop().call_later(_PAUSE_SECONDS, self._end_pause, queue)
        return queue.size_of(pieces)

    def _end_pause(self, queue: BallotQueue) -> None:
        queue.pausing = False
        self._offer(queue)
        self._forget_if_idle(queue)

    def _hold(self, queue: BallotQueue) -> None:
        queue.held = True
        self._held[queue] = None
        self._any_held.set()
        _locked_polls.set(len(self._held))

    async def _release_forever(self) -> None:
        """Watches the polls that were found locked, all of them with one statement that waits for none."""
        while True:
            await self._any_held.wait()
            await asyncio.sleep(_LOOK_AT_LOCKED_SECONDS)
            try:
                found = await self._votes.look_at([queue.poll.poll_no for queue in self._held])
            except (*UNAVAILABLE, asyncpg.PostgresError) as error:
                log.warning("locked polls cannot be looked at", error=repr(error))
                await asyncio.sleep(LOOK_SECONDS)
                continue
            for queue, before in list(self._held.items()):
                if queue.poll.poll_no not in found:
                    continue
                version, unlocked = found[queue.poll.poll_no]
                if unlocked or before not in (None, version):
                    # Where its version grows it is locked by one commit after the other: a commit of its own waits in
                    # line with these.
                    queue.wary = queue.wary or not unlocked
                    self._release(queue)
                else:
                    self._held[queue] = version

    def _release(self, queue: BallotQueue) -> None:
        del self._held[queue]
        if not self._held:
            self._any_held.clear()
        _locked_polls.set(len(self._held))
        queue.held = False
        self._offer(queue)
        self._forget_if_idle(queue)

    async def _give_up_forever(self) -> None:
        """Watches how long submissions wait, also while all committers are held up."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            old = asyncio.get_running_loop().time() - WAIT_SECONDS
            while self._give_up_some(old):
                # Their callers are told before the next ones: docs/adr/0019.
                await asyncio.sleep(0)
            self._give_up_locked(old)

    def _give_up_some(self, old: float) -> bool:
        """Fails some of the submissions that have waited for too long; returns whether there may be more. To wait is a
        reason only before the first commit of one: after it, a repeat would be mostly repeated votes."""
        waited = takewhile(lambda submission: submission.since < old, self._unbegun)
        given_up = list(islice(waited, TOLD_AT_ONCE))
        for submission in given_up:
            del self._unbegun[submission]
            queue = submission.queue
            if queue and (queue.held or queue.wary):
                submission.fail(locked())
            else:
                submission.fail(TimeoutError("no commit began in time"))
        return len(given_up) == TOLD_AT_ONCE

    def _give_up_locked(self, old: float) -> None:
        """Fails what commits gave back and has waited for too long: what a lock holds up has no other end."""
        for queue in [queue for queue in self._queues.values() if queue.held or queue.wary]:
            queue.fail_returned(old, locked())
            dropped = queue.drop_done()
            for piece in dropped:
                self._unbegun.pop(piece.submission, None)
            self._size = self._size.minus(queue.size_of(dropped))
            if dropped:
                self._fewer.set()
            if queue.held and not queue.ballots:
                self._release(queue)
            self._forget_if_idle(queue)

    def _forget_if_idle(self, queue: BallotQueue) -> None:
        if queue.idle and not queue.offered:
            self._queues.pop((queue.poll.poll_no, queue.poll.state), None)
