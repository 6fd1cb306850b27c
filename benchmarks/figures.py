"""What a benchmark reports: a value beside its baseline, from rounds that take turns."""

import json
import platform
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

Measure = Callable[[], Awaitable[float]]


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
    rounds: int

    @property
    def kept(self) -> bool:
        """Whether the ratio is within its bound."""
        return self.bound is None or (self.ratio <= self.bound if self.at_most else self.ratio >= self.bound)

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))


async def compare(
    name: str,
    measure: Measure,
    baseline: Measure,
    *,
    unit: str,
    baseline_name: str,
    rounds: int,
    bound: float | None = None,
    at_most: bool = False,
) -> Figure:
    """Measures both sides in turn, `rounds` times; which one goes first changes each time."""
    values, limits = [], []
    for number in range(rounds):
        if number % 2:
            limits.append(await baseline())
            values.append(await measure())
        else:
            values.append(await measure())
            limits.append(await baseline())
    ratios = [value / limit for value, limit in zip(values, limits, strict=True)]
    return Figure(
        name,
        statistics.median(values),
        unit,
        statistics.median(limits),
        baseline_name,
        statistics.median(ratios),
        (min(ratios), max(ratios)),
        bound,
        at_most,
        rounds,
    )


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
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
