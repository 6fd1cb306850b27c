"""An archive file counts itself: whatever is changed in it, or missing, is noticed."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest
from tally.event.v1.event_pb2 import CountChange, Event, PollCertified, PollClosed, PollCreated, PollOpened, Recount
from tally.event.v1.event_pb2 import VotesCast as Cast
from tally.poll.v1.poll_pb2 import PollOption, PollSpec

from command_server.archive_file import Damaged, Summary, create, verify

SPEC = PollSpec(title="Thé ou café?", options=[PollOption(option_id=o, label=o.title()) for o in ("tea", "coffee")])
VOTERS = [bytes([number]) * 16 for number in range(3)]
MOMENT = datetime(2026, 5, 1, 20, 15, tzinfo=UTC)


def events(votes: Cast) -> list[Event]:
    recount = Recount(counts=[3, 1], total_votes=3)
    return [
        Event(poll_created=PollCreated(poll=SPEC)),
        Event(poll_opened=PollOpened()),
        Event(votes_cast=votes),
        Event(poll_closed=PollClosed()),
        Event(poll_certified=PollCertified(recount=recount)),
    ]


def cast() -> Cast:
    changes = [CountChange(option_number=0, change=3), CountChange(option_number=1, change=1)]
    return Cast(batch_id=7, voter_keys=b"".join(VOTERS), option_numbers=[0, 0, 1], count_changes=changes)


def write(path: Path, logged: list[Event], weights: tuple[int, ...] = (2, 1, 1)) -> Summary:
    with create(path, uuid4(), "CERTIFIED", 5, SPEC) as file:
        for version, event in enumerate(logged, 1):
            file.event(version, MOMENT, None, event.SerializeToString())
        for voter, weight in zip(VOTERS, weights, strict=True):
            file.voter(voter, weight)
        for voter, weight, option in zip(VOTERS, weights, (0, 0, 1), strict=True):
            file.vote(voter, option.to_bytes(2), weight, 7)
        return file.end()


def test_what_was_written_is_read_back_and_counted_again(tmp_path: Path) -> None:
    path = tmp_path / "poll.jsonl.gz"
    written = write(path, events(cast()))
    assert verify(path) == written
    assert (written.title, written.state, written.events, written.voters) == (SPEC.title, "CERTIFIED", 5, 3)
    assert written.recount == Recount(counts=[3, 1], total_votes=3)
    assert path.stat().st_mode & 0o777 == 0o600, "it is as confidential as the database"
    assert os.listdir(tmp_path) == [path.name]


def lines(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path.write_bytes(gzip.compress(b"".join(change(gzip.decompress(path.read_bytes()).splitlines(keepends=True)))))


DAMAGE: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a vote is for another option": lambda all_: [line.replace(b'"choices":[1]', b'"choices":[0]') for line in all_],
    "a weight is another one": lambda all_: [
        line.replace(b'"weight":2,"batch_id"', b'"weight":9,"batch_id"') for line in all_
    ],
    "a vote is missing": lambda all_: [line for line in all_ if not line.startswith(b'{"vote":"02')],
    "a vote is there twice": lambda all_: [*all_[:-1], all_[-2], all_[-1]],
    "an event is missing": lambda all_: [line for line in all_ if not line.startswith(b'{"event":4')],
    "the title is another one": lambda all_: [line.replace(b"caf", b"kaf") for line in all_],
    "the roll is another one": lambda all_: [line.replace(b'{"voter":"00', b'{"voter":"ff') for line in all_],
    "the end is missing": lambda all_: all_[:-1],
    "something follows the end": lambda all_: [*all_, b"{}\n"],
    "a line is no JSON": lambda all_: [all_[0], b"{\n", *all_[1:]],
    "nothing is left": lambda all_: all_[:0],
    "another format": lambda all_: [all_[0].replace(b'"tally_archive":1', b'"tally_archive":2'), *all_[1:]],
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_noticed(tmp_path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path = tmp_path / "poll.jsonl.gz"
    write(path, events(cast()))
    lines(path, change)
    with pytest.raises(Damaged):
        verify(path)


def test_a_file_cut_short_on_the_disk_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "poll.jsonl.gz"
    write(path, events(cast()))
    whole = path.read_bytes()
    for length in range(0, len(whole), 40):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            verify(path)


def test_votes_that_are_not_those_of_the_log_leave_no_file(tmp_path: Path) -> None:
    path = tmp_path / "poll.jsonl.gz"
    with pytest.raises(Damaged, match="different counts"):
        write(path, events(cast()), weights=(1, 1, 1))
    other = cast()
    other.count_changes[0].change = 2
    with pytest.raises(Damaged, match="different counts"):
        write(path, events(other))
    logged = events(cast())
    with create(path, uuid4(), "CERTIFIED", 5, SPEC) as file:
        file.event(1, MOMENT, None, logged[0].SerializeToString())
        with pytest.raises(Damaged, match="event 2 is missing"):
            file.event(3, MOMENT, None, logged[2].SerializeToString())
    path.unlink()
    with pytest.raises(Damaged, match="4 events of 5"):
        write(path, events(cast())[:4])
    assert not os.listdir(tmp_path)
