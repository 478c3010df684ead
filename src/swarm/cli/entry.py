"""The programs' first moment. Until a command runs, Ctrl+C ends the process at once, quietly, with status 130: nothing
is begun yet, and Python would print a traceback out of some import. `frame` takes the signal over.

Python looks for garbage less often than it would: imports make many objects and little of it, and looking through them
again and again takes a tenth of a short command's time."""

from __future__ import annotations

import gc
import os
import signal
from typing import Final

_OBJECTS: Final = 50_000  # new ones, until it looks; Python's own: 700


def _begin() -> None:
    gc.set_threshold(_OBJECTS)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # who started it may have it ignored
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))


def swarm() -> None:
    _begin()
    from swarm.cli.main import run

    run()


def engine() -> None:
    _begin()
    from swarm.cli.engine import run

    run()


def spawn_ns() -> None:
    _begin()
    from swarm.cli.vm import run_spawn_ns

    run_spawn_ns()


def cleanup() -> None:
    _begin()
    from swarm.cli.cleanup import run

    run()
