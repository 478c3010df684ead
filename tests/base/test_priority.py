"""A thread that goes first: only in its block, and only itself. Processes that go behind others."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from swarm.base import priority
from swarm.base.priority import ahead_of_others

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
from swarm.base import priority
from swarm.base.priority import ahead_of_others
if os.geteuid() == 0:
    os.setuid(65534)
with ahead_of_others():
    {POLICY}
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(child.stdout) == os.SCHED_OTHER


AUTOGROUP = Path("/proc/self/autogroup")
has_sessions = pytest.mark.skipif(not AUTOGROUP.exists(), reason="this kernel gives sessions no shares")
BUSY = "import time\nprint(flush=True)\nwhile True: time.process_time()"


def nice_of(pid: int) -> set[int]:
    """Of all its threads and, where the kernel has that, of its session."""
    threads = {os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in Path(f"/proc/{pid}/task").iterdir()}
    return threads | ({session_nice(pid)} if AUTOGROUP.exists() else set())


def below_ours(by: int) -> set[int]:
    return {min(nice + by, priority.LOWEST) for nice in nice_of(os.getpid())}


def session_nice(pid: int) -> int:
    return int(Path(f"/proc/{pid}/autogroup").read_text().rpartition(" ")[2] or 0)


@contextlib.contextmanager
def busy(*, own_session: bool = True) -> Iterator[subprocess.Popen[bytes]]:
    """A program that takes all that it gets of one CPU."""
    argv = [sys.executable, "-I", "-S", "-c", BUSY]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=own_session) as child:
        assert child.stdout is not None
        os.sched_setaffinity(child.pid, [min(os.sched_getaffinity(0))])
        child.stdout.readline()
        try:
            yield child
        finally:
            child.kill()


def cpu_seconds(child: subprocess.Popen[bytes]) -> float:
    return psutil.Process(child.pid).cpu_times().user


def test_the_lowered_gets_less_of_a_cpu() -> None:
    """Each has a session of its own, as all that this program starts."""
    with busy() as first, busy() as second:
        priority.lower(second.pid, 10)
        before = cpu_seconds(first), cpu_seconds(second)
        while (one := cpu_seconds(first) - before[0]) < 2:
            time.sleep(0.1)
        assert cpu_seconds(second) - before[1] < one / 3


def test_a_session_that_is_ours_keeps_its_share() -> None:
    with busy(own_session=False) as child:
        priority.lower(child.pid, 5)
        assert os.getpriority(os.PRIO_PROCESS, child.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 5
        if AUTOGROUP.exists():
            assert session_nice(child.pid) == session_nice(os.getpid())


def test_no_further_than_the_lowest_and_up_again() -> None:
    with busy() as child:
        priority.lower(child.pid, priority.LOWEST + 5)
        assert nice_of(child.pid) == {priority.LOWEST}
        if os.geteuid() == 0:
            priority.lower(child.pid, 0)
            assert nice_of(child.pid) == nice_of(os.getpid())


@has_sessions
def test_init_s_session_has_no_value_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an engine or a CI runner is a child of init that began no session."""
    (empty := tmp_path / "autogroup").touch()
    monkeypatch.setattr(priority, "_OUR_SESSION", empty)
    with busy() as child:
        priority.lower(child.pid, 5)
        assert session_nice(child.pid) == 5


def test_one_that_has_ended_is_no_error() -> None:
    with busy() as child:
        pass
    priority.lower(child.pid, 5)
