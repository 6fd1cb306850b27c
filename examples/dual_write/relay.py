"""The relay of the outbox: publishes the events that wait, in order, and deletes each after the stream has it.

    python -m examples.dual_write.relay

It runs until it is stopped, and may be killed at any instruction. Its kill point `published.ID` is between its own two
steps: the event is on the stream and still in the outbox. The next relay publishes it again with the same message id,
and the stream drops the copy.
"""

import asyncio

from examples.dual_write import stores
from examples.dual_write.stores import sql
from runtime.failpoints import failpoint

_PAUSE_SECONDS = 0.02


async def main() -> None:
    async with stores.connect_by_environment() as to:
        while True:
            for outbox_id, prescription_id, payload in await to.database.fetch(sql.next_events):
                await to.publish(prescription_id, payload)
                failpoint(f"published.{prescription_id}")
                await to.database.execute(sql.delete_event, outbox_id)
            await asyncio.sleep(_PAUSE_SECONDS)


if __name__ == "__main__":
    asyncio.run(main())
