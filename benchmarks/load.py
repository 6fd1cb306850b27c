"""A caller of CastVotes in a process of its own: `python -m benchmarks.load` with its orders as JSON on stdin.

It prepares all requests as bytes, one for each of the `poll_ids` in turn, says "ready", waits for a line, sends them
over several streams, and prints what was answered as JSON: {"accepted", "already_recorded", "rejected", "seconds",
"acknowledged"}. The last is when (time.perf_counter) which version was.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from typing import Any

import grpc
import uvloop
from tally.command.v1 import command_service_pb2 as pb

from contracts.freshness import parse

METHOD = "/tally.command.v1.CommandService/CastVotes"


async def main() -> None:
    orders = json.loads(sys.stdin.readline())
    streams: list[list[bytes]] = [[] for _ in range(orders["streams"])]
    polls: list[str] = orders["poll_ids"]
    size, first, repeated = orders["batch"], orders["first"], orders["repeated"]
    for number in range(orders["votes"] // size):
        voters = range(number * size, (number + 1) * size)
        votes = [
            pb.Vote(
                # One in a hundred is a voter that an earlier process has sent, with the same choice.
                voter_id=f"voter-{(repeated if repeated is not None and voter % 100 == 0 else first) + voter:012}",
                option_ids=["yes" if voter % 3 else "no"],
            )
            for voter in voters
        ]
        request = pb.CastVotesRequest(
            batch_sequence=number,
            poll_id=polls[number % len(polls)],
            votes=votes,
            idempotency_key=orders.get("idempotency_key", ""),
        )
        streams[number % len(streams)].append(request.SerializeToString())
    answers = Counter[str]()
    acknowledged: list[tuple[float, str]] = []
    async with grpc.aio.insecure_channel(orders["address"]) as channel:
        await channel.channel_ready()
        call: Any = channel.stream_stream(METHOD, response_deserializer=pb.CastVotesResponse.FromString)

        async def send(requests: list[bytes]) -> None:
            async for response in call(iter(requests)):
                acknowledged.append((time.perf_counter(), response.consistency_token))
                answers["accepted"] += response.accepted
                answers["already_recorded"] += response.already_recorded
                answers["rejected"] += len(response.rejections)

        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        started = time.perf_counter()
        await asyncio.gather(*map(send, streams))
        seconds = time.perf_counter() - started
    versions = [(when, parse(token)[1]) for when, token in acknowledged]
    print(json.dumps({**answers, "seconds": seconds, "acknowledged": versions}), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
