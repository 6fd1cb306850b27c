"""What all tests against real servers need."""

import pytest

from query_server import freshness


@pytest.fixture(autouse=True)
def early_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A query server in this process gives up waiting this long before a call's deadline, or half-way to it: so its
    refusal comes in time, also on a busy machine."""
    monkeypatch.setattr(freshness, "_MARGIN", 0.8)
