"""Writes the rows of a large fan-out's items ahead of the decision that makes them, few in each transaction: all other
writers would wait until all of them are written.

Until the decision itself is written, the step's own row has no `fan_out`, and none of its items starts. A decision that
never comes leaves rows: the next one on that step replaces or deletes them (`drop`), the end of the ticket cancels
them, and `retry --from` leaves them behind.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from swarm.model import StepStatus
from swarm.store.runs import artifacts
from swarm.store.runs.decision import Decided, Run
from swarm.store.runs.packing import Packed
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import ids_in_order, message
from swarm.store.sql.transaction import Tx, one_row
from swarm.store.tickets.changes import Changes
from swarm.workflow.state import Child, Expand

BATCH_ROWS: Final = 100
BATCH_BYTES: Final = 256 << 10

_INSERT: Final = one_row(
    "INSERT INTO step_executions (id, run_id, step_id, status, error, inputs, completed_at, priority, "
    "ticket_created_at) VALUES (:id, :run_id, :step_id, :status, :error, :inputs, :completed_at, :priority, "
    ":ticket_created_at)"
)
_DROP: Final = Sql(
    "DELETE FROM step_executions WHERE run_id = :run_id AND step_id > :step_id || '[' AND step_id < :step_id || '\\'"
)
# Decisions that were made before, of which one may be writing rows too, are of the past.
_REVISE: Final = one_row("UPDATE workflow_runs SET revision = :revision WHERE id = :id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Some items of a decision on the run's ``revision``. ``begins``: the fan-outs, with the first batch, which makes
    the next revision: that of the others, and of the decision without its items."""

    run_id: str
    revision: int
    timed: bool  # as in `Graph`
    children: tuple[Child, ...]
    ids: tuple[str, ...]  # of their rows, which sort in this order, behind those of the decision itself
    begins: tuple[str, ...] = ()


def split(tx: Tx, decided: Decided) -> tuple[Decided, Sequence[Batch]]:
    """The decision without what is to be written ahead of it, and that."""
    actions = decided.decision.actions if decided.decision is not None else ()
    expands = [one for one in actions if isinstance(one, Expand)]
    batches = list(_batches(child for one in expands for child in one.children))
    if len(batches) < 2 or decided.decision is None or decided.definition is None:
        return decided, ()
    revision, timed = decided.revision, decided.definition.graph.timed
    ids = ids_in_order(tx.now_ms + 1)
    found = [
        Batch(
            run_id=decided.run_id,
            revision=revision + 1,
            timed=timed,
            children=one,
            ids=tuple(itertools.islice(ids, len(one))),
        )
        for one in batches
    ]
    found[0] = replace(found[0], revision=revision, begins=tuple(one.key for one in expands))
    without = tuple(replace(one, children=()) if isinstance(one, Expand) else one for one in actions)
    decision = replace(decided.decision, actions=without)
    return replace(decided, revision=revision + 1, decision=decision, ahead_ms=tx.now_ms), found


def _batches(children: Iterable[Child]) -> Iterator[tuple[Child, ...]]:
    found, size = list[Child](), 0
    for child in children:
        found.append(child)
        packed: Packed = child.inputs
        size += len(packed.text) + sum(map(len, packed.parts.values()))
        if len(found) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield tuple(found)
            found, size = [], 0
    if found:
        yield tuple(found)


def write(changes: Changes, run: Run, batch: Batch) -> None:
    if batch.begins:
        changes.add(_REVISE, id=run.id, revision=batch.revision + 1)
        for key in batch.begins:
            drop(changes, run, key)
    for id_, child in zip(batch.ids, batch.children, strict=True):
        artifacts.keep(changes.tx, run.row.ticket_id, child.inputs.parts)
        changes.add(
            _INSERT,
            id=id_,
            run_id=run.id,
            step_id=run.step_id(child.key),
            status=str(StepStatus.SKIPPED if child.skip else StepStatus.PENDING),
            error=message(child.skip),
            inputs=child.inputs.text,
            completed_at=changes.tx.now if child.skip else None,
            priority=run.row.priority or 0,
            ticket_created_at=run.row.ticket_created_at,
        )


def drop(changes: Changes, run: Run, key: str) -> None:
    """Delete items of a step that has not begun: those of a decision that never came."""
    changes.add(_DROP, run_id=run.id, step_id=run.step_id(key))
