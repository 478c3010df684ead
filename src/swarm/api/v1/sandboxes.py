"""Sandboxes and snapshots: list, create, show, pause, resume, fork, snapshot, end. What is done in one: guests.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Annotated, Any, Final, TypeVar

from pydantic import Field

from swarm.admin import sandboxes
from swarm.api.auth import may
from swarm.api.endpoint import Call, Context, Endpoint, Fields
from swarm.api.problem import Refused, busy
from swarm.api.v1.events import Events, RangeQuery
from swarm.api.v1.tickets import MAX_CURSOR_CHARS, MAX_OF_A_KIND, Reference, cursor_for, project_for, read_cursor
from swarm.base.aio import first
from swarm.errors import NotFound, UsageError
from swarm.fields import NO_NUL, Labels, Variable, bounded
from swarm.model import Role, Sandbox, SandboxState, Snapshot
from swarm.store.registry.tokens import Actor
from swarm.store.sandboxes.sandboxes import SandboxFilter, SandboxPage
from swarm.store.sandboxes.snapshots import SnapshotFilter, SnapshotPage
from swarm.store.tickets.validation import shown

T = TypeVar("T")

MAX_FORKS: Final = 64
MAX_WAIT_SECONDS: Final = 60.0
PROJECT_KEEP_SECONDS: Final = 30 * 86400.0  # a disk is all projects': nothing of one stays for ever by default
_LOOK_SECONDS: Final = 5.0  # for a client that has gone
_ALLOWED_SECONDS: Final = 2.0  # between two looks whether the caller may go on
Title = Annotated[str, Field(min_length=1, max_length=64, pattern=NO_NUL)]  # the database says what more it must be
Text = Annotated[str, Field(max_length=4000, pattern=NO_NUL)]


class ListQuery(Fields):
    """Which sandboxes; of several states or agents, any; with all of the labels."""

    state: tuple[SandboxState, ...] = Field(default=(), max_length=MAX_OF_A_KIND)
    project: str | None = None
    agent: tuple[Reference, ...] = Field(default=(), max_length=MAX_OF_A_KIND, description="name, name@version or id")
    label: tuple[str, ...] = Field(default=(), max_length=MAX_OF_A_KIND, description="NAME=VALUE")
    text: str = Field(default="", max_length=200, description="in the name, or how the id begins")
    after: str | None = Field(default=None, max_length=MAX_CURSOR_CHARS, description="`after` of the page before")
    limit: int = Field(default=50, ge=1, le=500)


class SnapshotQuery(Fields):
    project: str | None = None
    after: str | None = Field(default=None, max_length=MAX_CURSOR_CHARS, description="`after` of the page before")
    limit: int = Field(default=50, ge=1, le=500)


class NewSandbox(Fields):
    """``network`` and ``secrets`` of its own are for admins; without them, an agent's apply."""

    name: Title | None = None
    agent: str | None = Field(
        default=None, max_length=300, description="name, name@version or id: its files and limits"
    )
    image: str | None = Field(default=None, max_length=300)
    snapshot: str | None = Field(default=None, max_length=300, description="start from it, not from an image")
    memory_mb: int | None = bounded("memory_mb", None)
    vcpus: int | None = bounded("vcpus", None)
    disk_mb: int | None = bounded("disk_mb", None)
    network: Text | None = Field(default=None, description="as an agent's: none, open, or what is allowed")
    secrets: Annotated[tuple[Variable, ...], Field(max_length=100)] = ()
    env: Annotated[dict[Variable, Text], Field(max_length=100)] = Field(default_factory=dict)
    labels: Annotated[dict[Title, Text], Field(max_length=100)] = Field(default_factory=dict)
    ttl_seconds: float | None = bounded("ttl_seconds", None, description="then it ends; default: an hour")
    idle_timeout_seconds: float | None = bounded("idle_timeout_seconds", None, description="then it is paused")
    budget_usd: float | None = bounded("budget_usd", None)
    budget_tokens: int | None = bounded("budget_tokens", None)
    requires: Labels = Field(default_factory=dict, description="labels that its host must have")
    project: str | None = None


class NewFork(Fields):
    count: int = Field(default=1, ge=1, le=MAX_FORKS)
    name: Title | None = Field(default=None, description="of one; several are named NAME-1, NAME-2 …")


class NewSnapshot(Fields):
    name: Title | None = None
    keep_seconds: float | None = bounded(
        "keep_vm_seconds", None, description="then it goes; default: never, by a project's token 30 days"
    )
    without_secrets: bool = Field(default=False, description="refuse if the sandbox was given a secret")


class WaitQuery(Fields):
    timeout_seconds: float = Field(default=30.0, ge=0, le=MAX_WAIT_SECONDS)


async def own_sandbox(call: Call) -> Sandbox:
    """That the path names, by its name or id. One of another project does not exist. Raises NotFound."""
    return await call.store.sandbox(call.path["id"], project_id=call.actor.project_id)


async def own_snapshot(call: Call, ref: str) -> Snapshot:
    return await call.store.snapshot(ref, project_id=call.actor.project_id)


def check_secrets(actor: Actor, secrets: bool) -> None:
    """Who works in a VM may read all that is in it, and secrets are of all projects. Raises Refused."""
    if secrets and not _may_all(actor):
        raise Refused(403, f"there are secrets in this VM, which {actor.name} could read: that needs an admin")


def _may_all(actor: Actor) -> bool:
    return may(actor, Role.ADMIN) and actor.project_id is None


async def has_secrets(context: Context, row: Sandbox) -> bool:
    """By its row, which says it for good (not known yet counts as yes), and by its agent as it is now."""
    if row.secret is not False:
        return True
    try:
        return row.agent_id is not None and bool((await context.store.agent(row.agent_id)).secrets)
    except NotFound:
        return False


async def usable_sandbox(call: Call) -> Sandbox:
    """`own_sandbox`, if the caller may work in it. Raises Refused (403)."""
    row = await own_sandbox(call)
    check_secrets(call.actor, await has_secrets(call.context, row))
    return row


async def while_wanted(call: Call, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, unless the client goes away, may not go on, or the server stops: then it is cancelled.
    The body of the request must have been read."""
    return await first(work, _gone(call), forbidden(call))


async def _gone(call: Call) -> Any:
    while (await call.request.receive())["type"] != "http.disconnect":
        pass
    raise Refused(400, "the client went away")


async def forbidden(call: Call) -> Any:
    """Ends only by Refused."""
    while True:
        await call.context.feed.pause(_ALLOWED_SECONDS)
        if call.context.feed.closed:
            raise busy("the server stops: try again")
        await call.check_again(Role.OPERATOR)


async def filter_of(call: Call, query: ListQuery) -> SandboxFilter:
    """Raises NotFound for an unknown agent, UsageError."""
    own, labels = call.actor.project_id, dict[str, str]()
    for one in query.label:
        name, equals, value = one.partition("=")
        if not equals:
            raise UsageError(f"a label is NAME=VALUE, not {shown(one)}")
        labels[name] = value
    return SandboxFilter(
        states=tuple(dict.fromkeys(query.state)),
        project_id=own if own is not None else query.project,
        agent_ids=tuple([(await call.store.agent(ref)).id for ref in dict.fromkeys(query.agent)]),
        labels=labels,
        text=query.text,
    )


async def list_sandboxes(call: Call) -> SandboxPage:
    query: ListQuery = call.query
    after = await read_cursor(call, query.after)
    found = await call.store.sandbox_page(await filter_of(call, query), after=after, limit=query.limit)
    return replace(found, after=await cursor_for(call, found.after))


async def create_sandbox(call: Call) -> Sandbox:
    given: NewSandbox = call.body
    agent = await call.store.agent(given.agent) if given.agent is not None else None
    start = await own_snapshot(call, given.snapshot) if given.snapshot is not None else None
    if (given.network is not None or given.secrets) and not _may_all(call.actor):
        raise Refused(
            403, f"{call.actor.name} can't give a network or secrets: that needs an admin; an agent has its own"
        )
    check_secrets(call.actor, bool(given.secrets or (agent and agent.secrets) or (start and start.secrets)))
    columns = given.model_dump(exclude={"agent", "snapshot", "secrets", "env", "labels", "requires", "project"})
    return await call.store.add_sandbox(
        Sandbox(
            id="",
            state=SandboxState.STARTING,
            project_id=project_for(call, given.project),
            agent_id=agent.id if agent is not None else None,
            snapshot_id=start.id if start is not None else None,
            secrets=json.dumps(given.secrets) if given.secrets else None,
            env=json.dumps(given.env) if given.env else None,
            labels=json.dumps(given.labels) if given.labels else None,
            requires=json.dumps(given.requires) if given.requires else None,
            **columns,
        ),
        by=call.actor.name,
    )


async def show_sandbox(call: Call) -> Sandbox:
    return await own_sandbox(call)


async def list_sandbox_events(call: Call) -> Events:
    query: RangeQuery = call.query
    found = await call.store.sandbox_events((await own_sandbox(call)).id, after=query.after, limit=query.limit)
    return Events(events=found, after=found[-1].seq if found else query.after)


async def wait_for_sandbox(call: Call) -> Sandbox:
    """Until it runs, is paused or has ended."""
    id, feed = (await own_sandbox(call)).id, call.context.feed
    loop = asyncio.get_running_loop()
    end = loop.time() + call.query.timeout_seconds
    while True:
        since = feed.now()
        row, left = await call.store.sandbox(id), end - loop.time()
        if row.state != SandboxState.STARTING or left <= 0 or feed.closed or await call.request.is_disconnected():
            return row
        await call.check_again(Role.VIEWER)
        await feed.changed(since, timeout_seconds=min(left, _LOOK_SECONDS))


async def resume_sandbox(call: Call) -> Sandbox:
    row = await own_sandbox(call)
    await while_wanted(call, sandboxes.reach(call.store, row.id, by=call.actor.name))
    return await call.store.sandbox(row.id)


async def pause_sandbox(call: Call) -> Sandbox:
    row = await own_sandbox(call)
    return await while_wanted(call, sandboxes.pause(call.store, row.id, by=call.actor.name))


async def end_sandbox(call: Call) -> Sandbox:
    row = await own_sandbox(call)
    return await while_wanted(call, sandboxes.end(call.store, row.id, by=call.actor.name))


async def fork_sandbox(call: Call) -> list[Sandbox]:
    row = await usable_sandbox(call)
    live = await while_wanted(call, sandboxes.reach(call.store, row.id, by=call.actor.name))
    made = await while_wanted(call, live.fork(count=call.body.count, name=call.body.name))
    return [await call.store.sandbox(id) for id in made]


async def snapshot_sandbox(call: Call) -> Snapshot:
    given: NewSnapshot = call.body
    row = await own_sandbox(call)
    live = await while_wanted(call, sandboxes.reach(call.store, row.id, by=call.actor.name))
    keep = given.keep_seconds
    if keep is None and call.actor.project_id is not None:
        keep = PROJECT_KEEP_SECONDS
    made = await while_wanted(
        call,
        live.snapshot(name=given.name, keep_seconds=keep, without_secrets=given.without_secrets),
    )
    return await call.store.snapshot(made)


async def list_snapshots(call: Call) -> SnapshotPage:
    query: SnapshotQuery = call.query
    own = call.actor.project_id
    which = SnapshotFilter(project_id=own if own is not None else query.project)
    after = await read_cursor(call, query.after)
    found = await call.store.snapshot_page(which, after=after, limit=query.limit)
    return replace(found, after=await cursor_for(call, found.after))


async def show_snapshot(call: Call) -> Snapshot:
    return await own_snapshot(call, call.path["id"])


async def remove_snapshot(call: Call) -> Snapshot:
    row = await own_snapshot(call, call.path["id"])
    return await call.store.remove_snapshot(row.id, by=call.actor.name)


ENDPOINTS: Final[Sequence[Endpoint]] = (
    Endpoint(
        method="GET",
        path="/v1/sandboxes",
        role=Role.VIEWER,
        summary="List sandboxes, newest first, a page at a time",
        handler=list_sandboxes,
        query=ListQuery,
        answer=SandboxPage,
        errors={404: "no such agent"},
    ),
    Endpoint(
        method="POST",
        path="/v1/sandboxes",
        role=Role.OPERATOR,
        summary="Create a sandbox: a VM that stays",
        handler=create_sandbox,
        body=NewSandbox,
        answer=Sandbox,
        status=201,
        errors={404: "no such agent or snapshot"},
    ),
    Endpoint(
        method="GET",
        path="/v1/sandboxes/{id}",
        role=Role.VIEWER,
        summary="Show a sandbox: by its id or name",
        handler=show_sandbox,
        answer=Sandbox,
    ),
    Endpoint(
        method="DELETE",
        path="/v1/sandboxes/{id}",
        role=Role.OPERATOR,
        summary="End a sandbox; its row and its history stay",
        handler=end_sandbox,
        answer=Sandbox,
    ),
    Endpoint(
        method="GET",
        path="/v1/sandboxes/{id}/wait",
        role=Role.VIEWER,
        summary="Wait until a sandbox has started, at most a minute",
        handler=wait_for_sandbox,
        query=WaitQuery,
        answer=Sandbox,
    ),
    Endpoint(
        method="GET",
        path="/v1/sandboxes/{id}/events",
        role=Role.VIEWER,
        summary="A range of a sandbox's events: commands, files, egress, model calls",
        handler=list_sandbox_events,
        query=RangeQuery,
        answer=Events,
        large=True,
    ),
    Endpoint(
        method="POST",
        path="/v1/sandboxes/{id}/pause",
        role=Role.OPERATOR,
        summary="Pause a sandbox: it becomes a snapshot on its host's disk",
        handler=pause_sandbox,
        answer=Sandbox,
    ),
    Endpoint(
        method="POST",
        path="/v1/sandboxes/{id}/resume",
        role=Role.OPERATOR,
        summary="Resume a paused sandbox; whatever uses it does that too",
        handler=resume_sandbox,
        answer=Sandbox,
    ),
    Endpoint(
        method="POST",
        path="/v1/sandboxes/{id}/fork",
        role=Role.OPERATOR,
        summary="Start new sandboxes from the state of this one, which runs on",
        handler=fork_sandbox,
        body=NewFork,
        answer=list[Sandbox],
        status=201,
    ),
    Endpoint(
        method="POST",
        path="/v1/sandboxes/{id}/snapshot",
        role=Role.OPERATOR,
        summary="Keep the state of a sandbox, which runs on",
        handler=snapshot_sandbox,
        body=NewSnapshot,
        answer=Snapshot,
        status=201,
        errors={507: "a disk is full, or all that snapshots may take is taken"},
    ),
    Endpoint(
        method="GET",
        path="/v1/snapshots",
        role=Role.VIEWER,
        summary="List snapshots, newest first, a page at a time",
        handler=list_snapshots,
        query=SnapshotQuery,
        answer=SnapshotPage,
    ),
    Endpoint(
        method="GET",
        path="/v1/snapshots/{id}",
        role=Role.VIEWER,
        summary="Show a snapshot: by its id or name",
        handler=show_snapshot,
        answer=Snapshot,
    ),
    Endpoint(
        method="DELETE",
        path="/v1/snapshots/{id}",
        role=Role.OPERATOR,
        summary="Remove a snapshot that nothing needs",
        handler=remove_snapshot,
        answer=Snapshot,
    ),
)
