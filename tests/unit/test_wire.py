"""What a serialized message has too much of is found before it is read."""

import asyncio
import random
from typing import Any
from uuid import uuid4

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import DecodeError
from tally.command.v1 import command_service_pb2 as command
from tally.poll.v1.poll_pb2 import PollOption, PollSpec
from tally.query.v1 import query_service_pb2 as query

from runtime.wire import InvalidMessage, Pauses, excess, split

FEW = PollSpec(title="t", options=[PollOption(option_id="a")] * 1000)
MANY = PollSpec(title="t", options=[PollOption(option_id="a")] * 1001)
VOTES = [command.Vote(voter_id="v", option_ids=["a"])]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (command.CreatePollRequest(poll=FEW), ""),
        (command.CreatePollRequest(poll=MANY), "poll.options"),
        (command.UpdatePollRequest(poll=MANY), "poll.options"),
        (command.UpdatePollRequest(update_mask=FieldMask(paths=["title"] * 1000)), ""),
        (command.UpdatePollRequest(update_mask=FieldMask(paths=["title"] * 1001)), "update_mask.paths"),
        (command.CastVoteRequest(option_ids=["a"] * 1001), "option_ids"),
        (command.CastVotesRequest(votes=VOTES * 20_000), ""),
        (command.CastVotesRequest(votes=VOTES * 20_001), "votes"),
        (command.CastVotesRequest(votes=[command.Vote(option_ids=["a"] * 100_000)]), "votes[0].option_ids"),
        (command.RegisterVotersRequest(voters=[command.Voter()] * 20_001), "voters"),
        (query.WatchResultsRequest(poll_ids=[str(uuid4())] * 100, at_least_as_fresh_each=["x"] * 100), ""),
        (query.WatchResultsRequest(poll_ids=[""] * 101), "poll_ids"),
        (query.WatchResultsRequest(at_least_as_fresh_each=[""] * 101), "at_least_as_fresh_each"),
        (query.BatchGetResultsRequest(poll_ids=[""] * 101), "poll_ids"),
    ],
)
def test_a_list_has_at_most_what_the_rules_allow(message: Any, field: str) -> None:
    assert [*excess(message.SerializeToString(), message.DESCRIPTOR)] == ([field] if field else [])


@pytest.mark.parametrize(
    "data",
    [
        b"\x7a\x00" * 2_000_000,
        b"\x7b\x7c" * 2_000_000,
        b"\xfa\x01\x00" * 1_000_000,
        b"\x0a\x00" * 2_000_000,
        b"\x0d....\x09........" * 100_000,
    ],
    ids=["unknown fields", "groups", "large numbers", "one field many times", "fixed numbers"],
)
def test_other_fields_are_few(data: bytes) -> None:
    for message in (command.CreatePollRequest, command.OpenPollRequest, query.GetPollRequest):
        assert [*excess(data, message.DESCRIPTOR)] == [""]


def test_a_message_that_comes_in_parts_hides_nothing() -> None:
    part = command.CreatePollRequest(poll=PollSpec(options=[PollOption()] * 900)).SerializeToString()
    assert excess(part * 2, command.CreatePollRequest.DESCRIPTOR) == {"poll": "must come once"}


def test_every_list_of_every_request_has_a_limit() -> None:
    """A new field is counted without a line of code, if its rule says how many entries it may have."""
    for service in (command.DESCRIPTOR, query.DESCRIPTOR):
        for name, message in service.message_types_by_name.items():
            for field in message.fields if name.endswith("Request") else ():
                if field.is_repeated and field.message_type is None:
                    data = command.CastVoteRequest(option_ids=["x"] * 30_000).SerializeToString()
                    data = data.replace(b"\x1a\x01x", bytes([field.number << 3 | 2]) + b"\x01x")
                    assert [*excess(data, message)] == [field.name], f"{name}.{field.name}"


def parts(request: Any, name: str) -> tuple[bytes, list[bytes]]:
    return asyncio.run(split(request.SerializeToString(), request.DESCRIPTOR, name, Pauses()))


def test_a_request_is_split_into_its_entries() -> None:
    votes = [command.Vote(voter_id="v" * n, option_ids=["o"] * (n % 3)) for n in range(1, 300)]
    request: Any = command.CastVotesRequest(batch_sequence=-7, poll_id="p", votes=votes, idempotency_key="k" * 16)
    rest, entries = parts(request, "votes")
    assert [command.Vote.FromString(entry) for entry in entries] == votes
    del request.votes[:]
    assert command.CastVotesRequest.FromString(rest) == request


@pytest.mark.parametrize(("voters", "unknown", "field"), [(20_001, 0, "voters"), (1, 2_000, "")])
def test_what_is_too_much_is_not_split(voters: int, unknown: int, field: str) -> None:
    data = command.RegisterVotersRequest(voters=[command.Voter()] * voters).SerializeToString() + b"\x7a\x00" * unknown
    with pytest.raises(InvalidMessage) as refusal:
        asyncio.run(split(data, command.RegisterVotersRequest.DESCRIPTOR, "voters", Pauses()))
    assert [*refusal.value.fields] == [field]


async def test_broken_bytes_are_left_to_protobuf() -> None:
    chance = random.Random(11)
    whole = command.CastVotesRequest(batch_sequence=1, poll_id="p" * 36, votes=VOTES * 30).SerializeToString()
    same = 0
    for _ in range(5_000):
        data = bytearray(whole[: chance.randrange(1, len(whole) + 1)] if chance.random() < 0.3 else whole)
        for _ in range(chance.randrange(3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        excess(bytes(data), command.CastVotesRequest.DESCRIPTOR)
        rest, entries = await split(bytes(data), command.CastVotesRequest.DESCRIPTOR, "votes", Pauses())
        try:
            read = command.CastVotesRequest.FromString(bytes(data))
        except DecodeError:
            # May be split in any way.
            continue
        votes = [command.Vote.FromString(entry) for entry in entries]
        if list(read.votes) == votes:
            same += 1
        else:
            # A group may hide entries from protobuf, never the other way round.
            assert len(votes) > len(read.votes)
        del read.votes[:]
        assert command.CastVotesRequest.FromString(rest).poll_id == read.poll_id
    assert same > 1_000
