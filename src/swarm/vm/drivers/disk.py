"""Work disks: sparse raw ext4 files, made by copying a formatted empty one of the same size.

Formatting costs ~20 ms and a process; a sparse copy of the ~100 blocks that mkfs wrote costs about one.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from swarm.base import files, sparse
from swarm.base.process import run
from swarm.errors import HostError, NoSpace

MIN_MB = 8
# Without lost+found, which only root may read: `find`, `grep -r` and `tar` of an agent would fail because of it. With
# the directory whose files are kept.
_CONTENTS = b"""\
rmdir lost+found
mkdir out
set_inode_field out uid 1000
set_inode_field out gid 1000
"""
WORK_DISK = "work.ext4"  # in the directory of its VM


async def make_work_disk(path: Path, *, size_mb: int, cache: Path) -> None:
    """Write an empty ext4 of ``size_mb`` to ``path``. ``cache`` keeps one formatted file for each size.

    Raises NoSpace, HostError.
    """
    blank = cache / f"work-v2-{size_mb}.ext4"
    if not blank.exists():
        await _format(blank, size_mb)
    await copy_work_disk(blank, path)


async def copy_work_disk(source: Path, path: Path) -> None:
    """Copy a work disk with its holes. Raises NoSpace, HostError."""
    try:
        await asyncio.to_thread(_copy, source, path)
    except OSError as error:
        path.unlink(missing_ok=True)
        if files.is_full(error):
            raise NoSpace(files.no_space(path.parent, "can't make the VM's work disk")) from None
        raise HostError(f"can't make the work disk {path}: {error}") from error


def used_bytes(path: Path) -> int:
    """How much of the host's disk a sparse file really uses; 0 if it doesn't exist."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def _copy(source: Path, path: Path) -> None:
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sparse.copy(fd, path)
    finally:
        os.close(fd)


async def _format(blank: Path, size_mb: int) -> None:
    if size_mb < MIN_MB:
        raise HostError(f"a work disk of {size_mb} MB is too small for ext4: it needs at least {MIN_MB} MB")
    files.make_directory(blank.parent)
    partial = blank.with_name(f"{blank.name}.{os.getpid()}.{id(blank):x}.partial")
    try:
        try:
            with partial.open("xb") as file:
                os.fchmod(file.fileno(), 0o600)
                file.truncate(size_mb << 20)
        except OSError as error:  # for example: too large for the host's file system
            raise HostError(f"can't make a work disk of {size_mb} MB in {blank.parent}: {error.strerror}") from error
        # No journal: the disk lives only as long as its VM. No blocks reserved for root: the agent is not root. Lazy
        # tables: the guest never writes them, so the file stays small.
        options = "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=1000:1000"
        features = "^has_journal,^resize_inode,sparse_super2"
        await run(["mkfs.ext4", "-q", "-F", "-m", "0", "-O", features, "-E", options, "-L", "work", str(partial)])
        await run(["debugfs", "-w", "-f", "-", str(partial)], input=_CONTENTS)
        partial.rename(blank)
    finally:
        partial.unlink(missing_ok=True)
