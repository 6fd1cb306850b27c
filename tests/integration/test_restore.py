"""The write database goes back to an earlier state, by the steps of docs/operations.md: all readers show what it has.

Lost votes are all for "mon", and those that come afterwards for "tue": an answer that has both more than the backup's
votes for the one, and any for the other, would mix two histories.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from tally.command.v1 import command_service_pb2 as command
from tally.command.v1.command_service_pb2_grpc import CommandServiceStub
from tally.poll.v1.poll_pb2 import POLL_STATE_CERTIFIED, VOTING_METHOD_SINGLE_CHOICE, PollOption, PollSpec
from tally.query.v1 import query_service_pb2 as query
from tally.query.v1.query_service_pb2_grpc import QueryServiceStub

from command_server.__main__ import CommandSettings
from command_server.__main__ import serve as serve_commands
from contracts.read_models import READ_MODELS
from migrations import migrate_write
from projector.__main__ import KINDS, SETTINGS, project
from query_server.__main__ import QuerySettings
from query_server.__main__ import serve as serve_queries
from relay.__main__ import RelaySettings, relay
from runtime.embedded import Postgres
from tests import standby
from tests.processes import eventually
from tests.servers import VOTER_SECRET, Refused, serving, sql, views_of
from tests.standby import Server, Standby

if TYPE_CHECKING:
    from tally.command.v1.command_service_pb2_grpc import CommandServiceAsyncStub
    from tally.query.v1.query_service_pb2_grpc import QueryServiceAsyncStub

BACKED_UP = 10
SECONDS = 60.0


@asynccontextmanager
async def write_server(folder: Path, name: str = "first") -> AsyncIterator[Server]:
    """A Postgres of its own, with the write database; not migrated."""
    cluster = Postgres(folder / name, ["tally_write"], set(), shared_buffers="32MB")
    async with standby.serving(cluster, folder / name) as server:
        await cluster.provision()
        yield server


class Installation:
    """Clients of all services; made by `running`."""

    def __init__(
        self, write_dsn: str, read_dsn: str, commands: CommandServiceAsyncStub, queries: QueryServiceAsyncStub
    ) -> None:
        self.write_dsn = write_dsn
        self._read_dsn = read_dsn
        self._commands = commands
        self._queries = queries

    async def open_poll(self) -> str:
        options = [PollOption(option_id=o, label=o) for o in ("mon", "tue")]
        spec = PollSpec(title="When?", options=options, method=VOTING_METHOD_SINGLE_CHOICE)
        poll_id = (await self._commands.CreatePoll(command.CreatePollRequest(poll=spec))).poll_id
        await self._commands.OpenPoll(command.OpenPollRequest(poll_id=poll_id))
        return poll_id

    async def vote(self, poll_id: str, voters: Iterable[str], option: str) -> str:
        """One vote after the other, each tried until it is recorded; the last one's token."""
        token = ""
        for voter in voters:
            request = command.CastVoteRequest(poll_id=poll_id, voter_id=voter, option_ids=[option])

            async def voted(request: command.CastVoteRequest = request) -> None:
                nonlocal token
                try:
                    token = (await self._commands.CastVote(request, timeout=10)).consistency_token
                except grpc.aio.AioRpcError as error:
                    raise AssertionError(Refused(error).reason) from error

            await eventually(voted, SECONDS)
        return token

    async def certify(self, poll_id: str) -> None:
        await self._commands.ClosePoll(command.ClosePollRequest(poll_id=poll_id))
        await self._commands.CertifyPoll(command.CertifyPollRequest(poll_id=poll_id))

    async def results(self, poll_id: str, token: str = "") -> query.Results:
        request = query.GetResultsRequest(poll_id=poll_id, at_least_as_fresh=token)
        try:
            return (await self._queries.GetResults(request, timeout=5)).results
        except grpc.aio.AioRpcError as error:
            raise AssertionError(Refused(error).reason) from error

    async def show(self, poll_id: str, mon: int, tue: int) -> query.Results:
        """The results, once every read model has these votes, and nothing else, of the log's current epoch."""

        async def shown() -> None:
            [row] = await sql(
                self.write_dsn,
                "SELECT version, log_epoch::text AS epoch FROM polls, current_log_epoch WHERE poll_id = $1",
                poll_id,
            )
            results = await self.results(poll_id)
            assert (results.log_epoch, results.version) == (row["epoch"], row["version"])
            assert _counts(results) == {"mon": mon, "tue": tue}
            try:
                answer = await self._queries.GetPollDocument(query.GetPollDocumentRequest(poll_id=poll_id), timeout=5)
            except grpc.aio.AioRpcError as error:
                raise AssertionError(Refused(error).reason) from error
            options = json.loads(answer.document)["options"]
            assert {option["option_id"]: option["count"] for option in options} == {"mon": mon, "tue": tue}
            [votes] = await sql(
                views_of(self._read_dsn),
                "SELECT count(*) FROM votes JOIN polls USING (poll_no) WHERE poll_id = $1",
                poll_id,
            )
            assert votes["count"] == mon + tue
            status = await self._queries.GetReadModelStatus(query.GetReadModelStatusRequest(), timeout=5)
            assert status.log_epoch == row["epoch"]
            expected = dict.fromkeys(READ_MODELS, (row["epoch"], query.READ_MODEL_STATE_READING, 0))
            assert {m.name: (m.log_epoch, m.state, m.events_behind) for m in status.read_models} == expected

        await eventually(shown, SECONDS)
        return await self.results(poll_id)


class Reader:
    """Somebody who reads and watches a poll all the time, and keeps what they were answered."""

    def __init__(self, installation: Installation, poll_id: str) -> None:
        self._queries = installation._queries
        self._poll_id = poll_id
        self.read: list[query.Results] = []
        self.watched: list[query.Results] = []
        # Why reads were refused.
        self.refused: set[str] = set()
        # How the last watch ended.
        self.ended = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Reader]:
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for results in (self.read, self.watched):
            positions = [(r.log_epoch, r.version) for r in results]
            assert positions == sorted(positions)
            mixed = [c for c in map(_counts, results) if c["mon"] > BACKED_UP and c["tue"]]
            assert mixed == []
        assert self.refused <= {"STORE_UNAVAILABLE", "READ_MODEL_BEHIND", "POLL_NOT_FOUND"}

    async def _read(self) -> None:
        while True:
            try:
                request = query.GetResultsRequest(poll_id=self._poll_id)
                self.read.append((await self._queries.GetResults(request, timeout=5)).results)
            except grpc.aio.AioRpcError as error:
                self.refused.add(Refused(error).reason)
            await asyncio.sleep(0.01)

    async def _watch(self) -> None:
        while True:
            token = self.watched[-1].consistency_token if self.watched else ""
            request = query.WatchResultsRequest(poll_ids=[self._poll_id], at_least_as_fresh=token)
            try:
                async for response in self._queries.WatchResults(request):
                    self.watched.append(response.results)
                return
            except grpc.aio.AioRpcError as error:
                self.ended = Refused(error).reason
            await asyncio.sleep(0.05)


def _counts(results: query.Results) -> dict[str, int]:
    return {count.option_id: count.count for count in results.counts}


@asynccontextmanager
async def running(write_dsn: str, read_dsn: str, nats_url: str, redis_url: str) -> AsyncIterator[Installation]:
    """All services."""
    commands = CommandSettings(command_listen="127.0.0.1:0", write_dsn=write_dsn, voter_secret=VOTER_SECRET)
    queries = QuerySettings(
        query_listen="127.0.0.1:0", read_dsn=read_dsn, redis_url=redis_url, voter_secret=VOTER_SECRET
    )
    stores: dict[str, Any] = {
        "redis_url": redis_url,
        "read_dsn": read_dsn,
        "nats_url": nats_url,
        "write_dsn": write_dsn,
    }
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(relay(RelaySettings(write_dsn=write_dsn, nats_url=nats_url), stop))
        for name, kind in KINDS.items():
            tasks.create_task(project(kind, SETTINGS[READ_MODELS[name]](**stores), stop))
        async with (
            serving(lambda stop, ready: serve_commands(commands, stop, ready)) as writing,
            serving(lambda stop, ready: serve_queries(queries, stop, ready)) as reading,
        ):
            yield Installation(write_dsn, read_dsn, CommandServiceStub(writing), QueryServiceStub(reading))
        stop.set()


def voters(name: str, count: int) -> list[str]:
    return [f"{name}-{number}" for number in range(count)]


@pytest.fixture
def folder() -> Iterable[Path]:
    with tempfile.TemporaryDirectory(prefix="tally-restore-") as folder:
        # Postgres runs as another user.
        Path(folder).chmod(0o755)
        yield Path(folder)


async def test_a_base_backup_is_restored_unannounced_while_all_services_run(
    folder: Path, read_dsn: str, nats_url: str, redis_url: str
) -> None:
    async with write_server(folder) as server:
        await migrate_write(server.cluster.dsn("tally_write"))
        async with running(server.cluster.dsn("tally_write"), read_dsn, nats_url, redis_url) as all_:
            poll_id, other = await all_.open_poll(), await all_.open_poll()
            await all_.vote(poll_id, voters("kept", BACKED_UP), "mon")
            await all_.vote(other, voters("kept", 3), "tue")
            await server.back_up(folder / "backup")
            lost_token = await all_.vote(poll_id, voters("lost", 5), "mon")
            lost_poll = await all_.open_poll()
            await all_.vote(lost_poll, voters("lost", 2), "mon")
            before = await all_.show(poll_id, BACKED_UP + 5, 0)
            await all_.show(lost_poll, 2, 0)
            async with Reader(all_, poll_id).running() as reader, Reader(all_, lost_poll).running() as of_lost_poll:
                await eventually(lambda: _true(reader.watched and of_lost_poll.watched))
                await server.restore(folder / "backup")
                # Those whose votes were lost may vote again, and others, too: as many as make the same versions.
                await all_.vote(poll_id, voters("lost", 4), "tue")
                await all_.vote(poll_id, voters("new", 4), "tue")
                after = await all_.show(poll_id, BACKED_UP, 8)
                assert after.log_epoch > before.log_epoch
                # The write that the token stands for was lost with its history: the reader waits for nothing.
                assert (await all_.results(poll_id, lost_token)).log_epoch == after.log_epoch
                await all_.show(other, 0, 3)
                await eventually(lambda: _true(of_lost_poll.ended == "POLL_NOT_FOUND"))
                await eventually(lambda: _true(reader.watched[-1] == after))
                await all_.certify(poll_id)

                async def certified() -> None:
                    results = await all_.results(poll_id)
                    assert results.state == POLL_STATE_CERTIFIED
                    assert results.certification.agreed
                    assert {c.option_id: c.count for c in results.certification.counts} == {"mon": BACKED_UP, "tue": 8}

                await eventually(certified)
            reasons = await sql(all_.write_dsn, "SELECT reason FROM log_epochs ORDER BY log_epoch")
            assert ["the log lacks" in row["reason"] for row in reasons] == [False, True]


async def _true(value: object) -> bool:
    return bool(value)


async def test_a_dump_is_restored_on_another_server_and_announced(
    folder: Path, read_dsn: str, nats_url: str, redis_url: str
) -> None:
    async with write_server(folder) as server:
        await migrate_write(server.cluster.dsn("tally_write"))
        async with running(server.cluster.dsn("tally_write"), read_dsn, nats_url, redis_url) as all_:
            poll_id = await all_.open_poll()
            await all_.vote(poll_id, voters("kept", BACKED_UP), "mon")
            await server.dump("tally_write", folder / "tally.dump")
            await all_.vote(poll_id, voters("lost", 5), "mon")
            before = await all_.show(poll_id, BACKED_UP + 5, 0)
    async with write_server(folder, "second") as server:
        dsn = server.cluster.dsn("tally_write")
        await server.restore_dump("tally_write", folder / "tally.dump")
        [row] = await sql(dsn, "SELECT begin_log_epoch('restored the dump')::text AS epoch")
        async with running(dsn, read_dsn, nats_url, redis_url) as all_:
            async with Reader(all_, poll_id).running():
                await all_.vote(poll_id, voters("new", 5), "tue")
                after = await all_.show(poll_id, BACKED_UP, 5)
            # By its announcement, and by nothing else.
            assert after.log_epoch == row["epoch"] > before.log_epoch
            # An upgrade goes on from here.
            assert await migrate_write(dsn) == []


async def test_a_standby_that_lacks_the_last_commits_is_promoted(
    folder: Path, read_dsn: str, nats_url: str, redis_url: str
) -> None:
    async with write_server(folder) as primary:
        await migrate_write(primary.cluster.dsn("tally_write"))
        async with standby.serving(Standby(folder / "standby", primary.cluster), folder / "standby") as following:
            dsn = standby.any_of(*(server.cluster.dsn("tally_write") for server in (primary, following)))
            async with running(dsn, read_dsn, nats_url, redis_url) as all_:
                # Its connections know both servers; the test's own look at the one that is the primary then.
                all_.write_dsn = primary.cluster.dsn("tally_write")
                poll_id = await all_.open_poll()
                await all_.vote(poll_id, voters("kept", BACKED_UP), "mon")
                await all_.show(poll_id, BACKED_UP, 0)
                # It receives nothing more.
                head = (await sql(primary.cluster.admin_dsn, "SELECT pg_current_wal_lsn()::text"))[0][0]
                replayed = f"SELECT pg_last_wal_replay_lsn() >= '{head}'::pg_lsn"
                await eventually(lambda: _first(following, replayed))
                await following.run("ALTER SYSTEM SET primary_conninfo = ''")
                await following.run("SELECT pg_reload_conf()")
                await eventually(lambda: _first(following, "SELECT count(*) = 0 FROM pg_stat_wal_receiver"))
                await all_.vote(poll_id, voters("lost", 5), "mon")
                before = await all_.show(poll_id, BACKED_UP + 5, 0)
                async with Reader(all_, poll_id).running() as reader:
                    await eventually(lambda: _true(reader.watched))
                    await primary.die()
                    await following.run("SELECT pg_promote()")
                    all_.write_dsn = following.cluster.dsn("tally_write")
                    await all_.vote(poll_id, voters("new", 9), "tue")
                    after = await all_.show(poll_id, BACKED_UP, 9)
                    assert after.log_epoch > before.log_epoch
                    await eventually(lambda: _true(reader.watched[-1] == after))


async def _first(server: Server, query_: str) -> bool:
    return bool((await sql(server.cluster.admin_dsn, query_))[0][0])
