"""`swarm doctor --production`: can this host run agents of people who don't trust each other?

The checks follow Firecracker's production host set-up document (docs/prod-host-setup.md in its repository), each with
its reason and its fix. A failure is something by which a guest could read or disturb another; a warning costs speed or
a second line of defence. Everything is read from /proc and /sys, below ``root``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from swarm.doctor.check import Check, fail, ok, warn

# What Firecracker's project tests on (docs/kernel-policy.md): 5.10 and newer long-term kernels.
_MIN_KERNEL = (5, 10)
# docs/system/security.rst of QEMU: users without virtualization must not rely on it to isolate guests.
_EMULATION = "QEMU without KVM is no security boundary, by its own project's word"
_CONTROLLERS = ("cpu", "io", "memory", "pids")
_LOW_ENTROPY_BITS = 128  # since Linux 5.18 the pool reports 256 once it is seeded, and stays there


class _Host:
    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, path: str) -> str | None:
        """Content of a small file; None if this kernel does not have it."""
        try:
            return (self.root / path).read_text().strip()
        except OSError:
            return None

    def chosen(self, path: str) -> str | None:
        """The word in brackets, by which sysfs marks the chosen value."""
        found = re.search(r"\[(\S+)\]", self.read(path) or "")
        return found[1] if found else None


def examine(*, jailed: bool, jailer: str | None, hole: str = "", root: Path = Path("/")) -> list[Check]:
    """Every check. ``jailed`` is the setting; ``jailer`` the jailer's version, None if it is not installed; ``hole``:
    what is known to be wrong with that version."""
    host = _Host(root)
    checks: list[Callable[[_Host], Check]] = [
        _kernel, _kvm, _smt, _ksm, _swap, _huge_pages, _seccomp, lambda _: _jailer(jailed, jailer, hole), _cgroups,
        _entropy,
    ]  # fmt: skip
    return [*(check(host) for check in checks), *_mitigations(host)]


def _kernel(host: _Host) -> Check:
    name, release = "kernel version", host.read("proc/sys/kernel/osrelease") or ""
    found = re.match(r"(\d+)\.(\d+)", release)
    if found and (int(found[1]), int(found[2])) >= _MIN_KERNEL:
        return ok(name, release)
    wanted = ".".join(map(str, _MIN_KERNEL))
    return fail(
        name,
        f"{release or 'unknown'}: Firecracker is tested on {wanted} and newer; guests could use holes in older KVMs",
        f"install a supported kernel, {wanted} or newer",
    )


def _kvm(host: _Host) -> Check:
    name = "KVM"
    if not (host.root / "dev/kvm").exists():
        return fail(
            name,
            f"/dev/kvm does not exist: Firecracker can't run guests, and {_EMULATION}",
            "use a host with hardware virtualisation",
        )
    if (
        not re.search(r"^(flags|Features)\s*:.*\b(vmx|svm)\b", host.read("proc/cpuinfo") or "", re.M)
        and not (host.root / "sys/firmware/devicetree/base").exists()
    ):
        return warn(
            name,
            f"/dev/kvm exists, but the CPU has neither VMX nor SVM: this KVM is not fit for production; {_EMULATION}",
        )
    return ok(name, "with hardware virtualisation")


def _smt(host: _Host) -> Check:
    name, control = "SMT", host.read("sys/devices/system/cpu/smt/control")
    if control in ("forceoff", "off", "notsupported", "notimplemented") or control is None:
        return ok(name, f"off ({control or 'this CPU has none'})")
    if host.read("sys/devices/system/cpu/smt/active") == "0":
        return ok(name, f"not active ({control})")
    return fail(
        name,
        "is on: two VMs can share a core's caches and buffers, and learn each other's data from them",
        "echo off > /sys/devices/system/cpu/smt/control   (permanently: nosmt=force on the host kernel's command line)",
    )


def _ksm(host: _Host) -> Check:
    name, run = "KSM", host.read("sys/kernel/mm/ksm/run")
    if run in (None, "0"):
        return ok(name, "off")
    return fail(
        name,
        "is on: equal pages of different VMs are merged, and write times reveal to a guest what another has in memory",
        "echo 2 > /sys/kernel/mm/ksm/run && echo 0 > /sys/kernel/mm/ksm/run",
    )


def _swap(host: _Host) -> Check:
    name, lines = "swap", (host.read("proc/swaps") or "").splitlines()[1:]
    devices = [line.split()[0] for line in lines if line.split()]
    if not devices:
        return ok(name, "none")
    return fail(
        name,
        f"{', '.join(devices)}: a guest's memory, secrets included, can be written to disk and remain there",
        "swapoff -a   (and remove it from /etc/fstab, or encrypt it)",
    )


def _huge_pages(host: _Host) -> Check:
    name = "huge pages"
    transparent = host.chosen("sys/kernel/mm/transparent_hugepage/enabled")
    reserved = host.read("proc/sys/vm/nr_hugepages") or "0"
    detail = f"transparent: {transparent or 'not supported'}, reserved: {reserved}"
    if transparent == "always":
        return warn(
            name,
            f"{detail}: the first write to a page of 2 MiB copies all of it, so clones share less and start slower",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    return ok(name, detail)


def _seccomp(host: _Host) -> Check:
    name, actions = "seccomp", host.read("proc/sys/kernel/seccomp/actions_avail")
    if actions and "trap" in actions.split() and "kill_process" in actions.split():
        return ok(name, "filters work; Swarm never turns Firecracker's off")
    return fail(
        name,
        "this kernel can't filter system calls: a guest that breaks out of Firecracker can make any of them",
        "use a kernel with CONFIG_SECCOMP_FILTER=y",
    )


def _jailer(jailed: bool, version: str | None, hole: str) -> Check:
    name = "jailer"
    if not jailed:
        return fail(
            name,
            "is switched off: Firecracker runs as root and sees the whole host",
            "remove `jailer` from swarm.toml and SWARM_JAILER from the environment",
        )
    if version is None:
        return fail(name, "is not installed: Swarm does not use Firecracker without it", "swarm install firecracker")
    if hole:
        return fail(name, f"{version} has a known hole: {hole}", "swarm install firecracker")
    return ok(name, f"{version}: each VM has its own chroot, namespaces, cgroup and uid")


def _cgroups(host: _Host) -> Check:
    name, controllers = "cgroup v2", host.read("sys/fs/cgroup/cgroup.controllers")
    if controllers is None:
        return warn(
            name,
            "is not mounted at /sys/fs/cgroup: the jailer uses version 1, which can neither limit a VM's disk by weight"
            " nor count its page cache and network buffers as its memory",
            "boot the host with systemd.unified_cgroup_hierarchy=1",
        )
    missing = [c for c in _CONTROLLERS if c not in controllers.split()]
    if missing:
        fix = f"echo '{' '.join('+' + c for c in missing)}' > /sys/fs/cgroup/cgroup.subtree_control"
        return warn(name, f"lacks {', '.join(missing)}: VMs are not limited by it", fix)
    return ok(name, f"limits each VM's {', '.join(_CONTROLLERS)}")


def _entropy(host: _Host) -> Check:
    name, available = "entropy", host.read("proc/sys/kernel/random/entropy_avail")
    if available is not None and int(available) < _LOW_ENTROPY_BITS:
        return warn(
            name,
            f"{available} bits: guests get their seeds from this pool, and wait for it",
            "apt-get install rng-tools5   (or give the host a hardware random number generator)",
        )
    source = host.read("sys/class/misc/hw_random/rng_current")
    hardware = f", fed by {source}" if source and source != "none" else ""
    return ok(name, f"the pool is full{hardware}; each VM gets 64 fresh bytes and a virtio-rng device")


def _mitigations(host: _Host) -> list[Check]:
    """One check for each vulnerability of the CPU that is neither absent nor mitigated, and one for all others."""
    place = host.root / "sys/devices/system/cpu/vulnerabilities"
    checks = []
    fine = []
    for file in sorted(place.iterdir()) if place.is_dir() else []:
        text = (host.read(str(file.relative_to(host.root))) or "").split("\n")[0]
        if text.startswith(("Not affected", "Mitigation")) and "SMT vulnerable" not in text:
            fine.append(file.name)
        elif text.startswith("Unknown") or not text:
            checks.append(
                warn(
                    f"mitigation: {file.name}",
                    f"{text or 'unknown'}: the hypervisor below this host decides",
                    "ask its operator",
                )
            )
        else:
            checks.append(
                fail(
                    f"mitigation: {file.name}",
                    f"{text}: a guest may read memory of the host or of other guests",
                    "update kernel and CPU microcode, boot without mitigations=off"
                    + ("; switch SMT off" if "SMT vulnerable" in text else ""),
                )
            )
    if not place.is_dir():
        return [warn("mitigations", "this kernel does not report its CPU's vulnerabilities", "use a newer kernel")]
    return [ok("mitigations", f"{len(fine)} vulnerabilities mitigated or absent: {', '.join(fine)}"), *checks]
