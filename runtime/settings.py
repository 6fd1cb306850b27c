"""Settings from the environment: each service declares the ones it reads, all with the prefix TALLY_."""

import sys
from typing import Any, Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "TALLY_"


class Settings(BaseSettings):
    """What all services understand. A field `log_level` is the variable TALLY_LOG_LEVEL."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)

    log_level: str = Field("info", description="Least severity that is logged: debug, info, warning or error.")
    metrics_listen: str = Field("", description="host:port of the Prometheus metrics over HTTP; empty: none.")
    ready_file: str = Field("", description="File that is written once the process is ready; empty: none.")

    @classmethod
    def from_environment(cls, **given: Any) -> Self:
        """The settings, or an exit with one line for each variable that is missing or wrong. `given` goes first."""
        try:
            return cls(**given)
        except ValidationError as error:
            for problem in error.errors():
                variable = PREFIX + "_".join(str(part) for part in problem["loc"]).upper()
                print(f"{variable}: {problem['msg']}", file=sys.stderr)
            sys.exit(2)


class ServerSettings(Settings):
    """What the gRPC servers understand besides."""

    workers: int = Field(1, ge=1, le=256, description="Processes that serve on one port, also given as --workers.")
    worker: bool = Field(False, description="Set by the parent of several workers: the port is shared.")
