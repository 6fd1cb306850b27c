"""Which history of the log the stream carries: agreed before a session publishes its first event, and watched after.

The write database may go back to an earlier state: a backup is restored, or a standby is promoted that lacks the last
commits. Then it hands out versions again that the stream has already, for other events. Such a log has to begin a new
epoch, which its readers take for what it is: docs/adr/0013. That it went back is seen from the stream, which has events
that the log lacks or has with another time. A stream names the epoch whose events are published to it in its metadata,
and the deployment that it belongs to.
"""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import asyncpg
import structlog
from nats import errors as nats_errors
from prometheus_client import Counter

from contracts.bus import STREAM, microseconds
from contracts.log_epoch import ZERO
from relay.stream import Stream, StreamedEvent, Unusable
from runtime.postgres import queries

log = structlog.get_logger()
sql = queries(__package__)

# The latest messages that a session compares with the log before it publishes. What a log lost are its latest events.
TAIL_MESSAGES = 1000
_WATCH_SECONDS = 1.0

_begun = Counter("tally_relay_log_epochs_begun", "Log epochs begun because the write database had gone back.")


class AnotherEpoch(nats_errors.Error):
    """The current log epoch is no longer the one of this session: the next session agrees on it anew."""


class History:
    """The history of the log that this process publishes to the stream, over all its sessions."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        # The epoch that this process published last.
        self._led: UUID | None = None

    async def agree(self, stream: Stream) -> UUID:
        """The epoch to publish from now on; the stream's metadata has it when this returns.

        Raises Unusable where the stream belongs to another deployment, or carries a later history of the log, which
        another relay has begun while this process led.
        """
        # The stream first: what it has was in the log before.
        tail = await stream.tail(TAIL_MESSAGES)
        deployment, epoch = await self._read()
        if stream.deployment not in (None, deployment):
            raise Unusable(
                f"the stream {STREAM} belongs to another deployment, {stream.deployment}; this one is {deployment}. Use"
                " another NATS server or account, or delete the stream where that deployment does not exist any more"
            )
        streamed = max(stream.epoch, *(event.headers.log_epoch for event in tail), ZERO)
        if streamed > epoch:
            if self._led not in (None, streamed):
                raise Unusable(
                    f"another relay has begun a later history of the log, {streamed}; this one publishes nothing of"
                    f" {epoch} any more. Stop it, or the other one: two write databases accept votes"
                )
            epoch = await self._begin(epoch, streamed, f"the stream has epoch {streamed}, which the log lacks")
        elif lacking := await self._lacking(epoch, tail):
            epoch = await self._begin(epoch, epoch, _evidence(lacking))
        await stream.carry(deployment, epoch)
        self._led = epoch
        return epoch

    async def watch(self, epoch: UUID) -> None:
        """Looks each second, until cancelled. Raises AnotherEpoch where the log is at another one."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            _, current = await self._read()
            check(epoch, current)

    async def verify(self, epoch: UUID, events: Sequence[StreamedEvent]) -> None:
        """Begins a new epoch, and raises AnotherEpoch, where the log lacks one of some events that were on the stream
        before."""
        if lacking := await self._lacking(epoch, events):
            check(epoch, await self._begin(epoch, epoch, _evidence(lacking)))

    async def _lacking(self, epoch: UUID, events: Sequence[StreamedEvent]) -> list[StreamedEvent]:
        """Those of some events that are of this epoch, and that the log does not have like that."""
        mine = [event for event in events if event.headers.log_epoch == epoch]
        if not mine:
            return []
        rows = await self._pool.fetch(
            sql.recorded_at, [event.poll_id for event in mine], [event.headers.version for event in mine]
        )
        return [
            event
            for event, row in zip(mine, rows, strict=True)
            if not row["archived"] and not _is_event(event, row["recorded_at"])
        ]

    async def _read(self) -> tuple[UUID, UUID]:
        """The deployment, and the current epoch of the log."""
        deployment, epoch = await self._pool.fetchrow(sql.current_epoch)
        return deployment, epoch

    async def _begin(self, before: UUID, after: UUID, reason: str) -> UUID:
        """A new epoch greater than `after`, unless another relay of this database has begun one since `before`."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(sql.lock_epochs)
            _, current = await connection.fetchrow(sql.current_epoch)
            epoch: UUID = current
            if current != before and current > after:
                return epoch
            epoch = await connection.fetchval(sql.begin_epoch, reason, after)
        _begun.inc()
        log.error(
            "the write database went back to an earlier state: a new log epoch begins, and read models are made anew",
            reason=reason,
            before=str(before),
            log_epoch=str(epoch),
        )
        return epoch


def check(epoch: UUID, current: UUID) -> None:
    """Raises AnotherEpoch where the log is at another epoch than the session."""
    if current != epoch:
        raise AnotherEpoch(f"the log is at epoch {current}, and this session at {epoch}")


def _is_event(event: StreamedEvent, recorded_at: datetime | None) -> bool:
    if recorded_at is None:
        return False
    # A relay of an earlier version did not say when an event was recorded.
    return event.headers.recorded_at in (None, microseconds(recorded_at))


def _evidence(lacking: Sequence[StreamedEvent]) -> str:
    poll_id, headers = lacking[0]
    return f"the log lacks {len(lacking)} events that were published, as version {headers.version} of poll {poll_id}"
