"""Checks of the machine: rights, programs, KVM, kernel features, forwarding, disk, memory."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import resource
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from swarm.base import cgroup, files
from swarm.base.process import run, which
from swarm.doctor.check import Check, Status, fail, ok, warn
from swarm.engine.room import available_bytes
from swarm.errors import SwarmError
from swarm.vm.network import lacks

_KVM_GET_API_VERSION = 0xAE00  # linux/kvm.h
_GIB = 1 << 30
_DESCRIPTORS = 256
_THREADS_OF_A_VM = 16  # of QEMU with some for its disk, of the engine, and of what starts it


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    program: str
    package: str  # in Debian
    version: tuple[str, ...]  # arguments that print its version
    only_for: str = ""  # the command that needs it
    optional: bool = False  # many hosts do without that command


TOOLS: Sequence[Tool] = (
    Tool(program="qemu-system-x86_64", package="qemu-system-x86", version=("--version",)),
    Tool(program="nft", package="nftables", version=("--version",)),
    Tool(program="ip", package="iproute2", version=("-V",)),
    Tool(program="nsenter", package="util-linux", version=("--version",)),
    Tool(program="setpriv", package="util-linux", version=("--version",)),
    Tool(program="ldd", package="libc-bin", version=("--version",)),
    Tool(program="mkfs.ext4", package="e2fsprogs", version=("-V",)),
    Tool(program="ssh", package="openssh-client", version=("-V",)),
    Tool(program="ping", package="iputils-ping", version=("-V",)),
    Tool(program="mmdebstrap", package="mmdebstrap", version=("--version",), only_for="swarm image build"),
    Tool(program="mkfs.erofs", package="erofs-utils", version=("-V",), only_for="swarm image build"),
    *(
        Tool(program=program, package=program, version=("--version",), only_for=f"swarm image {command}", optional=True)
        for command, programs in (
            ("import", ("skopeo", "umoci")),
            ("build --dockerfile", ("buildah", "crun", "slirp4netns")),
        )
        for program in programs
    ),
)

# Name, kernel modules, command, its input. Each is tried in a temporary network namespace.
_KERNEL_FEATURES: Sequence[tuple[str, str, tuple[str, ...], str]] = (
    ("tap", "tun", ("ip", "tuntap", "add", "probe", "mode", "tap"), ""),
    ("bridge", "bridge", ("ip", "link", "add", "probe", "type", "bridge"), ""),
    ("veth", "veth", ("ip", "link", "add", "probe", "type", "veth", "peer", "name", "probe2"), ""),
    (
        "nftables address rewriting",
        "nf_tables",
        ("nft", "-f", "-"),
        "table ip probe {\n chain c {\n type filter hook prerouting priority raw;\n ip daddr set 192.0.2.1\n }\n}\n",
    ),
    (
        "nftables ingress",
        "nf_tables",
        ("nft", "-f", "-"),
        'table netdev probe {\n chain c {\n type filter hook ingress device "lo" priority filter;\n }\n}\n',
    ),
)


async def examine(*, state_dir: Path, images_dir: Path, data_dir: Path) -> list[Check]:
    rights = _rights()
    # Without root each would be refused, whatever the kernel can do.
    tried = _KERNEL_FEATURES if rights[0].status is Status.OK else ()
    tools, features = await asyncio.gather(
        asyncio.gather(*(_tool(tool) for tool in TOOLS)),
        asyncio.gather(*(_feature(*feature) for feature in tried)),
    )
    if not tried:
        features = [warn("kernel", "its features were not tried: that needs root", rights[0].fix)]
    places = disks(state_dir, images_dir, data_dir)
    return [*rights, *tools, _kvm(), *features, _forwarding(), *places, _memory(), _cpus(), _processes(), *_ulimits()]


def _rights() -> list[Check]:
    """What must be there before a VM can be made; the first is about root's rights."""
    checks = []
    for name, judge in lacks.CHECKS.items():
        lack = judge()
        checks.append(ok(name, "as VMs need it") if lack is None else fail(name, lack.what, lack.fix))
    return checks


async def _tool(tool: Tool) -> Check:
    name, fix = f"program {tool.program}", f"apt-get install --no-install-recommends {tool.package}"
    if which(tool.program) is None:
        if tool.optional:
            return ok(name, f"is not there: only `{tool.only_for}` needs it ({fix})")
        if tool.only_for:
            return warn(name, f"is missing: only `{tool.only_for}` needs it", fix)
        return fail(name, "is missing", fix)
    try:
        done = await run([tool.program, *tool.version], check=False, timeout_seconds=20)
    except SwarmError as error:
        return fail(name, f"can't be run: {error}", f"apt-get install --reinstall {tool.package}")
    line = (done.stdout or done.stderr).decode(errors="replace").strip().split("\n")[0]
    version = re.search(r"\d+(\.\d+)+\S*|\d{6,}", line)
    return ok(name, f"{version[0].strip('(),') if version else line} (package {tool.package})")


def _kvm() -> Check:
    slow = "QEMU runs VMs without it (TCG): a cold boot takes seconds, and CPU-bound agents are about 10 times slower"
    if not Path("/dev/kvm").exists():
        return warn(
            "KVM",
            f"/dev/kvm does not exist. {slow}",
            "use a host with hardware virtualisation; in a VM, enable nested virtualisation",
        )
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return warn("KVM", f"/dev/kvm can't be opened: {error.strerror}. {slow}", "run as root")
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    except OSError as error:
        return warn("KVM", f"/dev/kvm does not answer: {error.strerror}. {slow}")
    finally:
        os.close(fd)
    cpu = Path("/proc/cpuinfo").read_text()
    if not re.search(r"\b(vmx|svm)\b", cpu):
        return warn(
            "KVM",
            f"/dev/kvm answers (API {version}), but this CPU has neither VMX nor SVM: KVM without hardware, where"
            f" stock kernels may not boot. A probe boot decides; if it fails, {slow}",
        )
    return ok("KVM", f"/dev/kvm answers (API {version}), with hardware virtualisation; a probe boot decides")


async def _feature(name: str, modules: str, argv: tuple[str, ...], text: str) -> Check:
    name = f"kernel: {name}"
    if which(argv[0]) is None:
        return warn(name, f"was not tried: the program {argv[0]} is missing")
    try:
        await run(["unshare", "--net", "--", *argv], input=text.encode(), timeout_seconds=20)
    except SwarmError as error:
        return fail(name, f"this kernel refused it: {str(error).rpartition(': ')[2]}", f"modprobe -a {modules}")
    return ok(name, "works")


def _forwarding() -> Check:
    value = Path("/proc/sys/net/ipv4/ip_forward").read_text().strip()
    if value == "1":
        return ok("ip_forward", "on")
    # The host reaches its VMs directly, each namespace forwards by itself (checked per VM), and egress is a proxy.
    return ok("ip_forward", "off; Swarm does not need it")


def disks(state_dir: Path, images_dir: Path, data_dir: Path) -> list[Check]:
    """Free space for VMs, images, the database with the engine's log (``data_dir``), and temporary files."""
    checks = []
    for name, directory, wanted in (
        ("disk: VMs", state_dir, 4 * _GIB),
        ("disk: images", images_dir, 2 * _GIB),
        ("disk: database", data_dir, _GIB),
        ("disk: temporary files", Path(os.environ.get("TMPDIR") or "/tmp"), _GIB // 4),
    ):
        there = _existing(directory)
        free = shutil.disk_usage(there).free
        detail = f"{free / _GIB:.1f} GiB free for {directory}"
        if directory == state_dir and there.stat().st_dev == _existing(data_dir).stat().st_dev:
            detail += "; the database is on the same disk, so VMs that fill it stop every ticket"
        move = "set TMPDIR to another" if name == "disk: temporary files" else "move the directory (swarm.toml)"
        fix = f"free space on the disk of {there}, or {move}"
        if free < wanted / 8:
            checks.append(fail(name, detail, fix))
        elif free < wanted:
            checks.append(warn(name, f"{detail}; {wanted / _GIB:g} GiB are recommended", fix))
        else:
            checks.append(ok(name, detail))
    return [*checks, *_mounts(state_dir, images_dir, data_dir)]


def _mounts(state_dir: Path, images_dir: Path, data_dir: Path) -> list[Check]:
    """Only what is wrong."""
    checks = []
    for name, directory in (("VMs", state_dir), ("images", images_dir), ("database", data_dir)):
        if files.mounted(directory, "ro"):
            fix = "`mount -o remount,rw …`; in a service, ReadWritePaths"
            checks.append(fail(f"mount: {name}", f"{directory} is on a file system that is mounted read-only", fix))
        elif directory != data_dir and (options := files.mounted(directory, "noexec", "nodev")):
            needed = "Firecracker's jail is there (QEMU doesn't mind)"
            if directory == images_dir:
                needed = "images and layers can't be built there (those that are built can be used)"
            fix = "`mount -o remount,exec,dev …`, or move the directory (swarm.toml)"
            detail = f"{directory} is on a file system that is mounted {options}: {needed}"
            checks.append(warn(f"mount: {name}", detail, fix))
    return checks


def _existing(directory: Path) -> Path:
    return next(p for p in (directory, *directory.parents) if p.exists())


def _memory() -> Check:
    host, limits = psutil.virtual_memory().available, cgroup.memory_limits()
    available = available_bytes(limits)
    detail = f"{available / _GIB:.1f} GiB available; a VM with 256 MB uses 60 to 330 MB"
    fix = "free memory, or add some: not one VM fits"
    if available < host:
        limit = min(limit.bytes for limit in limits)
        detail += f"; the host has {host / _GIB:.1f} GiB, but a control group limits this process to {limit >> 20} MiB"
        fix = "raise the limit of the control group (memory.max, systemd's MemoryMax, a container's --memory)"
    if available < 400 << 20:
        return fail("memory", detail, fix)
    return ok("memory", detail) if available > _GIB else warn("memory", detail)


def _cpus() -> Check:
    ours, host = cgroup.cpus(), os.cpu_count() or 1
    if ours < host:
        why = "an affinity mask or the quota of a control group says so"
        return ok("CPUs", f"{ours:g} of the host's {host} may be used ({why}): --max-vms counts with those")
    return ok("CPUs", f"{host}")


def _processes() -> Check:
    left = cgroup.processes_left()
    if left is None:
        return ok("processes", "no control group limits their number")
    detail = f"control groups allow {left} more processes and threads; a VM takes up to {_THREADS_OF_A_VM}"
    wanted = _THREADS_OF_A_VM * max(1, int(2 * cgroup.cpus()))
    if left >= wanted:
        return ok("processes", detail)
    fix = "raise the limit (pids.max, systemd's TasksMax, a container's --pids-limit)"
    if left < _THREADS_OF_A_VM:
        return fail("processes", detail, fix)
    return warn("processes", f"{detail}: fewer fit than --max-vms starts by default", fix)


def _ulimits() -> list[Check]:
    """Only what is wrong. An engine raises its own limit of descriptors to the hard one."""
    checks = []
    descriptors, size = resource.getrlimit(resource.RLIMIT_NOFILE)[1], resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if descriptors != resource.RLIM_INFINITY and descriptors < _DESCRIPTORS:
        detail = f"at most {descriptors} files can be open at once; a VM takes about 10, an engine 50"
        checks.append(warn("limit: open files", detail, "raise it: `ulimit -n`, systemd's LimitNOFILE"))
    if size != resource.RLIM_INFINITY:
        detail = f"no file can grow beyond {size:,} bytes: neither the database nor disks and memory of VMs"
        checks.append(fail("limit: file size", detail, "lift it: `ulimit -f unlimited`, systemd's LimitFSIZE"))
    return checks
