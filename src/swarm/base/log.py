"""Log output: to stderr, one line each, warnings and errors only by default."""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO, cast

import structlog


class _Stderr:
    """The current sys.stderr, which a live view replaces so that log lines appear above it."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def configure(*, debug: bool = False, info: bool = False, as_json: bool = False) -> None:
    """Set up logging for this process. ``info`` also logs what an engine does."""
    level = logging.DEBUG if debug else logging.INFO if info else logging.WARNING
    colors = sys.stderr.isatty()
    renderer: Any = structlog.dev.ConsoleRenderer(
        colors=colors,
        sort_keys=False,
        pad_event_to=16,
        # Rich's formatter would show local variables, such as tokens and inputs.
        exception_formatter=structlog.dev.plain_traceback,
    )
    if as_json:
        renderer = structlog.processors.JSONRenderer(ensure_ascii=False)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _Stderr())),
        cache_logger_on_first_use=False,
    )
    # The libraries (alembic, qemu.qmp, pyroute2) use the standard library's logging, and log too much.
    logging.basicConfig(level=logging.WARNING if debug else logging.CRITICAL, stream=sys.stderr)
