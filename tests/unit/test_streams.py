"""Streams of the command line that are closed, full, or of another encoding: words, and never a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TALLY = f"{sys.executable} -m clients.cli"


def run(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        ["sh", "-c", command], check=False, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("redirection", "told"),
    [
        (">&-", "standard output is closed"),
        ("> /dev/full", "standard output cannot be written: No space left on device"),
    ],
)
def test_output_that_does_not_arrive_is_said(redirection: str, told: str) -> None:
    ended = run(f"{TALLY} --version {redirection}")
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", f"{told}\n")


def test_without_a_place_for_errors_the_exit_code_tells_them() -> None:
    assert run(f"{TALLY} results --nope 2>&-").returncode == 2
    assert run(f"{TALLY} --version 2>&-").stdout.startswith("tally ")


def test_a_closed_standard_input_is_said() -> None:
    ended = run(f"{TALLY} register 00000000-0000-0000-0000-000000000000 - --command-address x <&-")
    assert (ended.returncode, ended.stderr) == (1, "standard input is closed\n")


def test_csv_is_utf8_whatever_the_terminal_has(tmp_path: Path) -> None:
    program = r"from clients.output import print_csv; print_csv(['label'], [['Łódź'], ['\uff1d1+1'], ['-5'], ['  =2']])"
    path = tmp_path / "results.csv"
    for encoding in ("ascii", "latin-1", "utf-8"):
        ended = run(f'{sys.executable} -c "{program}" > {path}', PYTHONIOENCODING=encoding)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert path.read_text("utf-8") == "label\nŁódź\n'\uff1d1+1\n-5\n'  =2\n"
