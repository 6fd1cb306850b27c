"""`python -m relay`: the way from the outbox to the stream, as a process."""

import asyncio
from functools import partial

from pydantic import Field

from relay.shard import Shard
from runtime import lifecycle, postgres, telemetry
from runtime.settings import NatsUrl, PostgresUrl, Settings

# How long a stop waits for what is under way.
_STOP_SECONDS = 4.0

# How long a statement waits for another transaction's lock: what waits is tried again, and is unknown meanwhile. The
# backlog, which rests ten times as long as it was looked at, would be unknown for minutes after a lock of seconds.
_LOCK_SECONDS = 0.25


class RelaySettings(Settings):
    """What the relay reads from the environment."""

    write_dsn: PostgresUrl = Field(description="Postgres URL of the write database.")
    nats_url: NatsUrl = Field(description="URL of NATS; several servers of a cluster are separated by commas.")
    shards: int = Field(1, ge=1, le=1024, description="Parts of the outbox that are relayed side by side.")


async def main(stop: asyncio.Event) -> None:
    settings = RelaySettings.from_environment()
    telemetry.start("relay", settings)
    await relay(settings, stop)


async def relay(settings: RelaySettings, stop: asyncio.Event) -> None:
    """Relays every shard of which no other process is the relay, until `stop`."""
    waiting = set(range(settings.shards))

    def ready(shard: int) -> None:
        if shard in waiting:
            waiting.remove(shard)
            if not waiting:
                lifecycle.announce("running", settings, shards=settings.shards)

    pool = await postgres.connect_pool(
        settings.write_dsn, size=2, application="relay repair", lock_seconds=_LOCK_SECONDS
    )
    try:
        async with asyncio.TaskGroup() as tasks:
            shards = [
                Shard(settings.write_dsn, settings.nats_url, pool, shard, settings.shards, partial(ready, shard))
                for shard in range(settings.shards)
            ]
            running = [tasks.create_task(shard.run(stop)) for shard in shards]
            await stop.wait()
            await asyncio.wait(running, timeout=_STOP_SECONDS)
            for task in running:
                task.cancel()
    finally:
        pool.terminate()


if __name__ == "__main__":
    lifecycle.run(main)
