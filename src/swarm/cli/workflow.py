"""`swarm workflow …`: check, draw, register and run workflows. docs/workflows.md tells how to write one."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli import sending
from swarm.cli.frame import Cli, command, new_app
from swarm.cli.inputs import (
    Input,
    InputJson,
    Inputs,
    NewId,
    Priority,
    Require,
    Timeout,
    read_inputs,
    required,
    schema_of,
)
from swarm.cli.sending import AllFiles, FileOptions
from swarm.cli.ui import render
from swarm.cli.ui.table import Column

if TYPE_CHECKING:
    from swarm.store.registry.schedules import ScheduleRow
    from swarm.store.store import Store
    from swarm.workflow.definition import Schedule, Workflow

app = new_app("workflow", "Write, check, draw, register, show, run, enable, disable and remove workflows.")

_File = Annotated[Path, typer.Argument(metavar="FILE", help="A workflow file.")]
_Ref = Annotated[str, typer.Argument(metavar="WORKFLOW", help="Name, name@version or id.")]


@command(app, "init", examples=["swarm workflow init release"])
async def init(
    cli: Cli, name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the workflow, and of the new file.")]
) -> None:
    """Write a new workflow, ready to run and change, into the file NAME.yaml."""
    from swarm import workflow

    file = Path(f"{name}.yaml")
    _write_new(file, workflow.template(name))
    cli.out.line(f"wrote {file}; change it, then run `swarm workflow validate {file}` and `swarm workflow add {file}`")


@command(app, "validate", examples=["swarm workflow validate release.yaml"], json=True)
async def validate(cli: Cli, file: _File) -> int:
    """Check a file against the registered agents and workflows. Prints every problem with line and column."""
    from swarm.base.manifest import Invalid

    async with cli.store() as store:
        try:
            found = await _from_file(store, file)
        except Invalid as error:
            if not cli.out.json:
                raise
            cli.out.dump({"valid": False, "problems": error.problems})
            return error.exit_status
    count = sum(1 for _ in found.all_steps())
    line = f"{file}: {found.name} {found.version} is valid, {render.counted(count, 'step')}"
    cli.out.result({"valid": True, "problems": []}, line)
    return 0


@command(
    app,
    "graph",
    examples=[
        "swarm workflow graph release.yaml",
        "swarm workflow graph echo-chain --mermaid",
        "swarm workflow graph fan-out-demo --svg fan-out.svg",
    ],
)
async def graph(
    cli: Cli,
    source: Annotated[str, typer.Argument(metavar="FILE|WORKFLOW", help="A file or a registered workflow.")],
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Write a picture to this file.")] = None,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Print a Mermaid diagram.")] = False,
) -> None:
    """Draw a workflow, one step per line. Steps with equal numbers may run at the same time."""
    from swarm.errors import UsageError
    from swarm.workflow import graph as draw

    async with cli.store() as store:
        if "/" in source or Path(source).is_file():
            found = await _from_file(store, Path(source))
        else:
            found = (await store.workflow(source)).parsed()
    if svg is not None:
        try:
            svg.write_text(draw.svg(found), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--svg {svg}: {error.strerror}") from None
    if mermaid:
        cli.out.text(draw.mermaid(found))
    elif svg is None:
        cli.out.text(draw.text(found))


@command(app, "add", examples=["swarm workflow add release.yaml"], json=True)
async def add(cli: Cli, file: _File) -> None:
    """Check a workflow file and register it.

    Registering it again changes nothing; other content with a registered version is refused.
    """
    from swarm.admin import packages

    async with cli.store() as store:
        row = await packages.add_workflow(store, _read(file), name=str(file), by=cli.user)
    cli.out.result(row, f"{row.name}@{row.version}, id {row.id}")


@command(app, "list", examples=["swarm workflow list", "swarm workflow list --json"], json=True)
async def list_(cli: Cli) -> None:
    """List the registered workflows."""

    async with cli.store() as store:
        found = await store.workflows()
    rows = [(w.name, w.version, w.id, "enabled" if w.enabled else "disabled", w.description) for w in found]
    columns = ("NAME", "VERSION", Column("ID", drop=2), "STATE", Column("DESCRIPTION", drop=1, least=16))
    cli.out.listing(found, columns, rows, empty="no workflows: run `swarm init`")


@command(app, "show", examples=["swarm workflow show echo-chain", "swarm workflow show echo-chain@1 --json"], json=True)
async def show(cli: Cli, workflow: _Ref) -> None:
    """Show a workflow: its inputs, its steps, what starts it; with --json, its whole definition."""
    from swarm.base.plain import plain
    from swarm.workflow import graph as draw
    from swarm.workflow.definition import to_json

    async with cli.store() as store:
        row, schedules = await store.workflow(workflow), await store.schedules()
    found = row.parsed()
    if cli.out.json:
        cli.out.dump(plain(row) | {"definition": to_json(found)})
        return
    times = {one.number: one for one in schedules if one.workflow_id == row.id}
    properties = (found.inputs_schema or {}).get("properties") or {}
    required = (found.inputs_schema or {}).get("required") or ()
    cli.out.fields(
        {
            "workflow": f"{row.name}@{row.version}",
            "id": row.id,
            "state": "enabled" if row.enabled else "disabled",
            "description": row.description or None,
            "inputs": ", ".join(name if name in required else f"{name}?" for name in properties) or None,
            "outputs": ", ".join(found.outputs or ()) or None,
            "schedule": "\n".join(_timetable(one, times.get(n)) for n, one in enumerate(found.schedule)) or None,
            "webhook": found.webhook and f"POST /hooks/{row.name}, signed with {found.webhook.secret}",
            "added": row.created_at,
            "steps": draw.text(found).partition("\n")[2].rstrip(),
        }
    )


def _timetable(one: Schedule, row: ScheduleRow | None) -> str:
    """A schedule has no row if a newer version of the workflow is registered."""
    text = f"{one.cron} ({one.time_zone})"
    return f"{text}, next {row.next_at}" if row is not None and row.next_at else text


@command(app, "schedules", examples=["swarm workflow schedules", "swarm workflow schedules --json"], json=True)
async def schedules(cli: Cli) -> None:
    """List the schedules of workflows: next and last time, last ticket, and how many times were missed.

    Only the newest version of each workflow counts, and only while it is enabled.
    """

    async with cli.store() as store:
        found = await store.schedules()
    rows = [
        (one.workflow, one.cron, one.time_zone, one.next_at or one.error or "disabled", one.last_at,
         one.last_ticket_id, one.missed_count or None)
        for one in found
    ]  # fmt: skip
    columns = (
        "WORKFLOW", Column("CRON", drop=4), Column("ZONE", drop=2), Column("NEXT", least=16), Column("LAST", drop=3),
        Column("TICKET", drop=1), Column("MISSED", drop=5, right=True),
    )  # fmt: skip
    cli.out.listing(found, columns, rows, empty="no workflow has a schedule")


@command(
    app,
    "webhook",
    examples=["swarm workflow webhook nightly", "swarm workflow webhook nightly --new"],
    json=True,
)
async def webhook(
    cli: Cli,
    workflow: _Ref,
    new: Annotated[bool, typer.Option("--new", help="Replace the secret; the old one is no longer accepted.")] = False,
) -> None:
    """Create the secret that senders sign this workflow's webhook with, and show it once."""
    from swarm.app import serve
    from swarm.errors import UsageError

    async with cli.store() as store:
        row = await store.workflow(workflow)
    hook = row.parsed().webhook
    if hook is None:
        raise UsageError(f"the workflow {row.name}@{row.version} has no `webhook:` in its file")
    secret = await serve.new_secret(cli.settings, hook.secret, row.name, replace=new)
    if cli.out.json:
        cli.out.dump({"path": f"/hooks/{row.name}", "name": hook.secret, "secret": secret, "header": hook.header})
        return
    cli.out.fields({"path": f"POST /hooks/{row.name}", "name": hook.secret, "secret": secret, "header": hook.header})
    cli.out.note("The secret is not shown again. `swarm serve` accepts requests that are signed with it.")


@command(
    app,
    "run",
    examples=[
        "swarm workflow run echo-chain --input message=hi",
        "swarm workflow run fix-until-green@1 --input-json inputs.json --wait",
    ],
    json=True,
)
async def run(
    cli: Cli,
    workflow: _Ref,
    inputs: Inputs = None,
    input_json: InputJson = None,
    input: Input = None,  # noqa: A002
    file: FileOptions = None,
    all_files: AllFiles = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow it until it has ended; if no engine runs, run it here.")
    ] = False,
    id: NewId = None,
    priority: Priority = 0,
    timeout: Timeout = None,
    require: Require = None,
) -> int:
    """Run a workflow: add a ticket for it and print its id. Exit status with --wait: 0 if it is done, 1 otherwise."""
    from swarm.admin import runs
    from swarm.cli import follow
    from swarm.model import FILES

    async with cli.store() as store:
        row = await store.workflow(workflow)
        given = read_inputs(inputs, input_json, input, schema_of(None, row))
        runs.check(row, given)
        id, by, uses = id or str(uuid.uuid4()), cli.user, 0
        if file:
            given[FILES], uses = await sending.send(store, id, file, all_files=all_files)
        new = runs.ticket(
            row, given, id=id, by=by, priority=priority, timeout_seconds=timeout, requires=required(require)
        )
        ticket = await store.add_ticket(new, uses=uses, by=by)
        if not wait:
            cli.out.result(ticket, ticket.id)
            sys.stdout.flush()
            await follow.say_if_unserved(cli, store, ticket)
    return await follow.to_the_end(cli, ticket) if wait else 0


@command(app, "rm", examples=["swarm workflow rm release@1.2.0"], json=True)
async def rm(cli: Cli, workflow: _Ref) -> None:
    """Remove a workflow. Refused while an unfinished ticket, a schedule or another workflow needs it.

    Runs that have ended keep their history. Without @VERSION it is the newest one, and the one before it, if there is
    one, becomes the newest: its schedule counts again, unless it is disabled.
    """
    from swarm.admin import packages

    async with cli.store() as store:
        removed = await packages.remove_workflow(store, workflow, by=cli.user)
    cli.out.result(removed, f"removed {removed.name}@{removed.version}")


@command(app, "enable", examples=["swarm workflow enable echo-chain"])
async def enable(cli: Cli, workflow: _Ref) -> None:
    """Enable a workflow: new runs may start."""
    await _enable(cli, workflow, enabled=True)


@command(app, "disable", examples=["swarm workflow disable echo-chain"])
async def disable(cli: Cli, workflow: _Ref) -> None:
    """Disable a workflow: no new runs start. It stays registered."""
    await _enable(cli, workflow, enabled=False)


async def _enable(cli: Cli, workflow: str, *, enabled: bool) -> None:
    async with cli.store() as store:
        row = await store.enable_workflow(workflow, enabled=enabled, by=cli.user)
    cli.out.line(f"{row.name}@{row.version} is {'enabled' if row.enabled else 'disabled'}")


async def _from_file(store: Store, file: Path) -> Workflow:
    from swarm.admin import packages

    return await packages.checked_workflow(store, _read(file), name=str(file))


def _write_new(file: Path, text: str) -> None:
    from swarm.errors import Conflict, UsageError

    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(text)
    except FileExistsError:
        raise Conflict(f"{file} exists: choose another name, or remove it") from None
    except OSError as error:
        raise UsageError(f"{file} can't be written: {error.strerror}") from None


def _read(file: Path) -> bytes:
    from swarm.errors import UsageError

    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file} can't be read: {error.strerror}") from None
