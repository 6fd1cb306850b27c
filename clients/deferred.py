"""Commands that are imported when they are called, so that `tally --help` and completion load none of them."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

if TYPE_CHECKING:
    from typer._click import Command, Context


class DeferredCommand(TyperCommand):
    """A command as its group lists it: its name and the first paragraph of its help."""

    def get_short_help_str(self, limit: int = 0) -> str:  # noqa: ARG002
        # Whole: a line of a list is folded, not cut.
        return self.help or ""


class CommandGroup(TyperGroup):
    """A group of commands of which each is imported when it is called.

    A subclass names its commands, by how they are called: "module:function", and the first paragraph of the function's
    docstring.
    """

    deferred: ClassVar[Mapping[str, tuple[str, str]]]

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        listed = {name: DeferredCommand(name, help=summary) for name, (_, summary) in self.deferred.items()}
        self.commands = {**listed, **self.commands}

    def resolve_command(self, ctx: "Context", args: list[str]) -> "tuple[str | None, Command | None, list[str]]":
        name, command, rest = super().resolve_command(ctx, args)
        if name and name in self.deferred:
            command = self.load(name)
        return name, command, rest

    @classmethod
    def load(cls, name: str) -> "Command":
        """Imports a command."""
        module, _, function = cls.deferred[name][0].partition(":")
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name)(getattr(import_module(module), function))
        return get_command(app)

    def get_short_help_str(self, limit: int = 0) -> str:  # noqa: ARG002
        return self.help or ""
