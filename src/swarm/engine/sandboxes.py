"""The sandboxes that this engine holds: claimed like attempts, under the same kind of lease, each in a task of its own.

A sandbox that is paused is held by nobody. Its next use asks for it in its row, and an engine of its host claims and
resumes it. All that is done in it is a conversation with its guest, which is passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Final

from swarm.base import crash_points
from swarm.base.aio import finish_uninterrupted, quietly
from swarm.base.log import logger
from swarm.engine import conversing, kept, leases
from swarm.engine.conversing import Told
from swarm.engine.held import Done, Emit, Ending, Held
from swarm.engine.machines import Machines, agent_of
from swarm.engine.room import VmInUse
from swarm.errors import Conflict, LeaseLost, OutcomeUnknown, StoreError, SwarmError, UsageError
from swarm.live.wire import NotHeld
from swarm.model import SandboxClaim, SandboxState
from swarm.store.sandboxes.share import Share
from swarm.store.store import Store
from swarm.store.tickets.room import Room
from swarm.vm.launcher import LiveVm

log = logger(__name__)

# A sandbox whose row does not say when it is idle is paused when nobody has spoken with it for so long.
IDLE_SECONDS: Final = 600.0
LOOK_SECONDS: Final = 30.0
PACE_SECONDS: Final = 0.02  # between two looks: most commits are about something else
COLLECT_SECONDS: Final = 60.0
_RETRY_SECONDS: Final = 0.5
_ROOM_SECONDS: Final = 1.0  # nothing announces free memory
# One that could not be paused is not tried again for so long, unless somebody asks.
_PAUSE_AGAIN_SECONDS: Final = 60.0
# Where there is no room for one that is wanted, one that nobody has spoken with for so long is paused.
YIELD_SECONDS: Final = 5.0
MAX_FORKS: Final = 64
_TRIES: Final = 5  # of a program, while one snapshot after another is taken
_FORK_SECONDS: Final = 30.0  # what forks start from stays at least this long, and then until all have started


class Sandboxes:
    """``worker``: the engine's name in the database. ``most``: how many it holds at once, of which one project may have
    ``project_share``. ``emit`` takes events, which are written with the next batch. ``room``: for one more VM,
    and why none may be started. Its loops (`claiming`, `renewing`, `collecting`) run until
    they are cancelled; then call `drained`, before `renewing` is cancelled."""

    def __init__(
        self,
        *,
        store: Store,
        worker: str,
        machines: Machines,
        lease_seconds: float,
        most: int,
        emit: Emit,
        project_share: float = 1.0,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._store, self._worker, self._machines = store, worker, machines
        self._lease_seconds, self._idle_seconds = lease_seconds, idle_seconds
        self.most, self.project_share = most, project_share
        self._emit = emit
        self.yield_seconds = YIELD_SECONDS
        self._held: dict[str, Held] = {}  # by the sandbox's id
        self._look = asyncio.Event()
        self._store_error = ""  # the last one, logged once
        self._renewed = time.monotonic()
        self.room: Callable[[], tuple[Room, str]] = lambda: (Room(), "")
        self.stopping = False
        self.draining = False  # the host is: none is started or resumed
        self.waits_for = ""  # why one that is wanted is not started; shown by status

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
        """Claim for ever: new sandboxes, and paused ones that are wanted."""
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
        while not (self.stopping or self.draining):
            due = await self._store.sandboxes_due(self._machines.host)
            if not due.ready and due.next_ms != 0:
                self.waits_for = ""
                return LOOK_SECONDS if due.next_ms is None else min(LOOK_SECONDS, due.next_ms / 1000 + 0.001)
            room, shortage = self.room()
            holds = [held.claim for held in self._held.values()]
            share = Share.of(holds, most=self.most, room=room, part=self.project_share)
            claims = await self._store.claim_sandboxes(
                self._worker, self._machines.host, lease_seconds=self._lease_seconds,
                limit=max(0, self.most - len(holds)), room=room, held=[claim.hold_id for claim in holds], share=share,
            )  # fmt: skip
            for claim in [one for one in claims if not self._begin(one)]:
                await quietly(self._store.sandbox_released(claim.hold_id, why="never begun"))  # else its lease ends
                await asyncio.sleep(_ROOM_SECONDS)
            if not claims:
                places = f"a place: all {self.most} are taken" if len(holds) >= self.most else ""
                full = shortage or places or room.waits_for
                waits = {None: full} if share.others_wait else {}
                for project, why in (waits | share.over).items():
                    self.make_room(project)
                    self.waits_for = full if waits else f"the project {project!r}: {why}"
                return _ROOM_SECONDS
        return LOOK_SECONDS

    def _begin(self, claim: SandboxClaim) -> bool:
        """False while this engine still clears up after a lease of the same sandbox that it has lost."""
        if claim.sandbox.id in self._held:
            return False
        held = Held(claim, agent_of(claim), idle_seconds=self._idle_seconds, emit=self._emit)
        self._held[held.id] = held
        held.task = asyncio.create_task(self._hold(held), name=f"sandbox-{held.id}")
        return True

    def make_room(self, project: str | None = None) -> None:
        """Pause the one that nobody has spoken with for the longest time, if that is some seconds: of any project."""
        may = [one for one in self._held.values() if one.may_pause() and one.idle_for > self.yield_seconds]
        if may := [one for one in may if project in (None, one.sandbox.project_id)]:
            max(may, key=lambda one: one.idle_for).want(Ending.PAUSED)

    async def renewing(self) -> None:
        """Renew the leases of all that are held, in one statement, and hear what is wanted of them."""

        def lost() -> None:
            for held in self._held.values():
                held.cancel(lost=True)

        def holds() -> list[str]:
            return [held.claim.hold_id for held in self._held.values()]

        await leases.keep(holds, self._renew, lost, lease_seconds=self._lease_seconds)

    async def _renew(self, hold_ids: Collection[str]) -> None:
        holds = {held.claim.hold_id: held for held in self._held.values() if held.claim.hold_id in hold_ids}
        began = time.monotonic()
        used = [hold_id for hold_id, held in holds.items() if held.used_at >= self._renewed]
        renewal = await self._store.renew_sandboxes(holds, lease_seconds=self._lease_seconds, used=used)
        self._renewed = began
        for hold_id in renewal.lost & holds.keys():
            if holds[hold_id].executing:  # else it was given up meanwhile
                log.warning("lease lost, VM killed", sandbox=holds[hold_id].id)
            holds[hold_id].cancel(lost=True)
        for hold_id, wanted in renewal.wanted.items():
            held = holds[hold_id]
            if wanted == Ending.ENDED or (wanted == Ending.PAUSED and held.may_pause()):
                held.want(Ending(wanted))
            elif wanted == SandboxState.RUNNING:
                held.used()

    async def collecting(self) -> None:
        """Remove what nothing needs any more: expired snapshots, and what dead engines left half made."""
        while True:
            try:
                await self.collect()
            except (SwarmError, OSError) as error:
                log.warning("can't remove old snapshots", error=str(error))
            await asyncio.sleep(COLLECT_SECONDS)

    async def collect(self) -> None:
        """See `collecting`. Raises StoreError, HostError."""
        await kept.collect(self._store, self._machines.snapshots)

    def stop(self) -> None:
        """Hold no more, and pause all that are held. Doesn't wait: see `drained`."""
        self.stopping = True
        self._machines.snapshots.lift_limits()  # what could not be paused now would be lost
        self.put_back()

    def put_back(self) -> None:
        """Pause those that run; those that are being started go back. Doesn't wait."""
        for held in list(self._held.values()):
            if held.runs or held.claim.resumes:
                held.want(Ending.PAUSED)
            else:
                held.cancel(lost=False)

    async def drained(self) -> None:
        """Return when all that were held are paused, given back, or lost."""
        self.stop()
        while tasks := {held.task for held in self._held.values() if held.task is not None}:
            await asyncio.wait(tasks)

    # --- holding one ------------------------------------------------------------------------------------------------

    async def _hold(self, held: Held) -> None:
        """From the claim to the row that says how it ended. The VM is gone by then, in every case."""
        done: Done | None = None
        try:
            try:
                done = await self._live(held)
            except asyncio.CancelledError:
                if held.lost or not (held.put_back or held.asked is Ending.ENDED):
                    raise
                done = held.ended if held.asked is Ending.ENDED else None  # before it could be spoken with
            finally:
                held.executing = False
            await finish_uninterrupted(self._insist(held, lambda: self._write(held, done)))
        except asyncio.CancelledError:
            if not held.lost:
                raise
        except SwarmError as error:  # its lease is lost, or the database is: others will see that it has run out
            log.warning("a sandbox is not held any more", sandbox=held.id, why=str(error))
            if done is not None and done.snapshot is not None:
                await finish_uninterrupted(kept.forsake(self._store, self._machines.snapshots, done.snapshot.id))
        finally:
            del self._held[held.id]
            held.answer()
            self._look.set()

    async def _live(self, held: Held) -> Done:
        async def runs(n: int) -> None:
            crash_points.reach("sandbox:started")
            held.runs = True  # from now on a stop pauses it
            await self._insist(held, lambda: self._store.sandbox_running(held.claim.hold_id, n))

        try:
            async with self._machines.started(held, runs) as live:
                await self._machines.used_up(held)
                held.open(live)
                log.info("sandbox runs", sandbox=held.id, vm=live.n, resumed=held.claim.resumes)
                return await self._serve(held, live)
        except (LeaseLost, StoreError):
            raise
        except SwarmError as error:
            return await self._failed(held, error)
        except Exception as error:
            # A bug in Swarm must not leave a sandbox without an end, nor stop an engine that others need.
            log.error("a sandbox failed by a bug in Swarm", sandbox=held.id, error=f"{type(error).__name__}: {error}")
            log.debug("where", exc_info=True)
            return await self._failed(held, SwarmError(f"unexpected {type(error).__name__}: {error}"))

    async def _failed(self, held: Held, error: SwarmError) -> Done:
        """It did not start, or its VM has died."""
        claim = held.claim
        if held.runs:
            return Done(state=SandboxState.LOST, error=str(error))
        if not claim.resumes:
            return Done(state=SandboxState.ENDED, error=f"it could not be started: {error}")
        said = f"it could not be resumed: {error}"
        whole = claim.snapshot is not None and await self._machines.is_whole(claim.snapshot)
        return Done(state=SandboxState.PAUSED if whole else SandboxState.LOST, error=said)

    async def _serve(self, held: Held, live: LiveVm) -> Done:
        """Until it is to be paused or ended. Raises OutcomeUnknown when its VM dies."""
        died = asyncio.ensure_future(live.vm.wait())
        try:
            while True:
                held.changed.clear()
                if died.done():
                    raise OutcomeUnknown(f"its VM died: {died.result()}")
                if held.asked is Ending.ENDED or held.is_over():
                    return held.ended
                if live.frozen and not held.changing.locked():
                    await held.let_go_on(live)
                if held.asked is Ending.PAUSED or held.is_idle():
                    if (done := await self._pause(held, live)) is not None:
                        return done
                    continue
                changed = asyncio.ensure_future(held.changed.wait())
                await asyncio.wait({died, changed}, timeout=held.seconds_left(), return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
        finally:
            died.cancel()
            await held.close("has ended")

    async def _pause(self, held: Held, live: LiveVm) -> Done | None:
        """None if that can't be: it runs on, and whoever asked is told why."""
        by, asked, stops = held.by, held.asked is not None, self.stopping
        why = f"by {by}" if by else "its engine stops" if self.stopping else "wanted" if asked else "idle"
        try:
            async with held.changing:
                if held.asked is Ending.ENDED or (not asked and not held.is_idle()):
                    return None
                await held.close("is paused")
                snapshot = await self._machines.pause(held, live)
                crash_points.reach("sandbox:saved")
                return Done(state=SandboxState.PAUSED, snapshot=snapshot, why=why)
        except SwarmError as error:
            if self.stopping and not stops:  # the limit may have been the reason
                held.open(live)
                return None
            if lost := "its engine stopped, and could not pause it" if stops else held.given_up(error):
                return Done(state=SandboxState.LOST, error=f"{lost}: {error}")
            log.warning("a sandbox could not be paused", sandbox=held.id, error=str(error))
            held.record("trouble", {"what": "pause", "why": why, "error": str(error)})
            held.refuse(error, seconds=_PAUSE_AGAIN_SECONDS)
            held.open(live)
            return None

    async def _write(self, held: Held, done: Done | None) -> None:
        """How it ended; None: it was not started, and goes back."""
        hold_id, saved = held.claim.hold_id, done.snapshot if done is not None else None
        if saved is not None and held.asked is Ending.ENDED:  # meanwhile
            done = held.ended
        if done is None:
            await self._store.sandbox_released(hold_id)
        elif done.state != SandboxState.PAUSED:
            await self._store.sandbox_ended(hold_id, done.state, done.error, why=done.why)
        elif done.snapshot is not None:
            self._machines.snapshots.renew(done.snapshot.id)
            await self._store.sandbox_paused(hold_id, done.snapshot, why=done.why)
        else:
            await self._store.sandbox_released(hold_id, why="not resumed", error=done.error)
        if done is not None:
            held.done = done
            log.info("sandbox is held no more", sandbox=held.id, state=str(done.state), error=done.error, why=done.why)
            if saved is not None and done.snapshot is None:
                await quietly(self._machines.snapshots.remove(saved.id))

    async def _insist(self, held: Held, write: Callable[[], Awaitable[None]]) -> None:
        """For as long as the lease can still be ours. That its VM is gone can be written later too, as long as nobody
        else has given it up: who stops waits no longer than that. Raises LeaseLost, StoreError."""
        deadline = time.monotonic() + self._lease_seconds
        while True:
            try:
                return await write()
            except StoreError as error:
                if time.monotonic() > deadline and (held.executing or self.stopping):
                    raise
                log.warning("can't write what became of a sandbox yet", sandbox=held.id, error=str(error))
                await asyncio.sleep(_RETRY_SECONDS)

    # --- what it can be asked ---------------------------------------------------------------------------------------

    def _find(self, id: str) -> Held:
        held = self._held.get(id)
        if held is None:
            raise NotHeld(f"this engine does not hold the sandbox {id[:100]}: `swarm sandbox show` says who does")
        return held

    @asynccontextmanager
    async def converse(
        self, id: str, op: str, fields: Mapping[str, object], payload: bytes, *, by: str
    ) -> AsyncIterator[Told]:
        """A conversation with its guest, for the length of the block. Raises UsageError for what clients may not ask,
        NotHeld for a sandbox that this engine does not hold (any more)."""
        conversing.check(op)
        held = self._find(id)
        given = conversing.with_env(op, fields, held.env)
        async with held.spoken_with() as guest, AsyncExitStack() as stack:
            for _ in range(_TRIES):
                told = Told(await stack.enter_async_context(guest.open(op, given, payload)), op, fields, held, by=by)
                if await told.begin():
                    break
                await stack.aclose()
                async with held.changing:
                    pass
            else:
                raise Conflict(f"one snapshot after another is taken of {held.name}: try again")
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
        self,
        id: str,
        *,
        by: str,
        name: str | None = None,
        keep_seconds: float | None = None,
        without_secrets: bool = False,
    ) -> str:
        """The id of a new snapshot; the sandbox goes on. ``keep_seconds`` None: until it is removed. Raises Conflict,
        NoSpace."""
        held = self._find(id)
        if without_secrets and held.secret:
            raise Conflict(f"{held.name} was given secrets, and its memory may hold them: a snapshot would too")
        async with self._standing(held) as live:
            made = await self._machines.save(held, live, kind="named", name=name)
            return (await kept.add(self._store, self._machines.snapshots, made, keep_seconds=keep_seconds, by=by)).id

    async def fork(self, id: str, *, by: str, count: int = 1, name: str | None = None) -> Sequence[str]:
        """The ids of new sandboxes, which start from its present state; it goes on. ``name``: of one; of several, with
        '-1', '-2' … Raises Conflict, NoSpace, UsageError."""
        held = self._find(id)
        if not 1 <= count <= MAX_FORKS:
            raise UsageError(f"a sandbox can be forked 1 to {MAX_FORKS} times at once, not {count}")
        names = [name] if count == 1 or name is None else [f"{name}-{number + 1}" for number in range(count)]
        async with self._standing(held) as live:
            made = await self._machines.save(held, live, kind="fork")
            await kept.add(self._store, self._machines.snapshots, made, keep_seconds=_FORK_SECONDS, by=by)
            child = replace(
                held.sandbox, id="", state=SandboxState.STARTING, parent_id=held.id, snapshot_id=made.id, wanted=None,
                created_by=by, created_at=None, started_at=None, used_at=None, ended_at=None, ends_at=None, host=None,
                worker=None, hold_id=None, vm_id=None, error=None, name=None,
                requires=None,
            )  # fmt: skip
            children = [replace(child, name=one) for one in (names * count)[:count]]
            added = [one.id for one in await self._store.add_sandboxes(children, by=by)]
        held.record("fork", {"children": added, "snapshot": made.id, "by": by})
        self._look.set()
        return added

    @asynccontextmanager
    async def _standing(self, held: Held) -> AsyncIterator[LiveVm]:
        """Its VM, which no other pause, snapshot or fork touches meanwhile, and which is in use."""
        async with held.spoken_with(), held.changing:
            if held.closing or held.live is None:
                raise NotHeld(f"{held.name} {held.closing}")
            yield held.live
