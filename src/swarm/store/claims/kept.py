"""What a claim says of VMs that are kept as snapshots: the one that a step starts from, and whether its own is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from swarm.model import Agent, KeepVm, Ticket
from swarm.store.sql.conditions import OF_SOURCE, SOURCE_HOST
from swarm.store.sql.rows import parsed, whole
from swarm.store.sql.transaction import Row
from swarm.store.tickets.validation import BadRow, shown, strict_ticket

_SIZES: Final = ("memory_mb", "disk_mb")
_KEEP_VM: Final = tuple(KeepVm)
HOST_TIMEOUT_SECONDS: Final = 900.0
KEEP_VM_SECONDS: Final = 86_400.0  # unless somebody says for how long

COLUMNS: Final = f"""s.keep_vm AS step_keep_vm, s.from_step, s.snapshot_id, {SOURCE_HOST} AS source_host,
       CASE WHEN s.from_step IS NULL THEN NULL ELSE ({OF_SOURCE.format("n.id")}) END AS source,
       CASE WHEN s.from_step IS NULL THEN NULL ELSE ({OF_SOURCE.format("n.spec")}) END AS source_spec"""


def checked(step: Row, host: str, silent_seconds: float) -> Ticket:
    """Its ticket. Raises BadRow; also if the host that has the VM in a fork of which it starts is gone (`IS_HERE`)."""
    if step.from_step is not None and step.source_host not in (None, host):
        raise BadRow(
            f"the VM that it starts from is on the host {shown(step.source_host)}, of which no engine has given a sign "
            f"of life for {silent_seconds:g} s (SWARM_HOST_TIMEOUT_SECONDS): `swarm ticket retry` makes it again"
        )
    return strict_ticket(step)


def of(step: Row | None, ticket: Ticket, agent: Agent) -> dict[str, Any]:
    """The fields of its claim. ``step``: a row with `COLUMNS`. Settings in rows may be anything; the unknown count for
    nothing."""
    wanted = (step.step_keep_vm if step is not None else None, ticket.keep_vm, agent.keep_vm)
    return {
        "keep_vm": next((KeepVm(one) for one in wanted if one in _KEEP_VM), KeepVm.NEVER),
        "keep_vm_seconds": ticket.keep_vm_seconds or agent.keep_vm_seconds or KEEP_VM_SECONDS,
        "source": (step.source or "") if step is not None and step.from_step is not None else None,
        "is_source": step is not None and step.snapshot_id is not None,
    }


def sized(agent: Agent, step: Row) -> Agent:
    """A fork is as large as the VM that it is one of."""
    spec = parsed(step.source_spec, dict) or {}
    sizes = {name: max(getattr(agent, name), whole(spec.get(name)) or 0) for name in _SIZES}
    return replace(agent, **sizes)
