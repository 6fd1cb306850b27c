"""Settings from the environment: each service declares the ones it reads, all with the prefix TALLY_."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qs, parse_qsl, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "TALLY_"
# Parameters of a Postgres URL, and what they may be.
_CHOICES = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "target_session_attrs": ("any", "primary", "standby", "read-write", "read-only", "prefer-standby"),
}
_CERTIFICATES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")


def _only_if(can_work: Callable[[str], bool], shape: str) -> AfterValidator:
    """Refuses what can never work, at the start: later it would look like a server that is away, and be tried for ever.
    The message quotes nothing of an address, for any part of it may be a password."""

    def check(value: str) -> str:
        if not can_work(value):
            raise PydanticCustomError("address", "Input should be {shape}", {"shape": shape})
        return value

    return AfterValidator(check)


def _leads_somewhere(url: str, *schemes: str) -> bool:
    """Whether it has one of the schemes, and each of its servers a port that exists, or the default one."""
    try:
        parts = urlsplit(url)
        servers = [urlsplit(f"//{server}") for server in parts.netloc.rpartition("@")[2].split(",")]
        return parts.scheme in schemes and all(server.port != 0 for server in servers)
    except ValueError:
        return False


def _is_postgres(url: str) -> bool:
    if not _leads_somewhere(url, "postgresql", "postgres"):
        return False
    given = parse_qs(urlsplit(url).query)
    return all(value in allowed for name, allowed in _CHOICES.items() for value in given.get(name, []))


def _has_certificates(url: str) -> bool:
    """Whether the files are there that a Postgres URL needs: those that it names, and the root certificate that its
    server is verified with, which libpq has looked for in the same places."""
    given = {name: values[-1] for name, values in parse_qs(urlsplit(url).query).items()}
    named = [given[name] for name in _CERTIFICATES if given.get(name)]
    if given.get("sslmode", "").startswith("verify-") and "sslrootcert" not in given:
        named.append(os.environ.get("PGSSLROOTCERT") or str(Path.home() / ".postgresql" / "root.crt"))
    return all(Path(file).is_file() for file in named)


def _is_writable(path: str) -> bool:
    return not path or (Path(path).parent.is_dir() and not Path(path).is_dir())


def _is_redis(url: str) -> bool:
    if not _leads_somewhere(url, "redis", "rediss", "unix"):
        return False
    parts = urlsplit(url)
    # What is stored are bytes: a driver that makes text of them cannot read it.
    if {"decode_responses", "encoding"} & parse_qs(parts.query).keys():
        return False
    if parts.scheme != "unix" and parts.path.strip("/") and not parts.path.strip("/").isdecimal():
        # The driver would take the database 0.
        return False
    # Only where there is such a setting: the driver takes a tenth of a second to load.
    from redis.asyncio import ConnectionPool  # noqa: PLC0415
    from redis.exceptions import RedisError  # noqa: PLC0415

    try:
        # As the driver reads it, without connecting: it knows which parameters there are.
        ConnectionPool.from_url(url).make_connection()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, RedisError):
        return False
    files = [value for name, value in parse_qsl(parts.query) if name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")]
    return all(Path(file).is_file() for file in files)


def _is_nats(urls: str) -> bool:
    servers = [server if "://" in server else f"nats://{server}" for server in urls.split(",")]
    return all(_leads_somewhere(url, "nats", "tls", "ws", "wss") and urlsplit(url).hostname for url in servers)


def _is_listen(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return bool(host) and port.isdecimal() and int(port) <= 65535


PostgresUrl = Annotated[
    str,
    _only_if(_is_postgres, "an address such as postgresql://user:password@host:5432/database"),
    _only_if(_has_certificates, "an address whose certificates (sslrootcert, sslcert, sslkey, sslcrl) are files"),
]
RedisUrl = Annotated[str, _only_if(_is_redis, "an address such as redis://host:6379/0")]
NatsUrl = Annotated[str, _only_if(_is_nats, "an address such as nats://host:4222, or several with commas between them")]
Listen = Annotated[str, _only_if(_is_listen, "host:port")]
ReadyFile = Annotated[str, _only_if(_is_writable, "a file in a folder that exists")]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(str.lower)]


class Settings(BaseSettings):
    """What all services understand. A field `log_level` is the variable TALLY_LOG_LEVEL."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True)

    log_level: LogLevel = Field("info", description="Least severity that is logged: debug, info, warning or error.")
    metrics_listen: Listen | None = Field(None, description="host:port of the Prometheus metrics over HTTP.")
    ready_file: ReadyFile = Field("", description="File that is written once the process is ready; empty: none.")

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
