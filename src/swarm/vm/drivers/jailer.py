"""Firecracker's jail: what a VMM process can see of the host, and how everything of it is removed.

::

    vms/<n>/jail/firecracker/vm<n>-<6 hex>/root/    its chroot: an empty directory, but for
        dev/kvm, dev/net/tun, dev/urandom           made by the jailer, owned by the VM's uid
        firecracker, api.sock                       the jailer's copy of the binary; the API
        vmlinux, root.erofs, work.ext4, memory …    mount points of single files

    swarm ── unshare --pid ── unshare ── jailer, which becomes firecracker
             our child        pid 1 of   VM's uid, chroot, netns, cgroup, seccomp
                              its own namespace

Files are bind-mounted into the chroot in a mount namespace that contains only these processes. So the host never sees
these mounts, and they end with the processes. A change of uid clears a process's parent-death signal, so Firecracker
can't hold it: the two processes above it do, and they stay root. When Swarm dies in any way, the kernel kills the
first, which kills the second; that is pid 1 of a namespace, so everything in the namespace ends.

What stays on disk is in the VM's own directory, where `swarm.vm.slots.sweep` finds it. Cgroups are named like the
chroot, so the directory leads to them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swarm.base.files import make_directory, mounted
from swarm.base.libc import CLONE_NEWNS, MS_BIND, MS_RDONLY, MS_REC, MS_REMOUNT, MS_SLAVE, check, libc, mount
from swarm.errors import HostError
from swarm.vm.driver import Slot, VmSpec
from swarm.vm.drivers import cgroups
from swarm.vm.network import netns

NAME = "firecracker"  # the jailer requires it in the binary's name, and makes it a part of the path


@dataclass(frozen=True, slots=True)
class JailFile:
    """A file of the host that appears in the chroot as ``name``."""

    name: str
    source: Path
    writable: bool = False


class Jail:
    """The chroot of one VM, made in its directory. ``jailed`` False: the same layout without any confinement."""

    def __init__(self, dir: Path, *, slot: Slot | None, uid: int, jailed: bool = True) -> None:
        self.dir = dir
        self.slot = slot
        self.uid = uid
        self.jailed = jailed
        # Also the name of a cgroup. Cgroups are shared by all state directories of the host: hence the random part.
        self.id = f"vm{slot.n if slot else 0}-{secrets.token_hex(3)}"
        if jailed and (options := mounted(dir, "noexec", "nodev")):
            raise HostError(
                f"Firecracker's jail is below {dir.parent}, and that file system is mounted {options}: mount it "
                "without (`mount -o remount,exec,dev …`), or choose another place (SWARM_STATE_DIR)"
            )
        self.root = dir / "jail" / NAME / self.id / "root"
        make_directory(self.root, 0o711)

    async def add(self, files: Sequence[JailFile]) -> int | None:
        """Put files into the chroot. Returns a descriptor of the mount namespace with them; None if not jailed."""
        for file in files:
            if file.writable:
                os.chown(file.source, self.uid, self.uid)
            if self.jailed:
                (self.root / file.name).touch(mode=0o400)
            else:
                (self.root / file.name).symlink_to(file.source)
        if not self.jailed:
            return None
        try:
            return await netns.in_thread(lambda: _bind(self.root, files))
        except OSError as error:
            raise HostError(f"can't put files into the jail {self.root}: {error}") from error

    def argv(
        self,
        firecracker: Path,
        jailer: Path,
        spec: VmSpec,
        arguments: Sequence[str],
        *,
        mounts: int | None,
        outlive: bool,
    ) -> list[str]:
        """The command that becomes Firecracker with ``arguments``. ``mounts`` is the descriptor that `add` returned."""
        die_with_parent = () if outlive else ("setpriv", "--pdeathsig", "KILL", "--")
        if not self.jailed:
            enter = ("nsenter", f"--net=/run/netns/{self.slot.netns}", "--") if self.slot else ()
            return [*die_with_parent, *enter, str(firecracker), "--id", self.id, *arguments]
        return [
            *die_with_parent,
            "prlimit", "--core=0", "--",
            "nsenter", f"--mount=/proc/self/fd/{mounts}", "--",
            "unshare", "--pid", "--fork", "--kill-child", "--",
            "unshare", "--fork", "--",
            str(jailer), "--id", self.id, "--exec-file", str(firecracker),
            "--uid", str(self.uid), "--gid", str(self.uid), "--chroot-base-dir", str(self.dir / "jail"),
            *(("--netns", f"/run/netns/{self.slot.netns}") if self.slot else ()),
            "--resource-limit", f"fsize={max(spec.disk_mb, spec.memory_mb, 64) << 20}",
            "--resource-limit", "no-file=256",
            *cgroups.jailer_arguments(spec),
            "--", *arguments,
        ]  # fmt: skip


def remove(dir: Path) -> None:
    """Remove what is left of a VM outside its directory, and its chroots. Its processes must be dead. Idempotent."""
    cgroups.remove(dir)
    for chroot in dir.glob(f"jail/{NAME}/*"):
        cgroups.remove_jailers(chroot.name)
    shutil.rmtree(dir / "jail", ignore_errors=True)


def holds(dir: Path, pid: int) -> bool:
    """Is the root of process ``pid`` a chroot in this VM's directory? True also before the VM has a tap or a record."""
    with contextlib.suppress(OSError):
        root = Path(f"/proc/{pid}/root").stat()
        return any(os.path.samestat(root, own.stat()) for own in dir.glob(f"jail/{NAME}/*/root"))
    return False


# --- mounts -----------------------------------------------------------------------------------------------------------


def _bind(root: Path, files: Sequence[JailFile]) -> int:
    """Runs in a thread of its own, which ends in the new namespace. ~1 ms."""
    check(libc().unshare(CLONE_NEWNS), "unshare")
    # Slave: what is unmounted on the host (another VM's network namespace) is unmounted here as well.
    mount(None, b"/", MS_SLAVE | MS_REC)
    for file in files:
        target = bytes(root / file.name)
        mount(bytes(file.source), target, MS_BIND)
        if not file.writable:
            mount(None, target, MS_REMOUNT | MS_BIND | MS_RDONLY)
    return os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
