"""What readers ask of the read database: one statement for each question, its rows as messages of the contract."""

import asyncio
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import wraps
from hashlib import blake2b
from struct import Struct
from struct import error as StructError  # noqa: N812
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar
from uuid import UUID

import asyncpg
from tally.poll.v1.poll_pb2 import Eligibility, PollOption, PollState, ResultsVisibility, VoteReceipt, VotingMethod
from tally.query.v1.query_service_pb2 import (
    Certification,
    GetResultsResponse,
    GetTurnoutRequest,
    GetTurnoutResponse,
    ListPollsResponse,
    ListVoterVotesResponse,
    OptionCount,
    Outcome,
    Poll,
    Results,
    ResultsSource,
    VoterVote,
)

from contracts.freshness import Freshness, token
from contracts.live import hidden_results
from contracts.read_database import DOCUMENTS, TURNOUT_GRAIN, VIEWS, VOTER_BYTES, vote_key
from contracts.refusals import invalid_request
from query_server.turnout import Buckets, buckets
from runtime.postgres import queries

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

Element = TypeVar("Element", Poll, VoterVote)
Question = ParamSpec("Question")
Answer = TypeVar("Answer")

sql = queries(__package__)

CONNECTIONS = 10

# The longest that a question may take, with the wait for a connection; seconds.
_PATIENCE = 4.0
# The same for what a projector says of itself: whoever asks wants to hear of the other stores, too.
_STATUS_PATIENCE = 1.0
# How long a server may take to stop a statement that nobody waits for any more, before its connection is cut; seconds.
_CANCELLING = 0.5
_DEFAULT_PAGE_SIZE = 50
# gRPC clients refuse an answer above 4 MiB unless told otherwise; ours end before that.
MAX_ANSWER_BYTES = 3 << 20
# Rows that are fetched at once: pages can be long, and a poll with all its options large.
_PREFETCH = 50

# How a question fails whose server ends, or takes its connection away, before it is answered.
_INTERRUPTIONS = (
    ConnectionResetError,
    asyncpg.ConnectionDoesNotExistError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Which list it belongs to, and where a page of that ends. No base64 of so many bytes needs padding.
_PAGE_TOKEN = Struct(">9sq16s")
# The number of no poll, below that of every poll and above.
_FIRST_POLL, _LAST_POLL = 0, 2**31 - 1


def _persistent(ask: Callable[Question, Awaitable[Answer]]) -> Callable[Question, Awaitable[Answer]]:
    """Asks again where a server took its connection away: until another one answers, or none does."""

    @wraps(ask)
    async def persist(*arguments: Question.args, **options: Question.kwargs) -> Answer:
        # Of a server that ends, each connection of the pool may have to be tried to be known for dead.
        for _ in range(CONNECTIONS):
            with suppress(*_INTERRUPTIONS):
                return await ask(*arguments, **options)
        return await ask(*arguments, **options)

    return persist


class Views:
    """Reads from the read database. Every method raises one of contracts.failures.STORE_FAILURES where it is away."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def poll(self, poll_id: UUID) -> tuple[int, Poll | None]:
        """A poll with its version; 0 and None if there is none."""
        rows = await self._fetch(sql.poll, poll_id)
        return (rows[0]["version"], _poll(rows[0])) if rows else (0, None)

    async def document(self, poll_id: UUID) -> tuple[int, str | None]:
        """A poll as a JSON document with its version; 0 and None if there is none."""
        rows = await self._fetch(sql.document, poll_id)
        return (rows[0]["version"], rows[0]["document"]) if rows else (0, None)

    async def versions(self, read_model: str, poll_ids: Sequence[UUID]) -> dict[UUID, int]:
        """At which version those of the polls are that a read model has."""
        rows = await self._fetch({VIEWS: sql.versions, DOCUMENTS: sql.document_versions}[read_model], poll_ids)
        return {row["poll_id"]: row["version"] for row in rows}

    async def vote(self, poll_id: UUID, voter_key: bytes) -> tuple[int, VoteReceipt | None]:
        """A poll's version, 0 if there is no such poll, and the receipt of a voter, with only its poll_id."""
        rows = await self._fetch(sql.vote, poll_id, voter_key[:VOTER_BYTES])
        if not rows:
            return 0, None
        version, voted = rows[0]
        return version, VoteReceipt(poll_id=str(poll_id)) if voted else None

    async def newer_results(self, known: Mapping[UUID, int]) -> dict[UUID, tuple[int, bytes]]:
        """The polls that have a later version than the known one: version and serialized GetResultsResponse, or what
        stands for hidden results."""
        rows = await self._fetch(sql.newer_results, list(known), list(known.values()))
        return {row["poll_id"]: (row["version"], _results(row)) for row in rows}

    @_persistent
    async def polls(
        self, state: PollState.ValueType, poll_id_prefix: str, page_size: int, page_token: str
    ) -> ListPollsResponse:
        """A page of polls, newest first. `poll_id_prefix` is empty or as in ListPollsRequest.

        Raises INVALID_REQUEST for a token that no page with this state and prefix returned.
        """
        listed = f"polls {state} {poll_id_prefix.lower()}".encode()
        after = _parse_page_token(page_token, listed)
        limit = page_size or _DEFAULT_PAGE_SIZE
        query, arguments = sql.polls_page, [after.created_at, after.poll_id, limit + 1]
        state_name = PollState.Name(state).removeprefix("POLL_STATE_") if state else None
        if poll_id_prefix:
            query, arguments = sql.polls_page_with_prefix, [*arguments, *_ids_with(poll_id_prefix), state_name]
        elif state_name:
            query, arguments = sql.polls_page_in_state, [*arguments, state_name]
        page = ListPollsResponse()
        async with self._connection() as connection, connection.transaction():
            page.next_page_token = await _fill(
                page.polls, limit, _poll, connection.cursor(query, *arguments, prefetch=_PREFETCH), listed
            )
        return page

    @_persistent
    async def voter_votes(
        self, voter_key: bytes, page_size: int, page_token: str, fresh: Freshness
    ) -> tuple[int, ListVoterVotesResponse]:
        """A page of a voter's votes, their receipts with only a poll_id, and the version that it shows of the poll that
        is to be fresh; 0: none, or any will do.

        Raises INVALID_REQUEST for a token that no page of this voter returned.
        """
        listed = b"votes " + voter_key
        after = _parse_page_token(page_token, listed)
        limit = page_size or _DEFAULT_PAGE_SIZE
        version, page = 0, ListVoterVotesResponse()
        async with self._connection() as connection, connection.transaction():
            if fresh.version:
                # First, so that what follows shows this version or a later one.
                version = await connection.fetchval(sql.versions, [fresh.poll_id], column=1) or 0
            votes = connection.cursor(
                sql.voter_votes,
                vote_key(voter_key, _FIRST_POLL),
                vote_key(voter_key, _LAST_POLL),
                after.created_at,
                after.poll_id,
                limit + 1,
                prefetch=_PREFETCH,
            )
            page.next_page_token = await _fill(page.votes, limit, _voter_vote, votes, listed)
        return version, page

    @_persistent
    async def turnout(self, request: GetTurnoutRequest) -> tuple[int, GetTurnoutResponse | None]:
        """How many voted when, with the poll's version; 0 and None if there is no such poll."""
        asked, chart = None, Buckets(request.bucket.seconds or TURNOUT_GRAIN, 0, 0)
        async with self._connection() as connection:
            # Which buckets there are depends on the poll, so it is asked for none first, and then until the answer is
            # about the buckets that its own state of the poll calls for: it is all of one moment, and of one copy.
            while asked != chart:
                rows = await connection.fetch(sql.turnout, UUID(request.poll_id), *chart)
                if not rows:
                    return 0, None
                poll = rows[0]
                asked, chart = chart, buckets(request, poll["opened_at"], poll["closed_at"] or poll["as_of"])
        votes = {row["start_seconds"]: row["votes"] for row in rows}
        before = votes.pop(None, None) or 0
        response = GetTurnoutResponse(
            poll_id=str(UUID(request.poll_id)),
            version=poll["version"],
            as_of=poll["as_of"],
            buckets=chart.filled(votes, before),
            total_votes=poll["total_votes"],
            eligible_voters=poll["eligible_voters"],
        )
        response.bucket.seconds = chart.length
        return poll["version"], response

    async def status(self, read_model: str) -> bytes | None:
        """What the projector of a read model says of itself, as it has stored it."""
        query = {VIEWS: sql.status, DOCUMENTS: sql.document_status}[read_model]
        async with asyncio.timeout(_STATUS_PATIENCE):
            rows = await self._fetch(query, read_model)
        return rows[0]["status"] if rows else None

    @_persistent
    async def _fetch(self, query: str, *arguments: object) -> list[Any]:
        async with self._connection() as connection:
            rows: list[Any] = await connection.fetch(query, *arguments)
            return rows

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        try:
            async with asyncio.timeout(_PATIENCE):
                connection = await self._pool.acquire()
                try:
                    yield connection
                except BaseException:
                    # Who gives up on a server does not wait until that has stopped the statement.
                    returned = asyncio.ensure_future(self._pool.release(connection, timeout=_CANCELLING))
                    returned.add_done_callback(lambda returned: returned.cancelled() or returned.exception())
                    raise
                await self._pool.release(connection)
        except (asyncpg.InvalidCatalogNameError, asyncpg.UndefinedTableError) as error:
            # It was wiped, and is not made anew yet.
            raise ConnectionError("the read database has no tables") from error
        except asyncpg.TransactionRollbackError as error:
            raise ConnectionResetError("a standby ended the question, which was in the way of its replay") from error


class _Place(NamedTuple):
    """Where a page ends; the next one holds what is older."""

    created_at: datetime
    poll_id: UUID


_FIRST_PAGE = _Place(datetime(9999, 12, 31, tzinfo=UTC), UUID(int=0))


async def _fill(
    page: "RepeatedCompositeFieldContainer[Element]",
    limit: int,
    element_of: Callable[[Any], Element],
    rows: Any,
    listed: bytes,
) -> str:
    """Makes an element of each row, up to `limit` or what an answer can hold; returns the token for the rows that are
    left, "" if none are."""
    size, last = 0, _FIRST_PAGE
    async for row in rows:
        element = element_of(row)
        size += element.ByteSize()
        if len(page) == limit or (page and size > MAX_ANSWER_BYTES):
            return _page_token(last, listed)
        page.append(element)
        last = _Place(row["created_at"], row["poll_id"])
    return ""


def _ids_with(prefix: str) -> tuple[UUID, UUID]:
    """The lowest and the highest id that begins with a prefix."""
    digits = prefix.replace("-", "")
    return UUID(digits.ljust(32, "0")), UUID(digits.ljust(32, "f"))


def _page_token(last: _Place, listed: bytes) -> str:
    """The token for what comes after `last` in a list, which `listed` tells from all others."""
    mark = blake2b(listed, digest_size=9).digest()
    microseconds = (last.created_at - _EPOCH) // timedelta(microseconds=1)
    return urlsafe_b64encode(_PAGE_TOKEN.pack(mark, microseconds, last.poll_id.bytes)).decode()


def _parse_page_token(page_token: str, listed: bytes) -> _Place:
    """Where a page of this list begins. Raises INVALID_REQUEST for a token that none of its pages returned."""
    if not page_token:
        return _FIRST_PAGE
    try:
        _, microseconds, poll_id = _PAGE_TOKEN.unpack(urlsafe_b64decode(page_token))
        place = _Place(_EPOCH + timedelta(microseconds=microseconds), UUID(bytes=poll_id))
    except (ValueError, StructError, OverflowError):
        place = None
    # base64 has many ways to write the same.
    if place is None or page_token != _page_token(place, listed):
        raise invalid_request({"page_token": "must be the next_page_token of the page before, in the same list"})
    return place


def _poll(row: Any) -> Poll:
    options = zip(row["option_ids"], row["option_labels"], strict=True)
    return Poll(
        poll_id=str(row["poll_id"]),
        title=row["title"],
        description=row["description"],
        options=[PollOption(option_id=option_id, label=label) for option_id, label in options],
        method=VotingMethod.Value(f"VOTING_METHOD_{row['method']}"),
        state=_state(row),
        version=row["version"],
        created_at=row["created_at"],
        opened_at=row["opened_at"],
        closed_at=row["closed_at"],
        max_choices=row["max_choices"],
        opens_at=row["opens_at"],
        closes_at=row["closes_at"],
        allow_vote_change=row["allow_vote_change"],
        eligibility=Eligibility.Value(f"ELIGIBILITY_{row['eligibility']}"),
        results_visibility=ResultsVisibility.Value(f"RESULTS_VISIBILITY_{row['results_visibility']}"),
    )


def _voter_vote(row: Any) -> VoterVote:
    return VoterVote(
        receipt=VoteReceipt(poll_id=str(row["poll_id"])),
        poll_title=row["title"],
        poll_state=_state(row),
        outcome=Outcome.FromString(row["outcome"]) if row["outcome"] else None,
    )


def _results(row: Any) -> bytes:
    if row["hidden"]:
        return hidden_results(row["version"])
    counts = zip(row["option_ids"], row["option_labels"], row["counts"], strict=True)
    return GetResultsResponse(
        results=Results(
            poll_id=str(row["poll_id"]),
            state=_state(row),
            version=row["version"],
            counts=[OptionCount(option_id=option_id, label=label, count=count) for option_id, label, count in counts],
            total_votes=row["total_votes"],
            total_weight=row["total_weight"],
            as_of=row["as_of"],
            source=ResultsSource.RESULTS_SOURCE_READ_DATABASE,
            eligible_voters=row["eligible_voters"],
            certification=Certification.FromString(row["certification"]) if row["certification"] else None,
            consistency_token=token(row["poll_id"], row["version"]),
        )
    ).SerializeToString()


def _state(row: Any) -> PollState.ValueType:
    return PollState.Value(f"POLL_STATE_{row['state']}")
