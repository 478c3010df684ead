"""Work on hostile data in a process of its own: Python's own threads share one lock, so that a large value that is read
in a thread holds up the event loop, and with it every other ticket.

The process is kept warm, runs without rights if this one is root (`privileges`), can't open or write files or start
programs (but see ``keeps_rights``), and is bounded by the kernel: RLIMIT_AS, and for each request CPU time
(ITIMER_VIRTUAL, so that a busy host fails no honest one). What exceeds a limit is killed, and the next request starts a
new process. Requests and replies are a JSON object and, beside it, blocks of bytes. `serve` is the process's own side.

It isn't started by `swarm.base.process`, because calls are synchronous (threads of the store wait for answers) and the
child has no output to keep.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

from swarm.base import priority, privileges, process

Message: TypeAlias = tuple[dict[str, Any], list[bytes]]

# Only for a host that hangs: requests are bounded by their CPU time.
PATIENCE_SECONDS: Final = 30.0
MAX_BYTES: Final = 128 << 20  # of one message
_PREFIX: Final = struct.Struct(">I")
_NOTHING: Final = (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE)
_FROM_OUTSIDE: Final = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_CHUNK: Final = 1 << 20
_CLOSING_SECONDS: Final = 0.05  # between two looks whether a request has ended; one that starts a process may be slow


class Stopped(Exception):
    """The process was killed while it worked on a request; the message says which limit it exceeded, after "it"."""


class Killed(Stopped):
    """By a signal from outside, twice: the kernel's when memory is short, a supervisor's or a person's."""


class Confined:
    """Runs ``python -m module``, which calls `serve`. Thread-safe: one request at a time. It starts when needed."""

    def __init__(
        self,
        module: str,
        *,
        cpu_seconds: float,
        memory_bytes: int,
        lower_by: int = 0,
        patience_seconds: float = PATIENCE_SECONDS,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._module = module
        self._cpu_seconds = cpu_seconds
        self._memory_bytes = memory_bytes
        self._lower_by = lower_by
        self._env = env
        self._patience_seconds = patience_seconds
        self._lock = threading.Lock()
        self._closed = False
        self._child: subprocess.Popen[bytes] | None = None

    def ask(self, head: Mapping[str, Any], parts: Sequence[bytes] = ()) -> Message:
        """Raises Stopped."""
        with self._lock:
            return self._ask(head, parts)

    @property
    def pid(self) -> int | None:
        """Of the process; None if it isn't running."""
        return self._child.pid if self._child is not None else None

    def close(self) -> None:
        """End the process for good and wait for its death. A request that it works on, and every later one, raises
        Stopped. Idempotent."""
        self._closed = True
        while not self._lock.acquire(timeout=_CLOSING_SECONDS):
            if (child := self._child) is not None:
                child.kill()
        try:
            self._end()
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _ask(self, head: Mapping[str, Any], parts: Sequence[bytes]) -> Message:
        for fresh in (False, True):  # an idle process may have died for reasons unrelated to this request
            if self._closed:
                raise Stopped("was stopped, as all of this program is")
            child = self._started(fresh)
            assert child.stdin is not None and child.stdout is not None
            pipes = _Pipes(child.stdin.fileno(), child.stdout.fileno(), time.monotonic() + self._patience_seconds)
            try:
                pipes.send(head, parts)
                return pipes.receive()
            except (OSError, EOFError) as error:
                # Try again in a new process, in case the idle one was killed; but not a request that ran too long.
                code = self._end()
                hangs = isinstance(error, TimeoutError)
                if fresh or code == -signal.SIGVTALRM or hangs:
                    kind = Killed if -code in _FROM_OUTSIDE and not hangs and not self._closed else Stopped
                    raise kind(self._cause(code)) from None
            except BaseException:
                self._end()  # its state is unknown
                raise
        raise AssertionError("unreachable")

    def _started(self, fresh: bool) -> subprocess.Popen[bytes]:
        if fresh or self._child is None or self._child.poll() is not None:
            self._end()
            self._child = subprocess.Popen(
                [sys.executable, "-E", "-P", "-s", "-m", self._module],  # nothing is imported from this directory
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=process.environment() if self._env is None else self._env,
                start_new_session=True,
            )
            if self._lower_by:
                priority.lower(self._child.pid, self._lower_by)  # now: its imports take the most
            for pipe in (self._child.stdin, self._child.stdout):
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
        return self._child

    def _end(self) -> int:
        child, self._child = self._child, None
        if child is None:
            return 0
        assert child.stdin is not None and child.stdout is not None
        with contextlib.suppress(OSError):
            child.stdin.close()
        if child.poll() is None:
            _let_die(child)
        code = child.wait()
        child.stdout.close()
        return code

    def _cause(self, code: int) -> str:
        if code == -signal.SIGVTALRM:
            return f"took more than {self._cpu_seconds:g} s of CPU time and was stopped"
        return f"needed more than {self._memory_bytes >> 20} MiB of memory, or crashed, and was stopped"


class _Pipes:
    """The two ends of a child, without blocking for longer than until ``deadline``. Raises TimeoutError, EOFError."""

    def __init__(self, to: int, back: int, deadline: float) -> None:
        self._to, self._back, self._deadline = to, back, deadline

    def send(self, head: Mapping[str, Any], parts: Sequence[bytes]) -> None:
        for block in packed(head, parts):
            view = memoryview(block)
            while view:
                self._wait([], [self._to])
                view = view[os.write(self._to, view[:_CHUNK]) :]

    def receive(self) -> Message:
        try:
            return unpacked(self._read)
        except (ValueError, TypeError, LookupError, RecursionError) as error:  # the process isn't trusted
            raise EOFError("no message") from error

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            self._wait([self._back], [])
            piece = os.read(self._back, min(_CHUNK, length - len(data)))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def _wait(self, readable: list[int], writable: list[int]) -> None:
        poll = select.poll()  # `select` takes no descriptor above 1023
        for descriptor in readable:
            poll.register(descriptor, select.POLLIN)
        for descriptor in writable:
            poll.register(descriptor, select.POLLOUT)
        if not poll.poll(max(0.0, self._deadline - time.monotonic()) * 1000):
            raise TimeoutError


def packed(head: Mapping[str, Any], parts: Sequence[bytes]) -> list[bytes]:
    """A message as blocks of bytes."""
    text = json.dumps({"head": head, "parts": [len(part) for part in parts]}).encode()
    if len(text) + sum(map(len, parts)) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES >> 20} MiB for a confined process")
    return [_PREFIX.pack(len(text)) + text, *parts]


def unpacked(read: Callable[[int], bytes]) -> Message:
    """Raises EOFError, also for what is no message."""
    (length,) = _PREFIX.unpack(read(_PREFIX.size))
    if length > MAX_BYTES:
        raise EOFError
    found = json.loads(read(length))
    if sum(found["parts"]) > MAX_BYTES or min(found["parts"], default=0) < 0:
        raise EOFError
    return found["head"], [read(size) for size in found["parts"]]


# --- in the process itself --------------------------------------------------------------------------------------------


def serve(
    answer: Callable[[dict[str, Any], list[bytes]], tuple[Mapping[str, Any], Sequence[bytes]]],
    *,
    cpu_seconds: float,
    memory_bytes: int,
    keeps_rights: bool = False,
) -> None:
    """Answer requests until stdin ends. Whatever ``answer`` imports late must have been imported before.

    ``keeps_rights``: of its starter, to open files and start programs; only its processor time and memory are bounded.
    """
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    bounds = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_CORE: 0}
    if keeps_rights:
        privileges.limit(bounds)
    else:
        privileges.drop({**bounds, **dict.fromkeys(_NOTHING, 0)})
    gc.disable()  # values have no cycles, and the collector would walk through large ones again and again
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)

    def read(length: int) -> bytes:
        data = stdin.read(length)
        if len(data) < length:
            raise EOFError
        return data

    while True:
        try:
            head, parts = unpacked(read)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds)
        reply, blocks = answer(head, parts)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        for block in packed(reply, blocks):
            stdout.write(block)
        stdout.flush()
        del head, parts, reply, blocks
        gc.collect()


def _let_die(child: subprocess.Popen[bytes]) -> None:
    """Wait a moment, then kill. The pipe may close shortly before the process can be waited for, and the error message
    depends on how the process ended."""
    try:
        child.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        child.kill()
