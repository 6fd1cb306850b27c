"""What a benchmark reports: a value beside its baseline, from rounds that take turns."""

import json
import platform
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil

T = TypeVar("T")
Measure = Callable[[], Awaitable[T]]


class Effort(NamedTuple):
    """How much a run does."""

    # How often each side of a ratio is measured.
    rounds: int
    # Votes of one measurement of a stream.
    votes: int
    # Length of one measurement of calls.
    seconds: float
    # Votes that a poll has had when it is called big.
    big_poll: int
    # How many watch a poll in a crowd.
    watchers: int
    # How many polls are called many.
    many_polls: tuple[int, ...]


@dataclass(frozen=True)
class Figure:
    """Medians over the rounds; `ratio` is the median of the rounds' own ratios, `spread` their least and greatest."""

    name: str
    value: float
    unit: str
    baseline: float
    baseline_name: str
    ratio: float
    spread: tuple[float, float]
    # What the ratio must be at least (or, where less is better, at most), if somebody asked for something.
    bound: float | None
    at_most: bool
    # What each round measured.
    values: Sequence[float]
    baselines: Sequence[float]

    @property
    def kept(self) -> bool:
        """Whether the ratio is within its bound."""
        return self.bound is None or (self.ratio <= self.bound if self.at_most else self.ratio >= self.bound)

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps({**asdict(self), "kept": self.kept})


def figure(
    name: str,
    values: Sequence[float],
    baselines: Sequence[float],
    *,
    unit: str,
    baseline_name: str,
    bound: float | None = None,
    at_most: bool = False,
) -> Figure:
    """A figure from what each round measured on both sides."""
    ratios = [value / baseline for value, baseline in zip(values, baselines, strict=True)]
    return Figure(
        name,
        statistics.median(values),
        unit,
        statistics.median(baselines),
        baseline_name,
        statistics.median(ratios),
        (min(ratios), max(ratios)),
        bound,
        at_most,
        values,
        baselines,
    )


async def take_turns(rounds: int, *measures: Measure[T]) -> list[list[T]]:
    """What each measure returned in each round. Another one goes first each time: none profits from its place."""
    results: list[list[T]] = [[] for _ in measures]
    for number in range(rounds):
        for place in range(len(measures)):
            index = (number + place) % len(measures)
            results[index].append(await measures[index]())
    return results


def cpu_seconds(pid: int) -> float:
    """The processor time of a process and of all that it started, from their beginning."""
    process = psutil.Process(pid)
    own = process.cpu_times()
    # Children that have ended are in their parent's account.
    total = float(own.user + own.system + own.children_user + own.children_system)
    for child in process.children():
        try:
            total += cpu_seconds(child.pid)
        except psutil.NoSuchProcess:
            continue
    return total


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    model = next(
        (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return {
        "name": "machine",
        "cpu": model,
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_before": round(psutil.getloadavg()[0], 1),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
