"""A command under a terminal of ours: types, looks, changes its size."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.conftest import PATIENCE_SECONDS


class Terminal:
    """``seen``: all that was printed."""

    def __init__(
        self, argv: Sequence[str | Path], *, env: Mapping[str, str], cwd: Path, size: tuple[int, int] = (80, 24)
    ) -> None:
        self._ours, theirs = pty.openpty()
        self._theirs = theirs
        self.resize(*size)
        self.before = termios.tcgetattr(theirs)
        self.seen = b""
        self.child = subprocess.Popen(
            argv, stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd=cwd, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        os.close(self._ours)
        os.close(self._theirs)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def until(self, text: str, *, seconds: float = PATIENCE_SECONDS) -> str:
        """All that was printed up to ``text``, which must come; the rest is for the next call."""
        wanted, deadline = text.encode(), time.monotonic() + seconds
        while wanted not in self.seen:
            assert self._read(deadline), f"no {text!r} in {self.seen.decode(errors='replace')!r}"
        before, _, self.seen = self.seen.partition(wanted)
        return before.decode(errors="replace")

    def status(self, *, seconds: float = PATIENCE_SECONDS) -> int:
        """Its exit status; what it printed until then is in `seen`."""
        deadline = time.monotonic() + seconds
        while self.child.poll() is None:
            assert time.monotonic() < deadline, self.seen.decode(errors="replace")
            self._read(min(deadline, time.monotonic() + 0.05))
        while self._read(time.monotonic()):
            pass
        return self.child.returncode

    def restored(self) -> bool:
        """Has it the settings that it had at first?"""
        return termios.tcgetattr(self._theirs) == self.before

    def _read(self, deadline: float) -> bool:
        if not select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        self.seen += os.read(self._ours, 65536)
        return True
