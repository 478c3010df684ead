"""`swarm cost`: what model calls have cost."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated

import typer

from swarm.cli.frame import Cli, command

_UNITS = {"d": "days", "h": "hours", "m": "minutes"}


class By(StrEnum):
    TICKET = "ticket"
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
        by: Annotated[By, typer.Option("--by", help="What to sum by.")] = By.AGENT,
        since: Annotated[
            str, typer.Option("--since", metavar="WHEN", help="Calls since then (UTC): 2026-01-31, or 7d, 12h, 30m.")
        ] = "",
    ) -> None:
        """Model calls, their tokens and what they cost, by the price list that held when they were made."""
        from swarm.app import wiring

        async with wiring.store(cli.settings) as store:
            rows = await store.costs(by.value, since=_moment(since) if since else "")
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
        columns = (by.value.upper(), "CALLS", "INPUT", "OUTPUT", "CACHE READ", "CACHE WRITE", "USD")
        cli.out.table(columns, [(*line[:-1], f"{line[-1]:.4f}") for line in lines], empty="no model calls")
        if unpriced := sum(r.unpriced_calls for r in rows):
            cli.out.note(f"without the price of {unpriced} calls: their model is in no price list (docs/claude.md)")
        if still_open := sum(r.open_calls for r in rows):
            cli.out.note(f"without {still_open} calls that are under way, or whose engine died")


def _moment(text: str) -> str:
    """ISO-8601 UTC text, as the database has it. Raises UsageError."""
    from swarm.errors import UsageError

    if found := re.fullmatch(r"(\d{1,5})([dhm])", text):
        moment = datetime.now(UTC) - timedelta(**{_UNITS[found[2]]: int(found[1])})
    else:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise UsageError(f"--since {text!r} is no time: write 2026-01-31, 2026-01-31T12:00, or 7d") from None
        moment = moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
    return moment.isoformat(timespec="milliseconds")[:-6] + "Z"
