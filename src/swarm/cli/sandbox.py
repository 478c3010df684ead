"""`swarm sandbox …`: VMs that stay: made, used again and again, paused, forked, ended. docs/sandboxes.md"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final

import typer

from swarm.base.aio import finish_uninterrupted
from swarm.cli.frame import Cli, command, new_app
from swarm.cli.inputs import Limit, Require, required
from swarm.cli.ui.output import first_line
from swarm.cli.ui.table import Column
from swarm.errors import Conflict, SwarmError
from swarm.model import TERMINAL_SANDBOX_STATES, SandboxState

if TYPE_CHECKING:
    from swarm.live.client import Live
    from swarm.model import Event, Sandbox, Snapshot
    from swarm.store.store import Store

app = new_app("sandbox", "Make VMs that stay; run commands, move files, open shells in them; pause, fork and end them.")

Id = Annotated[str, typer.Argument(metavar="ID", help="The sandbox's name or id, or the beginning of its id.")]
_MAX_EVENTS: Final = 10_000
Ids = Annotated[list[str], typer.Argument(metavar="ID...", help="Names or ids of sandboxes.")]


@command(
    app,
    "create",
    examples=[
        "swarm sandbox create",
        "swarm sandbox create build --memory 1024 --net allow:pypi.org,files.pythonhosted.org --ttl 8h",
        "swarm sandbox create --agent claude-code --secret DEPLOY_KEY --budget-usd 2 --idle 10m",
        "swarm sandbox create try --from prepared",
        "swarm sandbox create train --require zone=a --require gpu=true",
    ],
    json=True,
)
async def create(
    cli: Cli,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A name, unique among those that live.")] = None,
    agent: Annotated[
        str | None, typer.Option("--agent", "-a", metavar="AGENT", help="Like the VM of this agent, with its files.")
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", metavar="IMAGE", help="The guest image. Default: the agent's, or Swarm's.")
    ] = None,
    snapshot: Annotated[
        str | None, typer.Option("--from", metavar="SNAPSHOT", help="Begin as this snapshot is: its name or id.")
    ] = None,
    memory: Annotated[int | None, typer.Option("--memory", metavar="MB", help="Its memory.")] = None,
    cpus: Annotated[int | None, typer.Option("--cpus", metavar="N", help="Its virtual CPUs.")] = None,
    disk: Annotated[int | None, typer.Option("--disk", metavar="MB", help="The size of its work disk.")] = None,
    net: Annotated[
        str | None,
        typer.Option("--net", metavar="POLICY", help="What it may reach: none, open, gateway, allow:DOMAIN,…"),
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", "-e", metavar="NAME[=VALUE]", help="A variable of all its programs.")
    ] = None,
    secret: Annotated[
        list[str] | None, typer.Option("--secret", metavar="NAME", help="A secret of Swarm's, as a variable.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="NAME=TEXT", help="To find it by; can be repeated.")
    ] = None,
    project: Annotated[str | None, typer.Option("--project", metavar="NAME", help="Text to group by.")] = None,
    ttl: Annotated[
        str, typer.Option("--ttl", metavar="AGE", help="It ends after so long, such as 8h or 2d. Default: never.")
    ] = "",
    idle: Annotated[
        str, typer.Option("--idle", metavar="AGE", help="It pauses when it was not used for so long, such as 10m.")
    ] = "",
    budget_usd: Annotated[
        float | None, typer.Option("--budget-usd", metavar="USD", min=0, help="Limit for its model calls.")
    ] = None,
    budget_tokens: Annotated[
        int | None, typer.Option("--budget-tokens", metavar="N", min=0, help="The same in tokens.")
    ] = None,
    require: Require = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when it runs, or at once.")] = True,
) -> None:
    """Make a sandbox, and print its id. An engine must run: it holds the VM."""
    from swarm.admin import sandboxes
    from swarm.base.clock import age_seconds
    from swarm.cli.remote import variables
    from swarm.model import Sandbox

    given, labels = variables(env or []), _labels(label)
    async with cli.store() as store:
        one = Sandbox(
            id="",
            state=SandboxState.STARTING,
            name=name,
            project_id=project,
            agent_id=(await store.agent(agent)).id if agent else None,
            image=image,
            snapshot_id=(await store.snapshot(snapshot)).id if snapshot else None,
            memory_mb=memory,
            vcpus=cpus,
            disk_mb=disk,
            network=net,
            secrets=json.dumps(secret) if secret else None,
            env=json.dumps(given) if given else None,
            labels=json.dumps(labels) if labels else None,
            ttl_seconds=age_seconds(ttl) if ttl else None,
            idle_timeout_seconds=age_seconds(idle) if idle else None,
            budget_usd=budget_usd,
            budget_tokens=budget_tokens,
            requires=required(require),
        )
        made = await store.add_sandbox(one, by=cli.user)
        if wait:
            try:
                made = await sandboxes.started(store, made.id, say=cli.out.note)
            except (Conflict, asyncio.CancelledError):  # nothing starts behind an error, or Ctrl+C
                with contextlib.suppress(SwarmError):  # it has ended by itself, with what was wrong
                    await finish_uninterrupted(store.want_sandbox(made.id, SandboxState.ENDED, by=cli.user))
                raise
            if made.host != await store.this_host():
                cli.out.note(f"it is on the host {made.host}, and can be used there")
    cli.out.result(made, made.name or made.id)


@command(app, "list", examples=["swarm sandbox list", "swarm sandbox list --all --json"], json=True)
async def list_(
    cli: Cli,
    all_: Annotated[bool, typer.Option("--all", help="Those that have ended or are lost, too.")] = False,
    state: Annotated[
        list[SandboxState] | None,
        typer.Option("--state", "-s", metavar="STATE", help=f"Only in this state, of {', '.join(SandboxState)}."),
    ] = None,
    project: Annotated[str | None, typer.Option("--project", metavar="NAME", help="Only of this project.")] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="NAME=TEXT", help="Only those with this label.")
    ] = None,
    limit: Limit = 50,
) -> None:
    """List sandboxes that have not ended and are not lost, newest first."""
    from swarm.store.sandboxes.sandboxes import SandboxFilter

    states = tuple(state or (() if all_ else (one for one in SandboxState if one not in TERMINAL_SANDBOX_STATES)))
    which = SandboxFilter(states=states, project_id=project, labels=_labels(label))
    found: list[Sandbox] = []
    async with cli.store() as store:
        after = None
        while len(found) < limit:
            page = await store.sandbox_page(which, after=after, limit=limit - len(found))
            found += page.sandboxes
            if (after := page.after) is None:
                break
        names = await store.names({one.agent_id for one in found})
    rows = [
        (
            one.name or "", one.id, one.state, names.get(one.agent_id or "", one.agent_id or "").partition("@")[0],
            f"{one.memory_mb} MB" if one.memory_mb else "", one.used_at or one.created_at, first_line(one.error),
        )
        for one in found
    ]  # fmt: skip
    columns = (
        *name_and_id(found), "STATE", Column("AGENT", drop=3), Column("MEMORY", drop=2, right=True),
        Column("USED", drop=4), Column("ERROR", drop=1, least=16),
    )  # fmt: skip
    cli.out.listing(found, columns, rows, empty="no sandboxes")


@command(app, "show", examples=["swarm sandbox show build", "swarm sandbox show build --json"], json=True)
async def show(
    cli: Cli,
    id: Id,
    events: Annotated[int, typer.Option("--events", min=0, metavar="N", help="How many of its latest events.")] = 20,
) -> None:
    """Show a sandbox: what it is, what it may do, what it cost, and what was done in it."""
    from swarm.cli.ui import sandbox_view

    async with cli.store() as store:
        one = await store.sandbox(id)
        story = await _story(store, one.id)
        costs = await store.sandbox_costs(one.id)
        names = await store.names((one.agent_id,))
    if cli.out.json:
        cli.out.dump({"sandbox": one, "events": story, "cost": costs})
        return
    sandbox_view.show(cli.out, one, story[-events:] if events else [], costs, names)
    if len(story) > events:
        cli.out.note(f"{len(story) - events} earlier events: --events shows more, --json all")


async def _story(store: Store, id: str) -> list[Event]:
    found: list[Event] = []
    while more := await store.sandbox_events(id, after=found[-1].seq if found else 0):
        found += more
        if len(found) >= _MAX_EVENTS:
            break
    return found


@command(app, "pause", examples=["swarm sandbox pause build"])
async def pause(cli: Cli, ids: Ids) -> None:
    """Put sandboxes to sleep: what they were is kept on disk, and takes no memory. The next use wakes them."""
    from swarm.admin import sandboxes

    async with cli.store() as store:
        for one in [await store.sandbox(id) for id in ids]:  # all are there, before one is touched
            now = await sandboxes.pause(store, one.id, by=cli.user)
            cli.out.line(f"{one.name or one.id} is {now.state}")


@command(app, "resume", examples=["swarm sandbox resume build"])
async def resume(cli: Cli, ids: Ids) -> None:
    """Wake sandboxes, ahead of their next use."""
    async with cli.store() as store:
        for one in [await store.sandbox(id) for id in ids]:
            await live_of(cli, store, one.id)
            cli.out.line(f"{one.name or one.id} is running")


@command(app, "rm", examples=["swarm sandbox rm build", "swarm sandbox rm build try-1 try-2"])
async def rm(cli: Cli, ids: Ids) -> None:
    """End sandboxes: what is in them is gone. Their stories and snapshots stay."""
    from swarm.admin import sandboxes

    async with cli.store() as store:
        for one in [await store.sandbox(id) for id in ids]:
            now = await sandboxes.end(store, one.id, by=cli.user)
            cli.out.line(f"{one.name or one.id} {'has ended' if now.state in TERMINAL_SANDBOX_STATES else 'is ending'}")


@command(
    app,
    "fork",
    examples=["swarm sandbox fork build", "swarm sandbox fork build try --count 3", "swarm sandbox fork build --json"],
    json=True,
)
async def fork(
    cli: Cli,
    id: Id,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Of the fork; of several, NAME-1, NAME-2 and so on.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, max=1000, metavar="N", help="How many forks.")] = 1,
) -> None:
    """Make sandboxes that start as this one is now: files, memory and programs. It goes on after a short pause.

    A fork has its own randomness, clock, machine id, host name, keys, address and gateway token. Connections that were
    open are closed in it.
    """
    async with cli.store() as store:
        one = await store.sandbox(id)
        live = await live_of(cli, store, one.id)
        ids = await live.fork(count=count, name=name)
        forks = [await store.sandbox(each) for each in ids]
    if cli.out.json:
        cli.out.dump(forks)
        return
    for each in forks:
        cli.out.line(each.name or each.id)


@command(
    app,
    "snapshot",
    examples=["swarm sandbox snapshot build prepared --keep 30d", "swarm sandbox create try --from prepared"],
    json=True,
)
async def snapshot(
    cli: Cli,
    id: Id,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A name for the snapshot.")] = None,
    keep: Annotated[
        str, typer.Option("--keep", metavar="AGE", help="For how long, such as 30d. Default: until it is removed.")
    ] = "",
    without_secrets: Annotated[
        bool, typer.Option("--without-secrets", help="Only if no secret was given to it: its memory could hold one.")
    ] = False,
) -> None:
    """Keep what a sandbox is now: memory, programs and disk. It goes on after a short pause.

    Whoever reads its files, which only this user can, reads all that was in memory, secrets too.
    """
    from swarm.base.clock import age_seconds

    async with cli.store() as store:
        one = await store.sandbox(id)
        live = await live_of(cli, store, one.id)
        made = await live.snapshot(
            name=name, keep_seconds=age_seconds(keep) if keep else None, without_secrets=without_secrets
        )
        found = await store.snapshot(made)
    cli.out.result(found, found.name or found.id)


async def live_of(cli: Cli, store: Store, id: str) -> Live:
    """The way to its guest, once it runs; a paused one is woken. Raises SwarmError."""
    from swarm.admin import sandboxes

    return await sandboxes.reach(store, id, by=cli.user)


def name_and_id(found: Sequence[Sandbox | Snapshot]) -> tuple[Column, Column]:
    """NAME and ID: where there is no room for both, the id leaves; if one has no name, names are shortened."""
    named = all(one.name for one in found)
    return (Column("NAME"), Column("ID", drop=6)) if named else (Column("NAME", least=8), Column("ID"))


def _labels(given: list[str] | None) -> dict[str, str]:
    """Raises UsageError."""
    from swarm.errors import UsageError

    found = {}
    for one in given or ():
        name, equals, text = one.partition("=")
        if not equals or not name:
            raise UsageError(f"--label {one!r}: write NAME=TEXT")
        found[name] = text
    return found


# --- snapshots --------------------------------------------------------------------------------------------------------

snapshots = new_app("snapshot", "List and remove what VMs were at one moment: `swarm sandbox snapshot` makes them.")


@command(snapshots, "list", examples=["swarm snapshot list", "swarm snapshot list --json"], json=True)
async def list_snapshots(
    cli: Cli,
    project: Annotated[str | None, typer.Option("--project", metavar="NAME", help="Only of this project.")] = None,
    limit: Limit = 50,
) -> None:
    """List the snapshots of sandboxes, of steps, and of tickets whose VM was kept; newest first."""
    from swarm.base.clock import iso
    from swarm.cli.ui import render
    from swarm.store.sandboxes.snapshots import SnapshotFilter

    async with cli.store() as store:
        found = (await store.snapshot_page(SnapshotFilter(project_id=project), limit=limit)).snapshots
    rows = [
        (
            one.name or "", one.id, one.kind, one.sandbox_id or one.ticket_id or "", render.size(one.size_bytes),
            "maybe" if one.secrets else "none", one.created_at, iso(one.expires_at) if one.expires_at else "",
        )
        for one in found
    ]  # fmt: skip
    columns = (
        *name_and_id(found), "KIND", Column("OF", drop=5, least=8), Column("SIZE", drop=4, right=True),
        Column("SECRETS", drop=1), Column("MADE", drop=3), Column("UNTIL", drop=2),
    )  # fmt: skip
    cli.out.listing(found, columns, rows, empty="no snapshots")


@command(snapshots, "rm", examples=["swarm snapshot rm prepared"])
async def rm_snapshots(
    cli: Cli,
    refs: Annotated[list[str], typer.Argument(metavar="SNAPSHOT...", help="Names or ids.")],
) -> None:
    """Remove snapshots. Refused while a sandbox or a run may still start from one."""
    async with cli.store() as store:
        for ref in refs:
            removed = await store.remove_snapshot(ref, by=cli.user)
            cli.out.line(f"removed {removed.name or removed.id}")
