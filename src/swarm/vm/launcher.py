"""From a VmSpec to a machine that is ready for an agent, and back to nothing.

Every step registers its undo before it is taken, and the undo can't be cancelled, so whatever happens at whatever
moment (failure, Ctrl+C, a dead VMM), nothing of a VM stays. What SIGKILL leaves is found by `swarm.vm.slots.sweep`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import structlog

from swarm.base.aio import finish_uninterrupted, undoing
from swarm.base.clock import Timeline
from swarm.base.process import start_time
from swarm.channel import Channel, Identity, Renewed
from swarm.errors import BootFailed, ChannelError, OutcomeUnknown, StepError, SwarmError
from swarm.model import FailureReason
from swarm.vm.choose import Choice
from swarm.vm.driver import GUEST_GATEWAY, Slot, Template, Vm, VmSpec
from swarm.vm.drivers.console import last_lines, printable
from swarm.vm.drivers.disk import used_bytes
from swarm.vm.network.network import Network
from swarm.vm.slots import ssh, sweep
from swarm.vm.slots.inventory import Inventory, Kind, SlotLease, VmRecord
from swarm.vm.slots.slot_pool import SlotPool, VmSlot
from swarm.vm.template import Templates, shape
from swarm.vm.warmup import COMMON_MODULES, SEED_BYTES, warm_template

log = structlog.get_logger(__name__)

T = TypeVar("T")

TOKEN_BYTES = 32
TOKEN_FILE = "token"
# How long after a broken channel a dying VMM may take to be seen dead, so that the error names the real cause.
_LAST_GASP_SECONDS = 2.0
_PRELOAD_PATIENCE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Whom a VM serves, as others on this host see it."""

    ticket_id: str | None = None
    attempt_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveVm:
    """A running VM with its own identity and an open channel."""

    n: int
    vm: Vm
    channel: Channel
    renewed: Renewed
    vm_slot: VmSlot
    identity: Identity = field(repr=False)

    async def unless_it_dies(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``; if the VM ends first, or takes the channel with it, OutcomeUnknown says how."""
        return await unless_it_dies(self.vm, work)


class Source(Protocol):
    """Where machines may be that were made ahead: the pool, which is above us."""

    async def take(self, template: Template, assignment: Assignment, undo: AsyncExitStack) -> LiveVm | None:
        """One that answers now, or None. ``undo`` ends it."""


class Launcher:
    """``first_slot`` is where free slots are sought.

    With ``templates``, and a driver that can, machines are clones; else each boots from its image. While a
    `swarm.vm.pool.Pool` is attached, clones come from there when it has any.
    """

    def __init__(
        self,
        *,
        choice: Choice,
        network: Network,
        inventory: Inventory,
        templates: Templates | None,
        ssh_dir: ssh.SshDir,
        first_slot: int,
        boot_timeout_seconds: float,
    ) -> None:
        self.choice = choice
        self._driver, self._probe = choice.driver, choice.probe
        self._network = network if choice.driver.networked else None
        self._inventory = inventory
        self._templates = templates if choice.probe.snapshots else None
        self._ssh = ssh_dir
        self._slots = SlotPool(inventory=inventory, network=self._network, first=first_slot)
        self._source: Source | None = None
        self._boot_timeout_seconds = boot_timeout_seconds

    @asynccontextmanager
    async def vm(self, spec: VmSpec, assignment: Assignment, timeline: Timeline) -> AsyncIterator[LiveVm]:
        """A machine for the length of the block. Raises BootFailed, HostError."""
        template = await self.template(spec)
        timeline.mark("template")
        async with undoing() as undo:
            live = await self._source.take(template, assignment, undo) if self._source and template else None
            if live is not None:
                for mark in ("slot", "running", "answered"):
                    timeline.mark(mark)
            else:
                vm_slot = await self._slots.take(undo)
                live = await self._launch(spec, template, vm_slot, assignment, timeline, undo)
            undo.callback(_report, live, spec, assignment)  # before the VM's end
            yield live

    @asynccontextmanager
    async def keeping(self, slots: int, *, ahead: int = 0) -> AsyncIterator[None]:
        """While the block lasts, up to so many free network slots are kept for the next machines, and used again;
        ``ahead`` of them are made now, while nobody waits."""
        self._slots.keep += slots
        making = asyncio.create_task(self._stock(ahead), name="slots-ahead")
        try:
            yield
        finally:
            making.cancel()
            await finish_uninterrupted(_closed(making, self._slots))

    async def _stock(self, slots: int) -> None:
        try:
            await self._slots.stock(slots)
        except SwarmError as error:
            log.warning("no network slot could be made ahead", error=str(error))

    def attach(self, source: Source) -> None:
        """Take machines from there when it has any, from now on."""
        self._source = source

    def detach(self) -> None:
        """Make every machine here again."""
        self._source = None

    async def prepare(self, template: Template, undo: AsyncExitStack) -> LiveVm:
        """A clone for nobody yet; `assignment` says later whom it serves."""
        vm_slot = await self._slots.take(undo)
        return await self._launch(template.spec, template, vm_slot, Assignment(), Timeline(), undo)

    async def freshen(self, live: LiveVm) -> None:
        """Renew a machine once more: same identity, new randomness, the time of now."""
        identity = replace(live.identity, seed=os.urandom(SEED_BYTES))
        renewed = await live.unless_it_dies(live.channel.renew(identity))
        _check(renewed, identity, may_skip=not self._driver.networked)

    async def listen(self, live: LiveVm, port: int) -> tuple[socket.socket, str]:
        """A socket that listens where this machine alone can connect, and its address as the machine sees it.

        A machine without a network of its own shares the host's: then any port of loopback."""
        if self._network is None or live.vm_slot.slot is None:
            listener = socket.create_server(("127.0.0.1", 0), backlog=128)
            return listener, f"127.0.0.1:{listener.getsockname()[1]}"
        return await self._network.listen(live.vm_slot.slot, port), f"{GUEST_GATEWAY}:{port}"

    async def refused(self, live: LiveVm) -> int:
        """How many frames it sent in another's name, or in no IPv4: all were dropped at its tap. Never raises."""
        if self._network is None or live.vm_slot.slot is None:
            return 0
        try:
            return await self._network.refused(live.vm_slot.slot)
        except (SwarmError, RuntimeError) as error:  # no more threads
            log.warning("can't tell what a VM was refused", n=live.n, error=str(error))
            return 0

    def assignment(self, live: LiveVm, assignment: Assignment) -> None:
        """Say whom a machine serves now, as others on this host see it."""
        _record(live.vm_slot, live.vm, self._driver.name, assignment)

    async def template(self, spec: VmSpec, *, build: bool = True) -> Template | None:
        """The template for this shape, built now if there is none; None when this launcher makes no clones, or, without
        ``build``, when there is none."""
        if self._templates is None:
            return None
        parts = shape(spec, driver=self._driver, probe=self._probe)
        if not build:
            return await self._templates.find(spec, parts)
        return await self._templates.get(spec, parts, lambda dir: self._build_template(spec, dir))  # noqa: A006

    async def spawn(self, n: int, spec: VmSpec, *, seeded: bool = True) -> VmRecord:
        """VM ``n`` by hand: it outlives this process. An older VM ``n`` made by hand is replaced; one that a live
        process uses is a Conflict. Without ``seeded`` the guest gets no randomness (to test what the doctor finds)."""
        # One VM is no reason to build a template; where there is one, its clone is up sooner.
        template = await self.template(spec, build=False) if seeded and spec.entropy else None
        async with undoing() as undo:
            lease = await sweep.take(self._inventory, self._network, n, replace=True)
            undo.push_async_callback(asyncio.to_thread, lease.release)
            vm_slot = VmSlot(lease=lease, slot=await self._slot(lease, undo))
            live = await self._launch(
                spec, template, vm_slot, Assignment(), Timeline(), undo, outlive=True, seeded=seeded
            )
            if self._network is not None and seeded:
                # So that who is told "VM 1 is up" finds its sshd up; without KVM its start takes a second or more.
                await live.unless_it_dies(live.channel.sshd_ready(timeout_seconds=self._boot_timeout_seconds))
            live.channel.close()
            record = lease.hand_over()
            undo.pop_all()  # it stays; nothing may come between the two
        return record

    async def remove(self, n: int) -> None:
        """Remove VM ``n``, one by hand or a leftover. Raises NotFound, Conflict."""
        await sweep.remove_vm(self._inventory, self._network, n)
        if self._network is not None:
            await asyncio.to_thread(self._ssh.know, self._network.address(n), None)

    # --- steps ------------------------------------------------------------------------------------------------------

    async def _launch(
        self,
        spec: VmSpec,
        template: Template | None,
        vm_slot: VmSlot,
        assignment: Assignment,
        timeline: Timeline,
        undo: AsyncExitStack,
        *,
        outlive: bool = False,
        seeded: bool = True,
    ) -> LiveVm:
        lease, slot = vm_slot.lease, vm_slot.slot
        timeline.mark("slot")

        async def start() -> Vm:
            if template is None:
                vm = await self._driver.boot(spec, slot, lease.dir, outlive=outlive)
            else:
                vm = await self._driver.restore(template, slot, lease.dir, outlive=outlive)
            undo.push_async_callback(vm.kill)
            _record(vm_slot, vm, self._driver.name, assignment)
            return vm

        vm = await finish_uninterrupted(start())
        timeline.mark("running")
        identity, known_key = self._identity(lease.n, seeded=seeded, sshd_ready=outlive and seeded)
        token = template.token if template else identity.token
        channel = await self._connect(vm, token, undo, listening=template is not None, preloads=bool(spec.preload))
        timeline.mark("answered")
        renewed = await unless_it_dies(vm, channel.renew(identity))
        _check(renewed, identity, may_skip=not self._driver.networked)
        if outlive:
            _write_token(lease.dir / TOKEN_FILE, identity.token)
            if slot:
                await asyncio.to_thread(self._ssh.know, slot.address, known_key)
        return LiveVm(n=lease.n, vm=vm, channel=channel, renewed=renewed, vm_slot=vm_slot, identity=identity)

    async def _slot(self, lease: SlotLease, undo: AsyncExitStack) -> Slot | None:
        if self._network is None:
            return None
        network = self._network

        async def create() -> Slot:
            slot = await network.create(lease.n)  # which undoes itself; a Conflict means that the slot is not ours
            undo.push_async_callback(network.destroy, lease.n)
            return slot

        return await finish_uninterrupted(create())

    async def _connect(
        self, vm: Vm, token: bytes, undo: AsyncExitStack, *, listening: bool = False, preloads: bool = False
    ) -> Channel:
        """agentd's first answer: userspace is up. A VM that ends before is a BootFailed with its last words."""
        # It answers when all is imported, which without KVM takes a large package a quarter of a minute of its own.
        patience = self._boot_timeout_seconds * (_PRELOAD_PATIENCE if preloads else 1)

        async def connect() -> Channel:
            return await undo.enter_async_context(
                Channel.connect(vm.endpoint, token=token, timeout_seconds=patience, listening=listening)
            )

        try:
            return await unless_it_dies(vm, connect())
        except (OutcomeUnknown, ChannelError) as error:
            last = last_lines(vm.console, lines=4)
            seen = f"; its console ends with: {' | '.join(last)}" if last and "console" not in str(error) else ""
            raise BootFailed(f"the VM did not come up: {error}{seen}") from error

    def _identity(self, n: int, *, seeded: bool = True, sshd_ready: bool = False) -> tuple[Identity, str]:
        """A fresh identity for VM ``n``, and the public half of its host key."""
        key = ssh.new_key()
        identity = Identity(
            generation=secrets.token_hex(16),
            seed=os.urandom(SEED_BYTES) if seeded else b"",
            hostname=f"vm{n}",
            machine_id=secrets.token_hex(16),
            ssh_host_key=key.private.decode(),
            authorized_keys=self._ssh.public_key() + "\n",
            token=secrets.token_bytes(TOKEN_BYTES),
            work_disk=True,
            sshd_ready=sshd_ready,
        )
        return identity, key.public

    async def _build_template(self, spec: VmSpec, dir: Path) -> bytes:  # noqa: A002
        """Boot a VM, warm it up, and freeze it into ``dir``. Returns the token that its clones will know."""
        token = secrets.token_bytes(TOKEN_BYTES)
        full = replace(spec, preload=(*COMMON_MODULES, *spec.preload))
        async with undoing() as undo:
            vm_slot = await self._slots.take(undo)

            async def start() -> Vm:
                vm = await self._driver.boot(full, vm_slot.slot, vm_slot.lease.dir, for_template=True)
                undo.push_async_callback(vm.kill)
                _record(vm_slot, vm, self._driver.name, Assignment())
                return vm

            vm = await finish_uninterrupted(start())
            async with AsyncExitStack() as connection:
                channel = await self._connect(vm, token, connection, preloads=bool(spec.preload))
                if failed := (await unless_it_dies(vm, channel.hello())).preload_failed:
                    said = "; ".join(f"{name}: {printable(why.encode())[:200]}" for name, why in failed.items())
                    raise BootFailed(f"what the agent's manifest preloads can't be imported: {said}", retryable=False)
                keeps_disk = getattr(self._driver, "keeps_disk", False)
                await unless_it_dies(vm, warm_template(channel, token, work_disk=keeps_disk))
            # The connection is closed, and with SO_LINGER 0 the guest holds no TCP state of it.
            await vm.snapshot(dir)
        return token


async def unless_it_dies(vm: Vm, work: Coroutine[Any, Any, T]) -> T:
    task, death = asyncio.ensure_future(work), asyncio.ensure_future(vm.wait())
    try:
        await asyncio.wait({task, death}, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and isinstance(task.exception(), ChannelError):
            await asyncio.wait({death}, timeout=_LAST_GASP_SECONDS)
        if death.done() and not (task.done() and task.exception() is None):
            raise _death(vm, death.result())
        return task.result()
    finally:
        for each in (task, death):
            each.cancel()
        await asyncio.gather(task, death, return_exceptions=True)


async def _closed(making: asyncio.Task[None], vm_slots: SlotPool) -> None:
    await asyncio.gather(making, return_exceptions=True)
    await vm_slots.close()


def _death(vm: Vm, how: str) -> StepError:
    """Why a VM is gone, from what its console shows."""
    lines = last_lines(vm.console, lines=200)
    panic = next((i for i, line in enumerate(lines) if "Kernel panic" in line), None)
    if panic is not None:
        said = lines[panic].partition("Kernel panic")
        return OutcomeUnknown(f"the guest's kernel panicked: {''.join(said[1:])}", reason=FailureReason.GUEST_PANIC)
    last = " | ".join(lines[-3:]) or "nothing"
    return OutcomeUnknown(f"the VM died while it was in use: {how}; its console ends with: {last}")


def _check(renewed: Renewed, identity: Identity, *, may_skip: bool = False) -> None:
    """A guest that is not fully itself is not used: two clones might share secrets, or write into the wrong disk.

    ``may_skip``: it is a plain process, which leaves the host's name and machine id alone; a VM has no such excuse."""
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


def _record(vm_slot: VmSlot, vm: Vm, driver: str, assignment: Assignment) -> None:
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
            ticket_id=assignment.ticket_id,
            attempt_id=assignment.attempt_id,
        )
    )


def _report(live: LiveVm, spec: VmSpec, assignment: Assignment) -> None:
    """What a VM took, as the host sees it. (The guest's own last writes may not have got that far.)"""
    used_mb = round(used_bytes(live.vm_slot.lease.dir / "work.ext4") / (1 << 20), 1)
    log.info("VM ends", vm=live.n, ticket=assignment.ticket_id, work_disk_mb=used_mb, of_mb=spec.disk_mb)


def _write_token(path: Path, token: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(token)
