"""What the documents say of the running product is true."""

import asyncio
import random
import re
import urllib.request
from pathlib import Path

from runtime import embedded
from tests.system import running_system

DOCUMENTS = [Path("README.md"), *sorted(Path("docs").rglob("*.md"))]
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


async def test_metrics_are_scraped_by_the_names_that_documents_give_them(tmp_path: Path) -> None:
    named = named_metrics()
    assert len(named) > 20, "the documents name them otherwise"
    first = _free_ports()
    async with running_system(tmp_path / "data", TALLY_METRICS_LISTEN=f"127.0.0.1:{first}"):
        pages = await asyncio.gather(*(asyncio.to_thread(_scraped, first + n) for n in range(_PROCESSES)))
    scraped = set().union(*pages)
    assert all(pages), "a process has no metrics"
    assert {name: str(document) for name, document in named.items() if name not in scraped} == {}


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
