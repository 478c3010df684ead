"""The programs' first moment. Until a command runs, Ctrl+C ends the process at once, quietly, with status 130: nothing
is begun yet, and Python would print a traceback out of some import. `frame` takes the signal over."""

from __future__ import annotations

import os
import signal


def _quiet() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # who started it may have it ignored
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))


def swarm() -> None:
    _quiet()
    from swarm.cli.main import run

    run()


def engine() -> None:
    _quiet()
    from swarm.cli.engine import run

    run()


def spawn_ns() -> None:
    _quiet()
    from swarm.cli.vm import run_spawn_ns

    run_spawn_ns()


def cleanup() -> None:
    _quiet()
    from swarm.cli.cleanup import run

    run()
