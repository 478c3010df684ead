"""Sandboxes against a model, by hypothesis: engines claim, renew, pause, fork, end and die in any order, people want
things, others delete rows. Never two holders; rows and answers are what a page of Python says; `swarm prove` agrees."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from swarm.admin.prove import judge
from swarm.errors import Conflict, LeaseLost, NotFound
from swarm.model import Sandbox, Snapshot
from swarm.store.sandboxes.holding import TRIES
from swarm.store.store import Store
from swarm.store.tickets.room import Room
from tests.store.databases import Backend

pytestmark = pytest.mark.slow  # tries very many cases

T = TypeVar("T")
LEASE_SECONDS = 1000.0  # far more real time than the test takes
HOSTS = {"a": "h1", "b": "h1", "c": "h2"}
OVER = ("ended", "lost")


@dataclass
class Box:
    """A sandbox of the model."""

    state: str = "starting"
    hold: str | None = None
    worker: str = ""
    host: str | None = None
    lease_until: float = 0.0
    wanted: str | None = None
    died: int = 0  # engines, while they started or resumed it
    fork_of: str | None = None  # its snapshot's host


class SandboxMachine(RuleBasedStateMachine):
    backend: Backend
    boxes = Bundle("boxes")
    holds = Bundle("holds")

    @initialize()
    def start(self) -> None:
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        url = self.backend.new()
        self.outside = self.backend.outside(url)
        self.store: Store = self.run(self.stack.enter_async_context(Store.open(url)))
        self.rows: dict[str, Box] = {}
        self.of: dict[str, str] = {}  # hold → sandbox
        self.snapshots = 0
        self.clock = 0.0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return
        report = self.run(self.store.audit(judge))
        self.outside.close()
        self.run(self.stack.aclose())
        self.runner.close()
        self.backend.done()
        assert report.kept and not report.changed_by_others, report
        assert report.holds == len(self.of)

    # --- what may happen ----------------------------------------------------------------------------------------------

    @rule(target=boxes, plain=st.booleans())
    def add(self, plain: bool) -> str:
        id_ = f"b{len(self.rows)}"
        if plain:
            self.outside.execute("INSERT INTO sandboxes (id) VALUES (?)", (id_,))
        else:
            self.run(self.store.add_sandbox(Sandbox(id=id_, state="starting"), by="ann"))
        self.rows[id_] = Box()
        return id_

    @rule(target=boxes, hold=holds)
    def fork(self, hold: str) -> Any:
        box = self.owned(hold)
        if box is None or box.state != "running":
            return multiple()
        snapshot = self.snapshot("fork", HOSTS[box.worker])
        self.run(self.store.add_snapshot(snapshot, keep_seconds=1.0))
        id_ = f"b{len(self.rows)}"
        self.run(self.store.add_sandbox(Sandbox(id=id_, state="starting", snapshot_id=snapshot.id), by="ann"))
        self.rows[id_] = Box(fork_of=HOSTS[box.worker])
        return id_

    def snapshot(self, kind: str, host: str) -> Snapshot:
        self.snapshots += 1
        return Snapshot(id=f"s{self.snapshots}", kind=kind, host=host)

    @rule(target=holds, worker=st.sampled_from("aaabc"), limit=st.sampled_from((3, 2, 1, 0)), starts=st.booleans())
    def claim(self, worker: str, limit: int, starts: bool) -> Any:
        host = HOSTS[worker]
        room = Room(memory_mb=10_000)
        claims = self.run(self.store.claim_sandboxes(worker, host, lease_seconds=LEASE_SECONDS, limit=limit, room=room))
        for box in self.rows.values():
            if box.hold is not None and box.lease_until <= self.clock:
                self.lose(box)
            elif box.hold is None and box.state not in OVER and box.wanted == "ended":
                box.state, box.wanted = "ended", None
        free = {
            id_ for id_, box in self.rows.items()
            if box.hold is None and (
                (box.state == "starting" and box.fork_of in (None, host))
                or (box.state == "paused" and box.wanted == "running" and box.host == host)
            )
        }  # fmt: skip
        got = {claim.sandbox.id for claim in claims}
        assert got <= free and len(got) == len(claims) == min(limit, len(free))
        for claim in claims:
            box = self.rows[claim.sandbox.id]
            assert claim.resumes == (box.state == "paused") and claim.hold_id not in self.of
            assert (claim.snapshot is not None) == (claim.resumes or box.fork_of is not None)
            box.hold, box.worker, box.host = claim.hold_id, worker, host
            box.lease_until = self.clock + LEASE_SECONDS
            self.of[claim.hold_id] = claim.sandbox.id
            if starts:
                self.running(claim.hold_id)
        return multiple(*(claim.hold_id for claim in claims))

    def lose(self, box: Box) -> None:
        box.hold = None
        if box.state == "running":
            box.state, box.wanted = "lost", None
            return
        box.died += 1
        if box.wanted == "ended":
            box.state, box.wanted = "ended", None
        elif box.died >= TRIES and box.state == "starting":
            box.state, box.wanted = "lost", None
        elif box.died >= TRIES:
            box.wanted = None

    def owned(self, hold: str) -> Box | None:
        box = self.rows.get(self.of[hold])
        return box if box is not None and box.hold == hold else None

    @rule(id_=boxes)
    def use(self, id_: str) -> None:
        """As whoever uses one that sleeps."""
        box = self.rows.get(id_)
        if box is not None and box.state == "paused" and box.wanted is None:
            self.want(id_, "running")

    @rule(hold=holds)
    def running(self, hold: str) -> None:
        work = self.store.sandbox_running(hold, 1000)
        if (box := self.owned(hold)) is None:
            self.refused(work, LeaseLost)
            return
        self.run(work)
        box.state, box.died = "running", 0
        box.wanted = None if box.wanted == "running" else box.wanted

    @rule(hold=holds)
    def pause(self, hold: str) -> None:
        box = self.owned(hold)
        host = HOSTS[box.worker] if box is not None else "h1"
        work = self.store.sandbox_paused(hold, self.snapshot("pause", host))
        if box is None:
            self.refused(work, LeaseLost)
            return
        self.run(work)
        box.state, box.hold, box.died = "paused", None, 0
        box.wanted = None if box.wanted == "paused" else box.wanted

    @rule(hold=holds, state=st.sampled_from(OVER))
    def end(self, hold: str, state: str) -> None:
        work = self.store.sandbox_ended(hold, state, "it broke" if state == "lost" else None)  # type: ignore[arg-type]
        if (box := self.owned(hold)) is None:
            self.refused(work, LeaseLost)
            return
        self.run(work)
        box.state, box.hold, box.wanted = state, None, None

    @rule(hold=holds)
    def give_back(self, hold: str) -> None:
        work = self.store.sandbox_released(hold)
        box = self.owned(hold)
        if box is None or box.state == "running":
            self.refused(work, LeaseLost)
            return
        self.run(work)
        box.hold = None

    @rule(worker=st.sampled_from(sorted(HOSTS)))
    def renew(self, worker: str) -> None:
        mine = [hold for hold, id_ in self.of.items() if id_ in self.rows and self.rows[id_].worker == worker]
        lost, wanted = self.run(self.store.renew_sandboxes(mine, lease_seconds=LEASE_SECONDS))
        for hold in mine:
            box = self.owned(hold)
            assert (hold in lost) == (box is None)
            if box is not None:
                assert wanted.get(hold) == box.wanted
                box.lease_until = self.clock + LEASE_SECONDS
                if box.state == "running" == box.wanted:
                    box.wanted = None

    @rule(id_=boxes, wanted=st.sampled_from(("running", "paused", "ended")))
    def want(self, id_: str, wanted: str) -> None:
        work, box = self.store.want_sandbox(id_, wanted, by="ann"), self.rows.get(id_)
        if box is None:
            self.refused(work, NotFound)
        elif (box.state in OVER or box.wanted == "ended") and wanted != "ended":
            self.refused(work, Conflict)
        else:
            self.run(work)
            if box.state in OVER:
                return
            if wanted == "ended" and box.hold is None and box.wanted != "ended":
                box.state, box.wanted = "ended", None
            elif wanted == "paused" == box.state and box.hold is None:
                box.wanted = None
            else:
                box.wanted = wanted

    @rule(id_=boxes, what=st.sampled_from(("delete", "end", "die", "wait", "wait long")), worker=st.sampled_from("abc"))
    def happen(self, id_: str, what: str, worker: str) -> None:
        """What nobody asks the store for."""
        box = self.rows.get(id_)
        if what == "delete" and box is not None:
            self.outside.execute("DELETE FROM sandboxes WHERE id = ?", (id_,))
            self.rows[f"{id_} (deleted)"] = Box(state="deleted")
            del self.rows[id_]
        elif what == "end" and box is not None and box.state not in OVER and box.wanted != "ended":
            self.outside.execute("UPDATE sandboxes SET wanted = 'ended' WHERE id = ?", (id_,))
            box.wanted = "ended"
        elif what == "die":  # an engine: its leases end at once, as `bury` has it
            dead = "UPDATE sandboxes SET lease_until = 0 WHERE hold_id IS NOT NULL AND worker = ?"
            self.outside.execute(dead, (worker,))
            for one in self.rows.values():
                if one.hold is not None and one.worker == worker:
                    one.lease_until = self.clock
        elif what.startswith("wait"):
            seconds = LEASE_SECONDS * (1.01 if what == "wait long" else 0.3)
            self.clock += seconds
            self.run(self.store.shift_clock(round(seconds * 1000)))

    def refused(self, work: Coroutine[Any, Any, object], error: type[Exception]) -> None:
        try:
            self.run(work)
        except error:
            return
        raise AssertionError(f"{error.__name__} was not raised")

    @invariant()
    def rows_are_what_the_model_says(self) -> None:
        if not hasattr(self, "rows"):
            return
        rows = self.outside.execute("SELECT id, state, hold_id, wanted FROM sandboxes")
        found = {str(id_): (state, hold, unfulfilled(state, hold, wanted)) for id_, state, hold, wanted in rows}
        assert found == {
            id_: (box.state, box.hold, unfulfilled(box.state, box.hold, box.wanted))
            for id_, box in self.rows.items()
            if box.state != "deleted"
        }
        holds = [hold for _, hold, _ in found.values() if hold is not None]
        assert len(holds) == len(set(holds))


def unfulfilled(state: object, hold: object, wanted: object) -> object:
    """One that sleeps, and whose resuming was given up after it was to sleep again, is as it should be; some claim that
    comes across it takes the wish away."""
    return None if state == wanted == "paused" and hold is None else wanted


def test_sandboxes(backend: Backend) -> None:
    machine = type("SandboxMachineHere", (SandboxMachine,), {"backend": backend})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=round(80 * backend.share),
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
