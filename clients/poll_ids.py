"""Polls as people name them on the command line: by an id, or by as much of its beginning as no other poll has."""

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path

from tally.query.v1.query_service_pb2 import ListPollsRequest, ListPollsResponse

from clients.connection import find_address, query
from clients.failures import Failure, WrongUsage
from clients.output import one_line

# Short enough to type, and long enough that few of a million polls share it.
_SHORTEST = 4
_MOST_NAMED = 10
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_LENGTH = 36


def find_poll(given: str, query_address: str | None, data_dir: Path) -> str:
    """The id that `given` is, or the one that begins with it; only for the latter a query server is asked.

    Raises WrongUsage for what is or begins no id, or begins several, and Failure where there is no such poll.
    """
    return find_polls([given], query_address, data_dir)[0]


def find_polls(given: Sequence[str], query_address: str | None, data_dir: Path) -> list[str]:
    """The same for several: each poll once, in the order in which they are named."""
    texts = [text.lower() for text in given]
    for text in texts:
        if not is_whole(text) and not is_beginning(text):
            raise _no_id(text)
    found = texts if all(map(is_whole, texts)) else asyncio.run(_find(texts, query_address, data_dir))
    return list(dict.fromkeys(found))


def find_among(given: Sequence[str], poll_ids: Sequence[str]) -> list[str]:
    """Those of the ids that each of `given` begins; one that begins none of them stays as it is.

    Raises WrongUsage for what begins no id, or several.
    """
    found = []
    for text in map(str.lower, given):
        if not is_whole(text) and not is_beginning(text):
            raise _no_id(text)
        candidates = sorted({poll_id for poll_id in poll_ids if poll_id.startswith(text)})
        if len(candidates) > 1:
            raise _ambiguous(text, [(poll_id, "") for poll_id in candidates])
        found.append(candidates[0] if candidates else text)
    return found


def is_whole(text: str) -> bool:
    """Whether this is a whole id."""
    return bool(_ID.fullmatch(text))


def is_beginning(text: str) -> bool:
    """Whether an id can begin like this, and far enough for few to do so."""
    rest = "00000000-0000-0000-0000-000000000000"[len(text) :]
    return _SHORTEST <= len(text) < _LENGTH and is_whole(text + rest)


def _no_id(text: str) -> WrongUsage:
    return WrongUsage(
        f"{text!r} is not the id of a poll: give all of it, or its beginning, {_SHORTEST} characters or more"
    )


def _ambiguous(given: str, candidates: Sequence[tuple[str, str]], *, more: bool = False) -> WrongUsage:
    """What to say where several polls, as ids and titles, begin like this."""
    lines = [f"{poll_id}  {one_line(title)}".rstrip() for poll_id, title in candidates]
    if more:
        lines.append("and more")
    return WrongUsage("\n  ".join([f"{given} begins the ids of several polls; give more of it:", *lines]))


async def _find(given: Sequence[str], query_address: str | None, data_dir: Path) -> list[str]:
    address = find_address("query", query_address, data_dir)
    found = []
    for text in given:
        if is_whole(text):
            found.append(text)
            continue
        request = ListPollsRequest(poll_id_prefix=text, page_size=_MOST_NAMED)
        page: ListPollsResponse = await query(address, lambda queries: queries.ListPolls, request)
        if not page.polls:
            raise Failure(f"there is no poll whose id begins with {text}")
        if len(page.polls) > 1:
            candidates = [(poll.poll_id, poll.title) for poll in page.polls]
            raise _ambiguous(text, candidates, more=bool(page.next_page_token))
        found.append(page.polls[0].poll_id)
    return found
