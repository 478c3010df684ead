"""A running Firecracker in its jail, driven by its API."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from swarm.base import process, sparse
from swarm.base.aio import finish_uninterrupted, quietly, stoppable
from swarm.errors import BootFailed, SwarmError
from swarm.vm import driver
from swarm.vm.driver import Freeze, Slot
from swarm.vm.drivers import jailer
from swarm.vm.drivers.console import Console, last_lines
from swarm.vm.drivers.disk import WORK_DISK, used_bytes
from swarm.vm.drivers.jailer import Jail
from swarm.vm.drivers.vmm import VmmVm

if TYPE_CHECKING:
    from swarm.vm.drivers.firecracker_api import Api

MEMORY_FILE, STATE_FILE, DISK_FILE, LOG_FILE = "memory", "state", "work", "firecracker.log"
SOCKET = "api.sock"
_START_SECONDS = 10.0
_SNAPSHOT_SECONDS = 120.0  # the whole memory is flushed to disk
_VCPU_FAULT = re.compile(
    r"KVM_EXIT_INTERNAL_ERROR|KVM_EXIT_FAIL_ENTRY|KVM_EXIT_SHUTDOWN|[Uu]nexpected exit|Failure during vcpu"
)


class FirecrackerVm(VmmVm):
    """See `swarm.vm.driver.Vm`."""

    vmm = "Firecracker"
    logs: ClassVar = {LOG_FILE: 3, "jailer.log": 3}

    def __init__(
        self,
        *,
        child: process.Child,
        dir: Path,
        jail: Jail,
        console: Console | None,
        slot: Slot | None,
        memory_bytes: int,
    ) -> None:
        from swarm.vm.drivers.firecracker_api import Api  # here, since importing httpx takes 70 ms

        super().__init__(child=child, dir=dir, console=console, slot=slot)
        self.jail = jail
        self.api: Api = Api(jail.root / SOCKET)
        self._memory_bytes = memory_bytes
        self._start_time = 0  # of process `pid`, which is Firecracker itself once it listens

    async def connect(self) -> None:
        """Return when Firecracker listens. Raises BootFailed if it ends instead."""
        try:
            async with asyncio.timeout(_START_SECONDS):
                while True:
                    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                        self.pid, uid = self.api.listener()
                        break
                    if self._child.returncode is not None:
                        raise BootFailed("Firecracker did not start")
                    await asyncio.sleep(0.001)
        except TimeoutError:
            raise BootFailed(f"Firecracker did not open its API within {_START_SECONDS:g} s") from None
        self._start_time = process.start_time(self.pid) or 0
        process.expendable(self.pid, driver.OOM_SCORE)
        if self.jail.jailed and uid != self.jail.uid:
            raise BootFailed(f"Firecracker runs as uid {uid} instead of {self.jail.uid}")

    async def failed(self, error: BaseException) -> BaseException:
        """End this VM, and return the error to raise: with Firecracker's last output, if it is a BootFailed."""
        output = self.last_output()
        await self.kill()
        if isinstance(error, BootFailed):
            error.args = (f"{error}; {output}",)
        return error

    async def snapshot(self, dir: Path) -> None:
        """Write memory and device state into ``dir`` and end this VM."""
        try:
            await self.api.patch("/vm", state="Paused")
            await self._write(dir)
        except OSError as error:
            raise BootFailed(f"can't store the template's files: {error}") from error
        finally:
            await self.kill()

    async def save(self, dir: Path, *, freeze: Freeze) -> None:
        """See `Vm.save`. Firecracker writes the whole memory while the guest stands still; its holes are made later."""
        with contextlib.ExitStack() as stack:

            def copy(check: sparse.Check) -> sparse.Ahead:
                self._need_room(dir, used_bytes(self.dir / WORK_DISK))
                disk = sparse.Ahead(self.dir / WORK_DISK, dir / DISK_FILE, check)
                stack.callback(disk.close)
                return disk

            disk = await stoppable(copy)
            await freeze()
            async with self._standing(dir):
                await stoppable(disk.finish)
        await stoppable(lambda check: sparse.dig(dir / MEMORY_FILE, check))

    @contextlib.asynccontextmanager
    async def pausing(self, dir: Path, *, freeze: Freeze) -> AsyncIterator[None]:
        """See `Vm.pausing`."""
        self._need_room(dir)
        await freeze()
        async with self._standing(dir):
            await stoppable(lambda check: sparse.dig(dir / MEMORY_FILE, check))
            await stoppable(lambda check: sparse.link_or_copy(self.dir / WORK_DISK, dir / DISK_FILE, check=check))
            yield
            await finish_uninterrupted(self.kill())

    @contextlib.asynccontextmanager
    async def _standing(self, dir: Path) -> AsyncIterator[None]:
        """For the length of the block the guest stands still, and its memory and devices are in ``dir``."""
        try:
            await finish_uninterrupted(self.api.patch("/vm", state="Paused"))
            await finish_uninterrupted(self._write(dir, "saved."))
            yield
        finally:
            if self._child.returncode is None:
                await finish_uninterrupted(self._go_on())
                for name in (MEMORY_FILE, STATE_FILE):  # what a failure left
                    (self.jail.root / f"saved.{name}").unlink(missing_ok=True)

    async def _go_on(self) -> None:
        """A VM that can't is ended: nobody else would notice."""
        with contextlib.suppress(OSError, SwarmError):
            await self.api.patch("/vm", state="Resumed")
            return
        with contextlib.suppress(OSError, SwarmError):
            if await self._status() == "Running":  # it never stood still
                return
        await process.kill(self._child)

    def _need_room(self, dir: Path, disk_bytes: int = 0) -> None:
        for place in {self.dir, dir}:  # written in the chroot, and then moved
            sparse.need_room(place, self._memory_bytes + disk_bytes)

    async def _write(self, dir: Path, prefix: str = "") -> None:
        """``prefix``: of names in the chroot that are not in use."""
        await self.api.put(
            "/snapshot/create",
            timeout_seconds=_SNAPSHOT_SECONDS,
            snapshot_type="Full",
            snapshot_path=prefix + STATE_FILE,
            mem_file_path=prefix + MEMORY_FILE,
        )
        for name in (MEMORY_FILE, STATE_FILE):
            await asyncio.to_thread(_take_ownership, self.jail.root / (prefix + name), dir / name)

    async def _status(self) -> str:
        return str((await self.api.get("/")).get("state"))

    def _how_it_ended(self, code: int) -> str:
        # When a vCPU fails, Firecracker still ends with status 0: only its log has the reason.
        for line in reversed(last_lines(self.dir / LOG_FILE, lines=20)):
            if _VCPU_FAULT.search(line):
                return f"the guest's CPU failed: {line.partition('] ')[2] or line}"
        return super()._how_it_ended(code)

    async def kill(self) -> None:
        await asyncio.shield(self._kill())

    async def _kill(self) -> None:
        await process.kill(self._child)
        if self._start_time:  # it dies with its parent, but it must be dead before its files are removed
            await quietly(process.kill_stranger(self.pid, self._start_time))
        await self.api.aclose()
        if self._console_reader:
            self._console_reader.close()
        await quietly(asyncio.to_thread(jailer.remove, self.dir))


def _take_ownership(written: Path, target: Path) -> None:
    """Make a file that Firecracker wrote in its chroot root's and read-only, and move it to ``target``."""
    fd = os.open(written, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchown(fd, 0, 0)
        os.fchmod(fd, 0o444)
    finally:
        os.close(fd)
    sparse.move(written, target)
