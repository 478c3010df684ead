"""`swarm ticket …`: what one can also do with an INSERT and a SELECT, but checked, and with a readable history."""

from __future__ import annotations

import sys
import uuid
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.base.clock import iso
from swarm.cli import sending
from swarm.cli.frame import Cli, command, new_app
from swarm.cli.inputs import (
    Input,
    Inputs,
    Limit,
    NewId,
    Priority,
    Require,
    TicketId,
    Timeout,
    read_inputs,
    required,
    schema_of,
)
from swarm.cli.sending import AllFiles, FileOptions
from swarm.cli.ui import render
from swarm.cli.ui.output import first_line
from swarm.cli.ui.table import Column
from swarm.model import FILES, TERMINAL_TICKET_STATES, BudgetPolicy, ExecutionMode, KeepVm, Ticket, TicketState

if TYPE_CHECKING:
    from swarm.ledger import Limit as Budget
    from swarm.store.store import Store

app = new_app("ticket", "Add, show, wait for, approve, reject, cancel, retry and remove tickets; read their logs.")

_Ids = Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of tickets, or beginnings of generated ones.")]


@command(
    app,
    "add",
    examples=[
        'swarm ticket add "Say hello" --agent echo --input name=world',
        "swarm ticket add Report --agent echo --inputs @inputs.json --id report-7",
        'swarm ticket add Test --agent shell --file repo/=./repo --input commands="cd repo && make test"',
        "swarm ticket add Chain --workflow echo-chain --priority 5",
        'swarm ticket add "Say hello" --agent echo --input name=world --wait',
        "swarm ticket add Publish --workflow release --after report-7 --after tests-7",
        "swarm ticket add Train --agent trainer --require zone=a --require gpu=true",
    ],
    json=True,
)
async def add(
    cli: Cli,
    title: Annotated[str, typer.Argument(metavar="TITLE", help="The task in a few words.")],
    agent: Annotated[
        str | None,
        typer.Option("--agent", "-a", metavar="AGENT", help="Agent to run: name, name@version or id."),
    ] = None,
    workflow: Annotated[
        str | None,
        typer.Option("--workflow", "-w", metavar="WORKFLOW", help="Or workflow to run: name, name@version or id."),
    ] = None,
    description: Annotated[
        str | None, typer.Option("--description", "-d", metavar="TEXT", help="The task in detail.")
    ] = None,
    inputs: Inputs = None,
    input: Input = None,  # noqa: A002
    file: FileOptions = None,
    all_files: AllFiles = False,
    id: NewId = None,
    project: Annotated[
        str | None, typer.Option("--project", metavar="NAME", help="Any text to group tickets by.")
    ] = None,
    priority: Priority = 0,
    timeout: Timeout = None,
    budget_usd: Annotated[
        float | None,
        typer.Option("--budget-usd", metavar="USD", help="Limit for its model calls, retries included.", min=0),
    ] = None,
    budget_tokens: Annotated[
        int | None, typer.Option("--budget-tokens", metavar="N", help="The same in tokens.", min=0)
    ] = None,
    over_budget: Annotated[
        BudgetPolicy | None, typer.Option("--over-budget", help="Then fail, or wait for a person's approval.")
    ] = None,
    keep_vm: Annotated[
        KeepVm | None, typer.Option("--keep-vm", help="Keep its VM after a failure, or always, to look into it.")
    ] = None,
    keep_vm_seconds: Annotated[
        float | None, typer.Option("--keep-vm-seconds", metavar="S", help="For how long. Default: a day.", min=1)
    ] = None,
    require: Require = None,
    after: Annotated[
        list[str] | None,
        typer.Option("--after", metavar="ID", help="Run it when this ticket is done; can be repeated."),
    ] = None,
    draft: Annotated[bool, typer.Option("--draft", help="Add it in state 'draft': it does not run yet.")] = False,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="Wait for its end and print its outputs; if no engine runs, run it here."),
    ] = False,
) -> int:
    """Add a ticket and print its id. Exit status with --wait: 0 if it is done, 1 otherwise."""
    from swarm.errors import UsageError
    from swarm.store import submission

    if wait and draft:
        raise UsageError("a draft does not run, so --wait would wait for ever: leave out one of --draft and --wait")
    async with cli.store() as store:
        runner = await submission.runner(store, agent, workflow)
        given = read_inputs(inputs, None, input, schema_of(*runner))
        needs = [await store.ticket_id(one) for one in after or ()]
        id = id or str(uuid.uuid4())
        uses = 0
        if file:
            given[FILES], uses = await sending.send(store, id, file, all_files=all_files)
        ticket = await store.add_ticket(
            submission.new_ticket(
                *runner,
                id=id,
                title=title,
                description=description,
                inputs=given,
                draft=draft,
                project_id=project,
                priority=priority,
                timeout_seconds=timeout,
                budget_usd=budget_usd,
                budget_tokens=budget_tokens,
                over_budget=over_budget,
                keep_vm=keep_vm,
                keep_vm_seconds=keep_vm_seconds,
                requires=required(require),
            ),
            depends_on=needs,
            uses=uses,
        )
        if not wait:
            cli.out.result(ticket, ticket.id)
            await _say_if_unserved(cli, store, ticket)
    if wait:
        from swarm.cli import follow

        cli.out.note(f"ticket {ticket.id}")
        return await follow.to_the_end(cli, ticket, only_outputs=True)
    return 0


@command(
    app,
    "list",
    examples=["swarm ticket list", "swarm ticket list --state failed --limit 5 --json"],
    json=True,
)
async def list_(
    cli: Cli,
    state: Annotated[
        list[TicketState] | None,
        typer.Option(
            "--state", "-s", metavar="STATE", help=f"Only in this state, of {', '.join(TicketState)}; can be repeated."
        ),
    ] = None,
    project: Annotated[str | None, typer.Option("--project", metavar="NAME", help="Only of this project.")] = None,
    limit: Limit = 50,
) -> None:
    """List tickets, newest first: without descriptions, inputs and outputs, which `swarm ticket show` has."""

    async with cli.store() as store:
        tickets = await store.ticket_summaries(states=tuple(state or ()), project_id=project, limit=limit)
        names = await store.names({ref for t in tickets for ref in (t.agent_id, t.assignee_id, t.workflow_id)})
    rows = [(t.id, t.state, t.title, render.runs(t, names), t.created_at, first_line(t.error)) for t in tickets]
    columns = (
        "ID", "STATE", Column("TITLE", least=8), Column("RUNS", drop=3, least=8), Column("CREATED", drop=2),
        Column("ERROR", drop=1, least=16),
    )  # fmt: skip
    cli.out.listing(tickets, columns, rows, empty="no tickets")


@command(app, "show", examples=["swarm ticket show test-echo-002", "swarm ticket show test-echo-002 --json"], json=True)
async def show(cli: Cli, id: TicketId) -> None:
    """Show a ticket: its task, its result, each step or attempt, and where its time went."""

    async with cli.store() as store:
        id = await store.ticket_id(id)
        found = await store.details(id)
        ticket = found.ticket
        await _say_if_unserved(cli, store, ticket)
        names = await store.names((ticket.agent_id, ticket.workflow_id))
        ready = await store.next_steps(id)
        elsewhere = await store.elsewhere(id)
        waits = [said for step in ready if (said := step.waits_for_host)] + list(map(str, elsewhere))
        in_queue = ticket.state == TicketState.READY or any(step.in_ms is None and not step.host for step in ready)
        if in_queue and not elsewhere:
            waits += await _engines_wait(store)
    if cli.out.json:
        cli.out.dump(found)
        return
    render.show_ticket(cli.out, ticket, names)
    if found.estimated.calls:
        counted = render.counted(found.estimated.calls, "model call")
        cli.out.line(f"estimated: {counted} (${found.estimated.usd:.4f}); `swarm ticket logs {id} --json` says why")
    if ticket.execution_mode == ExecutionMode.WORKFLOW or ticket.state == TicketState.WAITING:
        render.show_steps(cli.out, ticket, found.runs, found.steps)
    for said in waits:
        cli.out.line(said)
    for one in {one.step_id: one for one in reversed(found.kept)}.values():  # the newest of each step
        until = f" until {iso(one.expires_at)}" if one.expires_at is not None else ""
        which = f" --step '{one.step_id}'" if ticket.execution_mode == ExecutionMode.WORKFLOW else ""
        cli.out.line(f"its VM is kept{until}: `swarm ticket shell {ticket.id}{which}`")
    if not found.complete:
        cli.out.note("not all is shown: these are the newest; the dashboard has the whole run as a graph")
    if ticket.execution_mode == ExecutionMode.WORKFLOW:
        return
    for number, attempt in enumerate(found.attempts, 1):
        cli.out.line()
        vm = "" if attempt.vm_id is None else f", VM {attempt.vm_id}"
        cli.out.line(f"attempt {number}: {attempt.outcome or 'running'}{vm}, by {attempt.worker}")
        if attempt.error and attempt.error != ticket.error:
            cli.out.fields({"  error": render.shorten(attempt.error)})
        if attempt.api_tokens_used:
            cli.out.line(f"  model calls: {attempt.api_tokens_used:,} tokens, ${attempt.cost_usd:.4f}")
        render.show_timings(cli.out, attempt.timings)


@command(
    app,
    "logs",
    examples=["swarm ticket logs test-echo-002", "swarm ticket logs -f test-echo-002", "swarm ticket logs t-1 --json"],
    json=True,
)
async def logs(
    cli: Cli,
    id: TicketId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Continue until the ticket has ended.")] = False,
) -> int:
    """Print what the ticket's agents printed; with --json, all of its events, one per line.

    With --follow, the exit status is 0 if the ticket is done, 1 if it failed or was cancelled.
    """
    from contextlib import AsyncExitStack

    from swarm.cli.follow import Output, say_if_unserved, status

    async with cli.store() as store, AsyncExitStack() as stack:
        wake = await stack.enter_async_context(store.watching()) if follow else None
        id = await store.ticket_id(id)
        output = Output(cli, store, id, write=sys.stdout.write)
        told = False
        while True:
            ticket = await store.ticket(id)  # read before its events, since it has none after its end
            await output.more()
            ended = ticket.state in TERMINAL_TICKET_STATES
            if wake is None or ended:
                output.end()
            sys.stdout.flush()
            if wake is None:
                return 0
            if ended:
                return status(cli, ticket)
            if not told:
                told = True
                await say_if_unserved(cli, store, ticket)
            await wake.changed(timeout_seconds=60.0)


@command(
    app,
    "wait",
    examples=["swarm ticket wait report-7", "swarm ticket wait report-7 report-8 --timeout 600 && make publish"],
    json=True,
)
async def wait_(
    cli: Cli,
    ids: _Ids,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0, metavar="S", help="Wait at most this many seconds.")
    ] = None,
) -> int:
    """Wait until tickets have ended, and print how. Exit status 0 if all are done, 1 otherwise.

    1 means that one failed, was cancelled or deleted, or that --timeout came first.
    """
    from swarm.cli import follow

    return await follow.all_ended(cli, ids, timeout_seconds=timeout)


@command(app, "ready", examples=["swarm ticket ready report-7"], json=True)
async def ready(cli: Cli, id: TicketId) -> None:
    """Let a draft run."""

    async with cli.store() as store:
        id = await store.ticket_id(id)
        await store.make_ready(id, by=cli.user)
        ticket = await store.ticket(id)
        _show_state(cli, ticket)
        await _say_if_unserved(cli, store, ticket)


@command(app, "rm", examples=["swarm ticket rm report-7", "swarm ticket rm report-7 report-8 --force"], json=True)
async def rm(
    cli: Cli,
    ids: _Ids,
    force: Annotated[
        bool, typer.Option("--force", help="Also one that runs (it is cancelled) or that others depend on (they fail).")
    ] = False,
) -> None:
    """Remove tickets, with their runs, outputs and files. All of these tickets, or none.

    It is what a DELETE of the row does: their events stay until `swarm prune`, and files that other tickets use stay.
    """

    async with cli.store() as store:
        found = list(dict.fromkeys([await store.ticket_id(id) for id in ids]))
        await store.remove_tickets(found, force=force, by=cli.user)
    if cli.out.json:
        cli.out.dump({"removed": found})
        return
    for id in found:
        cli.out.line(f"removed {id}")


@command(app, "cancel", examples=["swarm ticket cancel report-7"], json=True)
async def cancel(cli: Cli, id: TicketId) -> None:
    """Cancel a ticket. If it runs, its VM is killed within two seconds."""

    async with cli.store() as store:
        id = await store.ticket_id(id)
        await store.cancel(id, cli.user)
        _show_state(cli, await store.ticket(id))


@command(
    app, "retry", examples=["swarm ticket retry report-7", "swarm ticket retry release-3 --from publish"], json=True
)
async def retry(
    cli: Cli,
    id: TicketId,
    step: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="STEP",
            help="In a workflow, run only this step and those that depend on it. STEP[3] is one item of a for_each.",
        ),
    ] = None,
) -> None:
    """Run a failed or cancelled ticket again, from its start or from a step. Its earlier runs stay as history.

    With --from, steps that were interrupted or that made the run fail run again too, and the ticket may also be done.
    """

    async with cli.store() as store:
        id = await store.ticket_id(id)
        await store.retry(id, step=step, by=cli.user)
        ticket = await store.ticket(id)
        _show_state(cli, ticket)
        await _say_if_unserved(cli, store, ticket)


_Step = Annotated[str | None, typer.Option("--step", metavar="STEP", help="The step, if several wait.")]
_By = Annotated[
    str | None, typer.Option("--by", metavar="WHO", help="Who answers. Default: the user who runs this command.")
]


@command(
    app,
    "approve",
    examples=["swarm ticket approve release-3", "swarm ticket approve release-3 --step publish --by ann --why checked"],
    json=True,
)
async def approve(
    cli: Cli,
    id: TicketId,
    step: _Step = None,
    by: _By = None,
    why: Annotated[str, typer.Option("--why", metavar="TEXT", help="A reason, kept with the answer.")] = "",
    budget_usd: Annotated[
        float | None,
        typer.Option("--budget-usd", metavar="USD", help="Raise the ticket's budget to this, if it is used up."),
    ] = None,
    budget_tokens: Annotated[
        int | None, typer.Option("--budget-tokens", metavar="N", help="The same in tokens.")
    ] = None,
) -> None:
    """Approve the step that waits for a person."""
    from swarm.ledger import Limit as Budget

    budget = Budget(usd=budget_usd, tokens=budget_tokens)
    await _answer(cli, id, step, approved=True, by=by, why=why, budget=budget)


@command(app, "reject", examples=['swarm ticket reject release-3 --why "not before Monday"'], json=True)
async def reject(
    cli: Cli,
    id: TicketId,
    why: Annotated[str, typer.Option("--why", metavar="TEXT", help="The reason, kept with the answer.")],
    step: _Step = None,
    by: _By = None,
) -> None:
    """Reject the step that waits for a person: it fails, and its error says who rejected it and why."""
    await _answer(cli, id, step, approved=False, by=by, why=why)


async def _answer(
    cli: Cli, id_: str, step: str | None, *, approved: bool, by: str | None, why: str, budget: Budget | None = None
) -> None:

    async with cli.store() as store:
        who = by or cli.user
        id_ = await store.ticket_id(id_)
        answered = await store.answer(id_, step=step, approved=approved, by=who, why=why, budget=budget)
        ticket = await store.ticket(id_)
        answer = "approved" if approved else "rejected"
        line = f"step {answered} is {answer}; ticket {ticket.id} is {ticket.state}"
        cli.out.result({"ticket": ticket, "step": answered}, line)
        await _say_if_unserved(cli, store, ticket)


async def _engines_wait(store: Store) -> list[str]:
    """Why engines start nothing more."""
    from swarm.store.registry.workers import is_alive

    reasons = {str(one.info.get("waits_for") or "")[:500] for one in await store.workers() if is_alive(one)}
    return [f"it is in the queue, and the engine waits for {reason}" for reason in sorted(reasons - {""})]


async def _say_if_unserved(cli: Cli, store: Store, ticket: Ticket) -> None:
    from swarm.cli.follow import say_if_unserved

    sys.stdout.flush()
    await say_if_unserved(cli, store, ticket)


def _show_state(cli: Cli, ticket: Ticket) -> None:
    cli.out.result(ticket, f"ticket {ticket.id} is {ticket.state}")
