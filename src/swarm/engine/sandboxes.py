"""The sandboxes that this engine holds: claimed like attempts, under the same kind of lease, each in a task of its own.

A sandbox that is paused is held by nobody. The next use of it asks for it in its row, and an engine of its host claims
and resumes it. All that is done in it is a conversation with its guest, which is passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from swarm.agents import Installed
from swarm.base import crash_points, trace
from swarm.base.aio import cancel_all, finish_uninterrupted, quietly
from swarm.base.clock import Timeline
from swarm.base.log import logger
from swarm.channel.conversation import Guest
from swarm.engine import conversing
from swarm.engine.conversing import Told
from swarm.engine.egress import Egress, Grant
from swarm.engine.engine import AGENT_DIR, ImageSource, LayerSource
from swarm.engine.held import Emit, Ending, Held
from swarm.engine.room import Memory, VmInUse
from swarm.errors import ChannelError, Conflict, ImageError, LeaseLost, NotFound, OutcomeUnknown, StoreError, SwarmError
from swarm.ledger import Account
from swarm.model import Agent, Sandbox, SandboxClaim, SandboxState, Snapshot
from swarm.store.store import Store
from swarm.vm.driver import VmSpec
from swarm.vm.launcher import Assignment, Launcher, LiveVm
from swarm.vm.snapshots import Snapshots

log = logger(__name__)

# A sandbox whose row does not say when it is idle is paused when nobody has spoken with it for so long.
IDLE_SECONDS: Final = 600.0
LOOK_SECONDS: Final = 30.0
PACE_SECONDS: Final = 0.02  # between two looks: most commits are about something else
RENEW_SECONDS: Final = 1.0
COLLECT_SECONDS: Final = 60.0
_RETRY_SECONDS: Final = 0.5
_USED_SECONDS: Final = 10.0  # between two notes in its row of when it was used last
# A sandbox that could not be paused by itself tries again after this long.
_PAUSE_AGAIN_SECONDS: Final = 60.0
# Where there is no room for one that is wanted, one that nobody has spoken with for so long is paused.
_YIELD_SECONDS: Final = 5.0
MAX_FORKS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """How a hold ended, as its row is to say. ``snapshot``: of the pause."""

    state: SandboxState
    snapshot: Snapshot | None = None
    error: str | None = None


class Sandboxes:
    """``worker``: the engine's name in the database. ``most``: how many it holds at once. ``left_mb``: the memory for
    one more VM; None: no limit. ``emit`` takes events to be written with the next batch. Its loops (`loops`) run until
    they are cancelled, then call `drained`."""

    def __init__(
        self,
        *,
        store: Store,
        worker: str,
        launcher: Launcher,
        snapshots: Snapshots,
        images: ImageSource,
        layers: LayerSource,
        egress: Egress,
        installed: Installed,
        lease_seconds: float,
        most: int,
        emit: Emit,
        idle_seconds: float = IDLE_SECONDS,
        starts_at_once: int = 4,
    ) -> None:
        self._store, self._worker = store, worker
        self._launcher, self._snapshots = launcher, snapshots
        self._images, self._layers, self._egress, self._installed = images, layers, egress, installed
        self._lease_seconds, self._idle_seconds = lease_seconds, idle_seconds
        self.most = most
        self._emit = emit
        self._host = socket.gethostname()
        self._held: dict[str, Held] = {}  # by the sandbox's id
        self._look = asyncio.Event()
        self._starting = asyncio.Semaphore(starts_at_once)
        self._store_error = ""  # the last one, logged once
        self.left_mb: Callable[[], int | None] = lambda: None
        self.most_mb: int | None = None
        self.stopping = False

    @property
    def held(self) -> Mapping[str, Held]:
        """What this engine holds now, by id."""
        return self._held

    def vms(self) -> Iterator[VmInUse]:
        for held in self._held.values():
            yield held.takes

    def look(self) -> None:
        """There was a commit: a sandbox may be wanted."""
        self._look.set()

    # --- loops ------------------------------------------------------------------------------------------------------

    async def claiming(self) -> None:
        """Claim sandboxes for ever: those that are new, and those that are paused and wanted."""
        while True:
            self._look.clear()
            looked = time.monotonic()
            try:
                wait = await self._fill()
                self._store_error = ""
            except StoreError as error:
                if str(error) != self._store_error:
                    self._store_error = str(error)
                    log.warning("can't look for sandboxes", error=self._store_error)
                wait = _RETRY_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._look.wait()
            await asyncio.sleep(max(0.0, looked + PACE_SECONDS - time.monotonic()))

    async def _fill(self) -> float:
        """Claim what there is room for. Returns how long to wait for the next look."""
        while not self.stopping:
            due = await self._store.due_sandboxes(self._host)
            if not due.ready:
                return LOOK_SECONDS if due.next_ms is None else min(LOOK_SECONDS, due.next_ms / 1000 + 0.001)
            claims = await self._store.claim_sandboxes(
                self._worker,
                host=self._host,
                lease_seconds=self._lease_seconds,
                limit=max(0, self.most - len(self._held)),
                memory_mb=self.left_mb(),
            )
            for claim in claims:
                self._begin(claim)
            if not claims:
                self._make_room()
                return 1.0
        return LOOK_SECONDS

    def _begin(self, claim: SandboxClaim) -> None:
        held = Held(claim, agent_of(claim), idle_seconds=self._idle_seconds, emit=self._emit)
        self._held[held.id] = held
        held.task = asyncio.create_task(self._hold(held), name=f"sandbox-{held.id}")

    def _make_room(self) -> None:
        """Pause the one that nobody has spoken with for the longest time."""
        held = max(self._held.values(), key=lambda one: one.idle_for, default=None)
        if held is not None and held.idle_for > _YIELD_SECONDS and held.may_yield:
            held.want(Ending.PAUSED)

    async def renewing(self) -> None:
        """Renew the leases of all that are held, in one statement; hear what is wanted of them."""
        every = min(RENEW_SECONDS, self._lease_seconds / 3)
        good_until = time.monotonic() + self._lease_seconds
        while True:
            await asyncio.sleep(every)
            holds = {held.claim.hold_id: held for held in self._held.values()}
            began = time.monotonic()
            if not holds:
                good_until = began + self._lease_seconds
                continue
            try:
                renewal = await self._store.renew_sandboxes(list(holds), lease_seconds=self._lease_seconds)
            except StoreError as error:
                log.warning("can't renew the leases of sandboxes", error=str(error), sandboxes=len(holds))
                if time.monotonic() > good_until:
                    for held in holds.values():
                        held.lose()
                continue
            good_until = began + self._lease_seconds
            for hold_id in renewal.lost:
                if hold_id in holds:
                    log.warning("lease lost, VM killed", sandbox=holds[hold_id].id)
                    holds[hold_id].lose()
            for hold_id, wanted in renewal.wanted.items():
                if hold_id in holds and wanted in tuple(Ending):
                    holds[hold_id].want(Ending(wanted))

    async def collecting(self) -> None:
        """Remove the snapshots that nothing needs any more, and what dead engines left half made."""
        while True:
            with contextlib.suppress(StoreError):
                await self.collect()
            await asyncio.sleep(COLLECT_SECONDS)

    async def collect(self) -> None:
        await self._store.expire_snapshots(self._host)
        keep = await self._store.snapshot_ids(self._host)
        await asyncio.to_thread(self._snapshots.collect, keep)

    def stop(self) -> None:
        """Hold no more, and pause all that are held. Doesn't wait: see `drained`."""
        self.stopping = True
        for held in self._held.values():
            held.want(Ending.PAUSED)

    async def drained(self) -> None:
        """Return when all that were held are paused, or lost."""
        self.stop()
        while tasks := {held.task for held in self._held.values() if held.task is not None}:
            await asyncio.wait(tasks)

    # --- holding one ------------------------------------------------------------------------------------------------

    async def _hold(self, held: Held) -> None:
        """From the claim to the row that says how it ended. The VM is gone by then, in every case."""
        try:
            try:
                done = await self._live(held)
            finally:
                held.executing = False
            await finish_uninterrupted(self._write(held, done))
        except LeaseLost as error:
            log.warning("sandbox not held any more", sandbox=held.id, why=str(error))
        except asyncio.CancelledError:
            if not held.lost:
                raise
        except Exception as error:
            # A bug in Swarm must not end an engine that others need. The lease ends by itself.
            log.error("a sandbox was lost by a bug in Swarm", sandbox=held.id, error=f"{type(error).__name__}: {error}")
            log.debug("where", exc_info=True)
        finally:
            del self._held[held.id]
            held.answer()
            self._look.set()

    async def _live(self, held: Held) -> _Done:
        claim = held.claim
        if claim.sandbox.wanted == Ending.ENDED:
            return _Done(state=SandboxState.ENDED)
        try:
            async with self._machines.started(held, self._starting) as live:
                crash_points.reach("sandbox-started")
                await self._store.sandbox_running(claim.hold_id, vm_id=live.n)
                held.open(live)
                log.info("sandbox runs", sandbox=held.id, vm=live.n, resumed=claim.resumes)
                return await self._serve(held, live)
        except (LeaseLost, StoreError):
            raise
        except SwarmError as error:
            return self._failed(held, error)

    def _failed(self, held: Held, error: SwarmError) -> _Done:
        """It did not start, or its VM is dead."""
        claim = held.claim
        if held.started.done():
            return _Done(state=SandboxState.LOST, error=str(error))
        if claim.resumes and claim.snapshot is not None and self._snapshots.has(claim.snapshot.id):
            return _Done(state=SandboxState.PAUSED, snapshot=claim.snapshot, error=f"it could not be resumed: {error}")
        state = SandboxState.LOST if claim.resumes else SandboxState.ENDED
        return _Done(state=state, error=f"it could not be {'resumed' if claim.resumes else 'started'}: {error}")

    async def _serve(self, held: Held, live: LiveVm) -> _Done:
        """Until it is to be paused or ended. Raises OutcomeUnknown when its VM dies."""
        died = asyncio.ensure_future(live.vm.wait())
        used = asyncio.create_task(self._note_use(held))
        try:
            while True:
                if died.done():
                    raise OutcomeUnknown(f"its VM died: {died.result()}")
                if held.asked is Ending.ENDED or held.is_over():
                    held.close("has ended" if held.asked else "has ended: its time to live is over")
                    return _Done(state=SandboxState.ENDED)
                if held.asked is Ending.PAUSED or held.is_idle():
                    if (snapshot := await self._pause(held, live)) is not None:
                        return _Done(state=SandboxState.PAUSED, snapshot=snapshot)
                    if self.stopping:
                        return _Done(state=SandboxState.LOST, error=f"its engine stopped, and could not pause it: {held.why}")
                    continue
                held.changed.clear()
                changed = asyncio.ensure_future(held.changed.wait())
                await asyncio.wait({died, changed}, timeout=held.seconds_left(), return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
        finally:
            await cancel_all([died, used])
            held.close("has ended")

    async def _pause(self, held: Held, live: LiveVm) -> Snapshot | None:
        """Its snapshot, once its VM has ended. None if that can't be: it runs on, and whoever asked is told why."""
        by, asked = held.by, held.asked is not None
        try:
            async with held.changing:
                held.close("is being paused")
                return await self._machines.pause(held, live, by=by)
        except (LeaseLost, StoreError):
            raise
        except SwarmError as error:
            log.warning("a sandbox could not be paused", sandbox=held.id, error=str(error))
            held.record("trouble", {"what": "pause", "error": str(error), "by": by} if asked else {"what": "pause"})
            held.refuse(error, seconds=_PAUSE_AGAIN_SECONDS)
            if live.vm_is_gone:
                raise
            held.reopen()
            return None

    async def _note_use(self, held: Held) -> None:
        noted = held.used_at
        while True:
            await asyncio.sleep(_USED_SECONDS)
            if held.used_at > noted:
                noted = held.used_at
                with contextlib.suppress(StoreError):
                    await self._store.sandbox_used(held.claim.hold_id)

    async def _write(self, held: Held, done: _Done) -> None:
        """For as long as the lease can still be ours. Raises LeaseLost, StoreError."""
        hold_id, deadline = held.claim.hold_id, time.monotonic() + self._lease_seconds
        while True:
            try:
                if done.state == SandboxState.PAUSED:
                    assert done.snapshot is not None
                    await self._store.sandbox_paused(hold_id, done.snapshot, error=done.error)
                else:
                    await self._store.sandbox_ended(hold_id, done.state, error=done.error)
            except StoreError as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("can't write the end of a sandbox yet", sandbox=held.id, error=str(error))
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                log.info("sandbox held no more", sandbox=held.id, state=str(done.state), error=done.error)
                return

    # --- what it can be asked ---------------------------------------------------------------------------------------

    def _find(self, id: str) -> Held:
        held = self._held.get(id)
        if held is None:
            raise Conflict(f"this engine does not hold the sandbox {id[:100]!r}: `swarm sandbox show` says who does")
        return held

    @asynccontextmanager
    async def converse(
        self, id: str, op: str, fields: Mapping[str, object], payload: bytes, *, by: str
    ) -> AsyncIterator[Told]:
        """A conversation with its guest, for the length of the block. Raises UsageError for what clients may not ask,
        Conflict for a sandbox that this engine does not hold (any more)."""
        conversing.check(op)
        held = self._find(id)
        async with held.spoken_with() as guest, guest.open(op, held.fields(op, fields), payload) as inner:
            told = Told(inner, op, fields, held.recorder(op, fields, by))
            try:
                yield told
            except BaseException as error:
                told.ended(error)
                raise
            told.ended(None)

    async def pause(self, id: str, *, by: str) -> None:
        """Returns when it is paused. Raises Conflict, and NoSpace when it can't be; it then runs on."""
        held = self._find(id)
        await asyncio.shield(held.started)
        await held.ends(Ending.PAUSED, by)

    async def end(self, id: str, *, by: str) -> None:
        """Returns when its VM is gone."""
        await self._find(id).ends(Ending.ENDED, by)

    async def snapshot(
        self, id: str, *, by: str, name: str | None = None, keep_seconds: float | None = None,
        without_secrets: bool = False,
    ) -> str:  # fmt: skip
        """The id of a new snapshot; the sandbox goes on. ``keep_seconds`` None: until it is removed."""
        held = self._find(id)
        if without_secrets and held.secret:
            raise Conflict(f"{held.name} was given secrets, and its memory may hold them")
        async with held.spoken_with(), held.changing:
            expires_at = None if keep_seconds is None else int((time.time() + keep_seconds) * 1000)
            made = await self._machines.save(held, kind="named", by=by, name=name, expires_at=expires_at)
            await self._keep(made, by)
        return made.id

    async def fork(self, id: str, *, by: str, count: int = 1, name: str | None = None) -> Sequence[str]:
        """The ids of new sandboxes, which start from its present state. ``name``: of one; of several, with '-1', …"""
        held = self._find(id)
        if not 1 <= count <= MAX_FORKS:
            raise UsageError(f"a sandbox can be forked 1 to {MAX_FORKS} times at once, not {count}")
        names = [name] if count == 1 or name is None else [f"{name}-{number}" for number in range(1, count + 1)]
        async with held.spoken_with(), held.changing:
            made = await self._machines.save(held, kind="fork", by=by)
            child = replace(held.sandbox, id="", parent_id=held.id, snapshot_id=made.id, ...)
