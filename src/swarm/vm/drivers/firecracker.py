"""Driver `firecracker`: Firecracker microVMs, each under its jailer (see jailer.py), driven by its API.

Every VM has the same names for its files in its chroot and for the tap in its namespace, so the names in a template's
snapshot are right for each clone. A clone's memory is the template's file, mapped private: the kernel copies on write,
and all clones share the pages that they have not written.

Needs Firecracker 1.12 (`network_overrides` of /snapshot/load). Newer versions have removed nothing that is used here:
`mem_backend` replaced the deprecated `mem_file_path`, and the additions to /snapshot/load (`vsock_override`,
`track_dirty_pages`, `huge_pages`, `clock_realtime`) are optional.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swarm.base import priority, process, sparse
from swarm.base.aio import stoppable
from swarm.base.log import logger
from swarm.errors import HostError, SwarmError
from swarm.vm import driver
from swarm.vm.driver import Probe, Slot, Snapshot, Template, VmSpec
from swarm.vm.drivers import jailer
from swarm.vm.drivers.console import Console
from swarm.vm.drivers.disk import WORK_DISK, copy_work_disk, make_work_disk
from swarm.vm.drivers.firecracker_vm import DISK_FILE, LOG_FILE, MEMORY_FILE, SOCKET, STATE_FILE, FirecrackerVm
from swarm.vm.drivers.jailer import Jail, JailFile

log = logger(__name__)

PROGRAM, JAILER = "firecracker", "jailer"
MIN_VERSION = (1, 12)
# First and last version with a hole, and its name.
HOLES = (((0, 0, 0), (1, 13, 1), "CVE-2026-1386"), ((1, 14, 0), (1, 14, 0), "CVE-2026-1386"))
KERNEL, INITRAMFS, ROOT, WORK, LAYER = "vmlinux", "initramfs", "root.erofs", WORK_DISK, "layer.erofs"
NET_ID = "eth0"
# How a guest ends its VM (Firecracker's only reset is the keyboard controller's), and devices that it need not probe.
_BOOT_ARGS = ("console=ttyS0", "reboot=k", "pci=off", "i8042.noaux", "i8042.nomux", "i8042.dumbkbd")
_KVM_GET_API_VERSION = 0xAE00  # linux/kvm.h

Requests = dict[str, dict[str, Any]]  # API path -> body


class FirecrackerDriver:
    """See `swarm.vm.driver.Driver`. ``jailed`` False runs VMMs as root without a jail: only for debugging.
    ``holes_allowed`` takes versions with known holes: only for tests."""

    name = "firecracker"
    networked = True

    def __init__(self, *, disk_cache: Path, jailed: bool = True, holes_allowed: bool = False) -> None:
        self._disk_cache = disk_cache
        self._jailed = jailed
        self._holes_allowed = holes_allowed

    async def probe(self) -> Probe:
        def no(reason: str) -> Probe:
            return Probe(usable=False, reason=reason, accelerator="kvm")

        try:
            check_kvm()
            version = await version_of(PROGRAM)
            jailer_version = await version_of(JAILER) if self._jailed else version
        except SwarmError as error:
            return no(str(error))
        if tuple(map(int, version.split(".")[:2])) < MIN_VERSION:
            needed = ".".join(map(str, MIN_VERSION))
            return no(f"Firecracker {version} is too old, {needed} or newer is needed: run `swarm install firecracker`")
        if jailer_version != version:
            return no(
                f"Firecracker is version {version} but its jailer {jailer_version}: "
                "`swarm install firecracker` installs both"
            )
        if (hole := hole_in(version)) and not self._holes_allowed:
            return no(f"Firecracker {version} has a known hole ({hole}): run `swarm install firecracker`")
        return Probe(
            usable=True,
            reason=f"Firecracker {version}" + ("" if self._jailed else ", NOT jailed"),
            accelerator="kvm",
            version=version,
            snapshots=True,
        )

    async def boot(
        self,
        spec: VmSpec,
        slot: Slot | None,
        dir: Path,
        *,
        outlive: bool = False,
        for_template: bool = False,
        token: bytes = b"",
    ) -> FirecrackerVm:
        image = spec.image
        if for_template:  # each clone sets its own limits
            spec = dataclasses.replace(spec, disk_mb_per_second=None, network_mb_per_second=None)
        files = [JailFile(KERNEL, image.kernel_elf)]
        if image.initramfs:
            files.append(JailFile(INITRAMFS, image.initramfs))
        vm = await self._start(spec, slot, dir, files, outlive=outlive)
        try:
            for path, body in configuration(spec, networked=slot is not None, token=token).items():
                await vm.api.put(path, **body)
            await vm.api.put("/actions", action_type="InstanceStart")
        except BaseException as error:
            raise await vm.failed(error) from error
        return vm

    async def restore(
        self,
        template: Template,
        slot: Slot | None,
        dir: Path,
        *,
        outlive: bool = False,
    ) -> FirecrackerVm:
        return await self._restore(template.spec, template.dir, slot, dir, outlive=outlive)

    async def resume(self, snapshot: Snapshot, slot: Slot | None, dir: Path, *, own: bool) -> FirecrackerVm:
        disk = snapshot.dir / DISK_FILE
        if own:
            link = snapshot.disk_still
            await stoppable(lambda check: sparse.copy_or_link(disk, dir / WORK, link=link, check=check))
        else:
            await copy_work_disk(disk, dir / WORK)
        for name in (MEMORY_FILE, STATE_FILE):  # each VM has another uid; the directory is root's alone
            (snapshot.dir / name).chmod(0o444)
        return await self._restore(snapshot.spec, snapshot.dir, slot, dir, outlive=False)

    async def _restore(
        self, spec: VmSpec, place: Path, slot: Slot | None, dir: Path, *, outlive: bool
    ) -> FirecrackerVm:
        files = [JailFile(name, place / name) for name in (MEMORY_FILE, STATE_FILE)]
        vm = await self._start(spec, slot, dir, files, outlive=outlive)
        limits = limiters(spec)
        try:
            await vm.api.put(
                "/snapshot/load",
                snapshot_path=STATE_FILE,
                mem_backend={"backend_type": "File", "backend_path": MEMORY_FILE},
                network_overrides=[{"iface_id": NET_ID, "host_dev_name": driver.TAP_NAME}] if slot else [],
                resume_vm=not limits,
            )
            if limits:  # the template has none
                for path, body in limits.items():
                    if slot or not path.startswith("/network"):
                        await vm.api.patch(path, **body)
                await vm.api.patch("/vm", state="Resumed")
        except BaseException as error:
            raise await vm.failed(error) from error
        return vm

    async def _start(
        self,
        spec: VmSpec,
        slot: Slot | None,
        dir: Path,
        files: Sequence[JailFile],
        *,
        outlive: bool,
    ) -> FirecrackerVm:
        """A Firecracker in its jail that answers its API and has no guest yet."""
        firecracker, jailer_path = path_of(PROGRAM), path_of(JAILER) if self._jailed else Path()
        if not self._jailed:
            log.warning("firecracker runs as root without its jail", dir=str(dir))
        work, log_file = dir / WORK, dir / LOG_FILE
        if not work.exists():
            await make_work_disk(work, size_mb=spec.disk_mb, cache=self._disk_cache)
        log_file.touch(mode=0o600)
        jail = Jail(dir, slot=slot, uid=driver.BASE_UID + (slot.n if slot else 0), jailed=self._jailed)
        console = None if outlive else Console(dir / "console.log")
        out = os.open(dir / "console.log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600) if outlive else None
        mounts: int | None = None
        try:
            own = [
                JailFile(ROOT, spec.image.root),
                JailFile(WORK, work, writable=True),
                JailFile(LOG_FILE, log_file, writable=True),
            ]
            if spec.layer:
                own.append(JailFile(LAYER, spec.layer.path))
            mounts = await jail.add([*files, *own])
            arguments = ["--api-sock", SOCKET, "--log-path", LOG_FILE, "--level", "Warn"]
            child = await process.spawn(
                jail.argv(firecracker, jailer_path, spec, arguments, mounts=mounts, outlive=outlive),
                output=dir / "jailer.log",
                stdout=console.fileno() if console else out,
                cwd=None if self._jailed else jail.root,
                pass_fds=[mounts] if mounts is not None else [],
                die_with_parent=False,  # the jail's argv does it
                deaf=not outlive,
                lower_by=priority.BELOW_ENGINE,
            )
        except BaseException:
            if console:
                console.close()
            await asyncio.to_thread(jailer.remove, dir)
            raise
        finally:
            for fd in (mounts, out):
                if fd is not None:
                    os.close(fd)
        if console:
            console.started()
        memory_bytes = spec.memory_mb << 20
        vm = FirecrackerVm(child=child, dir=dir, jail=jail, console=console, slot=slot, memory_bytes=memory_bytes)
        try:
            await vm.connect()
        except BaseException as error:
            raise await vm.failed(error) from error
        return vm


def configuration(spec: VmSpec, *, networked: bool, token: bytes = b"") -> Requests:
    """The requests that describe a VM, in order. No vsock: agentd is reached over the network."""
    boot = {"kernel_image_path": KERNEL, "boot_args": driver.kernel_command_line(spec, *_BOOT_ARGS, token=token)}
    if spec.image.initramfs:
        boot["initrd_path"] = INITRAMFS
    requests: Requests = {
        "/machine-config": {"vcpu_count": spec.vcpus, "mem_size_mib": spec.memory_mb, "smt": False},
        "/boot-source": boot,
    }
    # The kernel's arguments name the root (or the initramfs knows it); is_root_device would add its own.
    for drive, file in (("root", ROOT), ("work", WORK), *([("layer", LAYER)] if spec.layer else [])):
        body = {"drive_id": drive, "path_on_host": file, "is_root_device": False, "is_read_only": drive != "work"}
        requests[f"/drives/{drive}"] = body
    if networked:
        card = {"iface_id": NET_ID, "guest_mac": driver.GUEST_MAC, "host_dev_name": driver.TAP_NAME}
        requests[f"/network-interfaces/{NET_ID}"] = card
    if spec.entropy:
        requests["/entropy"] = {}
    for path, limit in limiters(spec).items():
        if path in requests:
            requests[path] |= limit
    return requests


def limiters(spec: VmSpec) -> Requests:
    """Requests that set the agent's limits on disk and network, as in `configuration`; none without limits."""

    def bucket(mb_per_second: float) -> dict[str, Any]:
        # A token bucket that refills over a second, so a burst of one second's worth passes at once.
        return {"bandwidth": {"size": max(1, round(mb_per_second * 1e6)), "refill_time": 1000}}

    requests: Requests = {}
    if spec.disk_mb_per_second is not None:
        requests["/drives/work"] = {"drive_id": "work", "rate_limiter": bucket(spec.disk_mb_per_second)}
    if spec.network_mb_per_second is not None:
        both = {name: bucket(spec.network_mb_per_second) for name in ("rx_rate_limiter", "tx_rate_limiter")}
        requests[f"/network-interfaces/{NET_ID}"] = {"iface_id": NET_ID, **both}
    return requests


def check_kvm() -> None:
    """Raises HostError if /dev/kvm can't be used. Even if it can, a guest may not run: see choose.py."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise HostError("this host has no /dev/kvm") from None
    except OSError as error:
        raise HostError(f"can't open /dev/kvm: {error.strerror}") from None
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    except OSError as error:
        raise HostError(f"/dev/kvm does not answer: {error.strerror}") from None
    finally:
        os.close(fd)
    if version != 12:
        raise HostError(f"/dev/kvm has API version {version}; Firecracker needs 12")


def path_of(program: str) -> Path:
    path = process.which(program)
    if path is None:
        raise HostError(f"{program} is not installed: run `swarm install firecracker`")
    return Path(path).resolve()


def hole_in(version: str) -> str:
    """The names of a version's known holes; '' without."""
    number = tuple(map(int, version.split(".")))
    return ", ".join(name for first, last, name in HOLES if first <= number <= last)


async def version_of(program: str) -> str:
    """The version of firecracker or jailer, as '1.12.1'. Raises HostError if it isn't installed or prints none."""
    done = await process.run([str(path_of(program)), "--version"], check=False, timeout_seconds=10)
    version = re.search(r"v(\d+\.\d+\.\d+)", done.stdout.decode(errors="replace"))
    if not version:
        output = (done.stdout or done.stderr).decode(errors="replace")
        raise HostError(f"`{program} --version` printed no version: {output[:200]!r}")
    return version[1]
