"""How a ticket is shown: by `swarm ticket show`, by `swarm-engine run-ticket`, by the demo."""

from __future__ import annotations

import json
from collections.abc import Mapping

from swarm.cli.output import Out
from swarm.model import Ticket

_BAR = 40
# What a terminal shows of a long value; `--json` has all of it.
_SHOWN_CHARACTERS = 4000


def show_ticket(out: Out, ticket: Ticket) -> None:
    fields = {
        "ticket": ticket.id,
        "title": ticket.title,
        "state": ticket.state,
        "project": ticket.project_id,
        "agent": ticket.agent_id,
        "workflow": ticket.workflow_id,
        "description": ticket.description,
        "inputs": pretty(ticket.inputs),
        "outputs": pretty(ticket.outputs),
        "error": ticket.error,
        "created": ticket.created_at,
        "started": ticket.started_at,
        "completed": ticket.completed_at,
    }
    out.fields({name: shorten(value) for name, value in fields.items() if value is not None})


def show_timings(out: Out, timings: Mapping[str, float]) -> None:
    """Where an attempt's time went: one line for each phase, with its share of the total as a bar."""
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


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def pretty(text: str | None) -> str | None:
    """JSON text on several lines; what is not JSON stays as it is."""
    if not text:
        return None
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


def shorten(text: str) -> str:
    left_out = len(text) - _SHOWN_CHARACTERS
    return text if left_out <= 0 else f"{text[:_SHOWN_CHARACTERS]}… ({left_out} more characters: --json shows all)"
