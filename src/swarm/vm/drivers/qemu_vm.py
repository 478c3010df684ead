"""A running QEMU, driven by QMP over an inherited socket pair."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar, cast

from qemu.qmp import QMPClient, QMPError

from swarm.base import process, sparse
from swarm.base.aio import finish_uninterrupted, quietly, stoppable
from swarm.errors import BootFailed, HostError
from swarm.vm.driver import Freeze, Slot
from swarm.vm.drivers import cgroups
from swarm.vm.drivers.console import Console
from swarm.vm.drivers.disk import WORK_DISK, used_bytes
from swarm.vm.drivers.guest_memory import GuestMemory
from swarm.vm.drivers.vmm import VmmVm

MEMORY_FILE = "memory"
STATE_FILE = "state"
DISK_FILE = "work"
START_SECONDS = 10.0
_QMP_TIMEOUT_SECONDS = 30.0
_STATE_SET = 1 << 20  # above those of its arguments, which are numbered like descriptors
_CAPABILITIES = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]


class QemuVm(VmmVm):
    """See `swarm.vm.driver.Vm`. ``memory``: a descriptor of the file that it maps privately as the guest's memory."""

    vmm = "QEMU"
    logs: ClassVar = {"qemu.log": 5}

    def __init__(
        self,
        *,
        child: process.Child,
        dir: Path,
        console: Console | None,
        slot: Slot | None,
        memory: int | None = None,
    ) -> None:
        super().__init__(child=child, dir=dir, console=console, slot=slot)
        self._qmp = QMPClient(f"vm{slot.n if slot else ''}")
        self._memory = memory
        self._paused = ""  # why QEMU stopped the guest by itself
        self._stops = 0  # how many of the next STOP events are our own doing
        self._watch: asyncio.Task[None] | None = None

    async def connect(self, sock: socket.socket) -> None:
        """Connect to QMP. Raises BootFailed with QEMU's last output if it ends instead."""
        greeted = asyncio.ensure_future(self._qmp.connect(sock))
        died = asyncio.ensure_future(self._child.wait())
        try:
            await asyncio.wait({greeted, died}, return_when=asyncio.FIRST_COMPLETED, timeout=START_SECONDS)
            if not greeted.done() or greeted.exception() is not None:
                raise BootFailed(f"QEMU did not start: {self.last_output()}")
        finally:
            for task in (greeted, died):
                task.cancel()
            await asyncio.gather(greeted, died, return_exceptions=True)
        self._watch = asyncio.create_task(self._end_when_paused(), name="qemu-paused")

    async def _end_when_paused(self) -> None:
        """QEMU may stop a guest that it can't go on with (an error of KVM, of a disk). Nobody will continue it, and its
        process would live on, so it is ended: `wait` then says why."""
        with contextlib.suppress(QMPError, OSError, EOFError, HostError):
            with self._qmp.listener("STOP") as events:
                async for _ in events:
                    if not self._stops:
                        break
                    self._stops -= 1
            self._paused = "paused"
            async with asyncio.timeout(_QMP_TIMEOUT_SECONDS):
                self._paused = await self._status()
        if self._paused:
            await process.kill(self._child)

    async def _status(self) -> str:
        try:
            said = await self._qmp.execute("query-status")
        except (QMPError, EOFError) as error:
            raise HostError(str(error) or type(error).__name__) from error
        return str(cast(dict[str, object], said).get("status"))

    async def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    async def resume_from(self, state: int) -> None:
        """Load the device state from an inherited descriptor; return when the VM runs."""
        await self._qmp.execute("migrate-set-capabilities", {"capabilities": _CAPABILITIES})
        with self._qmp.listener(("RESUME", "MIGRATION")) as events:
            await self._qmp.execute("migrate-incoming", {"uri": f"fd:{state}"})
            async for event in events:
                if event["event"] == "RESUME":
                    return
                if cast(dict[str, str], event["data"])["status"] == "failed":
                    raise BootFailed(f"QEMU could not restore the VM: {self.last_output()}")

    async def snapshot(self, dir: Path) -> None:
        """Write memory and device state into ``dir`` and end this VM. It must have been booted for a template.

        Migration, not Swarm, stops the guest: at its end, and it records that the guest was running, so a clone
        continues by itself.
        """
        await self._stop_watching()
        state = os.open(dir / STATE_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            async with asyncio.timeout(_QMP_TIMEOUT_SECONDS):
                await self._qmp.execute("migrate-set-capabilities", {"capabilities": _CAPABILITIES})
                self._qmp.send_fd_scm(state)
                await self._qmp.execute("getfd", {"fdname": "state"})
                with self._qmp.listener("MIGRATION") as events:
                    await self._qmp.execute("migrate", {"uri": "fd:state"})
                    async for event in events:
                        status = cast(dict[str, str], event["data"])["status"]
                        if status == "completed":
                            break
                        if status == "failed":
                            raise BootFailed(f"QEMU could not write the template's state: {self.last_output()}")
        except (QMPError, TimeoutError) as error:
            raise BootFailed(f"QEMU could not write the template's state: {error!r}; {self.last_output()}") from error
        finally:
            os.close(state)
            await self.kill()
        for name, kept in ((MEMORY_FILE, MEMORY_FILE), (WORK_DISK, DISK_FILE)):
            await asyncio.to_thread(sparse.move, self.dir / name, dir / kept)

    async def save(self, dir: Path, *, freeze: Freeze) -> None:
        """See `Vm.save`. Memory and disk are copied while the guest runs. While it stands still, its pages that are no
        longer the file's, and the disk, are compared with the copies, and only what differs is written."""
        memory = self._guest_memory()
        with contextlib.ExitStack() as stack:
            copy, disk = await stoppable(lambda check: _copy_ahead(self.dir, memory, dir, stack, check))
            await stoppable(lambda check: memory.overlay(copy, check))
            await freeze()
            async with self._standing(dir):
                await stoppable(lambda check: memory.overlay(copy, check))
                await stoppable(disk.finish)

    @contextlib.asynccontextmanager
    async def pausing(self, dir: Path, *, freeze: Freeze) -> AsyncIterator[None]:
        """See `Vm.pausing`. A VM whose memory file is its own keeps it: what it wrote is put where it already reads it
        from no longer, so nothing changes for it if it must go on."""
        memory = self._guest_memory()
        await stoppable(lambda check: _begin_copy(self.dir, memory, dir, check))
        await freeze()
        async with self._standing(dir):
            await stoppable(lambda check: _take_over(self.dir, memory, dir, check))
            yield
            await finish_uninterrupted(self.kill())

    @contextlib.asynccontextmanager
    async def _standing(self, dir: Path) -> AsyncIterator[None]:
        """For the length of the block the guest stands still, and its device state is in ``dir``."""
        self._stops += 1
        try:
            async with asyncio.timeout(_QMP_TIMEOUT_SECONDS):
                await finish_uninterrupted(self._execute("stop"))
                await finish_uninterrupted(self._write_state(dir / STATE_FILE))
            yield
        except QMPError as error:
            raise BootFailed(f"QEMU could not write the VM's state: {error}; {self.last_output()}") from error
        except TimeoutError:
            raise BootFailed(f"QEMU does not answer: {self.last_output()}") from None
        finally:
            if self._child.returncode is None:
                await finish_uninterrupted(self._go_on())

    async def _go_on(self) -> None:
        """A VM that can't is ended: nobody else would notice."""
        try:
            await self._execute("cont")
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            self._paused = f"it could not go on: {error}"
            await process.kill(self._child)
            return
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):  # perhaps it has no such set
            await self._execute("remove-fd", {"fdset-id": _STATE_SET})  # QEMU closes it only while the guest runs

    async def _execute(self, command: str, arguments: dict[str, object] | None = None) -> None:
        async with asyncio.timeout(_QMP_TIMEOUT_SECONDS):
            await self._qmp.execute(command, arguments)

    async def _write_state(self, path: Path) -> None:
        """The state of the devices alone, in the format of a migration. In QEMU this is Xen's way to save a VM, which
        leaves it as it was: after a migration it would have given up its disks."""
        state = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            await self._execute("migrate-set-capabilities", {"capabilities": _CAPABILITIES})
            self._qmp.send_fd_scm(state)
            await self._execute("add-fd", {"fdset-id": _STATE_SET})
            await self._execute("xen-save-devices-state", {"filename": f"/dev/fdset/{_STATE_SET}", "live": False})
        finally:
            os.close(state)

    def _guest_memory(self) -> GuestMemory:
        if self._memory is None:
            raise BootFailed("only a VM that was restored can be saved, not one that was booted", retryable=False)
        return GuestMemory(pid=self.pid, file=self._memory)

    def _how_it_ended(self, code: int) -> str:
        if self._paused:
            return f"QEMU stopped the guest by itself ({self._paused}), so Swarm ended it: {self.last_output()}"
        how = super()._how_it_ended(code)
        if code == -signal.SIGBUS:  # a template's memory is a sparse file, which gets its blocks as the guest writes
            return f"{how}, probably because no space is left on the disk with {self.dir}"
        return how

    async def kill(self) -> None:
        await self._stop_watching()
        await process.kill(self._child)
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._qmp.disconnect()
        if self._console_reader:
            self._console_reader.close()
        memory, self._memory = self._memory, None
        if memory is not None:
            os.close(memory)
        await quietly(asyncio.to_thread(cgroups.remove, self.dir))


def _copy_ahead(
    place: Path, memory: GuestMemory, dir: Path, stack: contextlib.ExitStack, check: sparse.Check
) -> tuple[int, sparse.Ahead]:
    """Copy memory file and work disk into ``dir``, while the guest may write the latter. Returns a descriptor of the
    memory's copy, and the disk's copy; ``stack`` closes them."""
    sparse.need_room(dir, memory.used_bytes() + used_bytes(place / WORK_DISK))
    sparse.copy(memory.file, dir / MEMORY_FILE, check=check)
    copy = os.open(dir / MEMORY_FILE, os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, copy)
    disk = sparse.Ahead(place / WORK_DISK, dir / DISK_FILE, check)
    stack.callback(disk.close)
    return copy, disk


def _begin_copy(place: Path, memory: GuestMemory, dir: Path, check: sparse.Check) -> None:
    """Copy the memory file into ``dir``, unless it is the guest's own."""
    own = (place / MEMORY_FILE).exists()
    sparse.need_room(dir, memory.used_bytes() - (sparse.used_bytes(memory.file) if own else 0))
    if not own:
        sparse.copy(memory.file, dir / MEMORY_FILE, check=check)


def _take_over(place: Path, memory: GuestMemory, dir: Path, check: sparse.Check) -> None:
    """Put the memory and the disk of a guest that stands still into ``dir``; by another name where that is enough."""
    own = place / MEMORY_FILE
    if own.exists():
        sparse.link_or_copy(own, dir / MEMORY_FILE, check=check)
    fd = os.open(dir / MEMORY_FILE, os.O_RDWR | os.O_CLOEXEC)
    try:
        memory.overlay(fd, check)
    finally:
        os.close(fd)
    sparse.link_or_copy(place / WORK_DISK, dir / DISK_FILE, check=check)
