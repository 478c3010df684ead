"""`swarm ticket diff`: two attempts side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli import kept
from swarm.cli.frame import Cli, command
from swarm.cli.ticket import app
from swarm.cli.ui.render import duration

if TYPE_CHECKING:
    from swarm.store.comparison import Side

_MARKS = {"added": "A", "removed": "D", "changed": "M"}


@command(
    app,
    "diff",
    examples=[
        "swarm ticket diff report-7 report-8",
        "swarm ticket diff report-7:1 report-7:2",
        "swarm ticket diff 'race-3:try[0]' 'race-3:try[4]' --vm /work/repo",
    ],
    json=True,
)
async def diff(
    cli: Cli,
    a: Annotated[str, typer.Argument(metavar="A", help="TICKET, TICKET:STEP, TICKET:NUMBER or TICKET:STEP:NUMBER.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other; a number is that of an attempt, from 1.")],
    vm: Annotated[
        str | None,
        typer.Option("--vm", metavar="DIR", help="Compare this directory of the kept VMs, instead of /work/out."),
    ] = None,
) -> None:
    """Compare two attempts: how they ended, what they cost, the files they left, commands, and their outputs.

    Without a number, the last attempt counts. Commands are those that an agent prints as `$ COMMAND`.
    """
    from swarm.store import comparison

    async with cli.store() as store:
        found = await comparison.compare(store, a, b)
    if vm is not None:
        async with kept.trees(cli, (a, b), vm) as (of_a, of_b):
            found = replace(found, files=await comparison.changes(of_a, of_b))
    if cli.out.json:
        cli.out.dump(found)
        return
    cli.out.table(["", "A", "B"], [row for row in _rows(found.a, found.b) if row[1] or row[2]])
    for one in found.files:
        before, after = one.bytes
        sizes = (
            f"{before} → {after} bytes" if before is not None and after is not None else f"{before or after or 0} bytes"
        )
        modes = f", {one.mode[0]} → {one.mode[1]}" if None not in one.mode and one.mode[0] != one.mode[1] else ""
        cli.out.line()
        cli.out.line(f"{_MARKS[one.change]} {one.name}  {sizes}{modes}", style="bold")
        cli.out.text(one.diff or "")
    if found.commands:
        cli.out.line()
        cli.out.text(found.commands)
    if found.outputs:
        cli.out.line()
        cli.out.text(found.outputs)
    if not found.files and not found.outputs:
        cli.out.line("The files and the outputs are the same.")


def _rows(a: Side, b: Side) -> list[tuple[str, str, str]]:
    def row(name: str, of: str) -> tuple[str, str, str]:
        one, other = getattr(a.attempt, of), getattr(b.attempt, of)
        return name, "" if one is None else str(one), "" if other is None else str(other)

    return [
        ("ticket", a.ticket_id, b.ticket_id),
        ("step", a.step_id, b.step_id),
        ("attempt", str(a.number), str(b.number)),
        ("outcome", a.attempt.outcome or "running", b.attempt.outcome or "running"),
        row("reason", "reason"),
        row("exit status", "exit_code"),
        ("time", duration(a.duration_ms), duration(b.duration_ms)),
        ("commands", _ran(a), _ran(b)),
        ("printed", f"{a.printed_bytes:,} bytes", f"{b.printed_bytes:,} bytes"),
        ("connections", _counted(a.connections), _counted(b.connections)),
        ("model calls", _counted(a.model_calls), _counted(b.model_calls)),
        ("tokens", _number(a.attempt.api_tokens_used), _number(b.attempt.api_tokens_used)),
        ("cost", _usd(a.attempt.cost_usd), _usd(b.attempt.cost_usd)),
    ]


def _ran(side: Side) -> str:
    return "not recorded" if side.commands is None else f"{len(side.commands):,}"


def _counted(counts: Mapping[str, int]) -> str:
    some = [f"{count} × {name}" for name, count in list(counts.items())[:5]]
    return ", ".join([*some, *([f"{len(counts) - 5} more"] if len(counts) > 5 else [])])


def _number(value: int) -> str:
    return f"{value:,}" if value else ""


def _usd(value: float) -> str:
    return f"${value:.4f}" if value else ""
