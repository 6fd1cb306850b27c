"""Settings that can never work: one line that names the variable, instead of attempts without end."""

import socket
import subprocess
import sys

import pytest

from command_server.__main__ import CommandSettings
from projector.__main__ import RedisSettings
from relay.__main__ import RelaySettings
from runtime.settings import Settings

GOOD = {
    "TALLY_COMMAND_LISTEN": ("127.0.0.1:0", "[::1]:50051", "localhost:1"),
    "TALLY_LOG_LEVEL": ("debug", "WARNING", ""),
    "TALLY_METRICS_LISTEN": ("0.0.0.0:9100", ""),
    "TALLY_NATS_URL": ("nats://h:4222", "tls://u:p@h", "h:4222", "nats://a:1,nats://token@b:2", "nats://[::1]:1"),
    "TALLY_READY_FILE": ("", "ready", "/tmp/ready"),
    "TALLY_REDIS_URL": ("redis://h:6379/0", "rediss://:p@h", "unix:///run/redis.sock"),
    "TALLY_WRITE_DSN": (
        "postgresql://u:p@h:5432/d",
        "postgres://u:p@ss@a:1,b:2/d",
        "postgresql:///d?host=/run&sslmode=prefer",
    ),
}
BAD = {
    "TALLY_COMMAND_LISTEN": ("nonsense", "h:1x", "127.0.0.1:99999", ":50051"),
    "TALLY_LOG_LEVEL": ("loud",),
    "TALLY_METRICS_LISTEN": ("9100", "h:port"),
    "TALLY_NATS_URL": ("", "nats://h:99999", "nats://h:s3cret", "http://h:1", "nats://", "nats://a:1,nats://b:99999"),
    "TALLY_READY_FILE": ("/no/such/folder/ready", "/tmp"),
    "TALLY_REDIS_URL": ("h:6379", "redis://h:99999", "http://h", "redis://:s3cret/@h"),
    "TALLY_WRITE_DSN": (
        "mysql://h/d",
        "postgresql://a:1,b:99999/d",
        "postgresql://u:s3cret/@h/d",
        "postgresql://[::1/d",
        "postgresql://u:s3cret@h/d?sslmode=foo",
    ),
}
KINDS: dict[str, type[Settings]] = {"TALLY_NATS_URL": RelaySettings, "TALLY_REDIS_URL": RedisSettings}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLY_VOTER_SECRET", "v" * 32)
    for variable, (value, *_) in GOOD.items():
        monkeypatch.setenv(variable, value)


@pytest.mark.parametrize(("variable", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_what_may_work_is_tried(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    KINDS.get(variable, CommandSettings).from_environment()


@pytest.mark.parametrize(("variable", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_what_can_never_work_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match="2"):
        KINDS.get(variable, CommandSettings).from_environment()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{variable}: ")
    assert "s3cret" not in line


@pytest.mark.parametrize(
    ("variable", "arguments"),
    [("TALLY_COMMAND_LISTEN", ()), ("TALLY_COMMAND_LISTEN", ("--workers", "2")), ("TALLY_METRICS_LISTEN", ())],
)
def test_a_port_that_is_taken_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, arguments: tuple[str, ...]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv(variable, address)
        command = [sys.executable, "-m", "command_server", *arguments]
        ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert address in ended.stderr.splitlines()[-1]
