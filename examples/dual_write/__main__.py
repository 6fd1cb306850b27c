"""The dual-write hazard, shown: a service is killed between its two steps, and its two stores are compared.

    python -m examples.dual_write [--output json]

For each way and each kill: a real service process records prescriptions 1 and 2 and is killed by SIGKILL while it
handles 2; a new process records 3. Then the rows in Postgres are compared with the events on the NATS stream. Exits 0
only if the ways without an outbox lose or invent an event, and the outbox does neither. It starts its own servers and
leaves nothing behind.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from nats.js.api import StreamConfig
from rich import box
from rich.console import Console
from rich.table import Table

from examples.dual_write import stores
from examples.dual_write.service import Prescription
from examples.dual_write.stores import Stores, sql
from runtime import embedded

ROOT = Path(__file__).resolve().parents[2]
DATABASE = "hospital"
PRESCRIPTIONS = [
    Prescription(1, "Maria Oliveira", "aspirin 100 mg"),
    Prescription(2, "Maria Oliveira", "paracetamol 500 mg"),
    Prescription(3, "João Silva", "aspirin 100 mg"),
]
KILLED_IN = 2
CONCLUSION = (
    "Without an outbox a kill loses an event or invents one.\n"
    "With an outbox the database and the stream agree after each kill."
)
# For a whole scenario; a busy machine may need a while to start a process.
_SECONDS = 100.0


class UnexpectedEndError(Exception):
    """A process of the example did not end as the scenario says."""


class Scenario(NamedTuple):
    """A way to record and publish, and the place where a process is killed."""

    name: str
    way: str
    # A kill point of service.py, or of relay.py if `kills_relay`.
    kill_point: str
    killed_between: str
    kills_relay: bool = False


SCENARIOS = [
    Scenario("lost_event", "write-then-publish", "stored", "write and publish"),
    Scenario("ghost_event", "publish-then-write", "announced", "publish and write"),
    Scenario("ghost_in_transaction", "publish-in-transaction", "announced", "publish and commit"),
    Scenario("outbox_stored", "outbox", "stored", "commit and publish"),
    Scenario("outbox_announced", "outbox", "announced", "event and commit"),
    Scenario("outbox_relay", "outbox", "published", "publish and delete", kills_relay=True),
]


@dataclass(frozen=True)
class Outcome:
    """What a scenario left behind: prescription ids."""

    scenario: str
    way: str
    process: str
    killed_between: str
    # Those that the service said were recorded.
    acknowledged: list[int]
    in_database: list[int]
    # In the order of the stream.
    on_stream: list[int]

    @property
    def lost(self) -> list[int]:
        """Prescriptions without an event."""
        return sorted(set(self.in_database) - set(self.on_stream))

    @property
    def ghosts(self) -> list[int]:
        """Events about prescriptions that do not exist."""
        return sorted(set(self.on_stream) - set(self.in_database))

    @property
    def doubled(self) -> list[int]:
        """Prescriptions with more than one event."""
        return sorted(number for number, count in Counter(self.on_stream).items() if count > 1)

    @property
    def agrees(self) -> bool:
        """Whether each prescription has one event, and each event a prescription."""
        return not (self.lost or self.ghosts or self.doubled)

    @property
    def verdict(self) -> str:
        """The difference between the two stores, in words."""
        faults = {"LOST": self.lost, "GHOST": self.ghosts, "DOUBLED": self.doubled}
        return "; ".join(f"{name} {_listed(ids)}" for name, ids in faults.items() if ids) or "equal"


async def compare_ways(dsn: str, nats_url: str) -> list[Outcome]:
    """The outcomes of all scenarios, which run side by side, each in a schema and on a stream of its own."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(run(scenario, dsn, nats_url)) for scenario in SCENARIOS]
    return [task.result() for task in running]


async def run(scenario: Scenario, dsn: str, nats_url: str) -> Outcome:
    """Records the prescriptions with a kill in between.

    Raises UnexpectedEndError if a process does not end as the scenario says.
    """
    name = scenario.name
    where = {"DSN": f"{dsn}&search_path={name}", "NATS_URL": nats_url, "SUBJECT": name}
    async with asyncio.timeout(_SECONDS), stores.connect(where["DSN"], nats_url, name) as seen:
        await seen.database.execute(f"CREATE SCHEMA {name}")
        await seen.database.execute(sql.create_tables)
        await seen.stream.add_stream(StreamConfig(name=name, subjects=[name]))
        kill = f"{scenario.kill_point}.{KILLED_IN}"
        acknowledged = await serve(scenario.way, where, PRESCRIPTIONS[:KILLED_IN], "" if scenario.kills_relay else kill)
        acknowledged += await serve(scenario.way, where, PRESCRIPTIONS[KILLED_IN:])
        if scenario.way == "outbox":
            if scenario.kills_relay:
                async with process("relay", where=where, kill=kill) as relay:
                    await was_killed(relay)
            async with process("relay", where=where) as relay:
                while await seen.database.fetchval(sql.waiting_events):
                    if relay.returncode is not None:
                        raise UnexpectedEndError(f"the relay ended with {relay.returncode}")
                    await asyncio.sleep(0.02)
        in_database = [row["prescription_id"] for row in await seen.database.fetch(sql.stored_prescriptions)]
        killed = "relay" if scenario.kills_relay else "service"
        return Outcome(
            name, scenario.way, killed, scenario.killed_between, acknowledged, in_database, await published(seen)
        )


async def serve(way: str, where: dict[str, str], requests: Sequence[Prescription], kill: str = "") -> list[int]:
    """Sends prescriptions to a service process, one after the other; returns the ids that it acknowledged.

    With a kill point the last of them is the one in which the process is killed.
    """
    acknowledged = []
    async with process("service", way, where=where, kill=kill) as service:
        assert service.stdin
        assert service.stdout
        for request in requests:
            service.stdin.write(json.dumps(request._asdict()).encode() + b"\n")
            if answer := await service.stdout.readline():
                acknowledged.append(int(answer))
        service.stdin.close()
        if kill:
            await was_killed(service)
        elif await service.wait():
            raise UnexpectedEndError(f"the service ended with {service.returncode}")
    return acknowledged


async def was_killed(process: asyncio.subprocess.Process) -> None:
    """Waits for the end of a process, which must be by SIGKILL."""
    if await process.wait() != -signal.SIGKILL:
        raise UnexpectedEndError(f"the process ended with {process.returncode}, and was not killed")


@asynccontextmanager
async def process(
    program: str, *arguments: str, where: dict[str, str], kill: str = ""
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process of this example, which kills itself at the kill point; ended when the context ends."""
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"{__package__}.{program}", *arguments),
        cwd=ROOT,
        env={**os.environ, **where, "TALLY_FAILPOINT": kill},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
            await running.wait()


async def published(seen: Stores) -> list[int]:
    """The prescriptions that the events on the stream are about, in its order."""
    last = (await seen.stream.stream_info(seen.subject)).state.last_seq
    messages = [await seen.stream.get_msg(seen.subject, sequence) for sequence in range(1, last + 1)]
    return [json.loads(message.data or b"")["prescription_id"] for message in messages]


def as_table(outcomes: Sequence[Outcome]) -> Table:
    """The outcomes for people."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, collapse_padding=True)
    for heading in ("way", "killed", "between", "database", "stream", "result"):
        table.add_column(heading)
    for outcome in outcomes:
        ids = (_listed(outcome.in_database), _listed(outcome.on_stream))
        table.add_row(outcome.way, outcome.process, outcome.killed_between, *ids, outcome.verdict)
    return table


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))


def as_json(outcomes: Sequence[Outcome]) -> str:
    """The outcomes for programs."""
    faults = ("lost", "ghosts", "doubled", "agrees")
    rows = [asdict(outcome) | {name: getattr(outcome, name) for name in faults} for outcome in outcomes]
    return json.dumps({"outcomes": rows}, ensure_ascii=False, indent=2)


async def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.dual_write", description="Shows the dual-write hazard.")
    parser.add_argument(
        "--output", choices=["text", "json"], default="text", help="text for people, or one JSON object"
    )
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory(prefix="tally-dual-write-") as directory:
        async with embedded.stores(Path(directory), [DATABASE]) as servers:
            outcomes = await compare_ways(servers.dsn(DATABASE), servers.nats_url)
    as_promised = all(outcome.agrees == (outcome.way == "outbox") for outcome in outcomes)
    if output == "json":
        print(as_json(outcomes))
    else:
        console = Console(highlight=False)
        console.print("Prescriptions 1, 2 and 3 are recorded. A process is killed while it handles 2.")
        console.print(as_table(outcomes))
        console.print(CONCLUSION if as_promised else "This is NOT what the ways promise.")
    return 0 if as_promised else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
