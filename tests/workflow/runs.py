"""Carries out a run in memory, as the store does in its tables: for tests of the planner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from swarm.cel.evaluate import Evaluator
from swarm.model import StepStatus
from swarm.workflow import plan
from swarm.workflow.definition import Step, Workflow
from swarm.workflow.state import (
    ENDED,
    WAITING,
    Ask,
    Cancel,
    Complete,
    Decision,
    End,
    Expand,
    Fail,
    RunContext,
    RunProgress,
    Skip,
    Start,
    StartWorkflow,
    StepState,
    Update,
    Verdict,
)
from swarm.workflow.structure import Graph
from tests.cel.local import Local


class Asked(Mapping[str, StepState]):
    """The states; counts how many are read."""

    def __init__(self, rows: dict[str, StepState]) -> None:
        self.rows = rows
        self.count = 0

    def __getitem__(self, key: str) -> StepState:
        self.count += 1
        return self.rows[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class Run:
    graph: Graph
    known: RunContext = field(default_factory=RunContext)
    evaluator: Evaluator = field(default_factory=Local)
    rows: dict[str, StepState] = field(default_factory=dict)
    progress: RunProgress = field(default_factory=RunProgress)
    end: End | None = None
    history: list[tuple[str, str]] = field(default_factory=list)  # (what, key), in order
    sources: dict[str, str] = field(default_factory=dict)  # of executions that began in a fork of another's VM
    most_starts: int = 0  # by one decision
    held: list[str] | None = None  # `Decision.more`, of which the planner isn't told at once
    asked: Asked = field(init=False)

    def __post_init__(self) -> None:
        self.asked = Asked(self.rows)
        self.rows.update({key: StepState() for key in self.graph.steps if key not in self.rows})
        self._do(plan.resume(self.graph, self.known, self.asked, self.evaluator))

    def finish(self, key: str, outputs: Any = None, *, error: str | None = None) -> None:
        """The agent, or the run, behind a step has ended."""
        assert self.rows[key].status in (StepStatus.READY, StepStatus.RUNNING), (key, self.rows[key])
        status = StepStatus.FAILED if error else StepStatus.COMPLETED
        self.rows[key] = replace(self.rows[key], status=status, outputs=outputs, error=error)
        self.history.append(("end", key))
        self.tell(key)

    def answer(self, key: str, *, approved: bool, by: str = "ann", why: str = "") -> None:
        assert self.rows[key].status == WAITING
        self.rows[key] = replace(self.rows[key], verdict=Verdict(approved=approved, by=by, why=why))
        self.tell(key)

    def tell(self, *keys: str) -> None:
        decision = plan.advance(self.graph, self.known, self.progress, self.asked, keys, self.evaluator)
        self._do(decision)

    @property
    def over(self) -> bool:
        return self.end is not None

    def live(self) -> list[str]:
        """Executions at work, without the parents of others."""
        working = (StepStatus.READY, StepStatus.RUNNING)
        return [key for key, row in self.rows.items() if row.status in working and row.fan_out is None]

    def waiting(self) -> list[str]:
        return [key for key, row in self.rows.items() if row.status == WAITING]

    def status(self, key: str) -> str:
        return str(self.rows[key].status)

    def _do(self, decision: Decision) -> None:
        self.most_starts = max(self.most_starts, sum(isinstance(one, Start) for one in decision.actions))
        for action in decision.actions:
            row = self.rows.get(action.key, StepState())
            assert row.status not in ENDED, f"{action} on what has ended: {row}"
            match action:
                case Start() | StartWorkflow():
                    row = replace(row, status=StepStatus.READY, inputs=action.inputs)
                    self.history.append(("start", action.key))
                    if isinstance(action, Start) and action.source is not None:
                        self.sources[action.key] = action.source
                case Ask():
                    row = replace(row, status=WAITING)
                case Expand():
                    row = replace(row, status=StepStatus.RUNNING, fan_out=action.fan_out)
                    for child in action.children:
                        assert child.key not in self.rows
                        status = StepStatus.SKIPPED if child.skip else StepStatus.PENDING
                        self.rows[child.key] = StepState(status=status, inputs=child.inputs, error=child.skip)
                case Update():
                    row = replace(row, fan_out=action.fan_out)
                case Complete():
                    row = replace(row, status=StepStatus.COMPLETED, outputs=action.outputs)
                case Fail():
                    row = replace(row, status=StepStatus.FAILED, error=action.error)
                case Skip():
                    row = replace(row, status=StepStatus.SKIPPED, error=action.why)
                case Cancel():
                    row = replace(row, status=StepStatus.CANCELLED, error=action.why)
                    for key, inner in self.rows.items():
                        if key.startswith(f"{action.key}[") and inner.status not in ENDED:
                            self.rows[key] = replace(inner, status=StepStatus.CANCELLED, error=action.why)
            self.rows[action.key] = row
        self.progress = decision.progress
        if decision.end is not None:
            assert self.end is None, "a run ends once"
            self.end = decision.end
        if self.held is not None:
            self.held += decision.more
        elif decision.more:
            self.tell(*decision.more)


def flow(*steps: Step, **more: Any) -> Workflow:
    return Workflow(name="test", version="1.0.0", steps=steps, **more)


def run(*steps: Step, inputs: Any = None, evaluator: Evaluator | None = None, **more: Any) -> Run:
    return Run(Graph(flow(*steps, **more)), RunContext(inputs=inputs or {}), evaluator or Local())


def step(id: str, *needs: str, **more: Any) -> Step:
    more.setdefault("agent", None if "workflow" in more else "echo@1.0.0")
    return Step(id=id, needs=needs, **more)
