"""`swarm cost`: what model calls have cost."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from swarm.base.clock import moment
from swarm.cli.frame import Cli, command
from swarm.cli.ui.render import counted
from swarm.cli.ui.table import Column


class By(StrEnum):
    TICKET = "ticket"
    SANDBOX = "sandbox"
    AGENT = "agent"
    WORKFLOW = "workflow"
    MODEL = "model"
    DAY = "day"


def register(app: typer.Typer) -> None:
    @command(
        app,
        examples=["swarm cost", "swarm cost --by ticket --since 2026-01-31", "swarm cost --by day --since 7d --json"],
        json=True,
    )
    async def cost(
        cli: Cli,
        by: Annotated[By, typer.Option("--by", help="Sum by this.")] = By.AGENT,
        since: Annotated[
            str,
            typer.Option(
                "--since", metavar="WHEN", help="Only calls since this time (UTC) or age: 2026-01-31, 7d, 12h."
            ),
        ] = "",
    ) -> None:
        """Show what model calls cost, by the prices of when they were made."""

        async with cli.store() as store:
            rows = await store.costs(by.value, since=moment(since))
        if cli.out.json:
            cli.out.dump(rows)
            return
        counts = [
            (r.calls, r.input_tokens, r.output_tokens, r.cache_read_tokens, r.cache_write_tokens, r.cost_usd)
            for r in rows
        ]
        lines = [(row.name, *numbers) for row, numbers in zip(rows, counts, strict=True)]
        if len(lines) > 1:
            lines.append(("total", *map(sum, zip(*counts, strict=True))))  # type: ignore[arg-type]
        columns = (
            Column(by.value.upper()), Column("CALLS", drop=5, right=True), Column("INPUT", drop=4, right=True),
            Column("OUTPUT", drop=3, right=True), Column("CACHE READ", drop=2, right=True),
            Column("CACHE WRITE", drop=1, right=True), Column("USD", right=True),
        )  # fmt: skip
        cli.out.table(columns, [(*line[:-1], f"{line[-1]:.4f}") for line in lines], empty="no model calls")
        if estimated := sum(r.estimated_calls for r in rows):
            usd = sum(r.estimated_usd for r in rows)
            cli.out.note(
                f"estimated: {counted(estimated, 'call')} (${usd:.4f}), of which the answer broke off (docs/claude.md)"
            )
        if unpriced := sum(r.unpriced_calls for r in rows):
            cli.out.note(f"not priced: {counted(unpriced, 'call')}, whose model is in no price list (docs/claude.md)")
        if still_open := sum(r.open_calls for r in rows):
            cli.out.note(f"not included: {counted(still_open, 'call')}, still running or of an engine that died")
