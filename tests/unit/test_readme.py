"""The README keeps up with the code."""

from pathlib import Path

import pytest

from command_server.__main__ import CommandSettings
from projector import __main__ as projector
from query_server.__main__ import QuerySettings
from relay.__main__ import RelaySettings
from runtime.settings import Settings

README = Path("README.md").read_text()
# What a parent tells its workers is nobody else's business.
INTERNAL = {"worker"}


@pytest.mark.parametrize("settings", [CommandSettings, QuerySettings, RelaySettings, *projector.SETTINGS.values()])
def test_every_setting_is_in_the_table(settings: type[Settings]) -> None:
    for name in settings.model_fields.keys() - INTERNAL:
        assert f"`TALLY_{name.upper()}`" in README, name


def test_the_services_and_targets_that_it_names_exist() -> None:
    makefile = Path("Makefile").read_text()
    for line in README.splitlines():
        if line.startswith("make "):
            assert f"\n{line.split()[1]}:" in makefile
        if line.startswith("python -m "):
            assert Path(line.split()[2], "__main__.py").exists()
