"""Runs expressions that could be expensive in a separate process, which is kept warm and bounded by the kernel.

The time limit is CPU time (ITIMER_VIRTUAL, per request), so a busy host fails no honest expression; the memory limit is
RLIMIT_AS. The process runs as nobody, and can't open or write files or start processes. The kernel kills it when it
exceeds a limit, and the next request starts a new one. `jail_process` is the code inside.

It isn't started by `swarm.base.process` because calls are synchronous (the store's writing thread waits for the answer)
and the child has no output to keep.
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

# Only for a host that hangs: expressions are bounded by the CPU limit.
_PATIENCE_SECONDS: Final = 30.0


class Jail:
    """An `Evaluator` for untrusted expressions. Thread-safe. The process starts when first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def evaluate(self, expression: Expression, names: Mapping[str, Any]) -> Any:
        return self.allowance().evaluate(expression, names)

    def allowance(self, cpu_seconds: float = 2.0) -> Allowance:
        """An `Evaluator` whose expressions share this much of the jail's CPU time: for one decision of a planner, which
        may have thousands."""
        return Allowance(self, cpu_seconds)

    def ask(self, source: str, data: Mapping[str, Any]) -> tuple[Any, float]:
        """The value, and the CPU seconds it took. Raises ExpressionError."""
        with self._lock:
            reply = self._ask({"source": source, "data": data})
        if "error" in reply:
            raise ExpressionError(str(reply["error"]))
        return reply["value"], float(reply["cpu_seconds"])

    @property
    def pid(self) -> int | None:
        """Of the process; None if it isn't running."""
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
        for fresh in (False, True):  # an idle process may have died for reasons unrelated to this request
            child = self._started(fresh)
            stdin, stdout = child.stdin, child.stdout
            assert stdin is not None and stdout is not None
            try:
                write(stdin, request)
                if not select.select([stdout], [], [], _PATIENCE_SECONDS)[0]:
                    raise TimeoutError
                reply = read(stdout)
            except (OSError, EOFError) as error:
                # Try again in a new process, in case the idle one was killed; but not a request that ran too long.
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
                with contextlib.suppress(OSError):  # its buffer can't be flushed: nobody reads the other end
                    pipe.close()
        return code


class Allowance:
    """An `Evaluator` with a limited amount of CPU time. Not thread-safe."""

    def __init__(self, jail: Jail, cpu_seconds: float) -> None:
        self._jail = jail
        self._left = cpu_seconds

    def evaluate(self, expression: Expression, names: Mapping[str, Any]) -> Any:
        done, value, data = evaluate.attempt(expression, names)
        if done:
            return value
        if self._left <= 0:
            raise ExpressionError("the expressions before it used up the CPU time that they share")
        try:
            value, spent = self._jail.ask(expression.source, data)
        except ExpressionError:
            self._left -= CPU_SECONDS  # the most it can have used; a failure ends its step, so failures are few
            raise
        self._left -= spent
        return value


def _let_die(child: subprocess.Popen[bytes]) -> None:
    """Wait a moment, then kill. The pipe may close shortly before the process can be waited for, and the error message
    depends on how the process ended."""
    try:
        child.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        child.kill()


def _cause(code: int) -> str:
    if code == -signal.SIGVTALRM:
        return f"took more than {CPU_SECONDS:g} s of CPU time and was stopped"
    return f"needed more than {MEMORY_BYTES >> 20} MiB of memory, or crashed, and was stopped"
