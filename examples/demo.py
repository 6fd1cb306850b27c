"""A real election, end to end: start everything, cast 80,101 ballots, watch them being counted, check every count.

Exits 0 only if Tally and the file agree on every option. It needs nothing that runs already and leaves nothing behind.
"""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ELECTION = Path(__file__).with_name("minneapolis-2013-mayor.csv.gz")
TITLE = "Minneapolis 2013: mayor, first choices"
# More than one mark for one rank is no vote.
NO_VOTE = "overvote"

TALLY = str(Path(sysconfig.get_path("scripts")) / "tally")
START_SECONDS = 60
STOP_SECONDS = 20

# The demonstration is about servers of its own, whatever the environment says about others.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("TALLY_")}

console = Console(highlight=False)


def main() -> int:
    """Returns the exit code."""
    # So that the stack is stopped as well where the demonstration is.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="tally-demo-") as directory:
        data_dir = Path(directory) / "data"
        with running_stack(data_dir, Path(directory) / "up.log"):
            imported = tally(
                *("import", str(ELECTION), "--title", TITLE, "--choice-column", "choice_1"),
                *("--voter-column", "ballot_id", "--ignore-choice", NO_VOTE, "--watch", "--data-dir", str(data_dir)),
            )
            poll_id = imported["poll_id"]
            closed = tally("poll", "close", poll_id, "--data-dir", str(data_dir))
            token = closed["consistency_token"]
            answer = tally("results", poll_id, "--at-least-as-fresh", token, "--data-dir", str(data_dir))
    agree = compare(answer["results"], count_the_file())
    console.print(
        f"{imported['accepted']:,} votes recorded at {imported['votes_per_second']:,.0f} votes/s; the read side showed"
        f" all of them {imported['read_side_seconds'] * 1000:,.0f} ms after the last answer."
    )
    console.print("Tally and the file agree." if agree else "Tally and the file DISAGREE.")
    return 0 if agree else 1


@contextmanager
def running_stack(data_dir: Path, log: Path) -> Iterator[None]:
    """Postgres, NATS, Redis and the four services, on free ports, until the context ends."""
    started = time.monotonic()
    command = [TALLY, "up", "--data-dir", str(data_dir), "--command-port", "0", "--query-port", "0"]
    with log.open("wb") as output:
        # A session of its own: Ctrl-C is ours to handle, and the stack is stopped once.
        stack = subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=output, start_new_session=True)
    try:
        while not (data_dir / "run.json").exists():
            if stack.poll() is not None or time.monotonic() - started > START_SECONDS:
                console.print(log.read_text(errors="replace"), markup=False)
                sys.exit("`tally up` did not start")
            time.sleep(0.05)
        console.print(f"Everything was started in {time.monotonic() - started:.1f} s.")
        yield
    finally:
        stack.terminate()
        try:
            stack.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            stack.kill()
            stack.wait()


def tally(*arguments: str) -> dict[str, Any]:
    """What a `tally` command prints as JSON. Exits where the command fails, which has then said why."""
    command = [TALLY, *arguments, "--output", "json"]
    finished = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        sys.exit(f"`{' '.join(command)}` ended with exit code {finished.returncode}")
    answer: dict[str, Any] = json.loads(finished.stdout)
    return answer


def count_the_file() -> Counter[str]:
    """Votes by option, counted without any part of Tally."""
    with gzip.open(ELECTION, "rt", encoding="utf-8", newline="") as file:
        choices = Counter(row["choice_1"] for row in csv.DictReader(file))
    return Counter({choice: count for choice, count in choices.items() if choice not in ("", NO_VOTE)})


def compare(results: dict[str, Any], expected: Counter[str]) -> bool:
    """Prints both counts of every option; returns whether all of them, and the totals, are equal."""
    counted = Counter({option["option_id"]: option["count"] for option in results["counts"]})
    choices = sorted(expected.keys() | counted.keys(), key=lambda choice: (-expected[choice], choice))
    rows = [(choice, counted[choice], expected[choice]) for choice in choices]
    total = ("total", int(results["total_votes"]), expected.total())
    table = Table("option", title=f"{TITLE} ({results['state'].removeprefix('POLL_STATE_')})")
    for heading in ("counted by Tally", "in the file", "agrees"):
        table.add_column(heading, justify="right")
    for name, ours, theirs in [*rows, total]:
        table.add_row(name, f"{ours:,}", f"{theirs:,}", "yes" if ours == theirs else "NO")
    console.print(table)
    return counted.keys() == expected.keys() and all(ours == theirs for _, ours, theirs in [*rows, total])


if __name__ == "__main__":
    sys.exit(main())
