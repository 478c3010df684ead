"""A running QEMU, driven by QMP over an inherited socket pair."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import ClassVar, cast

from qemu.qmp import QMPClient, QMPError

from swarm.base import process
from swarm.base.aio import quietly
from swarm.errors import BootFailed, HostError
from swarm.vm.driver import Slot
from swarm.vm.drivers import cgroups
from swarm.vm.drivers.console import Console
from swarm.vm.drivers.disk import move_sparse
from swarm.vm.drivers.vmm import VmmVm

MEMORY_FILE = "memory"
STATE_FILE = "state"
DISK_FILE = "work"
START_SECONDS = 10.0
_QMP_TIMEOUT_SECONDS = 30.0
_CAPABILITIES = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]


class QemuVm(VmmVm):
    """See `swarm.vm.driver.Vm`."""

    vmm = "QEMU"
    logs: ClassVar = {"qemu.log": 5}

    def __init__(
        self,
        *,
        child: process.Child,
        dir: Path,
        console: Console | None,
        slot: Slot | None,
    ) -> None:
        super().__init__(child=child, dir=dir, console=console, slot=slot)
        self._qmp = QMPClient(f"vm{slot.n if slot else ''}")
        self._paused = ""  # why QEMU stopped the guest by itself
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
                await events.get()
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
                    raise BootFailed(f"QEMU could not restore the template: {self.last_output()}")

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
        for name, kept in ((MEMORY_FILE, MEMORY_FILE), ("work.ext4", DISK_FILE)):
            await asyncio.to_thread(move_sparse, self.dir / name, dir / kept)

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
        await quietly(asyncio.to_thread(cgroups.remove, self.dir))
