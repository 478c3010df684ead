"""Engines, their hosts, the queue; and what model calls cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pydantic import Field, field_validator

from swarm.admin import engines
from swarm.admin.engines import Engine, Host, Status
from swarm.api.endpoint import Call, Endpoint, Fields
from swarm.base.clock import moment
from swarm.errors import UsageError
from swarm.model import Role
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


async def show_status(call: Call) -> Status:
    return await engines.status(call.store, call.context.inventory)


async def list_engines(call: Call) -> list[Engine]:
    return await engines.engines(call.store)


async def list_hosts(call: Call) -> list[Host]:
    return engines.by_host(await engines.engines(call.store))


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
        path="/v1/costs",
        role=Role.VIEWER,
        summary="What model calls cost, by ticket, agent, workflow, model or day",
        handler=list_costs,
        query=CostsQuery,
        shared=True,
        answer=list[Costs],
    ),
)
