"""A VM that runs, with its identity and an open channel, and how it is told when it has ended instead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from swarm.base.aio import finish_uninterrupted
from swarm.base.log import logger
from swarm.base.process import start_time
from swarm.channel import Channel, Identity, Renewed, processes
from swarm.channel.conversation import Open
from swarm.errors import BootFailed, ChannelError, OutcomeUnknown, StepError
from swarm.model import FailureReason
from swarm.vm.driver import Vm, VmSpec
from swarm.vm.drivers.console import last_lines
from swarm.vm.drivers.disk import used_bytes
from swarm.vm.slots.inventory import Kind, VmRecord
from swarm.vm.slots.slot_pool import VmSlot

log = logger(__name__)

T = TypeVar("T")

# After the channel broke, the VMM has this long to end, so that the error names the real cause.
_EXIT_SECONDS = 2.0
_FREEZE_SECONDS = 30.0  # agentd gives programs less to stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a VM is used for, as its record tells other processes on this host."""

    ticket_id: str | None = None
    attempt_id: str | None = None
    sandbox_id: str | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class LiveVm:
    """A running VM with its own identity and an open channel. ``frozen``: its programs may stand still; ``disk_still``:
    and nothing is written to its work disk."""

    n: int
    spec: VmSpec
    vm: Vm
    channel: Channel
    renewed: Renewed
    vm_slot: VmSlot
    identity: Identity = field(repr=False)
    frozen: bool = False
    disk_still: bool = False

    async def while_alive(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``. Raises OutcomeUnknown, with how it ended, if the VM ends first."""
        return await while_alive(self.vm, work)

    async def freeze(self, *, disk: bool = False) -> None:
        """Stop all programs of the guest; over a new connection, if the old one broke. ``disk``: and its kernel's
        writes to the work disk, if that can be. Raises ChannelError, GuestRefused, OutcomeUnknown."""
        self.frozen = True
        asking = self._say(partial(processes.freeze, disk=disk), "freeze")
        self.disk_still = await finish_uninterrupted(self.while_alive(asking))

    async def thaw(self) -> None:
        """Let them go on, as `freeze`."""
        await self.while_alive(self._say(processes.thaw, "thaw"))
        self.frozen = self.disk_still = False

    async def _say(self, order: Callable[[Open], Coroutine[Any, Any, T]], what: str) -> T:
        try:
            return await _bounded(order(self.channel.converse), what)
        except ChannelError:
            endpoint, token = self.vm.endpoint, self.identity.token
            connecting = Channel.connect(endpoint, token=token, timeout_seconds=_FREEZE_SECONDS, listening=True)
            async with connecting as channel:
                return await _bounded(order(channel.converse), what)


async def _bounded(work: Coroutine[Any, Any, T], what: str) -> T:
    try:
        async with asyncio.timeout(_FREEZE_SECONDS):
            return await work
    except TimeoutError:
        raise ChannelError(f"the guest did not answer {what} within {_FREEZE_SECONDS:g} s") from None


async def while_alive(vm: Vm, work: Coroutine[Any, Any, T]) -> T:
    """`LiveVm.while_alive`, for a VM without a channel."""
    task, exited = asyncio.ensure_future(work), asyncio.ensure_future(vm.wait())
    try:
        await asyncio.wait({task, exited}, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and isinstance(task.exception(), ChannelError):
            await asyncio.wait({exited}, timeout=_EXIT_SECONDS)
        if exited.done() and not (task.done() and task.exception() is None):
            raise _exit_error(vm, exited.result())
        return task.result()
    finally:
        for each in (task, exited):
            each.cancel()
        await asyncio.gather(task, exited, return_exceptions=True)


def _exit_error(vm: Vm, how: str) -> StepError:
    """Why a VM ended, from its console."""
    lines = last_lines(vm.console, lines=200)
    panic = next((i for i, line in enumerate(lines) if "Kernel panic" in line), None)
    if panic is not None:
        said = lines[panic].partition("Kernel panic")
        return OutcomeUnknown(f"the guest's kernel panicked: {''.join(said[1:])}", reason=FailureReason.GUEST_PANIC)
    last = " | ".join(lines[-3:]) or "nothing"
    return OutcomeUnknown(f"the VM died while it was in use: {how}; its console ends with: {last}")


def check_renewed(renewed: Renewed, identity: Identity, *, may_skip: bool = False) -> None:
    """Raises BootFailed unless the guest took its whole identity: two clones might share secrets, or write to the wrong
    disk. ``may_skip``: it is a plain process, which leaves the host's name and machine id alone; a VM may not."""
    wrong = [
        what
        for what, given, got in (
            ("generation", identity.generation, renewed.generation),
            ("host name", identity.hostname, renewed.hostname),
            ("machine id", identity.machine_id, renewed.machine_id),
        )
        if given != got and not (may_skip and {what.replace(" ", ""), what.replace(" ", "_")} & {*renewed.skipped})
    ]
    if identity.seed and not renewed.crng_ready:
        wrong.append("random pool")
    if wrong:
        raise BootFailed(f"the guest did not take its new {', '.join(wrong)}")


def record(vm_slot: VmSlot, vm: Vm, driver: str, assignment: Assignment, host_key: str = "") -> None:
    """Tell other processes of this host which VM is in the slot."""
    slot = vm_slot.slot
    vm_slot.lease.record(
        VmRecord(
            n=vm_slot.lease.n,
            kind=Kind.ATTEMPT,
            pid=vm.pid,
            started=start_time(vm.pid) or 0,
            driver=driver,
            netns=slot.netns if slot else "",
            address=str(slot.address) if slot else "",
            host_key=host_key,
            ticket_id=assignment.ticket_id,
            attempt_id=assignment.attempt_id,
            sandbox_id=assignment.sandbox_id,
        )
    )


def report(live: LiveVm, spec: VmSpec, assignment: Assignment) -> None:
    """Log what a VM used, as the host sees it. (The guest's last writes may not have reached the disk.)"""
    used_mb = round(used_bytes(live.vm_slot.lease.dir / "work.ext4") / (1 << 20), 1)
    log.info("VM ends", vm=live.n, ticket=assignment.ticket_id, work_disk_mb=used_mb, of_mb=spec.disk_mb)
