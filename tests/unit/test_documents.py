"""The documents agree with each other, with the files that they name, and with the version."""

import re
import tomllib
from importlib.metadata import version as installed_version
from pathlib import Path

import pytest

from contracts.read_models import READ_MODELS
from tools.check_subject import fault

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", ".github/**/*.md", "docs/**/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
    if "node_modules" not in path.parts
)
ARCHITECTURE = ROOT / "docs/architecture.md"
ADRS = sorted((ROOT / "docs/adr").glob("[0-9]*.md"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
_CODE = re.compile(r"^(```+).*?^\1$|``[^`]+``|`[^`\n]+`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
# What Tally's own files are called in code and documents.
_PATH = re.compile(r"`((?:[\w.-]+/)+(?:[\w.-]+\.\w+)?)`")


def links(document: Path) -> list[str]:
    """The targets of a document's links, without those in its code."""
    return _LINK.findall(_CODE.sub("", (ROOT / document).read_text()))


def anchors(document: Path) -> set[str]:
    """The names that a document's headings have as targets of links."""
    headings = re.findall(r"^#+ (.+)$", _fenced(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _fenced(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_to_files_and_headings_that_exist(document: Path) -> None:
    for link in links(document):
        if re.match(r"https?:|mailto:", link):
            continue
        file, _, heading = link.partition("#")
        target = (ROOT / document).parent / file if file else ROOT / document
        assert target.resolve().is_relative_to(ROOT), link
        assert target.exists(), link
        if heading:
            assert heading in anchors(target), link


def test_links_are_found() -> None:
    assert sum(len(links(document)) for document in DOCUMENTS) > 50


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_targets_of_make_that_it_names_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z/-]+)", (ROOT / document).read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_index_lists_every_decision_with_its_title_and_status() -> None:
    rows = re.findall(
        r"^\| (\d+) \| \[(.+)\]\((.+)\) \| (\w+) \|$", (ADRS[0].parent / "README.md").read_text(), re.MULTILINE
    )
    decisions = []
    for path in ADRS:
        number, title = re.match(r"# (\d+)\. (.+)\n", path.read_text()).groups()  # type: ignore[union-attr]
        [status] = re.findall(r"^\*\*Status:\*\* (\w+)", path.read_text(), re.MULTILINE)
        assert path.name.startswith(f"{int(number):04}-")
        decisions.append((number, title, path.name, status))
    assert rows == decisions
    assert [int(number) for number, *_ in rows] == list(range(1, len(ADRS) + 1))


def test_decisions_that_code_and_documents_name_exist() -> None:
    numbers = {int(path.name[:4]) for path in ADRS}
    packages = [ROOT / package for package in PYPROJECT["tool"]["setuptools"]["packages"] if "." not in package]
    files = [ROOT / document for document in DOCUMENTS] + [
        file for package in packages for file in package.rglob("*.py")
    ]
    named = {
        (int(number), file) for file in files for number in re.findall(r"(?:docs/adr/|\bADR )(\d+)\b", file.read_text())
    }
    assert len(named) > 20
    assert {(number, str(file)) for number, file in named if number not in numbers} == set()


def test_the_architecture_names_files_that_exist_and_every_package() -> None:
    text = ARCHITECTURE.read_text()
    paths = _PATH.findall(text)
    assert len(paths) > 30
    assert [path for path in paths if not ((ROOT / path).exists() or (ROOT / "protos" / path).exists())] == []
    packages = {package for package in PYPROJECT["tool"]["setuptools"]["packages"] if "." not in package}
    assert {package for package in packages if f"| `{package}/` |" not in text} == set()


def test_the_architecture_names_every_process_and_read_model() -> None:
    text = ARCHITECTURE.read_text()
    started = {f"python -m {package.parent.name}" for package in ROOT.glob("*/__main__.py")} - {"python -m benchmarks"}
    started.remove("python -m projector")
    started |= {f"python -m projector {name}" for name in READ_MODELS}
    assert set(re.findall(r"`(python -m [\w ]+)`", text)) == started


def test_one_version_everywhere() -> None:
    version = (ROOT / "gen/VERSION").read_text().strip()
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version)
    assert installed_version("tally-voting") == version
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    releases = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d", heading) for heading in headings[1:]]
    assert releases[0]
    assert releases[0][1] == version
    assert all(releases)


def test_the_changelog_has_the_sections_of_its_format() -> None:
    sections = set(re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE))
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize(
    "message",
    [
        "relay: keep order after a reconnect\n",
        "tally up: run Valkey 9.1\n\nwhy\n# a comment of git\n",
        "# a comment\nimport, register: say what a file holds\n",
        "Merge branch 'x'",
        'Revert "relay: keep order"',
        "fixup! relay: keep order",
    ],
)
def test_subjects_that_are_accepted(message: str) -> None:
    assert fault(message) == ""


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("fmt\n", "scope"),
        ("", "scope"),
        ("Relay: keep order\n", "scope"),
        ("relay:keep order\n", "scope"),
        ("relay: keep order.\n", "full stop"),
        (f"relay: {'x' * 66}\n", "73 characters"),
        ("relay: keep order\nwhy\n", "empty line"),
    ],
)
def test_subjects_that_are_refused(message: str, words: str) -> None:
    assert words in fault(message)
