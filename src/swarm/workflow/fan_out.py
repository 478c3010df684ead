"""Steps with several executions, their children: for_each (at once) and repeat (one after another)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from swarm.cel import artifact_refs, template
from swarm.cel.expression import ExpressionError
from swarm.model import StepStatus
from swarm.workflow.definition import ForEach, Step, Workflow
from swarm.workflow.planner_base import LIVE, PlannerBase, Tally, kind, was
from swarm.workflow.state import (
    ENDED,
    MORE,
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
MAX_STARTS: Final = 100  # of items by one decision, which is one transaction
_FAN_OUT_BUDGET: Final = (64 << 20, 100_000)  # bytes of inputs, and expressions, for all its items together


class FanOut(PlannerBase):
    def _start_work(self, step: Step) -> None:
        if step.for_each is not None:
            self._expand(step)
        elif step.repeat is not None:
            inputs = self._inputs(step, self._names(index=0, previous=None))
            child = Child(key=f"{step.id}[0]", inputs=inputs)
            fan_out = FanOutState(count=1, next=1, running=1)
            self._act(
                Expand(key=step.id, children=(child,), fan_out=FanOutState(count=1)),
                status=StepStatus.RUNNING,
                fan_out=fan_out,
            )
            self._start(child.key, step, inputs)
            self._actions.append(Update(key=step.id, fan_out=fan_out))
        else:
            self._start(step.id, step, self._inputs(step, self._names()))

    def _start(self, key: str, step: Step, inputs: Any) -> None:
        if step.agent is not None:
            source = self._source(step.from_step) if step.from_step is not None else None
            is_source = step.id in self._graph.sources
            self._act(
                Start(key=key, step=step, agent=step.agent, inputs=inputs, source=source, is_source=is_source),
                status=StepStatus.READY,
            )
        elif isinstance(step.workflow, Workflow):
            self._act(
                StartWorkflow(key=key, step=step, workflow=step.workflow, inputs=inputs), status=StepStatus.RUNNING
            )
        else:
            raise ExpressionError(f"the workflow {step.workflow!r} isn't frozen into this run")

    def _expand(self, step: Step) -> None:
        assert step.for_each is not None
        names = self._names()
        items = artifact_refs.dereference(self._fill("for_each", step.for_each.items, names))
        if not isinstance(items, list):
            raise ExpressionError(f"for_each must be a list, but is {kind(items)}")
        if len(items) > MAX_ITEMS:
            raise ExpressionError(f"for_each has {len(items)} items; {MAX_ITEMS} are allowed")
        budget = template.Budget(*_FAN_OUT_BUDGET)
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
            self._changed[child.key] = StepState(status=status, inputs=child.inputs, error=child.skip)
        self._advance(step, fan_out)

    def _child_ended(self, step: Step, key: str, state: StepState) -> None:
        fan_out = self._state(step.id).fan_out
        if fan_out is None:
            return  # a row that another tool wrote
        fan_out = _count_end(replace(fan_out, running=max(fan_out.running - 1, 0)), key, state)
        if step.repeat is not None:
            self._repeat(step, key, state, fan_out)
        else:
            self._advance(step, fan_out)

    def _recount(self, step: Step, fan_out: FanOutState) -> None:
        """Count the children anew from their states, and go on from there."""
        fresh = FanOutState(count=fan_out.count, next=fan_out.count)
        last = None
        for i in range(fan_out.count):
            key = f"{step.id}[{i}]"
            state = self._state(key)
            if state.status == StepStatus.PENDING:
                fresh = replace(fresh, next=min(fresh.next, i))  # later ones may have ended: a retry keeps them
            elif state.status not in ENDED:
                fresh = replace(fresh, running=fresh.running + 1)
            else:
                skipped = state.status == StepStatus.SKIPPED
                fresh = replace(fresh, skipped=fresh.skipped + 1) if skipped else _count_end(fresh, key, state)
                last = (key, state)
        if step.repeat is None:
            self._advance(step, fresh)
        elif fresh.running == 0 and last is not None:
            self._repeat(step, *last, fresh)

    def _advance(self, step: Step, fan_out: FanOutState) -> None:
        """End the fan-out, or start as many more items as may run together."""
        assert step.for_each is not None
        join, best = step.for_each.join, step.for_each.best
        tolerated = fan_out.failed if step.continue_on_error and best is None else 0
        total = fan_out.count - fan_out.skipped
        live = total - fan_out.completed - fan_out.failed
        verdict = Tally(total, fan_out.completed + tolerated, fan_out.failed - tolerated, live).verdict(join)
        if best is not None:
            verdict = "wait" if live else "met" if fan_out.completed else "lost"
        elif fan_out.count == 0 or (total == 0 and join == "all"):
            verdict = "met"
        if verdict == "wait":
            limit = step.for_each.max_parallel or fan_out.count
            while fan_out.running < limit and fan_out.next < fan_out.count:
                if self._items_started >= MAX_STARTS:
                    self._more[f"{MORE}{step.id}"] = None
                    break
                key = f"{step.id}[{fan_out.next}]"
                child = self._state(key)
                fan_out = replace(fan_out, next=fan_out.next + 1)
                if child.status == StepStatus.PENDING:
                    self._start(key, step, child.inputs)
                    self._items_started += 1
                    fan_out = replace(fan_out, running=fan_out.running + 1)
            self._update(step, fan_out)
            return
        if verdict == "lost" and fan_out.running and join == "all":
            # Start no others, but let the running ones end: a retry can use their outputs.
            for i in range(fan_out.next, fan_out.count):
                if self._state(f"{step.id}[{i}]").status == StepStatus.PENDING:
                    why = "not started: another item failed"
                    self._act(Skip(key=f"{step.id}[{i}]", why=why), status=StepStatus.SKIPPED, error=why)
            self._update(step, replace(fan_out, next=fan_out.count))
            return
        why = "enough other items succeeded" if verdict == "met" else "too many other items failed"
        self._conclude(step, step.for_each, fan_out, why, met=verdict == "met")

    def _start_more(self, step: Step) -> None:
        state = self._state(step.id)
        if state.status == StepStatus.RUNNING and state.fan_out is not None and step.for_each is not None:
            self._advance(step, state.fan_out)

    def _choose_now(self, step: Step) -> None:
        """The time of all items together is over: those that have succeeded count."""
        state = self._state(step.id)
        if state.status != StepStatus.RUNNING or state.fan_out is None or step.for_each is None:
            return
        fan_out, completed, why = state.fan_out, 0, f"the time of {step.id!r} is over"
        for i in range(fan_out.count):
            completed += self._state(f"{step.id}[{i}]").status == StepStatus.COMPLETED
        fan_out = replace(fan_out, completed=completed, error=fan_out.error or why)
        self._conclude(step, step.for_each, fan_out, why, met=completed > 0)

    def _conclude(self, step: Step, for_each: ForEach, fan_out: FanOutState, why: str, *, met: bool) -> None:
        """End the items that have not ended, for this reason, and with them the step."""
        join, best = for_each.join, for_each.best
        keys = [f"{step.id}[{i}]" for i in range(fan_out.count)]
        for key in keys:
            if self._state(key).status in LIVE:
                self._act(Cancel(key=key, why=why), status=StepStatus.CANCELLED, error=why)
        fan_out = replace(fan_out, running=0)
        if met:
            try:
                fan_out = replace(fan_out, winner=self._winner(for_each, keys))
            except ExpressionError as error:
                self._update(step, fan_out)
                self._finish(Fail(key=step.id, error=str(error)))
                return
            self._update(step, fan_out)
            if best is not None:
                outputs = self._state(f"{step.id}[{fan_out.winner}]").outputs
            else:
                outputs = [self._state(key).outputs for key in keys]
            self._finish(Complete(key=step.id, outputs=outputs))
        else:
            self._update(step, fan_out)
            done = "" if join == "all" and best is None else f"only {fan_out.completed} of {fan_out.count} succeeded; "
            self._finish(Fail(key=step.id, error=f"{done}{fan_out.error or 'no items are left to run'}"))

    def _winner(self, for_each: ForEach, keys: Sequence[str]) -> int | None:
        """The number of the child that stands for all of them. Raises ExpressionError."""
        if not for_each.has_winner:
            return None
        done = [i for i, key in enumerate(keys) if self._state(key).status == StepStatus.COMPLETED]
        if for_each.best is None:
            return done[0] if done else None
        values = {i: self._number("best", for_each.best, self._result(i, keys[i])) for i in done}
        return max(done, key=lambda i: (values[i], -i))

    def _result(self, index: int, key: str) -> dict[str, Any]:
        return self._names(index=index, outputs=self._state(key).outputs)

    def _update(self, step: Step, fan_out: FanOutState) -> None:
        self._act(Update(key=step.id, fan_out=fan_out), fan_out=fan_out, status=StepStatus.RUNNING)

    def _repeat(self, step: Step, key: str, state: StepState, fan_out: FanOutState) -> None:
        assert step.repeat is not None
        if state.status != StepStatus.COMPLETED:
            self._update(step, fan_out)
            self._finish(Fail(key=step.id, error=fan_out.error or f"{key} {was(state.status)}"))
            return
        try:
            names = self._names(index=fan_out.count - 1, previous=state.outputs, own=(step.id, state))
            if self._boolean("until", step.repeat.until, names):
                self._update(step, fan_out)
                self._finish(Complete(key=step.id, outputs=state.outputs))
            elif fan_out.count >= step.repeat.max_times:
                until = template.shorten(step.repeat.until)
                raise ExpressionError(f"{until} is still false after {fan_out.count} times")
            else:
                following = f"{step.id}[{fan_out.count}]"
                inputs = self._inputs(step, {**names, "index": fan_out.count})
                fan_out = replace(fan_out, count=fan_out.count + 1, next=fan_out.count + 1, running=1)
                self._update(step, fan_out)
                self._start(following, step, inputs)
        except ExpressionError as error:
            self._update(step, fan_out)
            self._finish(Fail(key=step.id, error=str(error)))


def _count_end(fan_out: FanOutState, key: str, state: StepState) -> FanOutState:
    if state.status == StepStatus.COMPLETED:
        return replace(fan_out, completed=fan_out.completed + 1)
    error = fan_out.error or f"{key} {was(state.status)}: {state.error or 'no reason given'}"
    return replace(fan_out, failed=fan_out.failed + 1, error=error)
