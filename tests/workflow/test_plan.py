"""What comes next: the rules one by one, then random workflows under random outcomes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.cel.jail import Jail
from swarm.model import RunStatus, StepStatus
from swarm.workflow import fan_out
from swarm.workflow.definition import Approval, ForEach, Repeat, Step
from swarm.workflow.state import ENDED, WAITING, RunContext, StepState
from swarm.workflow.structure import Graph
from tests.workflow.runs import Run, flow, run, step


def test_a_chain_hands_outputs_on() -> None:
    ours = run(
        step("a", inputs={"n": "${inputs.n}"}),
        step("b", "a", inputs={"n": "${steps.a.outputs.n + 1}", "text": "got ${steps.a.outputs}"}),
        inputs={"n": 1},
    )
    assert ours.live() == ["a"] and ours.rows["a"].inputs == {"n": 1}
    ours.finish("a", {"n": 5})
    assert ours.rows["b"].inputs == {"n": 6, "text": 'got {"n":5}'}
    ours.finish("b", "done")
    assert ours.end is not None and (ours.end.status, ours.end.outputs) == (RunStatus.COMPLETED, "done")


def test_a_diamond_runs_its_sides_together() -> None:
    ours = run(step("a"), step("b", "a"), step("c", "a"), step("d", "b", "c"), outputs={"all": "${steps.d.outputs}"})
    ours.finish("a")
    assert ours.live() == ["b", "c"]
    ours.finish("c")
    assert ours.live() == ["b"] and ours.status("d") == "pending"
    ours.finish("b")
    ours.finish("d", 4)
    assert ours.end is not None and ours.end.outputs == {"all": 4}


def test_a_failure_skips_what_depends_on_it_and_fails_the_run() -> None:
    ours = run(step("a"), step("b", "a"), step("c", "b"), step("other"))
    ours.finish("a", error="it broke")
    assert ours.rows["b"].error == "it needs 'a', which failed"
    assert ours.rows["c"].error == "it needs 'b', which was skipped"
    assert not ours.over, "what does not depend on it goes on"
    ours.finish("other")
    assert ours.end is not None
    assert (ours.end.status, ours.end.error, ours.end.error_step) == (RunStatus.FAILED, "it broke", "a")


def test_fail_fast_stops_the_others() -> None:
    ours = run(step("a"), step("b"), step("c", "b"), fail_fast=True)
    ours.finish("a", error="it broke")
    assert (ours.status("b"), ours.status("c")) == ("cancelled", "skipped") and ours.end is not None


def test_continue_on_error() -> None:
    ours = run(step("a", continue_on_error=True), step("b", "a", inputs={"why": "${steps.a.error}"}))
    ours.finish("a", error="it broke")
    assert ours.rows["b"].inputs == {"why": "it broke"}
    ours.finish("b")
    assert ours.end is not None and ours.end.status == RunStatus.COMPLETED


def test_when() -> None:
    ours = run(
        step("a", when="${inputs.go}"), step("b", "a"), step("c", when="${!inputs.go}"), step("d", "a", "c", join=1),
        inputs={"go": False},
    )  # fmt: skip
    assert ours.rows["a"].error == "its `when` is false: ${inputs.go}" and ours.status("b") == "skipped"
    ours.finish("c")
    ours.finish("d")
    assert ours.end is not None and ours.end.status == RunStatus.COMPLETED


@pytest.mark.parametrize("value", ["${inputs.n}", "${inputs.nope}", "${1 / 0 == 1}", "${steps.a.outputs.x == 1}"])
def test_an_expression_without_a_fitting_value_fails_its_step(value: str) -> None:
    ours = run(step("a", continue_on_error=True), step("b", "a", when=value), inputs={"n": 1})
    ours.finish("a", error="no outputs")
    assert (ours.status("b") == "failed" and value in str(ours.rows["b"].error)) or "when must be true or false" in str(
        ours.rows["b"].error
    )
    assert ours.end is not None and ours.end.error_step == "b"


@pytest.mark.parametrize(
    ("join", "ends", "status"),
    [
        ("any", [("a", False), ("b", True)], "ready"),
        ("first_success", [("a", True)], "ready"),
        (2, [("a", True), ("b", False)], "pending"),
        (2, [("a", True), ("b", False), ("c", True)], "ready"),
        (2, [("a", False), ("b", False)], "failed"),
        ("any", [("a", False), ("b", False), ("c", False)], "failed"),
        ("first_success", [("a", False), ("b", False)], "pending"),
    ],
)
def test_joins(join: Any, ends: list[tuple[str, bool]], status: str) -> None:
    ours = run(step("a"), step("b"), step("c"), step("d", "a", "b", "c", join=join))
    for key, well in ends:
        ours.finish(key, error=None if well else "it broke")
    assert ours.status("d") == status
    if join == "first_success" and status == "ready":
        assert [ours.status(key) for key in "abc"] == ["completed", "cancelled", "cancelled"]
        assert ours.rows["b"].error == "'a' was first, and 'd' needs only one"
    if status == "failed":
        assert "had to succeed" in str(ours.rows["d"].error)
    elif status == "ready":
        for key in [*ours.live()]:
            ours.finish(key)
        assert ours.end is not None and ours.end.status == RunStatus.COMPLETED, "the join answers for the failures"


def test_a_fan_out_with_a_limit() -> None:
    ours = run(
        step("list"),
        step("build", "list", for_each=ForEach(items="${steps.list.outputs}", max_parallel=2),
             inputs={"it": "${item.name}", "i": "${index}"}),
        step("sum", "build", inputs={"all": "${steps.build.outputs}"}),
    )  # fmt: skip
    ours.finish("list", [{"name": name} for name in "pqrs"])
    assert ours.live() == ["build[0]", "build[1]"] and ours.rows["build[3]"].inputs == {"it": "s", "i": 3}
    for i in (1, 0, 3, 2):
        if f"build[{i}]" not in ours.live():
            ours.finish("build[2]", 2)
            continue
        ours.finish(f"build[{i}]", i)
    for key in ours.live():
        if key.startswith("build"):
            ours.finish(key, int(key[-2]))
    assert ours.rows["sum"].inputs == {"all": [0, 1, 2, 3]}


def test_a_fan_out_over_nothing_is_done() -> None:
    ours = run(step("a", for_each=ForEach(items=[])), step("b", "a", inputs={"x": "${steps.a.outputs}"}))
    assert ours.rows["b"].inputs == {"x": []}


def test_a_fan_out_that_fails_starts_nothing_more() -> None:
    ours = run(step("a", for_each=ForEach(items=[1, 2, 3, 4], max_parallel=2)), step("b", "a"))
    ours.finish("a[0]", error="it broke")
    assert ours.live() == ["a[1]"] and ours.status("a[3]") == "skipped" and ours.status("a") == "running"
    ours.finish("a[1]", 1)
    assert ours.rows["a"].error == "a[0] failed: it broke" and ours.status("b") == "skipped"
    assert ours.end is not None and ours.end.error_step == "a"


def test_a_fan_out_that_may_fail_in_part() -> None:
    ours = run(step("a", for_each=ForEach(items=[1, 2]), continue_on_error=True))
    ours.finish("a[0]", error="it broke")
    ours.finish("a[1]", 1)
    assert ours.rows["a"].outputs == [None, 1] and ours.end is not None and ours.end.status == RunStatus.COMPLETED


def test_a_fan_out_that_wants_two_of_four() -> None:
    ours = run(step("a", for_each=ForEach(items=[1, 2, 3, 4], join=2)))
    ours.finish("a[1]", "x")
    ours.finish("a[0]", error="it broke")
    ours.finish("a[2]", "y")
    assert ours.rows["a"].outputs == [None, "x", "y", None] and ours.status("a[3]") == "cancelled"
    assert ours.end is not None and ours.end.status == RunStatus.COMPLETED


def test_the_best_of_four() -> None:
    ours = run(
        step("try", for_each=ForEach(items=[1, 2, 3, 4], best="${outputs.score - index}")),
        step("ship", "try", inputs={"x": "${steps.try.outputs.score}"}, from_step="try"),
    )
    ours.finish("try[1]", {"score": 8})
    ours.finish("try[0]", {"score": 3})
    ours.finish("try[2]", error="it broke")
    assert ours.status("try") == "running", "all are waited for"
    ours.finish("try[3]", {"score": 10})
    assert ours.rows["try"].outputs == {"score": 8}, "of equals, the first"
    assert ours.rows["ship"].inputs == {"x": 8} and ours.sources == {"ship": "try[1]"}
    ours.finish("ship")
    assert ours.end is not None and ours.end.status == RunStatus.COMPLETED, "best answers for the failures"


def test_the_best_of_those_that_were_in_time() -> None:
    def fresh() -> Run:
        timed = ForEach(items=[1, 2, 3, 4], best="${outputs}", max_parallel=3, timeout_seconds=60)
        return run(step("try", for_each=timed), step("ship", "try", from_step="try"))

    ours = fresh()
    ours.finish("try[2]", 5)
    ours.finish("try[0]", 7)
    ours.tell("!over try")
    assert ours.rows["try"].outputs == 7 and ours.sources == {"ship": "try[0]"}
    assert [ours.rows[f"try[{i}]"].error for i in (1, 3)] == ["the time of 'try' is over"] * 2
    ours.tell("!over try")  # a second word of it changes nothing
    ours = fresh()
    ours.tell("!over try")
    assert ours.rows["try"].error == "only 0 of 4 succeeded; the time of 'try' is over"
    assert ours.end is not None and ours.end.status == RunStatus.FAILED


@pytest.mark.parametrize(
    ("outputs", "error"),
    [
        ([None, None], "only 0 of 2 succeeded; try[0] failed: it broke"),
        ([], "only 0 of 0 succeeded; no items are left to run"),
        (["high", None], "best must be a number, but is string high"),
        ([10**400, 1], "best must be a number, but is"),
    ],
)
def test_nothing_is_the_best(outputs: list[Any], error: str) -> None:
    ours = run(step("try", for_each=ForEach(items=outputs, best="${outputs}")), step("ship", "try", from_step="try"))
    for i, value in enumerate(outputs):
        ours.finish(f"try[{i}]", value, error="it broke" if value is None else None)
    assert str(ours.rows["try"].error).startswith(error) and ours.status("ship") == "skipped"
    assert ours.end is not None and ours.end.error_step == "try"


def test_a_step_starts_in_a_fork_of_the_vm_that_another_left() -> None:
    ours = run(
        step("setup"),
        step("try", "setup", for_each=ForEach(items=[1, 2, 3], max_parallel=2, join="first_success"),
             from_step="setup"),
        step("again", "try", repeat=Repeat(until="${steps.again.outputs}"), from_step="try"),
        step("ship", "again", from_step="again"),
        on_success=(step("cheer", from_step="setup"),),
    )  # fmt: skip
    ours.finish("setup")
    ours.finish("try[0]", error="it broke")
    assert ours.sources == {f"try[{i}]": "setup" for i in range(3)}
    ours.finish("try[2]")
    assert ours.status("try[1]") == "cancelled" and ours.sources["again[0]"] == "try[2]", "the winner's VM"
    ours.finish("again[0]", False)
    assert ours.sources["again[1]"] == "try[2]", "each time begins from the same"
    ours.finish("again[1]", True)
    assert ours.sources["ship"] == "again[1]"
    ours.finish("ship")
    assert ours.sources["cheer"] == "setup"


def test_a_step_that_left_no_vm() -> None:
    ours = run(
        step("a", continue_on_error=True),
        step("b", "a", from_step="a"),
        step("c", "a"),
        step("many", for_each=ForEach(items=[1], join="any"), continue_on_error=True),
        step("d", "many", from_step="many"),
    )
    ours.finish("a", error="it broke")
    assert ours.rows["b"].error == "it starts from the VM of 'a', which failed" and ours.live() == ["c", "many[0]"]
    ours.finish("many[0]", error="it broke")
    assert ours.rows["d"].error == "it starts from the VM of 'many', of which no item succeeded"


def test_when_for_each_item() -> None:
    ours = run(step("a", for_each=ForEach(items=[1, 2, 3]), when="${item != 2}"))
    assert ours.live() == ["a[0]", "a[2]"] and ours.status("a[1]") == "skipped"
    ours.finish("a[0]", 1)
    ours.finish("a[2]", 3)
    assert ours.rows["a"].outputs == [1, None, 3]


@pytest.mark.parametrize("max_parallel", [None, 150])
def test_a_hundred_items_at_most_start_by_one_decision(max_parallel: int | None) -> None:
    each = ForEach(items=list(range(390)), max_parallel=max_parallel)
    ours = run(step("a", for_each=each, when="${item > 50}"), step("b", "a"))
    started = 390 - 51 if max_parallel is None else 150
    assert ours.live() == [f"a[{n}]" for n in range(51, 51 + started)], "without the end of any"
    assert ours.most_starts == 100
    ours.finish("a[51]")
    assert len(ours.live()) == (started - 1 if max_parallel is None else 150)


def test_items_that_were_to_start_do_not_when_the_step_has_ended() -> None:
    each = ForEach(items=list(range(250)), join="any")
    ours = Run(Graph(flow(step("a", for_each=each), step("b", "a"))), held=[])
    assert len(ours.live()) == 100 and ours.held == ["!more a"]
    ours.finish("a[7]")
    assert ours.live() == ["b"] and ours.status("a[200]") == "cancelled"
    ours.tell("!more a")
    assert ours.live() == ["b"]


def test_an_end_before_the_others_start_starts_no_fewer() -> None:
    ours = Run(Graph(flow(step("a", for_each=ForEach(items=list(range(250)))))), held=[])
    ours.finish("a[7]")
    assert len(ours.live()) == 199 and ours.held == ["!more a", "!more a"]
    ours.tell(*ours.held)
    assert len(ours.live()) == 249
    again = Run(ours.graph, ours.known, rows=ours.rows)
    assert again.history == []


def test_repeat_until() -> None:
    with Jail() as jail:
        ours = run(
            step("fix", repeat=Repeat(until="${steps.fix.outputs.green}", max_times=3),
                 inputs={"log": "${previous == null ? '' : previous.log}", "try": "${index + 1}"}),
            step("ship", "fix", inputs={"x": "${steps.fix.outputs.log}"}),
            evaluator=jail,
        )  # fmt: skip
        assert ours.live() == ["fix[0]"] and ours.rows["fix[0]"].inputs == {"log": "", "try": 1}
        ours.finish("fix[0]", {"green": False, "log": "red"})
        assert ours.rows["fix[1]"].inputs == {"log": "red", "try": 2}
        ours.finish("fix[1]", {"green": True, "log": "ok"})
        assert ours.rows["ship"].inputs == {"x": "ok"}


def test_repeat_ends() -> None:
    ours = run(step("fix", repeat=Repeat(until="${steps.fix.outputs}", max_times=2)))
    ours.finish("fix[0]", False)
    ours.finish("fix[1]", False)
    assert "${steps.fix.outputs} is still false after 2 times" in str(ours.rows["fix"].error) and ours.end is not None


def test_approval() -> None:
    def fresh() -> Run:
        return run(step("gate", agent=None, approval=Approval(message="ship ${inputs.v}?")), step("ship", "gate"),
                   inputs={"v": 2})  # fmt: skip

    ours = fresh()
    assert ours.waiting() == ["gate"] and not ours.live()
    ours.answer("gate", approved=True, why="looks good")
    assert ours.rows["gate"].outputs == {"approved": True, "by": "ann", "why": "looks good"} and ours.live() == ["ship"]
    ours = fresh()
    ours.answer("gate", approved=False, why="no")
    assert ours.end is not None and ours.end.error == "rejected by ann: no"


def test_handlers() -> None:
    steps = (step("a"), step("b", "a"))
    more: dict[str, Any] = {
        "on_error": (step("tell", inputs={"why": "${error.step}: ${error.message}"}),),
        "on_success": (step("cheer", inputs={"x": "${steps.b.outputs}"}),),
    }
    ours = run(*steps, **more)
    ours.finish("a", error="it broke")
    assert ours.rows["tell"].inputs == {"why": "a: it broke"} and ours.rows["cheer"].error == "the run failed"
    ours.finish("tell")
    assert ours.end is not None and (ours.end.status, ours.end.error) == (RunStatus.FAILED, "it broke")
    ours = run(*steps, **more)
    ours.finish("a")
    ours.finish("b", 3)
    assert not ours.over and ours.rows["cheer"].inputs == {"x": 3} and ours.rows["tell"].error == "the run succeeded"
    ours.finish("cheer")
    assert ours.end is not None and ours.end.outputs == 3


def test_retry_from_a_step() -> None:
    ours = run(step("a"), step("b", "a"), step("c", "b"), step("d", "a"))
    ours.finish("a", 1)
    ours.finish("d", 1)
    ours.finish("b", error="it broke")
    assert ours.end is not None
    reset = ours.graph.after("b")
    assert reset == ("b", "c")
    again = Run(ours.graph, rows={k: StepState() if k in reset else v for k, v in ours.rows.items()})
    assert again.live() == ["b"] and again.history == [("start", "b")]
    again.finish("b")
    again.finish("c")
    assert again.end is not None and again.end.status == RunStatus.COMPLETED


def test_a_workflow_within() -> None:
    inner = flow(step("x"))
    ours = run(step("a", workflow=inner, inputs={"n": 1}), step("b", "a"))
    assert ours.live() == ["a"]
    ours.finish("a", error="x failed: it broke")
    assert ours.end is not None and ours.end.error == "x failed: it broke"


# --- anything ---------------------------------------------------------------------------------------------------------


@st.composite
def workflows(draw: st.DrawFn) -> tuple[Step, ...]:
    steps: list[Step] = []
    for i in range(draw(st.integers(1, 9))):
        needs = draw(st.lists(st.sampled_from([s.id for s in steps]), unique=True, max_size=4)) if steps else []
        join = draw(st.sampled_from(["all", "all", "any", "first_success", 1, 2])) if needs else "all"
        if isinstance(join, int):
            join = min(join, len(needs))
        kind = draw(st.sampled_from(["plain"] * 4 + ["fan", "repeat", "approval"]))
        more: dict[str, Any] = {}
        if kind == "fan":
            limit = draw(st.sampled_from([None, 1, 2]))
            inner = draw(st.sampled_from(["all", "any", "first_success", "best"]) | st.just(2))
            how = {"best": "${outputs}", "timeout_seconds": 60.0} if inner == "best" else {"join": inner}
            more["for_each"] = ForEach(items=list(range(draw(st.integers(0, 4)))), max_parallel=limit, **how)
        elif kind == "repeat":
            more["repeat"] = Repeat(until=f"${{steps.s{i}.outputs == 1}}", max_times=draw(st.integers(1, 3)))
        elif kind == "approval":
            more |= {"approval": Approval(), "agent": draw(st.sampled_from([None, "echo@1.0.0"]))}
        sources = [s.id for s in steps if s.id in needs and (s.for_each is None or s.for_each.has_winner)]
        if sources and kind != "approval":
            more["from_step"] = draw(st.sampled_from([None, *sources]))
        when = draw(st.sampled_from([True, True, True, False, "${inputs.yes}", "${inputs.no}"]))
        steps.append(step(f"s{i}", *needs, join=join, when=when, continue_on_error=draw(st.booleans()), **more))
    return tuple(steps)


def _is_timed(graph: Graph, key: str) -> bool:
    found = graph.steps.get(key)
    return found is not None and found.for_each is not None and found.for_each.best is not None


@settings(max_examples=400, deadline=None)
@given(workflows(), st.booleans(), st.booleans(), st.sampled_from([1, 2, 100]), st.data())
def test_whatever_happens_the_run_ends_right(
    steps: tuple[Step, ...], fail_fast: bool, handlers: bool, most: int, data: st.DataObject
) -> None:
    with mock.patch.object(fan_out, "MAX_STARTS", most):
        _ends_right(steps, fail_fast, handlers, data)


def _ends_right(steps: tuple[Step, ...], fail_fast: bool, handlers: bool, data: st.DataObject) -> None:
    more = {"on_error": (step("h"),), "on_success": (step("g"),)} if handlers else {}
    graph = Graph(flow(*steps, fail_fast=fail_fast, **more))
    ours = Run(graph, RunContext(inputs={"yes": True, "no": False}), held=[])
    for _ in range(200):
        if ours.end is not None:
            break
        choices = [*ours.live(), *ours.waiting(), *(ours.held or ())]
        assert choices, f"stuck: {ours.rows}"
        timed = [one for one, row in ours.rows.items() if row.status == StepStatus.RUNNING and _is_timed(graph, one)]
        key = data.draw(st.sampled_from([*choices, *timed]))
        if ours.held and key in ours.held:
            ours.held.remove(key)
            ours.tell(key)
        elif key in timed:
            ours.tell(f"!over {key}")
        elif ours.status(key) == WAITING:
            ours.answer(key, approved=data.draw(st.booleans()))
        elif data.draw(st.integers(0, 3)) == 0:
            ours.finish(key, error="it broke")
        else:
            ours.finish(key, data.draw(st.integers(0, 1)))
        counted = sum(
            row.status not in ENDED for key, row in ours.rows.items() if graph.phase.get(key) == ours.progress.phase
        )
        assert ours.progress.open == counted
        # A crash: everything from the rows alone.
        if ours.end is None and not ours.held and data.draw(st.integers(0, 5)) == 0:
            before, history, sources = dict(ours.rows), list(ours.history), ours.sources
            ours = Run(graph, ours.known, rows=ours.rows, held=[])
            assert ours.history == [], "nothing is started twice, and nothing was forgotten"
            assert {k: replace(v, fan_out=None) for k, v in before.items()} == {
                k: replace(v, fan_out=None) for k, v in ours.rows.items()
            }
            ours.history, ours.sources = history, sources
    assert ours.end is not None
    started = [key for what, key in ours.history if what == "start"]
    assert len(started) == len(set(started)), "each execution is started once"
    assert all(row.status in ENDED for row in ours.rows.values()), "every step ends"
    for key, row in ours.rows.items():
        if row.status in (StepStatus.SKIPPED, StepStatus.FAILED, StepStatus.CANCELLED):
            assert row.error, f"{key} is {row.status} for no reason"
    when = {key: i for i, (what, key) in enumerate(ours.history) if what == "start"}
    over = {key: i for i, (what, key) in enumerate(ours.history) if what == "end"}
    for one in graph.steps.values():
        mine = [i for key, i in when.items() if key.partition("[")[0] == one.id]
        for need in one.needs if one.join == "all" else ():
            ends = [i for key, i in over.items() if key.partition("[")[0] == need]
            assert not mine or not ends or max(ends) < min(mine), "order respects needs"
            assert not mine or ours.rows[need].status == StepStatus.COMPLETED or graph.steps[need].continue_on_error
    for key in started:
        wanted = graph.steps[key.partition("[")[0]].from_step
        assert (ours.sources[key].partition("[")[0] if wanted else ours.sources.get(key)) == wanted
        assert not wanted or ours.rows[ours.sources[key]].status == StepStatus.COMPLETED, "a VM that is there"
    fatal = [
        one.id
        for one in steps
        if ours.rows[one.id].status == StepStatus.FAILED
        and not one.continue_on_error
        and not graph.can_do_without(one.id)
    ]
    if fatal:
        assert ours.end.status == RunStatus.FAILED and ours.end.error_step in fatal
    elif not handlers or ours.rows["g"].status != StepStatus.FAILED:
        assert ours.end.status == RunStatus.COMPLETED


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_a_step_costs_the_same_in_a_long_chain() -> None:
    steps = [step("s0")] + [
        step(f"s{i}", f"s{i - 1}", inputs={"x": f"${{steps.s{i - 1}.outputs.x + 1}}"}) for i in range(1, 500)
    ]
    ours = Run(Graph(flow(*steps)))
    ours.asked.count = 0
    most, began = 0, time.process_time()
    for i in range(500):
        before = ours.asked.count
        ours.finish(f"s{i}", {"x": i})
        most = max(most, ours.asked.count - before)
    spent = (time.process_time() - began) / 500
    assert ours.end is not None and most <= 12, "states asked for in one decision"
    assert spent < 0.005, f"{spent * 1000:.2f} ms for a step"


def test_a_wide_fan_out_is_cheap() -> None:
    ours = run(step("a", for_each=ForEach(items=list(range(50)), max_parallel=10), inputs={"i": "${item + 1}"}))
    began = time.process_time()
    for _ in range(50):
        ours.finish(ours.live()[0], 1)
    assert ours.end is not None and (time.process_time() - began) / 50 < 0.005
