"""Engines on their hosts, what they wait for, and the images and templates of the host that serves this page."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from swarm.admin.engines import Engine, engines, hosts, number
from swarm.api.endpoint import Context
from swarm.base.clock import iso
from swarm.dashboard.render import here, html
from swarm.store.registry.tokens import Actor

_MOST: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineView:
    """With what it says of itself. Any program may have written that: numbers that are none are left out."""

    engine: Engine
    running: int | None
    max_vms: int | None
    per_minute: int | None
    driver: str
    stopping: bool
    waits_for: str
    skipped: list[tuple[str, str]]


async def show(context: Context, request: Request, actor: Actor) -> Response:
    found, machines = await engines(context.store), await hosts(context.store)
    images, templates = await asyncio.to_thread(_kept, context)
    return html(
        "hosts.html",
        actor=actor,
        here=here(request),
        engines=[_view(one) for one in found[:_MOST]],
        more=len(found) > _MOST,
        machines=machines[:_MOST],
        images=images,
        templates=templates,
    )


def _view(engine: Engine) -> EngineView:
    info = engine.info
    skipped = info.get("skipped")
    return EngineView(
        engine=engine,
        running=number(info.get("running")),
        max_vms=number(info.get("max_vms")),
        per_minute=number(info.get("per_minute")),
        driver=str(info.get("driver") or ""),
        stopping=bool(info.get("stopping")),
        waits_for=str(info.get("waits_for") or ""),
        skipped=[(str(k), str(v)) for k, v in list(skipped.items())[:20]] if isinstance(skipped, dict) else [],
    )


def _kept(context: Context) -> tuple[list[Any], list[tuple[Any, str, str]]]:
    images = sorted(context.images.list(), key=lambda one: one.built_at, reverse=True)
    templates = sorted(context.templates.all(), key=lambda one: -one.used_at)
    return images[:_MOST], [(one, iso(one.created_at * 1000), iso(one.used_at * 1000)) for one in templates[:_MOST]]
