"""The page_token of ListPolls: opaque, for one list, and nothing else passes for one."""

from __future__ import annotations

import random
import string
from base64 import urlsafe_b64encode
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from tally.poll.v1.poll_pb2 import PollState
from tally.query.v1.query_service_pb2 import Poll

from contracts.refusals import Refusal
from query_server.views import _page_token, _parse_page_token

OPEN, CLOSED = PollState.POLL_STATE_OPEN, PollState.POLL_STATE_CLOSED
MOMENTS = [
    datetime(2026, 2, 3, 4, 5, 6, 789_012, tzinfo=UTC),
    datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
    datetime(1, 1, 1, tzinfo=UTC) + timedelta(days=1),
]


def poll(poll_id: UUID, moment: datetime) -> Poll:
    created = Poll(poll_id=str(poll_id))
    created.created_at.FromDatetime(moment)
    return created


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_token_names_the_last_poll_of_its_page(moment: datetime) -> None:
    poll_id = uuid4()
    token = _page_token(poll(poll_id, moment), OPEN)
    assert _parse_page_token(token, OPEN) == (moment, poll_id)
    assert len(token) <= 200


def test_a_token_belongs_to_one_filter() -> None:
    token = _page_token(poll(uuid4(), MOMENTS[0]), OPEN)
    for state in (CLOSED, PollState.POLL_STATE_UNSPECIFIED):
        with pytest.raises(Refusal) as refused:
            _parse_page_token(token, state)
        assert refused.value.fields.keys() == {"page_token"}


def test_anything_else_is_refused() -> None:
    chance = random.Random(1)
    token = _page_token(poll(uuid4(), MOMENTS[0]), OPEN)
    wrong = ["é", " ", token[:-1], token + "A", "A" * 35, urlsafe_b64encode(b"\x01\x02" + b"\x7f" * 24).decode()]
    wrong += ["".join(chance.choices(string.printable, k=chance.randrange(1, 60))) for _ in range(500)]
    for text in wrong:
        with pytest.raises(Refusal) as refused:
            _parse_page_token(text, OPEN)
        assert refused.value.fields.keys() == {"page_token"}
