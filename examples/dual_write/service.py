"""A service that stores prescriptions and publishes an event about each, in one of four ways.

    python -m examples.dual_write.service WAY

It reads one prescription per line from stdin, as JSON, and answers each with its id on stdout once it is recorded. The
kill points are named by the state that a crash leaves behind:

- `stored.ID`: the prescription is committed in the database, and its event is not on the stream yet.
- `announced.ID`: the event was handed over, and the prescription is not committed yet.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from examples.dual_write import stores
from examples.dual_write.stores import Stores, sql
from runtime.failpoints import failpoint


class Prescription(NamedTuple):
    """What a doctor prescribes."""

    prescription_id: int
    patient: str
    medicine: str

    @property
    def event(self) -> str:
        """What other services are told of it, as JSON."""
        return json.dumps({"event": "PrescriptionCreated", **self._asdict()})


async def write_then_publish(to: Stores, new: Prescription) -> None:
    await to.database.execute(sql.insert_prescription, *new)
    failpoint(f"stored.{new.prescription_id}")
    await to.publish(new.prescription_id, new.event)


async def publish_then_write(to: Stores, new: Prescription) -> None:
    await to.publish(new.prescription_id, new.event)
    failpoint(f"announced.{new.prescription_id}")
    await to.database.execute(sql.insert_prescription, *new)


async def publish_in_transaction(to: Stores, new: Prescription) -> None:
    # A failed publish rolls the prescription back. But the commit comes last, and it is the write.
    async with to.database.transaction():
        await to.database.execute(sql.insert_prescription, *new)
        await to.publish(new.prescription_id, new.event)
        failpoint(f"announced.{new.prescription_id}")


async def outbox(to: Stores, new: Prescription) -> None:
    # Both rows are in one database: one commit makes both durable, or neither.
    async with to.database.transaction():
        await to.database.execute(sql.insert_event, new.prescription_id, new.event)
        failpoint(f"announced.{new.prescription_id}")
        await to.database.execute(sql.insert_prescription, *new)
    failpoint(f"stored.{new.prescription_id}")


WAYS: dict[str, Callable[[Stores, Prescription], Awaitable[None]]] = {
    "write-then-publish": write_then_publish,
    "publish-then-write": publish_then_write,
    "publish-in-transaction": publish_in_transaction,
    "outbox": outbox,
}


async def main(way: str) -> None:
    record = WAYS[way]
    async with stores.connect_by_environment() as to:
        while line := await asyncio.to_thread(sys.stdin.readline):
            new = Prescription(**json.loads(line))
            await record(to, new)
            print(new.prescription_id, flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
