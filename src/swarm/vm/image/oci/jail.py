"""Runs a program that reads a hostile image, with nothing of the host in sight but what it needs: /usr, read-only.

``python -m swarm.vm.image.oci.jail STAGE BLOBS FSIZE PROGRAM …``, started by `unshare` in namespaces of its own, mounts
among them, without a network. STAGE is its /stage, the only place that it can write to; BLOBS its /blobs, read-only.
It is root, since it makes files of all owners, with the few capabilities that this takes, and no file that it writes
is larger than FSIZE bytes.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Final

from swarm.base import privileges
from swarm.base.libc import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_REMOUNT, mount, pivot_root

# linux/capability.h: of other owners' files (chown, dac_override, dac_read_search, fowner, fsetid), device nodes
# (mknod), and capabilities of files (setfcap).
_KEPT: Final = frozenset({0, 1, 2, 3, 4, 27, 31})
_SYSTEM: Final = ("usr", "bin", "sbin", "lib", "lib64", "lib32", "libx32")


def main(stage: str, blobs: str, fsize: str, *program: str) -> None:
    root = Path(stage, "jail")
    root.mkdir(exist_ok=True)
    mount(b"tmpfs", os.fsencode(root), MS_NOSUID | MS_NODEV, kind=b"tmpfs", data=b"size=1m,mode=755")
    for name in _SYSTEM:
        place = Path("/", name)
        if place.is_symlink():
            (root / name).symlink_to(place.readlink())
        elif place.is_dir():
            _bind(place, root / name, MS_RDONLY | MS_NOSUID | MS_NODEV)
    _bind(Path(blobs), root / "blobs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    _bind(Path(stage), root / "stage", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    (root / "proc").mkdir()
    mount(b"proc", os.fsencode(root / "proc"), MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, kind=b"proc")
    os.chdir(root)
    pivot_root()
    os.chdir("/")
    limits = {resource.RLIMIT_FSIZE: int(fsize), resource.RLIMIT_CORE: 0, resource.RLIMIT_DATA: 4 << 30}
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    privileges.keep(_KEPT)
    os.umask(0)  # modes are the image's
    os.execv(program[0], program)


def _bind(source: Path, target: Path, flags: int) -> None:
    target.mkdir()
    mount(os.fsencode(source), os.fsencode(target), MS_BIND)  # without what is mounted below it
    mount(None, os.fsencode(target), MS_REMOUNT | MS_BIND | flags)


if __name__ == "__main__":
    main(*sys.argv[1:])
