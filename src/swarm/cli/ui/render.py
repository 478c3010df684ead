"""How a ticket is shown: its fields, its steps, and where its time went."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from swarm.cli.ui.output import Out, first_line
from swarm.cli.ui.table import Column
from swarm.model import ExecutionMode, Ticket

if TYPE_CHECKING:
    from swarm.admin.engines import Engine
    from swarm.store.sql.rows import RunRow, StepRow, TicketSummary

_BAR = 40
# Longer values and lists are cut off; `--json` prints all of them.
_SHOWN_CHARACTERS = 4000
_SHOWN_STEPS = 200


def runs(ticket: Ticket | TicketSummary, names: Mapping[str, str]) -> str:
    """The name of the agent or workflow that a ticket runs; what its row holds if that is of none."""
    agent = ticket.agent_id or (ticket.assignee_id if (ticket.assignee_type or "agent") == "agent" else None)
    of_workflow = ticket.workflow_id and (not agent or ticket.execution_mode == ExecutionMode.WORKFLOW)
    ref = (ticket.workflow_id if of_workflow else agent) or ""
    return names[ref].partition("@")[0] if ref in names else ref


def show_ticket(out: Out, ticket: Ticket, names: Mapping[str, str]) -> None:
    """``names``: name@version of agents and workflows, by id."""
    fields = {
        "ticket": ticket.id,
        "title": ticket.title,
        "state": ticket.state,
        "project": ticket.project_id,
        "agent": ticket.agent_id and names.get(ticket.agent_id, ticket.agent_id),
        "workflow": ticket.workflow_id and names.get(ticket.workflow_id, ticket.workflow_id),
        "description": ticket.description,
        "inputs": pretty(ticket.inputs),
        "requires": pretty(ticket.requires),
        "outputs": pretty(ticket.outputs),
        "error": ticket.error,
        "created": ticket.created_at,
        "started": ticket.started_at,
        "completed": ticket.completed_at,
    }
    out.fields({name: shorten(value) for name, value in fields.items() if value is not None})


def show_steps(out: Out, ticket: Ticket, runs: Sequence[RunRow], steps: Sequence[StepRow]) -> None:
    """The last run of a workflow, with nested runs; and what to do if it waits for a person."""
    current = steps_of_last_run(ticket, runs, steps)
    if not current:
        return
    out.line()
    rows = [
        (
            step.step_id,
            step.status,
            f"{step.agent_name}@{step.agent_version}" if step.agent_name else "",
            step.retry_count + 1 if step.started_at and step.agent_name else "",
            duration(step.duration_ms),
            first_line(step.error or (step.question if step.status == "waiting" else _answered(step))),
        )
        for step in current[:_SHOWN_STEPS]
    ]
    columns = (
        "STEP", "STATE", Column("AGENT", drop=2), Column("TRIES", drop=1, right=True),
        Column("TIME", drop=3, right=True), Column("NOTE", least=16, whole=True),
    )  # fmt: skip
    out.table(columns, rows)
    if len(current) > _SHOWN_STEPS:
        out.line(f"… {len(current) - _SHOWN_STEPS} more: --json shows all")
    for step in current[:_SHOWN_STEPS]:
        if step.status == "waiting" and step.question and first_line(step.question) != step.question.strip():
            out.fields({f"{step.step_id} asks": shorten(step.question.strip())})
    if waiting := [step.step_id for step in current if step.status == "waiting" and step.verdict is None]:
        which = "" if len(waiting) == 1 else " --step STEP"
        out.line(f"{', '.join(waiting)}: `swarm ticket approve {ticket.id}{which}`, or reject, continues it")


def _answered(step: StepRow) -> str:
    """Who approved it, and why. Other programs may write the column, too."""
    try:
        given = json.loads(step.verdict or "null")
    except (ValueError, RecursionError):
        return ""
    if not isinstance(given, dict) or given.get("approved") is not True:
        return ""
    return ", ".join(str(one) for one in (f"approved by {given.get('by', '')}", given.get("why")) if one)


def steps_of_last_run(ticket: Ticket, runs: Sequence[RunRow], steps: Sequence[StepRow]) -> list[StepRow]:
    """The steps of the ticket's current run, each followed by those of the run nested in it."""
    last = {run.id for run in runs if run.id == ticket.run_id or run.root_run_id == ticket.run_id}
    found = [step for step in steps if step.run_id in last]
    place = {step.step_id: number for number, step in enumerate(found)}

    def order(step: StepRow) -> list[int]:
        parts = step.step_id.split("/")
        return [place.get("/".join(parts[: depth + 1]), 0) for depth in range(len(parts))]

    return sorted(found, key=order)


def show_timings(out: Out, timings: Mapping[str, float]) -> None:
    """Where an attempt's time went: one line per phase, with its share of the total as a bar."""
    if not timings:  # a lost attempt: nobody measured it
        return
    total = timings.get("total") or sum(timings.values())
    for phase, ms in timings.items():
        if phase != "total":
            bar = "█" * round(_BAR * ms / total) if total else ""
            out.line(f"  {phase:<8} {duration(ms):>9}  {bar}".rstrip())
    out.line(f"  {'total':<8} {duration(total):>9}")


def duration(ms: float | None) -> str:
    if ms is None:
        return ""
    return f"{ms:.1f} ms" if ms < 100 else f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.2f} s"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def pretty(text: str | None) -> str | None:
    """JSON text, indented; other text unchanged."""
    if not text:
        return None
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


def shorten(text: str) -> str:
    left_out = len(text) - _SHOWN_CHARACTERS
    return text if left_out <= 0 else f"{text[:_SHOWN_CHARACTERS]}… ({left_out} more characters: --json shows all)"


def engine_line(engine: Engine) -> str:
    info, where = engine.info, f"engine {engine.pid} on {engine.host}"
    if engine.died:
        return f"{where}: died; the next engine on this host takes its steps over at once"
    if not engine.alive:
        silent = duration(engine.seen_ms_ago)
        return f"{where}: silent for {silent}; its steps go back to the queue when their leases end"
    doing = "stopping" if info.get("stopping") else "draining" if info.get("draining") else "serving"
    held = f", {info['sandboxes']} of {info.get('max_sandboxes')} sandboxes" if info.get("sandboxes") else ""
    return f"{where}: {doing}, {info.get('running')} of {info.get('max_vms')} VMs{held}, driver {info.get('driver')}"
