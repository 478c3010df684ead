"""Log output: to stderr, one line each, warnings and errors only by default.

A log line must never end or delay the work that it tells of: a thread writes the lines. So a reader that stalls, a
reader that is gone (`| tee`, Ctrl+C) and a full disk each cost lines only. Those are counted, and the next line that
can be written says how many they were.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable, MutableMapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TextIO, cast

from swarm.base.printable import escaped

# What waits for a slow reader, at most; further lines are dropped.
WAITING_CHARS: Final = 1 << 20
# How long the end of the process waits for a slow reader.
_END_SECONDS: Final = 1.0
_DROPPED: Final = "log lines could not be written"


def printable(_logger: object, _method: str, entry: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor: error messages quote guests and rows, and may hold what moves the cursor or forges a line.

    A traceback keeps its line ends. What isn't text is shown by `repr`, which escapes."""
    return {
        escaped(key): escaped(value, keep="\n" if key in ("exception", "stack") else "")
        if isinstance(value, str)
        else value
        for key, value in entry.items()
    }


def write_stderr(text: str) -> None:
    """Write to the current sys.stderr, which a live view replaces so that lines appear above it.

    The real one is written to without Python's buffer: what could not be written would stay in there, and fail again
    at the end of the process, which changes its exit status. Raises OSError, or ValueError if it is closed.
    """
    stream = sys.__stderr__
    if stream is None or sys.stderr is not stream:
        sys.stderr.write(text)
        sys.stderr.flush()
        return
    fd, data = stream.fileno(), memoryview(text.encode(stream.encoding, "backslashreplace"))
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:  # another program made the terminal or pipe non-blocking
            select.select([], [fd], [])


class Lines:
    """Takes lines at once and writes them from a thread, in order. ``notice`` makes the line that counts lost ones."""

    def __init__(self, write: Callable[[str], None] = write_stderr) -> None:
        self.notice: Callable[[int], str] = lambda count: f"{_DROPPED}: {count}\n"
        self._write = write
        self._changed = threading.Condition()
        self._waiting: deque[str] = deque()
        self._chars = 0
        self._lost = 0
        self._busy = False
        self._torn = False  # the last line was not written to its end
        self._thread: threading.Thread | None = None

    def write(self, text: str) -> int:
        """Never blocks, never raises."""
        with self._changed:
            if self._chars + len(text) > WAITING_CHARS or not self._started():
                self._lost += 1
            else:
                self._waiting.append(text)
                self._chars += len(text)
                self._changed.notify_all()
        return len(text)

    def say(self, text: str) -> None:
        """`write`, for what a command itself says: where no thread can be started, the line is written here."""
        with self._changed:
            started = self._started()
        if started:
            self.write(text)
        else:
            self._put(text)

    def flush(self) -> None:
        """For those who take this for a file. See `finish`."""

    def finish(self, timeout_seconds: float = _END_SECONDS) -> None:
        """Wait until all lines are written, but not longer than this."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_seconds)

    def _started(self) -> bool:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="log", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads
                return False
            self._thread = thread
            atexit.register(self.finish)
        return True

    def _run(self) -> None:
        wrote = True
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                # What was dropped while a reader stalled is told as soon as it reads again, not at the next line.
                self._changed.wait_for(lambda: self._waiting or (self._lost and wrote))
                text = self._waiting.popleft() if self._waiting else ""
                self._chars -= len(text)
                lost, self._lost = self._lost, 0
                self._busy = True
            if not (wrote := self._put((self.notice(lost) if lost else "") + text)):
                with self._changed:
                    self._lost += lost + bool(text)

    def _put(self, text: str) -> bool:
        try:
            self._write(f"\n{text}" if self._torn else text)
        except Exception:  # whatever the stream is, losing a line is all that may happen
            self._torn = True
            return False
        self._torn = False
        return True


LINES = Lines()


def _json(entry: object, **options: Any) -> str:
    return escaped(json.dumps(entry, ensure_ascii=False, **options))


class _Logger:
    """Loads structlog with the first line: most commands log none, and it takes longer to import than they take."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, level: str) -> Any:
        global _later
        if _later is not None and level in ("debug", "info"):  # `configure` is eager where these are logged
            return _ignore
        import structlog

        if _later is not None:
            apply, _later = _later, None
            apply()
        return getattr(structlog.get_logger(self._name), level)


def _ignore(*_args: object, **_fields: object) -> None:
    pass


def logger(name: str) -> Any:
    """A structlog logger."""
    return _Logger(name)


_later: Callable[[], None] | None = None  # the configuration, until something is logged


def configure(*, debug: bool = False, info: bool = False, as_json: bool = False, lazily: bool = False) -> None:
    """Set up logging for this process. ``info`` also logs what an engine does. ``lazily``: only warnings and errors,
    when the first one is logged; an engine must not wait for that, since it may have no file descriptors then."""
    global _later
    if sys.stderr is None:  # started with 2>&-: a database that got descriptor 2 would be written to by libraries
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    # The libraries (alembic, qemu.qmp, pyroute2) use the standard library's logging, and log too much.
    logging.basicConfig(level=logging.WARNING if debug else logging.CRITICAL, stream=cast(TextIO, LINES))
    if lazily:
        _later = partial(configure, as_json=as_json)
        return
    import structlog

    _later = None
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
        renderer = structlog.processors.JSONRenderer(serializer=_json)

    def notice(count: int) -> str:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        fields = {"event": _DROPPED, "count": count, "level": "warning", "timestamp": now}
        return f"{renderer(None, 'warning', fields)}\n"

    LINES.notice = notice
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            *([] if as_json else [printable]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, LINES)),
        cache_logger_on_first_use=False,
    )
