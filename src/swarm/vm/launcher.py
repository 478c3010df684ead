"""From a VmSpec to a VM that is ready for an agent, and its removal afterwards.

Every step registers its undo first, and the undo can't be cancelled. So nothing of a VM stays, whatever happens at
whatever moment (failure, Ctrl+C, a dead VMM). What SIGKILL leaves behind is found by `swarm.vm.slots.sweep`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from swarm.base import files, sparse
from swarm.base.aio import cancel_all, finish_uninterrupted, quietly, undoing
from swarm.base.clock import Timeline
from swarm.base.log import logger
from swarm.channel import Channel, Identity
from swarm.errors import BootFailed, ChannelError, OutcomeUnknown, SwarmError
from swarm.vm.choose import Choice
from swarm.vm.driver import GUEST_GATEWAY, Slot, Snapshot, Template, Vm, VmSpec
from swarm.vm.drivers.console import last_lines
from swarm.vm.drivers.disk import WORK_DISK, used_bytes
from swarm.vm.live import Assignment, LiveVm, check_renewed, record, report, while_alive
from swarm.vm.network.network import Network
from swarm.vm.slots import ssh, sweep
from swarm.vm.slots.inventory import Inventory, SlotLease, VmRecord
from swarm.vm.slots.slot_pool import SlotPool, VmSlot
from swarm.vm.snapshots import Stage
from swarm.vm.template import OnBuild, Templates, shape
from swarm.vm.warmup import COMMON_MODULES, SEED_BYTES, interpreter_seconds, told_to_guest, warm_template

log = logger(__name__)

__all__ = ["Assignment", "Launcher", "LiveVm", "Source", "check_renewed", "while_alive"]

TOKEN_BYTES = 32
TOKEN_FILE = "token"
_ASK_SECONDS = 5.0
_MEND_SECONDS, _MEND_SHARE = 2.0, 0.01  # how often to look, and how much of the time that may take
_PRELOAD_FACTOR = 4  # of the boot timeout
_IO_SECONDS = 60.0  # of each exchange with agentd, but for a run


class Source(Protocol):
    """Where the launcher may find VMs made ahead. (It can't import the pool, which is on a higher layer.)"""

    async def take(self, template: Template, assignment: Assignment, undo: AsyncExitStack) -> LiveVm | None:
        """A VM that answers now, or None. ``undo`` ends it."""


class Launcher:
    """Starts VMs, in free slots from ``first_slot`` upward.

    With ``templates``, and a driver that supports snapshots, VMs are clones; otherwise each boots from its image. While
    a `swarm.vm.pool.Pool` is attached, clones come from there if it has any ready.
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
        self.state_dir = inventory.state_dir
        self._templates = templates if choice.probe.snapshots else None
        self._ssh = ssh_dir
        self.slots = SlotPool(inventory=inventory, network=self._network, first=first_slot)
        self._source: Source | None = None
        self._boot_timeout_seconds = boot_timeout_seconds

    @asynccontextmanager
    async def vm(
        self, spec: VmSpec, assignment: Assignment, timeline: Timeline, *, on_build: OnBuild | None = None
    ) -> AsyncIterator[LiveVm]:
        """A VM for the length of the block. Raises BootFailed, HostError."""
        async with undoing() as undo:
            with timeline.cut_by_errors():
                template = await self.template(spec, on_build=on_build)
                timeline.mark("template")
                live = await self._source.take(template, assignment, undo) if self._source and template else None
                if live is not None:
                    for mark in ("slot", "running", "answered"):
                        timeline.mark(mark)
                else:
                    vm_slot = await self.slots.take(undo)
                    live = await self._launch(spec, template, vm_slot, assignment, timeline, undo)
                undo.callback(report, live, spec, assignment)  # before the VM is removed
                yield live

    @asynccontextmanager
    async def keeping(self, slots: int, *, ahead: int = 0) -> AsyncIterator[None]:
        """For the length of the block, keep up to ``slots`` free slots for the next VMs; make ``ahead`` of them
        now, in the background. Mends the network of VMs, see `Network.mend`."""
        self.slots.keep += slots
        making = asyncio.create_task(self._fill_slots(ahead), name="slots-ahead")
        mending = asyncio.create_task(self._mend_network(), name="mend-network")
        try:
            yield
        finally:
            await cancel_all([mending])
            making.cancel()
            await finish_uninterrupted(_closed(making, self.slots))

    async def _fill_slots(self, count: int) -> None:
        try:
            await self.slots.fill(count)
        except SwarmError as error:
            log.warning("no network slot could be made ahead", error=str(error))

    async def _mend_network(self) -> None:
        told, took = "", 0.0
        while self._network is not None:
            await asyncio.sleep(max(_MEND_SECONDS, took / _MEND_SHARE))
            began = time.monotonic()
            try:
                if await self._network.mend():
                    log.warning("the network of VMs had lost parts, which were put back")
                told = ""
            except (SwarmError, RuntimeError) as error:  # RuntimeError: no more threads
                if str(error) != told:
                    told = str(error)
                    log.warning("can't mend the network of VMs", error=told)
            took = time.monotonic() - began

    async def why_silent(self, live: LiveVm) -> str:
        """Why a guest did not end its agent: what the VMM does, whether agentd answers, what the network lacks. If
        agentd answers, an agent that still runs is killed."""
        said = [await live.vm.doing()]
        token = live.identity.token
        try:
            async with Channel.connect(live.vm.endpoint, token=token, timeout_seconds=_ASK_SECONDS) as channel:
                if await channel.kill():
                    said.append("agentd answers a new connection, but has not ended the agent")
                else:
                    said.append("agentd answers a new connection, and no agent runs: the connection to it was lost")
        except SwarmError as error:
            said.append(str(error))
            if self._network is not None and (fault := await self._network.fault(live.n)):
                said.append(fault)
        return "; ".join(said)

    def attach(self, source: Source) -> None:
        """From now on, take VMs from ``source`` if it has any."""
        self._source = source

    def detach(self) -> None:
        """From now on, start every VM here."""
        self._source = None

    async def clone(self, template: Template, undo: AsyncExitStack) -> LiveVm:
        """A clone that is used for nothing yet; see `assign`. ``undo`` ends it."""
        vm_slot = await self.slots.take(undo)
        return await self._launch(template.spec, template, vm_slot, Assignment(), Timeline(), undo)

    async def renew(self, live: LiveVm) -> None:
        """Renew a VM once more: same identity, new randomness, present time."""
        identity = replace(live.identity, seed=os.urandom(SEED_BYTES))
        renewed = await live.while_alive(live.channel.renew(identity))
        check_renewed(renewed, identity, may_skip=not self._driver.networked)

    async def listen(self, live: LiveVm, port: int) -> tuple[socket.socket, str]:
        """A socket that listens where only this VM can connect, and its address as the VM sees it.

        A VM without a network of its own shares the host's: for it, any free port of loopback."""
        if self._network is None or live.vm_slot.slot is None:
            listener = socket.create_server(("127.0.0.1", 0), backlog=128)
            return listener, f"127.0.0.1:{listener.getsockname()[1]}"
        return await self._network.listen(live.vm_slot.slot, port), f"{GUEST_GATEWAY}:{port}"

    async def refused(self, live: LiveVm) -> int:
        """How many frames it sent with a foreign address, or that were not IPv4; its tap dropped them. Never raises."""
        if self._network is None or live.vm_slot.slot is None:
            return 0
        try:
            return await self._network.refused(live.vm_slot.slot)
        except (SwarmError, RuntimeError) as error:  # RuntimeError: no more threads
            log.warning("can't count the frames that a VM was refused", n=live.n, error=str(error))
            return 0

    def assign(self, live: LiveVm, assignment: Assignment) -> None:
        """Record what a VM is used for from now on."""
        record(live.vm_slot, live.vm, self._driver.name, assignment)

    # --- snapshots --------------------------------------------------------------------------------------------------

    async def save(self, live: LiveVm, stage: Stage) -> Snapshot:
        """A snapshot of the VM, which goes on. Its programs stand still for a moment, or for longer if the guest does
        not let them go on: see `LiveVm.frozen`. Raises BootFailed, NoSpace."""
        with stage.explained():
            try:
                await live.while_alive(live.vm.save(stage.dir, freeze=live.freeze))
            finally:
                await finish_uninterrupted(quietly(live.thaw()))
            return await self._seal(live, stage)

    async def pause(self, live: LiveVm, stage: Stage) -> Snapshot:
        """A snapshot of the VM, which ends. After an error it goes on. Raises BootFailed, NoSpace."""
        # Whoever resumes it may die before its row says so. Then it is resumed once more, from a disk that must be as
        # it was, though one that takes long to copy was the VM's own.
        disk = used_bytes(live.vm_slot.lease.dir / WORK_DISK) > sparse.COPIED_BYTES // 2
        try:
            with stage.explained():
                async with live.vm.pausing(stage.dir, freeze=partial(live.freeze, disk=disk)):
                    return await self._seal(live, stage, lasts=True)
        except BaseException:
            await finish_uninterrupted(quietly(live.thaw()))
            raise

    async def _seal(self, live: LiveVm, stage: Stage, *, lasts: bool = False) -> Snapshot:
        return await stage.seal(
            spec=live.spec,
            identity=live.identity,
            driver=self._driver.name,
            accelerator=self._probe.accelerator,
            version=self._probe.version,
            disk_still=live.disk_still,
            lasts=lasts,
        )

    @asynccontextmanager
    async def restored(
        self,
        snapshot: Snapshot,
        assignment: Assignment,
        timeline: Timeline,
        *,
        fork: bool,
        prepare: Callable[[LiveVm], Awaitable[None]] | None = None,
    ) -> AsyncIterator[LiveVm]:
        """A VM that goes on where the snapshot was taken, for the length of the block.

        A ``fork`` leaves the snapshot as it is, and gets a new identity: randomness, clock, machine id, host name, SSH
        key, token. Otherwise it *is* the VM of the snapshot, in its files: the same identity with new randomness and
        clock; once it runs, the snapshot is used up, and the caller removes it. Either way, its programs go on after
        that, and after ``prepare``. Raises BootFailed, HostError.
        """
        if (snapshot.driver, snapshot.accelerator) != (self._driver.name, self._probe.accelerator):
            raise BootFailed(
                f"the snapshot was taken with driver {snapshot.driver} {snapshot.accelerator}, and this host now uses "
                f"{self._driver.name} {self._probe.accelerator}: set SWARM_DRIVER", retryable=False
            )  # fmt: skip
        async with undoing() as undo:
            with timeline.cut_by_errors():
                vm_slot = await self.slots.take(undo)
                timeline.mark("slot")
                identity, host_key = self.new_identity(vm_slot.lease.n)
                if not fork:
                    identity = replace(snapshot.identity, seed=identity.seed)
                    host_key = ssh.public_of(identity.ssh_host_key)
                start = self._driver.resume(snapshot, vm_slot.slot, vm_slot.lease.dir, own=not fork)
                vm = await self._started(start, vm_slot, assignment, undo, host_key)
                timeline.mark("running")
                live = await self._identified(
                    snapshot.spec, vm, vm_slot, snapshot.identity.token, identity, timeline, undo, listening=True
                )
                if prepare is not None:
                    await prepare(live)
                await live.thaw()
                undo.callback(report, live, snapshot.spec, assignment)
                yield live

    async def template(self, spec: VmSpec, *, build: bool = True, on_build: OnBuild | None = None) -> Template | None:
        """The template for this shape, built now if it is missing; None if this launcher makes no clones, or if it is
        missing and ``build`` is false."""
        if self._templates is None:
            return None
        parts = shape(spec, driver=self._driver, probe=self._probe)
        if not build:
            return await self._templates.find(spec, parts)
        return await self._templates.get(spec, parts, lambda dir: self._build_template(spec, dir), on_build)

    async def spawn(self, n: int, spec: VmSpec, *, seeded: bool = True) -> VmRecord:
        """Start VM ``n`` manually: it outlives this process. It replaces an older manual VM ``n``; raises Conflict if a
        live process uses ``n``. Without ``seeded``, the guest gets no randomness (to test what the doctor finds)."""
        # One VM does not justify building a template; if there is one, its clone is up sooner.
        template = await self.template(spec, build=False) if seeded and spec.entropy else None
        async with undoing() as undo:
            lease = await sweep.take(self._inventory, self._network, n, replace=True)
            undo.push_async_callback(asyncio.to_thread, lease.release)
            vm_slot = VmSlot(lease=lease, slot=await self._slot(lease, undo))
            live = await self._launch(
                spec, template, vm_slot, Assignment(), Timeline(), undo, outlive=True, seeded=seeded
            )
            if self._network is not None and seeded:
                # "VM 1 is up" must be true for ssh as well; without KVM, sshd takes a second or more to start.
                await live.while_alive(live.channel.sshd_ready(timeout_seconds=self._boot_timeout_seconds))
            live.channel.close()
            record = lease.detach()
            undo.pop_all()  # it stays; no await may come between the two
        return record

    async def remove(self, n: int) -> None:
        """Remove VM ``n``, a manual one or a leftover. Raises NotFound, Conflict."""
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
        token = template.token if template else secrets.token_bytes(TOKEN_BYTES)
        identity, host_key = self.new_identity(lease.n, seeded=seeded, sshd_ready=outlive and seeded)
        if template is None:
            start = self._driver.boot(spec, slot, lease.dir, outlive=outlive, token=token)
        else:
            start = self._driver.restore(template, slot, lease.dir, outlive=outlive)
        vm = await self._started(start, vm_slot, assignment, undo, host_key)
        timeline.mark("running")
        live = await self._identified(
            spec, vm, vm_slot, token, identity, timeline, undo, listening=template is not None
        )
        if outlive:
            files.write_atomically(lease.dir / TOKEN_FILE, identity.token, mode=0o600)
            if slot:
                await asyncio.to_thread(self._ssh.know, slot.address, host_key)
        return live

    async def _identified(
        self,
        spec: VmSpec,
        vm: Vm,
        vm_slot: VmSlot,
        token: bytes,
        identity: Identity,
        timeline: Timeline,
        undo: AsyncExitStack,
        *,
        listening: bool,
    ) -> LiveVm:
        """Wait for agentd's answer, and give the guest its identity."""
        n = vm_slot.lease.n
        channel = await self._connect(vm, n, spec, token, undo, listening=listening)
        timeline.mark("answered")
        renewed = await while_alive(vm, channel.renew(identity, image=told_to_guest(spec)))
        check_renewed(renewed, identity, may_skip=not self._driver.networked)
        return LiveVm(n=n, spec=spec, vm=vm, channel=channel, renewed=renewed, vm_slot=vm_slot, identity=identity)

    async def _started(
        self, start: Coroutine[Any, Any, Vm], vm_slot: VmSlot, assignment: Assignment, undo: AsyncExitStack, key: str
    ) -> Vm:
        async def run() -> Vm:
            vm = await start
            undo.push_async_callback(vm.kill)
            record(vm_slot, vm, self._driver.name, assignment, key)
            return vm

        return await finish_uninterrupted(run())

    async def _slot(self, lease: SlotLease, undo: AsyncExitStack) -> Slot | None:
        if self._network is None:
            return None
        network = self._network

        async def create() -> Slot:
            slot = await network.create(lease.n)  # it undoes itself; a Conflict means that the slot is not ours
            undo.push_async_callback(network.destroy, lease.n)
            return slot

        return await finish_uninterrupted(create())

    async def _connect(
        self, vm: Vm, n: int, spec: VmSpec, token: bytes, undo: AsyncExitStack, *, listening: bool = False
    ) -> Channel:
        """Wait for agentd's first answer: userspace is up. Raises BootFailed, with the end of the console."""
        # It answers after all preloads are imported; without KVM, a large package alone takes 15 seconds.
        limits = {
            "timeout_seconds": self._boot_timeout_seconds * (_PRELOAD_FACTOR if spec.preload else 1),
            "io_timeout_seconds": _IO_SECONDS + interpreter_seconds(spec),
        }

        async def connect() -> Channel:
            connecting = Channel.connect(vm.endpoint, token=token, listening=listening, **limits)
            return await undo.enter_async_context(connecting)

        try:
            return await while_alive(vm, connect())
        except (OutcomeUnknown, ChannelError) as error:
            last = last_lines(vm.console, lines=4)
            seen = f"; its console ends with: {' | '.join(last)}" if last and "console" not in str(error) else ""
            if self._network and (fault := await self._network.fault(n)):
                seen += f"; {fault}"
            raise BootFailed(f"the VM did not come up: {error}{seen}") from error

    def new_identity(self, n: int, *, seeded: bool = True, sshd_ready: bool = False) -> tuple[Identity, str]:
        """A new identity for VM ``n``, and the public half of its host key."""
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

    async def _build_template(self, spec: VmSpec, dir: Path) -> bytes:
        """Boot a VM, warm it up, and write its snapshot into ``dir``. Returns the token that its clones will know."""
        token = secrets.token_bytes(TOKEN_BYTES)
        full = spec if told_to_guest(spec) else replace(spec, preload=(*COMMON_MODULES, *spec.preload))
        async with undoing() as undo:
            vm_slot = await self.slots.take(undo)
            first = secrets.token_bytes(TOKEN_BYTES)  # clones' agents can read it, and it opens none of them
            start = self._driver.boot(full, vm_slot.slot, vm_slot.lease.dir, for_template=True, token=first)
            vm = await self._started(start, vm_slot, Assignment(), undo, "")
            async with AsyncExitStack() as connection:
                channel = await self._connect(vm, vm_slot.lease.n, spec, first, connection)
                keeps_disk = getattr(self._driver, "keeps_disk", False)
                await while_alive(vm, warm_template(channel, token, spec=spec, work_disk=keeps_disk))
            # The connection is closed, and with SO_LINGER 0 the guest keeps no TCP state of it.
            await vm.snapshot(dir)
        return token


async def _closed(making: asyncio.Task[None], vm_slots: SlotPool) -> None:
    await asyncio.gather(making, return_exceptions=True)
    await vm_slots.close()
