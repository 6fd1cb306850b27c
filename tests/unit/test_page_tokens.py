"""The page_token of a list: opaque, for one list, and nothing else passes for one."""

from __future__ import annotations

import random
import string
from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from contracts.refusals import Refusal
from query_server.views import _FIRST_PAGE, _page_token, _parse_page_token, _Place

OPEN, CLOSED = b"polls 2", b"polls 3"
MOMENTS = [
    datetime(2026, 2, 3, 4, 5, 6, 789_012, tzinfo=UTC),
    datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
    datetime(1, 1, 1, tzinfo=UTC) + timedelta(days=1),
]


def is_refused(text: str, listed: bytes) -> None:
    with pytest.raises(Refusal) as refused:
        _parse_page_token(text, listed)
    assert refused.value.fields.keys() == {"page_token"}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_token_names_the_last_element_of_its_page(moment: datetime) -> None:
    place = _Place(moment, uuid4())
    token = _page_token(place, OPEN)
    assert _parse_page_token(token, OPEN) == place
    assert len(token) <= 200


def test_without_a_token_a_list_begins() -> None:
    assert _parse_page_token("", OPEN) == _FIRST_PAGE


def test_a_token_belongs_to_one_list() -> None:
    is_refused(_page_token(_Place(MOMENTS[0], uuid4()), OPEN), CLOSED)


def test_anything_else_is_refused() -> None:
    chance = random.Random(1)
    token = _page_token(_Place(MOMENTS[0], uuid4()), OPEN)
    wrong = ["é", " ", token[:-1], token + "A", token[:4] + "!!!!" + token[4:], token + "====", "A" * 44]
    wrong.append(urlsafe_b64encode(urlsafe_b64decode(token)[:9] + b"\x7f" * 24).decode())
    wrong += ["".join(chance.choices(string.printable, k=chance.randrange(1, 60))) for _ in range(500)]
    for text in wrong:
        is_refused(text, OPEN)
