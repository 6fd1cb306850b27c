"""How many bytes of large answers are under way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from contracts.refusals import Refusal
from query_server import outgoing
from query_server.outgoing import Context, Outgoing

MIB = 1 << 20


class Call:
    """A call of a connection, as far as gRPC says of it what is asked here."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._callbacks: list[Callable[[Any], None]] = []

    def peer(self) -> str:
        return self._peer

    def time_remaining(self) -> float | None:
        return None

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    def ends(self) -> None:
        for callback in self._callbacks:
            callback(self)


class Message:
    """A message that is written until the test says that its reader has taken it, or gives it up."""

    def __init__(self, outgoing: Outgoing, peer: str, size: int = MIB, seconds: float = 60) -> None:
        self.call = Call(peer)
        self.taken = asyncio.Event()
        self.under_way = False
        self.writing = asyncio.ensure_future(self._write(outgoing, size, seconds))

    async def _write(self, outgoing: Outgoing, size: int, seconds: float) -> None:
        async with outgoing.room(cast(Context, self.call), size, seconds):
            self.under_way = True
            await self.taken.wait()


async def under_way(messages: list[Message]) -> int:
    for _ in range(3):
        await asyncio.sleep(0)
    return sum(message.under_way for message in messages)


async def ended(messages: list[Message]) -> None:
    for message in messages:
        message.writing.cancel()
    await asyncio.gather(*(message.writing for message in messages), return_exceptions=True)


async def test_a_connection_has_its_share_and_takes_nothing_from_others() -> None:
    server = Outgoing()
    stuck = [Message(server, "stuck") for _ in range(20)]
    others = [Message(server, f"other {number}") for number in range(20)]
    assert (await under_way(stuck), await under_way(others)) == (4, 20)
    stuck[0].taken.set()
    assert await under_way(stuck) == 5
    await ended([*stuck, *others])


async def test_all_have_a_limit_and_who_has_nothing_yet_finds_room_above_it() -> None:
    server = Outgoing()
    stuck = [Message(server, f"stuck {number % 20}") for number in range(200)]
    assert await under_way(stuck) == 48
    fresh = [Message(server, "fresh") for _ in range(2)]
    assert await under_way(fresh) == 1
    crowd = [Message(server, f"crowd {number}") for number in range(100)]
    assert await under_way([*stuck, *fresh, *crowd]) == 96
    await ended([*stuck, *fresh, *crowd])


async def test_what_was_given_up_counts_until_grpc_has_let_go_of_it() -> None:
    server = Outgoing()
    stuck = [Message(server, "stuck") for _ in range(4)]
    waiting = Message(server, "stuck")
    assert await under_way(stuck) == 4
    await ended(stuck)
    assert await under_way([waiting]) == 0
    stuck[0].call.ends()
    assert await under_way([waiting]) == 1
    await ended([waiting])


async def test_who_waits_in_vain_is_told_and_leaves_nothing_behind() -> None:
    server = Outgoing()
    large = Message(server, "reader", size=50 * MIB)
    hopeless = Message(server, "reader", seconds=0.02)
    with pytest.raises(Refusal, match="ask again"):
        await hopeless.writing
    large.taken.set()
    await large.writing
    again = Message(server, "reader", size=50 * MIB)
    assert await under_way([again]) == 1
    await ended([again])


async def test_finished_answers_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "_WAITING_BYTES", 3 * MIB)
    server = Outgoing()
    calls = [Call("reader") for _ in range(8)]
    answers = [asyncio.ensure_future(server.send(cast(Context, call), MIB)) for call in calls]
    for _ in range(3):
        await asyncio.sleep(0)
    # Four are sent, three wait, and one is refused.
    assert [answer.done() for answer in answers] == [True] * 4 + [False] * 3 + [True]
    with pytest.raises(Refusal, match="ask again"):
        await answers[-1]
    for call in calls:
        call.ends()
    await asyncio.gather(*answers[:-1])
