"""Decisions that read or make much: in a process of their own, the rows of their items written ahead of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from swarm.errors import UsageError
from swarm.model import Claim, Succeeded
from swarm.store.runs import artifacts, items, limits
from swarm.store.runs.actions import carry_out
from swarm.store.runs.decision import Decided, Run
from swarm.store.runs.decision_process import DecisionProcess
from swarm.store.runs.items import Batch
from swarm.store.runs.limits import IN_PROCESS
from swarm.store.runs.workflow_engine import WorkflowEngine
from swarm.store.sql.transaction import Tx
from swarm.store.store import Store
from swarm.store.tickets.changes import Changes
from swarm.workflow.state import Action, Complete, Start
from tests.store.databases import Outside, insert
from tests.store.flows import claims, finish, gives, rows, run, state, statuses, ticket

EACH = """
steps:
  - {id: list, agent: echo}
  - {id: other, agent: echo}
  - id: each
    agent: echo
    needs: list
    for_each: "${steps.list.outputs.items}"
    when: "${item != 'skip'}"
    inputs: {n: "${item}"}
    max_parallel: 2
  - {id: last, agent: echo, needs: each, inputs: {count: "${size(steps.each.outputs)}"}}
"""


def listed(count: int) -> Callable[..., Any]:
    return gives(list={"items": ["skip" if n % 4 == 3 else f"item {n}" for n in range(count)]})


@dataclass
class Places:
    """Where the decisions of a store were made, and how many rows were written ahead, in each transaction."""

    found: list[str] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Places:
    seen = Places()
    thread, process, write = WorkflowEngine.decide, DecisionProcess.decide, WorkflowEngine.write_items

    def on_thread(engine: WorkflowEngine, *values: Any) -> tuple[Decided | None, Sequence[Batch]]:
        decided, batches = thread(engine, *values)
        if decided is not None and not decided.too_expensive:
            seen.found.append("thread")
        return decided, batches

    def in_process(decider: DecisionProcess, *values: Any) -> Any:
        seen.found.append("process")
        return process(decider, *values)

    def write_items(engine: WorkflowEngine, tx: Any, batches: Any) -> Any:
        seen.ahead += [len(batch.children) for batch in batches]
        return write(engine, tx, batches)

    monkeypatch.setattr(WorkflowEngine, "decide", on_thread)
    monkeypatch.setattr(DecisionProcess, "decide", in_process)
    monkeypatch.setattr(WorkflowEngine, "write_items", write_items)
    return seen


# --- where they are made ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """``then``: what a second step does with the outputs of the first one, ``one``."""

    one: Mapping[str, Any] = field(default_factory=dict)
    then: str
    place: str | None  # None: the transaction of the first step's end
    inputs: Mapping[str, Any] = field(default_factory=dict)  # of the ticket


LONG = ["y" * 1000] * 100
WHERE = {
    "small": Case(one={"x": 1}, then='inputs: {n: "${steps.one.outputs.x}"}', place=None),
    "a loop": Case(one={"x": [1]}, then='inputs: {n: "${steps.one.outputs.x.map(y, y)}"}', place="thread"),
    "a reference to much": Case(one={"x": LONG}, then='inputs: {n: "${steps.one.outputs.x}"}', place=None),
    "much": Case(one={"x": LONG}, then='inputs: {n: "${steps.one.outputs.x[0]}"}', place="process"),
    "much, often": Case(
        one={"x": "y" * 60_000},
        then=f"inputs: {{n: {json.dumps(['${steps.one.outputs.x}'] * 20)}}}",
        place="process",
    ),
    "a few items": Case(
        one={"x": [1] * 50}, then='for_each: {items: "${steps.one.outputs.x}", max_parallel: 1}', place=None
    ),
    "many items": Case(
        one={"x": [1] * 300}, then='for_each: {items: "${steps.one.outputs.x}", max_parallel: 1}', place="thread"
    ),
    "many items with expressions": Case(
        one={"x": [1] * 501},
        then='for_each: {items: "${steps.one.outputs.x}", max_parallel: 1}, inputs: {n: "${item}"}',
        place="process",
    ),
    "very many items": Case(
        one={"x": [1] * 1500}, then='for_each: {items: "${steps.one.outputs.x}", max_parallel: 1}', place="process"
    ),
    "many items that the workflow names": Case(
        then=f"for_each: {{items: {[1] * 300}, max_parallel: 1}}", place="thread"
    ),
    "inputs of the run": Case(inputs={"x": LONG * 25}, then='inputs: {n: "${inputs.x[0]}"}', place="process"),
}


@pytest.mark.parametrize("case", WHERE.values(), ids=WHERE)
async def test_where_a_decision_is_made(store: Store, outside: Outside, places: Places, case: Case) -> None:
    steps = f"steps: [{{id: one, agent: echo}}, {{id: two, agent: echo, needs: one, {case.then}}}]"
    await ticket(store, outside, steps, inputs=json.dumps(case.inputs))
    (one,) = await claims(store)
    places.found.clear()  # a workflow is prepared outside
    await finish(store, one, gives(one=case.one))
    assert [claim.step_id.partition("[")[0] for claim in await claims(store, 1)] == ["two"]
    assert places.found == ([case.place] if case.place is not None else [])


# --- rows that are written ahead --------------------------------------------------------------------------------------


async def test_the_rows_of_many_items_are_written_a_few_at_a_time(
    store: Store, outside: Outside, places: Places
) -> None:
    await ticket(store, outside, EACH)
    started = await run(store, listed(400))
    assert started[-1] == "last" and set(started[:2]) == {"list", "other"}
    assert sorted(started[2:-1]) == sorted(f"each[{n}]" for n in range(400) if n % 4 != 3)
    assert places.ahead == [100, 100, 100, 100]
    ended = await rows(store)
    assert json.loads(ended["last"].inputs or "") == {"count": 400}
    assert json.loads(ended["each[5]"].inputs or "") == {"n": "item 5"}
    assert ended["each[7]"].status == "skipped" and "when" in str(ended["each[7]"].error)
    assert ended["each[7]"].completed_at is not None
    assert (await state(store))[0] == "done"


async def test_their_rows_come_in_order_behind_those_of_the_steps(store: Store, outside: Outside) -> None:
    """Also of the first decision of a run, which makes both; and by the database's clock, whatever this host's says."""
    await store.shift_clock(3_600_000)
    first = "steps: [{id: each, agent: echo, for_each: '${inputs.list}', max_parallel: 1}, {id: last, agent: echo}]"
    await ticket(store, outside, first, id="first", inputs=json.dumps({"list": [0] * 350}))
    await ticket(store, outside, EACH)
    while found := await claims(store):
        for claim in found:
            if claim.step_id == "list":
                await finish(store, claim, listed(350))
    numbered = [f"each[{n}]" for n in range(350)]
    assert [step.step_id for step in await store.steps("first")] == ["each", "last", *numbered]
    assert [step.step_id for step in await store.steps("t")] == ["list", "other", "each", "last", *numbered]
    for id in ("t", "first"):
        await store.cancel(id, "a test")


async def test_large_items_are_written_fewer_at_a_time(store: Store, outside: Outside, places: Places) -> None:
    """Those beyond 64 KiB are artifacts, which count as well."""
    text = EACH.replace('{n: "${item}"}', '{n: "${item}", all: "${steps.list.outputs.items}"}')
    await ticket(store, outside, text)
    long = [f"{n:02}" + "y" * 50_000 for n in range(12)] + ["z" * 200_000] * 2
    await run(store, gives(list={"items": long}))
    assert places.ahead == [6, 6, 2]
    assert json.loads((await rows(store))["each[11]"].inputs or "")["n"] == long[11]
    assert (await state(store))[0] == "done"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are written ahead from the fourth item on."""
    monkeypatch.setattr(items, "BATCH_ROWS", 3)
    monkeypatch.setattr("swarm.store.runs.workflow_engine.IN_TRANSACTION", replace(limits.IN_TRANSACTION, items=0))


async def begun(store: Store, outside: Outside, *, written: int = 1) -> list[Batch]:
    """A run whose decision on ``each`` went no further than these batches. Returns the others."""
    await ticket(store, outside, EACH)
    found = {claim.step_id: claim for claim in await claims(store)}
    await finish(store, found["list"], listed(8))
    run_id = (await store.ticket("t")).run_id or ""
    _, batches = await store._read.call(store._workflows.decide, run_id, IN_PROCESS)
    assert len(batches) == 3
    for batch in batches[:written]:
        assert await ahead(store, batch)
    there = await statuses(store)
    assert there["each"] == "pending" and len([one for one in there if one.startswith("each[")]) == min(3 * written, 8)
    assert await store.claim("w", limit=9, lease_seconds=60) == [] and "each" in await statuses(store)
    return list(batches[written:])


async def ahead(store: Store, batch: Batch) -> bool:
    return await store._write.call_batch(store._workflows.write_items, batch)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("written", [1, 2, 3])
async def test_what_an_engine_that_died_wrote_ahead_is_written_again(
    store: Store, outside: Outside, written: int
) -> None:
    await begun(store, outside, written=written)
    outside.execute("UPDATE step_executions SET inputs = '{\"n\": \"stale\"}' WHERE step_id = 'each[0]'")
    await store.shift_clock(31_000)
    await store.claim("w", limit=9, lease_seconds=60)
    started = [name for name in await run(store) if name.startswith("each")]
    assert sorted(started) == [f"each[{n}]" for n in (0, 1, 2, 4, 5, 6)]
    assert json.loads((await rows(store))["each[0]"].inputs or "") == {"n": "item 0"}
    assert json.loads((await rows(store))["last"].inputs or "") == {"count": 8}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("change", ["fewer items", "no items", "its need is lost"])
async def test_rows_of_a_decision_that_is_another_one_now_are_gone(store: Store, outside: Outside, change: str) -> None:
    await begun(store, outside)
    if change == "its need is lost":
        outside.execute("UPDATE step_executions SET status = 'failed', error = 'gone' WHERE step_id = 'list'")
    else:
        left = '["item 0"]' if change == "fewer items" else "[]"
        outside.execute("UPDATE step_executions SET outputs = :o WHERE step_id = 'list'", {"o": f'{{"items": {left}}}'})
    await store.shift_clock(31_000)
    await store.claim("w", limit=9, lease_seconds=60)
    await run(store)
    there = [name for name in await statuses(store) if name.startswith("each[")]
    assert there == (["each[0]"] if change == "fewer items" else [])


@pytest.mark.usefixtures("few")
async def test_a_run_that_is_cancelled_meanwhile_ends_them(store: Store, outside: Outside) -> None:
    first, *_ = await begun(store, outside)
    await store.cancel("t", "a test")
    assert not await ahead(store, first)
    there = await statuses(store)
    assert {status for name, status in there.items() if name.startswith("each")} == {"cancelled"}


@pytest.mark.usefixtures("few")
async def test_no_item_is_retried_that_was_only_written_ahead(store: Store, outside: Outside) -> None:
    await begun(store, outside)
    await store.cancel("t", "a test")
    with pytest.raises(UsageError, match="none of this step"):
        await store.retry("t", step="each[1]", by="a test")
    await store.retry("t", step="each", by="a test")
    assert "each[0]" in await run(store, listed(8))


ASKS = """
steps:
  - {id: gate, agent: echo}
  - id: each
    needs: gate
    approval: 'Go on?'
    agent: echo
    for_each: [0, 1, 2, 3, 4, 5, 6, 7]
on_error: [{id: alarm, agent: echo}]
"""
BESIDE = """
steps:
  - {id: gate, agent: echo}
  - {id: each, agent: echo, needs: gate, for_each: [0, 1, 2, 3, 4, 5, 6, 7]}
  - {id: again, agent: echo, needs: gate, repeat: {until: "${true}", max_times: 2}}
on_error: [{id: alarm, agent: echo}]
"""


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("text", [ASKS, BESIDE], ids=["after an approval", "with a repeat beside it"])
async def test_rows_written_ahead_go_when_the_run_is_late(
    store: Store, outside: Outside, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    await ticket(store, outside, text, timeout_seconds=100.0)
    (gate,) = await claims(store)
    await finish(store, gate)
    if text == ASKS:
        await store.claim("w", lease_seconds=60)
        with monkeypatch.context() as patch:  # who answers makes no decision
            patch.setattr(store._planner, "take_up", lambda runs: None)
            await store.answer("t", approved=True, by="ann")
    run_id = (await store.ticket("t")).run_id or ""
    _, batches = await store._read.call(store._workflows.decide, run_id, IN_PROCESS)
    for batch in batches:
        assert await ahead(store, batch)
    assert "each[7]" in await statuses(store)
    await store.shift_clock(101_000)
    assert await run(store) == ["alarm"]
    assert [name for name in await statuses(store) if "[" in name] == []
    assert (await state(store))[0] == "failed"


@pytest.mark.usefixtures("few")
async def test_of_two_that_decide_on_one_run_the_second_goes_on(store: Store, outside: Outside) -> None:
    """The first one was slow, and another engine took the decision up."""
    slow = await begun(store, outside)
    run_id = (await store.ticket("t")).run_id or ""
    without, batches = await store._read.call(store._workflows.decide, run_id, IN_PROCESS)
    assert without is not None
    for number, batch in enumerate(batches):
        assert await ahead(store, batch)
        assert not await ahead(store, slow[min(number, len(slow) - 1)])
    late = replace(without, revision=without.revision - 1)
    assert await store._write.call_batch(store._workflows.apply, late) is False
    assert (await statuses(store))["each"] == "pending"
    assert await store._write.call_batch(store._workflows.apply, without) is False
    assert (await statuses(store))["each"] == "running"
    await store.shift_clock(61_000)  # the leases of `begun` are over
    await run(store)
    assert json.loads((await rows(store))["last"].inputs or "") == {"count": 8}


@pytest.mark.usefixtures("few")
async def test_nobody_else_takes_a_decision_up_while_its_rows_are_written(store: Store, outside: Outside) -> None:
    later = await begun(store, outside)
    for batch in later:
        await store.shift_clock(20_000)
        assert await ahead(store, batch)
    (due,) = outside.execute("SELECT due_at FROM workflow_runs")[0]
    assert due > outside.now_ms() + 15_000


@pytest.mark.usefixtures("few")
@pytest.mark.sqlite
async def test_a_row_that_can_t_be_written_fails_its_ticket_alone(store: Store, outside: Outside) -> None:
    outside.script(
        "CREATE TRIGGER guard BEFORE INSERT ON step_executions WHEN NEW.step_id = 'each[4]' "
        "BEGIN SELECT RAISE(ABORT, 'not this one'); END"
    )
    await ticket(store, outside, EACH)
    insert(outside, "good")
    await run(store, listed(8))
    while await store.decided():
        await run(store, listed(8))
    assert (await store.ticket("good")).state == "done"
    ended = await store.ticket("t")
    assert ended.state == "failed" and "not this one" in str(ended.error)


MANY = "steps: [{id: each, agent: echo, for_each: '${inputs.list}'}, {id: last, agent: echo, needs: each}]"


@pytest.mark.parametrize(
    ("place", "count"), [("in the transaction", 250), ("on a thread", 250), ("in the process", 1050)]
)
async def test_many_items_that_run_together_start_in_several_transactions(
    store: Store, outside: Outside, monkeypatch: pytest.MonkeyPatch, places: Places, place: str, count: int
) -> None:
    if place == "in the transaction":
        monkeypatch.setattr(
            "swarm.store.runs.workflow_engine.IN_TRANSACTION", replace(limits.IN_TRANSACTION, items=1000)
        )
    starts = list[int]()

    def carried_out(changes: Changes, run: Run, decided: Decided, *others: Any) -> bool:
        assert decided.decision is not None
        starts.append(sum(isinstance(one, Start) for one in decided.decision.actions))
        return carry_out(changes, run, decided, *others)

    monkeypatch.setattr("swarm.store.runs.workflow_engine.carry_out", carried_out)
    await ticket(store, outside, MANY, inputs=json.dumps({"list": [0] * 10}))
    while await run(store, limit=100):
        pass
    outside.execute("DELETE FROM tickets WHERE id = 't'")
    starts.clear()
    workflow = outside.execute("SELECT id FROM workflows WHERE name = 'of-t'")[0][0]
    columns = {"agent_id": None, "execution_mode": "workflow", "workflow_id": workflow}
    insert(outside, "t", inputs=json.dumps({"list": [0] * count}), **columns)
    places.found.clear()
    found = list[Claim]()
    while more := await claims(store, 300):
        found += more
    assert len(found) == count and sorted(starts) == [50, *[100] * (count // 100)]
    assert ("process" in places.found) == (place == "in the process")
    await finish(store, found[0])
    await store.cancel("t", "a test")


@pytest.mark.parametrize("late", ["after all have started", "while they are being started"])
async def test_many_items_choose_in_time(
    store: Store, outside: Outside, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    each = "{items: '${inputs.list}', best: '${outputs.n}', timeout_seconds: 5}"
    steps = f"steps: [{{id: each, agent: echo, for_each: {each}, inputs: {{n: '${{item}}'}}}}]"
    await ticket(store, outside, steps, inputs=json.dumps({"list": [*range(250)]}))
    times = "SELECT r.due_at, s.available_at FROM workflow_runs r, step_executions s WHERE s.step_id = 'each'"
    with monkeypatch.context() as patch:
        patch.setattr(store._planner, "take_up", lambda runs: None)
        assert await store.claim("w", lease_seconds=60) == []
        assert await goes_on(store)
        ((due_at, chooses_at),) = outside.execute(times)
        assert due_at == chooses_at > outside.now_ms()
        (first,) = await store.claim("w", lease_seconds=60)
        await finish(store, first)
        while late == "after all have started" and await goes_on(store):
            pass
    ((due_at, chooses_at),) = outside.execute(times)
    assert due_at == chooses_at
    await store.shift_clock(6000)
    await store.claim("w", lease_seconds=60)
    await store.decided()
    assert await state(store) == ("done", json.loads(first.inputs))


async def test_two_that_choose_one_after_the_other(store: Store, outside: Outside) -> None:
    """The first one's time passes while nobody looks; the other one's is kept."""
    each = "{{id: {id}, agent: echo, for_each: {{items: [1, 2], best: '${{outputs}}', timeout_seconds: {seconds}}}}}"
    steps = ", ".join(each.format(id=id, seconds=seconds) for id, seconds in (("a", 5), ("b", 50)))
    await ticket(store, outside, f"steps: [{steps}]")
    found = {claim.step_id: claim for claim in await claims(store)}
    assert set(found) == {"a[0]", "a[1]", "b[0]", "b[1]"}
    await finish(store, found["b[0]"], gives(b=7))
    await store.shift_clock(6000)
    await finish(store, found["a[0]"], gives(a=3))
    await claims(store)
    assert (await statuses(store))["a"] == "completed" and (await statuses(store))["b"] == "running"
    await store.shift_clock(50_000)
    await claims(store)
    assert await state(store) == ("done", {"a": 3, "b": 7})


async def goes_on(store: Store) -> bool:
    """Make one decision; True if another one follows at once."""
    run_id = (await store.ticket("t")).run_id or ""
    decided, batches = await store._read.call(store._workflows.decide, run_id, limits.ON_THREAD)
    assert decided is not None
    for batch in batches:
        assert await ahead(store, batch)
    again: bool = await store._write.call_batch(store._workflows.apply, decided)
    return again


def _actions(request: Batch | Decided) -> Sequence[Action]:
    return request.decision.actions if isinstance(request, Decided) and request.decision is not None else ()


@pytest.mark.sqlite
async def test_no_transaction_writes_much(store: Store, outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the decision on 40 items of 60 KB, which may all run at once."""
    wrote = dict[str, int]()
    keep, ahead, applied = artifacts.keep, WorkflowEngine.write_items, WorkflowEngine.apply

    def kept(tx: Tx, ticket_id: str, parts: Mapping[str, str]) -> None:
        sizes.append(sum(map(len, parts.values())))
        keep(tx, ticket_id, parts)

    def measured(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(engine: WorkflowEngine, tx: Tx, requests: Any) -> Any:
            sizes.clear()
            result = function(engine, tx, requests)
            if any(isinstance(one, Complete) for request in requests for one in _actions(request)):
                return result  # what it gives is one value
            rows = sum(len(str(value)) for _, rows in tx._unwritten for row in rows for value in row.values())
            wrote[function.__name__] = max(wrote.get(function.__name__, 0), rows + sum(sizes))
            return result

        return call

    sizes = list[int]()
    monkeypatch.setattr(artifacts, "keep", kept)
    monkeypatch.setattr(WorkflowEngine, "write_items", measured(ahead))
    monkeypatch.setattr(WorkflowEngine, "apply", measured(applied))
    await ticket(store, outside, EACH.replace("max_parallel: 2", "max_parallel: 40"))
    await run(store, gives(list={"items": [f"{n:02}" + "y" * 60_000 for n in range(40)]}))
    assert (await state(store))[0] == "done"
    assert 200_000 < wrote["write_items"] < 400_000 and wrote["apply"] < 100_000


async def test_a_nested_run_and_large_inputs(store: Store, outside: Outside, places: Places) -> None:
    text = """
inputs: {list: array}
steps:
  - id: each
    for_each: "${inputs.list}"
    max_parallel: 3
    workflow:
      inputs: {n: string, all: array}
      steps:
        - {id: x, agent: echo, inputs: {n: "${inputs.n}", first: "${inputs.all[0]}"}}
      outputs: {n: "${steps.x.outputs.n}", first: "${steps.x.outputs.first}"}
    inputs: {n: "${item}", all: "${inputs.list}"}
"""
    given = [f"{n}" + "y" * 30_000 for n in range(5)]
    await ticket(store, outside, text, inputs=json.dumps({"list": given}))
    await run(store, lambda claim: Succeeded(outputs=claim.inputs))
    found, outputs = await state(store)
    assert found == "done" and outputs == [{"n": one, "first": given[0]} for one in given]
    assert "process" in places.found
