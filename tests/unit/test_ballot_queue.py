"""What goes into one commit."""

import asyncio
import os
from itertools import pairwise
from sys import getsizeof
from uuid import UUID

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from tally.poll.v1.poll_pb2 import VOTING_METHOD_APPROVAL, PollOption, PollSpec

from command_server import ballot_queue, ballots
from command_server.ballot_queue import BallotQueue, Piece, Recorded, Size, Submission, Verdicts
from command_server.poll import OPEN, already_voted
from command_server.polls import Poll
from contracts.refusals import reason_name


def new_queue(choices: int = 1, *, allow_vote_change: bool = False) -> BallotQueue:
    options = [PollOption(option_id=str(number), label=str(number)) for number in range(choices)]
    spec = PollSpec(
        method=VOTING_METHOD_APPROVAL, options=options, max_choices=1000, allow_vote_change=allow_vote_change
    )
    return BallotQueue(Poll(UUID(int=1), 1, OPEN, spec, {}, {}))


def submission(*cast: bytes) -> Submission:
    return Submission(list(cast), 0.0, asyncio.get_running_loop().create_future())


def single_choices(number: int) -> list[bytes]:
    return [os.urandom(16) + ballots.marking([0]) for _ in range(number)]


def taken(pieces: list[Piece]) -> list[bytes]:
    return [ballot for piece in pieces for ballot in piece.ballots]


def recorded(version: int) -> Recorded:
    return Recorded(version, Timestamp(), already=False)


async def test_few_ballots_go_together_as_they_came() -> None:
    queue = new_queue()
    first, second = single_choices(3), single_choices(2)
    queue.put(submission(*first))
    queue.put(submission(*second))
    assert taken(queue.take()) == first + second
    assert (queue.ballots, queue.take()) == (0, [])


async def test_a_commit_has_no_more_bytes_than_its_event_may_have() -> None:
    queue = new_queue(choices=1000)
    for _ in range(10):
        queue.put(submission(*(os.urandom(16) + ballots.marking(range(1000)) for _ in range(500))))
    sizes = []
    while pieces := queue.take():
        sizes.append(sum(map(len, taken(pieces))))
    assert ballot_queue.BATCH_BYTES / 2 < max(sizes) <= ballot_queue.BATCH_BYTES
    assert queue.ballots == 0


async def test_many_ballots_go_by_ranges_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ballot_queue, "BATCH_BALLOTS", 1000)
    queue = new_queue()
    cast = single_choices(8000)
    for start in range(0, 8000, 500):
        queue.put(submission(*cast[start : start + 500]))
    commits = []
    while pieces := queue.take():
        commits.append(taken(pieces))
    assert max(map(len, commits)) <= 1000
    assert sorted(ballot for commit in commits for ballot in commit) == sorted(cast)
    # Neighbours go together: no commit has keys among those of another one, but the last, which begins a new sweep.
    spans = sorted((min(commit), max(commit)) for commit in commits)
    assert all(before[1] < after[0] for before, after in pairwise(spans))


async def test_the_ballots_of_a_range_stay_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ballot_queue, "BATCH_BALLOTS", 10)
    queue = new_queue()
    cast = [key * 16 + ballots.marking([number]) for number in range(20) for key in (b"a", b"z")]
    commits: list[bytes] = []
    # What a sweep leaves is taken together with what comes after it.
    for start, end in ((0, 14), (14, 18), (18, 36), (36, 40)):
        for ballot in cast[start:end]:
            queue.put(submission(ballot))
        commits += taken(queue.take())
    while pieces := queue.take():
        commits += taken(pieces)
    for voter in (b"a", b"z"):
        assert [b for b in commits if b.startswith(voter)] == [b for b in cast if b.startswith(voter)]


async def test_where_votes_may_change_a_commit_takes_one_of_each_voter() -> None:
    queue = new_queue(allow_vote_change=True)
    ada, bob, cleo = (key * 16 for key in (b"a", b"b", b"c"))
    marked = [key + ballots.marking([number]) for number, key in enumerate([ada, ada, bob, ada, bob])]
    whole = submission(*marked)
    queue.put(whole)
    commits = [taken(queue.take())]
    late = [cleo + ballots.marking([5]), ada + ballots.marking([6])]
    queue.put(submission(*late))
    while pieces := queue.take():
        commits.append(taken(pieces))
    assert [sorted(commit) for commit in commits] == [
        [marked[0], marked[2]],
        [marked[1], marked[4], late[0]],
        [marked[3]],
        [late[1]],
    ]
    assert queue.ballots == 0


async def test_few_changes_of_a_voter_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ballot_queue, "VOTER_BALLOTS", 3)
    queue = new_queue(allow_vote_change=True)
    ada, bob = (key * 16 + ballots.marking([0]) for key in (b"a", b"b"))
    first, second, third = submission(ada, ada, bob, ada, ada), submission(ada, ada), submission(ada, bob)
    added = [queue.put(each).ballots for each in (first, second, third)]
    assert added == [4, 0, 1]
    verdicts = second.verdicts.result()
    assert verdicts.recorded is None
    assert [reason_name(verdicts.of(n).reason) for n in range(2)] == ["OVERLOADED"] * 2  # type: ignore[union-attr]
    for version, waiting in enumerate((3, 1, 0), 2):
        for piece in queue.take():
            piece.submission.settle(piece, Verdicts(recorded(version), {}))
        assert queue.ballots == waiting
    assert set(first.verdicts.result().others) == {4}
    assert set(third.verdicts.result().others) == {0}
    assert queue.size == Size()


async def test_changes_whose_callers_have_gone_take_no_commits() -> None:
    queue = new_queue(allow_vote_change=True)
    ada = b"a" * 16 + ballots.marking([0])
    gone, waiting = submission(*[ada] * 50), submission(ada)
    queue.put(gone)
    queue.put(waiting)
    gone.verdicts.cancel()
    pieces = queue.take()
    assert [piece.submission for piece in pieces if not piece.is_done] == [waiting]
    assert queue.size == Size()


@pytest.mark.parametrize("choices", [1, 10, 1000])
async def test_what_waits_is_counted_in_bytes(choices: int) -> None:
    queue = new_queue(choices)
    cast = [os.urandom(16) + ballots.marking(range(choices)) for _ in range(200)]
    queue.put(submission(*cast))
    memory = sum(map(getsizeof, cast)) + 8 * len(cast)
    assert memory <= queue.size.bytes <= 2 * memory
    pieces = queue.take()
    queue.give_back(pieces[:1])
    assert queue.size == queue.size_of(pieces[:1])
    queue.take()
    assert queue.size == Size()


async def test_each_vote_of_a_voter_gets_its_own_verdict() -> None:
    queue = new_queue(allow_vote_change=True)
    whole = submission(*(key * 16 + ballots.marking([0]) for key in (b"a", b"b", b"a", b"c", b"a")))
    queue.put(whole)
    for version, refused in enumerate(([1], [0], []), 2):
        [piece] = queue.take()
        assert not whole.verdicts.done()
        whole.settle(piece, Verdicts(recorded(version), dict.fromkeys(refused, already_voted())))
    verdicts = whole.verdicts.result()
    assert (verdicts.recorded, set(verdicts.others)) == (recorded(4), {1, 2})


async def test_the_last_piece_settles_a_submission() -> None:
    cast = single_choices(500)
    whole = submission(*cast)
    pieces = whole.pieces()
    refused = {cast.index(piece.ballots[0]) for piece in pieces[::2]}
    for version, piece in enumerate(reversed(pieces), 2):
        assert not whole.verdicts.done()
        others = {0: already_voted()} if piece in pieces[::2] else {}
        whole.settle(piece, Verdicts(recorded(version), others))
    verdicts = whole.verdicts.result()
    assert verdicts.recorded == recorded(1 + len(pieces))
    assert verdicts.others.keys() == refused


async def test_a_piece_that_fails_ends_its_submission() -> None:
    whole = submission(*single_choices(500))
    first, second, *_ = whole.pieces()
    first.submission.fail(TimeoutError())
    second.submission.settle(second, Verdicts(recorded(2), {}))
    assert isinstance(whole.verdicts.exception(), TimeoutError)
