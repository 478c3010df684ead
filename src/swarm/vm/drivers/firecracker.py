"""Driver `firecracker`: Firecracker microVMs, each under its jailer (see jailer.py), driven by its API.

Inside its chroot every VM finds its files by the same names, and its tap by the same name in its namespace, so what a
snapshot remembers of its template fits each clone. A clone's memory is the template's file, mapped private: copy on
write by the kernel, shared by all clones until they write.

Needs Firecracker 1.12 (`network_overrides` of /snapshot/load). Newer versions took away nothing that is used here:
`mem_backend` replaced the deprecated `mem_file_path`, and what /snapshot/load has gained (`vsock_override`,
`track_dirty_pages`, `huge_pages`, `clock_realtime`) is optional.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from swarm.base import process
from swarm.base.aio import quietly
from swarm.channel.dial import Endpoint
from swarm.errors import BootFailed, HostError, SwarmError
from swarm.vm import driver
from swarm.vm.driver import Probe, Slot, Template, VmSpec
from swarm.vm.drivers.console import Console, last_lines
from swarm.vm.drivers.disk import make_work_disk, move_sparse
from swarm.vm.drivers.jailer import Bound, Jail

if TYPE_CHECKING:
    from swarm.vm.drivers.firecracker_api import Api

log = structlog.get_logger(__name__)

PROGRAM, JAILER = "firecracker", "jailer"
MIN_VERSION = (1, 12)
MEMORY_FILE, STATE_FILE, LOG_FILE = "memory", "state", "firecracker.log"
KERNEL, INITRAMFS, ROOT, WORK, LAYER, SOCKET = (
    "vmlinux", "initramfs", "root.erofs", "work.ext4", "layer.erofs", "api.sock",
)  # fmt: skip
NET_ID = "eth0"
# How a guest ends its VM (Firecracker's only reset is the keyboard controller's), and what it need not look for.
_BOOT_ARGS = ("console=ttyS0", "reboot=k", "pci=off", "i8042.noaux", "i8042.nomux", "i8042.dumbkbd")
_START_SECONDS = 10.0
_SNAPSHOT_SECONDS = 120.0  # it flushes the whole memory to disk
_KVM_GET_API_VERSION = 0xAE00  # linux/kvm.h
_VCPU_FAULT = re.compile(
    r"KVM_EXIT_INTERNAL_ERROR|KVM_EXIT_FAIL_ENTRY|KVM_EXIT_SHUTDOWN|[Uu]nexpected exit|Failure during vcpu"
)


class FirecrackerDriver:
    """See `swarm.vm.driver.Driver`. ``jailed`` False runs VMMs as root without a jail: for debugging alone."""

    name = "firecracker"
    networked = True

    def __init__(self, *, disk_cache: Path, jailed: bool = True) -> None:
        self._disk_cache = disk_cache
        self._jailed = jailed

    async def probe(self) -> Probe:
        def no(reason: str) -> Probe:
            return Probe(usable=False, reason=reason, accelerator="kvm")

        try:
            check_kvm()
            version = await version_of(PROGRAM)
            jailer = await version_of(JAILER) if self._jailed else version
        except SwarmError as error:
            return no(str(error))
        if tuple(map(int, version.split(".")[:2])) < MIN_VERSION:
            needed = ".".join(map(str, MIN_VERSION))
            return no(f"Firecracker {version} is too old, {needed} or newer is needed: `swarm install firecracker`")
        if jailer != version:
            return no(f"Firecracker is {version} but its jailer {jailer}: `swarm install firecracker` installs a pair")
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
        dir: Path,  # noqa: A002
        *,
        outlive: bool = False,
        for_template: bool = False,
    ) -> FirecrackerVm:
        image = spec.image
        if for_template:  # limits are each clone's own
            spec = dataclasses.replace(spec, disk_mb_per_second=None, network_mb_per_second=None)
        files = [Bound(KERNEL, image.kernel_elf)]
        if image.initramfs:
            files.append(Bound(INITRAMFS, image.initramfs))
        vm = await self._start(spec, slot, dir, files, outlive=outlive)
        try:
            for path, body in configuration(spec, networked=slot is not None):
                await vm.api.put(path, **body)
            await vm.api.put("/actions", action_type="InstanceStart")
        except BaseException as error:
            raise await vm.failed(error) from error
        return vm

    async def restore(
        self,
        template: Template,
        slot: Slot | None,
        dir: Path,  # noqa: A002
        *,
        outlive: bool = False,
    ) -> FirecrackerVm:
        files = [Bound(name, template.dir / name) for name in (MEMORY_FILE, STATE_FILE)]
        vm = await self._start(template.spec, slot, dir, files, outlive=outlive)
        limits = limiters(template.spec)
        try:
            await vm.api.put(
                "/snapshot/load",
                snapshot_path=STATE_FILE,
                mem_backend={"backend_type": "File", "backend_path": MEMORY_FILE},
                network_overrides=[{"iface_id": NET_ID, "host_dev_name": driver.TAP_NAME}] if slot else [],
                resume_vm=not limits,
            )
            if limits:  # of this clone: the template has none
                for path, body in limits:
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
        dir: Path,  # noqa: A002
        files: Sequence[Bound],
        *,
        outlive: bool,
    ) -> FirecrackerVm:
        """A Firecracker in its jail that answers its API and has no guest yet."""
        firecracker, jailer = found(PROGRAM), found(JAILER) if self._jailed else Path()
        if not self._jailed:
            log.warning("firecracker runs as root and without its jail", dir=str(dir))
        work, log_file = dir / WORK, dir / LOG_FILE
        await make_work_disk(work, size_mb=spec.disk_mb, cache=self._disk_cache)
        log_file.touch(mode=0o600)
        jail = Jail(dir, slot=slot, uid=driver.BASE_UID + (slot.n if slot else 0), jailed=self._jailed)
        console = None if outlive else Console(dir / "console.log")
        out = os.open(dir / "console.log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600) if outlive else None
        space: int | None = None
        try:
            own = [
                Bound(ROOT, spec.image.root),
                Bound(WORK, work, writable=True),
                Bound(LOG_FILE, log_file, writable=True),
            ]
            if spec.layer:
                own.append(Bound(LAYER, spec.layer.path))
            space = await jail.furnish([*files, *own])
            arguments = ["--api-sock", SOCKET, "--log-path", LOG_FILE, "--level", "Warn"]
            child = await process.spawn(
                jail.argv(firecracker, jailer, spec, arguments, space=space, outlive=outlive),
                output=dir / "jailer.log",
                stdout=console.fileno() if console else out,
                cwd=None if self._jailed else jail.root,
                pass_fds=[space] if space is not None else [],
                die_with_parent=False,  # the argv says it where it has to be said
            )
        except BaseException:
            if console:
                console.close()
            await asyncio.to_thread(jail.remove)
            raise
        finally:
            for fd in (space, out):
                if fd is not None:
                    os.close(fd)
        if console:
            console.started()
        vm = FirecrackerVm(child=child, dir=dir, jail=jail, console=console, slot=slot)
        try:
            await vm.connect()
        except BaseException as error:
            raise await vm.failed(error) from error
        return vm


def configuration(spec: VmSpec, *, networked: bool) -> list[tuple[str, dict[str, Any]]]:
    """The requests that describe a VM, in order: (path, body). No vsock: agentd is reached over the network."""
    image = spec.image
    boot: dict[str, Any] = {
        "kernel_image_path": KERNEL,
        "boot_args": driver.kernel_command_line(spec, *_BOOT_ARGS),
    }
    if image.initramfs:
        boot["initrd_path"] = INITRAMFS
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/machine-config", {"vcpu_count": spec.vcpus, "mem_size_mib": spec.memory_mb, "smt": False}),
        ("/boot-source", boot),
        # The kernel's arguments name the root (or the initramfs knows it); is_root_device would add its own.
        ("/drives/root", {"drive_id": "root", "path_on_host": ROOT, "is_root_device": False, "is_read_only": True}),
        ("/drives/work", {"drive_id": "work", "path_on_host": WORK, "is_root_device": False, "is_read_only": False}),
    ]
    if spec.layer:
        drive = {"drive_id": "layer", "path_on_host": LAYER, "is_root_device": False, "is_read_only": True}
        requests.append(("/drives/layer", drive))
    if networked:
        card = {"iface_id": NET_ID, "guest_mac": driver.GUEST_MAC, "host_dev_name": driver.TAP_NAME}
        requests.append((f"/network-interfaces/{NET_ID}", card))
    if spec.entropy:
        requests.append(("/entropy", {}))
    for path, body in limiters(spec):
        for there, request in requests:
            if there == path:
                request.update(body)
    return requests


def limiters(spec: VmSpec) -> list[tuple[str, dict[str, Any]]]:
    """Bodies that limit a running VM's disk and network, by the agent's manifest; none when it sets no limit."""

    def bucket(mb_per_second: float) -> dict[str, Any]:
        # A token bucket: refilled over a second, so that a burst of a second's worth goes through at once.
        return {"bandwidth": {"size": max(1, round(mb_per_second * 1e6)), "refill_time": 1000}}

    found: list[tuple[str, dict[str, Any]]] = []
    if spec.disk_mb_per_second is not None:
        found.append(("/drives/work", {"drive_id": "work", "rate_limiter": bucket(spec.disk_mb_per_second)}))
    if spec.network_mb_per_second is not None:
        both = {name: bucket(spec.network_mb_per_second) for name in ("rx_rate_limiter", "tx_rate_limiter")}
        found.append((f"/network-interfaces/{NET_ID}", {"iface_id": NET_ID, **both}))
    return found


class FirecrackerVm:
    """See `swarm.vm.driver.Vm`."""

    def __init__(
        self,
        *,
        child: asyncio.subprocess.Process,
        dir: Path,  # noqa: A002
        jail: Jail,
        console: Console | None,
        slot: Slot | None,
    ) -> None:
        from swarm.vm.drivers.firecracker_api import Api  # here, since importing httpx takes 70 ms

        self.pid = child.pid  # of Firecracker itself once it listens
        self.dir = dir
        self.console = dir / "console.log"
        self.endpoint = Endpoint(host=str(slot.address) if slot else "", port=driver.AGENTD_PORT)
        self.jail = jail
        self.api: Api = Api(jail.root / SOCKET)
        self._child = child
        self._started = 0
        self._reader = console

    async def connect(self) -> None:
        """Return when Firecracker listens. Raises BootFailed when it ends instead."""
        died = asyncio.ensure_future(self._child.wait())
        try:
            async with asyncio.timeout(_START_SECONDS):
                while True:
                    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                        self.pid, uid = self.api.listener()
                        break
                    if died.done():
                        raise BootFailed("Firecracker did not start")
                    await asyncio.wait({died}, timeout=0.001)
        except TimeoutError:
            raise BootFailed(f"Firecracker did not open its API within {_START_SECONDS:g} s") from None
        finally:
            died.cancel()
            await asyncio.gather(died, return_exceptions=True)
        self._started = process.start_time(self.pid) or 0
        if self.jail.jailed and uid != self.jail.uid:
            raise BootFailed(f"Firecracker runs as uid {uid} instead of {self.jail.uid}")

    async def failed(self, error: BaseException) -> BaseException:
        """End this VM; the error to raise, with what Firecracker said."""
        said = self.said()
        await self.kill()
        if isinstance(error, BootFailed):
            error.args = (f"{error}; {said}",)
        return error

    async def printed(self, text: bytes) -> None:
        assert self._reader, "only the console of a VM that ends with this process is read"
        await self._reader.saw(text)

    async def snapshot(self, dir: Path) -> None:  # noqa: A002
        """Write memory and device state into ``dir`` and end this VM."""
        try:
            await self.api.patch("/vm", state="Paused")
            await self.api.put(
                "/snapshot/create",
                timeout_seconds=_SNAPSHOT_SECONDS,
                snapshot_type="Full",
                snapshot_path=STATE_FILE,
                mem_file_path=MEMORY_FILE,
            )
            for name in (MEMORY_FILE, STATE_FILE):
                await asyncio.to_thread(_take, self.jail.root / name, dir / name)
        except OSError as error:
            raise BootFailed(f"the template's files could not be kept: {error}") from error
        finally:
            await self.kill()

    def said(self) -> str:
        """What Firecracker, its jailer and the guest printed last, for an error message."""
        lines = [*last_lines(self.dir / LOG_FILE, lines=3), *last_lines(self.dir / "jailer.log", lines=3)]
        return " | ".join(lines or last_lines(self.console, lines=3)) or "it printed nothing"

    async def wait(self) -> str:
        code = await self._child.wait()
        # A vCPU that dies makes Firecracker stop in good order, with status 0: its log has the truth.
        for line in reversed(last_lines(self.dir / LOG_FILE, lines=20)):
            if _VCPU_FAULT.search(line):
                return f"the guest's CPU failed: {line.partition('] ')[2] or line}"
        return f"Firecracker ended by signal {-code}" if code < 0 else f"Firecracker ended with status {code}"

    async def kill(self) -> None:
        await asyncio.shield(self._kill())

    async def _kill(self) -> None:
        await process.kill(self._child)
        if self._started:  # it dies with the process above it; its files are removed when it has
            await quietly(process.kill_stranger(self.pid, self._started))
        await self.api.close()
        if self._reader:
            self._reader.close()
        await quietly(asyncio.to_thread(self.jail.remove))


def _take(made: Path, target: Path) -> None:
    """Make a file that Firecracker wrote in its chroot ours: read-only, root's, in its place."""
    fd = os.open(made, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchown(fd, 0, 0)
        os.fchmod(fd, 0o444)
    finally:
        os.close(fd)
    move_sparse(made, target)


def check_kvm() -> None:
    """Raises HostError when /dev/kvm can't be used. That it can says little: see choose.py."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise HostError("there is no /dev/kvm") from None
    except OSError as error:
        raise HostError(f"/dev/kvm can't be opened: {error.strerror}") from None
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    except OSError as error:
        raise HostError(f"/dev/kvm does not answer: {error.strerror}") from None
    finally:
        os.close(fd)
    if version != 12:
        raise HostError(f"/dev/kvm has API version {version}; Firecracker needs 12")


def found(program: str) -> Path:
    path = process.which(program)
    if path is None:
        raise HostError(f"{program} is not installed: `swarm install firecracker`")
    return Path(path).resolve()


async def version_of(program: str) -> str:
    """'1.12.1' of firecracker or jailer. Raises HostError when it is not there or says something else."""
    done = await process.run([str(found(program)), "--version"], check=False, timeout_seconds=10)
    said = done.stdout.decode(errors="replace")
    version = re.search(r"v(\d+\.\d+\.\d+)", said)
    if not version:
        raise HostError(
            f"`{program} --version` printed no version: {(said or done.stderr.decode(errors='replace'))[:200]!r}"
        )
    return version[1]
