"""The voter secret of the write database: the first server leaves its fingerprint, another secret is refused."""

import asyncio

import asyncpg

from contracts.voters import VoterKeys
from runtime.postgres import UNAVAILABLE, queries
from runtime.replicas import connect_primary

sql = queries(__package__)

_START_SECONDS = 5.0
_SESSION = {"application_name": "command_server start", "statement_timeout": "5s"}


class OtherSecret(ConnectionError):  # noqa: N818 - named for what it finds
    """The database's votes are keyed with another TALLY_VOTER_SECRET; to the callers it is one that does not answer."""

    def __init__(self) -> None:
        super().__init__(
            "TALLY_VOTER_SECRET is not the one with which the votes of this write database are keyed: every voter could"
            " vote twice; use the secret of the other command servers"
        )


class SecretGuard:
    """Checks each new connection of a command server."""

    def __init__(self, voters: VoterKeys) -> None:
        self._fingerprint = voters.fingerprint
        self._refused = asyncio.Event()

    async def check(self, connection: asyncpg.Connection) -> None:
        """Raises OtherSecret where the database has another secret. Where it has none yet, this one becomes its."""
        fingerprint = await connection.fetchval(sql.voter_secret)
        if fingerprint is None:
            await connection.execute(sql.keep_voter_secret, self._fingerprint)
            fingerprint = await connection.fetchval(sql.voter_secret)
        if fingerprint != self._fingerprint:
            self._refused.set()
            raise OtherSecret

    async def check_at_start(self, dsn: str) -> None:
        """The same over a connection of its own. A database that does not answer is checked once it does."""
        try:
            async with asyncio.timeout(_START_SECONDS):
                connection = await connect_primary(dsn, timeout=_START_SECONDS, server_settings=_SESSION)
                try:
                    await self.check(connection)
                finally:
                    await connection.close(timeout=1)
        except OtherSecret:
            raise
        except UNAVAILABLE:
            return

    async def run(self) -> None:
        """Raises OtherSecret once a connection was refused: a server must not go on as if its database were away."""
        await self._refused.wait()
        raise OtherSecret
