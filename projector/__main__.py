"""`python -m projector live|views`: one read model's projector, as a process."""

import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial

from pydantic import Field

from projector.live import Live
from projector.projection import Projection, ReadModel
from projector.views import Views
from runtime import lifecycle, telemetry
from runtime.settings import PREFIX, Settings

# How long a stop waits for the batch at hand.
_STOP_SECONDS = 4.0


class ProjectorSettings(Settings):
    """What every projector reads from the environment, beside TALLY_READ_MODEL, which an argument may replace."""

    nats_url: str = Field(description="URL of NATS; several servers of a cluster are separated by commas.")


class LiveSettings(ProjectorSettings):
    """What `projector live` reads from the environment."""

    redis_url: str = Field(description="URL of Redis.")


class ViewsSettings(ProjectorSettings):
    """What `projector views` reads from the environment."""

    read_dsn: str = Field(description="Postgres URL of the read database.")


async def main(stop: asyncio.Event) -> None:
    match sys.argv[1:] or [os.environ.get(f"{PREFIX}READ_MODEL", "")]:
        case ["live"]:
            live_settings = LiveSettings.from_environment()
            telemetry.start("projector live", live_settings)
            await live(live_settings, stop)
        case ["views"]:
            views_settings = ViewsSettings.from_environment()
            telemetry.start("projector views", views_settings)
            await views(views_settings, stop)
        case _:
            sys.exit(f"usage: python -m projector live|views, or set {PREFIX}READ_MODEL")


async def live(settings: LiveSettings, stop: asyncio.Event) -> None:
    """Keeps the live counters until `stop`."""
    await _project(Live, partial(Live.connect, settings.redis_url), settings, stop)


async def views(settings: ViewsSettings, stop: asyncio.Event) -> None:
    """Keeps the read database until `stop`."""
    await _project(Views, partial(Views.connect, settings.read_dsn), settings, stop)


async def _project(
    kind: type[ReadModel],
    connect: Callable[[], AbstractAsyncContextManager[ReadModel]],
    settings: ProjectorSettings,
    stop: asyncio.Event,
) -> None:
    announced = False

    def ready() -> None:
        nonlocal announced
        if not announced:
            announced = True
            lifecycle.announce("running", settings)

    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(Projection(kind, connect, settings.nats_url, ready).run(stop))
        await stop.wait()
        await asyncio.wait([running], timeout=_STOP_SECONDS)
        running.cancel()


if __name__ == "__main__":
    lifecycle.run(main)
