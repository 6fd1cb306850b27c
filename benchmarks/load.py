"""A caller of CastVotes in a process of its own: `python -m benchmarks.load` with its orders as JSON on stdin.

It prepares all requests as bytes, says "ready", waits for a line, sends them over several streams, and prints what was
answered as JSON: {"seconds", "accepted"}.
"""

import asyncio
import json
import sys
import time
from typing import Any

import grpc
import uvloop
from tally.command.v1 import command_service_pb2 as pb

METHOD = "/tally.command.v1.CommandService/CastVotes"


async def main() -> None:
    orders = json.loads(sys.stdin.readline())
    streams: list[list[bytes]] = [[] for _ in range(orders["streams"])]
    size, first = orders["batch"], orders["first"]
    for number in range(orders["votes"] // size):
        votes = [
            pb.Vote(voter_id=f"voter-{first + number * size + n:012}", option_ids=["yes" if n % 3 else "no"])
            for n in range(size)
        ]
        request = pb.CastVotesRequest(batch_sequence=number, poll_id=orders["poll_id"], votes=votes)
        streams[number % len(streams)].append(request.SerializeToString())
    async with grpc.aio.insecure_channel(orders["address"]) as channel:
        await channel.channel_ready()
        call: Any = channel.stream_stream(METHOD, response_deserializer=pb.CastVotesResponse.FromString)

        async def send(requests: list[bytes]) -> int:
            return sum([response.accepted async for response in call(iter(requests))])

        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        started = time.perf_counter()
        accepted = sum(await asyncio.gather(*map(send, streams)))
        print(json.dumps({"seconds": time.perf_counter() - started, "accepted": accepted}), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
