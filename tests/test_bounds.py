"""A number has the same bounds wherever it is written: manifests, workflows, rows of agents, tickets, sandboxes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pydantic
import pytest

from swarm.agents.package import Manifest
from swarm.errors import StoreError, UsageError
from swarm.model import BOUNDS, Sandbox, Ticket
from swarm.store.registry import agents
from swarm.store.sandboxes import sandboxes
from swarm.store.tickets import tickets
from swarm.workflow import parse
from tests.store.databases import ECHO

OF_RETRY = ("max_attempts", "delay_seconds", "factor", "max_delay_seconds")
OF_AGENTS = tuple(name for name in BOUNDS if name not in (*OF_RETRY, "priority", "ttl_seconds"))


def manifest(name: str, value: float) -> None:
    fields = {"retry": {name: value}} if name in OF_RETRY else {name: value}
    Manifest.model_validate({"name": "a", "version": "1.0.0", "runtime": "python", "entry": ["main.py"], **fields})


def agent_row(name: str, value: float) -> None:
    row = {field: getattr(ECHO, field) for field in agents.AGENT_FIELDS}
    row |= dict.fromkeys(("secrets", "preload", "requirements", "packages", "npm"), "[]")
    row |= {"entry": '["main.py"]', "env": "{}", "requires": "{}", "retry": "{}", "path": "/nowhere"}
    row |= {"retry": f'{{"{name}": {value}}}'} if name in OF_RETRY else {name: value}
    agents.parse(SimpleNamespace(**row))


def workflow(name: str, value: float) -> None:
    retry, other = f"{{{name}: {value}}}", f"{name}: {value}"
    inside = "" if name.startswith("budget") else f", {f'retry: {retry}' if name in OF_RETRY else other}"
    text = f"name: w\nversion: 1.0.0\nsteps: [{{id: a, agent: echo{inside}}}]\n"
    _, _, problems = parse.read(text if inside else f"{text}{other}\n")
    if problems:
        raise UsageError(str(problems))


def ticket(name: str, value: float) -> None:
    tickets.check(Ticket(id="t", title="t", state="ready", agent_id="a", **{name: value}))  # type: ignore[arg-type]


def sandbox(name: str, value: float) -> None:
    sandboxes.check(Sandbox(id="s", state="starting", **{name: value}))  # type: ignore[arg-type]


PLACES: list[tuple[Callable[[str, float], None], tuple[str, ...]]] = [
    (manifest, (*OF_AGENTS, *OF_RETRY)),
    (agent_row, (*OF_AGENTS, *OF_RETRY)),
    (workflow, ("timeout_seconds", "budget_usd", "budget_tokens", *OF_RETRY)),
    (ticket, ("priority", "max_attempts", "timeout_seconds", "budget_usd", "budget_tokens")),
    (sandbox, ("ttl_seconds", "memory_mb", "vcpus", "disk_mb", "idle_timeout_seconds", "budget_usd", "budget_tokens")),
]


@pytest.mark.parametrize(
    ("place", "name"), [pytest.param(p, n, id=f"{p.__name__}-{n}") for p, names in PLACES for n in names]
)
def test_bounds_are_the_same_everywhere(place: Callable[[str, float], None], name: str) -> None:
    least, most = BOUNDS[name]
    place(name, least)
    place(name, most)
    for beyond in (least - 1, most + 1 if isinstance(most, int) else most * 1.01):
        with pytest.raises((pydantic.ValidationError, StoreError, UsageError)):
            place(name, beyond)


def test_no_bound_is_left_out() -> None:
    assert {name for _, names in PLACES for name in names} == set(BOUNDS)
