"""Logs as JSON lines on stderr, and metrics for Prometheus. To log something never raises."""

import io
import logging
import sys
from types import TracebackType
from typing import Any

import structlog
from prometheus_client import start_http_server

from runtime.log_output import LogOutput, lost_lines
from runtime.settings import Settings

log = structlog.get_logger()


def start(service: str, settings: Settings, *, metrics: bool = True) -> None:
    """Sets up logging for this process and serves its metrics where the settings ask for it."""
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    to_event: list[structlog.typing.Processor] = [
        lambda _logger, _method, event: {**event, "service": service},
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    output = LogOutput(_descriptor(sys.stderr))
    structlog.configure(
        processors=[*to_event, structlog.processors.JSONRenderer()],
        wrapper_class=_harmless(structlog.make_filtering_bound_logger(level)),
        logger_factory=structlog.WriteLoggerFactory(output),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )
    libraries = _Libraries(output)
    libraries.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *to_event],
        )
    )
    logging.basicConfig(handlers=[libraries], level=max(level, logging.WARNING))
    logging.captureWarnings(True)
    sys.excepthook = _log_the_end
    if metrics and settings.metrics_listen:
        host, _, port = settings.metrics_listen.rpartition(":")
        try:
            start_http_server(int(port), host.strip("[]"))
        except OSError as error:
            sys.exit(f"metrics cannot be served on {settings.metrics_listen}: {error.strerror}")


class _Libraries(logging.StreamHandler[LogOutput]):
    """Writes what libraries log."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802
        lost_lines.inc()


def _harmless(logger: type[Any]) -> type[Any]:
    """The class of loggers, of which a call loses the line that it cannot make, such as one with a broken repr."""

    class Harmless(logger):  # type: ignore[misc]
        def _proxy_to_logger(self, *arguments: Any, **event: Any) -> Any:
            try:
                return super()._proxy_to_logger(*arguments, **event)
            except Exception:  # noqa: BLE001 - whatever it is, the caller has something else to do
                lost_lines.inc()

    return Harmless


def _descriptor(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (AttributeError, ValueError, io.UnsupportedOperation):
        # There is no stderr, or it is closed.
        return None


def _log_the_end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log.critical("ended by an error", error=repr(error), exc_info=(kind, error, trace))
