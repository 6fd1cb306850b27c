"""Installs Tally as a wheel outside the checkout, and counts votes with it.

    python tools/check_wheel.py [--all | PYTHON ...]

For each Python, two wheels: one built with a C compiler, and one without, which must count the same and say once
that it is slower. Each is installed with the dependencies that it names; then `tally up` in an empty folder, a
poll, votes, the results. Without arguments it takes one other Python than this one, of 3.11 to 3.14, from PATH or
pyenv, with --all the newest of each of these versions; where there is none, it fails, because nothing was shown.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.14", "3.13", "3.12", "3.11")
_NO_SOURCES = shutil.ignore_patterns(
    *(".git", ".venv", ".tally", ".*_cache", "__pycache__", "build", "dist", "node_modules", "*.so", "*.egg-info")
)
_START_SECONDS = 120.0
_COMMAND_SECONDS = 60.0


def found() -> list[str]:
    """A Python of each version that is on this machine, the newest version first."""
    places = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    pythons = []
    for version in VERSIONS:
        candidates = [*sorted(pyenv.glob(f"{version}.*/bin/python")), *(place / f"python{version}" for place in places)]
        fit = (str(each) for each in candidates if each.exists() and _version(str(each)).startswith(f"{version}."))
        pythons += [python for python in [next(fit, None)] if python]
    return pythons


def others() -> list[str]:
    """One Python of another version than this one."""
    this = platform.python_version().rpartition(".")[0]
    other = [python for python in found() if not _version(python).startswith(f"{this}.")]
    if not other:
        sys.exit(f"there is no other Python of {', '.join(VERSIONS)} to try the wheel with: install one, or name it")
    return other[:1]


def _version(python: str) -> str:
    command = [python, "-c", "import platform; print(platform.python_version())"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_COMMAND_SECONDS).stdout.strip()


@contextmanager
def copied(source: Path) -> Iterator[Path]:
    """A copy of the sources, so that nothing that an earlier build made gets into what is built of it."""
    with tempfile.TemporaryDirectory(prefix="tally-source-") as copy:
        shutil.copytree(source, copy, ignore=_NO_SOURCES, dirs_exist_ok=True)
        yield Path(copy)


def build(python: str, source: Path, folder: Path, compiler: str) -> Path:
    """The wheel that this Python builds of a copy of the sources, with this C compiler."""
    wheel = [python, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    with copied(source) as copy:
        command = [*wheel, "--wheel-dir", str(folder), str(copy)]
        subprocess.run(command, check=True, env=os.environ | {"CC": compiler})
    [built] = folder.glob("*.whl")
    return built


def environment_of(python: str, here: Path) -> Path:
    """The Python of the virtual environment `here`/venv, made if need be: not every Python has pip outside one."""
    inside = here / "venv" / "bin" / "python"
    if not inside.exists():
        subprocess.run([python, "-m", "venv", str(here / "venv")], check=True)
    return inside


def check(python: str, wheel: Path, here: Path, compiled: bool) -> None:
    """Installs the wheel into `here`/venv and votes; raises CalledProcessError, TimeoutExpired or AssertionError."""
    in_wheel = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert bool(in_wheel) == compiled, f"{wheel.name} has {in_wheel or 'nothing compiled'}"
    binaries = environment_of(python, here).parent
    pip = [str(binaries / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, str(wheel)], check=True)
    # Where another wheel of this version was installed before.
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(wheel)], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TALLY_", "PYTHON"))}
    environment |= {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "HOME": str(here)}
    data = here / ("compiled" if compiled else "python")

    def tally(*arguments: str) -> str:
        command = [str(binaries / "tally"), *arguments]
        command += ["--data-dir", str(data)] if arguments != ("--version",) else []
        done = subprocess.run(
            command, cwd=here, env=environment, capture_output=True, text=True, check=False, timeout=_COMMAND_SECONDS
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    said = tally("--version").strip()
    up = subprocess.Popen(
        [str(binaries / "tally"), "up", "--data-dir", str(data), "--command-port", "0", "--query-port", "0"],
        cwd=here,
        env=environment,
    )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not (data / "run.json").exists():
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
    [log] = data.rglob("command_server.log")
    warnings = log.read_text().count("was not compiled")
    assert warnings == (0 if compiled else 1), f"the log says {warnings} times that the C code was not compiled"
    how = "compiled" if compiled else "without a C compiler"
    print(f"Python {_version(str(binaries / 'python'))}: {said} works from {wheel.name}, {how}, outside the checkout")


def main() -> None:
    """Builds the wheels and checks them with each Python."""
    arguments = sys.argv[1:]
    pythons = found() if arguments == ["--all"] else arguments or others()
    for python in pythons:
        with tempfile.TemporaryDirectory(prefix="tally-wheel-") as folder:
            here = Path(folder)
            inside = str(environment_of(python, here))
            for compiled, compiler in ((True, "cc"), (False, "false")):
                wheel = build(inside, ROOT, here / compiler, compiler)
                check(python, wheel, here, compiled)


if __name__ == "__main__":
    main()
