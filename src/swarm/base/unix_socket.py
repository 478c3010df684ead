"""Unix sockets that only this user can open: short names for them, and which are alive."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from swarm.errors import HostError


def bind(path: Path) -> socket.socket | None:
    """A socket that listens there, with mode 0600. None if another server has it. Raises HostError."""
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with short_path(path) as short, _alone(path.parent):
            if listens(path):
                bound.close()
                return None
            path.unlink(missing_ok=True)  # left by a server that was killed
            bound.bind(short)
            Path(short).chmod(0o600)  # nobody can connect before the next line
            bound.listen(128)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise HostError(f"can't listen on {path}: {error.strerror or error}") from None
    return bound


def listens(path: Path) -> bool:
    """Does a server listen on this Unix socket?"""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        with short_path(path) as short, contextlib.suppress(BlockingIOError):  # it is there, and others wait
            probe.connect(short)
        return True
    return False


def remove_dead(directory: Path) -> list[Path]:
    """Remove the sockets in it on which nobody listens; returns which. Raises OSError."""
    dead = [path for path in directory.glob("*.sock") if not listens(path)]
    for path in dead:
        path.unlink(missing_ok=True)
    return dead


def inode(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = path.lstat()
        return found.st_dev, found.st_ino
    return None


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name for a Unix socket that is short enough for the kernel (107 bytes), however deep its directory is."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Of the servers that take over a socket at once, the second must find what the first has made."""
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)
