"""Driver `qemu`: QEMU's microvm machine, with KVM where a guest really boots on it, otherwise without (TCG).

QEMU runs as a uid of its own without capabilities, in its seccomp sandbox, in an empty root and namespaces of its own
(see confine.py). Disks, tap and console are opened here and passed as descriptors, so only root has access to the image
and template directories. QMP runs over an inherited socket pair; nothing can connect to it later.

How clones work (measured in docs/adr/0008-templates.md): the template's memory is a file mapped shared; a clone maps it
private, and QEMU's migration stream without RAM (x-ignore-shared) carries the ~70 KB of device state.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import secrets
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qemu.qmp import QMPError

from swarm.base import process, sparse
from swarm.base.aio import stoppable
from swarm.errors import BootFailed, CommandFailed, HostError
from swarm.vm import driver
from swarm.vm.driver import BASE_UID, Probe, Slot, Snapshot, Template, VmSpec
from swarm.vm.drivers import cgroups, confine
from swarm.vm.drivers.console import Console
from swarm.vm.drivers.disk import WORK_DISK, copy_work_disk, make_work_disk
from swarm.vm.drivers.jailer import JailFile
from swarm.vm.drivers.qemu_vm import DISK_FILE, MEMORY_FILE, START_SECONDS, STATE_FILE, QemuVm
from swarm.vm.drivers.tap import open_tap
from swarm.vm.network.network import limit

PROGRAM = "qemu-system-x86_64"
MIN_VERSION = (7, 2)
KERNEL, INITRAMFS = "kernel", "initramfs"
# Each hook that the guest's kernel runs must first be translated, again in each clone. The VM is the security boundary,
# so the guest kernel's own security modules and accounting are off.
_LEAN = ("lsm=", "apparmor=0", "audit=0", "psi=0", "cgroup_disable=memory")
# TCG translates `rep movsb` to a loop over bytes (erms), and each stac/clac (smap) ends a block of its translation.
EMULATED_CPU = "max,-erms,-smap"


class QemuDriver:
    """See `swarm.vm.driver.Driver`. ``accelerator`` is 'kvm' or 'tcg'."""

    name = "qemu"
    networked = True
    keeps_disk = True  # a template contains the work disk too, so its guest may have it mounted

    def __init__(self, *, accelerator: str, disk_cache: Path) -> None:
        self.accelerator = accelerator
        self._disk_cache = disk_cache

    async def probe(self) -> Probe:
        def no(reason: str) -> Probe:
            return Probe(usable=False, reason=reason, accelerator=self.accelerator)

        try:
            version = await version_of_qemu()
        except (HostError, CommandFailed) as error:
            return no(str(error))
        if tuple(map(int, version.split(".")[:2])) < MIN_VERSION:
            return no(f"QEMU {version} is too old, {'.'.join(map(str, MIN_VERSION))} or newer is needed")
        if self.accelerator == "kvm":
            try:
                _kvm_groups()
            except HostError as error:
                return no(f"QEMU {version}, but {error}")
        return Probe(
            usable=True,
            reason=f"QEMU {version} {'with' if self.accelerator == 'kvm' else 'without'} KVM",
            accelerator=self.accelerator,
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
    ) -> QemuVm:
        image = spec.image
        if for_template:  # each clone sets its own limits
            spec = replace(spec, disk_mb_per_second=None, network_mb_per_second=None)
        args = driver.kernel_command_line(spec, "console=ttyS0", "reboot=t", *_LEAN, *self._emulated(), token=token)
        launch = _Launch(dir, slot, self.accelerator, outlive)
        try:
            memory: Sequence[str] = ()
            if for_template:
                memory = launch.memory(_new_file(dir / MEMORY_FILE, spec.memory_mb << 20), shared=True)
            argv = [
                *self._machine(spec, memory),
                "-kernel", launch.file(KERNEL, image.kernel),
                *(("-initrd", launch.file(INITRAMFS, image.initramfs)) if image.initramfs else ()),
                "-append", args,
                *await self._devices(spec, launch, None),
            ]  # fmt: skip
            return await launch.start(argv, spec)
        except BaseException:
            launch.close()
            raise

    async def restore(self, template: Template, slot: Slot | None, dir: Path, *, outlive: bool = False) -> QemuVm:
        launch = _Launch(dir, slot, self.accelerator, outlive)
        return await self._restore(template.spec, template.dir, template.dir / MEMORY_FILE, launch)

    async def resume(self, snapshot: Snapshot, slot: Slot | None, dir: Path, *, own: bool) -> QemuVm:
        memory = snapshot.dir / MEMORY_FILE
        if own:
            await stoppable(lambda check: sparse.link_or_copy(memory, dir / MEMORY_FILE, check=check))
            disk = snapshot.dir / DISK_FILE
            link = snapshot.disk_still
            await stoppable(lambda check: sparse.copy_or_link(disk, dir / WORK_DISK, link=link, check=check))
            memory = dir / MEMORY_FILE
        launch = _Launch(dir, slot, self.accelerator, outlive=False)
        launch.share(memory)
        return await self._restore(snapshot.spec, snapshot.dir, memory, launch)

    async def _restore(self, spec: VmSpec, files: Path, memory: Path, launch: _Launch) -> QemuVm:
        """``files``: a template's or a snapshot's. Its work disk is copied, unless the VM has one."""
        try:
            mapped = launch.memory(memory, shared=False)
            state = launch.fd(files / STATE_FILE, os.O_RDONLY)
            devices = await self._devices(spec, launch, files / DISK_FILE)
            argv = [*self._machine(spec, mapped), *devices, "-incoming", "defer"]
            vm = await launch.start(argv, spec)
        except BaseException:
            launch.close()
            raise
        try:
            async with asyncio.timeout(START_SECONDS):
                await vm.resume_from(state)
        except BaseException as error:
            await vm.kill()
            if isinstance(error, TimeoutError):
                raise BootFailed(f"the VM did not run within {START_SECONDS:g} s: {vm.last_output()}") from None
            if isinstance(error, QMPError):
                raise BootFailed(f"QEMU could not restore the VM: {error}; {vm.last_output()}") from error
            raise
        return vm

    def _emulated(self) -> list[str]:
        """Kernel arguments for an emulated CPU.

        Without them the kernel measures its TSC against the emulated PIT. On a busy host that measurement fails, and
        the kernel, left without a clock, spins for ever (7 of 12 boots on 2 loaded cores). QEMU passes the host's TSC
        through, so the kernel can be given its frequency, and that it is reliable: otherwise the clock has steps of
        4 ms and the timer interrupt never stops, which costs an idle VM 3 % of a core. Mitigations are off: they
        protect against what an emulated CPU doesn't do.
        """
        if self.accelerator != "tcg":
            return []
        khz = driver.host_tsc_khz()
        clock = [f"tsc_early_khz={khz}"] if khz else []
        if khz and _constant_tsc():
            clock.append("tsc=reliable")
        return [*clock, "mitigations=off", "no5lvl"]

    def _machine(self, spec: VmSpec, memory: Sequence[str]) -> list[str]:
        backed = ",memory-backend=mem" if memory else ""
        return [
            str(_program()),
            "-M", f"microvm,acpi=on,mem-merge=off,dump-guest-core=off{backed}",
            "-accel", self.accelerator if self.accelerator != "tcg" else "tcg,thread=single,tb-size=64",
            "-cpu", "host" if self.accelerator == "kvm" else EMULATED_CPU,
            "-smp", str(spec.vcpus), "-m", str(spec.memory_mb), *memory,
            "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            # The state that it writes of a VM which goes on has no such section, so none may be expected.
            "-global", "migration.send-configuration=off",
            "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ]  # fmt: skip

    async def _devices(self, spec: VmSpec, launch: _Launch, disk: Path | None) -> list[str]:
        """``disk``: the work disk that is copied, unless the VM has one already; None for an empty one."""
        work = launch.dir / WORK_DISK
        if disk is None:
            await make_work_disk(work, size_mb=spec.disk_mb, cache=self._disk_cache)
        elif not work.exists():
            await copy_work_disk(disk, work)
        devices = [
            *launch.disk("root", spec.image.root),
            *launch.disk("work", work, writable=True, mb_per_second=spec.disk_mb_per_second),
        ]
        if spec.layer:
            devices += launch.disk("layer", spec.layer.path)
        if launch.slot:
            if spec.network_mb_per_second is not None:
                await limit(launch.slot, spec.network_mb_per_second)
            card = f"virtio-net-device,netdev=net,mac={driver.GUEST_MAC},guest_announce=off"
            devices += ["-netdev", f"tap,id=net,fd={launch.tap()}", "-device", card]
        if spec.entropy:
            devices += ["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-device,rng=rng"]
        return devices


class _Launch:
    """A QEMU that is about to start: the descriptors that it will inherit, and the arguments that name them."""

    def __init__(self, dir: Path, slot: Slot | None, accelerator: str, outlive: bool) -> None:
        self.dir = dir
        self._groups = _kvm_groups() if accelerator == "kvm" else []
        self.slot = slot
        self._outlive = outlive
        self._root = root_of(accelerator)
        # Control groups are shared by all state directories of the host: hence the random part.
        self._name = f"vm{slot.n if slot else 0}-{secrets.token_hex(3)}"
        self._own: list[JailFile] = []
        self._fds: list[int] = []
        self._sets: list[str] = []
        self._memory: int | None = None

    def fd(self, path: Path, flags: int) -> int:
        try:
            fd = os.open(path, flags | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"can't open {path}: {error.strerror}") from error
        self._fds.append(fd)
        return fd

    def file(self, name: str, path: Path, *, writable: bool = False) -> str:
        """Its path in QEMU's root, for a file that QEMU opens itself."""
        if not path.exists():
            raise HostError(f"can't open {path}: No such file or directory")
        self._own.append(JailFile(name, path, writable=writable))
        return f"/{name}"

    def disk(
        self, name: str, path: Path, *, writable: bool = False, mb_per_second: float | None = None
    ) -> Sequence[str]:
        file = self._set(self.fd(path, os.O_RDWR if writable else os.O_RDONLY))
        # No VM outlives its host, so what it flushes need not reach the disk; a snapshot is flushed when it is taken.
        mode = "discard=unmap,cache.no-flush=on" if writable else "read-only=on"
        raw = f"driver=raw,node-name={name},{mode},file.driver=file,file.locking=off,file.filename={file}"
        limits: Sequence[str] = ()
        if mb_per_second is not None:
            group = {"bps-total": max(1, round(mb_per_second * 1e6))}
            limits = [
                "-object", json.dumps({"qom-type": "throttle-group", "id": "limit", "limits": group}),
                "-blockdev", f"driver=throttle,node-name={name}-limited,{mode},throttle-group=limit,file={name}",
            ]  # fmt: skip
        return [
            "-blockdev", raw,
            *limits,
            # A full disk of the host is an error in the guest. QEMU's default is to pause the VM, for ever.
            "-device", f"virtio-blk-device,drive={name}{'-limited' if limits else ''},werror=report,rerror=report",
        ]  # fmt: skip

    def share(self, memory: Path) -> None:
        """Let this QEMU, and others that do the same, open a file which nobody else may: by a group of their own."""
        os.chown(memory, 0, BASE_UID)
        memory.chmod(0o660)
        self._groups = [*self._groups, BASE_UID]

    def memory(self, path: Path, *, shared: bool) -> list[str]:
        place = self.file(MEMORY_FILE, path, writable=True)
        if not shared and not self._outlive:  # it may be saved later, when its template is gone
            self._memory = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        share = "on" if shared else "off"
        return ["-object", f"memory-backend-file,id=mem,size={path.stat().st_size},mem-path={place},share={share}"]

    def tap(self) -> int:
        assert self.slot is not None
        fd = open_tap(self.slot.netns)
        self._fds.append(fd)
        return fd

    async def start(self, argv: Sequence[str], spec: VmSpec) -> QemuVm:
        """Start QEMU with its own QMP socket and console, and wait for its greeting."""
        ours, theirs = socket.socketpair()
        console = None if self._outlive else Console(self.dir / "console.log")
        try:
            if console is None:
                # Nothing will read it: straight to a file, bounded by the limit on file sizes below.
                chardev = f"file,id=console,path={self._set(self.fd(_new_file(self.dir / 'console.log'), os.O_WRONLY))}"
            else:
                chardev = f"socket,id=console,fd={console.fileno()}"
            full = [
                *argv, *self._sets,
                "-chardev", chardev, "-serial", "chardev:console",
                "-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control",
            ]  # fmt: skip
            child = await confine.spawn(
                full,
                root=self._root,
                own=self._own,
                space=self.slot.netns if self.slot else None,
                uid=BASE_UID + (self.slot.n if self.slot else 0),
                groups=self._groups,
                file_bytes=max(spec.disk_mb, spec.memory_mb) << 20,
                output=self.dir / "qemu.log",
                pass_fds=[*self._fds, theirs.fileno(), *([console.fileno()] if console else [])],
                outlive=self._outlive,
                join=lambda pid: cgroups.put(pid, self.dir, self._name, spec),
            )
        except BaseException:
            if console:
                console.close()
            ours.close()
            cgroups.remove(self.dir)
            raise
        else:
            memory, self._memory = self._memory, None
        finally:
            theirs.close()
            self.close()
        if console:
            console.started()
        vm = QemuVm(child=child, dir=self.dir, console=console, slot=self.slot, memory=memory)
        try:
            await vm.connect(ours)
        except BaseException:
            await vm.kill()
            raise
        return vm

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
        memory, self._memory = self._memory, None
        if memory is not None:
            os.close(memory)

    def _set(self, fd: int) -> str:
        """A path for a file that QEMU uses with the access rights of the descriptor, not of its own uid."""
        self._sets += ["-add-fd", f"fd={fd},set={fd}"]
        return f"/dev/fdset/{fd}"


def _program() -> Path:
    """The file itself, not a link on PATH: QEMU finds its modules by where it is. Raises HostError."""
    return process.path_of(PROGRAM).resolve()


@functools.cache
def root_of(accelerator: str) -> confine.Root:
    """What QEMU needs of the host: its modules are loaded, and its firmware is read, by path."""
    program = _program()
    prefix = program.parent.parent
    modules = [
        path for place in ("lib*", "lib/*") for path in prefix.glob(f"{place}/qemu/accel-{accelerator}-x86_64.so")
    ]
    firmware = [prefix / "share" / name for name in ("qemu", "seabios")]
    return confine.Root(
        programs=(program, *modules),
        files=tuple(path for path in (*firmware, Path("/etc/ld.so.cache")) if path.exists()),
        devices=("urandom", *(("kvm",) if accelerator == "kvm" else ())),
        own=(KERNEL, INITRAMFS, MEMORY_FILE),
    )


async def version_of_qemu() -> str:
    """The version, as '7.2.22'. Raises HostError if QEMU isn't installed."""
    output = (await process.run([PROGRAM, "--version"])).stdout.decode(errors="replace")
    found = re.search(r"version (\d+\.\d+(\.\d+)?)", output)
    if not found:
        raise HostError(f"`{PROGRAM} --version` printed no version: {output[:200]!r}")
    return found[1]


def _constant_tsc() -> bool:
    """Does the host's TSC run at one speed, even in sleep states? Then the guest, which reads it, can rely on it."""
    flags = next((li for li in Path("/proc/cpuinfo").read_text().splitlines() if li.startswith("flags")), "").split()
    return "constant_tsc" in flags and "nonstop_tsc" in flags


def _kvm_groups() -> list[int]:
    """The group that lets QEMU's uid open /dev/kvm; none if every user may. Raises HostError."""
    try:
        status = Path("/dev/kvm").stat()
    except OSError:
        raise HostError("this host has no /dev/kvm") from None
    if status.st_mode & 0o006 == 0o006:
        return []
    if status.st_mode & 0o060 == 0o060:
        return [status.st_gid]
    raise HostError(
        "only the owner can open /dev/kvm, and VMs don't run as root: run `chgrp kvm /dev/kvm; chmod 660 /dev/kvm`"
    )


def _new_file(path: Path, size_bytes: int = 0) -> Path:
    """Create a file that QEMU's uid can open in its root, though not where it is."""
    with path.open("xb") as file:
        os.fchmod(file.fileno(), 0o666)
        file.truncate(size_bytes)
    return path
