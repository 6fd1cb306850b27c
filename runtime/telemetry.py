"""Logs as JSON lines on stderr, and metrics for Prometheus."""

import logging
import sys

import structlog
from prometheus_client import start_http_server

from runtime.settings import Settings


def start(service: str, settings: Settings, *, metrics: bool = True) -> None:
    """Sets up logging for this process and serves its metrics where the settings ask for it."""
    level = logging.getLevelNamesMapping().get(settings.log_level.upper(), logging.INFO)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format='{"event": "library", "message": %(message)r}')
    if metrics and settings.metrics_listen:
        host, _, port = settings.metrics_listen.rpartition(":")
        start_http_server(int(port), host or "127.0.0.1")
