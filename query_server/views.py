"""What readers ask of the read database: one statement for each question, its rows as messages of the contract.

Each answer says how far the poll is in the copy that was read: at version 0 of that copy's log epoch without the poll.
A read model that is being filled answers nothing: what it does not have yet may exist all the same.
"""

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

from contracts import log_epoch
from contracts.freshness import token
from contracts.live import hidden_results
from contracts.log_epoch import LogPosition
from contracts.read_database import DOCUMENTS, TURNOUT_GRAIN, VIEWS, VOTER_BYTES, vote_key
from contracts.refusals import ReadModelBehind, invalid_request, poll_archived
from query_server.pace import Pace
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
# Rows of a page that are fetched at once: few at first; once their size is known, as many as _ROWS_BYTES hold.
_FIRST_ROWS = 4
_MOST_ROWS = 200
_ROWS_BYTES = 1 << 20

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


class ReadModelFilling(ReadModelBehind):
    """The read model began from nothing, and does not have everything yet that there was then."""

    def __init__(self) -> None:
        super().__init__("the read model is being filled, and does not have everything yet; ask again")


class Found(NamedTuple):
    """A poll's results as a store has them."""

    position: LogPosition
    # A serialized GetResultsResponse, or what stands for hidden results; None: there is no such poll.
    results: bytes | None


class Views:
    """Reads from the read database. Every method raises one of failures.STORE_FAILURES where it is away, and
    all but `status` raise ReadModelFilling."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._turns = asyncio.Lock()

    async def poll(self, poll_id: UUID) -> tuple[LogPosition, Poll | None]:
        """A poll; None if there is none."""
        [row] = await self._fetch_full(sql.poll, poll_id)
        return _position(row), _poll(row) if row["poll_id"] else None

    async def document(self, poll_id: UUID) -> tuple[LogPosition, str | None]:
        """A poll as a JSON document; None if there is none."""
        [row] = await self._fetch_full(sql.document, poll_id)
        return _position(row), row["document"]

    async def positions(self, read_model: str, poll_ids: Sequence[UUID]) -> dict[UUID, LogPosition]:
        """How far the polls are in a read model."""
        query = {VIEWS: sql.positions, DOCUMENTS: sql.document_positions}[read_model]
        rows = await self._fetch_full(query, poll_ids)
        found = dict.fromkeys(poll_ids, LogPosition(rows[0]["log_epoch"], 0))
        return found | {row["poll_id"]: _position(row) for row in rows if row["poll_id"]}

    async def vote(self, poll_id: UUID, voter_key: bytes) -> tuple[LogPosition, VoteReceipt | None]:
        """The receipt of a voter in a poll, with only its poll_id; None if there is none. Raises POLL_ARCHIVED."""
        [row] = await self._fetch_full(sql.vote, poll_id, voter_key[:VOTER_BYTES])
        if row["archived_at"]:
            raise poll_archived(poll_id)
        return _position(row), VoteReceipt(poll_id=str(poll_id)) if row["voted"] else None

    async def newer_results(self, known: Mapping[UUID, LogPosition]) -> dict[UUID, Found]:
        """What there is of those polls that are further than `known`, or that a later log epoch does not have."""
        epochs = [position.log_epoch for position in known.values()]
        versions = [position.version for position in known.values()]
        rows = await self._fetch_full(sql.newer_results, list(known), epochs, versions)
        none = Found(LogPosition(rows[0]["log_epoch"], 0), None)
        found, pace = (
            {poll_id: none for poll_id, position in known.items() if position < none.position},
            Pace(self._turns),
        )
        for row in rows:
            if row["poll_id"]:
                found[row["poll_id"]] = Found(_position(row), _results(row))
                await pace()
        return found

    @_persistent
    async def polls(
        self, state: PollState.ValueType, poll_id_prefix: str, page_size: int, page_token: str
    ) -> tuple[ListPollsResponse, dict[UUID, LogPosition]]:
        """A page of polls, newest first, with how far each is. `poll_id_prefix` is empty or as in ListPollsRequest.

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
            rows = await connection.cursor(query, *arguments)
            page.next_page_token, positions = await _fill(page.polls, limit, _poll, rows, listed, Pace(self._turns))
        return page, positions

    @_persistent
    async def voter_votes(
        self, voter_key: bytes, page_size: int, page_token: str, fresh: UUID
    ) -> tuple[LogPosition, ListVoterVotesResponse, dict[UUID, LogPosition]]:
        """How far the poll `fresh` is, a page of a voter's votes that shows that or more, their receipts with only a
        poll_id, and how far the polls of these votes are.

        Raises INVALID_REQUEST for a token that no page of this voter returned.
        """
        listed = b"votes " + voter_key
        after = _parse_page_token(page_token, listed)
        limit = page_size or _DEFAULT_PAGE_SIZE
        page = ListVoterVotesResponse()
        async with self._connection() as connection, connection.transaction():
            # First, so that what follows shows this or more.
            [row] = _full(await connection.fetch(sql.positions, [fresh]))
            votes = await connection.cursor(
                sql.voter_votes,
                vote_key(voter_key, _FIRST_POLL),
                vote_key(voter_key, _LAST_POLL),
                after.created_at,
                after.poll_id,
                limit + 1,
            )
            page.next_page_token, positions = await _fill(
                page.votes, limit, _voter_vote, votes, listed, Pace(self._turns)
            )
        return _position(row), page, positions

    @_persistent
    async def turnout(self, request: GetTurnoutRequest) -> tuple[LogPosition, GetTurnoutResponse | None]:
        """How many voted when; None if there is no such poll. Raises POLL_ARCHIVED."""
        asked, chart = None, Buckets(request.bucket.seconds or TURNOUT_GRAIN, 0, 0)
        async with self._connection() as connection:
            # Which buckets there are depends on the poll, so it is asked for none first, and then until the answer is
            # about the buckets that its own state of the poll calls for: it is all of one moment, and of one copy.
            while asked != chart:
                rows = _full(await connection.fetch(sql.turnout, UUID(request.poll_id), *chart))
                poll = rows[0]
                if not poll["poll_id"]:
                    return _position(poll), None
                if poll["archived_at"]:
                    raise poll_archived(poll["poll_id"])
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
        return _position(poll), response

    async def status(self, read_model: str) -> bytes | None:
        """What the projector of a read model says of itself, as it has stored it."""
        query = {VIEWS: sql.status, DOCUMENTS: sql.document_status}[read_model]
        async with asyncio.timeout(_STATUS_PATIENCE):
            rows = await self._fetch(query, read_model)
        return rows[0]["status"] if rows else None

    async def _fetch_full(self, query: str, *arguments: object) -> list[Any]:
        """The rows of a read model, one at least. Raises ReadModelFilling."""
        return _full(await self._fetch(query, *arguments))

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
    pace: Pace,
) -> tuple[str, dict[UUID, LogPosition]]:
    """Makes an element of each row that a cursor has, up to `limit` or what an answer can hold; returns the token for
    the rows that are left, "" if none are, and how far each poll is."""
    size, last = 0, _FIRST_PAGE
    positions: dict[UUID, LogPosition] = {}
    batch = _full(await rows.fetch(_FIRST_ROWS))
    while batch:
        for row in batch:
            if not row["poll_id"]:
                return "", positions
            element = element_of(row)
            size += element.ByteSize()
            if len(page) == limit or (page and size > MAX_ANSWER_BYTES):
                return _page_token(last, listed), positions
            page.append(element)
            last = _Place(row["created_at"], row["poll_id"])
            positions[row["poll_id"]] = _position(row)
            await pace()
        batch = await rows.fetch(min(max(_ROWS_BYTES * len(page) // max(size, 1), 1), _MOST_ROWS))
    return "", positions


def _full(rows: list[Any]) -> list[Any]:
    """The rows of a read model, of which there is one at least unless it is being filled. Raises ReadModelFilling."""
    if not rows:
        raise ReadModelFilling
    return rows


def _position(row: Any) -> LogPosition:
    return LogPosition(row["log_epoch"], row["version"] or 0)


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
        archived_at=row["archived_at"],
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
        return hidden_results(row["version"], row["log_epoch"])
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
            consistency_token=token(row["poll_id"], row["version"], row["log_epoch"]),
            log_epoch=log_epoch.text(row["log_epoch"]),
        )
    ).SerializeToString()


def _state(row: Any) -> PollState.ValueType:
    return PollState.Value(f"POLL_STATE_{row['state']}")
