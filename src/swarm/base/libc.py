"""Calls of the C library that Python's `os` lacks."""

from __future__ import annotations

import ctypes
import functools
import os

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000  # linux/sched.h
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_SLAVE, MS_SHARED = 1, 32, 1 << 12, 1 << 14, 1 << 19, 1 << 20  # sys/mount.h
MNT_DETACH = 2  # sys/mount.h


@functools.cache
def libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p)
    library.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
    return library


def mount(source: bytes | None, target: bytes, flags: int) -> None:
    """mount(2), for flags that need no file system type. Raises OSError with both paths in its text."""
    paths = [os.fsdecode(path) for path in (source, target) if path]
    check(libc().mount(source, target, None, flags, None), f"mount {' '.join(paths)}")


def check(result: int, call: str) -> None:
    """Raise OSError, with ``call`` in its text, if a call of the library failed."""
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")
