"""The compiled reader of votes: it agrees with protobuf and with hashlib, and leaves alone what is not plain."""

import random

import pytest
from google.protobuf.message import DecodeError
from tally.command.v1.command_service_pb2 import CastVotesRequest, Vote

from command_server import ballots
from contracts.text import is_plain_voter_id, voter_id_problem
from contracts.voters import VoterKeys

VOTERS = VoterKeys("a secret that only tests use, 32+ chars")
MARKINGS = {"yes": ballots.marking([0]), "no": ballots.marking([1]), "ö": ballots.marking([2])} | {
    f"option-{number}": ballots.marking([number]) for number in range(3, 30)
}
READER = ballots.Reader(VOTERS)


def expected(vote: Vote, key: str = "") -> bytes | None:
    """The ballot of a plain vote, by hashlib."""
    if not is_plain_voter_id(vote.voter_id) or len(vote.option_ids) != 1 or vote.option_ids[0] not in MARKINGS:
        return None
    voter_key = VOTERS.voter_key(vote.voter_id)
    end = ballots.keyed(VOTERS.idempotency_hash(voter_key, key)) if key else b""
    return voter_key + MARKINGS[vote.option_ids[0]] + end


def check(data: bytes) -> bool:
    """Compares what the reader makes of a request with what protobuf reads in it; says if the reader took it."""
    envelope = READER.envelope(data)
    if envelope is None:
        return False
    marked = READER.mark(data, MARKINGS, envelope.idempotency_key)
    try:
        request = CastVotesRequest.FromString(data)
    except DecodeError:
        # Some vote is broken; the server finds out when it reads the request for that vote.
        assert None in marked
        return False
    key = request.idempotency_key
    assert envelope == (request.batch_sequence, request.poll_id, len(request.votes), key)
    for ballot, vote in zip(marked, request.votes, strict=True):
        assert ballot in (None, expected(vote, key))
    return True


def test_it_was_compiled() -> None:
    assert ballots.compiled is not None, "make setup compiles command_server/_ballots.c where there is a C compiler"


@pytest.mark.parametrize("length", [1, 16, 127, 128, 129, 255, 256])
def test_a_voter_of_any_length_has_the_same_key_as_everywhere_else(length: int) -> None:
    votes = [Vote(voter_id="v" * length, option_ids=[option]) for option in MARKINGS]
    data = CastVotesRequest(batch_sequence=-(1 << 63), poll_id="p" * 36, votes=votes).SerializeToString()
    assert READER.mark(data, MARKINGS) == [expected(vote) for vote in votes]
    assert check(data)


@pytest.mark.parametrize(
    "vote",
    [
        Vote(),
        Vote(voter_id="ada"),
        Vote(option_ids=["yes"]),
        Vote(voter_id="", option_ids=["yes"]),
        Vote(voter_id="a" * 257, option_ids=["yes"]),
        Vote(voter_id="josé", option_ids=["yes"]),
        Vote(voter_id=" ada", option_ids=["yes"]),
        Vote(voter_id="ada ", option_ids=["yes"]),
        Vote(voter_id=" ", option_ids=["yes"]),
        Vote(voter_id="a\tda", option_ids=["yes"]),
        Vote(voter_id="ada\0", option_ids=["yes"]),
        Vote(voter_id="x" * 200 + "\x7f" + "x" * 50, option_ids=["yes"]),
        Vote(voter_id="ada", option_ids=["yes", "no"]),
        Vote(voter_id="ada", option_ids=["maybe"]),
        Vote(voter_id="ada", option_ids=[""]),
    ],
)
def test_what_is_not_plain_is_left_to_the_rules(vote: Vote) -> None:
    plain = Vote(voter_id="bob", option_ids=["no"])
    data = CastVotesRequest(votes=[plain, vote, plain]).SerializeToString()
    assert READER.mark(data, MARKINGS) == [expected(plain), None, expected(plain)]


def test_every_byte_at_every_end_is_judged_as_the_rules_judge_it() -> None:
    ids = [f"{before}{chr(byte)}{after}" for byte in range(128) for before in ("", "a") for after in ("", "z" * 40)]
    votes = [Vote(voter_id=voter_id, option_ids=["yes"]) for voter_id in ids]
    marked = READER.mark(CastVotesRequest(votes=votes).SerializeToString(), MARKINGS)
    assert [ballot is not None for ballot in marked] == [voter_id_problem(voter_id) == "" for voter_id in ids]
    assert marked == [expected(vote) for vote in votes]


@pytest.mark.parametrize("length", [0, 1, 16, 64])
def test_a_keyed_ballot_is_the_same_as_everywhere_else(length: int) -> None:
    votes = [Vote(voter_id="ada", option_ids=[option]) for option in MARKINGS]
    key = "k" * length
    data = CastVotesRequest(poll_id="p" * 36, votes=votes, idempotency_key=key).SerializeToString()
    assert READER.mark(data, MARKINGS, key) == [expected(vote, key) for vote in votes]
    assert check(data)


def over_long(value: int, size: int) -> bytes:
    """A number as a varint of more bytes than it needs."""
    return bytes(value >> 7 * place & 0x7F | (0x80 if place < size - 1 else 0) for place in range(size))


@pytest.mark.parametrize("size", range(1, 11))
def test_a_length_is_as_long_as_protobuf_takes_it(size: int) -> None:
    vote = Vote(voter_id="ada", option_ids=["yes"]).SerializeToString()
    inner = b"\x0a" + over_long(3, size) + b"ada" + b"\x12\x03yes"
    for data in (b"\x1a" + over_long(len(vote), size) + vote, b"\x1a" + bytes([len(inner)]) + inner):
        try:
            CastVotesRequest.FromString(data)
        except DecodeError:
            envelope = READER.envelope(data)
            assert envelope is None or READER.mark(data, MARKINGS) == [None]
        else:
            assert READER.mark(data, MARKINGS) == [expected(Vote.FromString(vote))]


def test_unusual_encodings_are_left_to_protobuf() -> None:
    vote = Vote(voter_id="ada", option_ids=["yes"]).SerializeToString()
    twice = b"\x1a" + bytes([2 * len(vote)]) + vote + vote
    assert READER.mark(twice, MARKINGS) == [None]
    unknown = b"\x2a\x01x"
    assert READER.envelope(unknown) is None
    assert READER.mark(b"\x1a" + bytes([len(vote) + 3]) + vote + unknown, MARKINGS) == [None]
    assert READER.envelope(b"\x08" + b"\xff" * 10 + b"\x01") is None
    assert READER.envelope(b"\x1a\x7f") is None
    assert READER.envelope(b"\x12\x02\xc3\xb6") is None
    assert READER.envelope(b"\x22\x02\xc3\xb6") is None
    assert READER.envelope(b"\x22\x41" + b"k" * 65) is None
    for text in (b"\x12\x01\xc3\x12\x01p", b"\x22\x01\xc3\x22\x01k"):
        assert READER.envelope(text + b"\x1a" + bytes([len(vote)]) + vote) is None, "protobuf refuses the first text"
    with pytest.raises(ValueError, match="envelope"):
        READER.mark(b"\x1a\x7f", MARKINGS)


def test_whatever_bytes_come_it_never_reads_something_else_than_protobuf() -> None:
    chance = random.Random(7)
    votes = [
        Vote(voter_id=chance.choice(["ada", "bob" * 50, "josé", ""]), option_ids=chance.choices([*MARKINGS], k=1))
        for _ in range(20)
    ]
    request = CastVotesRequest(batch_sequence=77, poll_id="p" * 36, votes=votes, idempotency_key="k" * 20)
    whole = request.SerializeToString()
    read = 0
    for _ in range(20_000):
        data = bytearray(whole[: chance.randrange(1, len(whole) + 1)] if chance.random() < 0.3 else whole)
        for _ in range(chance.randrange(4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        read += check(bytes(data))
    assert read > 1000
