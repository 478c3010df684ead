"""Runs a whole workflow with the agents' real programs, as plain processes: what the engine does with VMs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from swarm import agents
from swarm.agents import check
from swarm.base import versions
from swarm.cel.evaluate import Evaluator
from swarm.errors import NotFound, StepError
from swarm.model import Agent, RunStatus, StepStatus
from swarm.workflow.definition import Workflow
from swarm.workflow.pinning import Registry
from swarm.workflow.state import End
from swarm.workflow.structure import Graph, run_context
from tests.workflow.runs import Run

BUILTIN = [agents.read(directory) for directory in agents.builtin()]


def agent(reference: str, also: Sequence[Agent] = ()) -> Agent:
    found = versions.pick(reference, [*BUILTIN, *also])
    if found is None:
        raise NotFound(f"no agent {reference!r}; `swarm agent list` shows those there are")
    return found


def no_workflow(reference: str) -> Workflow:
    raise NotFound(f"no workflow {reference!r}")


def registry(*also: Agent) -> Registry:
    """The agents that ship, and these."""
    return Registry(agent=partial(agent, also=also), workflow=no_workflow)


REGISTRY = registry()


def run_agent(found: Agent, inputs: Any, work: Path, source: Path | None = None) -> Any:
    """Outputs of one run of an agent's program in ``work``; of a copy of ``source``, as a fork would have. Raises
    StepError."""
    inputs = check.inputs(found, inputs)
    if source is not None:
        shutil.copytree(source, work)
        (work / "output.json").unlink()
    shutil.copytree(found.path, work, copy_function=shutil.copyfile, dirs_exist_ok=True)
    ticket = {"id": "t-1", "title": "a test", "description": "of a workflow", "project_id": None}
    given = {"inputs": inputs, "ticket": ticket, "step": {"id": "main", "attempt": 1}}
    (work / "input.json").write_text(json.dumps(given))
    entry = [word.replace("/agent/", f"{work}/") for word in found.entry]
    argv = [sys.executable, "-I", *entry] if found.runtime == "python" else entry
    env = {"PATH": os.environ["PATH"]}
    with subprocess.Popen(
        argv, cwd=work, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    ) as child:  # fmt: skip
        try:
            _, said = child.communicate(timeout=300)
        finally:  # as agentd does: what it left in the background goes with it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    if child.returncode != 0:
        raise StepError(f"the agent ended with status {child.returncode}: {said.decode()[-500:]}")
    made = json.loads((work / "output.json").read_text())
    check.outputs(found, made)
    return made


def execute(workflow: Workflow, inputs: Any, work: Path, evaluator: Evaluator, also: Sequence[Agent] = ()) -> End:
    """Run it, and its nested workflows, to the end. Approvals are given. ``also``: agents besides those that ship."""
    known = run_context(workflow, inputs=inputs, trigger={"type": "test"}, ticket={"id": "t-1"}, evaluator=evaluator)
    ours = Run(Graph(workflow), known, evaluator)
    number = 0
    places: dict[str, Path] = {}  # of the executions' work directories
    queue = deque(ours.live())
    while queue or ours.waiting():
        for waiting in ours.waiting():
            before = set(ours.live())
            ours.answer(waiting, approved=True)
            queue.extend(sorted(set(ours.live()) - before))
        if not queue:
            continue
        key = queue.popleft()
        if ours.rows[key].status != StepStatus.READY:
            continue  # cancelled meanwhile
        number += 1
        step = ours.graph.steps[key.partition("[")[0]]
        given = ours.rows[key].inputs
        before = set(ours.live())
        try:
            if step.agent is not None:
                places[key] = work / f"{number}-{step.id}"
                source = places[ours.sources[key]] if key in ours.sources else None
                made = run_agent(agent(step.agent, also), given, places[key], source)
            else:
                assert isinstance(step.workflow, Workflow)
                end = execute(step.workflow, given, work / f"{number}-{step.id}-run", evaluator, also)
                if end.status is not RunStatus.COMPLETED:
                    raise StepError(str(end.error))
                made = end.outputs
            ours.finish(key, made)
        except StepError as error:
            ours.finish(key, error=str(error))
        queue.extend(sorted(set(ours.live()) - before))
    assert ours.end is not None, ours.rows
    return ours.end
