"""The promises of the contract that can be read off the protos themselves."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from tally.command.v1 import command_service_pb2
from tally.poll.v1.error_reason_pb2 import ErrorReason
from tally.query.v1 import query_service_pb2

# What callers rely on, from the contract; more may be added, nothing may be renamed.
FIELDS = {
    "tally.poll.v1.PollSpec": "title description options method max_choices opens_at closes_at allow_vote_change"
    " eligibility results_visibility",
    "tally.poll.v1.PollOption": "option_id label",
    "tally.poll.v1.VoteReceipt": "poll_id receipt_id version recorded_at",
    "tally.command.v1.CreatePollRequest": "request_id poll",
    "tally.command.v1.CreatePollResponse": "poll_id consistency_token",
    "tally.command.v1.OpenPollRequest": "request_id poll_id",
    "tally.command.v1.OpenPollResponse": "consistency_token",
    "tally.command.v1.ClosePollRequest": "request_id poll_id",
    "tally.command.v1.ClosePollResponse": "consistency_token",
    "tally.command.v1.UpdatePollRequest": "request_id poll_id poll update_mask",
    "tally.command.v1.UpdatePollResponse": "consistency_token",
    "tally.command.v1.CancelPollRequest": "request_id poll_id",
    "tally.command.v1.CancelPollResponse": "consistency_token",
    "tally.command.v1.CertifyPollRequest": "request_id poll_id",
    "tally.command.v1.CertifyPollResponse": "consistency_token",
    "tally.command.v1.RegisterVotersRequest": "poll_id voters",
    "tally.command.v1.Voter": "voter_id weight",
    "tally.command.v1.RegisterVotersResponse": "registered already_registered consistency_token",
    "tally.command.v1.CastVoteRequest": "poll_id voter_id option_ids idempotency_key",
    "tally.command.v1.CastVoteResponse": "receipt already_recorded consistency_token",
    "tally.command.v1.CastVotesRequest": "batch_sequence poll_id votes idempotency_key",
    "tally.command.v1.Vote": "voter_id option_ids",
    "tally.command.v1.CastVotesResponse": "batch_sequence accepted already_recorded rejections consistency_token",
    "tally.command.v1.VoteRejection": "index reason message",
    "tally.query.v1.GetPollRequest": "poll_id at_least_as_fresh",
    "tally.query.v1.Poll": "poll_id title description options method state version created_at opened_at closed_at",
    "tally.query.v1.ListPollsRequest": "state page_size page_token",
    "tally.query.v1.ListPollsResponse": "polls next_page_token",
    "tally.query.v1.GetResultsRequest": "poll_id at_least_as_fresh",
    "tally.query.v1.GetResultsResponse": "results",
    "tally.query.v1.Results": "poll_id state version counts total_votes eligible_voters as_of source certification",
    "tally.query.v1.OptionCount": "option_id label count",
    "tally.query.v1.WatchResultsRequest": "poll_ids min_interval",
    "tally.query.v1.WatchResultsResponse": "results",
    "tally.query.v1.GetVoteRequest": "poll_id voter_id at_least_as_fresh",
    "tally.query.v1.GetVoteResponse": "receipt",
    "tally.query.v1.ReadModelStatus": "version events_behind seconds_behind last_error",
    "tally.query.v1.BatchGetResultsRequest": "poll_ids",
    "tally.query.v1.BatchGetResultsResponse": "results missing_poll_ids hidden_poll_ids",
    "tally.query.v1.ListVoterVotesRequest": "voter_id page_size page_token at_least_as_fresh",
    "tally.query.v1.ListVoterVotesResponse": "votes next_page_token",
    "tally.query.v1.VoterVote": "receipt poll_title poll_state outcome",
    "tally.query.v1.GetTurnoutRequest": "poll_id bucket start_time end_time at_least_as_fresh",
    "tally.query.v1.GetTurnoutResponse": "poll_id version as_of bucket buckets total_votes eligible_voters",
}
RPCS = {
    command_service_pb2: "CreatePoll UpdatePoll OpenPoll ClosePoll CancelPoll CertifyPoll RegisterVoters"
    " CastVote CastVotes",
    query_service_pb2: "GetPoll ListPolls GetResults BatchGetResults WatchResults GetVote ListVoterVotes GetTurnout"
    " GetReadModelStatus GetPollDocument",
}
REASONS = """INVALID_REQUEST UNKNOWN_OPTION TOO_MANY_CHOICES POLL_NOT_FOUND VOTE_NOT_FOUND POLL_NOT_OPEN POLL_NOT_DRAFT
POLL_NOT_CLOSED RESULTS_HIDDEN VOTER_NOT_ELIGIBLE ALREADY_VOTED OVERLOADED STORE_UNAVAILABLE READ_MODEL_BEHIND
VOTE_CONFLICT LOCKED"""


def test_the_names_that_callers_rely_on_are_there() -> None:
    pool = command_service_pb2.DESCRIPTOR.pool
    for message, fields in FIELDS.items():
        assert set(fields.split()) <= set(pool.FindMessageTypeByName(message).fields_by_name), message
    for module, rpcs in RPCS.items():
        [service] = module.DESCRIPTOR.services_by_name.values()
        assert set(rpcs.split()) <= set(service.methods_by_name)
    assert {f"ERROR_REASON_{reason}" for reason in REASONS.split()} <= set(ErrorReason.keys())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[FileDescriptorProto]:
    """Our protos with their comments."""
    image = tmp_path_factory.mktemp("protos") / "image.binpb"
    subprocess.run(["buf", "build", "-o", image], check=True)
    return [file for file in FileDescriptorSet.FromString(image.read_bytes()).file if file.name.startswith("tally/")]


def test_every_comment_starts_with_the_name_of_what_it_explains(files: list[FileDescriptorProto]) -> None:
    checked = 0
    for file in files:
        names = dict(named(file))
        for location in file.source_code_info.location:
            name = names.get(tuple(location.path))
            if name:
                assert location.leading_comments.split(" ")[1].rstrip(":\n") == name, f"{file.name}: {name}"
                checked += 1
    assert checked > 100


def named(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """Path in the descriptor → name, of everything that callers see. The numbers are those of descriptor.proto."""
    for m, message in enumerate(file.message_type):
        yield (4, m), message.name
        for f, field in enumerate(message.field):
            yield (4, m, 2, f), field.name
    for e, enum in enumerate(file.enum_type):
        yield (5, e), enum.name
        for v, value in enumerate(enum.value):
            yield (5, e, 2, v), value.name
    for s, service in enumerate(file.service):
        yield (6, s), service.name
        for r, method in enumerate(service.method):
            yield (6, s, 2, r), method.name


def test_breaking_the_released_contract_is_noticed(tmp_path: Path) -> None:
    broken = tmp_path / "protos"
    subprocess.run(["cp", "-r", "protos", broken], check=True)
    (broken / "released.binpb").unlink()
    path = broken / "tally/command/v1/command_service.proto"
    path.write_text(path.read_text().replace("string voter_id = 2", "string voter = 2", 1))
    released = Path("protos/released.binpb").resolve()
    subprocess.run(["cp", "buf.yaml", tmp_path], check=True)
    outcome = subprocess.run(
        ["buf", "breaking", "protos", "--against", released], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert outcome.returncode != 0
    assert 'changed name from "voter_id" to "voter"' in outcome.stdout


def test_the_lock_pins_everything_and_names_no_registry() -> None:
    lock = Path("requirements.lock").read_text()
    pinned = [line for line in lock.splitlines() if line and not line.startswith((" ", "#"))]
    assert len(pinned) > 40
    assert all("==" in line for line in pinned)
    assert lock.count("--hash=sha256:") > len(pinned)
    assert "http" not in lock
    assert "index-url" not in lock
