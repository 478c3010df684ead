"""Where log lines go: stderr, one a line, warnings and worse unless more is asked for."""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO, cast

import structlog


class _Stderr:
    """Whatever sys.stderr is at the moment: a live view puts lines above itself."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def configure(*, debug: bool = False, info: bool = False, as_json: bool = False) -> None:
    """Set up logging for this process. Called by the command line: with ``info``, what an engine does is logged too."""
    level = logging.DEBUG if debug else logging.INFO if info else logging.WARNING
    colors = sys.stderr.isatty()
    renderer: Any = structlog.dev.ConsoleRenderer(
        colors=colors,
        sort_keys=False,
        pad_event_to=16,
        # Rich's would show local variables: tokens and inputs are among them.
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
    # The libraries (alembic, qemu.qmp, pyroute2) use the standard library's logging, and say too much.
    logging.basicConfig(level=logging.WARNING if debug else logging.CRITICAL, stream=sys.stderr)
