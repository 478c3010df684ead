"""Agents: what is registered, and uploads of new ones."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import Field

from swarm.admin import packages, uploads
from swarm.agents import MANIFEST, Installed
from swarm.agents.installed import digest_in_name, is_copy
from swarm.api import body
from swarm.api.endpoint import Call, Context, Endpoint, Fields
from swarm.api.v1.workflows import Validity
from swarm.base import manifest
from swarm.errors import SwarmError
from swarm.model import Agent, Role
from swarm.store.sql.rows import TicketSummary
from swarm.store.tickets.pages import TicketFilter

ARCHIVE: Final = ("application/gzip", "application/x-gzip", "application/x-tar+gzip")
UPLOAD_SECONDS: Final = 600.0
_LAST_TICKETS: Final = 10


class AddQuery(Fields):
    dev: bool = Field(default=False, description="replace this version, if it is registered with other content")


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentPackage:
    """What an agent was added with. ``manifest``: the text of its agent.yaml; None if it can't be read.
    ``tickets``: the newest that run it."""

    agent: Agent
    digest: str
    manifest: str | None
    tickets: list[TicketSummary]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Can this host run the agent? ``problem`` says why not. ``layer``: the digest of what its requirements and
    packages are installed in; None if it needs none, or has none yet."""

    runs: bool
    problem: str | None
    layer: str | None


async def list_agents(call: Call) -> list[Agent]:
    return await call.store.agents(broken=False)


async def add_agent(call: Call) -> Agent:
    query: AddQuery = call.query
    async with call.context.uploads.place() as archive:
        await body.save(call.request, uploads.MAX_BYTES, archive, seconds=UPLOAD_SECONDS)
        return await call.context.uploads.add(call.store, archive, replace=query.dev, by=call.actor.name)


async def validate_agent(call: Call) -> Validity:
    async with call.context.uploads.place() as archive:
        await body.save(call.request, uploads.MAX_BYTES, archive, seconds=UPLOAD_SECONDS)
        problems = await call.context.uploads.problems(archive)
    return Validity(valid=not problems, problems=problems)


async def show_agent(call: Call) -> Agent:
    return await call.store.agent(call.path["ref"])


async def show_agent_package(call: Call) -> AgentPackage:
    agent = await call.store.agent(call.path["ref"])
    if not is_copy(agent, call.context.settings.agents):
        with contextlib.suppress(SwarmError):  # it was added on another host
            await Installed(call.context.settings.agents, call.store).check(agent)
    which = TicketFilter(agent_ids=(agent.id,), project_id=call.actor.project_id)
    return AgentPackage(
        agent=agent,
        digest=digest_in_name(agent),
        manifest=await asyncio.to_thread(_manifest, call.context, agent),
        tickets=(await call.store.ticket_page(which, limit=_LAST_TICKETS)).tickets,
    )


def _manifest(context: Context, agent: Agent) -> str | None:
    """Only of a copy that `swarm agent add` made: a row may name any path."""
    if not is_copy(agent, context.settings.agents):
        return None
    try:
        with (context.settings.agents / agent.path.name / MANIFEST).open("rb") as file:
            return file.read(manifest.MAX_BYTES).decode(errors="replace")
    except OSError:
        return None


async def check_agent(call: Call) -> Check:
    agent = await call.store.agent(call.path["ref"])
    try:
        # Not with the package that an earlier look has found: its files may be gone or changed since.
        agent = await Installed(call.context.settings.agents, call.store).here(agent)
        layer = await call.context.uploads.layer_of(agent)
    except SwarmError as error:
        return Check(runs=False, problem=str(error), layer=None)
    return Check(runs=True, problem=None, layer=layer.digest if layer is not None else None)


async def remove_agent(call: Call) -> Agent:
    return await packages.remove_agent(call.store, call.path["ref"], call.context.settings.agents, by=call.actor.name)


ENDPOINTS: Final[Sequence[Endpoint]] = (
    Endpoint(
        method="GET",
        path="/v1/agents",
        role=Role.VIEWER,
        summary="List the registered agents, each version",
        handler=list_agents,
        answer=list[Agent],
    ),
    Endpoint(
        method="POST",
        path="/v1/agents",
        role=Role.ADMIN,
        summary="Register an agent: a .tar.gz of its directory; its layer is built first",
        handler=add_agent,
        query=AddQuery,
        upload=ARCHIVE,
        shared=True,
        max_body_bytes=uploads.MAX_BYTES,
        answer=Agent,
        status=201,
        errors={507: "a disk is full"},
    ),
    Endpoint(
        method="POST",
        path="/v1/agents/validate",
        role=Role.ADMIN,
        summary="Check a .tar.gz of an agent's directory; nothing is registered",
        handler=validate_agent,
        upload=ARCHIVE,
        shared=True,
        max_body_bytes=uploads.MAX_BYTES,
        answer=Validity,
        errors={507: "a disk is full"},
    ),
    Endpoint(
        method="GET",
        path="/v1/agents/{ref}",
        role=Role.VIEWER,
        summary="Show an agent: by name, name@version or id",
        handler=show_agent,
        answer=Agent,
    ),
    Endpoint(
        method="GET",
        path="/v1/agents/{ref}/package",
        role=Role.VIEWER,
        summary="What an agent was added with: its manifest and digest; and its newest tickets",
        handler=show_agent_package,
        answer=AgentPackage,
    ),
    Endpoint(
        method="GET",
        path="/v1/agents/{ref}/check",
        role=Role.VIEWER,
        summary="Can the server's host run this agent, with its files and its layer?",
        handler=check_agent,
        answer=Check,
    ),
    Endpoint(
        method="DELETE",
        path="/v1/agents/{ref}",
        role=Role.ADMIN,
        summary="Remove an agent that nothing needs, and its files",
        handler=remove_agent,
        shared=True,
        answer=Agent,
    ),
)
