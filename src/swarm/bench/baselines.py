"""Baselines: what the bare parts need on this host, measured with the shortest code that does it, without the engine.

A VMM is started as one would start it manually: the same machine, files by path, no isolation, and a tap in a network
slot made beforehand.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from swarm.channel import Channel, Identity
from swarm.channel.proof import HOST, new_nonce, proof
from swarm.errors import BootFailed
from swarm.vm.driver import AGENTD_PORT, GUEST_MAC, Image, Slot, Template, VmSpec, host_tsc_khz
from swarm.vm.drivers.console import last_lines
from swarm.vm.drivers.disk import copy_work_disk, make_work_disk
from swarm.vm.drivers.qemu import EMULATED_CPU, PROGRAM
from swarm.vm.drivers.qemu_vm import DISK_FILE, MEMORY_FILE, STATE_FILE
from swarm.vm.drivers.tap import open_tap
from swarm.vm.slots.ssh import new_key

_READY = "swarm-init: up after"
_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Clone:
    """A clone's milliseconds since the start of its VMM; but ``connect_ms`` is the TCP connect alone (of a bare clone
    only), and ``cpu_ms`` the VMM's CPU time until the guest had its new identity."""

    running_ms: float
    answered_ms: float
    cpu_ms: float
    private_kb: int
    pss_kb: int
    connect_ms: float = 0.0


async def cold_boot(image: Image, dir: Path, *, memory_mb: int, accelerator: str) -> float:
    """Milliseconds from the VMM's start to userspace."""
    disk = dir / "work.ext4"
    await make_work_disk(disk, size_mb=64, cache=dir)
    khz = host_tsc_khz()
    clock = f" tsc_early_khz={khz}" if khz and accelerator == "tcg" else ""
    argv = [
        PROGRAM, "-M", "microvm,acpi=on", "-accel", accelerator, "-cpu", "host" if accelerator == "kvm" else "max",
        "-m", str(memory_mb), "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-kernel", str(image.kernel), *(("-initrd", str(image.initramfs)) if image.initramfs else ()),
        "-append", f"{image.boot_args} console=ttyS0 reboot=t{clock}",
        *_drives(image, disk), "-object", "rng-random,id=rng,filename=/dev/urandom",
        "-device", "virtio-rng-device,rng=rng", "-serial", "stdio",
    ]  # fmt: skip
    began = time.perf_counter()
    vmm = await asyncio.create_subprocess_exec(
        *argv, stdin=subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert vmm.stdout
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            async for line in vmm.stdout:
                if _READY.encode() in line:
                    return _ms(began)
        raise BootFailed("the bare VMM ended before its guest was up")
    finally:
        await _end(vmm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bare:
    """A bare VMM that runs a restored VM; ``began`` (time.perf_counter) is when it was started."""

    vmm: asyncio.subprocess.Process
    qmp: Path
    began: float
    running_ms: float

    @property
    def pid(self) -> int:
        return self.vmm.pid


@contextlib.asynccontextmanager
async def restored(files: Path, spec: VmSpec, slot: Slot, dir: Path, *, accelerator: str) -> AsyncIterator[Bare]:
    """A VM from the files of a template or a snapshot, by a bare VMM, for the length of the block."""
    disk, qmp = dir / "work.ext4", dir / "qmp"
    await copy_work_disk(files / DISK_FILE, disk)
    tap = open_tap(slot.netns)

    argv = [
        PROGRAM, "-M", "microvm,acpi=on,mem-merge=off,dump-guest-core=off,memory-backend=mem", "-accel",
        "kvm" if accelerator == "kvm" else "tcg,thread=single,tb-size=64",
        "-cpu", "host" if accelerator == "kvm" else EMULATED_CPU, "-smp", str(spec.vcpus), "-m", str(spec.memory_mb),
        "-object", f"memory-backend-file,id=mem,size={spec.memory_mb << 20},share=off,mem-path={files / MEMORY_FILE}",
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", *_drives(spec.image, disk),
        "-global", "migration.send-configuration=off",  # as the state was written
        "-netdev", f"tap,id=net,fd={tap}",
        "-device", f"virtio-net-device,netdev=net,mac={GUEST_MAC},guest_announce=off",
        "-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-device,rng=rng",
        "-serial", f"file:{dir / 'console'}", "-qmp", f"unix:{qmp},server=on,wait=off", "-incoming", "defer",
    ]  # fmt: skip
    began = time.perf_counter()
    vmm = await asyncio.create_subprocess_exec(
        *argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(tap,)
    )
    os.close(tap)
    try:
        await asyncio.to_thread(_resume, qmp, files / STATE_FILE, vmm.pid)
        yield Bare(vmm=vmm, qmp=qmp, began=began, running_ms=_ms(began))
    except (OSError, ValueError, KeyError) as error:
        console = " | ".join(last_lines(dir / "console", lines=3))
        raise BootFailed(f"the bare VMM could not be restored: {error!r}; its console: {console}") from error
    finally:
        await _end(vmm)


async def clone(template: Template, slot: Slot, dir: Path, *, accelerator: str) -> Clone:
    """Restore a template and send its agentd a hello."""
    async with restored(template.dir, template.spec, slot, dir, accelerator=accelerator) as bare:
        connect = await asyncio.to_thread(_hello, str(slot.address), template.token)
        answered = _ms(bare.began)
        await renew(slot, template.token)  # so that its memory compares with that of a VM of Swarm's
        cpu = cpu_ms_of(bare.pid)
        private, pss = memory_of(bare.pid)
        return Clone(
            running_ms=bare.running_ms,
            connect_ms=connect,
            answered_ms=answered,
            cpu_ms=cpu,
            private_kb=private,
            pss_kb=pss,
        )


async def pause(bare: Bare, file: Path) -> float:
    """Milliseconds to write a bare VM into a file, as one would with QEMU alone, and to end it."""
    began = time.perf_counter()
    await asyncio.to_thread(_save, bare.qmp, file)
    await bare.vmm.wait()
    return _ms(began)


def cpu_ms_of(pid: int) -> float:
    """CPU time of a process's threads, which depends least on other work on the host."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e6


def memory_of(pid: int) -> tuple[int, int]:
    """A process's memory in kB: private and written (what one more VM costs), and proportional (PSS)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    fields = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
    # "Private clean" is left out: pages of the template's file that only one clone has mapped so far. They are in the
    # host's cache anyway, and shared with the next clone.
    return fields["Anonymous"], fields["Pss"]


def _drives(image: Image, disk: Path) -> list[str]:
    return [
        "-blockdev", "driver=raw,node-name=root,read-only=on,file.driver=file,file.locking=off,"
                     f"file.filename={image.root}",
        "-device", "virtio-blk-device,drive=root",
        "-blockdev", f"driver=raw,node-name=work,file.driver=file,file.locking=off,file.filename={disk}",
        "-device", "virtio-blk-device,drive=work",
    ]  # fmt: skip


def _resume(path: Path, state: Path, pid: int) -> None:
    """Send the QMP commands that load the state, and wait until the VM runs."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    with socket.socket(socket.AF_UNIX) as sock:
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                sock.connect(str(path))
                break
            os.kill(pid, 0)
            if time.monotonic() > deadline:
                raise TimeoutError("no QMP socket")
            time.sleep(0.001)
        sock.settimeout(_TIMEOUT_SECONDS)
        with sock.makefile("rwb", buffering=0) as file:
            file.readline()
            capabilities = [{"capability": "x-ignore-shared", "state": True}]
            _ask(file, "qmp_capabilities")
            _ask(file, "migrate-set-capabilities", capabilities=capabilities)
            _ask(file, "migrate-incoming", uri=f"exec:cat {state}")
            while _ask(file, "query-status")["status"] != "running":
                time.sleep(0.001)


def _save(path: Path, file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.settimeout(_TIMEOUT_SECONDS)
        with sock.makefile("rwb", buffering=0) as stream:
            stream.readline()
            _ask(stream, "qmp_capabilities")
            _ask(stream, "stop")
            _ask(stream, "migrate-set-parameters", **{"max-bandwidth": 1 << 40})
            _ask(stream, "migrate", uri=f"exec:cat > {file}")
            while (status := _ask(stream, "query-migrate")["status"]) != "completed":
                if status == "failed":
                    raise ValueError("the migration failed")
                time.sleep(0.001)
            _ask(stream, "quit")


def _ask(file: object, command: str, **arguments: object) -> dict[str, str]:
    file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")  # type: ignore[attr-defined]
    while True:
        answer = json.loads(file.readline())  # type: ignore[attr-defined]
        if "return" in answer:
            return dict(answer["return"])
        if "error" in answer:
            raise ValueError(answer["error"]["desc"])


def _hello(address: str, token: bytes) -> float:
    """Connect and have agentd answer once. Returns the milliseconds of the connect alone."""
    began = time.perf_counter()
    with socket.create_connection((address, AGENTD_PORT), timeout=_TIMEOUT_SECONDS) as sock:
        connected = _ms(began)
        nonce = new_nonce()
        head = json.dumps({"id": 1, "op": "hello", "nonce": nonce, "proof": proof(token, HOST, nonce)}).encode()
        sock.sendall(struct.pack(">II", len(head), 0) + head)
        if len(sock.recv(8)) != 8:
            raise ValueError("agentd closed the connection")
        return connected


async def renew(slot: Slot, token: bytes) -> None:
    """Give the guest an identity that is nobody's."""
    identity = Identity(
        generation="bare",
        seed=os.urandom(64),
        hostname="bare",
        machine_id="0" * 32,
        ssh_host_key=new_key().private.decode(),
        authorized_keys="",
        token=token,
    )
    async with Channel.connect(slot.agentd, token=token, timeout_seconds=_TIMEOUT_SECONDS, listening=True) as channel:
        await channel.renew(identity)


async def _end(vmm: asyncio.subprocess.Process) -> None:
    if vmm.returncode is None:
        vmm.kill()
        await vmm.wait()


def _ms(began: float) -> float:
    return (time.perf_counter() - began) * 1000
