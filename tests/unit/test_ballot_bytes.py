"""Ballots as bytes give the rows and the event that they stand for."""

import os
import random
import struct

import pytest

from command_server import ballots
from contracts.voters import VoterKeys

SECRET = "x" * 32


@pytest.mark.parametrize("options", [2, 128, 129, 256, 1000])
def test_the_event_tells_each_voters_choice(options: int) -> None:
    votes = sorted((os.urandom(16), random.Random(options).randrange(options)) for _ in range(500))
    event = ballots.votes_cast(7, [key + ballots.marking([number]) for key, number in votes])
    assert event.batch_id == 7
    keys = [event.voter_keys[i : i + 16] for i in range(0, len(event.voter_keys), 16)]
    assert list(zip(keys, event.option_numbers, strict=True)) == votes


def test_a_ballot_reads_as_it_was_written() -> None:
    ballot = b"k" * 16 + ballots.marking([999])
    assert ballots.voter_key(ballot) == b"k" * 16
    assert ballots.option_numbers(ballots.choices(ballot)) == (999,)


def test_rows_are_postgres_binary_copy() -> None:
    data = ballots.copy_rows(3, 4, [b"a" * 16 + ballots.marking([5]), b"b" * 16 + ballots.marking([6])])
    row = struct.Struct(">hiiiqi16sih")
    rows = [row.unpack_from(data, 19 + i * row.size) for i in range(2)]
    assert rows == [(4, 4, 3, 8, 4, 16, b"a" * 16, 2, 5), (4, 4, 3, 8, 4, 16, b"b" * 16, 2, 6)]
    assert data[19 + 2 * row.size :] == b"\xff\xff"


def test_a_voter_key_depends_on_the_secret_and_hides_the_voter() -> None:
    one, other = VoterKeys(SECRET), VoterKeys("y" * 32)
    assert one.voter_key("ada") == VoterKeys(SECRET).voter_key("ada")
    assert len({one.voter_key("ada"), one.voter_key("bob"), other.voter_key("ada")}) == 3
    assert b"ada" not in one.voter_key("ada")
