"""What a server remembers of its answers."""

from __future__ import annotations

import random
from uuid import UUID, uuid4

from contracts.log_epoch import NOWHERE, ZERO, LogPosition
from query_server import answered
from query_server.answered import Answered

EARLIER, LATER = UUID("019ab000-0000-7000-8000-000000000001"), UUID("019ab000-0000-7001-8000-000000000000")


def test_the_furthest_answer_is_remembered() -> None:
    memory, poll_id, other = Answered(), uuid4(), uuid4()
    assert memory.position(poll_id) == NOWHERE
    for version in (7, 9, 8):
        memory.note(poll_id, LogPosition(ZERO, version))
    memory.note(other, LogPosition(ZERO, 3))
    assert (memory.position(poll_id), memory.position(other)) == ((ZERO, 9), (ZERO, 3))


def test_a_later_epoch_is_further_at_whichever_version() -> None:
    memory, poll_id = Answered(), uuid4()
    for position in (LogPosition(ZERO, 90), LogPosition(LATER, 4), LogPosition(EARLIER, 50)):
        memory.note(poll_id, position)
    assert memory.position(poll_id) == (LATER, 4)
    # It may not have the poll.
    latest = UUID(int=LATER.int + 1)
    memory.note(poll_id, LogPosition(latest, 0))
    assert memory.position(poll_id) == (latest, 0)


def test_polls_that_do_not_exist_take_no_room() -> None:
    memory = Answered(polls=8)
    known = [uuid4() for _ in range(8)]
    for poll_id in known:
        memory.note(poll_id, LogPosition(ZERO, 1))
    for _ in range(100):
        memory.note(uuid4(), LogPosition(LATER, 0))
    assert all(memory.position(poll_id).version == 1 for poll_id in known)


def test_the_polls_that_were_answered_last_are_kept() -> None:
    memory, often = Answered(polls=8), uuid4()
    polls = [uuid4() for _ in range(100)]
    for poll_id in polls:
        memory.note(often, LogPosition(ZERO, 5))
        memory.note(poll_id, LogPosition(ZERO, 2))
    assert memory.position(often).version == 5
    assert [memory.position(poll_id).version for poll_id in polls] == [0] * 93 + [2] * 7


def test_it_is_as_a_dict_is_whatever_the_order() -> None:
    memory, known, chance = Answered(), dict[UUID, LogPosition](), random.Random(7)
    # Eight ids of one row, whose bytes look alike when they are shifted, and others.
    polls = [UUID(bytes=bytes(8) + (1 << bit).to_bytes(6) + bytes(2)) for bit in range(0, 48, 6)]
    polls += [UUID(int=(number << 64) + number + 1) for number in range(200)]
    for _ in range(5000):
        poll_id = chance.choice(polls)
        position = LogPosition(chance.choice((ZERO, EARLIER, LATER)), chance.randrange(1, 1 << 48))
        memory.note(poll_id, position)
        known[poll_id] = max(position, known.get(poll_id, NOWHERE))
    assert {poll_id: memory.position(poll_id) for poll_id in known} == known


def test_it_takes_16_bytes_for_a_poll_and_no_more() -> None:
    memory = Answered()
    assert len(memory._polls) + len(memory._positions) == 16 * answered._POLLS == 4 << 20
    for _ in range(1000):
        memory.note(uuid4(), LogPosition(ZERO, 1 << 40))
    assert len(memory._polls) + len(memory._positions) == 4 << 20
