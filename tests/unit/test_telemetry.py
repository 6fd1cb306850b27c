"""Every line of the log is one JSON object, of whatever library; and one that cannot be written harms nothing."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.log_output import LogOutput

PROGRAM = """
import logging, warnings
import structlog
from runtime import telemetry
from runtime.settings import Settings

telemetry.start("test", Settings(log_level="info"))
structlog.get_logger().info("ours", number=1)
logging.getLogger("asyncio").error("theirs: %s", 'with "quotes"')
logging.getLogger("nats").info("too quiet")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("grpc").exception("with a trace")
warnings.warn("old")
raise ValueError("nobody expected this")
"""


def test_every_line_is_an_object_of_one_shape() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], check=False, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 1
    ours, theirs, trace, warning, end = map(json.loads, ended.stderr.splitlines())
    for line, level in ((ours, "info"), (theirs, "error"), (trace, "error"), (warning, "warning"), (end, "critical")):
        assert line.keys() >= {"event", "level", "service", "timestamp"}
        assert (line["level"], line["service"]) == (level, "test")
    assert (ours["event"], ours["number"]) == ("ours", 1)
    assert (theirs["event"], theirs["logger"]) == ('theirs: with "quotes"', "asyncio")
    assert "ZeroDivisionError" in trace["exception"]
    assert "old" in warning["event"]
    assert (end["error"], "Traceback" in end["exception"]) == ("ValueError('nobody expected this')", True)


LOSING = """
import os, sys
import structlog
from prometheus_client import generate_latest
from runtime import telemetry
from runtime.settings import Settings

class Unspeakable:
    def __repr__(self):
        raise ValueError("no repr")

telemetry.start("test", Settings(log_level="info"))
log = structlog.get_logger()
log.info("first")
BREAK
for number in range(LINES):
    log.error("lost", number=number, text="x" * 500)
import logging
logging.getLogger("asyncio").error("%d", "not a number")
log.info("unspeakable", value=Unspeakable())
print(next(line for line in generate_latest().decode().splitlines() if line.startswith("tally_log_lost_lines_total")))
"""


@pytest.mark.parametrize(
    ("break_it", "lines"),
    [
        ("os.dup2(os.open('/dev/full', os.O_WRONLY), 2)", 3),
        ("read, write = os.pipe(); os.dup2(write, 2); os.close(write); os.close(read)", 3),
        ("os.close(2)", 3),
        # A pipe that is not read: it takes the first 64 KiB, and no line after that waits.
        ("pipe = os.pipe(); os.dup2(pipe[1], 2)", 100_000),
    ],
    ids=["full disk", "no reader", "closed", "stuck reader"],
)
def test_lines_that_cannot_be_written_are_counted_and_harm_nothing(break_it: str, lines: int) -> None:
    program = LOSING.replace("BREAK", break_it).replace("LINES", str(lines))
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0
    assert json.loads(ended.stderr)["event"] == "first"
    lost = float(ended.stdout.split()[1])
    taken = 200 if lines > 3 else 0
    assert lines + 2 - taken <= lost <= lines + 2


def test_a_process_without_stderr_logs_nothing_into_another_file(tmp_path: Path) -> None:
    program = LOSING.replace("BREAK", "").replace("LINES", "3")
    ended = subprocess.run(
        ["/bin/sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, program],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        timeout=30,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert ended.returncode == 0
    assert ended.stdout == "tally_log_lost_lines_total 6.0\n"


def test_a_line_that_was_cut_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    output = LogOutput(descriptor)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))
    try:
        output.write("a line that is cut\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    output.write("a whole one\n")
    output.write("another one\n")
    os.close(descriptor)
    assert path.read_text() == "a lin\na whole one\nanother one\n"
