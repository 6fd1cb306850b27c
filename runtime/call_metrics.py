"""How calls ended and how long they took, for Prometheus.

prometheus_client's own counters and histograms take locks and a walk over the buckets for each call, a tenth of what an
empty call costs. Here a call adds one to a number, and everything else is done when somebody asks. That is safe without
a lock: calls end on the event loop only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric

# The upper bounds of the buckets, in seconds; what takes longer is in one more.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class CallTimes:
    """The calls of a unary method that were answered."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        """Notes an answer."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.seconds += seconds


class CallMetrics(Collector):
    """The calls of all methods; to be registered with a registry of prometheus_client."""

    def __init__(self) -> None:
        self._ended = Counter[tuple[str, str]]()
        self._times: dict[str, CallTimes] = {}

    def ended(self, method: str, code: str) -> None:
        """Notes the end of a call, unless its time was noted."""
        self._ended[method, code] += 1

    def times(self, method: str) -> CallTimes:
        """Where the answers of a unary method are noted, with the time that they took: these calls ended with OK."""
        return self._times.setdefault(method, CallTimes())

    def collect(self) -> Iterator[Metric]:
        times, ended = list(self._times.items()), Counter(dict(self._ended))
        seconds = HistogramMetricFamily(
            "grpc_server_handling_seconds", "Time to answer a unary call.", labels=["method"]
        )
        for method, answered in times:
            counts = list(answered.counts)
            bounds = [*map(str, BUCKETS), "+Inf"]
            seconds.add_metric([method], list(zip(bounds, accumulate(counts), strict=True)), answered.seconds)
            ended[method, "OK"] += sum(counts)
        handled = CounterMetricFamily("grpc_server_handled", "Calls by method and outcome.", labels=["method", "code"])
        for (method, code), calls in sorted(ended.items()):
            handled.add_metric([method, code], calls)
        yield seconds
        yield handled
