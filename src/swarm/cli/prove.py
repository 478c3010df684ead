"""`swarm prove` checks that every promise was kept; `swarm prune` removes the old records that it checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from swarm.base.clock import age_seconds, moment
from swarm.base.plain import plain
from swarm.cli.frame import Cli, command
from swarm.cli.ui.output import Out
from swarm.cli.ui.render import counted

if TYPE_CHECKING:
    from swarm.admin.prove import Report
    from swarm.config import Settings

_SHOWN = 50  # violations; --json prints all


def register(app: typer.Typer) -> None:
    """Add the commands to `swarm`."""
    command(app, examples=["swarm prune --older-than 30d", "swarm prune --older-than 12h"], json=True)(prune)
    command(app, "prove", examples=["swarm prove", "swarm prove --since 24h", "swarm prove --json"], json=True)(prove_)


async def prune(
    cli: Cli,
    older_than: Annotated[
        str,
        typer.Option(
            "--older-than",
            metavar="AGE",
            help="Remove events older than this, such as 30d, 12h or 90m.",
            show_default=False,
        ),
    ],
) -> None:
    """Remove old events (logs, transitions) of ended tickets and sandboxes. The tickets stay, such sandboxes go."""

    seconds = age_seconds(older_than)
    async with cli.store() as store:
        removed = await store.prune(seconds)
    cli.out.result({"removed": removed}, f"removed {counted(removed, 'event')}")


async def prove_(
    cli: Cli,
    since: Annotated[
        str, typer.Option("--since", metavar="WHEN", help="Only since this time (UTC) or age: 2026-01-31, 7d, 12h.")
    ] = "",
) -> int:
    """Check the log of events against the tables: was anything lost, done twice or leaked?

    Prints the id of each violation. Exit status 1 if there are any.
    """
    report = await prove(cli.settings, moment(since))
    show(cli.out, report)
    return 0 if report.kept else 1


async def prove(settings: Settings, since: str = "") -> Report:
    from swarm.admin import prove as proof
    from swarm.app import wiring
    from swarm.store.registry.workers import is_alive
    from swarm.vm.slots.inventory import Kind

    vms = [
        proof.VmFact(
            n=record.n,
            attempt_id=record.attempt_id,
            owner_alive=record.owner_alive,
            sandbox_id=record.sandbox_id,
        )
        for record in wiring.inventory(settings).records()
        if record.kind is Kind.ATTEMPT
    ]
    async with wiring.store(settings) as store:
        alive = any(is_alive(row) for row in await store.workers())
        return await store.audit(lambda facts: proof.judge(facts, vms, engine_alive=alive), since=since)


def show(out: Out, report: Report) -> None:
    if out.json:
        out.dump({**plain(report), "kept": report.kept})
        return
    mean = report.attempts / report.tickets_seen if report.tickets_seen else 0.0
    out.fields(
        {
            "tickets seen": report.tickets_seen,
            "done": report.done,
            "failed": report.failed,
            "cancelled": report.cancelled,
            "unfinished": report.unfinished,
            "deleted": report.deleted,
            "attempts": f"{report.attempts} ({mean:.2f} per ticket, at most {report.most_attempts})",
            "sandboxes": f"{report.sandboxes} ({counted(report.holds, 'hold')}, {report.sandboxes_lost} lost)",
            "leases lost": report.lost_leases,
            "writes refused (stale lease)": report.refused,
            "waiting for an engine": report.waiting_for_an_engine,
            "finished twice": len(report.finished_twice),
            "lost": len(report.lost),
            "not recorded": len(report.unrecorded),
            "slots leaked": len(report.slots_leaked),
            "changed by others": len(report.changed_by_others),
        }
    )
    for violation in report.violations[:_SHOWN]:
        out.error(f"{violation.id}: {violation.what}")
    if len(report.violations) > _SHOWN:
        out.error(f"{len(report.violations) - _SHOWN} more: --json prints all")
