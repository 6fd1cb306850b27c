"""`python -m projector NAME`: one read model's projector, as a process."""

import asyncio
import os
import sys
from collections.abc import Mapping

from pydantic import Field

from contracts.read_models import READ_MODELS
from projector.documents import Documents
from projector.live import Live
from projector.projection import Projection
from projector.read_model import ReadModel
from projector.views import Views
from runtime import lifecycle, telemetry
from runtime.settings import PREFIX, NatsUrl, PostgresUrl, RedisUrl, Settings

KINDS: Mapping[str, type[ReadModel]] = {kind.name: kind for kind in (Live, Views, Documents)}

# How long a stop waits for the current batch.
_STOP_SECONDS = 4.0


class ProjectorSettings(Settings):
    """What every projector reads from the environment, beside TALLY_READ_MODEL, which an argument may replace."""

    nats_url: NatsUrl = Field(description="URL of NATS; several servers of a cluster are separated by commas.")
    write_dsn: PostgresUrl | None = Field(
        None,
        description="Postgres URL of the write database: what the stream does not have is read from its log.",
    )

    @property
    def store(self) -> str:
        """Where the store of the read model is."""
        raise NotImplementedError


class RedisSettings(ProjectorSettings):
    """What the projector of a read model in Redis reads from the environment."""

    redis_url: RedisUrl = Field(description="URL of Redis.")

    @property
    def store(self) -> str:
        return self.redis_url


class ReadDatabaseSettings(ProjectorSettings):
    """What the projector of a read model in the read database reads from the environment."""

    read_dsn: PostgresUrl = Field(description="Postgres URL of the read database.")

    @property
    def store(self) -> str:
        return self.read_dsn


SETTINGS: Mapping[str, type[ProjectorSettings]] = {
    "TALLY_REDIS_URL": RedisSettings,
    "TALLY_READ_DSN": ReadDatabaseSettings,
}


async def main(stop: asyncio.Event) -> None:
    match sys.argv[1:] or [os.environ.get(f"{PREFIX}READ_MODEL", "")]:
        case [name] if name in KINDS:
            settings = SETTINGS[READ_MODELS[name]].from_environment()
            telemetry.start(f"projector {name}", settings)
            await project(KINDS[name], settings, stop)
        case _:
            sys.exit(f"usage: python -m projector {'|'.join(KINDS)}, or set {PREFIX}READ_MODEL")


async def project(kind: type[ReadModel], settings: ProjectorSettings, stop: asyncio.Event) -> None:
    """Keeps a read model until `stop`."""
    announced = False

    def ready() -> None:
        nonlocal announced
        if not announced:
            announced = True
            lifecycle.announce("running", settings)

    async with asyncio.TaskGroup() as tasks:
        projection = Projection(kind, settings.store, settings.nats_url, settings.write_dsn or "", ready)
        running = tasks.create_task(projection.run(stop))
        await stop.wait()
        await asyncio.wait([running], timeout=_STOP_SECONDS)
        running.cancel()


if __name__ == "__main__":
    lifecycle.run(main)
