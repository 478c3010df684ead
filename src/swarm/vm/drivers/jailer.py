"""Firecracker's jail: what one VMM process may see of this host, and how nothing of it stays.

::

    vms/<n>/jail/firecracker/vm<n>-<6 hex>/root/    its chroot: an empty directory, but for
        dev/kvm, dev/net/tun, dev/urandom           made by the jailer, owned by the VM's uid
        firecracker, api.sock                       the jailer's copy of the binary; the API
        vmlinux, root.erofs, work.ext4, memory …    mount points of single files

    swarm ── unshare --pid ── unshare ── jailer, which becomes firecracker
             our child        pid 1 of   VM's uid, chroot, netns, cgroup, seccomp
                              its own namespace

Files are bound into the chroot in a mount namespace that only these processes are in, so no mount is ever seen, or
left, on the host: it ends with them. The jailer's change of uid clears the death signal that a child asks for, so not
Firecracker holds it but the two processes above, which stay root: when Swarm dies, however it dies, the kernel kills
the first, that the second, and with pid 1 of a namespace ends everything in it.

What does stay on disk lies below the VM's own directory, where `swarm.vm.slots.sweep` finds it; cgroups are named
like the chroot, so a directory leads to them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swarm.errors import HostError
from swarm.vm.driver import Slot, VmSpec
from swarm.vm.network import netns

NAME = "firecracker"  # the jailer wants it in the binary's name, and makes it a part of the path
CGROUP_PARENT = "swarm"
# Firecracker's own heap, its device queues, page tables of the guest: 6 MB measured, more under load.
_OVERHEAD_MB = 96
_CLONE_NEWNS = 0x00020000  # linux/sched.h
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_SLAVE = 1, 32, 4096, 16384, 1 << 19  # linux/mount.h


@dataclass(frozen=True, slots=True)
class Bound:
    """A file of the host's, seen as ``name`` inside."""

    name: str
    source: Path
    writable: bool = False


class Jail:
    """The chroot of one VM, made below its directory. ``jailed`` False: the same layout with nothing around it."""

    def __init__(self, dir: Path, *, slot: Slot | None, uid: int, jailed: bool = True) -> None:  # noqa: A002
        self.dir = dir
        self.slot = slot
        self.uid = uid
        self.jailed = jailed
        # The name is also that of a cgroup, which is the host's, whatever the state directory: hence the random part.
        self.id = f"vm{slot.n if slot else 0}-{secrets.token_hex(3)}"
        self.root = dir / "jail" / NAME / self.id / "root"
        self.root.mkdir(parents=True, mode=0o711)

    async def furnish(self, files: Sequence[Bound]) -> int | None:
        """Put files into the chroot. Returns a descriptor of the mount namespace in which they are there."""
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
            raise HostError(f"can't furnish the jail {self.root}: {error}") from error

    def argv(
        self,
        firecracker: Path,
        jailer: Path,
        spec: VmSpec,
        arguments: Sequence[str],
        *,
        space: int | None,
        outlive: bool,
    ) -> list[str]:
        """The command that becomes Firecracker, ``arguments`` being its own."""
        inside = ["--id", self.id, *arguments]
        if not self.jailed:
            enter = ["nsenter", f"--net=/run/netns/{self.slot.netns}", "--"] if self.slot else []
            return [*(() if outlive else ("setpriv", "--pdeathsig", "KILL", "--")), *enter, str(firecracker), *inside]
        cgroups = _cgroups(spec)
        return [
            *(() if outlive else ("setpriv", "--pdeathsig", "KILL", "--")),
            "prlimit", "--core=0", "--",
            "nsenter", f"--mount=/proc/self/fd/{space}", "--",
            "unshare", "--pid", "--fork", "--kill-child", "--",
            "unshare", "--fork", "--",
            str(jailer), "--id", self.id, "--exec-file", str(firecracker),
            "--uid", str(self.uid), "--gid", str(self.uid), "--chroot-base-dir", str(self.dir / "jail"),
            *(("--netns", f"/run/netns/{self.slot.netns}") if self.slot else ()),
            "--resource-limit", f"fsize={max(spec.disk_mb, spec.memory_mb, 64) << 20}",
            "--resource-limit", "no-file=256",
            *(("--cgroup-version", str(cgroups.version), "--parent-cgroup", CGROUP_PARENT) if cgroups.values else ()),
            *(word for value in cgroups.values for word in ("--cgroup", value)),
            "--", *arguments,
        ]  # fmt: skip

    def remove(self) -> None:
        remove(self.dir)


def remove(dir: Path) -> None:  # noqa: A002
    """Remove what jails in a VM's directory left: cgroups, chroots. Their processes must be dead. Idempotent."""
    for chroot in dir.glob(f"jail/{NAME}/*"):
        for cgroup in _cgroup_dirs(chroot.name):
            _remove_cgroup(cgroup)
    shutil.rmtree(dir / "jail", ignore_errors=True)


def remove_parents() -> None:
    """Remove the control groups that all jails lie in, unless one is still there (`swarm-cleanup`)."""
    version, root, controllers = _hierarchy()
    for base in [root] if version == 2 else [root / name for name in controllers]:
        with contextlib.suppress(OSError):
            (base / CGROUP_PARENT).rmdir()


def holds(dir: Path, pid: int) -> bool:  # noqa: A002
    """Is the root of process ``pid`` a chroot in this VM's directory? True also before the VM has a tap or a record."""
    with contextlib.suppress(OSError):
        root = Path(f"/proc/{pid}/root").stat()
        return any(os.path.samestat(root, own.stat()) for own in dir.glob(f"jail/{NAME}/*/root"))
    return False


# --- mounts -----------------------------------------------------------------------------------------------------------


def _bind(root: Path, files: Sequence[Bound]) -> int:
    """Runs in a thread of its own, which ends in the new namespace. ~1 ms."""
    libc = _libc()
    _call(libc.unshare(_CLONE_NEWNS), "unshare")
    # Slave: what is unmounted on the host (another VM's network namespace) is unmounted here as well.
    _call(libc.mount(None, b"/", None, _MS_SLAVE | _MS_REC, None), "mount --make-rslave /")
    for file in files:
        target = bytes(root / file.name)
        _call(libc.mount(bytes(file.source), target, None, _MS_BIND, None), f"mount --bind {file.source}")
        if not file.writable:
            _call(libc.mount(None, target, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY, None), f"remount {file.source}")
    return os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p)
    return libc


def _call(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


# --- cgroups ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Cgroups:
    """What this host's control groups can limit. ``values``: the jailer's --cgroup arguments; none when it has none."""

    version: int
    root: Path
    values: tuple[str, ...]
    lacking: tuple[str, ...]


def _cgroups(spec: VmSpec) -> Cgroups:
    # One CPU for each vCPU, and a fifth for the threads that serve its disk and network.
    quota, pids = spec.vcpus * 100_000 + 20_000, spec.vcpus + 16
    memory = (spec.memory_mb + _OVERHEAD_MB) << 20
    wanted: dict[str, tuple[str, str]] = {
        "cpu": (f"cpu.max={quota} 100000", f"cpu.cfs_quota_us={quota}"),
        "memory": (f"memory.max={memory}", f"memory.limit_in_bytes={memory}"),
        "pids": (f"pids.max={pids}", f"pids.max={pids}"),
        "io": ("io.weight=100", ""),
    }
    version, root, controllers = _hierarchy()
    if version == 2:
        values = {name: new for name, (new, _) in wanted.items()}
    else:
        values = {name: old for name, (_, old) in wanted.items() if old}
    lacking = tuple(sorted(set(wanted) - set(controllers)))
    return Cgroups(
        version=version,
        root=root,
        values=tuple(value for name, value in values.items() if name in controllers),
        lacking=lacking,
    )


@functools.cache
def _hierarchy() -> tuple[int, Path, tuple[str, ...]]:
    """Version, where it is mounted, and the controllers that can be used there."""
    v1: dict[str, Path] = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2" and place == "/sys/fs/cgroup":
            controllers = (Path(place) / "cgroup.controllers").read_text().split()
            return 2, Path(place), tuple(controllers)
        if kind == "cgroup":
            v1 |= {name: Path(place) for name in options.split(",") if Path(place).name.split(",").count(name)}
    usable = tuple(name for name in v1 if os.access(v1[name], os.W_OK))
    return 1, Path("/sys/fs/cgroup"), usable


def describe_cgroups() -> tuple[int, tuple[str, ...]]:
    """Version and controllers of this host, for the doctor."""
    version, _, controllers = _hierarchy()
    return version, controllers


def _cgroup_dirs(id: str) -> list[Path]:  # noqa: A002
    version, root, controllers = _hierarchy()
    bases = [root] if version == 2 else [root / name for name in controllers]
    return [place for base in bases if (place := base / CGROUP_PARENT / id).is_dir()]


def _remove_cgroup(place: Path, *, seconds: float = 2.0) -> None:
    """A cgroup is busy until the kernel has buried the last thread in it, perhaps just after its death was seen."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            place.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise HostError(f"can't remove the control group {place}: {error.strerror}") from error
            time.sleep(0.002)
