"""Builds what a release publishes, wheel and sdist, and counts votes with each in an empty environment.

    python -m tools.check_release

The sdist is unpacked into an empty folder and must give a wheel with the same files as the checkout does. Leaves the
wheel of this Python and the sdist in dist/. Ends with an AssertionError or CalledProcessError where that fails.
"""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from tools.check_wheel import ROOT, build, check, copied

DIST = ROOT / "dist"
# What a packager or an auditor needs of an sdist beside the program.
_NEEDED = (
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "pyproject.toml",
    "requirements.lock",
    "Makefile",
    "gen/VERSION",
)
_FOLDERS = ("protos/tally", "gen/tally", "tests/unit", "docs/adr", "migrations/write", "examples")


def build_sdist(folder: Path) -> Path:
    """The sdist of a copy of the checkout."""
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    with copied(ROOT) as copy:
        command = [sys.executable, "-W", "ignore", "-c", code, str(folder)]
        subprocess.run(command, cwd=copy, check=True, stdout=subprocess.DEVNULL)
    [built] = folder.glob("*.tar.gz")
    return built


def contents(wheel: Path) -> dict[str, int]:
    """The files of a wheel with their checksums, without those that differ from build to build."""
    return {
        each.filename: each.CRC
        for each in zipfile.ZipFile(wheel).infolist()
        if not each.filename.endswith((".so", "/RECORD"))
    }


def check_contents(wheel: Path, version: str) -> None:
    """The wheel is of this version and has its license."""
    with zipfile.ZipFile(wheel) as archive:
        [info] = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
        assert f"\nVersion: {version}\n" in metadata, metadata[:500]
        assert "\nLicense-Expression: Apache-2.0\n" in metadata, metadata[:500]
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def main() -> None:
    version = (ROOT / "gen/VERSION").read_text().strip()
    with tempfile.TemporaryDirectory(prefix="tally-release-") as folder:
        here = Path(folder)
        sdist = build_sdist(here)
        with tarfile.open(sdist) as archive:
            archive.extractall(here / "sdist", filter="data")
        [source] = (here / "sdist").iterdir()
        assert source.name == f"tally_voting-{version}", source.name
        missing = [name for name in (*_NEEDED, *_FOLDERS) if not (source / name).exists()]
        assert not missing, f"the sdist lacks {missing}"
        wheel = build(sys.executable, ROOT, here / "wheel", "cc")
        rebuilt = build(sys.executable, source, here / "rebuilt", "cc")
        differing = sorted(name for name, _ in contents(wheel).items() ^ contents(rebuilt).items())
        assert not differing, f"the wheel of the sdist differs from that of the checkout: {differing}"
        check_contents(wheel, version)
        for name, built in (("wheel", wheel), ("sdist", rebuilt)):
            check(sys.executable, built, here / f"with-{name}", compiled=True)
        DIST.mkdir(exist_ok=True)
        for archive_ in (wheel, sdist):
            (DIST / archive_.name).write_bytes(archive_.read_bytes())
            print(f"dist/{archive_.name}")


if __name__ == "__main__":
    main()
