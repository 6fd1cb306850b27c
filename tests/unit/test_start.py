"""How much `tally` imports before it does something: help and completion cost little, and load no command."""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.main import get_command

from clients import cli
from clients.cli import app
from clients.deferred import CommandGroup

RUN = "import sys; sys.argv[0] = 'tally'; from clients.cli import main; main()"
# Says on stderr what was imported, however the command ends.
RUN_AND_TELL = f"import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); {RUN}"
# The modules of commands that use stores themselves.
STORE_COMMANDS = {f"clients.{name}" for name in ("archiving", "dead_letters", "migrating", "rebuilding", "up")}
# The help of commands promises to come within this much processor time, in seconds; that of a group reads its options.
HELP_SECONDS, GROUP_HELP_SECONDS = 0.3, 0.6
STORES = {"asyncpg", "nats", "redis", "structlog", "psutil"}
HEAVY = STORES | {"asyncio", "grpc", "google", "tally", "rich", "openpyxl"}
GROUPS = [
    group
    for group in vars(cli).values()
    if isinstance(group, type) and issubclass(group, CommandGroup) and group is not CommandGroup
]


def imported(*arguments: str, **variables: str) -> tuple[str, set[str]]:
    """What a `tally` prints, and the packages that it imported."""
    told = subprocess.run(
        [sys.executable, "-c", RUN_AND_TELL, *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return told.stdout, {name.partition(".")[0] for name in told.stderr.split()}


def loaded(*modules: str) -> set[str]:
    """The packages that are imported with these modules."""
    program = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return {name.partition(".")[0] for name in told.stdout.split()}


def seconds_of(*arguments: str) -> float:
    """The processor time of a `tally`: of user and system together."""
    before = os.times()
    subprocess.run([sys.executable, "-c", RUN, *arguments], stdout=subprocess.DEVNULL, timeout=60, check=True)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


@pytest.mark.parametrize("arguments", [["--help"], ["poll", "--help"], ["dead-letters", "--help"]])
def test_help_loads_no_command_and_takes_little_time(arguments: list[str]) -> None:
    printed, packages = imported(*arguments)
    assert "Show this message and exit." in printed
    assert packages & HEAVY == set()
    # The least of some tries: what else the machine does only adds to it.
    seconds = GROUP_HELP_SECONDS if len(arguments) > 1 else HELP_SECONDS
    assert any(seconds_of(*arguments) < seconds for _ in range(10))


def test_help_tells_every_command_in_full() -> None:
    for group, name in (
        (cli.TallyCommands, ()),
        (cli.PollCommands, ("poll",)),
        (cli.DeadLetterCommands, ("dead-letters",)),
    ):
        printed = " ".join(imported(*name, "--help", COLUMNS="60")[0].split())
        for command, (_, summary) in group.deferred.items():
            assert f"{command} {summary}" in printed


@pytest.mark.parametrize("group", GROUPS)
def test_a_summary_is_what_the_command_says_of_itself(group: type[CommandGroup]) -> None:
    for target, summary in group.deferred.values():
        module, function = target.split(":")
        spec = find_spec(module)
        assert spec
        assert spec.origin
        [definition] = [
            node
            for node in ast.parse(Path(spec.origin).read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name == function
        ]
        told = ast.get_docstring(definition) or ""
        assert " ".join(told.partition("\n\n")[0].split()) == summary


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("po", {"poll"}),
        ("poll ver", {"verify-archive"}),
        ("dead-letters re", {"replay"}),
        ("poll create --allow", {"--allow-vote-change"}),
        ("results --out", {"--output"}),
    ],
)
def test_completion(typed: str, offered: set[str]) -> None:
    words = f"tally {typed}"
    printed, packages = imported(
        _TALLY_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split()) - 1)
    )
    assert set(printed.split()) == offered
    assert ("grpc" in packages) == ("--" in typed)


def test_what_only_calls_the_servers_loads_no_driver_of_a_store() -> None:
    targets = [target for group in GROUPS for target, _ in group.deferred.values()]
    modules = {target.partition(":")[0] for target in targets} - STORE_COMMANDS
    packages = loaded(*modules)
    assert {"grpc", "tally"} <= packages
    assert packages & STORES == set()
    # What says so would see one.
    assert "asyncpg" in loaded(*STORE_COMMANDS)


def test_every_command_can_be_loaded() -> None:
    for group in GROUPS:
        for name in group.deferred:
            assert group.load(name).name == name
    assert "poll" in get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("service", "needless"),
    [
        ("command_server", {"clients", "nats", "redis", "typer"}),
        ("query_server", {"clients", "nats", "typer"}),
        ("relay", {"clients", "redis", "typer"}),
        ("projector", {"clients", "typer"}),
    ],
)
def test_a_service_loads_no_driver_of_a_store_that_it_does_not_use(service: str, needless: set[str]) -> None:
    packages = loaded(f"{service}.__main__")
    assert "asyncpg" in packages
    assert packages & needless == set()
