"""Addresses of stores, as people are shown them."""

import asyncio

import pytest

from clients.databases import migrate
from clients.failures import Failure
from clients.up import _without_password


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("nats://token@h:4222", "nats://h:4222"),
        ("nats://u:p@a:1,nats://token@b:2", "nats://a:1,nats://b:2"),
        ("nats://a:1,nats://token@b:2", "nats://a:1,nats://b:2"),
        ("postgresql://u:a:b@h/d", "postgresql://h/d"),
        ("postgresql://u:p@ss@h,i/d?password=p", "postgresql://h,i/d"),
        ("postgresql://u:p/a?b,c@h/d", "postgresql://h/d"),
        ("redis://h:6379/0", "redis://h:6379/0"),
    ],
)
def test_an_address_is_shown_without_its_password(url: str, shown: str) -> None:
    assert _without_password(url) == shown


def test_an_address_that_is_not_valid_is_not_quoted() -> None:
    with pytest.raises(Failure, match="its address is not valid") as refused:
        asyncio.run(migrate("write", "postgresql://tally:s3cr/et@h/d"))
    assert "s3cr" not in str(refused.value)
