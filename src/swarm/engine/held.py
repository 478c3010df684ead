"""One sandbox that this engine holds: what is asked of it, who speaks with it, when it is idle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from swarm.base.redact import Redactor
from swarm.channel.guest import Guest
from swarm.engine.egress import AttemptEgress
from swarm.engine.room import VmInUse
from swarm.errors import ChannelError, Conflict, GuestRefused, OutcomeUnknown, SwarmError
from swarm.live.wire import NotHeld
from swarm.model import Agent, Event, SandboxClaim, SandboxState, Snapshot
from swarm.vm.launcher import LiveVm

# Conversations with one guest at once: all sandboxes share the engine's places for them. agentd takes as many.
MAX_TALKS: Final = 64
_THAWS: Final = 2
MAX_REFUSALS: Final = 3  # by a guest, in a row, of pauses that nobody asked for

Emit = Callable[[Event], None]


class Ending(StrEnum):
    PAUSED = "paused"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How a hold ended, as the row is to say. ``snapshot``: of the pause. ``why``: for the event."""

    state: SandboxState
    snapshot: Snapshot | None = None
    error: str | None = None
    why: str | None = None


class Held:
    """From its claim until its VM is gone and its row says so. ``agent``: what its VM is like and may do.

    It is idle while nobody speaks with its guest: programs in the background don't keep it awake. They stand still
    while it is paused, and run on when it is used again.
    """

    def __init__(self, claim: SandboxClaim, agent: Agent, *, idle_seconds: float, emit: Emit) -> None:
        self.claim, self.sandbox, self.agent = claim, claim.sandbox, agent
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # its guest can be spoken with
        self.started.add_done_callback(lambda future: future.exception())  # perhaps nobody waits for it
        self.changed = asyncio.Event()  # something that its task waits for
        self.changing = asyncio.Lock()  # one pause, snapshot or fork at a time
        self.task: asyncio.Task[None] | None = None
        self.live: LiveVm | None = None
        self.guest: Guest | None = None
        self.egress: AttemptEgress | None = None
        self.vm_id: int | None = None
        self.executing = True
        self.runs = False  # its row says so, or is about to
        self.asked: Ending | None = None
        self.by: str | None = None  # who asked for it
        self.lost = False  # its lease is: nothing of it may be written any more
        self.put_back = False  # it need not start any more
        self.closing = ""  # why nobody may speak with it now
        self.done: Done | None = None  # what its row says; None: it was given back, or its lease is lost
        self.refused = ""  # why it could not be paused
        self.background: set[str] = set()  # processes whose end was not told
        self.told: set[tuple[object, ...]] = set()  # what is told only once
        self._idle_seconds = self.sandbox.idle_timeout_seconds or idle_seconds
        self._emit = emit
        self._talks = 0
        self._used_at = time.monotonic()
        self._not_before = 0.0  # for pauses that nobody asked for
        self._waiting: dict[asyncio.Future[None], Ending] = {}  # what each waits for
        self._refusals = 0

    @property
    def id(self) -> str:
        return self.sandbox.id

    @property
    def name(self) -> str:
        return f"the sandbox {self.sandbox.name or self.sandbox.id}"

    @property
    def takes(self) -> VmInUse:
        return VmInUse(
            memory_mb=self.agent.memory_mb,
            disk_mb=self.agent.disk_mb,
            vm_id=self.vm_id,
            executing=self.executing,
            settled=self.live is not None,
        )

    @property
    def secret(self) -> bool:
        """May its memory hold secrets that it was given?"""
        before = self.claim.snapshot
        return bool(self.agent.secrets) or (before is not None and before.secrets)

    @property
    def env(self) -> dict[str, str]:
        """Of all its programs."""
        return {**self.agent.env, **(self.egress.env if self.egress is not None else {})}

    def record(self, kind: str, data: Mapping[str, object]) -> None:
        """Add an event to its history, without the secrets that a command line may have."""
        told = self.redactor.value(dict(data))
        self._emit(Event(ticket_id="", sandbox_id=self.id, kind=kind, data=told))

    @property
    def redactor(self) -> Redactor:
        return self.egress.redactor if self.egress is not None else Redactor({})

    # --- who speaks with it -----------------------------------------------------------------------------------------

    def open(self, live: LiveVm) -> None:
        """Its guest can be spoken with (again)."""
        self.live, self.guest = live, Guest(live.vm.endpoint, live.identity.token)
        self.closing = ""
        self.used()
        if not self.started.done():
            self.started.set_result(None)

    async def close(self, why: str) -> None:
        """Nobody may speak with it any more, and those who do are told ``why``."""
        self.closing = self.closing or why
        if self.guest is not None:
            await self.guest.close()

    @asynccontextmanager
    async def spoken_with(self) -> AsyncIterator[Guest]:
        """Its guest, for a conversation. Waits while it starts. Raises NotHeld when it is on its way out, then or
        later; Conflict when too many do so."""
        if self._talks >= MAX_TALKS:
            raise Conflict(f"{self.name} is in {MAX_TALKS} uses at once already: end one, or try later")
        self._talks += 1
        try:
            await asyncio.shield(self.started)
            if self.closing or self.guest is None:
                raise NotHeld(f"{self.name} {self.closing}")
            yield self.guest
        except ChannelError as error:
            if self.closing:
                raise NotHeld(f"{self.name} {self.closing}") from error
            raise
        finally:
            self._talks -= 1
            self.used()

    def used(self) -> None:
        self._used_at = time.monotonic()
        self.changed.set()

    @property
    def used_at(self) -> float:
        """By time.monotonic()."""
        return time.monotonic() if self._talks else self._used_at

    @property
    def idle_for(self) -> float:
        return time.monotonic() - self.used_at if self.started.done() else 0.0

    def is_idle(self) -> bool:
        return self.idle_for >= self._idle_seconds and time.monotonic() >= self._not_before

    def is_over(self) -> bool:
        """Is its time to live?"""
        return self.sandbox.ends_at is not None and time.time() * 1000 >= self.sandbox.ends_at

    def seconds_left(self) -> float:
        """Until it may be idle, or over, if nobody does anything."""
        over = 1e9 if self.sandbox.ends_at is None else self.sandbox.ends_at / 1000 - time.time()
        idle = max(self.used_at + self._idle_seconds, self._not_before) - time.monotonic()
        return max(0.0, min(over, idle, 3600.0)) + 0.001

    async def let_go_on(self, live: LiveVm) -> None:
        """Its programs, which stand still since a snapshot. Raises OutcomeUnknown if its guest does not do so."""
        async with self.changing:
            for _ in range(_THAWS):
                try:
                    return await live.thaw()
                except SwarmError as error:
                    said = str(error)
                    self.record("trouble", {"what": "thaw", "error": said})
        raise OutcomeUnknown(f"its programs stand still since a snapshot, and its guest lets them not go on: {said}")

    # --- what is asked of it ----------------------------------------------------------------------------------------

    def want(self, ending: Ending, by: str | None = None) -> None:
        """To end is stronger than to pause, and doesn't wait until it has started. Doesn't wait."""
        if self.asked is not Ending.ENDED and self.asked is not ending:
            self.asked, self.by = ending, by
            self.changed.set()
            if ending is Ending.ENDED and not self.started.done() and self.executing and self.task is not None:
                self.task.cancel()

    @property
    def ended(self) -> Done:
        """As it was asked for, or since its time is over."""
        why = "its time to live is over" if self.is_over() else f"by {self.by}" if self.by else "wanted"
        return Done(state=SandboxState.ENDED, why=why)

    async def ends(self, ending: Ending, by: str) -> None:
        """Ask for it, and return when it is done. Raises why it could not be."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[answer] = ending
        self.want(ending, by)
        try:
            await answer
        finally:
            del self._waiting[answer]

    def may_pause(self) -> bool:
        """Not soon after it could not be."""
        return time.monotonic() >= self._not_before

    def given_up(self, error: SwarmError) -> str:
        """Why it is to end, as its guest does not let itself be paused time and again; '' if it may run on. It could
        keep its memory for ever else."""
        if self.by is None:
            self._refusals = self._refusals + 1 if isinstance(error, ChannelError | GuestRefused) else 0
        return f"its guest refused {MAX_REFUSALS} times to be put to sleep" if self._refusals >= MAX_REFUSALS else ""

    def refuse(self, error: SwarmError, *, seconds: float) -> None:
        """It could not be paused, and runs on: it is not tried again for so long, unless somebody asks."""
        self._not_before = time.monotonic() + seconds
        self.refused = str(error)
        if self.asked is Ending.PAUSED:  # its end may have been asked for meanwhile
            self.asked, self.by = None, None
        for answer, ending in self._waiting.items():
            if ending is Ending.PAUSED and not answer.done():
                answer.set_exception(error)

    def answer(self) -> None:
        """It is held no more: see ``done``. Whoever waits for another end than this is told so."""
        if not self.started.done():
            back = self.lost or self.put_back
            why = "is not held by this engine any more" if back else "has ended: `swarm sandbox show` says why"
            self.started.set_exception(NotHeld(f"{self.name} {why}"))
        for answer, ending in self._waiting.items():
            if answer.done():
                continue
            if (done := self.done) is None:
                answer.set_exception(NotHeld(f"{self.name} is not held by this engine any more"))
            elif ending is Ending.PAUSED and done.state != SandboxState.PAUSED:
                said = f": {done.error}" if done.error else ""
                answer.set_exception(Conflict(f"{self.name} was not paused, it is {done.state}{said}"))
            elif ending is Ending.ENDED and done.state == SandboxState.PAUSED:
                answer.set_exception(NotHeld(f"{self.name} was paused before it could be ended"))
            else:
                answer.set_result(None)

    def cancel(self, *, lost: bool) -> None:
        """Its VM must go at once: its lease is ``lost``, or it need not start any more."""
        if self.executing and not self.lost and self.task is not None:
            self.lost, self.put_back = lost, not lost
            self.task.cancel()
