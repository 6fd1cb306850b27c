"""Settings that can never work: one line that names the variable, instead of attempts without end."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from command_server.__main__ import CommandSettings
from projector.__main__ import RedisSettings
from query_server.__main__ import QuerySettings
from relay.__main__ import RelaySettings
from runtime import workers
from runtime.settings import ServerSettings, Settings

GOOD = {
    "TALLY_COMMAND_LISTEN": ("127.0.0.1:0", "[::1]:50051", "localhost:1"),
    "TALLY_LOG_LEVEL": ("debug", "WARNING", ""),
    "TALLY_METRICS_LISTEN": ("0.0.0.0:9100", ""),
    "TALLY_NATS_URL": ("nats://h:4222", "tls://u:p@h", "h:4222", "nats://a:1,nats://token@b:2", "nats://[::1]:1"),
    "TALLY_READY_FILE": ("", "ready", "/tmp/ready"),
    "TALLY_REDIS_URL": ("redis://h:6379/0", "rediss://:p@h", "unix:///run/redis.sock?db=1", "redis://h/"),
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
    "TALLY_REDIS_URL": (
        "h:6379",
        "redis://h:99999",
        "http://h",
        "redis://:s3cret/@h",
        "redis://:s3cret@h?decode_responses=True",
        "redis://h?encoding=s3cret",
        "redis://:s3cret@h/live",
        "redis://:s3cret@h/0?db=live",
        "redis://:s3cret@h/0?nonsense=1",
        "redis://h?socket_timeout=soon",
        "rediss://h?ssl_cert_reqs=perhaps",
        "rediss://h?ssl_ca_certs=/no/such/file",
    ),
    "TALLY_SHARDS": ("0", "1025", "two", "1.5"),
    "TALLY_VOTER_SECRET": ("", "s3cret", "s3cret" * 20),
    "TALLY_WORKERS": ("0", "257", "-1", "many"),
    "TALLY_WORKER": ("perhaps",),
    "TALLY_MAX_CONNECTION_AGE": ("0", "-1", "nan", "inf", "soon"),
    "TALLY_QUERY_LISTEN": ("nonsense", "h:-1"),
    "TALLY_READ_DSN": ("", "redis://h"),
    "TALLY_WRITE_DSN": (
        "mysql://h/d",
        "postgresql://a:1,b:99999/d",
        "postgresql://u:s3cret/@h/d",
        "postgresql://[::1/d",
        "postgresql://u:s3cret@h/d?sslmode=foo",
        "postgresql://u:s3cret@h/d?target_session_attrs=nearest",
        "postgresql://u:s3cret@h/d?sslmode=verify-full",
        "postgresql://u:s3cret@h/d?sslmode=verify-ca&sslrootcert=/no/such/file",
        "postgresql://u:s3cret@h/d?sslcert=/tmp&sslkey=/tmp",
        "postgresql://u:s3cret@h/d?sslcrl=/no/such/file",
    ),
}
KINDS: dict[str, type[Settings]] = {
    "TALLY_NATS_URL": RelaySettings,
    "TALLY_REDIS_URL": RedisSettings,
    "TALLY_SHARDS": RelaySettings,
    "TALLY_MAX_CONNECTION_AGE": QuerySettings,
    "TALLY_QUERY_LISTEN": QuerySettings,
    "TALLY_READ_DSN": QuerySettings,
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TALLY_VOTER_SECRET", "v" * 32)
    monkeypatch.setenv("TALLY_READ_DSN", "postgresql://h/d")
    # Where libpq looks for certificates.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PGSSLROOTCERT", raising=False)
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


def test_certificates_that_are_there_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".postgresql").mkdir()
    (tmp_path / ".postgresql" / "root.crt").touch()
    monkeypatch.setenv("TALLY_WRITE_DSN", "postgresql://h/d?sslmode=verify-full")
    CommandSettings.from_environment()
    monkeypatch.setenv("TALLY_WRITE_DSN", f"postgresql://h/d?sslrootcert={tmp_path}/.postgresql/root.crt")
    CommandSettings.from_environment()


@pytest.mark.parametrize("arguments", [("--workers", "many"), ("--workers",), ("--nonsense",), ("--workers", "0")])
@pytest.mark.parametrize("settings", [CommandSettings, QuerySettings])
def test_a_wrong_argument_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], settings: type[ServerSettings], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        workers.settings_from(arguments, "a_server", settings)
    [line] = capsys.readouterr().err.splitlines()
    assert "workers" in line.lower() or "--nonsense" in line
