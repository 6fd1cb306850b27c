"""Addresses of stores, as people are shown them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from clients.databases import migrate
from clients.failures import Failure
from clients.letters import read_all
from clients.rebuilding import Rebuilding
from clients.up import _without_password
from projector import event_log
from projector.live import Live


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


@pytest.mark.parametrize("dsn", ["postgresql://tally:s3cr/et@h/d", "postgresql://[s3cr@h/d", "s3cr://h/d"])
def test_an_address_that_is_not_valid_is_not_quoted(tmp_path: Path, dsn: str) -> None:
    with pytest.raises(Failure, match=r"its address is not valid$") as refused:
        asyncio.run(migrate("write", dsn))
    assert "s3cr" not in str(refused.value)
    redis = "redis://:s3cr/et@h/d"
    for model, given in (
        ("views", {"TALLY_WRITE_DSN": dsn, "TALLY_READ_DSN": dsn}),
        ("live", {"TALLY_WRITE_DSN": dsn, "TALLY_REDIS_URL": redis}),
    ):
        with pytest.raises(Failure, match=r"is as it was; run it again: its address is not valid$"):
            asyncio.run(Rebuilding(model, given, tmp_path).run())
    _, unanswered = asyncio.run(read_all({"live": redis, "views": dsn}))
    assert unanswered == {"live": "its address is not valid", "views": "its address is not valid"}


def test_only_an_address_is_called_not_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def defective(_: str) -> AsyncIterator[None]:
        raise ValueError("a defect")
        yield

    monkeypatch.setattr(event_log, "connect", defective)
    monkeypatch.setattr(Live, "connect", defective)
    given = {"TALLY_WRITE_DSN": "postgresql://h/d", "TALLY_REDIS_URL": "redis://h"}
    with pytest.raises(ValueError, match="a defect"):
        asyncio.run(Rebuilding("live", given, tmp_path).run())
    with pytest.raises(ValueError, match="a defect"):
        asyncio.run(read_all({"live": "redis://h"}))
