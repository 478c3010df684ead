"""What fan-outs have beside their items: a time by which they choose, and the VMs that their items left.

The row of one that chooses by a time is running and has an `available_at`; its run is due then.
"""

from __future__ import annotations

from typing import Final

from swarm.store.runs.decision import Run
from swarm.store.sql.dialect import Sql
from swarm.store.sql.transaction import Tx
from swarm.store.tickets.changes import Changes
from swarm.workflow.definition import Step
from swarm.workflow.state import OVER, FanOutState
from swarm.workflow.structure import Graph

_TIMED: Final = "s.run_id = :run_id AND s.status = 'running' AND s.available_at"
_NEXT: Final = Sql(f"SELECT min(s.available_at) AS at FROM step_executions s WHERE {_TIMED} IS NOT NULL")
_DUE: Final = Sql(
    f"SELECT s.id, s.step_id, r.path FROM step_executions s JOIN workflow_runs r ON r.id = s.run_id "
    f"WHERE {_TIMED} <= :now_ms"
)
_TAKEN_UP: Final = Sql("UPDATE step_executions SET available_at = NULL WHERE id = :id")
_LET_GO: Final = Sql(
    "UPDATE snapshots SET expires_at = :now_ms WHERE kind = 'step' AND expires_at IS NULL AND id IN "
    "(SELECT snapshot_id FROM step_executions WHERE run_id = :run_id AND substr(step_id, 1, length(:prefix)) = :prefix "
    "AND step_id <> :kept)"
)


def chooses_at(tx: Tx, step: Step) -> int | None:
    """ms: when one that begins now has to choose."""
    seconds = step.for_each.timeout_seconds if step.for_each is not None else None
    return tx.now_ms + round(seconds * 1000) if seconds else None


def next_at(changes: Changes, run_id: str) -> int | None:
    """ms: when the next one of a run has to, or had to."""
    changes.flush()
    (row,) = changes.tx.all(_NEXT, run_id=run_id)
    return row.at if isinstance(row.at, int) else None


def due_at(changes: Changes, graph: Graph, run_id: str, deadline_at: int | None) -> int | None:
    """ms: when a run without noted decisions is due."""
    if not graph.timed:
        return deadline_at
    return min((at for at in (deadline_at, next_at(changes, run_id)) if at is not None), default=None)


def take_up(changes: Changes, run_id: str) -> list[str]:
    """Those of a run whose time is over, as the planner is told of them, once."""
    rows = changes.tx.all(_DUE, run_id=run_id, now_ms=changes.tx.now_ms)
    for row in rows:
        changes.add(_TAKEN_UP, id=row.id)
    return [f"{OVER}{row.step_id.removeprefix(row.path)}" for row in rows]


def let_go(changes: Changes, run: Run, graph: Graph, key: str, fan_out: FanOutState) -> None:
    """Steps start in forks of the VM of one execution: those of the others need not wait for the end of the run."""
    kept = fan_out.count - 1 if graph.steps[key].repeat is not None else fan_out.winner
    if kept is not None and key in graph.sources:
        prefix = run.step_id(f"{key}[")
        these = {"run_id": run.id, "prefix": prefix, "kept": f"{prefix}{kept}]"}
        changes.add(_LET_GO, now_ms=changes.tx.now_ms, **these)
