"""Every reason has one status, and every status carries what the contract promises."""

from uuid import uuid4

import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from tally.poll.v1.error_reason_pb2 import ErrorReason

from contracts import freshness, log_epoch
from contracts.failures import refusal_of
from contracts.refusals import STATUS_CODES, Refusal, invalid_request, quoted, reason_name


@pytest.mark.parametrize("reason", [reason for reason in ErrorReason.values() if reason])
def test_every_reason_has_a_status_with_its_name(reason: ErrorReason.ValueType) -> None:
    status = Refusal(reason, "no").status()
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == (reason_name(reason), "tally")
    assert status.code == STATUS_CODES[reason]
    retries = [detail for detail in status.details if detail.Is(RetryInfo.DESCRIPTOR)]
    assert bool(retries) == (status.code in {8, 14}), "RetryInfo exactly where trying again can help"


def test_field_violations_are_named() -> None:
    bad = BadRequest()
    assert invalid_request({"poll.title": "is empty"}).status().details[1].Unpack(bad)
    assert [(v.field, v.description) for v in bad.field_violations] == [("poll.title", "is empty")]


def test_many_violations_are_counted() -> None:
    refusal = invalid_request({f"poll.options[{number}].label": "is empty" for number in range(1000)})
    assert list(refusal.fields)[::19] == ["poll.options[0].label", "poll.options[19].label"]
    assert refusal.fields[""] == "980 more fields break a rule"
    assert refusal.message.endswith("poll.options[19].label: is empty; request: 980 more fields break a rule")


def test_long_rules_do_not_fill_more_than_a_header_holds() -> None:
    rule = quoted("ö" * 200) + " looks the same as " + quoted("ö" * 200)
    refusal = invalid_request({f"poll.options[{number}].label": rule for number in range(1000)})
    assert 1 < len(refusal.fields) < 12
    assert len(refusal.status().SerializeToString()) * 4 / 3 < 8_000
    assert len(refusal.status().message) < 2_500


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a'b", '"a\'b"'), ("x" * 98, repr("x" * 98)), ("x" * 99, f"'{'x' * 99}…"), ("ö" * 50, f"'{'ö' * 49}…")],
)
def test_what_is_quoted_is_cut(text: str, shown: str) -> None:
    assert quoted(text) == shown


def test_a_defect_tells_the_caller_nothing() -> None:
    refusal = refusal_of(ZeroDivisionError("SELECT secret FROM votes"))
    assert refusal.reason == ErrorReason.ERROR_REASON_INTERNAL
    assert "SELECT" not in str(refusal.status())


def test_a_token_says_what_it_was_made_of() -> None:
    poll_id = uuid4()
    assert freshness.parse(freshness.token(poll_id, 1 << 40)) == (poll_id, 1 << 40, log_epoch.ZERO)


@pytest.mark.parametrize("text", ["x", "not a token", "é", "A" * 34, "AcwyMX5pnkXno0uKlOnJ0nkAAAAAAAAA"])
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(Refusal) as refusal:
        freshness.parse(text)
    assert refusal.value.fields.keys() == {"at_least_as_fresh"}
