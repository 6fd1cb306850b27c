"""A caller of a unary RPC in a process of its own: `python -m benchmarks.calls` with its orders as JSON on stdin.

The requests are those of CastVote, each by a new voter, in each of the `poll_ids` in turn; or the same `request` (hex)
where there is no poll. It says
"ready", waits for a line, then calls for some seconds: `concurrent` callers, each with its next call as soon as the
last one is answered, or, given a `rate`, that many calls per second, whatever the answers. It prints {"calls",
"seconds", "p50", "p99", "acknowledged"} as JSON. With a rate, a call's time counts from when it was due, so a caller
that falls behind does not hide it. `acknowledged` is when (time.perf_counter) which version was, if that is asked for.
"""

import asyncio
import json
import statistics
import sys
import time
from itertools import count, cycle
from typing import Any

import grpc
import uvloop
from tally.command.v1 import command_service_pb2 as pb

from runtime.lifecycle import settle_memory


async def main() -> None:
    orders = json.loads(sys.stdin.readline())
    voters = count(orders["first"])
    templates = cycle(
        pb.CastVoteRequest(poll_id=poll_id, option_ids=["yes"]).SerializeToString() for poll_id in orders["poll_ids"]
    )
    same = bytes.fromhex(orders["request"])

    def request() -> bytes:
        if not orders["poll_ids"]:
            return same
        # Messages one after the other are read as one.
        return next(templates) + pb.CastVoteRequest(voter_id=f"voter-{next(voters):012}").SerializeToString()

    times: list[float] = []
    answers: list[tuple[float, bytes]] = []
    async with grpc.aio.insecure_channel(orders["address"]) as channel:
        await channel.channel_ready()
        call: Any = channel.unary_unary(orders["method"])
        await call(request())

        async def once(due: float) -> None:
            answer = await call(request())
            now = time.perf_counter()
            times.append(now - due)
            if orders["acknowledged"]:
                answers.append((now, answer))

        async def keep_calling(until: float) -> None:
            while (now := time.perf_counter()) < until:
                await once(now)

        # As in the services: a pause of the caller's own would count as theirs.
        settle_memory()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        started = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            if orders["rate"]:
                for number in range(int(orders["rate"] * orders["seconds"])):
                    due = started + number / orders["rate"]
                    if (early := due - time.perf_counter()) > 0:
                        await asyncio.sleep(early)
                    tasks.create_task(once(due))
            else:
                for _ in range(orders["concurrent"]):
                    tasks.create_task(keep_calling(started + orders["seconds"]))
        seconds = time.perf_counter() - started
    percentiles = statistics.quantiles(times, n=100)
    figures = {"calls": len(times), "seconds": seconds, "p50": percentiles[49], "p99": percentiles[98]}
    versions = [(when, pb.CastVoteResponse.FromString(answer).receipt.version) for when, answer in answers]
    print(json.dumps({**figures, "acknowledged": versions}))


if __name__ == "__main__":
    uvloop.run(main())
