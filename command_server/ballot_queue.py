"""The ballots of one poll that wait for a commit, and which of them the next commit takes.

While no more wait than a commit may hold, it takes them all, as they came. When more wait they are kept by ranges of
their voters' keys, and the commits sweep over the ranges: each writes neighbours in the B-tree of the keys, where the
oldest ballots, of voters anywhere, would touch nearly every page of a large poll for a row or two. A ballot then waits
for one sweep: for what came before it, and for what comes meanwhile into ranges that are served before its own.

Where votes may be changed, they wait by voter instead, and a commit takes one of each: so the log keeps every change.
Each change of one voter takes a commit, so a voter has few that wait; what is more is refused.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from itertools import chain, islice
from math import inf
from typing import NamedTuple
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp

from command_server.ballots import by_range, range_of, size, voter
from command_server.poll import most_choices, too_many_of_voter
from command_server.polls import Poll
from contracts.log_epoch import ZERO
from contracts.refusals import Refusal

# The most ballots of one commit, and their most bytes: its event must fit a message of the bus.
BATCH_BALLOTS = 40_000
BATCH_BYTES = 1 << 21
# Up to so many ballots go in one round trip instead of four, by a function of the database.
SMALL_BATCH = 200
# The most ballots of one voter that wait where votes may be changed.
VOTER_BALLOTS = 100
# What a waiting ballot takes in memory beside its own bytes, and what its place among its voter's takes.
BALLOT_OVERHEAD = 80
_LINE_BYTES = 240
# Ranges of keys: the more there are, the better they fill a commit. And what stands for all of them.
_RANGES = 32
_ALL = -1


class Recorded(NamedTuple):
    """A vote that counts: the event that counts it, and whether an earlier call had recorded it."""

    version: int
    recorded_at: Timestamp
    already: bool
    # The history of the log in which the version counts.
    log_epoch: UUID = ZERO

    @property
    def position(self) -> tuple[UUID, int]:
        """Grows from event to event of one poll."""
        return self.log_epoch, self.version


Verdict = Recorded | Refusal


class Verdicts(NamedTuple):
    """What became of some ballots: `recorded` of all but those in `others`, by index. Where several commits recorded
    them, `recorded` is the latest."""

    recorded: Recorded | None
    others: Mapping[int, Verdict]

    def part(self, start: int, length: int) -> "Verdicts":
        """What became of the ballots from `start` on."""
        if not self.others:
            return self
        return Verdicts(self.recorded, {i: self.others[start + i] for i in range(length) if start + i in self.others})

    def of(self, index: int) -> Verdict:
        """What became of one ballot."""
        verdict = self.others.get(index, self.recorded)
        assert verdict is not None, "a ballot without a verdict"
        return verdict


class Size(NamedTuple):
    """How many ballots, and the bytes that they take in memory while they wait."""

    ballots: int = 0
    bytes: int = 0

    def plus(self, other: "Size") -> "Size":
        return Size(self.ballots + other.ballots, self.bytes + other.bytes)

    def minus(self, other: "Size") -> "Size":
        return Size(self.ballots - other.ballots, self.bytes - other.bytes)


class Submission:
    """The ballots of one call, at least one, in the order in which they were sent, and the future that says what became
    of them."""

    def __init__(
        self, ballots: list[bytes], since: float, verdicts: "asyncio.Future[Verdicts]", deadline: float = inf
    ) -> None:
        self.ballots = ballots
        # When it came, and when its caller stops waiting at the latest, by the loop's clock.
        self.since = since
        self.deadline = deadline
        self.verdicts = verdicts
        # Where it waits, once it does.
        self.queue: BallotQueue | None = None
        self._unsettled = len(ballots)
        self._recorded: Recorded | None = None
        self._others: dict[int, Verdict] = {}
        self._places: list[list[int]] | None = None

    def is_awaited(self, now: float) -> bool:
        """Whether its caller still waits, as far as the server knows."""
        return not self.verdicts.done() and now < self.deadline

    def pieces(self) -> "list[Piece]":
        """The ballots by ranges of keys; within a range they stay in their order."""
        if len(self.ballots) == 1:
            return [Piece(self, range_of(self.ballots[0], _RANGES), self.ballots)]
        return [Piece(self, number, part) for number, part in enumerate(by_range(self.ballots, _RANGES)) if part]

    def settle(self, piece: "Piece", verdicts: Verdicts) -> None:
        """Says what became of a piece; the last one settles the whole."""
        if self.verdicts.done():
            # Another piece has failed, or the caller went away. What was recorded counts all the same.
            return
        if piece.part == _ALL:
            self.verdicts.set_result(verdicts)
            return
        recorded, others = verdicts
        if recorded and (self._recorded is None or self._recorded.position < recorded.position):
            self._recorded = recorded
        if others:
            places = self.places(piece.part)
            self._others.update((places[index], verdict) for index, verdict in others.items())
        self._unsettled -= len(piece.ballots)
        if not self._unsettled:
            self.verdicts.set_result(Verdicts(self._recorded, self._others))

    def refuse(self, places: list[int], refusal: Refusal) -> None:
        """Says that some ballots, by index, do not wait; where these are all, that settles the whole."""
        self._others.update(dict.fromkeys(places, refusal))
        self._unsettled -= len(places)
        if not self._unsettled:
            self.verdicts.set_result(Verdicts(None, self._others))

    def fail(self, error: BaseException) -> None:
        """Ends it, if nothing else has; what becomes of its other pieces is not told any more."""
        if not self.verdicts.done():
            self.verdicts.set_exception(error)

    def places(self, part: int | list[int]) -> list[int]:
        """The indexes of a part's ballots. Those of ranges are found for all ranges at once, when somebody asks."""
        if isinstance(part, list):
            return part
        if part == _ALL:
            return list(range(len(self.ballots)))
        if self._places is None:
            self._places = [[] for _ in range(_RANGES)]
            for index, ballot in enumerate(self.ballots):
                self._places[range_of(ballot, _RANGES)].append(index)
        return self._places[part]


class Piece(NamedTuple):
    """Ballots of a submission that go into one commit: those in a range of keys, or in some places, or all of them."""

    submission: Submission
    # The range's number, or the places, or _ALL.
    part: int | list[int]
    ballots: list[bytes]

    @property
    def is_done(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.submission.verdicts.done()

    def halves(self) -> "tuple[Piece, Piece]":
        """Its ballots in two parts; it has at least two."""
        places, middle = self.submission.places(self.part), len(self.ballots) // 2
        return (
            Piece(self.submission, places[:middle], self.ballots[:middle]),
            Piece(self.submission, places[middle:], self.ballots[middle:]),
        )


def halves(pieces: list[Piece]) -> tuple[list[Piece], list[Piece]]:
    """Pieces with at least two ballots in two parts."""
    if len(pieces) == 1:
        first, second = pieces[0].halves()
        return [first], [second]
    return pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]


class BallotQueue:
    """The ballots of one poll that wait for a commit."""

    def __init__(self, poll: Poll) -> None:
        self.poll = poll
        self.size = Size()
        # Single votes that wait for their verdicts.
        self.calls = 0
        # How many commits of this poll are under way, and whether it waits for a committer.
        self.committing = 0
        self.offered = False
        # Whether another transaction has locked the poll: then no commit begins.
        self.held = False
        # Whether a commit found a lock, so that the next ones may: they go by themselves.
        self.wary = False
        # Whether the pause after a commit of a single ballot that found a lock is still to end.
        self.pausing = False
        # The most ballots of one commit, whatever they choose.
        largest = size(most_choices(poll.spec))
        self._most = min(BATCH_BALLOTS, BATCH_BYTES // largest)
        # What a ballot takes in memory, where all have one choice; else this comes on top of each one's bytes.
        self._one_choice = largest == size(1)
        self._overhead = BALLOT_OVERHEAD + (_LINE_BYTES if poll.spec.allow_vote_change else 0)
        self._latest: deque[Submission] = deque()
        # By range; none before more wait than a commit may hold.
        self._ranges: list[deque[Piece]] = []
        # What commits gave back, as they were to go: the next ones first.
        self._returned: list[list[Piece]] = []
        # Whether the latest commit got some of these.
        self._returned_next = False
        # Where the sweep is.
        self._range = 0
        # Where votes may be changed: the submission and the place in it of each ballot of a voter, oldest first.
        self._lines: defaultdict[bytes, list[tuple[Submission, int]]] = defaultdict(list)

    @property
    def ballots(self) -> int:
        """How many ballots wait."""
        return self.size.ballots

    @property
    def due(self) -> bool:
        """Whether another commit should begin."""
        if self.offered or self.held or self.pausing or not self.ballots:
            return False
        # Fewer, larger commits are cheaper for everybody, so only what is too much for one begins a second one beside
        # it; without a third, more wait for the next, and its keys are closer together. Where a later vote replaces an
        # earlier one, commits keep the order in which the votes came.
        beside = self.ballots > self._most and not self.poll.spec.allow_vote_change and not self.wary
        return self.committing == 0 or (self.committing == 1 and beside)

    @property
    def idle(self) -> bool:
        """Whether nothing would be lost with it."""
        return not (self.ballots or self.committing or self.held or self.pausing)

    def put(self, submission: Submission) -> Size:
        """Lets ballots wait. Of a voter who has many changes that wait already, further ones are refused."""
        submission.queue = self
        if self.poll.spec.allow_vote_change:
            added = self._size_of(self._line_up(submission))
        else:
            self._latest.append(submission)
            added = self._size_of(submission.ballots)
        self.size = self.size.plus(added)
        return added

    def _line_up(self, submission: Submission) -> list[bytes]:
        """Puts ballots behind those of their voters; returns those that wait."""
        refused = []
        for place, ballot in enumerate(submission.ballots):
            line = self._lines[voter(ballot)]
            if len(line) < VOTER_BALLOTS:
                line.append((submission, place))
            else:
                refused.append(place)
        if not refused:
            return submission.ballots
        submission.refuse(refused, too_many_of_voter())
        left_out = set(refused)
        return [ballot for place, ballot in enumerate(submission.ballots) if place not in left_out]

    def size_of(self, pieces: Iterable[Piece]) -> Size:
        """What pieces of this poll's ballots take."""
        size = Size()
        for piece in pieces:
            size = size.plus(self._size_of(piece.ballots))
        return size

    def _size_of(self, ballots: list[bytes]) -> Size:
        count = len(ballots)
        own = count * size(1) if self._one_choice else sum(map(len, ballots))
        return Size(count, own + count * self._overhead)

    def give_back(self, pieces: list[Piece], *, last: bool = False) -> None:
        """Takes back what a commit did not record: the next commit gets these pieces, or a later one."""
        self._returned.insert(len(self._returned) if last else 0, pieces)
        self.size = self.size.plus(self.size_of(pieces))

    @property
    def has_returned(self) -> bool:
        """Whether ballots wait that a commit gave back."""
        return bool(self._returned)

    def take(self) -> list[Piece]:
        """The ballots of the next commit."""
        # What was given back and what came since take turns, or a vote that stays locked would hold up all others.
        self._returned_next = bool(self._returned) and not (self._returned_next and self._has_others)
        if self._returned_next:
            taken = self._returned.pop(0)
        elif self.poll.spec.allow_vote_change:
            taken = self._one_of_each_voter()
        elif self.ballots <= self._most:
            taken = [*chain.from_iterable(self._ranges), *(Piece(new, _ALL, new.ballots) for new in self._latest)]
            self._ranges = []
            self._latest.clear()
        else:
            self._ranges = self._ranges or [deque() for _ in range(_RANGES)]
            for new in self._latest:
                for piece in new.pieces():
                    self._ranges[range_of(piece.ballots[0], _RANGES)].append(piece)
            self._latest.clear()
            taken = self._sweep()
        self.size = self.size.minus(self.size_of(taken))
        return taken

    @property
    def _has_others(self) -> bool:
        return self.ballots > sum([len(piece.ballots) for pieces in self._returned for piece in pieces])

    def fail_returned(self, old: float, error: BaseException) -> None:
        """Fails what commits gave back and what came before `old`, by the loop's clock."""
        for pieces in self._returned:
            for piece in pieces:
                if piece.submission.since < old:
                    piece.submission.fail(error)

    def drop_done(self) -> list[Piece]:
        """Takes out what nobody waits for any more."""
        dropped = [piece for pieces in (*self._ranges, *self._returned) for piece in pieces if piece.is_done]
        for pieces in self._ranges:
            kept = [piece for piece in pieces if not piece.is_done]
            pieces.clear()
            pieces.extend(kept)
        self._returned = [
            kept for pieces in self._returned if (kept := [piece for piece in pieces if not piece.is_done])
        ]
        done = [submission for submission in self._latest if submission.verdicts.done()]
        if done:
            dropped += [Piece(submission, _ALL, submission.ballots) for submission in done]
            self._latest = deque(submission for submission in self._latest if not submission.verdicts.done())
        for key, line in list(self._lines.items()):
            gone = [(submission, place) for submission, place in line if submission.verdicts.done()]
            if gone:
                dropped += [Piece(submission, [place], [submission.ballots[place]]) for submission, place in gone]
                line[:] = [(submission, place) for submission, place in line if not submission.verdicts.done()]
                if not line:
                    del self._lines[key]
        self.size = self.size.minus(self.size_of(dropped))
        return dropped

    def _sweep(self) -> list[Piece]:
        """The next pieces that fit a commit, and at least one."""
        taken: list[Piece] = []
        room = self._most
        while any(self._ranges):
            pieces = self._ranges[self._range]
            if taken and room < sum([len(piece.ballots) for piece in pieces]):
                # A range is not parted while it fits a commit: so the keys of two commits seldom overlap.
                return taken
            while pieces:
                if taken and room < len(pieces[0].ballots):
                    return taken
                room -= len(pieces[0].ballots)
                taken.append(pieces.popleft())
            self._range = (self._range + 1) % _RANGES
            if taken and self._range == 0:
                # The next sweep begins with a commit of its own: a commit's keys are neighbours.
                return taken
        return taken

    def _one_of_each_voter(self) -> list[Piece]:
        """The oldest ballot of each voter, as many as fit a commit; voters who have more go to the end of the line."""
        parts: defaultdict[Submission, list[int]] = defaultdict(list)
        # A voter's votes keep their order.
        earlier = {voter(ballot) for pieces in self._returned for piece in pieces for ballot in piece.ballots}
        for key in list(islice((key for key in self._lines if key not in earlier), self._most)):
            line = self._lines.pop(key)
            while line:
                submission, place = line.pop(0)
                parts[submission].append(place)
                if not submission.verdicts.done():
                    # Those before it, whose callers have gone, take no commit of their own.
                    break
            if line:
                self._lines[key] = line
        return [Piece(part, places, [part.ballots[place] for place in places]) for part, places in parts.items()]
