"""What model calls cost, by day, agent, workflow and model, and how much of the budgets is used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from swarm.api.endpoint import Context
from swarm.dashboard import svg, text
from swarm.dashboard.render import Page, here, html
from swarm.dashboard.spent import Hours
from swarm.errors import StoreError
from swarm.store.registry.tokens import Actor
from swarm.store.registry.workflows import WorkflowRow
from swarm.store.spending import Spent
from swarm.workflow.definition import Workflow

RANGES: Final = {"24h": 1, "7d": 7, "30d": 30}
_BARS: Final = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    name: str
    calls: int
    tokens: int
    cost_usd: float


def page(hours: Hours) -> Page:
    async def show(context: Context, request: Request, actor: Actor) -> Response:
        return await _show(hours, context, request, actor)

    return show


async def _show(hours: Hours, context: Context, request: Request, actor: Actor) -> Response:
    chosen = request.query_params.get("range", "7d")
    now = datetime.now(UTC)
    days = RANGES.get(chosen, 7)
    first = now - timedelta(days=days)  # of more than a day, whole days: they are kept as sums
    read = await hours.since(context.store, first.replace(hour=0, minute=0) if days > 1 else first)
    rows = read.rows
    today = now.strftime("%Y-%m-%d")
    spent = [row for row in rows if row.hour[:10] == today]
    sums = {
        "day": _sums(rows, lambda row: row.hour[:10]),
        "agent": _sums(rows, lambda row: row.agent or "(none)"),
        "workflow": _sums(rows, lambda row: row.workflow or "(none)"),
        "model": _sums(rows, lambda row: row.model or "(unknown)"),
    }
    sums["day"].sort(key=lambda line: line.name)
    agents = await context.store.agents(broken=False)
    answer = html(
        "costs.html",
        actor=actor,
        here=here(request),
        ranges=[(name, here(request, range=name)) for name in RANGES],
        chosen=chosen if chosen in RANGES else "7d",
        read=read,
        calls=sum(row.calls for row in rows),
        cost=sum(row.cost_usd for row in rows),
        tokens=sum(row.tokens for row in rows),
        unpriced=sum(row.unpriced for row in rows),
        under_way=sum(row.under_way for row in rows),
        sums=sums,
        pictures={name: _picture(name, lines) for name, lines in sums.items()},
        day_budget=_day(context.settings, spent, whole=read.complete or read.since < today),
        budgets=[one for one in agents if one.budget_usd is not None or one.budget_tokens is not None],
        workflows=_with_budget(await context.store.workflows()),
    )
    if read.more:
        answer.headers["refresh"] = "1"  # works without scripts
    return answer


def _with_budget(rows: Iterable[WorkflowRow]) -> list[tuple[WorkflowRow, Workflow]]:
    found = []
    for row in rows:
        if '"budget_' in row.definition:
            with contextlib.suppress(StoreError):  # another program wrote it
                found.append((row, row.parsed()))
    return [(row, one) for row, one in found if one.budget_usd is not None or one.budget_tokens is not None]


def _sums(rows: Iterable[Spent], name: Callable[[Spent], str]) -> list[Line]:
    found: dict[str, list[Spent]] = {}
    for row in rows:
        found.setdefault(name(row), []).append(row)
    lines = [
        Line(
            name=key,
            calls=sum(row.calls for row in some),
            tokens=sum(row.tokens for row in some),
            cost_usd=sum(row.cost_usd for row in some),
        )
        for key, some in found.items()
    ]
    return sorted(lines, key=lambda line: (-line.cost_usd, line.name))


def _picture(by: str, lines: list[Line]) -> Any:
    said = [(line.name, line.cost_usd, f"{text.money(line.cost_usd)}, {line.calls:,} calls") for line in lines]
    if by == "day":
        return svg.columns(said, name="Cost by day")
    return svg.bars([(name, cost, money.partition(",")[0]) for name, cost, money in said[:_BARS]], name=f"Cost by {by}")


def _day(settings: Any, spent: list[Spent], *, whole: bool) -> dict[str, Any] | None:
    """How much of this installation's budget for a day is used; None if it has none."""
    usd, tokens = settings.budget_usd_per_day, settings.budget_tokens_per_day
    if usd is None and tokens is None:
        return None
    used, used_tokens = sum(row.cost_usd for row in spent), sum(row.tokens for row in spent)
    return {
        "usd": usd,
        "tokens": tokens,
        "used_usd": used,
        "used_tokens": used_tokens,
        "whole": whole,
        "usd_meter": svg.meter(used, usd, name=f"{text.money(used)} of {text.money(usd)}") if usd is not None else None,
        "token_meter": svg.meter(used_tokens, tokens, name=f"{used_tokens:,} of {tokens:,} tokens")
        if tokens is not None
        else None,
    }
