"""This process's stdin, stdout and stderr, joined to a program in a guest.

With a terminal on both sides (a PTY in the guest), every key goes to the program, Ctrl+C too, and the window's size
follows. With pipes, bytes go through as they are, stdin's end too, and SIGINT is passed on as a signal. In both, a
second Ctrl+C within a second ends this command, and with it what it started.

Nothing here blocks the event loop: descriptors are waited for. They stay blocking (O_NONBLOCK would be seen by every
process that shares them, such as the shell that waits for us), so little is written at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Final

from swarm.base.aio import cancel_all
from swarm.cli.frame import interrupts

if TYPE_CHECKING:
    from swarm.base.redact import Redactor, Stream
    from swarm.channel.processes import Process

_STDIN: Final = 0
_FDS: Final = {"stdout": 1, "stderr": 2}
_PIECE_BYTES: Final = 64 << 10
_INTERRUPT: Final = b"\x03"  # what Ctrl+C sends on a raw terminal
_AGAIN_SECONDS: Final = 1.0
# What is typed while the program reads nothing; beyond it keys are dropped, as a terminal of the kernel does, so that
# a second Ctrl+C is always seen.
_TYPED_BYTES: Final = 256 << 10


def both_are_terminals() -> bool:
    """Do we get keys from a terminal, and print on one?"""
    return os.isatty(_STDIN) and os.isatty(_FDS["stdout"])


def size() -> tuple[int, int]:
    """Columns and rows; 80 and 24 if the terminal does not say."""
    columns, rows = shutil.get_terminal_size()
    with contextlib.suppress(OSError):  # COLUMNS and LINES may be those of another window
        columns, rows = os.get_terminal_size(_FDS["stdout"])
    return columns or 80, rows or 24


async def joined(process: Process, *, pty: bool, redactor: Redactor | None = None) -> None:
    """Join our standard streams to a program's until it has ended. ``pty``: it has a terminal of its own, and ours is
    raw meanwhile. ``redactor``: what it replaces in all that is printed.

    Raises BrokenPipeError when nobody reads stdout any more, ChannelError when the guest is gone.
    """
    with ExitStack() as stack:
        again = _Again()
        sends: set[asyncio.Task[None]] = set()

        def send(work: Callable[[], object]) -> None:
            task = asyncio.ensure_future(_quietly(work))
            sends.add(task)
            task.add_done_callback(sends.discard)

        def interrupted(*, passed_on: bool = False) -> None:
            if again.pressed():
                end()
            elif not passed_on:
                send(lambda: process.signal("INT"))

        end = stack.enter_context(interrupts(interrupted))
        if pty:
            stack.enter_context(_raw(_STDIN))
            stack.enter_context(_resized(lambda: send(lambda: process.resize(*size()))))
        feeding = asyncio.ensure_future(_feed(process, partial(interrupted, passed_on=True) if pty else None))
        try:
            sys.stdout.flush()
            await _show(process, redactor)
        finally:
            await cancel_all([feeding, *sends])


class _Again:
    """Tells a second Ctrl+C within a second."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def pressed(self) -> bool:
        now = asyncio.get_running_loop().time()
        last, self._last = self._last, now
        return now - last < _AGAIN_SECONDS


async def _quietly(work: Callable[[], object]) -> None:
    """What fails since the program has ended, or the guest, is told by `_show`."""
    from swarm.errors import SwarmError

    with contextlib.suppress(SwarmError):
        await work()  # type: ignore[misc]


# --- from the program -------------------------------------------------------------------------------------------------


async def _show(process: Process, redactor: Redactor | None) -> None:
    held: dict[str, Stream] = {}
    async for stream, data in process:
        if redactor:
            data = held.setdefault(stream, redactor.stream()).feed(data)
        await write(_FDS[stream], data)
    for stream, rest in held.items():
        await write(_FDS[stream], rest.end())


async def write(fd: int, data: bytes) -> None:
    """Write all of it. Raises BrokenPipeError."""
    left = memoryview(data)
    while left:
        if await _ready(fd, select.POLLOUT):
            left = left[os.write(fd, left[: select.PIPE_BUF]) :]  # so much a pipe takes at once, if it takes any
        else:
            left = left[await asyncio.to_thread(os.write, fd, left) :]


# --- to the program ---------------------------------------------------------------------------------------------------


async def _feed(process: Process, interrupted: Callable[[], None] | None) -> None:
    """Pass stdin on, as fast as the program takes it. ``interrupted``: called for each Ctrl+C in it."""
    from swarm.errors import SwarmError

    try:
        if interrupted is None:
            while data := await read(_STDIN):
                await process.write(data)
        else:
            await _feed_keys(process, interrupted)
        await process.close_stdin()
    except SwarmError:
        pass  # the program has ended, or the guest: `_show` tells


async def _feed_keys(process: Process, interrupted: Callable[[], None]) -> None:
    typed = bytearray()
    more = asyncio.Event()

    async def send() -> None:
        while True:
            await more.wait()
            data = bytes(typed)
            typed.clear()
            more.clear()
            await process.write(data)

    sending = asyncio.ensure_future(send())
    try:
        while data := await read(_STDIN):
            for _ in range(data.count(_INTERRUPT)):
                interrupted()
            if len(typed) < _TYPED_BYTES:
                typed += data
                more.set()
            if sending.done():
                return await sending
    finally:
        await cancel_all([sending])


async def read(fd: int) -> bytes:
    """What there is, b'' at its end."""
    try:
        if await _ready(fd, select.POLLIN):
            return os.read(fd, _PIECE_BYTES)
        return await asyncio.to_thread(os.read, fd, _PIECE_BYTES)
    except OSError:  # a terminal that is gone, or of which we are in the background
        return b""


async def _ready(fd: int, how: int) -> bool:
    """Wait until a read or write won't block. False for what can't be waited for, such as a file: it never does."""
    loop = asyncio.get_running_loop()
    come: asyncio.Future[None] = loop.create_future()
    add, remove = (
        (loop.add_reader, loop.remove_reader) if how == select.POLLIN else (loop.add_writer, loop.remove_writer)
    )

    def is_ready() -> None:
        if not come.done():
            come.set_result(None)

    try:
        add(fd, is_ready)
    except PermissionError:  # epoll(7)
        return False
    try:
        await come
    finally:
        remove(fd)
    return True


# --- the terminal -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[None]:
    """The terminal passes every key on at once, for the length of the block; also after SIGCONT, since a shell gives
    a stopped program's terminal its own settings."""
    loop = asyncio.get_running_loop()
    before = termios.tcgetattr(fd)

    def make_raw() -> None:
        with contextlib.suppress(termios.error):  # it is gone
            tty.setraw(fd, termios.TCSANOW)  # what was typed already stays

    try:
        make_raw()
        loop.add_signal_handler(signal.SIGCONT, make_raw)
        yield
    finally:
        loop.remove_signal_handler(signal.SIGCONT)
        with contextlib.suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSANOW, before)


@contextlib.contextmanager
def _resized(changed: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, changed)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)
