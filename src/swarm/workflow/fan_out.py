"""Steps that are several executions: for_each, at once, and repeat, one after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from swarm.cel import stored, template
from swarm.cel.expression import ExpressionError
from swarm.model import StepStatus
from swarm.workflow.definition import Step, Workflow
from swarm.workflow.planner_base import LIVE, PlannerBase, Tally, kind, was
from swarm.workflow.state import (
    ENDED,
    Cancel,
    Child,
    Complete,
    Expand,
    Fail,
    FanOutState,
    Skip,
    Start,
    StartWorkflow,
    StepState,
    Update,
)

MAX_ITEMS: Final = 10_000  # of one for_each
_FAN_BUDGET: Final = (64 << 20, 100_000)  # bytes of inputs, and expressions, for all of its items together


class FanOut(PlannerBase):
    def _work(self, step: Step) -> None:
        if step.for_each is not None:
            self._expand(step)
        elif step.repeat is not None:
            names = self._names(index=0, previous=None)
            inputs = self._inputs(step, names)
            self._act(
                Expand(
                    key=step.id, children=(Child(key=f"{step.id}[0]", inputs=inputs),), fan_out=FanOutState(count=1)
                ),
                status=StepStatus.RUNNING,
                fan_out=FanOutState(count=1, next=1, running=1),
            )
            self._start(f"{step.id}[0]", step, inputs)
            self._actions.append(Update(key=step.id, fan_out=FanOutState(count=1, next=1, running=1)))
        else:
            self._start(step.id, step, self._inputs(step, self._names()))

    def _start(self, key: str, step: Step, inputs: Any) -> None:
        if step.agent is not None:
            self._act(Start(key=key, step=step, agent=step.agent, inputs=inputs), status=StepStatus.READY)
        elif isinstance(step.workflow, Workflow):
            self._act(
                StartWorkflow(key=key, step=step, workflow=step.workflow, inputs=inputs), status=StepStatus.RUNNING
            )
        else:
            raise ExpressionError(f"the workflow {step.workflow!r} was not frozen into this run")

    def _expand(self, step: Step) -> None:
        assert step.for_each is not None
        names = self._names()
        items = template.fill({"for_each": step.for_each.items}, names, self._evaluator)["for_each"]
        items = stored.opened(items)
        if not isinstance(items, list):
            raise ExpressionError(f"for_each wants a list, and was given {kind(items)}")
        if len(items) > MAX_ITEMS:
            raise ExpressionError(f"for_each has {len(items)} items; {MAX_ITEMS} are allowed")
        budget = template.Budget(*_FAN_BUDGET)
        children = []
        for i, item in enumerate(items):
            inner = {**names, "item": item, "index": i}
            skip = None
            if step.id in self._graph.when_per_item and not self._when(step, inner):
                skip = f"its `when` is false: {template.shorten(str(step.when))}"
            inputs = None if skip else self._inputs(step, inner, budget)
            children.append(Child(key=f"{step.id}[{i}]", inputs=inputs, skip=skip))
        fan_out = FanOutState(count=len(children), skipped=sum(child.skip is not None for child in children))
        self._act(
            Expand(key=step.id, children=tuple(children), fan_out=fan_out), status=StepStatus.RUNNING, fan_out=fan_out
        )
        for child in children:
            status = StepStatus.SKIPPED if child.skip else StepStatus.PENDING
            self._now[child.key] = StepState(status=status, inputs=child.inputs, error=child.skip)
        self._go_on(step, fan_out)

    def _child_ended(self, step: Step, key: str, state: StepState) -> None:
        fan_out = self._state(step.id).fan_out
        if fan_out is None:
            return  # a row that somebody else wrote
        fan_out = _counted(fan_out, key, state)
        if step.repeat is not None:
            self._repeat(step, key, state, fan_out)
        else:
            self._go_on(step, fan_out)

    def _recount(self, step: Step, fan_out: FanOutState) -> None:
        """The counters of a fan, from its children as they are."""
        fresh = FanOutState(count=fan_out.count, next=fan_out.count)
        last = None
        for i in range(fan_out.count):
            key = f"{step.id}[{i}]"
            state = self._state(key)
            if state.status == StepStatus.PENDING:
                fresh = replace(fresh, next=min(fresh.next, i))  # others behind it may have ended: a retry keeps them
                continue
            if state.status in ENDED:
                skipped = state.status == StepStatus.SKIPPED
                fresh = replace(fresh, skipped=fresh.skipped + 1) if skipped else _counted(fresh, key, state, before=0)
                last = (key, state)
            else:
                fresh = replace(fresh, running=fresh.running + 1)
        if step.repeat is None:
            self._go_on(step, fresh)
        elif fresh.running == 0 and last is not None:
            self._repeat(step, *last, fresh)

    def _go_on(self, step: Step, fan_out: FanOutState) -> None:
        """A fan-out: done, lost, or as many more started as may run together."""
        assert step.for_each is not None
        join = step.for_each.join
        tolerated = fan_out.failed if step.continue_on_error else 0
        total = fan_out.count - fan_out.skipped
        live = total - fan_out.completed - fan_out.failed
        verdict = Tally(total, fan_out.completed + tolerated, fan_out.failed - tolerated, live).verdict(join)
        if fan_out.count == 0 or (total == 0 and join == "all"):
            verdict = "met"
        if verdict == "wait":
            limit = step.for_each.max_parallel or fan_out.count
            while fan_out.running < limit and fan_out.next < fan_out.count:
                key = f"{step.id}[{fan_out.next}]"
                child = self._state(key)
                fan_out = replace(fan_out, next=fan_out.next + 1)
                if child.status == StepStatus.PENDING:
                    self._start(key, step, child.inputs)
                    fan_out = replace(fan_out, running=fan_out.running + 1)
            self._act(Update(key=step.id, fan_out=fan_out), fan_out=fan_out, status=StepStatus.RUNNING)
            return
        if verdict == "lost" and fan_out.running and join == "all":
            # Nothing new is started; what runs may end, for its outputs may be wanted by a retry.
            for i in range(fan_out.next, fan_out.count):
                if self._state(f"{step.id}[{i}]").status == StepStatus.PENDING:
                    why = "not started: another one failed"
                    self._act(Skip(key=f"{step.id}[{i}]", why=why), status=StepStatus.SKIPPED, error=why)
            fan_out = replace(fan_out, next=fan_out.count)
            self._act(Update(key=step.id, fan_out=fan_out), fan_out=fan_out, status=StepStatus.RUNNING)
            return
        keys = [f"{step.id}[{i}]" for i in range(fan_out.count)]
        for key in keys:
            if self._state(key).status in LIVE:
                why = "enough of the others succeeded" if verdict == "met" else "too many of the others failed"
                self._act(Cancel(key=key, why=why), status=StepStatus.CANCELLED, error=why)
        self._act(Update(key=step.id, fan_out=replace(fan_out, running=0)), fan_out=replace(fan_out, running=0))
        if verdict == "met":
            outputs = [self._state(key).outputs for key in keys]
            self._finish(Complete(key=step.id, outputs=outputs))
        else:
            done = "" if join == "all" else f"{fan_out.completed} of {fan_out.count} succeeded, too few; "
            self._finish(Fail(key=step.id, error=f"{done}{fan_out.error or 'nothing was left to run'}"))

    def _repeat(self, step: Step, key: str, state: StepState, fan_out: FanOutState) -> None:
        assert step.repeat is not None
        if state.status != StepStatus.COMPLETED:
            self._act(Update(key=step.id, fan_out=fan_out), fan_out=fan_out)
            self._finish(Fail(key=step.id, error=fan_out.error or f"{key} {was(state.status)}"))
            return
        try:
            names = self._names(index=fan_out.count - 1, previous=state.outputs, own=(step.id, state))
            done = template.fill({"until": step.repeat.until}, names, self._evaluator)["until"]
            if not isinstance(done, bool):
                raise ExpressionError(f"until wants true or false, and came to {kind(done)}")
            if done:
                self._act(Update(key=step.id, fan_out=fan_out), fan_out=fan_out)
                self._finish(Complete(key=step.id, outputs=state.outputs))
            elif fan_out.count >= step.repeat.max_times:
                until = template.shorten(step.repeat.until)
                raise ExpressionError(f"not there after {fan_out.count} times: {until} is false")
            else:
                following = f"{step.id}[{fan_out.count}]"
                inputs = self._inputs(step, {**names, "index": fan_out.count})
                fan_out = replace(fan_out, count=fan_out.count + 1, next=fan_out.count + 1, running=1)
                self._act(Update(key=step.id, fan_out=fan_out), fan_out=fan_out, status=StepStatus.RUNNING)
                self._start(following, step, inputs)
        except ExpressionError as error:
            self._act(Update(key=step.id, fan_out=fan_out), fan_out=fan_out)
            self._finish(Fail(key=step.id, error=str(error)))


def _counted(fan_out: FanOutState, key: str, state: StepState, *, before: int = 1) -> FanOutState:
    fan_out = replace(fan_out, running=max(fan_out.running - before, 0))
    if state.status == StepStatus.COMPLETED:
        return replace(fan_out, completed=fan_out.completed + 1)
    error = fan_out.error or f"{key} {was(state.status)}: {state.error or 'no reason was given'}"
    return replace(fan_out, failed=fan_out.failed + 1, error=error)
