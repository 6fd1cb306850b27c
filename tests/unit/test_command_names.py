"""What the command line tells of a refusal names its own commands, not the RPCs behind them."""

import re

from tally.command.v1 import command_service_pb2
from tally.query.v1 import query_service_pb2
from typer.main import get_command

from clients.cli import app
from clients.connection import _COMMANDS
from clients.deferred import CommandGroup


def test_every_rpc_has_a_command() -> None:
    services = [
        command_service_pb2.DESCRIPTOR.services_by_name["CommandService"],
        query_service_pb2.DESCRIPTOR.services_by_name["QueryService"],
    ]
    assert _COMMANDS.keys() == {method.name for service in services for method in service.methods}


def test_the_commands_exist_and_no_help_names_an_rpc() -> None:
    def helps(command: object, path: str) -> dict[str, str]:
        found = {path: str(getattr(command, "help", "") or "")}
        found[path] += " ".join(str(getattr(option, "help", "") or "") for option in getattr(command, "params", []))
        for name, child in getattr(command, "commands", {}).items():
            loaded = command.load(name) if isinstance(command, CommandGroup) and name in command.deferred else child
            found |= helps(loaded, f"{path} {name}")
        return found

    commands = helps(get_command(app), "tally")
    assert set(_COMMANDS.values()) <= commands.keys()
    rpc = re.compile(rf"\b({'|'.join(_COMMANDS)})\b")
    assert [path for path, text in commands.items() if rpc.search(text)] == []
