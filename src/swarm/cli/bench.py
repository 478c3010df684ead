"""`swarm bench`: measure how fast this host runs tickets, beside what the bare parts need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.base.plain import plain
from swarm.cli.frame import Cli, command
from swarm.cli.ui.output import Out
from swarm.cli.ui.table import Column

if TYPE_CHECKING:
    from swarm.bench import Report


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
        str, typer.Option("--tickets", metavar="N,…", help="How many tickets to run at once; each number is a run.")
    ] = "1,5,25",
    modes: Annotated[
        str,
        typer.Option("--modes", metavar="M,…", help="Of cold (boot each VM), restored (clone it), pool (kept ready)."),
    ] = "cold,restored,pool",
    max_vms: Annotated[
        int | None,
        typer.Option("--max-vms", min=1, metavar="N", help="VMs at once. Default: one per CPU, at least 2."),
    ] = None,
    sandbox: Annotated[
        bool, typer.Option("--sandbox", help="Measure pause, resume and forks of a sandbox instead.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.svg", help="Write a plot of where the time goes.", dir_okay=False),
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print tables in Markdown.")] = False,
) -> int:
    """Measure how fast this host runs tickets, beside what the bare parts need.

    Runs echo tickets through the whole engine for a minute or two, and removes everything but the template, which the
    next ticket uses. Exit status 1 if a ticket failed.
    """
    from swarm.base.log import configure
    from swarm.bench import MODES, bench, bench_sandboxes
    from swarm.bench.report import plot as draw
    from swarm.errors import UsageError

    if not cli.debug:
        configure(debug=False)
    if sandbox:
        if plot:
            raise UsageError("--plot shows tickets: leave it out with --sandbox")
        with cli.out.progress("bench") as progress:
            report = await bench_sandboxes(cli.settings, progress=progress)
        _show(cli.out, report, as_markdown=as_markdown)
        return 0
    counts = [int(word) for word in tickets.split(",") if word.strip().isdecimal() and int(word) > 0]
    wanted = [word.strip() for word in modes.split(",")]
    if len(counts) != len(tickets.split(",")) or not set(wanted) <= set(MODES):
        raise UsageError(f"--tickets takes numbers from 1, as in 1,5,25, and --modes some of {','.join(MODES)}")
    if plot:
        try:  # fails now, not after minutes of measuring
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
    _show(cli.out, report, as_markdown=as_markdown)
    return 1 if report.failed else 0


def _show(out: Out, report: Report, *, as_markdown: bool) -> None:
    from swarm.bench.report import markdown

    if out.json:
        figures = [{**plain(figure), "ratio": figure.ratio} for figure in report.figures]
        out.dump({"host": report.host, "cells": report.cells, "figures": figures})
        return
    if as_markdown:
        out.text(markdown(report))
        return
    out.line(", ".join(f"{name} {value}" for name, value in report.host.items()))
    out.line()
    if report.cells:
        _show_cells(out, report)
    out.table(("FIGURE", "OURS", "BARE", "RATIO", "TARGET"), [figure.row() for figure in report.figures])


def _show_cells(out: Out, report: Report) -> None:
    columns = (
        "MODE", Column("TICKETS", right=True), Column("N", drop=1, right=True), Column("P50", right=True),
        Column("P95", right=True), Column("P99", drop=3, right=True), Column("PER S", drop=4, right=True),
        Column("ENGINE CPU", drop=2, right=True), Column("FAILED", right=True),
    )  # fmt: skip
    rows = [
        (
            c.mode, c.tickets, c.n, *(f"{c.insert_to_done[p]:.0f} ms" for p in ("p50", "p95", "p99")), c.per_second,
            f"{c.engine_cpu_share:.0%}", c.failed or "",
        )
        for c in report.cells
    ]  # fmt: skip
    out.table(columns, rows)
    out.line()
    phases = report.phases
    times = [
        (f"{c.phases[p]['p50']:.0f} / {c.phases[p]['p95']:.0f}" if p in c.phases else "" for p in phases)
        for c in report.cells
    ]
    names = [f"{c.mode} x {c.tickets}" for c in report.cells]
    rows_of_times = [(name, *cells) for name, cells in zip(names, times, strict=True)]
    out.table(("P50 / P95 ms", *(Column(name.upper(), right=True) for name in phases)), rows_of_times)
    out.line()
