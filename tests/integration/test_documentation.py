"""What the documents say of the running product is true."""

import asyncio
import json
import os
import random
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

from tally.command.v1.command_service_pb2 import CastVoteRequest, CreatePollRequest, OpenPollRequest
from tally.poll.v1.poll_pb2 import PollOption, PollSpec, VotingMethod
from tally.query.v1.query_service_pb2 import GetReadModelStatusRequest, ReadModelState

from runtime import embedded
from tests.processes import eventually
from tests.servers import sql
from tests.system import running_system

DOCUMENTS = [Path("README.md"), *sorted(Path("docs").rglob("*.md"))]
# What `tally up` runs.
_PROGRAM = ("clients", "command_server", "contracts", "migrations", "projector", "query_server", "relay", "runtime")
# command_server, query_server, relay, and a projector for each read model, as the README says of TALLY_METRICS_LISTEN.
_PROCESSES = 6
# In documents these are names of databases and of channels.
_NO_METRICS = {"tally_write", "tally_read", "tally_read_models"}


def named_metrics() -> dict[str, Path]:
    """The metrics that documents name, each with a document that does."""
    return {
        name: document
        for document in DOCUMENTS
        for name in re.findall(r"`(tally_[a-z_]+)(?:\{[^`]*\})?`", document.read_text())
        if name not in _NO_METRICS
    }


async def test_a_read_model_is_added_by_the_steps_of_its_document(tmp_path: Path) -> None:
    copy = tmp_path / "repository"
    _follow(Path("docs/adding-a-read-model.md"), copy)
    async with running_system(tmp_path / "data", repository=copy) as system:
        options = [PollOption(option_id=name, label=name) for name in ("tea", "milk")]
        spec = PollSpec(title="Which?", options=options, method=VotingMethod.VOTING_METHOD_SINGLE_CHOICE)
        poll_id = (await system.command.CreatePoll(CreatePollRequest(poll=spec))).poll_id
        await system.command.OpenPoll(OpenPollRequest(poll_id=poll_id))
        await system.command.CastVote(CastVoteRequest(poll_id=poll_id, voter_id="ada", option_ids=["tea"]))

        async def is_there() -> None:
            query = "SELECT document FROM exports.exports WHERE poll_id = $1"
            found = [json.loads(row["document"]) for row in await sql(system["read_dsn"], query, poll_id)]
            assert [[option["count"] for option in document["options"]] for document in found] == [[1, 0]]

        async def is_told() -> None:
            answer = await system.query.GetReadModelStatus(GetReadModelStatusRequest(), timeout=10)
            states = {model.name: model.state for model in answer.read_models}
            assert states["exports"] == states["documents"]
            assert states["exports"] not in (
                ReadModelState.READ_MODEL_STATE_SILENT,
                ReadModelState.READ_MODEL_STATE_UNAVAILABLE,
            )

        await eventually(is_there)
        await eventually(is_told)
        rebuilt = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "from clients.cli import main; main()", "rebuild", "exports"),
            *("--data-dir", str(tmp_path / "data"), "--output", "json"),
            env=os.environ | {"PYTHONPATH": str(copy)},
            cwd=tmp_path,
        )
        async with asyncio.timeout(60):
            assert await rebuilt.wait() == 0
        await eventually(is_there)


async def test_metrics_are_scraped_by_the_names_that_documents_give_them(tmp_path: Path) -> None:
    named = named_metrics()
    assert len(named) > 20, "the documents name them otherwise"
    first = _free_ports()
    async with running_system(tmp_path / "data", {"TALLY_METRICS_LISTEN": f"127.0.0.1:{first}"}):
        pages = await asyncio.gather(*(asyncio.to_thread(_scraped, first + n) for n in range(_PROCESSES)))
    scraped = set().union(*pages)
    assert all(pages), "a process has no metrics"
    assert {name: str(document) for name, document in named.items() if name not in scraped} == {}


def _follow(document: Path, copy: Path) -> None:
    """Runs the commands of a document in a copy of the program."""
    for folder in _PROGRAM:
        shutil.copytree(folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    [steps] = re.findall(r"^```sh\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)
    subprocess.run(["bash", "-euc", steps], cwd=copy, check=True, timeout=30)


def _scraped(port: int) -> set[str]:
    """The names that Prometheus stores: those of all samples, and of families that have none yet."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        text = page.read().decode()
    return set(re.findall(r"^(?:# TYPE )?(tally_\w+)", text, re.MULTILINE))


def _free_ports() -> int:
    """The first of as many ports in a row as there are processes."""
    while True:
        first = random.randrange(20_000, 30_000)
        if all(embedded.is_free(first + number) for number in range(_PROCESSES)):
            return first
