"""One person is one voter: ids that look the same and are not are refused, and so are labels that look the same."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from tally.command.v1 import command_service_pb2 as command
from tally.poll.v1.error_reason_pb2 import ErrorReason
from tally.poll.v1.poll_pb2 import ELIGIBILITY_ROLL, VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec
from tally.query.v1 import query_service_pb2 as query

from command_server import ballots
from contracts.text import voter_id_problem
from tests.servers import command_server, refused
from tests.system import System

BAD_IDS = {
    "ada ": "U+0020 SPACE",
    "\u00a0ada": "U+00A0 NO-BREAK SPACE",
    "a\u200bda": "U+200B ZERO WIDTH SPACE",
    "ada\ufeff": "U+FEFF ZERO WIDTH NO-BREAK SPACE",
    "a\u00adda": "U+00AD SOFT HYPHEN",
    "ada\x00": "U+0000",
    "jose\u0301": "U+00E9 LATIN SMALL LETTER E WITH ACUTE",
}


def spec(labels: dict[str, str], **fields: Any) -> PollSpec:
    options = [PollOption(option_id=option, label=label) for option, label in labels.items()]
    return PollSpec(title="?", method=VOTING_METHOD_SINGLE_CHOICE, options=options, **fields)


async def create(system: System, poll: PollSpec) -> str:
    return (await system.command.CreatePoll(command.CreatePollRequest(poll=poll))).poll_id


async def open_poll(system: System, **fields: Any) -> str:
    poll_id = await create(system, spec({"y": "Yes", "n": "No"}, **fields))
    await system.command.OpenPoll(command.OpenPollRequest(poll_id=poll_id))
    return poll_id


async def cast(system: System, poll_id: str, voter_ids: list[str]) -> command.CastVotesResponse:
    votes = [command.Vote(voter_id=voter_id, option_ids=["y"]) for voter_id in voter_ids]
    batch = command.CastVotesRequest(poll_id=poll_id, votes=votes)
    [response] = [response async for response in system.command.CastVotes(iter([batch]))]
    return response


@pytest.mark.parametrize("eligibility", [0, ELIGIBILITY_ROLL])
async def test_an_id_with_characters_that_are_not_seen_is_refused_wherever_it_is_given(
    system: System, eligibility: Any
) -> None:
    poll_id = await open_poll(system, eligibility=eligibility)
    # The poll is known to the server from here on: votes take the fast way.
    await cast(system, poll_id, ["warm-up"])
    for voter_id, character in BAD_IDS.items():
        calls: dict[str, list[Any]] = {
            "voter_id": [
                system.command.CastVote(command.CastVoteRequest(poll_id=poll_id, voter_id=voter_id, option_ids=["y"])),
                system.query.GetVote(query.GetVoteRequest(poll_id=poll_id, voter_id=voter_id)),
                system.query.ListVoterVotes(query.ListVoterVotesRequest(voter_id=voter_id)),
            ],
            "voters[1].voter_id": [
                system.command.RegisterVoters(
                    iter(
                        [
                            command.RegisterVotersRequest(
                                poll_id=poll_id,
                                voters=[command.Voter(voter_id="ada"), command.Voter(voter_id=voter_id)],
                            )
                        ]
                    )
                )
            ],
        }
        for field, refusals in calls.items():
            for call in refusals:
                refusal = await refused(call)
                assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
                assert (refusal.reason, refusal.fields) == ("INVALID_REQUEST", [field])
                assert character in refusal.message


async def test_a_batch_rejects_the_bad_ids_alone_and_counts_each_voter_once(system: System) -> None:
    poll_id = await open_poll(system)
    await cast(system, poll_id, ["warm-up"])
    voter_ids = ["ada", *BAD_IDS, "josé", "bob"]
    response = await cast(system, poll_id, voter_ids)
    assert response.accepted == 3
    assert {r.index for r in response.rejections} == set(range(1, 1 + len(BAD_IDS)))
    assert {r.reason for r in response.rejections} == {ErrorReason.ERROR_REASON_INVALID_REQUEST}
    for rejection, character in zip(response.rejections, BAD_IDS.values(), strict=True):
        assert rejection.message.startswith("voter_id: ")
        assert character in rejection.message


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Tea", "Tea"),
        ("Tea", "TEA "),
        ("Jos\u00e9", "Jose\u0301"),
        ("Te\u200ba", "Tea"),
        ("Room 1", "Room\u00a0\uff11"),
    ],
)
async def test_labels_that_look_the_same_are_refused_at_create_and_update(system: System, one: str, other: str) -> None:
    same = spec({"a": one, "x": "Milk", "b": other})
    refusal = await refused(system.command.CreatePoll(command.CreatePollRequest(poll=same)))
    assert (refusal.reason, refusal.fields) == ("INVALID_REQUEST", ["poll.options[2].label"])
    assert repr(one) in refusal.message
    assert repr(other) in refusal.message
    assert "looks the same" in refusal.message

    poll_id = await create(system, spec({"a": "Coffee", "b": "Milk"}))
    update = command.UpdatePollRequest(poll_id=poll_id, poll=same, update_mask=FieldMask(paths=["options"]))
    refusal = await refused(system.command.UpdatePoll(update))
    assert (refusal.reason, refusal.fields) == ("INVALID_REQUEST", ["poll.options[2].label"])


async def test_labels_that_differ_in_what_is_seen_are_kept_as_they_are(system: System) -> None:
    labels = {
        "a": "2²",
        "b": "22",
        "c": "Jose",
        "d": "José",
        "e": "①",
        "f": "1",
        "g": "\u202egnihton\u202c",
        "h": "\u200b",
    }
    created = await system.command.CreatePoll(command.CreatePollRequest(poll=spec(labels)))
    request = query.GetPollRequest(poll_id=created.poll_id, at_least_as_fresh=created.consistency_token)
    poll = (await system.query.GetPoll(request, timeout=10)).poll
    assert {option.option_id: option.label for option in poll.options} == labels


async def test_another_weight_than_the_roll_has_is_counted_wherever_it_comes(system: System) -> None:
    poll_id = await open_poll(system, eligibility=ELIGIBILITY_ROLL)

    async def register(*requests: list[tuple[str, int]]) -> tuple[int, int, int]:
        batches = [
            command.RegisterVotersRequest(
                poll_id=poll_id, voters=[command.Voter(voter_id=voter_id, weight=weight) for voter_id, weight in voters]
            )
            for voters in requests
        ]
        response = await system.command.RegisterVoters(iter(batches))
        return response.registered, response.already_registered, response.other_weights

    assert await register([("ada", 3), ("bob", 1), ("ada", 35), ("bob", 0)]) == (2, 2, 1)
    assert await register([("ada", 3), ("bob", 0)]) == (0, 2, 0)
    assert await register([("ada", 35), ("eve", 2)], [("eve", 3), ("bob", 1)]) == (1, 3, 2)
    # The first weight counts.
    cast_vote = command.CastVoteRequest(poll_id=poll_id, voter_id="ada", option_ids=["y"])
    token = (await system.command.CastVote(cast_vote)).consistency_token
    request = query.GetResultsRequest(poll_id=poll_id, at_least_as_fresh=token)
    results = (await system.query.GetResults(request, timeout=10)).results
    assert [option.count for option in results.counts] == [3, 0]


@pytest.mark.parametrize("compiled", [True, False])
async def test_both_readers_of_votes_reject_the_same_ids(
    write_dsn: str, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr(ballots, "compiled", None)
    voter_ids = [f"{before}{chr(byte)}{after}" for byte in range(128) for before in ("", "a") for after in ("", "z")]
    voter_ids = [*dict.fromkeys(voter_ids), "josé", "\u00a0ada", "ada\u3000", "1\uff12"]
    async with command_server(write_dsn) as stub:
        created = await stub.CreatePoll(command.CreatePollRequest(poll=spec({"y": "Yes", "n": "No"})))
        await stub.OpenPoll(command.OpenPollRequest(poll_id=created.poll_id))
        batches = [
            command.CastVotesRequest(
                poll_id=created.poll_id, votes=[command.Vote(voter_id=voter, option_ids=["y"]) for voter in ids]
            )
            for ids in (["warm-up"], voter_ids)
        ]
        _, response = [response async for response in stub.CastVotes(iter(batches))]
    rejected = {rejection.index for rejection in response.rejections}
    assert rejected == {index for index, voter in enumerate(voter_ids) if voter_id_problem(voter)}
    assert 100 < len(rejected) < 200
