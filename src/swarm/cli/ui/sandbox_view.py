"""How a sandbox is shown: what it is, what it may do, what it cost, and its story."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from swarm.cli.ui.output import Out, first_line
from swarm.cli.ui.render import counted, duration, pretty, shorten, size
from swarm.cli.ui.table import Column

if TYPE_CHECKING:
    from swarm.model import Event, Sandbox
    from swarm.store.spending import Costs

_TOLD = 400  # characters of an event


def show(out: Out, one: Sandbox, story: Sequence[Event], costs: Costs | None, names: Mapping[str, str]) -> None:
    """``names``: name@version of agents, by id."""
    fields = {
        "sandbox": one.id,
        "name": one.name,
        "state": one.state,
        "wanted": one.wanted if one.wanted != one.state else None,
        "error": one.error,
        "project": one.project_id,
        "agent": one.agent_id and names.get(one.agent_id, one.agent_id),
        "image": one.image,
        "from": one.snapshot_id and f"snapshot {one.snapshot_id}",
        "forked from": one.parent_id,
        "memory": one.memory_mb and f"{one.memory_mb} MB",
        "cpus": one.vcpus and str(one.vcpus),
        "disk": one.disk_mb and f"{one.disk_mb} MB",
        "network": one.network,
        "secrets": ", ".join(_list(one.secrets)) or None,
        "env": ", ".join(_list(one.env)) or None,
        "labels": pretty(one.labels),
        "requires": pretty(one.requires),
        "lives for": one.ttl_seconds and span(one.ttl_seconds),
        "pauses after": one.idle_timeout_seconds and f"{span(one.idle_timeout_seconds)} without use",
        "budget": _budget(one),
        "cost": f"${costs.cost_usd:.4f} for {counted(costs.calls, 'model call')}" if costs else None,
        "made by": one.created_by,
        "created": one.created_at,
        "started": one.started_at,
        "used": one.used_at,
        "ended": one.ended_at,
        "host": one.host,
        "VM": one.vm_id and str(one.vm_id),
    }
    out.fields({name: shorten(str(value)) for name, value in fields.items() if value})
    if story:
        out.line()
        rows = [(event.at, event.kind, told(event)) for event in story]
        out.table(("TIME", Column("EVENT", drop=1), Column("WHAT", least=16, whole=True)), rows)


def told(event: Event) -> str:
    """One line for what happened. Other programs write events too: any value may be anything."""
    return first_line(_told(event.kind, event.data))[:_TOLD]


def _told(kind: str, data: Mapping[str, object]) -> str:
    def said(name: str) -> str:
        return str(data.get(name) or "")

    failed = f": {said('error')}" if "error" in data else ""
    match kind:
        case "transition":
            why = said("error") or said("why")
            return f"{said('from') or 'new'} → {said('to')}" + (f": {why}" if why else "")
        case "change":
            rest = ", ".join(f"{name} {value}" for name, value in data.items() if name not in ("did", "by"))
            return f"{said('did').removeprefix('sandbox.')} by {said('by')}" + (f": {rest}" if rest else "")
        case "exec":
            argv = data.get("argv")
            words = shlex.join(map(str, argv)) if isinstance(argv, list) else said("argv")
            return f"{words}{' (background)' if data.get('background') else ''}"
        case "exit":
            how = f"status {data['code']}" if "code" in data else f"signal {data['signal']}" if "signal" in data else ""
            how = "its time was up" if data.get("timed_out") else how or said("error")
            return f"{how}, after {_ms(data.get('ms'))}".strip(", ")
        case "files":
            moved = data.get("bytes")
            amount = f", {size(moved)}" if isinstance(moved, int) else ""
            to = f" to {said('to')}" if "to" in data else ""
            return f"{said('op')} {said('path')}{to}{amount}{failed}"
        case "port":
            return f"port {said('port')}{failed}"
        case "held":
            return f"held by the engine {said('worker')}"
        case "started":
            timings = data.get("timings")
            took = timings.get("total") if isinstance(timings, dict) else None
            return f"VM {said('vm')} is up" + (f", after {_ms(took)}" if took else "")
        case "trouble":
            return f"could not {said('what')}: {said('error')}"
        case "fork":
            children = data.get("children")
            return f"{counted(len(children), 'fork') if isinstance(children, list) else 'forks'} by {said('by')}"
        case "signal":
            return f"{said('signal')} to {said('process')}{' and all it started' if data.get('all') else ''}{failed}"
        case "egress":
            refused = f" refused: {said('refused')}" if "refused" in data else ""
            return f"{said('host') or said('service') or said('via')}{refused}"
        case "model_call":
            return ", ".join(f"{name} {value}" for name, value in data.items() if value is not None)
    return json.dumps(data, ensure_ascii=False)


def span(seconds: float) -> str:
    """Of a length that people choose: the largest unit in which it is whole."""
    for size_, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size_ and seconds % size_ == 0:
            return f"{seconds / size_:g} {unit}"
    return f"{seconds:g} s"


def _ms(value: object) -> str:
    return duration(float(value)) if isinstance(value, int | float) else "?"


def _list(text: str | None) -> list[str]:
    """The names in JSON text of a list or an object."""
    try:
        found = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return []
    return [str(one) for one in found] if isinstance(found, list | dict) else []


def _budget(one: Sandbox) -> str | None:
    parts = [f"${one.budget_usd:g}" if one.budget_usd is not None else ""]
    parts.append(f"{one.budget_tokens:,} tokens" if one.budget_tokens is not None else "")
    return ", ".join(part for part in parts if part) or None
