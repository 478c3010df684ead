"""A thread that goes first: only in its block, and only itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest

from swarm.base.realtime import ahead_of_others

T = TypeVar("T")
POLICY = "import os; print(os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK)"


def on_a_thread(function: Callable[[], T]) -> T:
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def policy() -> int:
    return os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK


def realtime_policy() -> int:
    """What this process may have: SCHED_FIFO for root, unless a container took that away."""

    def raised() -> int:
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        except PermissionError:
            return os.SCHED_OTHER
        return os.SCHED_FIFO

    return on_a_thread(raised)


def test_only_in_the_block_and_no_child() -> None:
    def run() -> list[int]:
        found = [policy()]
        with ahead_of_others():
            found.append(policy())
            child = subprocess.run([sys.executable, "-c", POLICY], capture_output=True, check=True, timeout=60)
        return [*found, int(child.stdout), policy()]

    assert on_a_thread(run) == [os.SCHED_OTHER, realtime_policy(), os.SCHED_OTHER, os.SCHED_OTHER]


def test_an_error_ends_it_too() -> None:
    def run() -> int:
        with pytest.raises(ValueError, match="x"), ahead_of_others():
            raise ValueError("x")
        return policy()

    assert on_a_thread(run) == os.SCHED_OTHER


def test_another_policy_stays() -> None:
    def run() -> tuple[int, int]:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        with ahead_of_others():
            inside = policy()
        return inside, policy()

    assert on_a_thread(run) == (os.SCHED_BATCH, os.SCHED_BATCH)


def test_it_runs_where_it_is_not_allowed() -> None:
    code = f"""
import os
from swarm.base.realtime import ahead_of_others
if os.geteuid() == 0:
    os.setuid(65534)
with ahead_of_others():
    {POLICY}
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(child.stdout) == os.SCHED_OTHER
