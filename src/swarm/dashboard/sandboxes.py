"""Sandboxes: which there are, and the story of one: commands, files, connections, model calls, what it cost."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute

from swarm.admin import sandboxes
from swarm.api.auth import may
from swarm.api.endpoint import Call, Context
from swarm.api.v1.sandboxes import ListQuery, check_secrets, filter_of, has_secrets
from swarm.api.v1.tickets import cursor_for, read_cursor
from swarm.base.clock import iso
from swarm.dashboard.render import drawn, form, here, html, page
from swarm.errors import UsageError
from swarm.model import TERMINAL_SANDBOX_STATES, Event, Role, Sandbox, SandboxState
from swarm.store.registry.tokens import Actor
from swarm.store.sandboxes.rows import labels
from swarm.store.sandboxes.sandboxes import SandboxPage
from swarm.store.sandboxes.snapshots import SnapshotFilter

_ROWS: Final = 50
_EVENTS: Final = 500  # of one story
_SNAPSHOTS: Final = 50
_LIVE: Final = (SandboxState.STARTING, SandboxState.RUNNING, SandboxState.PAUSED)
# What one can be told to do, in which states, and by words for people.
ACTIONS: Final[Mapping[str, tuple[frozenset[SandboxState], str]]] = {
    "pause": (frozenset({SandboxState.RUNNING}), "Pause"),
    "end": (frozenset(_LIVE), "End"),
}


def routes(context: Context) -> list[BaseRoute]:
    of = "/sandboxes/{id}"
    return [
        page(context, "/sandboxes", show_list),
        page(context, of, show),
        page(context, f"{of}/pause", partial(_act, "pause"), role=Role.OPERATOR, method="POST"),
        page(context, f"{of}/terminal", _terminal, role=Role.OPERATOR),
        page(context, f"{of}/end", _confirm, role=Role.OPERATOR),
        page(context, f"{of}/end", partial(_act, "end"), role=Role.OPERATOR, method="POST"),
    ]


async def show_list(context: Context, request: Request, actor: Actor) -> Response:
    """Those that live, unless others are asked for."""
    query = request.query_params
    chosen = [state for state in query.getlist("state") if state in tuple(SandboxState)]
    call = Call(context=context, request=request, actor=actor, path=request.path_params, query=None, body=None)
    problem, found = "", SandboxPage(sandboxes=[], after=None)
    text = query.get("text", "")[:200]
    try:
        states = tuple(SandboxState(state) for state in chosen)
        which = await filter_of(call, ListQuery(state=states, text=text))
        found = await context.store.sandbox_page(which, after=await read_cursor(call, query.get("after")), limit=_ROWS)
        found = replace(found, after=await cursor_for(call, found.after))
    except UsageError as error:
        problem = str(error)
    names = await context.store.names({one.agent_id for one in found.sandboxes})
    return html(
        "sandboxes.html",
        actor=actor,
        here=here(request),
        states=[(state, here(request, state=state, after=None)) for state in SandboxState],
        everything=here(request, state=None, after=None),
        chosen=chosen,
        live_states=_LIVE,
        text=text,
        sandboxes=[(one, names.get(one.agent_id or "", one.agent_id or "")) for one in found.sandboxes],
        older=here(request, after=found.after) if found.after is not None else None,
        newer=here(request, after=None) if query.get("after") else None,
        problem=problem,
    )


async def _own(context: Context, request: Request, actor: Actor) -> Sandbox:
    """One of another project does not exist for whoever is bound to one. Raises NotFound."""
    return await context.store.sandbox(request.path_params["id"], project_id=actor.project_id)


def _can(actor: Actor, one: Sandbox) -> list[tuple[str, str]]:
    if not may(actor, Role.OPERATOR):
        return []
    return [(name, words) for name, (states, words) in ACTIONS.items() if one.state in states]


async def show(context: Context, request: Request, actor: Actor) -> Response:
    one = await _own(context, request, actor)
    store = context.store
    events = await store.sandbox_history(one.id, limit=_EVENTS)
    calls = await store.sandbox_calls(one.id, limit=_EVENTS)
    names = await store.names((one.agent_id,))
    kept = await store.snapshot_page(SnapshotFilter(sandbox_id=one.id), limit=_SNAPSHOTS)
    return await drawn(
        "sandbox.html",
        actor=actor,
        one=one,
        agent=names.get(one.agent_id or "", one.agent_id or ""),
        labels=labels(one),
        ends=_moment(one.ends_at),
        ended=one.state in TERMINAL_SANDBOX_STATES,
        commands=commands(events),
        files=[event for event in events if event.kind == "files"],
        reached=[event for event in events if event.kind in ("egress", "port")],
        calls=calls,
        spent=sum(call.cost_usd or 0.0 for call in calls),
        snapshots=kept.snapshots,
        events=events,
        more=len(events) == _EVENTS,
        can=_can(actor, one),
    )


def _moment(ms: int | None) -> str | None:
    """Another program may have written any number."""
    return iso(ms) if ms is not None and 0 <= ms < 1 << 47 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """``ended``: what its event says of its end; None while it runs."""

    at: str
    line: str
    by: str
    user: str
    background: bool
    ended: Mapping[str, object] | None

    @property
    def outcome(self) -> tuple[str, str]:
        """A state to show, and words."""
        if self.ended is None:
            return "running", ""
        if self.ended.get("timed_out"):
            return "failed", "out of time"
        if self.ended.get("signal") is not None:
            return "failed", f"signal {self.ended['signal']}"
        if (code := self.ended.get("code")) is None:
            return "gone", str(self.ended.get("error", ""))
        return ("ok" if code == 0 else "failed"), f"status {code}"

    @property
    def ms(self) -> float | None:
        value = (self.ended or {}).get("ms")
        return float(value) if isinstance(value, int | float) else None


def commands(events: Sequence[Event]) -> list[Command]:
    """Newest first, as the events are."""
    found, ends = list[Command](), dict[str, Mapping[str, object]]()
    for event in events:
        data = event.data
        name = str(data.get("process", ""))
        if event.kind == "exit":
            ends[name] = data
        elif event.kind == "exec":
            argv = data.get("argv")
            line = " ".join(map(str, argv)) if isinstance(argv, list) else ""
            found.append(
                Command(
                    at=event.at,
                    line=line,
                    by=str(data.get("by", "")),
                    user=str(data.get("user", "")),
                    background=data.get("background") is True,
                    ended=ends.pop(name, None),
                )
            )
    return found


async def _confirm(context: Context, request: Request, actor: Actor) -> Response:
    one = await _own(context, request, actor)
    return html("sandbox_end.html", actor=actor, one=one, allowed="end" in dict(_can(actor, one)))


async def _terminal(context: Context, request: Request, actor: Actor) -> Response:
    """A shell in the browser, by the WebSocket that runs a command. Who may not use that is told why here."""
    one = await _own(context, request, actor)
    check_secrets(actor, await has_secrets(context, one))
    user = "root" if request.query_params.get("user") == "root" else "agent"
    command = f"swarm sandbox shell {shlex.quote(one.name or one.id)}"
    return html(
        "terminal.html",
        actor=actor,
        one=one,
        ended=one.state in TERMINAL_SANDBOX_STATES,
        shell=sandboxes.SHELL,
        user=user,
        other="agent" if user == "root" else "root",
        command=f"{command} --user root" if user == "root" else command,
    )


async def _act(action: str, context: Context, request: Request, actor: Actor) -> Response:
    one = await _own(context, request, actor)
    await form(request)
    act: Any = sandboxes.pause if action == "pause" else sandboxes.end
    await act(context.store, one.id, by=actor.name)
    return RedirectResponse(f"/sandboxes/{quote(one.id, safe='')}", status_code=303)
