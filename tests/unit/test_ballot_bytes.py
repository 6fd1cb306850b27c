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
    assert ballots.voter(ballot) == b"k" * 12
    assert ballots.voter_of(ballots.ballot_key(7, ballots.voter(ballot))) == ballots.voter(ballot)
    assert ballots.option_numbers(ballots.choices(ballot)) == (999,)


def test_rows_are_postgres_binary_copy() -> None:
    data = ballots.copy_rows(3, 4, [b"a" * 16 + ballots.marking([5]), b"b" * 16 + ballots.marking([6])])
    row = struct.Struct(">hiqii12sih")
    rows = [row.unpack_from(data, 19 + i * row.size) for i in range(2)]
    assert rows == [(3, 8, 4, 16, 3, b"a" * 12, 2, 5), (3, 8, 4, 16, 3, b"b" * 12, 2, 6)]
    assert data[19 + 2 * row.size :] == b"\xff\xff"
    assert ballots.ballot_key(3, b"a" * 16).bytes == b"\0\0\0\3" + b"a" * 12


def test_rows_of_several_choices_are_the_same_with_longer_ends() -> None:
    votes = [os.urandom(16) + ballots.marking(numbers) for numbers in ([1], [0, 2], [3])]
    row = struct.Struct(">hiqii12s")
    data = ballots.copy_rows(3, 4, votes)
    expected = b"".join(row.pack(3, 8, 4, 16, 3, vote[:12]) + vote[16:] for vote in votes)
    assert data[19:-2] == expected


@pytest.mark.parametrize("poll_no", [1, 2, 256, 2**31 - 1])
def test_a_polls_rows_lie_between_its_keys_and_no_other_polls(poll_no: int) -> None:
    above, last = ballots.key_range(poll_no)
    least, greatest = (ballots.ballot_key(poll_no, byte * 16) for byte in (b"\0", b"\xff"))
    assert above.bytes < least.bytes < greatest.bytes == last.bytes
    assert poll_no == 2**31 - 1 or ballots.key_range(poll_no + 1)[0] == last


def test_a_voter_key_depends_on_the_secret_and_hides_the_voter() -> None:
    one, other = VoterKeys(SECRET), VoterKeys("y" * 32)
    assert one.voter_key("ada") == VoterKeys(SECRET).voter_key("ada")
    assert len({one.voter_key("ada"), one.voter_key("bob"), other.voter_key("ada")}) == 3
    assert b"ada" not in one.voter_key("ada")


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("number", [0, 1, 2, 5000])
def test_ballots_are_parted_and_put_in_order(compiled: bool, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(ballots, "compiled", None)
    chance = random.Random(number)
    # A long one among them, and voters twice, whose second ballot may not pass the first.
    cast = [chance.randbytes(16) + ballots.marking([chance.randrange(1000)]) for _ in range(number)]
    cast += [ballot[:16] + ballots.marking([0, 1]) for ballot in cast[::7]]
    for ranges in (1, 32, 100, 256):
        parted = ballots.by_range(cast, ranges)
        assert parted == [[b for b in cast if ballots.range_of(b, ranges) == part] for part in range(ranges)]
    assert [ballot[:8] for ballot in ballots.in_order(cast)] == sorted(ballot[:8] for ballot in cast)
    assert sorted(ballots.in_order(cast)) == sorted(cast)


@pytest.mark.parametrize("wrong", [[b"short"], ["a string of sixteen characters"], (b"k" * 16,), None])
def test_what_is_no_list_of_ballots_is_refused(wrong: object) -> None:
    assert ballots.compiled is not None
    for call in (ballots.compiled.in_order, lambda wrong: ballots.compiled and ballots.compiled.by_range(wrong, 4)):
        with pytest.raises(TypeError):
            call(wrong)
    for ranges in (0, 257, -1, 1 << 70):
        with pytest.raises((ValueError, OverflowError)):
            ballots.compiled.by_range([], ranges)
