"""Control groups of VMs: their limits, where they are, and how they are removed.

Firecracker's are made by its jailer, in group `swarm` at the top of each hierarchy: it knows no other place. QEMU's are
made here. With version 1 they are in group `swarm` of the engine's own group, so that a limit which the operator has
set for the engine holds for its VMs too. With version 2 a group that has processes can't limit groups in it. There they
are at the top, unless the engine's own group is limited: then its VMs stay in that.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path

from swarm.base import cgroup
from swarm.base.log import logger
from swarm.errors import HostError
from swarm.vm.driver import VmSpec

log = logger(__name__)

PARENT = "swarm"
FILE = "cgroups"  # in a VM's directory: the paths of the groups made here, each on its line
# Firecracker's own heap, its device queues, the guest's page tables: 6 MB measured, more under load.
_FIRECRACKER_MB = 96
# QEMU's heap and libraries, and 64 MB of translated code: 57 MB measured, more under load.
_QEMU_MB = 256
_QEMU_THREADS = 80  # it may use 64 for disks
_ROOT = Path("/sys/fs/cgroup")


def jailer_arguments(spec: VmSpec) -> list[str]:
    """The jailer's options that limit this VM, as far as the host has controllers for them."""
    version, controllers = usable()
    settings = _settings(spec, version, _FIRECRACKER_MB, spec.vcpus + 16)
    options = [word for name in settings if name in controllers for word in ("--cgroup", settings[name])]
    return ["--cgroup-version", str(version), "--parent-cgroup", PARENT, *options] if options else []


def put(pid: int, dir: Path, name: str, spec: VmSpec) -> None:
    """Make groups that limit a VM with QEMU, as far as this host lets us, and put its process there. ~0.3 ms.

    Without them (it says so once) the VM runs all the same. `remove` finds them by the VM's directory.
    """
    version, controllers = usable()
    settings = _settings(spec, version, _QEMU_MB, _QEMU_THREADS + spec.vcpus)
    if version == 1:  # not `cpu`: there all VMs together would weigh as much as one other process of the host
        own = cgroup.own_groups()
        wanted = [it for it in settings if it != "cpu" and it in controllers and it in own]
        places = {it: _ROOT / it / own[it] for it in wanted}
    elif cgroup.memory_limits() or cgroup.cpus() < (os.cpu_count() or 1):
        places = {}
    else:
        places = {it: _ROOT for it in settings if it in controllers}
    groups = {it: place / PARENT / name for it, place in places.items()}
    if not groups:
        return
    (dir / FILE).write_text("".join(f"{group}\n" for group in set(groups.values())))  # before there is one
    try:
        for group in set(groups.values()):
            _mkdir(group.parent if version == 2 else group)
            if version == 2:
                _enable(list(groups))
                group.mkdir()
        for it, group in groups.items():
            file, _, value = settings[it].partition("=")
            try:
                (group / file).write_text(value)
            except OSError as error:  # this kernel may lack one; the others hold all the same
                _warn_once(str(error))
        for group in set(groups.values()):
            (group / "cgroup.procs").write_text(str(pid))
    except ProcessLookupError:  # it has ended
        pass
    except OSError as error:
        _warn_once(str(error))


def remove(dir: Path) -> None:
    """Remove the groups that `put` made for a VM. Its processes must be dead. Idempotent."""
    try:
        lines = (dir / FILE).read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if Path(line).parent.name == PARENT:
            _remove(Path(line))
            if usable()[0] == 1:
                with contextlib.suppress(OSError):  # another VM's group is in it
                    Path(line).parent.rmdir()
    (dir / FILE).unlink(missing_ok=True)


def remove_jailers(name: str) -> None:
    """Remove the groups that a jailer made. Idempotent."""
    for parent in _top_parents():
        if (parent / name).is_dir():
            _remove(parent / name)


def remove_parents() -> None:
    """Remove the groups that contain those of all VMs, unless one is left (`swarm-cleanup`)."""
    own = [_ROOT / controller / path / PARENT for controller, path in cgroup.own_groups().items()]
    for parent in {*_top_parents(), *own}:
        with contextlib.suppress(OSError):
            parent.rmdir()


@functools.cache
def usable() -> tuple[int, tuple[str, ...]]:
    """The version of this host's control groups, and the controllers that can be used."""
    v1: dict[str, Path] = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mounted, kind, options, *_ = line.split()
        place = Path(mounted)
        if kind == "cgroup2" and place == _ROOT:
            return 2, tuple((place / "cgroup.controllers").read_text().split())
        if kind == "cgroup":
            v1 |= {name: place for name in options.split(",") if name in place.name.split(",")}
    return 1, tuple(name for name in v1 if os.access(v1[name], os.W_OK))


def _settings(spec: VmSpec, version: int, overhead_mb: int, pids: int) -> dict[str, str]:
    """Controller -> 'file=value'."""
    # One CPU for each vCPU, and a fifth of one for the threads that serve disk and network.
    quota, memory = spec.vcpus * 100_000 + 20_000, (spec.memory_mb + overhead_mb) << 20
    if version == 1:
        return {
            "cpu": f"cpu.cfs_quota_us={quota}",
            "memory": f"memory.limit_in_bytes={memory}",
            "pids": f"pids.max={pids}",
        }
    return {
        "cpu": f"cpu.max={quota} 100000",
        "memory": f"memory.max={memory}",
        "pids": f"pids.max={pids}",
    }


def _mkdir(group: Path) -> None:
    """Make a group and the one around it, which a VM that ends may be removing."""
    for attempt in range(20):
        try:
            group.mkdir(parents=True, exist_ok=True)
            return
        except FileNotFoundError:
            if attempt == 19:
                raise


def _enable(controllers: Sequence[str]) -> None:
    """Version 2: let the groups in `swarm` be limited by these. All VMs together weigh half as much as another group of
    the host. Raises OSError if the host does not allow it: as in a container, where processes are at the top."""
    for place in (_ROOT, _ROOT / PARENT):
        enabled = (place / "cgroup.subtree_control").read_text().split()
        for name in controllers:
            if name not in enabled:
                (place / "cgroup.subtree_control").write_text(f"+{name}")
    if "cpu" in controllers:
        (_ROOT / PARENT / "cpu.weight").write_text("50")


def _top_parents() -> list[Path]:
    """Where the groups that jailers make are: one directory for each hierarchy."""
    version, controllers = usable()
    roots = [_ROOT] if version == 2 else [_ROOT / name for name in controllers]
    return [root / PARENT for root in roots]


def _remove(group: Path, *, seconds: float = 2.0) -> None:
    """A cgroup stays busy until the kernel has removed its last thread, perhaps shortly after we saw it die."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            group.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise HostError(f"can't remove the control group {group}: {error.strerror}") from error
            time.sleep(0.002)


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning("VMs run without control groups of their own", reason=reason)
