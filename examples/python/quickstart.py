"""A poll from its creation to its results, in Python, beside a running `tally up`.

It needs what `pip install ./gen googleapis-common-protos` installs.
"""

import os
from pathlib import Path
from uuid import uuid4

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from tally.command.v1.command_service_pb2 import CastVoteRequest, CreatePollRequest, OpenPollRequest
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub
from tally.poll.v1.poll_pb2 import VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec
from tally.query.v1.query_service_pb2 import GetResultsRequest
from tally.query.v1.query_service_pb2_grpc import QueryServiceStub

# gRPC repeats a call that is UNAVAILABLE, as while a server restarts. A command with a request_id takes effect once,
# and a vote counts once; the repeat of a vote with the same idempotency_key gets the first receipt.
SERVICE_CONFIG = Path(__file__).parents[1] / "service_config.json"


def channel(address: str) -> grpc.Channel:
    return grpc.insecure_channel(address, options=[("grpc.service_config", SERVICE_CONFIG.read_text())])


def refusal(error: grpc.RpcError) -> str:
    """The reason, of tally.poll.v1.ErrorReason, why Tally refused a call, and its message."""
    info = ErrorInfo()
    for metadatum in error.trailing_metadata() or ():
        if metadatum.key == "grpc-status-details-bin":
            for detail in Status.FromString(metadatum.value).details:
                detail.Unpack(info)
    return f"{info.reason or error.code().name}: {error.details()}"


def main() -> None:
    commands = CommandServiceStub(channel(os.environ.get("TALLY_COMMAND_ADDRESS", "127.0.0.1:50051")))
    queries = QueryServiceStub(channel(os.environ.get("TALLY_QUERY_ADDRESS", "127.0.0.1:50052")))
    options = [PollOption(option_id="pizza", label="Pizza"), PollOption(option_id="soup", label="Soup")]
    poll = PollSpec(title="Lunch?", method=VOTING_METHOD_SINGLE_CHOICE, options=options)
    poll_id = commands.CreatePoll(CreatePollRequest(request_id=str(uuid4()), poll=poll), timeout=5).poll_id
    commands.OpenPoll(OpenPollRequest(request_id=str(uuid4()), poll_id=poll_id), timeout=5)

    key = os.environ.get("VOTE_KEY", str(uuid4()))
    ballot = CastVoteRequest(poll_id=poll_id, voter_id="ada", option_ids=["pizza"], idempotency_key=key)
    vote = commands.CastVote(ballot, timeout=5)
    again = commands.CastVote(ballot, timeout=5)
    print("receipt", vote.receipt.receipt_id, "again", again.receipt.receipt_id)
    for mistake in (
        CastVoteRequest(poll_id=poll_id, voter_id="bob", option_ids=["salad"]),
        CastVoteRequest(poll_id=str(uuid4()), voter_id="bob", option_ids=["pizza"]),
    ):
        try:
            commands.CastVote(mistake, timeout=5)
        except grpc.RpcError as error:
            print("refused", refusal(error))

    # The answer shows the vote above, or a later state.
    fresh = GetResultsRequest(poll_id=poll_id, at_least_as_fresh=vote.consistency_token)
    for count in queries.GetResults(fresh, timeout=5).results.counts:
        print(count.label, count.count)


if __name__ == "__main__":
    main()
