"""Any workflow, by hypothesis: random steps, joins and outcomes, expired leases, restarts, cancellations; decided in
the transaction or outside. Needs come first, completed steps never run again, and every run ends."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm.admin.prove import judge
from swarm.errors import Conflict, LeaseLost
from swarm.model import Claim, Failed, FailureReason, Interrupted, Outcome, Succeeded
from swarm.store.runs import items, limits
from swarm.store.store import Store
from swarm.workflow import fan_out
from tests.store.databases import LEASE, Backend, Outside, insert, left_overs
from tests.store.flows import register
from tests.store.runs.workflows import INSIDE, OUTSIDE

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

ENDED = ("done", "failed", "cancelled")
LOST_MS = round(LEASE * 1000) + 1


@st.composite
def workflows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Steps without cycles."""
    steps: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 7))):
        needs = draw(st.lists(st.sampled_from([s["id"] for s in steps]), unique=True, max_size=3)) if steps else []
        step: dict[str, Any] = {"id": f"s{number}", "needs": needs}
        if needs:
            step["join"] = draw(st.sampled_from(["all", "any", "first_success", 1, len(needs)]))
        kind = draw(st.sampled_from(["agent", "agent", "agent", "each", "again", "within", "ask"]))
        if kind == "each":
            step["for_each"] = {
                "items": list(range(draw(st.integers(0, 4)))),
                "max_parallel": draw(st.integers(1, 4)),
                "join": draw(st.sampled_from(["all", "any", "first_success", 2])),
            }
            if draw(st.integers(0, 2)) == 0:
                step["for_each"] |= {
                    "join": "all",
                    "best": "${outputs.n}",
                    "timeout_seconds": draw(st.sampled_from([5, 500])),
                }
        elif kind == "again":
            step["repeat"] = {"until": f"${{steps.s{number}.outputs.n >= 2}}", "max_times": 3}
            step["inputs"] = {"n": "${index}"}
        elif kind == "ask":
            step["approval"] = {"message": "Go on?"}
        if kind == "within":
            step["workflow"] = {"steps": [{"id": "x", "agent": "echo"}, {"id": "y", "agent": "echo", "needs": "x"}]}
        else:
            step["agent"] = "echo"
        with_vm: list[str] = [s["id"] for s in steps if s["id"] in needs and "agent" in s and _has_one_vm(s)]
        if "agent" in step and with_vm and (source := draw(st.sampled_from([*with_vm, ""]))):
            step["from"] = source
        if draw(st.booleans()):
            step.setdefault("inputs", {})["dear"] = "${[1, 2].map(x, x)}"
        if draw(st.integers(0, 4)) == 0:
            step["when"] = f"${{steps.{needs[0]}.status == 'completed'}}" if needs else True
        if draw(st.integers(0, 3)) == 0:
            step["continue_on_error"] = True
        if kind != "within" and draw(st.integers(0, 3)) == 0:
            step["retry"] = {"max_attempts": 2, "delay_seconds": 0, "on": ["agent_failed"]}
        steps.append(step)
    return steps


def _has_one_vm(step: Mapping[str, Any]) -> bool:
    each = step.get("for_each")
    return each is None or "best" in each or each["join"] in ("any", "first_success")


MOVES = st.sampled_from(["ok", "ok", "ok", "ok", "fail", "fail", "lost", "back", "restart", "two at once"])


@pytest.mark.parametrize("place", ["in the transaction", "on a thread", "in a process"])
def test_any_workflow(backend: Backend, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    planning_seconds = INSIDE if place == "in the transaction" else OUTSIDE
    monkeypatch.setattr(fan_out, "MAX_STARTS", 1)
    if place != "in the transaction":
        monkeypatch.setattr(items, "BATCH_ROWS", 1)  # rows are written ahead from the second item on
    if place == "in a process":
        monkeypatch.setattr(limits, "ON_THREAD", replace(limits.ON_THREAD, steps=-1))
    examples = round(30 * backend.share / (2 if place == "in a process" else 1))

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        steps=workflows(),
        fail_fast=st.booleans(),
        moves=st.lists(MOVES, min_size=5, max_size=40),
        cancel_at=st.one_of(st.none(), st.integers(0, 20)),
    )
    def check(steps: list[dict[str, Any]], fail_fast: bool, moves: list[str], cancel_at: int | None) -> None:
        history = History(backend, steps, planning_seconds)
        asyncio.run(history.play({"steps": steps, "fail_fast": fail_fast}, moves, cancel_at))
        backend.done()

    check()


class History:
    def __init__(self, backend: Backend, steps: list[dict[str, Any]], planning_seconds: float) -> None:
        self.backend, self.url = backend, backend.new()
        self.planning_seconds = planning_seconds
        self.steps: Mapping[str, dict[str, Any]] = {step["id"]: step for step in steps}
        self.completed: set[str] = set()
        self.snapshots: dict[str, str] = {}  # of completed steps, by their names

    async def play(self, flow: Mapping[str, Any], moves: list[str], cancel_at: int | None) -> None:
        outside, stack = self.backend.outside(self.url), AsyncExitStack()
        store = await stack.enter_async_context(Store.open(self.url, planning_seconds=self.planning_seconds))
        workflow = await register(store, _yaml(flow), name="any")
        insert(outside, "t", agent_id=None, execution_mode="workflow", workflow_id=workflow)
        running: list[Claim] = []
        script, number = iter(moves), 0
        while True:
            number += 1
            assert number < 400, "it never ends"
            if number == cancel_at and (await store.ticket("t")).state not in ENDED:
                with suppress(Conflict):  # a decision that is being made ends it meanwhile
                    await store.cancel("t", "a test")
            found = await store.claim("test", limit=3, lease_seconds=LEASE)
            running += found
            for claim in found:
                await self.started(store, claim)
            if not found and await store.decided():
                continue
            if not running:
                if (await store.ticket("t")).state in ENDED:
                    break
                if not await self.answer(store, outside, approved=next(script, "ok") != "fail"):
                    await store.shift_clock(1000)  # a back-off
                continue
            match next(script, "ok"):
                case "ok":
                    await self.finish(store, running[0], self.well(outside, running.pop(0), 2))
                case "fail":
                    await self.finish(store, running.pop(), Failed(reason=FailureReason.AGENT_FAILED, message="broke"))
                case "back":
                    await self.finish(store, running.pop(0), Interrupted())
                case "two at once":
                    batch, running = running[:2], running[2:]
                    await asyncio.gather(*(self.finish(store, c, self.well(outside, c, 1)) for c in batch))
                case "lost":
                    running.clear()
                    await store.shift_clock(LOST_MS)
                case "restart":
                    running.clear()
                    await stack.aclose()
                    store = await stack.enter_async_context(
                        Store.open(self.url, planning_seconds=self.planning_seconds)
                    )
                    await store.shift_clock(LOST_MS)
        await self.judged(store, outside)
        await stack.aclose()
        outside.close()

    async def started(self, store: Store, claim: Claim) -> None:
        name = claim.step_id
        assert name not in self.completed, f"{name} completed, and was started again"
        top = self.steps[name.partition("/")[0].partition("[")[0]]
        rows = {step.step_id: step.status for step in await store.steps("t")}
        met = [need for need in top["needs"] if rows[need] == "completed" or self._harmless(need, rows[need])]
        wanted = {"all": len(top["needs"]), "any": 1, "first_success": 1}.get(top.get("join", "all"), top.get("join"))
        assert not top["needs"] or len(met) >= int(wanted or 0), f"{name} was started before its needs were met: {rows}"

        source = top.get("from") if name.count("/") == 0 else None
        assert (claim.source is None) == (source is None)
        if source is not None:
            begun_from = next((one for one, id in self.snapshots.items() if id == claim.source), "")
            assert begun_from.partition("[")[0] == source and rows[begun_from] == "completed", (name, claim.source)

    def well(self, outside: Outside, claim: Claim, n: int) -> Outcome:
        """Its VM was kept if other steps start from it."""
        left = f"of-{claim.attempt_id}" if claim.is_source else None
        if left is not None:
            outside.execute(
                "INSERT INTO snapshots (id, kind, host) VALUES (?, 'step', ?)", (left, socket.gethostname())
            )
        return Succeeded(outputs=f'{{"n": {n}}}', snapshot_id=left)

    def _harmless(self, need: str, status: str) -> bool:
        return status == "failed" and bool(self.steps[need].get("continue_on_error"))

    async def finish(self, store: Store, claim: Claim, outcome: Outcome) -> None:
        try:
            await store.finish(claim.attempt_id, outcome, timings={}, vm_time_ms=1.0)
        except LeaseLost:
            return
        if isinstance(outcome, Succeeded):
            assert claim.step_id not in self.completed
            self.completed.add(claim.step_id)
            if outcome.snapshot_id is not None:
                self.snapshots[claim.step_id] = outcome.snapshot_id

    async def answer(self, store: Store, outside: Outside, *, approved: bool) -> bool:
        waiting = outside.execute("SELECT step_id FROM step_executions WHERE status = 'waiting' AND verdict IS NULL")
        if not waiting or (await store.ticket("t")).state != "waiting":
            return False
        await store.answer("t", step=str(waiting[0][0]), approved=approved, by="a test")
        return True

    async def judged(self, store: Store, outside: Outside) -> None:
        rows = {step.step_id: step for step in await store.steps("t")}
        live = {name: row.status for name, row in rows.items() if row.completed_at is None}
        assert not live, f"the run has ended, and these have not: {live}"
        assert {name for name, row in rows.items() if name in self.completed and row.status != "completed"} == set()
        state = (await store.ticket("t")).state
        runs = {run.status for run in await store.runs("t")}
        assert not runs & {"running", "waiting"}, runs
        assert state == "cancelled" or set(self.steps) <= rows.keys()
        report = await store.audit(judge)
        assert report.kept, report.violations
        assert left_overs(outside) == 0


def _yaml(flow: Mapping[str, Any]) -> str:
    """JSON is YAML."""
    return f"steps: {json.dumps(flow['steps'])}\nfail_fast: {json.dumps(flow['fail_fast'])}\n"
