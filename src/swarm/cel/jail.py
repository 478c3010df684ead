"""Where expressions run that could cost much: a process of its own, kept warm, that the kernel bounds.

Time is CPU time (ITIMER_VIRTUAL, per request), so a busy host fails no honest expression; memory is RLIMIT_AS; it runs
as nobody, can open and write no file and start no process. What oversteps is killed by the kernel, and the next request
gets a new process. `jail_process` is what runs inside.

Not through `swarm.base.process`: this door is synchronous (the store's writing thread waits for the answer), and the
child has no output of its own to be kept.
"""

from __future__ import annotations

import contextlib
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

from swarm.base import process
from swarm.cel import evaluate
from swarm.cel.expression import Expression, ExpressionError
from swarm.cel.jail_process import CPU_SECONDS, MEMORY_BYTES, read, write

# Only for a host that stands still: the CPU limit is what bounds an expression.
_PATIENCE_SECONDS: Final = 30.0


class Jail:
    """An `Evaluator` for expressions from anywhere. Thread-safe. The process starts at first need."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def evaluate(self, expression: Expression, names: Mapping[str, Any]) -> Any:
        return self.allowance().evaluate(expression, names)

    def allowance(self, cpu_seconds: float = 2.0) -> Allowance:
        """An `Evaluator` that lets all its expressions together have so much of the jail's processor time: for one
        decision of a planner, which may have thousands."""
        return Allowance(self, cpu_seconds)

    def ask(self, source: str, data: Mapping[str, Any]) -> tuple[Any, float]:
        """The value, and the processor time that it took, in s. Raises ExpressionError."""
        with self._lock:
            reply = self._ask({"source": source, "data": data})
        if "error" in reply:
            raise ExpressionError(str(reply["error"]))
        return reply["value"], float(reply["cpu_seconds"])

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._child.pid if self._child is not None else None

    def close(self) -> None:
        """End the process and wait for its death. Idempotent."""
        with self._lock:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        for fresh in (False, True):  # a process that died between two requests is nobody's fault
            child = self._started(fresh)
            stdin, stdout = child.stdin, child.stdout
            assert stdin is not None and stdout is not None
            try:
                write(stdin, request)
                if not select.select([stdout], [], [], _PATIENCE_SECONDS)[0]:
                    raise TimeoutError
                reply = read(stdout)
            except (OSError, EOFError) as error:
                # Tried again in a new process, for anybody may have killed an idle one. Not what took its time.
                code = self._end()
                if fresh or code == -signal.SIGVTALRM or isinstance(error, TimeoutError):
                    raise ExpressionError(_cause(code)) from None
                continue
            return reply
        raise AssertionError("unreachable")

    def _started(self, fresh: bool) -> subprocess.Popen[bytes]:
        if fresh or self._child is None or self._child.poll() is not None:
            self._end()
            self._child = subprocess.Popen(
                [sys.executable, "-E", "-s", "-m", "swarm.cel.jail_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=process.environment(),
                start_new_session=True,
            )
        return self._child

    def _end(self) -> int:
        child, self._child = self._child, None
        if child is None:
            return 0
        if child.poll() is None:
            _let_die(child)
        code = child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was left in its buffer has no reader
                    pipe.close()
        return code


class Allowance:
    """An `Evaluator` with a purse. Not thread-safe."""

    def __init__(self, jail: Jail, cpu_seconds: float) -> None:
        self._jail = jail
        self._left = cpu_seconds

    def evaluate(self, expression: Expression, names: Mapping[str, Any]) -> Any:
        done, value, data = evaluate.attempt(expression, names)
        if done:
            return value
        if self._left <= 0:
            raise ExpressionError("the expressions before it took all the processor time that there is for them")
        try:
            value, spent = self._jail.ask(expression.source, data)
        except ExpressionError:
            self._left -= CPU_SECONDS  # at most; a failure ends its step, so there are few
            raise
        self._left -= spent
        return value


def _let_die(child: subprocess.Popen[bytes]) -> None:
    """Kill it, unless it ends by itself: its pipe may close a moment before it can be waited for, and how it ended is
    what the user is told."""
    try:
        child.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        child.kill()


def _cause(code: int) -> str:
    if code == -signal.SIGVTALRM:
        return f"took more than {CPU_SECONDS:g} s of processor time and was stopped"
    return f"needed more than {MEMORY_BYTES >> 20} MiB of memory, or crashed, and was stopped"
