"""Calls of the C library that Python's `os` lacks."""

from __future__ import annotations

import ctypes
import errno
import functools
import os

CLONE_FS, CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = (  # linux/sched.h
    0x00000200, 0x00020000, 0x04000000, 0x08000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 1 << 12  # sys/mount.h
MS_REC, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 14, 1 << 18, 1 << 19, 1 << 20
MNT_DETACH = 2
# The same numbers on every architecture. Debian 11's library has no functions for them.
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT = 428, 429
_AT_FDCWD, _OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = -100, 1, 4  # linux/fcntl.h, linux/mount.h


@functools.cache
def libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mount.argtypes = (
        ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p,
    )  # fmt: skip
    library.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
    return library


def mount(source: bytes | None, target: bytes, flags: int, *, kind: bytes | None = None, data: bytes = b"") -> None:
    """mount(2); ``kind`` is a file system type. Raises OSError with both paths in its text."""
    paths = [os.fsdecode(path) for path in (source, target) if path]
    check(libc().mount(source, target, kind, flags, data or None), f"mount {' '.join(paths)}")


def pivot_root() -> None:
    """Make the current directory, a mount point, the root of this mount namespace, and unmount the old root."""
    check(libc().pivot_root(b".", b"."), "pivot_root")
    check(libc().umount2(b".", MNT_DETACH), "umount of the old root")


def open_tree(path: bytes) -> int:
    """A descriptor of a bind mount of ``path`` that is attached nowhere. Linux 5.2."""
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC)
    fd: int = libc().syscall(_SYS_OPEN_TREE, _AT_FDCWD, ctypes.c_char_p(path), flags)
    check(min(fd, 0), f"open_tree {os.fsdecode(path)}")
    return fd


def attach_tree(tree: int, target: bytes) -> None:
    """Attach what `open_tree` returned, in this thread's mount namespace."""
    arguments = (tree, ctypes.c_char_p(b""), _AT_FDCWD, ctypes.c_char_p(target), _MOVE_MOUNT_F_EMPTY_PATH)
    check(libc().syscall(_SYS_MOVE_MOUNT, *arguments), f"move_mount {os.fsdecode(target)}")


def inotify() -> int:
    """A descriptor to read what happens to files, which does not block: inotify(7)."""
    fd: int = libc().inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    check(min(fd, 0), "inotify_init1")
    return fd


def add_watch(fd: int, path: bytes, mask: int) -> None:
    """From now on, ``fd`` of `inotify` reports this of the file, and nothing else."""
    check(min(libc().inotify_add_watch(fd, path, ctypes.c_uint32(mask)), 0), f"inotify_add_watch {os.fsdecode(path)}")


def check(result: int, call: str) -> None:
    """Raise OSError, with ``call`` in its text, if a call of the library failed."""
    if result != 0:
        code = ctypes.get_errno()
        # Not of a disk.
        limit = "a limit of the kernel is used up (sysctl user.max_*_namespaces, fs.mount-max)"
        raise OSError(code, f"{call}: {limit if code == errno.ENOSPC else os.strerror(code)}")
