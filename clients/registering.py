"""The registration of voters from a file: one call of RegisterVoters, made again from the start where it breaks."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import grpc
from tally.command.v1.command_service_pb2 import RegisterVotersRequest, RegisterVotersResponse
from tally.command.v1.command_service_pb2 import Voter as VoterEntry

from clients.batches import divided
from clients.connection import CommandServer, Patience
from clients.progress import Progress
from clients.voters import RollFile, RollSurvey, Voter

_BATCH_SIZE = 10_000
# A server that takes no batch and gives no answer for so long is given up.
_STALL_SECONDS = 60.0


@dataclass
class Registration:
    """Registers every voter of a surveyed file. To do it again is safe: those on the roll stay, with their weight."""

    file: RollFile
    survey: RollSurvey
    poll_id: str
    retry_for: float = 60.0
    attempts: int = 0
    """After a lost connection, those whom an earlier attempt registered are `already_registered`."""
    done: int = 0
    """Voters that this attempt has sent."""
    seconds: float = 0.0

    @property
    def pace(self) -> str:
        """How fast voters are sent."""
        return f"{self.done / self.seconds if self.seconds else 0:,.0f} voters/s"

    async def run(self, commands: CommandServer, progress: Progress) -> RegisterVotersResponse:
        """Raises Failure."""
        patience = Patience(self.retry_for)
        farthest = 0

        async def attempt() -> RegisterVotersResponse:
            nonlocal farthest
            clock = asyncio.get_running_loop().time
            started = clock()
            self.attempts += 1
            self.done = 0
            call = commands.stub.RegisterVoters()
            try:
                # A call that broke says why at its end.
                with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    source = _requests(self.file.voters(self.survey), self.poll_id)
                    while request := await asyncio.to_thread(next, source, None):
                        async with asyncio.timeout(_STALL_SECONDS):
                            await call.write(request)
                        self.done += len(request.voters)
                        self.seconds = clock() - started
                        progress.went_on()
                        # A server that breaks every call at the same place is not retried for ever.
                        if self.done > farthest:
                            farthest = self.done
                            patience.renew()
                    await call.done_writing()
                async with asyncio.timeout(_STALL_SECONDS):
                    response: RegisterVotersResponse = await call
                self.seconds = clock() - started
                return response
            finally:
                call.cancel()

        return await commands.persist(attempt, patience, progress.lost)


def _requests(voters: Iterator[Voter], poll_id: str) -> Iterator[RegisterVotersRequest]:
    def build(batch: Sequence[Voter]) -> RegisterVotersRequest:
        entries = [VoterEntry(voter_id=voter_id, weight=weight) for _, voter_id, weight in batch]
        return RegisterVotersRequest(poll_id=poll_id, voters=entries)

    while batch := list(islice(voters, _BATCH_SIZE)):
        for request, _ in divided(batch, build):
            yield request
