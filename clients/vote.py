"""`tally vote`: one vote."""

import asyncio
from typing import Annotated

import typer
from tally.command.v1.command_service_pb2 import CastVoteRequest

from clients.connection import command, find_address
from clients.idempotency import idempotency_key
from clients.options import DEFAULT_DATA_DIR, CommandAddress, DataDir, OutputOption, PollId, QueryAddress
from clients.output import Output, plain, print_fields, print_json
from clients.poll_ids import find_poll


def vote(
    poll: PollId,
    voter: Annotated[str, typer.Argument(metavar="VOTER", help="Who votes, in your own terms; 1 to 256 characters.")],
    options: Annotated[
        list[str], typer.Argument(metavar="OPTION...", help="The option's id; several in an approval poll.")
    ],
    command_address: CommandAddress = None,
    query_address: QueryAddress = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: OutputOption = Output.TABLE,
) -> None:
    """Cast one vote. To repeat the same vote is harmless, and prints the first receipt again.

    Only a repeat by the same user on this machine, or with the same TALLY_IDEMPOTENCY_KEY, is told so; to any other
    caller a second vote is ALREADY_VOTED, whatever it chooses.
    """
    poll = find_poll(poll, query_address, data_dir)
    request = CastVoteRequest(poll_id=poll, voter_id=voter, option_ids=options, idempotency_key=idempotency_key())
    address = find_address("command", command_address, data_dir)
    response = asyncio.run(command(address, lambda commands: commands.CastVote, request))
    if output is Output.JSON:
        print_json(plain(response))
        return
    receipt = response.receipt
    print_fields(
        {
            "receipt_id": receipt.receipt_id,
            "recorded_at": receipt.recorded_at.ToJsonString(),
            "version": str(receipt.version),
            "already_recorded": "yes" if response.already_recorded else "no",
        }
    )
