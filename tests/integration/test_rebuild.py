"""`tally rebuild` on real stores: readers and voters notice nothing, whatever interrupts it and whatever is gone."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg
import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis
from tally.event.v1.event_pb2 import Event
from tally.query.v1 import query_service_pb2 as query
from tally.query.v1.query_service_pb2_grpc import QueryServiceStub

from clients import progress
from clients.failures import Failure
from clients.rebuilding import Rebuilding
from contracts import log_epoch
from contracts.live import FIRST_GENERATION, dump_position, frozen_key, live_key, position_key
from contracts.read_database import vote_key
from projector import event_log as log_reader
from projector import rebuild
from projector.__main__ import KINDS, SETTINGS, project
from projector.live import generation_in_use
from projector.live_copies import LiveCopies
from projector.read_model import Displaced, Replaced
from projector.schema_copies import SchemaCopies
from projector.stream import Position
from query_server.__main__ import QuerySettings
from query_server.__main__ import serve as serve_queries
from relay.__main__ import RelaySettings, relay
from tests.event_log import EventLog, WrittenPoll, event_log
from tests.processes import eventually
from tests.servers import VOTER_SECRET, serving, sql

if TYPE_CHECKING:
    from tally.query.v1.query_service_pb2_grpc import QueryServiceAsyncStub

STORES = {"live": "TALLY_REDIS_URL", "views": "TALLY_READ_DSN", "documents": "TALLY_READ_DSN"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("TALLY_")}


Read = Callable[[WrittenPoll], Awaitable[int]]


class Stage:
    """An event log, and the read models that are made from it."""

    def __init__(self, log: EventLog, redis: Redis, read: asyncpg.Pool, stores: Mapping[str, str]) -> None:
        self.log = log
        self.redis = redis
        self.read = read
        self.stores = stores

    @property
    def settings(self) -> dict[str, Any]:
        return {name.removeprefix("TALLY_").lower(): value for name, value in self.stores.items()}

    @asynccontextmanager
    async def running(self, *read_models: str) -> AsyncIterator[None]:
        """The relay, and these projectors."""
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(relay(RelaySettings(**self.settings), stop))
            for name in read_models:
                tasks.create_task(project(KINDS[name], SETTINGS[STORES[name]](**self.settings), stop))
            yield
            stop.set()

    async def rebuild(self, read_model: str) -> dict[str, Any]:
        rebuilding = Rebuilding(read_model, self.stores, Path("/nowhere"))
        await rebuilding.run()
        assert rebuilding.switched
        return rebuilding.outcome

    async def command(self, *arguments: str, failpoint: str = "") -> asyncio.subprocess.Process:
        """`tally rebuild` as a process of its own."""
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "from clients.cli import main; main()", "rebuild", *arguments),
            env={**ENVIRONMENT, **self.stores, "TALLY_FAILPOINT": failpoint},
            stdout=PIPE,
            stderr=PIPE,
        )

    async def copies(self, read_model: str) -> set[str]:
        """The copies that there are of a read model."""
        if read_model == "live":
            keys: list[Any] = await self.redis.keys("tally:live:*:*")
            return {key.decode().split(":")[2] for key in keys}
        schemas = await self.read.fetch("SELECT nspname FROM pg_namespace WHERE nspname ~ ('^' || $1)", read_model)
        return {name for (name,) in schemas}

    async def results(self, poll: WrittenPoll) -> query.Results:
        """What Redis has of a poll."""
        key = live_key(await generation_in_use(self.redis), poll.poll_id)
        stored: Any = await self.redis.hget(key, "results")
        return query.GetResultsResponse.FromString(stored or b"").results

    async def has(self, read_model: str, poll: WrittenPoll) -> None:
        """Fails unless a read model has exactly what was written."""
        if read_model == "live":
            results = await self.results(poll)
            version, counts = results.version, [count.count for count in results.counts]
        elif read_model == "views":
            row = await self.read.fetchrow("SELECT * FROM views.polls WHERE poll_id = $1", poll.poll_id)
            assert row is not None
            version, counts = row["version"], row["counts"]
            votes = await self.read.fetch("SELECT * FROM views.votes WHERE poll_no = $1", row["poll_no"])
            assert {vote["vote_key"]: vote["version"] for vote in votes} == {
                vote_key(voter, row["poll_no"]): version for voter, version in poll.voters.items()
            }
        else:
            row = await self.read.fetchrow("SELECT * FROM documents.documents WHERE poll_id = $1", poll.poll_id)
            assert row is not None
            version, counts = row["version"], row["counts"]
        assert (version, counts) == (poll.version, poll.counts)

    async def counted(self, read_model: str, *polls: WrittenPoll) -> None:
        for poll in polls:
            await eventually(lambda poll=poll: self.has(read_model, poll))  # type: ignore[misc]


@pytest.fixture
async def stage(write_dsn: str, read_dsn: str, nats_url: str, redis_url: str) -> AsyncIterator[Stage]:
    stores = {
        "TALLY_WRITE_DSN": write_dsn,
        "TALLY_READ_DSN": read_dsn,
        "TALLY_NATS_URL": nats_url,
        "TALLY_REDIS_URL": redis_url,
    }
    async with (
        event_log(write_dsn) as log,
        Redis.from_url(redis_url) as redis,
        asyncpg.create_pool(read_dsn, min_size=1, max_size=4) as read,
    ):
        yield Stage(log, redis, read, stores)


@pytest.fixture
async def queries(stage: Stage) -> AsyncIterator[QueryServiceAsyncStub]:
    settings = QuerySettings(**stage.settings, query_listen="127.0.0.1:0", voter_secret=VOTER_SECRET)
    async with serving(lambda stop, ready: serve_queries(settings, stop, ready)) as channel:
        yield QueryServiceStub(channel)


def reads(stage: Stage, queries: QueryServiceAsyncStub, read_model: str) -> Sequence[Read]:
    """What readers ask of a read model; each returns a version of the poll, or a number that grows with it."""

    async def live_results(poll: WrittenPoll) -> int:
        response = await queries.GetResults(query.GetResultsRequest(poll_id=str(poll.poll_id)))
        assert response.results.source == query.RESULTS_SOURCE_LIVE_CACHE
        assert sum(count.count for count in response.results.counts) == response.results.total_votes
        return response.results.version

    async def view(poll: WrittenPoll) -> int:
        return (await queries.GetPoll(query.GetPollRequest(poll_id=str(poll.poll_id)))).poll.version

    async def listed(poll: WrittenPoll) -> int:
        page = await queries.ListPolls(query.ListPollsRequest())
        return next(found.version for found in page.polls if found.poll_id == str(poll.poll_id))

    async def turnout(poll: WrittenPoll) -> int:
        response = await queries.GetTurnout(query.GetTurnoutRequest(poll_id=str(poll.poll_id)))
        return sum(bucket.votes for bucket in response.buckets)

    async def document(poll: WrittenPoll) -> int:
        statement = "SELECT version FROM documents.documents WHERE poll_id = $1"
        return int(await stage.read.fetchval(statement, poll.poll_id))

    return {"live": [live_results], "views": [view, listed, turnout], "documents": [document]}[read_model]


def sessions_that_failed(read_model: str) -> float:
    return REGISTRY.get_sample_value("tally_projector_failures_total", {"read_model": read_model}) or 0.0


@pytest.mark.parametrize("read_model", ["live", "views", "documents"])
async def test_readers_and_voters_notice_nothing(stage: Stage, queries: QueryServiceAsyncStub, read_model: str) -> None:
    polls = [await stage.log.poll() for _ in range(3)]
    rebuilt = asyncio.Event()
    seen = 0

    async def vote() -> None:
        while not rebuilt.is_set():
            for poll in polls:
                await stage.log.cast(poll, votes=7)

    async def read(ask: Read, poll: WrittenPoll) -> None:
        nonlocal seen
        latest = 0
        while not rebuilt.is_set() or latest == 0:
            number = await ask(poll)
            assert number >= latest
            latest, seen = number, seen + 1

    async def watch(poll: WrittenPoll) -> None:
        version = total = 0
        async for response in queries.WatchResults(query.WatchResultsRequest(poll_ids=[str(poll.poll_id)])):
            assert response.results.version > version
            assert response.results.total_votes >= total
            version, total = response.results.version, response.results.total_votes
            if rebuilt.is_set() and version == poll.version:
                return

    async with stage.running("live", *{read_model} - {"live"}):
        for poll in polls:
            await stage.log.cast(poll, votes=7)
        for name in {"live", read_model}:
            await stage.counted(name, *polls)
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            tasks.create_task(vote())
            watching = [tasks.create_task(watch(poll)) for poll in polls]
            for ask in reads(stage, queries, read_model):
                for poll in polls[:2]:
                    tasks.create_task(read(ask, poll))
            failures = sessions_that_failed(read_model)
            for _ in range(3):
                before = seen
                outcome = await stage.rebuild(read_model)
                await eventually(lambda before=before: asyncio.sleep(0, seen > before + 20))  # type: ignore[misc]
            rebuilt.set()
        assert all(task.done() for task in watching)
        await stage.counted(read_model, *polls)
    # Its projector moves to the fresh copies as something that happens, not as a failure.
    assert sessions_that_failed(read_model) == failures
    assert (outcome["polls"], outcome["parked_polls"]) == (3, 0)
    assert len(await stage.copies(read_model)) == 1


async def test_watchers_are_told_what_a_rebuild_corrects_and_nothing_else(
    stage: Stage, queries: QueryServiceAsyncStub
) -> None:
    wrong, right = [await stage.log.poll() for _ in range(2)]
    async with stage.running("views"):
        for poll in (wrong, right):
            await stage.log.cast(poll, votes=5)
        await stage.counted("views", wrong, right)
        corrected = await answer(queries, wrong)
        # What older code has counted.
        results = query.GetResultsResponse(results=corrected)
        results.results.counts[0].count += 1000
        stored: dict[Any, Any] = {"version": wrong.version, "results": results.SerializeToString()}
        await stage.redis.hset(live_key(FIRST_GENERATION, wrong.poll_id), mapping=stored)
        position = dump_position(0, 0, log_epoch.parse(corrected.log_epoch))
        await stage.redis.set(position_key(FIRST_GENERATION), position)
        names = [str(poll.poll_id) for poll in (wrong, right)]
        watch = aiter(queries.WatchResults(query.WatchResultsRequest(poll_ids=names), timeout=10))
        # The other poll comes from the read database.
        assert results.results in [(await anext(watch)).results for _ in names]
        await stage.rebuild("live")
        told = (await anext(watch)).results
        assert (told.version, told.counts) == (wrong.version, corrected.counts)
        assert (await answer(queries, wrong)).counts == corrected.counts
    async with stage.running("live"):
        await stage.log.cast(right, votes=5)
        assert (await anext(watch)).results.version == right.version


async def answer(queries: QueryServiceAsyncStub, poll: WrittenPoll) -> query.Results:
    return (await queries.GetResults(query.GetResultsRequest(poll_id=str(poll.poll_id)))).results


@pytest.mark.parametrize("failpoint", ["rebuild.applied", "rebuild.before_switch", "rebuild.after_switch"])
async def test_killed_at_any_point_it_is_run_again(stage: Stage, failpoint: str) -> None:
    read_models = [*STORES]
    polls = [await stage.log.poll() for _ in range(3)]

    async def is_killed(name: str) -> None:
        process = await stage.command(name, failpoint=failpoint)
        await process.communicate()
        assert process.returncode == -signal.SIGKILL
        if (name, failpoint) == ("live", "rebuild.before_switch"):
            # At once: it thaws by itself.
            assert 0 < await stage.redis.pttl(frozen_key(FIRST_GENERATION)) <= 5000

    async with stage.running(*read_models):
        for poll in polls:
            await stage.log.cast(poll, votes=5)
        for name in read_models:
            await stage.counted(name, *polls)
        await asyncio.gather(*map(is_killed, read_models))
        for name in read_models:
            for poll in polls:
                await stage.has(name, poll)
            assert len(await stage.copies(name)) == 2
        await stage.log.cast(polls[0], votes=5)
        for name in read_models:
            await stage.rebuild(name)
            await stage.log.cast(polls[1], votes=5)
            await stage.counted(name, *polls)
            assert len(await stage.copies(name)) == 1


async def test_the_event_log_is_enough(stage: Stage) -> None:
    """There is no stream, and no read model that could be read."""
    polls = [await stage.log.poll(options=number) for number in (2, 30)] + [await stage.log.poll(opened=False)]
    for _ in range(20):
        await stage.log.cast(polls[0], votes=100)
    await stage.log.cast(polls[1], votes=3, marks=4)
    await stage.log.close(polls[1])
    for name in STORES:
        outcome = await stage.rebuild(name)
        events = sum(poll.version for poll in polls)
        assert (outcome["polls"], outcome["events"], outcome["votes"]) == (3, events, 2003)
        for poll in polls:
            await stage.has(name, poll)
    # Once there is a stream it goes on with that.
    async with stage.running(*STORES):
        await stage.log.cast(polls[0], votes=2)
        for name in STORES:
            await stage.counted(name, *polls)


@pytest.mark.parametrize("read_model", ["views", "documents"])
async def test_what_a_projector_says_of_itself_is_never_missing(stage: Stage, read_model: str) -> None:
    await stage.read.execute(f"INSERT INTO {read_model}.projector_status VALUES ($1, $2)", read_model, b"says")
    await stage.rebuild(read_model)
    [status] = await stage.read.fetch(f"SELECT * FROM {read_model}.projector_status")
    assert tuple(status) == (read_model, b"says")


async def test_a_long_log_is_read_in_parts(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_reader, "_PAGE_POLLS", 3)
    monkeypatch.setattr(log_reader, "_CHUNK_EVENTS", 4)
    monkeypatch.setattr(log_reader, "_CHUNK_BYTES", 500)
    polls = [await stage.log.poll() for _ in range(10)]
    for number in range(60):
        await stage.log.cast(polls[number % 7], votes=1 + number % 20)
    for name in STORES:
        await stage.rebuild(name)
        for poll in polls:
            await stage.has(name, poll)


async def test_how_far_it_is_and_how_fast_it_was_is_told(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log_reader, "_CHUNK_EVENTS", 10)
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    poll = await stage.log.poll()
    for _ in range(20):
        await stage.log.cast(poll, votes=100)
    for name in STORES:
        outcome = await stage.rebuild(name)
        pace = r"(\d[\d,]*) events/s, (\d[\d,]*) votes/s"
        assert re.fullmatch(
            rf"10 of 22 events \(45%\), {pace}\n20 of 22 events \(91%\), {pace}\n22 of 22 events \(100%\), {pace}\n",
            capsys.readouterr().err,
        )
        assert outcome["events_per_second"] == pytest.approx(22 / outcome["seconds"])
        assert outcome["votes_per_second"] == pytest.approx(2000 / outcome["seconds"])
    process = await stage.command("views")
    out, _ = await process.communicate()
    told = dict(line.split() for line in out.decode().splitlines())
    assert (told["events"], told["votes"]) == ("22", "2000")
    # As people read them, however many they are: not 3e+04.
    assert "e" not in told["votes_per_second"]
    assert 0 < float(told["events_per_second"].replace(",", "")) < float(told["votes_per_second"].replace(",", ""))


async def test_a_poll_stands_still_at_an_event_that_cannot_be_applied(stage: Stage) -> None:
    bad, good = await stage.log.poll(), await stage.log.poll()
    await stage.log.cast(bad, votes=2)
    counts, voters = list(bad.counts), dict(bad.voters)
    await stage.log.change(bad, "OPEN", Event())
    await stage.log.cast(bad, votes=2)
    process = await stage.command("views", "--output", "json")
    out, err = await process.communicate()
    assert process.returncode == 3, err
    assert json.loads(out)["parked_polls"] == 1
    await stage.has("views", good)
    bad.version, bad.counts, bad.voters = 3, counts, voters
    await stage.has("views", bad)
    async with rebuild.copies(KINDS["views"], stage.stores["TALLY_READ_DSN"]) as copies:
        [letter] = await copies.in_use.dead_letters()
    assert (letter.poll_id, letter.version, letter.latest) == (str(bad.poll_id), 4, 5)


@pytest.mark.parametrize("read_model", ["live", "views"])
async def test_nothing_is_taken_back_from_readers(stage: Stage, read_model: str) -> None:
    """The log lacks what the read model has: it is another deployment's, or an old backup."""
    poll = await stage.log.poll()
    async with stage.running(read_model):
        await stage.counted(read_model, poll)
    copies = await stage.copies(read_model)
    if read_model == "live":
        await stage.redis.hset(live_key(FIRST_GENERATION, poll.poll_id), "version", 3)
    else:
        await stage.read.execute("UPDATE views.polls SET version = 3")
    with pytest.raises(Failure, match=r"1 polls would go back, for instance .* from version 3 to 2"):
        await stage.rebuild(read_model)
    assert await stage.copies(read_model) == copies


async def test_one_rebuild_of_a_read_model_at_a_time(stage: Stage) -> None:
    async with log_reader.connect(stage.stores["TALLY_WRITE_DSN"]) as log:
        assert await log.lead("live")
        with pytest.raises(Failure, match="another rebuild of live is under way"):
            await stage.rebuild("live")
        await stage.rebuild("views")
    await stage.rebuild("live")


async def test_who_was_overtaken_changes_nothing(stage: Stage) -> None:
    """A rebuild that lost its lock goes on beside another one."""
    poll = await stage.log.poll()
    for name in ("live", "views"):
        store = stage.stores[STORES[name]]
        async with rebuild.copies(KINDS[name], store) as overtaken:
            await overtaken.fresh.store([], {}, None, Position(7, 7))
            await stage.rebuild(name)
            for attempt in (overtaken.fresh.position, overtaken.switch):
                with pytest.raises(Exception, match=r"another copy|is not as|does not exist"):
                    await attempt()
        await stage.has(name, poll)


@pytest.mark.parametrize(("read_model", "kind"), [("live", LiveCopies), ("views", SchemaCopies)])
async def test_what_is_counted_until_the_switch_is_in_the_fresh_copy(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, read_model: str, kind: type[LiveCopies | SchemaCopies]
) -> None:
    poll = await stage.log.poll()
    freeze = kind.frozen

    @asynccontextmanager
    async def frozen(self: Any) -> AsyncIterator[None]:
        await stage.log.cast(poll, votes=3)
        await stage.counted(read_model, poll)
        async with freeze(self):
            yield

    monkeypatch.setattr(kind, "frozen", frozen)
    async with stage.running(read_model):
        await stage.rebuild(read_model)
        # At once: the projector does not bring it again.
        await stage.has(read_model, poll)


async def test_a_copy_that_was_thawed_is_not_replaced(stage: Stage) -> None:
    async with LiveCopies.open(stage.stores["TALLY_REDIS_URL"]) as copies, copies.frozen():
        await stage.redis.delete(frozen_key(FIRST_GENERATION))
        with pytest.raises(Displaced, match="frozen"):
            await copies.switch()
    assert await generation_in_use(stage.redis) == FIRST_GENERATION


@pytest.mark.parametrize("read_model", ["live", "views"])
async def test_a_projector_writes_into_no_copy_but_its_own(stage: Stage, read_model: str) -> None:
    kind, store = KINDS[read_model], stage.stores[STORES[read_model]]
    async with kind.connect(store) as before, rebuild.copies(kind, store) as copies:
        for model in (before, copies.fresh):
            await model.store([], {}, None, Position(1, 1))
        async with copies.frozen():
            await copies.switch()
        # The old copy is still there, and the fresh one is at the same position.
        with pytest.raises(Replaced):
            await before.store([], {}, Position(1, 1), Position(2, 2))
    async with kind.connect(store) as after:
        assert await after.position() == Position(1, 1)


async def test_ctrl_c_leaves_the_copy_in_use(stage: Stage) -> None:
    poll = await stage.log.poll()
    async with stage.running("views"):
        await stage.counted("views", poll)
    async with stage.read.acquire() as connection, connection.transaction():
        # As a projector that is in the middle of a change.
        await connection.execute("UPDATE views.stream_position SET stored_at = stored_at")
        process = await stage.command("views")

        async def waiting() -> bool:
            waits = "SELECT FROM pg_stat_activity WHERE application_name = 'rebuild' AND wait_event_type = 'Lock'"
            return bool(await sql(stage.stores["TALLY_READ_DSN"], waits))

        await eventually(waiting)
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert process.returncode == 130
    assert (out, err.decode().splitlines()[-1]) == (b"", "interrupted: views is as it was")
    assert await stage.copies("views") == {"views"}


async def test_a_reader_of_the_old_copy_ends_in_peace(stage: Stage) -> None:
    polls = [await stage.log.poll() for _ in range(3)]
    await stage.rebuild("views")
    async with asyncio.TaskGroup() as tasks:
        async with stage.read.acquire() as connection, connection.transaction():
            cursor = await connection.cursor("SELECT poll_id FROM views.polls")
            found: list[UUID] = [row["poll_id"] for row in await cursor.fetch(1)]
            oid = await stage.read.fetchval("SELECT 'views'::regnamespace::oid")
            rebuilding = tasks.create_task(stage.rebuild("views"))

            async def switched() -> bool:
                return bool(oid != await stage.read.fetchval("SELECT 'views'::regnamespace::oid"))

            await eventually(switched)
            found += [row["poll_id"] for row in await cursor.fetch(5)]
            assert set(found) == {poll.poll_id for poll in polls}
            assert not rebuilding.done()
        await rebuilding
    assert await stage.copies("views") == {"views"}


async def test_what_is_wrong_is_said_in_a_line(stage: Stage, tmp_path: Path) -> None:
    nobody = {**stage.stores, "TALLY_REDIS_URL": "redis://:guess-me@127.0.0.1:9/0"}
    with pytest.raises(Failure, match="the rebuild was broken off, live is as it was; run it again: ") as failure:
        await Rebuilding("live", nobody, tmp_path).run()
    assert "guess-me" not in str(failure.value)
    with pytest.raises(Failure, match="give --write-dsn, set TALLY_WRITE_DSN, or run `tally up`"):
        Rebuilding("live", dict.fromkeys(stage.stores), tmp_path)
    process = await stage.command("counters")
    _, err = await process.communicate()
    assert process.returncode == 2
    assert b"there is no read model counters" in err
