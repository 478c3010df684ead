"""`swarm prove` and `swarm prune`: was every promise kept, and how long is its record kept."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.frame import Cli, command
from swarm.cli.ui.output import Out, plain
from swarm.errors import UsageError

if TYPE_CHECKING:
    from swarm.admin.prove import Report
    from swarm.config import Settings

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_SHOWN = 50  # violations; --json has all


def register(app: typer.Typer) -> None:
    """Add the commands to `swarm`."""
    command(app, examples=["swarm prune --older-than 30d", "swarm prune --older-than 12h"], json=True)(prune)
    command(app, "prove", examples=["swarm prove", "swarm prove --since 24h", "swarm prove --json"], json=True)(prove_)


async def prune(
    cli: Cli,
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="AGE", help="As 30d, 12h, 90m or 60s.", show_default=False)
    ],
) -> None:
    """Remove the events (logs, transitions) of that age of tickets that have ended. The tickets themselves stay."""
    from swarm.app import wiring

    seconds = age_seconds(older_than)
    async with wiring.store(cli.settings) as store:
        removed = await store.prune(seconds)
    if cli.out.json:
        cli.out.dump({"removed": removed})
    else:
        cli.out.line(f"{removed} events removed")


async def prove_(
    cli: Cli,
    since: Annotated[str, typer.Option("--since", metavar="WHEN", help="An ISO-8601 time, or an age as 24h.")] = "",
) -> int:
    """Replay the log against the rows: was anything lost, done twice, leaked? Exit status 1, and the ids, if so."""
    report = await prove(cli.settings, moment(since))
    show(cli.out, report)
    return 0 if report.kept else 1


def age_seconds(text: str) -> float:
    """'30d', '12h', '90m', '60s', '2w'. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no age: write a number and s, m, h, d or w, such as 30d")
    return float(match[1]) * _UNITS[match[2]]


def moment(text: str) -> str:
    """An age, or an ISO-8601 time, as the database writes times. Raises UsageError."""
    if not text:
        return ""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = datetime.now(UTC) - timedelta(seconds=age_seconds(text))
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


async def prove(settings: Settings, since: str = "") -> Report:
    from swarm.admin import prove as proof
    from swarm.app import wiring
    from swarm.cli.service import SILENT_AFTER_SECONDS
    from swarm.vm.slots.inventory import Kind

    vms = [
        proof.VmFact(n=record.n, attempt_id=record.attempt_id, owner_alive=record.owner_alive)
        for record in wiring.inventory(settings).records()
        if record.kind is Kind.ATTEMPT
    ]
    async with wiring.store(settings) as store:
        alive = any(row.seen_ms_ago < SILENT_AFTER_SECONDS * 1000 for row in await store.workers())
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
            "attempts": f"{report.attempts} ({mean:.2f} a ticket, at most {report.most_attempts})",
            "leases lost": report.lost_leases,
            "writes refused by the fence": report.refused,
            "waiting for an engine": report.waiting_for_an_engine,
            "finished twice": len(report.finished_twice),
            "lost": len(report.lost),
            "not recorded": len(report.unrecorded),
            "slots leaked": len(report.slots_leaked),
        }
    )
    for offence in report.violations[:_SHOWN]:
        out.error(f"{offence.id}: {offence.what}")
    if len(report.violations) > _SHOWN:
        out.error(f"{len(report.violations) - _SHOWN} more: --json has all")
