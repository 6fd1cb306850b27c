"""What people do by hand: reflection, a vote and a live stream with `buf curl`, as the README shows it."""

import asyncio
import json
import subprocess
from asyncio.subprocess import PIPE
from base64 import b64decode
from typing import Any
from uuid import uuid4

from google.rpc.error_details_pb2 import ErrorInfo

from tests.system import System

COMMAND, QUERY = "tally.command.v1.CommandService", "tally.query.v1.QueryService"
CURL = ("buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge")
POLL = {
    "title": "Lunch?",
    "method": "VOTING_METHOD_SINGLE_CHOICE",
    "options": [{"optionId": "pizza", "label": "Pizza"}, {"optionId": "soup", "label": "Soup"}],
}


async def curl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `buf curl`; it knows nothing but what reflection tells."""
    child = await asyncio.create_subprocess_exec(*CURL, *arguments, cwd="/", stdout=PIPE, stderr=PIPE)
    async with asyncio.timeout(30):
        out, err = await child.communicate()
    assert child.returncode is not None
    return subprocess.CompletedProcess(arguments, child.returncode, out.decode(), err.decode())


async def call(address: str, method: str, request: dict[str, Any]) -> dict[str, Any]:
    answer = await curl("-d", json.dumps(request), f"http://{address}/{method}")
    assert answer.returncode == 0, answer.stderr
    response: dict[str, Any] = json.loads(answer.stdout)
    return response


async def test_reflection_lists_the_services(system: System) -> None:
    for address, service in ((system["command_address"], COMMAND), (system["query_address"], QUERY)):
        listed = (await curl("--list-services", f"http://{address}")).stdout.split()
        assert {service, "grpc.health.v1.Health"} <= set(listed)
        health = await call(address, "grpc.health.v1.Health/Check", {"service": service})
        assert health == {"status": "SERVING"}


async def test_a_vote_by_hand_and_the_results_as_a_stream(system: System) -> None:
    command, query = system["command_address"], system["query_address"]
    created = await call(command, f"{COMMAND}/CreatePoll", {"requestId": str(uuid4()), "poll": POLL})
    await call(command, f"{COMMAND}/OpenPoll", {"pollId": created["pollId"]})
    vote = {"pollId": created["pollId"], "voterId": "ada", "optionIds": ["pizza"], "idempotencyKey": "a" * 16}
    first = await call(command, f"{COMMAND}/CastVote", vote)
    again = await call(command, f"{COMMAND}/CastVote", vote)
    assert again["receipt"] == first["receipt"]
    assert again["alreadyRecorded"]

    watching = await asyncio.create_subprocess_exec(
        *CURL,
        *("-d", json.dumps({"pollIds": [created["pollId"]], "atLeastAsFresh": first["consistencyToken"]})),
        f"http://{query}/{QUERY}/WatchResults",
        stdout=PIPE,
    )
    assert watching.stdout
    seen: list[int] = []
    try:
        text = ""
        async with asyncio.timeout(20):
            while not seen or seen[-1] < 2:
                text += (await watching.stdout.readline()).decode()
                try:
                    results = json.loads(text)["results"]
                except json.JSONDecodeError:
                    continue
                text = ""
                seen.append(int(results["totalVotes"]))
                if len(seen) == 1:
                    await call(command, f"{COMMAND}/CastVote", {**vote, "voterId": "bob", "optionIds": ["soup"]})
    finally:
        watching.kill()
        await watching.wait()
    assert seen[0] == 1
    assert results["source"] == "RESULTS_SOURCE_LIVE_CACHE"
    assert {count["optionId"]: int(count["count"]) for count in results["counts"]} == {"pizza": 1, "soup": 1}


async def test_a_refusal_says_its_reason(system: System) -> None:
    answer = await curl("-d", '{"pollId": "7"}', f"http://{system['command_address']}/{COMMAND}/OpenPoll")
    assert answer.returncode != 0
    refusal = json.loads(answer.stderr)
    assert refusal["code"] == "invalid_argument"
    assert {detail["type"] for detail in refusal["details"]} == {"google.rpc.ErrorInfo", "google.rpc.BadRequest"}
    [info] = [detail for detail in refusal["details"] if detail["type"] == "google.rpc.ErrorInfo"]
    assert ErrorInfo.FromString(b64decode(info["value"] + "==")).reason == "INVALID_REQUEST"
