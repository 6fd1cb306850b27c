"""Installs Tally as a wheel outside the checkout, and counts votes with it.

    python tools/check_wheel.py [PYTHON ...]

For each Python: a new virtual environment, the wheel with the dependencies that it names, `tally up` in an empty
folder, a poll, votes, the results. Without arguments it takes one other Python than this one, of 3.11 to 3.14, from
PATH or pyenv; where there is none, it fails, because nothing was shown.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.14", "3.13", "3.12", "3.11")
_START_SECONDS = 120.0
_COMMAND_SECONDS = 60.0


def others() -> list[str]:
    """One Python of another version than this one."""
    places = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in VERSIONS:
        if platform.python_version().startswith(f"{version}."):
            continue
        found = [place / f"python{version}" for place in places]
        found += sorted(pyenv.glob(f"{version}.*/bin/python"))
        for python in found:
            if python.exists() and _version(str(python)).startswith(f"{version}."):
                return [str(python)]
    sys.exit(f"there is no other Python of {', '.join(VERSIONS)} to try the wheel with: install one, or name it")


def _version(python: str) -> str:
    command = [python, "-c", "import platform; print(platform.python_version())"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_COMMAND_SECONDS).stdout.strip()


def check(python: str, wheel: Path) -> None:
    """Raises CalledProcessError, TimeoutExpired or AssertionError where something does not work."""
    version = _version(python)
    with tempfile.TemporaryDirectory(prefix="tally-wheel-") as folder:
        here = Path(folder)
        subprocess.run([python, "-m", "venv", str(here / "venv")], check=True)
        binaries = here / "venv" / "bin"
        pip = [str(binaries / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, str(wheel)], check=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("TALLY_", "PYTHON"))}
        environment |= {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "HOME": folder}

        def tally(*arguments: str) -> str:
            command = [str(binaries / "tally"), *arguments]
            done = subprocess.run(
                command,
                cwd=here,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=_COMMAND_SECONDS,
            )
            assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
            return done.stdout

        said = tally("--version").strip()
        up = subprocess.Popen(
            [str(binaries / "tally"), "up", "--command-port", "0", "--query-port", "0"], cwd=here, env=environment
        )
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not (here / ".tally" / "run.json").exists():
                assert up.poll() is None, f"tally up ended with {up.returncode}"
                assert time.monotonic() < deadline, "tally up does not come up"
                time.sleep(0.1)
            options = ("--option", "pizza=Pizza", "--option", "soup=Soup")
            poll = json.loads(tally("poll", "create", "--title", "Lunch?", *options, "--open", "--output", "json"))
            poll_id = poll["poll_id"]
            for voter, option in (("ada", "pizza"), ("bob", "pizza"), ("eve", "soup")):
                cast = json.loads(tally("vote", poll_id, voter, option, "--output", "json"))
            token = cast["consistency_token"]
            shown = json.loads(tally("results", poll_id, "--at-least-as-fresh", token, "--output", "json"))
            counts = {count["option_id"]: count["count"] for count in shown["results"]["counts"]}
            assert counts == {"pizza": 2, "soup": 1}, counts
        finally:
            up.send_signal(signal.SIGTERM)
            up.wait(_COMMAND_SECONDS)
        print(f"Python {version}: {said} works from {wheel.name}, outside the checkout")


def main() -> None:
    """Builds the wheel and checks it with each Python."""
    pythons = sys.argv[1:] or others()
    with tempfile.TemporaryDirectory(prefix="tally-build-") as folder:
        for python in pythons:
            # For each of its own: the compiled module is for one version.
            target = Path(folder) / _version(python)
            build = [python, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*build, "--wheel-dir", str(target), str(ROOT)], check=True)
            [wheel] = target.glob("*.whl")
            check(python, wheel)


if __name__ == "__main__":
    main()
