"""Any text in any field arrives byte for byte, or is refused with a reason; claims follow a model whatever happens."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from swarm.errors import Conflict, LeaseLost
from swarm.model import Cancelled, Interrupted, Outcome, Succeeded
from swarm.store.claims import suspects
from swarm.store.store import Store
from tests.store.databases import ECHO, LEASE, RETRY, Backend, claimed, failed, insert, inserted, left_overs

pytestmark = pytest.mark.slow  # tries very many cases

NASTY = [
    "'",
    '"',
    "\\",
    "\n",
    "\r\n",
    "\0",
    "🦊",
    "\u202e",
    "$(reboot)",
    "`id`",
    "; DROP TABLE tickets; --",
    "{}",
    "%s",
    ":id",
]
texts = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(NASTY), max_size=8).map("".join))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def test_hostile_fields(backend: Backend) -> None:
    url = backend.new()
    outside = backend.outside(url)
    with asyncio.Runner() as runner:
        opened = Store.open(url)
        store = runner.run(opened.__aenter__())

        @settings(max_examples=round(150 * backend.share), deadline=None)
        @example(id="$(reboot)", title="x" * 65_536, description="é" * 500_000, project="\0", inputs={"\0'": "\n🦊"})
        @example(id="'; DELETE FROM tickets; --", title="", description="", project="", inputs={})
        @given(
            id=texts, title=texts, description=texts, project=texts, inputs=st.dictionaries(texts, values, max_size=4)
        )
        def check(id: str, title: str, description: str, project: str, inputs: dict[str, Any]) -> None:
            outside.execute("DELETE FROM tickets")
            given_inputs = json.dumps(inputs, ensure_ascii=False).replace("\0", "\\u0000")
            row = inserted(id, title=title, description=description, project_id=project, inputs=given_inputs)
            if "\0" not in f"{id}{title}{description}{project}":
                outside.execute(*row)
            elif outside.refuses(*row):
                return
            claims = runner.run(claimed(store))
            if not claims:
                assert "\0" in id or not id.strip()
                ((state, error),) = outside.execute("SELECT state, error FROM tickets")
                assert state == "failed" and error.startswith("id ")
                return
            (claim,) = claims
            got = claim.ticket
            assert (got.id, got.title, got.description, got.project_id) == (id, title, description, project)
            assert claim.inputs == given_inputs
            outputs = json.dumps({"echo": [title, description]}, ensure_ascii=False)
            runner.run(store.finish(claim.attempt_id, Succeeded(outputs=outputs), timings={}, vm_time_ms=0))
            done = runner.run(store.ticket(id))
            assert (done.state, done.outputs, done.title) == ("done", outputs, title)

        check()
        runner.run(opened.__aexit__(None, None, None))
    outside.close()


class Expected:
    """One ticket of the model."""

    def __init__(self, max_attempts: int) -> None:
        self.state = "ready"
        self.max_attempts = max_attempts
        self.owner: str | None = None  # the attempt that may write
        self.lease_until = 0.0
        self.tries = 0  # counted ones
        self.lost = 0  # leases, since an attempt ended otherwise
        self.delayed = (0.0, 0.0)  # a back-off ends between these moments

    @property
    def suspect(self) -> bool:
        return self.lost >= suspects.SUSPECT_AFTER


class Queue(RuleBasedStateMachine):
    """claim, renew, finish, time, cancel, delete, retry in any order: the database does what the model says."""

    backend: Backend

    def __init__(self) -> None:
        super().__init__()
        url = self.backend.new()
        self.outside = self.backend.outside(url)
        self.runner = asyncio.Runner()
        self.opened = Store.open(url)
        self.store = self.runner.run(self.opened.__aenter__())
        self.now = 0.0
        self.expected: dict[str, Expected] = {}
        self.attempts: list[tuple[str, str]] = []  # every (attempt, ticket) there ever was
        self.inserted = 0

    def teardown(self) -> None:
        self.runner.run(self.opened.__aexit__(None, None, None))
        self.runner.close()
        self.outside.close()
        self.backend.done()

    @rule(retries=st.booleans())
    def insert(self, retries: bool) -> None:
        self.inserted += 1
        id = f"t{self.inserted}"
        insert(self.outside, id, agent_id=RETRY.id if retries else ECHO.id)
        self.expected[id] = Expected(RETRY.retry.max_attempts if retries else 1)

    @rule(limit=st.integers(1, 5))
    def claim(self, limit: int) -> None:
        claims = self.runner.run(claimed(self.store, limit=limit, drain=False))
        for id, one in self.expected.items():  # the sweep
            if one.owner and one.lease_until <= self.now:
                delay = suspects.delay_ms(one.lost + 1) / 1000
                one.owner, one.lost, one.delayed = None, one.lost + 1, (self.now + delay, self.now + delay + 0.9)
                if one.lost >= suspects.SUSPECT_AFTER + suspects.ENOUGH:  # test_suspects.py says when
                    ((one.state,),) = self.outside.execute("SELECT state FROM tickets WHERE id = ?", (id,))
        waiting = {i: e for i, e in self.expected.items() if e.state in ("ready", "in_progress") and not e.owner}
        ids = {claim.ticket.id for claim in claims}
        assert len(ids) == len(claims) <= limit
        assert ids <= {i for i, e in waiting.items() if e.delayed[0] <= self.now}
        if any(claim.alone for claim in claims):
            assert len(claims) == 1 and waiting[claims[0].ticket.id].suspect
        else:
            assert not any(waiting[id].suspect for id in ids)
            assert len(ids) >= min(limit, sum(e.delayed[1] <= self.now and not e.suspect for e in waiting.values()))
        for claim in claims:
            one = self.expected[claim.ticket.id]
            one.state, one.owner, one.lease_until = "in_progress", claim.attempt_id, self.now + LEASE
            self.attempts.append((claim.attempt_id, claim.ticket.id))

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        renewed = data.draw(st.lists(st.sampled_from(self.attempts), max_size=5, unique=True))
        renewal = self.runner.run(self.store.renew([attempt for attempt, _ in renewed], lease_seconds=LEASE))
        assert not renewal.lost & renewal.cancelled
        for attempt, id in renewed:
            one = self.expected.get(id)
            mine = one is not None and one.owner == attempt
            assert mine != (attempt in renewal.lost | renewal.cancelled)
            if one is None:
                assert attempt in renewal.cancelled
            elif mine:
                one.lease_until = self.now + LEASE

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), outcome=st.sampled_from([Succeeded(outputs="1"), failed(), Interrupted(), Cancelled()]))
    def finish(self, data: st.DataObject, outcome: Outcome) -> None:
        attempt, id = data.draw(st.sampled_from(self.attempts))
        one = self.expected.get(id)
        before = self.everything()
        finish = self.store.finish(attempt, outcome, timings={}, vm_time_ms=1)
        if one is None or one.owner != attempt:
            try:
                self.runner.run(finish)
            except LeaseLost:
                assert self.everything() == before
                return
            raise AssertionError(f"{attempt} could still write")
        self.runner.run(finish)
        one.owner = None
        match outcome:
            case Succeeded():
                one.state = "done"
            case Cancelled():
                one.state = "cancelled"
            case Interrupted():
                one.delayed = (0.0, 0.0)
            case _:
                one.tries, one.lost = one.tries + 1, 0
                most = min(15.0, 10.0 * 2 ** (one.tries - 1))
                one.delayed = (self.now + most / 2, self.now + most)
                if one.tries >= one.max_attempts:
                    one.state = "failed"

    @rule(seconds=st.sampled_from([1, 11, 40]))
    def time(self, seconds: int) -> None:
        self.runner.run(self.store.shift_clock(seconds * 1000))
        self.now += seconds * 1.001  # the real clock advances meanwhile

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), how=st.sampled_from(["store", "update", "delete", "retry"]))
    def by_hand(self, data: st.DataObject, how: str) -> None:
        id = data.draw(st.sampled_from(sorted(self.expected)))
        one = self.expected[id]
        if how == "delete":
            self.outside.execute("DELETE FROM tickets WHERE id = ?", (id,))
            del self.expected[id]
            return
        if how == "update":
            self.outside.execute("UPDATE tickets SET state = 'cancelled' WHERE id = ?", (id,))
            one.state, one.owner = "cancelled", None
            return
        allowed = one.state in (("failed", "cancelled") if how == "retry" else ("ready", "in_progress", "cancelled"))
        try:
            self.runner.run(self.store.retry(id) if how == "retry" else self.store.cancel(id, by="hand"))
        except Conflict:
            assert not allowed
            return
        assert allowed
        if how == "retry":
            self.expected[id] = Expected(one.max_attempts)
        else:
            one.state, one.owner = "cancelled", None

    def everything(self) -> list[list[tuple[Any, ...]]]:
        tables = ("tickets", "workflow_runs", "step_executions", "attempts", "events")
        return [self.outside.execute(f"SELECT * FROM {table} ORDER BY 1") for table in tables]

    @invariant()
    def states_are_as_expected(self) -> None:
        found = dict(self.outside.execute("SELECT id, state FROM tickets"))
        assert found == {name: one.state for name, one in self.expected.items()}

    @invariant()
    def nothing_twice_and_nothing_orphaned(self) -> None:
        assert left_overs(self.outside) == 0
        twice = "SELECT 1 FROM attempts WHERE outcome {} GROUP BY step_execution_id HAVING count(*) > 1"
        assert self.outside.execute(twice.format("IS NULL")) == []
        assert self.outside.execute(twice.format("= 'succeeded'")) == []


def test_queue_follows_the_model(backend: Backend) -> None:
    machine = type("QueueHere", (Queue,), {"backend": backend})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=round(40 * backend.share),
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
