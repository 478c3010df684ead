"""What a claim says of VMs that are kept as snapshots: the one that a step starts from, and whether its own is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Final

from swarm.model import Agent, KeepVm, Ticket
from swarm.store.sql.transaction import Row

_SIZES: Final = ("memory_mb", "disk_mb")
KEEP_VM_SECONDS: Final = 86_400.0  # unless somebody says for how long

# SQL, of a ready step `s`: of the snapshot in a fork of which it starts.
OF_SOURCE: Final = "SELECT {} FROM step_executions f JOIN snapshots n ON n.id = f.snapshot_id WHERE f.id = s.from_step"
COLUMNS: Final = f"""s.keep_vm AS step_keep_vm, s.from_step, s.snapshot_id,
       CASE WHEN s.from_step IS NULL THEN NULL ELSE ({OF_SOURCE.format("n.id")}) END AS source,
       CASE WHEN s.from_step IS NULL THEN NULL ELSE ({OF_SOURCE.format("n.spec")}) END AS source_spec"""
# It runs on that one's host; anywhere, to fail with the reason, if that one is gone.
IS_HERE: Final = f"(s.from_step IS NULL OR COALESCE(({OF_SOURCE.format('n.host')}), :host) = :host)"


def of(step: Row | None, ticket: Ticket, agent: Agent) -> dict[str, Any]:
    """The fields of its claim. ``step``: a row with `COLUMNS`. Settings in rows may be anything; the unknown count for
    nothing."""
    wanted = (step.step_keep_vm if step is not None else None, ticket.keep_vm, agent.keep_vm)
    return {
        "keep_vm": next((KeepVm(one) for one in wanted if one in tuple(KeepVm)), KeepVm.NEVER),
        "keep_vm_seconds": ticket.keep_vm_seconds or agent.keep_vm_seconds or KEEP_VM_SECONDS,
        "source": (step.source or "") if step is not None and step.from_step is not None else None,
        "is_source": step is not None and step.snapshot_id is not None,
    }


def sized(agent: Agent, step: Row) -> Agent:
    """A fork is as large as the VM that it is one of."""
    try:
        spec = json.loads(step.source_spec or "{}")
        return replace(agent, **{name: max(getattr(agent, name), spec[name]) for name in _SIZES if name in spec})
    except (ValueError, TypeError):  # another program wrote it
        return agent
