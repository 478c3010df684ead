"""Engines on their hosts, what they wait for, and the images and templates of the host that serves this page."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from swarm.api.endpoint import Context
from swarm.base.clock import iso
from swarm.dashboard.render import here, html
from swarm.store.registry.tokens import Actor
from swarm.store.registry.workers import has_died, is_alive
from swarm.store.sql.rows import WorkerRow

_MOST: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineView:
    """Of a row that any program may have written: numbers that are none are left out."""

    row: WorkerRow
    alive: bool
    died: bool
    running: int | None
    max_vms: int | None
    per_minute: int | None
    driver: str
    stopping: bool
    waits_for: str
    skipped: list[tuple[str, str]]


async def show(context: Context, request: Request, actor: Actor) -> Response:
    workers = await context.store.workers()
    images, templates = await asyncio.to_thread(_kept, context)
    return html(
        "hosts.html",
        actor=actor,
        here=here(request),
        engines=[_engine(row) for row in workers[:_MOST]],
        more=len(workers) > _MOST,
        images=images,
        templates=templates,
    )


def _engine(row: WorkerRow) -> EngineView:
    info = row.info
    skipped = info.get("skipped")
    return EngineView(
        row=row,
        alive=is_alive(row),
        died=has_died(row),
        running=_number(info.get("running")),
        max_vms=_number(info.get("max_vms")),
        per_minute=_number(info.get("per_minute")),
        driver=str(info.get("driver") or ""),
        stopping=bool(info.get("stopping")),
        waits_for=str(info.get("waits_for") or ""),
        skipped=[(str(k), str(v)) for k, v in list(skipped.items())[:20]] if isinstance(skipped, dict) else [],
    )


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _kept(context: Context) -> tuple[list[Any], list[tuple[Any, str, str]]]:
    images = sorted(context.images.list(), key=lambda one: one.built_at, reverse=True)
    templates = sorted(context.templates.all(), key=lambda one: -one.used_at)
    return images[:_MOST], [(one, iso(one.created_at * 1000), iso(one.used_at * 1000)) for one in templates[:_MOST]]
