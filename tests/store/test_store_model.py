"""The store against a model, by hypothesis: claims, renewals, finishes, cancels, deletes, expired leases in any order.
Rows and answers are what a page of Python says, and `swarm prove` finds nothing broken."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from swarm.admin.prove import judge
from swarm.errors import Conflict, LeaseLost, NotFound
from swarm.model import Failed, FailureReason, Interrupted, Outcome, Succeeded
from swarm.store.claims import suspects
from swarm.store.store import Store
from tests.store.databases import Backend, claimed, insert, left_overs

pytestmark = pytest.mark.slow  # tries very many cases

T = TypeVar("T")

LEASE_SECONDS = 1000.0  # far more real time than the test takes
TERMINAL = ("done", "failed", "cancelled")
OUTCOMES: dict[str, Outcome] = {
    "done": Succeeded(outputs="{}"),
    "failed": Failed(reason=FailureReason.AGENT_FAILED, message="it broke"),
    "again": Interrupted(),
}


@dataclass
class Row:
    """A ticket of the model. State 'again': its step is ready for another try, the ticket in progress."""

    state: str = "ready"
    owner: str | None = None  # the attempt that may write
    lease_until: float = 0.0
    lost: list[bool] = field(default_factory=list)  # for each loss: did it run alone?
    alone: bool = False  # its present or last attempt
    queued: float = 0.0
    ready_at: float = 0.0

    @property
    def suspect(self) -> bool:
        return len(self.lost) >= suspects.SUSPECT_AFTER

    @property
    def shown(self) -> str:
        return "in_progress" if self.state == "again" else self.state


class StoreMachine(RuleBasedStateMachine):
    backend: Backend
    tickets = Bundle("tickets")
    attempts = Bundle("attempts")

    @initialize()
    def start(self) -> None:
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        url = self.backend.new()
        self.outside = self.backend.outside(url)
        self.store: Store = self.run(self.stack.enter_async_context(Store.open(url)))
        self.rows: dict[str, Row] = {}
        self.of: dict[str, str] = {}  # attempt → ticket
        self.clock = 0.0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return
        report = self.run(self.store.audit(judge))
        left = left_overs(self.outside)
        self.outside.close()
        self.run(self.stack.aclose())
        self.runner.close()
        self.backend.done()
        assert report.kept, report.violations
        assert left == 0

    # --- what may happen ----------------------------------------------------------------------------------------------

    @rule(target=tickets)
    def insert(self) -> str:
        id_ = f"t{len(self.rows)}"
        insert(self.outside, id_)
        self.rows[id_] = Row()
        return id_

    @rule(
        target=attempts, worker=st.sampled_from("ab"), limit=st.integers(1, 3), idle=st.booleans(), drain=st.booleans()
    )
    def claim(self, worker: str, limit: int, idle: bool, drain: bool) -> Any:
        claims = self.run(claimed(self.store, worker, limit=limit, seconds=LEASE_SECONDS, idle=idle, drain=drain))
        for id_, row in self.rows.items():
            if row.owner is not None and row.lease_until <= self.clock:
                self.lose(id_, row)
        ready = {
            id_: row for id_, row in self.rows.items()
            if row.state in ("ready", "again") and row.ready_at <= self.clock
        }  # fmt: skip
        plain = {id_ for id_, row in ready.items() if not row.suspect}
        waited = any(r.suspect and r.queued + suspects.PATIENCE_SECONDS <= self.clock for r in ready.values())
        got = {claim.ticket.id for claim in claims}
        if any(claim.alone for claim in claims):
            assert idle and len(claims) == 1 and ready[claims[0].ticket.id].suspect
        else:
            assert got <= plain and len(got) == len(claims) <= min(limit, len(plain))
            assert len(got) == min(limit, len(plain)) or (drain and waited)
            assert got or not (idle and ready), "an idle worker gets what there is"
        for claim in claims:
            row = self.rows[claim.ticket.id]
            row.state, row.owner, row.lease_until = "in_progress", claim.attempt_id, self.clock + LEASE_SECONDS
            row.alone = claim.alone
            self.of[claim.attempt_id] = claim.ticket.id
        return multiple(*(claim.attempt_id for claim in claims))

    def lose(self, id_: str, row: Row) -> None:
        row.owner, row.queued = None, self.clock
        row.lost.append(row.alone)
        row.ready_at = self.clock + suspects.delay_ms(len(row.lost)) / 1000
        ((state,),) = self.outside.execute("SELECT state FROM tickets WHERE id = ?", (id_,))
        if row.lost.count(True) < suspects.ENOUGH:
            assert state == "in_progress", "convicted without evidence"
        if len(row.lost) >= suspects.MOST:
            assert state == "failed", "it may go on for ever"
        row.state = "failed" if state == "failed" else "again"

    def owned(self, attempt: str) -> Row | None:
        row = self.rows.get(self.of[attempt])
        return row if row is not None and row.owner == attempt else None

    @rule(attempt=attempts, how=st.sampled_from(sorted(OUTCOMES)))
    def finish(self, attempt: str, how: str) -> None:
        work = self.store.finish(attempt, OUTCOMES[how], timings={}, vm_time_ms=1.0)
        if (row := self.owned(attempt)) is None:
            self.refused(work, LeaseLost)
            return
        self.run(work)
        row.state, row.owner, row.queued = how, None, self.clock

    @rule(attempt=attempts)
    def record_vm(self, attempt: str) -> None:
        work = self.store.running(attempt, 1000)
        if self.owned(attempt) is None:
            self.refused(work, LeaseLost)
        else:
            self.run(work)

    @rule(attempt=attempts)
    def renew(self, attempt: str) -> None:
        renewal = self.run(self.store.renew([attempt], lease_seconds=LEASE_SECONDS))
        if (row := self.owned(attempt)) is not None:
            assert not renewal.lost and not renewal.cancelled
            row.lease_until = self.clock + LEASE_SECONDS
        else:
            assert renewal.lost | renewal.cancelled == {attempt}

    @rule(ticket=tickets)
    def cancel(self, ticket: str) -> None:
        work, row = self.store.cancel(ticket, "a test"), self.rows.get(ticket)
        if row is None:
            self.refused(work, NotFound)
        elif row.state in ("done", "failed"):
            self.refused(work, Conflict)
        else:
            self.run(work)
            row.state, row.owner = "cancelled", None

    @rule(ticket=tickets)
    def retry(self, ticket: str) -> None:
        work, row = self.store.retry(ticket), self.rows.get(ticket)
        if row is None:
            self.refused(work, NotFound)
        elif row.state not in ("failed", "cancelled"):
            self.refused(work, Conflict)
        else:
            self.run(work)
            self.rows[ticket] = Row()

    @rule(ticket=tickets)
    def cancel_from_outside(self, ticket: str) -> None:
        if (row := self.rows.get(ticket)) is not None and row.state not in TERMINAL:
            self.outside.execute("UPDATE tickets SET state = 'cancelled' WHERE id = ?", (ticket,))
            row.state, row.owner = "cancelled", None

    @rule(ticket=consumes(tickets))
    def delete_from_outside(self, ticket: str) -> None:
        self.outside.execute("DELETE FROM tickets WHERE id = ?", (ticket,))
        self.rows[ticket] = Row(state="deleted")
        del self.rows[ticket]
        self.rows[f"{ticket} (deleted)"] = Row(state="deleted")

    @rule(share=st.sampled_from((0.3, 1.01)))
    def time_passes(self, share: float) -> None:
        self.clock += share * LEASE_SECONDS
        self.run(self.store.shift_clock(round(share * LEASE_SECONDS * 1000)))

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
        states = {str(id_): str(state) for id_, state in self.outside.execute("SELECT id, state FROM tickets")}
        assert states == {id_: row.shown for id_, row in self.rows.items() if row.state != "deleted"}


def test_store(backend: Backend) -> None:
    machine = type("StoreMachineHere", (StoreMachine,), {"backend": backend})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=round(80 * backend.share),
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
