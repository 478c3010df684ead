"""Engines, their hosts, the queue; and what model calls cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import Field, field_validator

from swarm.admin import engines
from swarm.admin.engines import Engine, Host
from swarm.admin.status import Status, status
from swarm.api.endpoint import Call, Endpoint, Fields
from swarm.base.clock import moment
from swarm.errors import UsageError
from swarm.model import Role
from swarm.store.hosts import Holds
from swarm.store.spending import By, Costs


class CostsQuery(Fields):
    by: By = "agent"
    since: str = Field(
        default="30d",
        max_length=40,
        validate_default=True,
        description="only calls since this time (UTC) or age: 2026-01-31, 7d; empty: all",
    )
    limit: int = Field(default=1000, ge=1, le=1000, description="of the dearest")

    @field_validator("since")
    @classmethod
    def _is_a_time(cls, text: str) -> str:
        try:
            return moment(text)
        except UsageError as error:
            raise ValueError(str(error)) from None


class Drain(Fields):
    within_seconds: float | None = Field(
        default=None,
        ge=0,
        le=30 * 86_400,
        description="what still runs then is put back, and not counted as tried; default: it ends by itself",
    )


class RemoveQuery(Fields):
    force: bool = Field(default=False, description="also if an engine of it is alive")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovedHost:
    """``held``: what depended on it, which others run now, or which is lost."""

    host: str
    id: str
    held: Holds


async def show_status(call: Call) -> Status:
    return await status(call.store, call.context.inventory)


async def list_engines(call: Call) -> list[Engine]:
    return await engines.engines(call.store)


async def list_hosts(call: Call) -> list[Host]:
    return await engines.hosts(call.store)


async def show_host(call: Call) -> Host:
    return await engines.host(call.store, call.path["name"])


async def drain_host(call: Call) -> Host:
    given: Drain = call.body
    row = await call.store.drain_host(call.path["name"], by=call.actor.name, within_seconds=given.within_seconds)
    return await engines.of_row(call.store, row)


async def undrain_host(call: Call) -> Host:
    return await engines.of_row(call.store, await call.store.undrain_host(call.path["name"], by=call.actor.name))


async def remove_host(call: Call) -> RemovedHost:
    query: RemoveQuery = call.query
    row, held = await call.store.remove_host(call.path["name"], by=call.actor.name, force=query.force)
    return RemovedHost(host=row.name, id=row.id, held=held)


async def list_costs(call: Call) -> list[Costs]:
    query: CostsQuery = call.query
    return await call.store.costs(query.by, since=query.since, limit=query.limit)


ENDPOINTS: Final[Sequence[Endpoint]] = (
    Endpoint(
        method="GET",
        path="/v1/status",
        role=Role.VIEWER,
        summary="The queue, the engines, and the VMs of the server's host",
        handler=show_status,
        shared=True,
        answer=Status,
    ),
    Endpoint(
        method="GET",
        path="/v1/engines",
        role=Role.VIEWER,
        summary="List the engines, and when they were heard last",
        handler=list_engines,
        shared=True,
        answer=list[Engine],
    ),
    Endpoint(
        method="GET",
        path="/v1/hosts",
        role=Role.VIEWER,
        summary="List the hosts of engines: their VMs and memory, and what they wait for",
        handler=list_hosts,
        shared=True,
        answer=list[Host],
    ),
    Endpoint(
        method="GET",
        path="/v1/hosts/{name}",
        role=Role.VIEWER,
        summary="Show a host, by name or id",
        handler=show_host,
        shared=True,
        answer=Host,
    ),
    Endpoint(
        method="POST",
        path="/v1/hosts/{name}/drain",
        role=Role.ADMIN,
        summary="Let the engines of a host start nothing more",
        handler=drain_host,
        body=Drain,
        shared=True,
        answer=Host,
    ),
    Endpoint(
        method="POST",
        path="/v1/hosts/{name}/undrain",
        role=Role.ADMIN,
        summary="Let them take work again",
        handler=undrain_host,
        shared=True,
        answer=Host,
    ),
    Endpoint(
        method="DELETE",
        path="/v1/hosts/{name}",
        role=Role.ADMIN,
        summary="Forget a host that is gone: what ran there is run elsewhere, what was paused there is lost",
        handler=remove_host,
        query=RemoveQuery,
        shared=True,
        answer=RemovedHost,
    ),
    Endpoint(
        method="GET",
        path="/v1/costs",
        role=Role.VIEWER,
        summary="What model calls cost, by ticket, agent, workflow, model or day",
        handler=list_costs,
        query=CostsQuery,
        shared=True,
        answer=list[Costs],
    ),
)
