"""Turnout and the votes of a voter, from what the projector stored, and pages that hold still."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import asyncpg
import grpc
import pytest
from prometheus_client import REGISTRY
from tally.event.v1.event_pb2 import (
    CertificationRequested,
    CountChange,
    Event,
    PollCancelled,
    PollCertified,
    PollClosed,
    PollCreated,
    PollOpened,
    PollUpdated,
    Recount,
    VotersRegistered,
    VotesCast,
)
from tally.poll.v1.poll_pb2 import (
    ELIGIBILITY_ROLL,
    POLL_STATE_CERTIFIED,
    POLL_STATE_CLOSED,
    POLL_STATE_DRAFT,
    POLL_STATE_OPEN,
    RESULTS_VISIBILITY_AFTER_CLOSE,
    VOTING_METHOD_SINGLE_CHOICE,
    PollOption,
    PollSpec,
    PollState,
    VoteReceipt,
)
from tally.query.v1 import query_service_pb2 as pb
from tally.query.v1.query_service_pb2_grpc import QueryServiceStub

from contracts.freshness import token
from contracts.log_epoch import NOWHERE, LogPosition
from contracts.voters import VoterKeys
from migrations import READ
from projector.documents import Documents
from projector.fold import Tally, fold
from projector.read_model import Change
from projector.schema import Schema
from projector.stream import Position
from projector.views import Views
from query_server import turnout as charts
from query_server.views import Views as Readers
from runtime.schema import migrate
from tests.pauses import longest_pause
from tests.processes import eventually
from tests.servers import VOTER_SECRET, query_channel, refused, sql, views_of

if TYPE_CHECKING:
    from tally.query.v1.query_service_pb2_grpc import QueryServiceAsyncStub

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
VOTERS = VoterKeys(VOTER_SECRET)


class Poll:
    """A poll whose events the test makes, each at a moment of its choice."""

    def __init__(self, *, at: datetime = NOON, **spec: Any) -> None:
        self.poll_id = uuid4()
        self.events: list[Event] = []
        self.tally: Tally | None = None
        options = [PollOption(option_id=option, label=option.upper()) for option in "ab"]
        fields = {"title": "Tea?", "method": VOTING_METHOD_SINGLE_CHOICE, "options": options, **spec}
        self.spec = PollSpec(**fields)
        self.happens(at, poll_created=PollCreated(poll=self.spec))

    def happens(self, at: datetime, **change: Any) -> None:
        version = self.tally.version + 1 if self.tally else 1
        event = Event(poll_id=str(self.poll_id), version=version, recorded_at=at, **change)  # type: ignore[arg-type]
        self.events.append(event)
        self.tally = fold(self.tally, event)

    def opens(self, at: datetime = NOON) -> None:
        self.happens(at, poll_opened=PollOpened())

    def votes(self, at: datetime, *voters: str, option: int = 0) -> None:
        keys = b"".join(sorted(map(VOTERS.voter_key, voters)))
        self.happens(at, votes_cast=VotesCast(voter_keys=keys, option_numbers=[option] * len(voters)))

    def votes_again(self, at: datetime, voter: str) -> None:
        """From option a to b."""
        changes = [CountChange(option_number=0, change=-1), CountChange(option_number=1, change=1)]
        key = VOTERS.voter_key(voter)
        self.happens(at, votes_cast=VotesCast(voter_keys=key, option_numbers=[1], replaced=1, count_changes=changes))

    def closes(self, at: datetime) -> None:
        self.happens(at, poll_closed=PollClosed())

    def is_certified(self, at: datetime) -> None:
        self.happens(at, certification_requested=CertificationRequested())
        assert self.tally
        recount = Recount(counts=self.tally.counts, total_votes=self.tally.total_votes)
        self.happens(at, poll_certified=PollCertified(recount=recount))


class ReadDatabase:
    """The read database, which the projector's own code fills."""

    def __init__(self, model: Schema) -> None:
        self._model = model
        self._stored: dict[UUID, int] = {}
        self._position: Position | None = None

    async def store(self, *polls: Poll) -> None:
        """What has happened to these polls since they were stored last."""
        changes = []
        for poll in polls:
            assert poll.tally
            before = self._stored.get(poll.poll_id, 0)
            if poll.events[before:]:
                changes.append(Change(str(poll.poll_id), before, poll.tally, poll.events[before:]))
            self._stored[poll.poll_id] = poll.tally.version
        position = Position((self._position.sequence if self._position else 0) + 1, 0)
        await self._model.store(changes, {}, self._position, position)
        await self._model.filled()
        self._position = position


@pytest.fixture
async def database(read_dsn: str) -> AsyncIterator[ReadDatabase]:
    async with Views.connect(read_dsn) as views:
        yield ReadDatabase(views)


@pytest.fixture
async def fresh(read_dsn: str) -> AsyncIterator[ReadDatabase]:
    """A copy that is to take the place of the views, as a rebuild makes one."""
    await migrate(read_dsn, READ["views"], "views_fresh")
    async with Views.connect(read_dsn, "views_fresh") as views:
        yield ReadDatabase(views)


async def switch(read_dsn: str) -> None:
    """Puts the fresh copy in the place of the views."""
    for schema, name in (("views", "views_retired"), ("views_fresh", "views")):
        await sql(read_dsn, f"ALTER SCHEMA {schema} RENAME TO {name}")


@pytest.fixture
async def server(read_dsn: str, redis_url: str) -> AsyncIterator[QueryServiceAsyncStub]:
    async with query_channel(read_dsn, redis_url) as channel:
        yield QueryServiceStub(channel)


# --- turnout


async def turnout(server: QueryServiceAsyncStub, poll: Poll, **fields: Any) -> pb.GetTurnoutResponse:
    return await server.GetTurnout(pb.GetTurnoutRequest(poll_id=str(poll.poll_id), **fields))


def after(**time: float) -> datetime:
    return NOON + timedelta(**time)


def chart(response: pb.GetTurnoutResponse) -> list[tuple[float, int, int]]:
    """Seconds after noon, votes, votes so far."""
    return [
        ((bucket.start_time.ToDatetime(UTC) - NOON).total_seconds(), bucket.votes, bucket.cumulative_votes)
        for bucket in response.buckets
    ]


async def test_turnout_is_a_chart_without_gaps(server: QueryServiceAsyncStub, database: ReadDatabase) -> None:
    poll = Poll(results_visibility=RESULTS_VISIBILITY_AFTER_CLOSE, eligibility=ELIGIBILITY_ROLL)
    poll.happens(NOON, voters_registered=VotersRegistered(voters=9, weight=9))
    poll.opens(after(seconds=3))
    poll.votes(after(seconds=4), "ann", "bob")
    await database.store(poll)
    poll.votes(after(seconds=9.999999), "cid")
    poll.votes(after(seconds=10), "dan")
    poll.votes_again(after(seconds=11), "ann")
    poll.votes(after(seconds=47), "eve", "fay")
    await database.store(poll)
    response = await turnout(server, poll)
    assert chart(response) == [(0, 3, 3), (10, 1, 4), (20, 0, 4), (30, 0, 4), (40, 2, 6)]
    assert (response.bucket.seconds, response.total_votes, response.eligible_voters) == (10, 6, 9)
    assert (response.poll_id, response.version) == (str(poll.poll_id), 8)
    assert response.as_of.ToDatetime(UTC) == after(seconds=47)
    longer = await turnout(server, poll, bucket=timedelta(seconds=30))
    assert chart(longer) == [(0, 4, 4), (30, 2, 6)]
    part = await turnout(server, poll, start_time=after(seconds=12), end_time=after(seconds=40.5))
    assert chart(part) == [(10, 1, 4), (20, 0, 4), (30, 0, 4), (40, 2, 6)]
    # To ask for more than there was is not wrong.
    wide = {"bucket": timedelta(minutes=1), "start_time": after(minutes=-1), "end_time": after(hours=1)}
    around = await turnout(server, poll, **wide)
    assert (len(around.buckets), chart(around)[:2], chart(around)[-1]) == (61, [(-60, 0, 0), (0, 6, 6)], (3540, 0, 6))


async def test_turnout_ends_with_the_poll(server: QueryServiceAsyncStub, database: ReadDatabase) -> None:
    poll, draft, cancelled = Poll(), Poll(), Poll()
    poll.opens()
    poll.votes(after(days=2), "ann")
    poll.closes(after(days=3))
    poll.is_certified(after(days=300))
    cancelled.happens(after(days=1), poll_cancelled=PollCancelled())
    await database.store(poll, draft, cancelled)
    response = await turnout(server, poll)
    # Three days by the hour, and the one in which it was closed.
    assert (response.bucket.seconds, len(response.buckets)) == (3600, 73)
    assert [number for number, bucket in enumerate(response.buckets) if bucket.votes] == [48]
    daily = await turnout(server, poll, bucket=timedelta(days=1))
    # Days of UTC.
    assert chart(daily)[0][0] == -12 * 3600
    assert [bucket.votes for bucket in daily.buckets] == [0, 0, 1, 0]
    for other in (draft, cancelled):
        nothing = await turnout(server, other, start_time=NOON)
        assert (list(nothing.buckets), nothing.total_votes) == ([], 0)


async def test_turnout_that_makes_no_sense_is_refused(server: QueryServiceAsyncStub, database: ReadDatabase) -> None:
    poll = Poll()
    poll.opens()
    poll.votes(after(hours=3), "ann")
    await database.store(poll)
    most = await turnout(server, poll, bucket=timedelta(seconds=10), end_time=after(seconds=10_000))
    assert len(most.buckets) == 1000
    for fields, field in (
        ({"bucket": timedelta(seconds=10)}, "bucket"),
        ({"bucket": timedelta(seconds=15)}, "bucket"),
        ({"bucket": timedelta(seconds=10.5)}, "bucket"),
        ({"bucket": timedelta(0)}, "bucket"),
        ({"bucket": timedelta(days=400)}, "bucket"),
        ({"start_time": datetime(1969, 1, 1, tzinfo=UTC)}, "start_time"),
        ({"start_time": after(hours=1), "end_time": after(hours=1)}, ""),
    ):
        refusal = await refused(turnout(server, poll, **fields))
        assert (refusal.reason, refusal.fields) == ("INVALID_REQUEST", [field]), fields
    # A bucket may end after the last year that there is a datetime of.
    last = datetime(9998, 12, 31, 23, 59, 59, tzinfo=UTC)
    length = timedelta(seconds=31_619_960)
    late = await turnout(server, poll, bucket=length, start_time=last - timedelta(1), end_time=last)
    assert late.buckets[-1].cumulative_votes == 1
    everything = await turnout(server, poll, start_time=datetime(1970, 1, 1, tzinfo=UTC), bucket=timedelta(days=366))
    assert everything.buckets[-1].cumulative_votes == 1
    refusal = await refused(server.GetTurnout(pb.GetTurnoutRequest(poll_id=str(uuid4()))))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "POLL_NOT_FOUND")


async def test_turnout_is_never_that_of_another_poll(
    server: QueryServiceAsyncStub,
    database: ReadDatabase,
    fresh: ReadDatabase,
    read_dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The views are replaced while it is read, and the polls have other numbers in the fresh copy."""
    few, many = polls = Poll(), Poll()
    for poll, voters in ((few, 1), (many, 9)):
        poll.opens()
        poll.votes(NOON, *(f"voter-{number}" for number in range(voters)))
    for model, order in ((database, polls), (fresh, polls[::-1])):
        for poll in order:
            await model.store(poll)
    switches = [lambda: asyncio.run(switch(read_dsn))]

    def meanwhile(*arguments: Any) -> charts.Buckets:
        if switches:
            switching = threading.Thread(target=switches.pop())
            switching.start()
            switching.join()
        return charts.buckets(*arguments)

    monkeypatch.setattr("query_server.views.buckets", meanwhile)
    assert chart(await turnout(server, few)) == [(0, 1, 1)]
    assert not switches


# --- the votes of a voter


async def votes_of(server: QueryServiceAsyncStub, voter_id: str, **fields: Any) -> pb.ListVoterVotesResponse:
    return await server.ListVoterVotes(pb.ListVoterVotesRequest(voter_id=voter_id, **fields), timeout=5)


async def test_a_voter_sees_each_vote_with_what_became_of_it(
    server: QueryServiceAsyncStub, database: ReadDatabase
) -> None:
    running, hidden, over, none = [
        Poll(at=after(hours=-4 + number), title=title, results_visibility=visibility)
        for number, (title, visibility) in enumerate(
            (("one", 0), ("two", RESULTS_VISIBILITY_AFTER_CLOSE), ("three", 0), ("four", 0))
        )
    ]
    for poll in (running, hidden, over, none):
        poll.opens()
        poll.votes(after(seconds=1), "bob")
    for poll in (running, hidden, over):
        poll.votes(after(seconds=2), "ann", "cid")
    over.closes(after(seconds=3))
    await database.store(running, hidden, over, none)
    [third, second, first] = (await votes_of(server, "ann")).votes
    assert [vote.poll_title for vote in (first, second, third)] == ["one", "two", "three"]
    assert [vote.poll_state for vote in (first, second, third)] == [POLL_STATE_OPEN, POLL_STATE_OPEN, POLL_STATE_CLOSED]
    assert [vote.HasField("outcome") for vote in (first, second, third)] == [False, False, True]
    assert third.outcome == pb.Outcome(
        leaders=[pb.OptionCount(option_id="a", label="A", count=3)], leader_count=1, total_votes=3, certified=False
    )
    receipt_id = VOTERS.receipt_id(over.poll_id, VOTERS.voter_key("ann"))
    assert third.receipt == VoteReceipt(poll_id=str(over.poll_id), receipt_id=receipt_id), "not when the vote came"
    # What happens to a poll later reaches its votes at once.
    over.is_certified(after(seconds=4))
    hidden.closes(after(seconds=5))
    await database.store(over, hidden)
    [third, second, _] = (await votes_of(server, "ann")).votes
    assert (third.poll_state, third.outcome.certified) == (POLL_STATE_CERTIFIED, True)
    assert second.outcome.leaders[0].count == 3
    assert not (await votes_of(server, "dan")).votes


async def test_equal_leaders_are_all_named_and_of_no_votes_none(
    server: QueryServiceAsyncStub, database: ReadDatabase
) -> None:
    options = [PollOption(option_id=f"option-{number}", label="?") for number in range(40)]
    tied = Poll(options=options)
    tied.opens()
    for number in range(30):
        tied.votes(NOON, f"voter-{number}", option=number)
    tied.closes(NOON)
    await database.store(tied)
    [vote] = (await votes_of(server, "voter-7")).votes
    assert [leader.option_id for leader in vote.outcome.leaders] == [f"option-{number}" for number in range(10)]
    assert vote.outcome.leader_count == 30


async def test_pages_of_votes_hold_each_once_while_votes_come_and_change(
    server: QueryServiceAsyncStub, database: ReadDatabase
) -> None:
    polls = [Poll(at=after(seconds=number), title=f"poll {number}", allow_vote_change=True) for number in range(10)]
    for poll in polls:
        poll.opens()
        poll.votes(NOON, "ann")
    await database.store(*polls)
    seen: list[str] = []
    page_token = ""
    while True:
        page = await votes_of(server, "ann", page_size=3, page_token=page_token)
        seen += [vote.poll_title for vote in page.votes]
        page_token = page.next_page_token
        if not page_token:
            break
        new = Poll(at=after(minutes=1), title="new")
        new.opens()
        new.votes(NOON, "ann")
        polls[0].votes_again(after(hours=len(seen)), "ann") if len(seen) == 3 else None
        polls[8].closes(NOON) if len(seen) == 6 else None
        await database.store(new, polls[0], polls[8])
    assert seen == [f"poll {number}" for number in reversed(range(10))]
    polls_page = await server.ListPolls(pb.ListPollsRequest(page_size=1))
    mine = (await votes_of(server, "ann", page_size=1)).next_page_token
    for bad in ("?", "é", mine + "AAAA", mine[:4] + "!!!!" + mine[4:], polls_page.next_page_token):
        refusal = await refused(votes_of(server, "ann", page_token=bad))
        assert (refusal.reason, refusal.fields) == ("INVALID_REQUEST", ["page_token"])
    # Nor is it a token of somebody else who voted in the same polls.
    polls[9].votes(NOON, "bob")
    await database.store(polls[9])
    assert (await refused(votes_of(server, "bob", page_token=mine))).fields == ["page_token"]


async def test_pages_of_votes_go_on_in_a_copy_where_polls_have_other_numbers(
    server: QueryServiceAsyncStub, database: ReadDatabase, fresh: ReadDatabase, read_dsn: str
) -> None:
    polls = [Poll(at=after(seconds=number), title=str(number)) for number in range(3)]
    for poll in polls:
        poll.opens()
        poll.votes(NOON, "ann")
    for model, order in ((database, (1, 2, 0)), (fresh, (0, 1, 2))):
        for number in order:
            await model.store(polls[number])
    first = await votes_of(server, "ann", page_size=1)
    await switch(read_dsn)
    second = await votes_of(server, "ann", page_token=first.next_page_token)
    assert [vote.poll_title for vote in (*first.votes, *second.votes)] == ["2", "1", "0"]


async def test_votes_and_turnout_are_as_fresh_as_asked_for(
    server: QueryServiceAsyncStub, database: ReadDatabase
) -> None:
    poll = Poll()
    poll.opens()
    await database.store(poll)
    poll.votes(NOON, "ann")
    fresh: dict[str, Any] = {"at_least_as_fresh": token(poll.poll_id, 3)}
    for call in (
        server.ListVoterVotes(pb.ListVoterVotesRequest(voter_id="ann", **fresh), timeout=1.6),
        server.GetTurnout(pb.GetTurnoutRequest(poll_id=str(poll.poll_id), **fresh), timeout=1.6),
    ):
        refusal = await refused(call)
        assert (refusal.reason, " 1 behind" in refusal.message) == ("READ_MODEL_BEHIND", True)
    await database.store(poll)
    assert len((await votes_of(server, "ann", **fresh)).votes) == 1
    assert (await turnout(server, poll, **fresh)).version == 3


async def test_a_document_is_waited_for_until_its_own_read_model_has_it(
    server: QueryServiceAsyncStub, database: ReadDatabase, read_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("query_server.announcements._SAFETY_SECONDS", 3600.0)
    monkeypatch.setattr("query_server.announcements._ALONE_SECONDS", 3600.0)

    async def is_announced() -> None:
        assert REGISTRY.get_sample_value("tally_query_announced") == 1

    async def is_awaited() -> None:
        assert REGISTRY.get_sample_value("tally_query_waiting") == 1

    await eventually(is_announced)
    reads, read = 0, Readers.document

    async def counted(views: Readers, poll_id: UUID) -> tuple[LogPosition, str | None]:
        nonlocal reads
        reads += 1
        return await read(views, poll_id)

    monkeypatch.setattr(Readers, "document", counted)
    poll = Poll()
    fresh = pb.GetPollDocumentRequest(poll_id=str(poll.poll_id), at_least_as_fresh=token(poll.poll_id, 1))
    async with Documents.connect(read_dsn) as model:
        documents = ReadDatabase(model)
        await documents.store()
        call = asyncio.ensure_future(server.GetPollDocument(fresh, timeout=5))
        await eventually(is_awaited)
        await database.store(poll)
        done, _ = await asyncio.wait([call], timeout=0.1)
        assert (len(done), reads) == (0, 2)
        await documents.store(poll)
    assert (await call).version == 1


# --- results


async def test_the_read_database_hides_results_too(server: QueryServiceAsyncStub, database: ReadDatabase) -> None:
    hidden, shown = Poll(results_visibility=RESULTS_VISIBILITY_AFTER_CLOSE), Poll()
    for poll in (hidden, shown):
        poll.opens()
        poll.votes(NOON, "ann")
    await database.store(hidden, shown)
    name, missing = str(hidden.poll_id), str(uuid4())
    for call in (
        server.GetResults(pb.GetResultsRequest(poll_id=name)),
        server.GetResults(pb.GetResultsRequest(poll_id=name, at_least_as_fresh=token(hidden.poll_id, 3)), timeout=5),
        server.WatchResults(pb.WatchResultsRequest(poll_ids=[str(shown.poll_id), name]), timeout=5).read(),
    ):
        assert (await refused(call)).reason == "RESULTS_HIDDEN"
    # The same poll twice, written differently.
    poll_ids = [missing, name, str(shown.poll_id), str(shown.poll_id).upper()]
    batch = await server.BatchGetResults(pb.BatchGetResultsRequest(poll_ids=poll_ids))
    assert (list(batch.missing_poll_ids), list(batch.hidden_poll_ids)) == ([missing], [name])
    [results] = batch.results
    assert results == (await server.GetResults(pb.GetResultsRequest(poll_id=str(shown.poll_id)))).results
    hidden.closes(NOON)
    waiting = server.WatchResults(
        pb.WatchResultsRequest(poll_ids=[name], at_least_as_fresh=token(hidden.poll_id, 4)), timeout=5
    ).read()
    await database.store(hidden)
    first = await waiting
    assert isinstance(first, pb.WatchResultsResponse)
    assert (first.results.state, first.results.counts[0].count) == (POLL_STATE_CLOSED, 1)


async def test_more_results_than_an_answer_holds_are_refused(
    server: QueryServiceAsyncStub, database: ReadDatabase
) -> None:
    options = [PollOption(option_id=f"option-{number}", label="?" * 200) for number in range(1000)]
    polls = [Poll(options=options) for _ in range(20)]
    await database.store(*polls)
    poll_ids = [str(poll.poll_id) for poll in polls]
    refusal = await refused(server.BatchGetResults(pb.BatchGetResultsRequest(poll_ids=poll_ids)))
    assert (refusal.reason, refusal.fields) == ("INVALID_REQUEST", ["poll_ids"])
    assert len((await server.BatchGetResults(pb.BatchGetResultsRequest(poll_ids=poll_ids[:10]))).results) == 10
    for wrong in ([], ["7"], poll_ids[:1] * 2, [str(uuid4()) for _ in range(101)]):
        refusal = await refused(server.BatchGetResults(pb.BatchGetResultsRequest(poll_ids=wrong)))
        assert refusal.reason == "INVALID_REQUEST"


# --- pages of polls


async def test_pages_of_polls_hold_still_while_polls_change_their_state(
    server: QueryServiceAsyncStub, database: ReadDatabase
) -> None:
    polls = [Poll(at=after(seconds=number), title=str(number)) for number in range(9)]
    await database.store(*polls)

    async def pages(state: PollState.ValueType) -> list[str]:
        seen: list[str] = []
        request = pb.ListPollsRequest(state=state, page_size=2)
        while True:
            page = await server.ListPolls(request)
            seen += [poll.title for poll in page.polls]
            request.page_token = page.next_page_token
            if not page.next_page_token:
                return seen
            # The last one that was seen, and one that is still to come.
            for poll in (polls[int(seen[-1])], polls[1]):
                if poll.tally and poll.tally.state == POLL_STATE_DRAFT:
                    poll.opens(after(hours=1))
            polls[0].happens(after(hours=1), poll_updated=PollUpdated(poll=polls[0].spec))
            await database.store(*{poll.poll_id: poll for poll in polls}.values())

    assert await pages(POLL_STATE_DRAFT) == ["8", "7", "6", "5", "4", "3", "2", "0"]
    assert await pages(PollState.POLL_STATE_UNSPECIFIED) == list("876543210")


# --- long work does not block others


async def test_long_lists_hold_up_no_other_call(read_dsn: str, database: ReadDatabase) -> None:
    labels = [PollOption(option_id=f"option-{number}", label=f"{number:04}" + "é" * 196) for number in range(1000)]
    polls = [Poll(at=after(seconds=number), options=labels) for number in range(12)]
    for poll in polls:
        poll.opens()
        poll.votes(NOON, "ann")
    await database.store(*polls)
    known = {poll.poll_id: NOWHERE for poll in polls}
    async with asyncpg.create_pool(views_of(read_dsn), min_size=1, max_size=1) as pool:
        readers = Readers(pool)
        for work in (lambda: readers.polls(0, "", 1000, ""), lambda: readers.newer_results(known)):  # type: ignore[arg-type]
            pauses: list[tuple[float, float]] = []
            # Once more where the machine itself paused.
            while not pauses or (min(pauses)[0] > 0.02 and len(pauses) < 30):
                pauses.append(await longest_pause(work()))
            pause, seconds = min(pauses)
            assert pause < 0.02 < seconds, pauses
