"""What comes next in a run. Pure: states in, decisions out; no clock, no I/O, the same decision every time.

`resume` when a run begins, or after a change from outside such as a retry from a step; `advance` when steps have ended.
`advance` looks only at the steps near the ended ones, so a step costs the same in a chain of 3 and of 500.

The rules (docs/workflows.md explains them to users):

- A step starts when its needs satisfy its join. It is skipped, with the reason, when a need of a join `all` was
  skipped, failed or was cancelled, or when `when` is false. When another join can no longer be satisfied, the step
  fails if one of its needs failed, else it is skipped.
- A failed step fails the run, unless it has continue_on_error, or all steps that need it have another join (any,
  first_success, N). Steps that don't depend on it continue, unless the workflow has fail_fast.
- A step with `from` starts in a fork of the VM that another step left: it is skipped unless that one has completed.
- on_error or on_success steps run when all others have ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from swarm.cel import template
from swarm.cel.evaluate import Evaluator
from swarm.cel.expression import ExpressionError
from swarm.model import RunStatus, StepStatus
from swarm.workflow.definition import Step
from swarm.workflow.fan_out import FanOut
from swarm.workflow.planner_base import LIVE, Tally, was
from swarm.workflow.state import (
    ENDED,
    MORE,
    OVER,
    WAITING,
    Ask,
    Cancel,
    Complete,
    Decision,
    End,
    Fail,
    RunContext,
    RunProgress,
    Skip,
    StepState,
)
from swarm.workflow.structure import PHASES, Graph


def advance(
    graph: Graph,
    context: RunContext,
    progress: RunProgress,
    steps: Mapping[str, StepState],
    changed: Iterable[str],
    evaluator: Evaluator,
) -> Decision:
    """What follows from the steps whose keys are in ``changed``: they have ended, or have got a Verdict.

    The planner reads from ``steps`` (by `get`) those, the steps that need them and what these need, and the steps that
    their expressions use; ``steps`` may load rows on demand. A missing key is a pending step. Pass each end exactly
    once.
    """
    planner = _Planner(graph, context, progress, steps, evaluator)
    for key in changed:
        planner.changed(key)
    return planner.decision()


def resume(graph: Graph, context: RunContext, steps: Mapping[str, StepState], evaluator: Evaluator) -> Decision:
    """Decide from the states alone: when a run begins, or after steps were reset. Looks at every step."""
    planner = _Planner(graph, context, RunProgress(), steps, evaluator)
    planner.resume()
    return planner.decision()


def expire(
    graph: Graph,
    context: RunContext,
    progress: RunProgress,
    steps: Mapping[str, StepState],
    evaluator: Evaluator,
    why: str,
) -> Decision | None:
    """The run's time is over: its live steps end, and its on_error steps follow. None if it has none, or if they were
    running already."""
    if progress.phase != "steps" or not graph.part("on_error"):
        return None
    planner = _Planner(graph, context, progress, steps, evaluator)
    planner.expire(why)
    return planner.decision()


class _Planner(FanOut):
    def decision(self) -> Decision:
        while self._end is None:
            if self._ended:
                self._process_end(self._ended.popleft())
            elif self._progress.open == 0 and self._progress.phase != "ended":
                self._next_phase()
            else:
                break
        more = () if self._end is not None else tuple(self._more)
        return Decision(actions=tuple(self._actions), progress=self._progress, end=self._end, more=more)

    def changed(self, key: str) -> None:
        """A step or child has ended, or has got a person's verdict; or (`OVER`) the time of a fan-out is over, or
        (`MORE`) it may go on."""
        if key.startswith(MORE):
            self._start_more(self._graph.steps[key.removeprefix(MORE)])
            return
        if key.startswith(OVER):
            self._choose_now(self._graph.steps[key.removeprefix(OVER)])
            return
        state = self._state(key)
        parent = _parent(key)
        if parent is not None:
            if state.status in ENDED and self._state(parent).status not in ENDED:
                self._child_ended(self._graph.steps[parent], key, state)
        elif state.status in ENDED:
            self._ended.append(key)
        elif state.status == WAITING and state.verdict is not None:
            self._apply_verdict(self._graph.steps[key], state)

    def expire(self, why: str) -> None:
        live = [step for step in self._graph.part("steps") if self._state(step.id).status not in ENDED]
        if not live:  # the last one has just ended
            self.resume()
            return
        started = [step for step in live if self._state(step.id).status != StepStatus.PENDING]
        named = self._progress.failed_step or (*started, *live)[0].id
        # Some ended steps may not be processed yet, so `open` is counted anew.
        self._progress = replace(self._progress, failed_step=named, error=why, open=len(live))
        self._stop(live, why)

    def _stop(self, steps: Iterable[Step], why: str) -> None:
        for step in steps:
            status = self._state(step.id).status
            if status == StepStatus.PENDING:
                self._finish(Skip(key=step.id, why=f"not started: {why}"))
            elif status not in ENDED:
                self._finish(Cancel(key=step.id, why=f"stopped: {why}"))

    def resume(self) -> None:
        for phase in PHASES:
            steps = self._graph.part(phase)
            if phase != "steps" and phase != self._progress.phase:
                continue
            live = [step for step in steps if self._state(step.id).status not in ENDED]
            self._progress = replace(self._progress, open=len(live))
            for step in steps:
                if self._state(step.id).status == StepStatus.FAILED:
                    self._note_failure(step)
            for step in live:
                self._resume_step(step)
            while self._ended:
                self._process_end(self._ended.popleft())
            if self._progress.open or self._end:
                return
            self._next_phase(started=False)

    def _resume_step(self, step: Step) -> None:
        state = self._state(step.id)
        if state.status == StepStatus.PENDING:
            self._consider(step)
        elif state.status == WAITING:
            self._apply_verdict(step, state)
        elif state.status == StepStatus.RUNNING and state.fan_out is not None:
            self._recount(step, state.fan_out)

    # --- after an end ---

    def _process_end(self, step_id: str) -> None:
        step = self._graph.steps[step_id]
        if self._graph.phase[step_id] == self._progress.phase:
            self._progress = replace(self._progress, open=self._progress.open - 1)
        if self._state(step_id).status == StepStatus.FAILED:
            self._note_failure(step)
        for one in self._graph.dependants[step_id]:
            if self._state(one).status == StepStatus.PENDING:
                self._consider(self._graph.steps[one])

    def _note_failure(self, step: Step) -> None:
        if step.continue_on_error or self._graph.can_do_without(step.id) or self._progress.failed_step is not None:
            return
        self._progress = replace(
            self._progress, failed_step=step.id, error=self._state(step.id).error or f"the step {step.id!r} failed"
        )
        if self._graph.workflow.fail_fast and self._progress.phase == "steps":
            self._stop(self._graph.part("steps"), f"the step {step.id!r} failed")

    def _next_phase(self, *, started: bool = True) -> None:
        """All steps of a phase have ended: start the handlers, or end the run."""
        failed = self._progress.failed_step is not None
        if self._progress.phase == "steps":
            handlers, others = ("on_error", "on_success") if failed else ("on_success", "on_error")
            for step in self._graph.part(others):
                if self._state(step.id).status not in ENDED:
                    why = "the run failed" if failed else "the run succeeded"
                    self._act(Skip(key=step.id, why=why), status=StepStatus.SKIPPED, error=why)
            if self._graph.part(handlers):
                self._progress = replace(self._progress, phase=handlers, open=len(self._graph.part(handlers)))
                if started:
                    for step in self._graph.part(handlers):
                        if not step.needs:
                            self._consider(step)
                return
        self._end = self._ending()
        self._progress = replace(self._progress, phase="ended", error=self._end.error)

    def _ending(self) -> End:
        progress = self._progress
        if progress.failed_step is not None:
            return End(status=RunStatus.FAILED, error=progress.error, error_step=progress.failed_step)
        wanted = self._graph.workflow.outputs
        if wanted is None:
            outputs = {one: self._state(one).outputs for one in self._graph.leaves}
            if len(outputs) == 1:
                [outputs] = outputs.values()
            return End(status=RunStatus.COMPLETED, outputs=outputs)
        try:
            outputs = self._fill("outputs", dict(wanted), self._names())
        except ExpressionError as error:
            return End(status=RunStatus.FAILED, error=f"can't build the workflow's outputs: {error}")
        return End(status=RunStatus.COMPLETED, outputs=outputs)

    # --- before a start ---

    def _consider(self, step: Step) -> None:
        """Start, skip or fail a pending step, or let it wait."""
        needs = {need: self._state(need) for need in step.needs}
        if step.join == "all":
            for need, state in needs.items():
                if state.status in ENDED and not self._succeeded(need, state):
                    self._finish(Skip(key=step.id, why=f"it needs {need!r}, which {was(state.status)}"))
                    return
        succeeded = sum(self._succeeded(need, state) for need, state in needs.items())
        live = sum(state.status in LIVE for state in needs.values())
        failed = [need for need, state in needs.items() if state.status in (StepStatus.FAILED, StepStatus.CANCELLED)]
        tally = Tally(len(needs), succeeded, len(failed), live)
        match tally.verdict(step.join):
            case "met":
                if step.join == "first_success":
                    self._end_race(step, needs)
                self._start_ready(step)
            case "lost" if any(needs[need].status == StepStatus.FAILED for need in failed):
                wanted = step.join if isinstance(step.join, int) else 1
                reasons = "; ".join(f"{need} {was(needs[need].status)}: {needs[need].error}" for need in failed)
                error = f"{wanted} of {len(needs)} needs had to succeed, {succeeded} did: {reasons}"
                self._finish(Fail(key=step.id, error=error))
            case "lost":
                self._finish(Skip(key=step.id, why="too few of its needs ran: " + ", ".join(needs)))

    def _succeeded(self, need: str, state: StepState) -> bool:
        return state.status == StepStatus.COMPLETED or (
            state.status == StepStatus.FAILED and self._graph.steps[need].continue_on_error
        )

    def _end_race(self, step: Step, needs: Mapping[str, StepState]) -> None:
        winner = next(need for need, state in needs.items() if self._succeeded(need, state))
        for need, state in needs.items():
            if state.status in LIVE:
                self._finish(Cancel(key=need, why=f"{winner!r} was first, and {step.id!r} needs only one"))

    def _start_ready(self, step: Step) -> None:
        """The step's needs are met: check `when`, then ask for the approval, then start the work."""
        try:
            if step.id not in self._graph.when_per_item and not self._when(step, self._names()):
                self._finish(Skip(key=step.id, why=f"its `when` is false: {template.shorten(str(step.when))}"))
                return
            if step.from_step is not None and self._source(step.from_step) is None:
                status = self._state(step.from_step).status
                how = "of which no item succeeded" if status == StepStatus.COMPLETED else f"which {was(status)}"
                self._finish(Skip(key=step.id, why=f"it starts from the VM of {step.from_step!r}, {how}"))
                return
            if step.approval is not None:
                message = template.as_text(template.fill(step.approval.message, self._names(), self._evaluator))
                ask = Ask(key=step.id, message=message, timeout_seconds=step.approval.timeout_seconds)
                self._act(ask, status=WAITING)
                return
            self._start_work(step)
        except ExpressionError as error:
            self._finish(Fail(key=step.id, error=str(error)))

    def _apply_verdict(self, step: Step, state: StepState) -> None:
        verdict = state.verdict
        if verdict is None:
            return
        if not verdict.approved:
            why = f": {verdict.why}" if verdict.why else ""
            self._finish(Fail(key=step.id, error=f"rejected by {verdict.by}{why}"))
        elif step.agent is None and step.workflow is None:
            outputs = {"approved": True, "by": verdict.by, "why": verdict.why}
            self._finish(Complete(key=step.id, outputs=outputs))
        else:
            try:
                self._start_work(step)
            except ExpressionError as error:
                self._finish(Fail(key=step.id, error=str(error)))


def _parent(key: str) -> str | None:
    return key[: key.rindex("[")] if key.endswith("]") else None
