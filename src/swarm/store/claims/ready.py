"""Ready tickets and steps, as a claim reads them: by priority and age, and not more text than one transaction should
write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from swarm.store.claims import kept, suspects
from swarm.store.claims.maintenance import has_clean_id
from swarm.store.claims.pace import LARGE, Pace
from swarm.store.sql.bounded import texts, too_long
from swarm.store.sql.conditions import IS_HERE, RUN_DUE, STEP_WAITING, UNKNOWN_STATE
from swarm.store.sql.database import REVISION
from swarm.store.sql.dialect import Dialect, Sql
from swarm.store.sql.reads import Read, filled
from swarm.store.sql.rows import LONG, TICKET_FIELDS
from swarm.store.sql.transaction import Row, Tx
from swarm.store.tickets import places, validation
from swarm.store.tickets.validation import LIMITS, MAX_BYTES, REFUSED, BadRow, Work

# Rows with more text than this are enough for one transaction: it writes each as a whole, and all others wait.
MOST_CHARS: Final = 2 << 20
# length() of a text would count its characters, up to the first NUL.
_BYTES: Final = "COALESCE(/*-*/length(CAST(t.{0} AS BLOB))/*-*//*+ octet_length(t.{0}) */, 0)"
_OTHERS: Final = " + ".join(_BYTES.format(name) for name in LONG if name != "inputs")
# live_run: set when another tool made the ticket ready again while it ran.
_READY: Final = f"""SELECT {{}}, {_BYTES.format("inputs")} AS inputs_bytes, {_OTHERS} AS other_bytes,
    {too_long("t", REFUSED)} AS too_long,
    (SELECT max(r.id) FROM workflow_runs r
    WHERE r.ticket_id = t.id AND r.status IN ('running', 'waiting') AND r.root_run_id IS NULL) AS live_run,
    t.waits_for FROM tickets t WHERE t.state = 'ready' """
_CUT: Final = ", ".join(
    f"CASE WHEN {_BYTES.format(name)} < {LARGE} THEN t.{name} END AS {name}"
    if name in LONG
    else texts("t", [name], LIMITS)
    for name in TICKET_FIELDS
)
_READY_CUT: Final = _READY.format(_CUT)
_UNLOCKED: Final = " /*+ FOR NO KEY UPDATE OF {} SKIP LOCKED */"  # what another engine is claiming is its own
READY_TICKET: Final = Sql(_READY.format(texts("t", TICKET_FIELDS, LIMITS)) + "AND t.id = :id" + _UNLOCKED.format("t"))
_STEP: Final = f"""
SELECT s.id AS step_execution_id, s.run_id, s.step_id, s.agent_id AS step_agent_id, s.inputs AS step_inputs,
       s.timeout_seconds AS step_timeout_seconds, s.queued_at, s.status, s.priority AS step_priority,
       s.ticket_created_at, s.waits_for, s.requires AS step_requires, {kept.COLUMNS}, r.path,
       s.attempt_id IS NOT NULL OR EXISTS (SELECT 1
       FROM attempts a WHERE a.step_execution_id = s.id AND (a.outcome IS NULL OR a.outcome = 'succeeded')) AS taken,
       r.definition, COALESCE(r.root_run_id, r.id) AS root_run,
       (SELECT count(*) FROM attempts a WHERE a.step_execution_id = s.id) AS tries, {suspects.LOSSES} AS losses,
       r.ticket_id, t.id AS ticket, t.run_id AS ticket_run,
       {texts("t", [n for n in TICKET_FIELDS if n != "run_id"], LIMITS)}, {too_long("t", REFUSED)} AS too_long
FROM step_executions s JOIN workflow_runs r ON r.id = s.run_id LEFT JOIN tickets t ON t.id = r.ticket_id
WHERE s.status = 'ready' AND s.available_at IS NULL
  AND {IS_HERE}
  AND (:idle OR :drain AND s.queued_at <= :patient_since OR {suspects.LOSSES} < {suspects.SUSPECT_AFTER})"""
READY_STEP: Final = Sql(_STEP + " AND r.ticket_id = :id LIMIT :limit" + _UNLOCKED.format("s"))
_STILL_READY: Final = Sql("SELECT t.id FROM tickets t WHERE t.state = 'ready' AND t.id IN :ids")
_INPUTS: Final = Sql(f"SELECT {texts('t', ['inputs'], LIMITS)} FROM tickets t WHERE t.id = :id AND t.state = 'ready'")
_HAS_INPUTS: Final = Sql("SELECT 1 AS one FROM tickets t WHERE t.id = :id AND t.inputs = :inputs")
_BUT_TICKETS: Final = (
    "AND (t.execution_mode = 'workflow' OR COALESCE(NULLIF(t.agent_id, ''), t.assignee_id, '') NOT IN ({})) "
)
_BUT_LATE: Final = "AND t.id NOT IN ({}) "
_BUT_STEPS: Final = " AND CASE WHEN s.from_step IS NULL THEN COALESCE(s.agent_id, '') ELSE s.id END NOT IN ({})"


@cache
def _statements(but: int, late: int = 0) -> tuple[Sql, Sql]:
    """For tickets and for steps, without so many kinds: see `Candidate.kind`; and without ``late`` tickets."""
    names = ", ".join(f":but_{number}" for number in range(but))
    tickets = _READY_CUT + "AND t.waits_for = :mark " + (_BUT_TICKETS.format(names) if but else "")
    tickets += _BUT_LATE.format(", ".join(f":late_{number}" for number in range(late))) if late else ""
    tickets += "ORDER BY t.priority DESC, t.created_at"
    steps = _STEP + " AND s.waits_for = :mark" + (_BUT_STEPS.format(names) if but else "")
    steps += " ORDER BY s.priority DESC, s.ticket_created_at"
    return (
        Sql(tickets + " LIMIT :limit" + _UNLOCKED.format("t")),
        Sql(steps + " LIMIT :limit" + _UNLOCKED.format("s")),
    )


READY_TICKETS, READY_STEPS = _statements(0)


@cache
def probe(dialect: Dialect) -> Sql:
    """One statement for the time and for which of the rarer duties are due, each by one index lookup."""
    return Sql(f"""
        SELECT now_ms, {dialect.written_by_others} AS written_by_others, {REVISION} AS revision,
          EXISTS (SELECT 1 FROM attempts WHERE outcome IS NULL AND lease_until <= now_ms) AS expired,
          EXISTS (SELECT 1 FROM step_executions
                  WHERE status = 'ready' AND available_at IS NOT NULL AND available_at <= now_ms) AS due,
          EXISTS (SELECT 1 FROM step_executions WHERE status = 'ready' AND available_at IS NULL) AS steps,
          EXISTS (SELECT 1 FROM workflow_runs WHERE {RUN_DUE} AND due_at <= now_ms)
          OR EXISTS (SELECT 1 FROM step_executions WHERE {STEP_WAITING} AND available_at <= now_ms) AS runs,
          EXISTS (SELECT 1 FROM tickets WHERE {UNKNOWN_STATE}) AS unknown_states,
          {places.MARKED} OR EXISTS (SELECT 1 FROM unmet) AS marked,
          EXISTS (SELECT 1 FROM ticket_dependencies) AS dependencies
        FROM (SELECT {dialect.now_ms} AS now_ms) AS moment""")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row that may be claimed: a ready ticket, or a ready step of a run that has begun."""

    row: Row
    is_step: bool
    refused: str | None = None  # what is wrong with its inputs; then the row is without its long texts

    @property
    def in_workflow(self) -> bool:
        return self.is_step and self.row.definition is not None

    def work(self) -> Work:
        """Of a ticket. Raises BadRow."""
        if self.refused is not None:
            raise BadRow(self.refused)
        return validation.read(self.row)

    def ticket_id(self) -> object:
        return self.row.ticket_id if self.is_step else self.row.id

    def kind(self, agent: str) -> str:
        """All that need a VM of the same size: of an agent, by the id or name that rows have; or this step alone."""
        return str(self.row.step_execution_id) if self.is_step and self.row.from_step is not None else agent

    def turn(self) -> tuple[float, str]:  # a row whose priority isn't a number comes first, to be failed
        priority = self.row.priority
        return (-priority if isinstance(priority, int | float) else float("-inf"), str(self.row.created_at))


def reads(
    which: Mapping[str, Any], *, limit: int, steps: bool, pace: Pace | None, but: Sequence[str], marks: Sequence[str]
) -> tuple[list[tuple[Sql, dict[str, Any]]], list[tuple[Sql, dict[str, Any]]]]:
    """What `first` reads: of tickets, and of steps."""
    left_out = {f"but_{number}": kind for number, kind in enumerate(but)}
    late = filled("late", pace.left_out() if pace is not None else ())
    tickets, of_runs = _statements(len(but), len(late))
    return (
        [(tickets, {"limit": limit, "mark": mark, **left_out, **late}) for mark in ("", *marks)],
        [(of_runs, {"limit": limit, "mark": mark, **left_out, **which}) for mark in ("", *marks) if steps],
    )


def first(
    tx: Tx,
    which: Mapping[str, Any],
    *,
    limit: int,
    steps: bool,
    pace: Pace | None,
    but: Sequence[str],
    marks: Sequence[str],
    expected: Sequence[Read] = (),
) -> tuple[list[Candidate], bool]:
    """The next candidates, in their order; and whether more may follow, since rows are too long to read all at once.
    ``which``: values for READY_STEPS. ``pace``: None for all up to the limit, however long. ``but``: not of these
    kinds. ``marks``: those that wait for what this host has (`places`). ``expected``: what will likely be read next."""
    most = None if pace is None else MOST_CHARS
    if pace is not None and (waiting := pace.waiting()):
        pace.keep({row.id for row in tx.all_in(_STILL_READY, waiting)})
    of_tickets, of_steps = reads(which, limit=limit, steps=steps, pace=pace, but=but, marks=marks)
    found, cut = list[Candidate](), list[Candidate]()
    tx.ahead([*of_tickets, *of_steps, *expected])
    for statement, values in of_tickets:
        rows, more = tx.some(statement, most, **values)
        some, last = _whole(tx, rows, limit, pace)
        found += some
        cut += [last] if last is not None else some[-1:] if more else []
    for statement, values in of_steps:
        rows, more = tx.some(statement, most, **values)
        some = [Candidate(row, is_step=True) for row in rows]
        found += some
        cut += some[-1:] if more else []
    if steps or marks:
        found.sort(key=Candidate.turn)
    if cut:  # those that were not read may come before the others
        end = min(map(Candidate.turn, cut))
        found = [one for one in found if one.turn() <= end]
    return found, bool(cut)


def size(row: Row) -> int:
    """Bytes of a ready ticket's long texts."""
    return int(row.inputs_bytes + row.other_bytes)


def inputs(tx: Tx, ticket_id: str) -> object:
    """Of a ready ticket, as they are."""
    found = tx.first(_INPUTS, id=ticket_id)
    return found.inputs if found is not None else None


def _whole(tx: Tx, rows: Sequence[Row], limit: int, pace: Pace | None) -> tuple[list[Candidate], Candidate | None]:
    """Those of these ready tickets whose turn it is; and the last one that was looked at, if others may follow."""
    found, left, put_off = list[Candidate](), MOST_CHARS, False
    for row in rows:
        one = Candidate(row, is_step=False)
        if size(row) >= LARGE and has_clean_id(row.id):
            if pace is not None and pace.puts_off(row.id, one.turn()):
                put_off = True
                continue
            if pace is not None and LARGE <= row.inputs_bytes <= MAX_BYTES["inputs"]:
                if (look := pace.look(row.id)) is None:
                    put_off = True
                    continue
                if look.error is not None and tx.first(_HAS_INPUTS, id=row.id, inputs=look.inputs) is not None:
                    found.append(Candidate(row, is_step=False, refused=look.error))
                    continue
            if (read := tx.first(READY_TICKET, id=row.id)) is None:
                continue
            one = Candidate(read, is_step=False)
            left -= size(row)
        found.append(one)
        if left < 0 and pace is not None:
            return found, one
    return found, Candidate(rows[-1], is_step=False) if put_off and len(rows) >= limit else None
