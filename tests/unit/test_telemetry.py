"""Every line of the log is one JSON object, whoever writes it."""

import json
import subprocess
import sys

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
