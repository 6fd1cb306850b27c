"""What Prometheus is told of calls is what prometheus_client itself would tell."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from runtime.call_metrics import BUCKETS, CallMetrics


def test_calls_are_told_as_by_a_counter_and_a_histogram() -> None:
    calls, ours = CallMetrics(), CollectorRegistry()
    ours.register(calls)
    theirs = CollectorRegistry()
    handled = Counter("grpc_server_handled", "Calls by method and outcome.", ["method", "code"], registry=theirs)
    histogram = Histogram(
        "grpc_server_handling_seconds", "Time to answer a unary call.", ["method"], buckets=BUCKETS, registry=theirs
    )
    for seconds in (0.0, 0.0004, 0.0005, 0.0006, 0.25, 9.9, 10.0, 10.1, 500.0):
        calls.times("/a").add(seconds)
        histogram.labels("/a").observe(seconds)
        handled.labels("/a", "OK").inc()
    for method, code in (("/a", "NOT_FOUND"), ("/b", "OK"), ("/b", "OK")):
        calls.ended(method, code)
        handled.labels(method, code).inc()
    assert told(ours) == told(theirs)


def told(registry: CollectorRegistry) -> set[str]:
    """The lines of samples, but for when the counting began."""
    lines = generate_latest(registry).decode().splitlines()
    return {line for line in lines if not line.startswith("#") and "_created" not in line}
