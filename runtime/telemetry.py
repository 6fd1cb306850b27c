"""Logs as JSON lines on stderr, and metrics for Prometheus."""

import logging
import sys
from types import TracebackType

import structlog
from prometheus_client import start_http_server

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
    structlog.configure(
        processors=[*to_event, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    libraries = logging.StreamHandler(sys.stderr)
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


def _log_the_end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log.critical("ended by an error", error=repr(error), exc_info=(kind, error, trace))
