"""What may happen to a poll, and that deciding it touches nothing outside."""

import subprocess
import sys
from datetime import UTC, datetime

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from tally.poll.v1.error_reason_pb2 import ErrorReason
from tally.poll.v1.poll_pb2 import VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec

from command_server.poll import CLOSED, DRAFT, OPEN, Poll, choose, close_poll, create_poll, open_poll, update_poll
from contracts.refusals import Refusal

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
SPEC = PollSpec(
    title="Lunch?", method=VOTING_METHOD_SINGLE_CHOICE, options=[PollOption(option_id="a"), PollOption(option_id="b")]
)


def at(state: str, spec: PollSpec = SPEC) -> Poll:
    return Poll(state, spec, NOW)


def test_a_poll_lives_from_draft_to_open_to_closed() -> None:
    created = create_poll(SPEC)
    opened = open_poll(at(created.state))
    closed = close_poll(at(opened.state))
    assert [created.state, opened.state, closed.state] == [DRAFT, OPEN, CLOSED]
    changes = [change.event.WhichOneof("change") for change in (created, opened, closed)]
    assert changes == ["poll_created", "poll_opened", "poll_closed"]
    assert created.event.poll_created.poll == SPEC


def test_fields_that_the_contract_does_not_name_are_not_kept() -> None:
    padded = PollSpec.FromString(SPEC.SerializeToString() + b"\x82\x7d\x03any")
    updated = update_poll(padded, FieldMask())(at(DRAFT))
    assert {create_poll(padded).spec.ByteSize(), updated.spec.ByteSize()} == {SPEC.ByteSize()}


@pytest.mark.parametrize("state", [OPEN, CLOSED])
def test_only_a_draft_can_be_opened(state: str) -> None:
    with pytest.raises(Refusal) as refusal:
        open_poll(at(state))
    assert refusal.value.reason == ErrorReason.ERROR_REASON_POLL_NOT_DRAFT


@pytest.mark.parametrize("state", [DRAFT, CLOSED])
def test_only_an_open_poll_can_be_closed(state: str) -> None:
    with pytest.raises(Refusal) as refusal:
        close_poll(at(state))
    assert refusal.value.reason == ErrorReason.ERROR_REASON_POLL_NOT_OPEN


@pytest.mark.parametrize(
    ("option_ids", "reason"),
    [
        ([], ErrorReason.ERROR_REASON_INVALID_REQUEST),
        (["a", "b"], ErrorReason.ERROR_REASON_TOO_MANY_CHOICES),
        (["a", "a"], ErrorReason.ERROR_REASON_TOO_MANY_CHOICES),
        (["c"], ErrorReason.ERROR_REASON_UNKNOWN_OPTION),
        (["A"], ErrorReason.ERROR_REASON_UNKNOWN_OPTION),
    ],
)
def test_a_single_choice_marks_one_known_option(option_ids: list[str], reason: ErrorReason.ValueType) -> None:
    with pytest.raises(Refusal) as refusal:
        choose(SPEC, {"a": 0, "b": 1}, option_ids)
    assert refusal.value.reason == reason


def test_a_choice_is_the_options_place() -> None:
    assert choose(SPEC, {"a": 0, "b": 1}, ["b"]) == [1]


def test_the_domain_does_no_io() -> None:
    """Neither it nor what it imports loads a database driver, a bus, a cache or a server."""
    loaded = "import sys; import command_server.poll; print(*{name.split('.')[0] for name in sys.modules})"
    modules = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout.split()
    assert "tally" in modules
    assert not set(modules) & {"grpc", "asyncpg", "nats", "redis", "asyncio", "socket"}
