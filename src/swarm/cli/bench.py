"""`swarm bench`: how fast this host runs tickets, phase by phase, beside what the bare parts can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swarm.cli.frame import Cli, command


def register(app: typer.Typer) -> None:
    command(
        app,
        "bench",
        examples=["swarm bench", "swarm bench --tickets 1,5,25,100", "swarm bench --markdown --plot bench.svg"],
        json=True,
    )(bench)


async def bench(
    cli: Cli,
    tickets: Annotated[
        str, typer.Option("--tickets", metavar="N,…", help="How many tickets at once, one after the other.")
    ] = "1,5,25",
    modes: Annotated[
        str, typer.Option("--modes", metavar="M,…", help="Of: cold (boot each), restored (clone each), pool (warm).")
    ] = "cold,restored,pool",
    max_vms: Annotated[int | None, typer.Option("--max-vms", min=1, help="VMs at once; default: one a core.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw where the time goes.", dir_okay=False)
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
) -> int:
    """Run echo tickets through the whole engine, cold, restored and from the pool, and measure the bare parts beside.

    Takes a minute or two. Nothing of it stays but the template, which the next ticket uses. Exit status 1 if a ticket
    failed.
    """
    from swarm.base.log import configure
    from swarm.bench import MODES, bench
    from swarm.bench.report import markdown
    from swarm.bench.report import plot as draw
    from swarm.errors import UsageError

    if not cli.debug:
        configure(debug=False)
    counts = [int(word) for word in tickets.split(",") if word.strip().isdecimal() and int(word) > 0]
    wanted = [word.strip() for word in modes.split(",")]
    if len(counts) != len(tickets.split(",")) or not set(wanted) <= set(MODES):
        raise UsageError(f"--tickets takes numbers from 1, as in 1,5,25, and --modes some of {','.join(MODES)}")
    if plot:
        try:  # now, not when minutes of work would be lost
            plot.open("a").close()
        except OSError as error:
            raise UsageError(f"--plot: can't write {plot}: {error.strerror}") from None
    with cli.out.progress("bench") as progress:
        report = await bench(
            cli.settings,
            tickets=sorted(set(counts)),
            modes=[*dict.fromkeys(wanted)],
            max_vms=max_vms,
            progress=progress,
        )
    if plot:
        plot.write_text(draw(report))
    if cli.out.json:
        figures = [
            {
                "name": f.name,
                "ours": f.ours,
                "baseline": f.baseline,
                "ratio": f.ratio,
                "unit": f.unit,
                "n": f.n,
                "target": f.target,
            }
            for f in report.figures
        ]
        cli.out.dump({"host": report.host, "cells": report.cells, "figures": figures})
        return 1 if any(cell.failed for cell in report.cells) else 0
    out = cli.out
    if as_markdown:
        for line in markdown(report).splitlines():
            out.line(line)
        return 1 if any(cell.failed for cell in report.cells) else 0
    out.line(", ".join(f"{name} {value}" for name, value in report.host.items()))
    out.line()
    columns = ("MODE", "TICKETS", "N", "P50", "P95", "P99", "PER S", "ENGINE CPU", "FAILED")
    rows = [
        (
            c.mode, c.tickets, c.n, *(f"{c.insert_to_done[p]:.0f} ms" for p in ("p50", "p95", "p99")), c.per_second,
            f"{c.engine_cpu_share:.0%}", c.failed or "",
        )
        for c in report.cells
    ]  # fmt: skip
    out.table(columns, rows)
    out.line()
    phases = [name for name in _phases() if any(name in c.phases for c in report.cells)]
    out.table(
        ("P50 / P95 ms", *(name.upper() for name in phases)),
        [
            (
                f"{c.mode} x {c.tickets}",
                *(f"{c.phases[p]['p50']:.0f} / {c.phases[p]['p95']:.0f}" if p in c.phases else "" for p in phases),
            )
            for c in report.cells
        ],
    )
    out.line()
    out.table(
        ("FIGURE", "OURS", "BARE", "RATIO", "TARGET"),
        [
            (
                f.name,
                f"{f.ours:.1f} {f.unit}",
                "" if f.baseline is None else f"{f.baseline:.1f} {f.unit}",
                "" if f.ratio is None else f"{f.ratio:.2f}",
                f.target,
            )
            for f in report.figures
        ],
    )
    return 1 if any(cell.failed for cell in report.cells) else 0


def _phases() -> tuple[str, ...]:
    from swarm.base.clock import PHASES

    return PHASES
