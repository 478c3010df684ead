"""Secrets: names and scopes. Values go in, and never come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

from pydantic import Field, WithJsonSchema

from swarm.admin.vault import scope_of
from swarm.api.endpoint import Call, Endpoint, Fields
from swarm.errors import UsageError
from swarm.fields import Name
from swarm.model import Role
from swarm.store.registry.secrets import SecretRow


class Scope(Fields):
    """For one of these; for all agents if none is given."""

    agent: Name | None = None
    workflow: Name | None = None
    webhook: Name | None = None


class Value(Scope):
    # Not checked by pydantic, whose errors say what was given.
    value: Annotated[Any, WithJsonSchema({"type": "string", "writeOnly": True})] = Field(repr=False)


async def list_secrets(call: Call) -> list[SecretRow]:
    return await call.context.vault.list()


async def set_secret(call: Call) -> None:
    given: Value = call.body
    if not isinstance(given.value, str):
        raise UsageError("`value` must be text")
    await call.context.vault.set(call.path["name"], given.value, scope=_scope(given), by=call.actor.name)


async def remove_secret(call: Call) -> None:
    await call.context.vault.remove(call.path["name"], scope=_scope(call.query), by=call.actor.name)


def _scope(given: Scope) -> str:
    return scope_of(given.agent, given.workflow, given.webhook)


ENDPOINTS: Final[Sequence[Endpoint]] = (
    Endpoint(
        method="GET",
        path="/v1/secrets",
        role=Role.OPERATOR,
        summary="List the names and scopes of secrets",
        handler=list_secrets,
        shared=True,
        answer=list[SecretRow],
    ),
    Endpoint(
        method="PUT",
        path="/v1/secrets/{name}",
        role=Role.ADMIN,
        summary="Set or replace a secret",
        handler=set_secret,
        body=Value,
        shared=True,
    ),
    Endpoint(
        method="DELETE",
        path="/v1/secrets/{name}",
        role=Role.ADMIN,
        summary="Remove a secret; running attempts keep it",
        handler=remove_secret,
        query=Scope,
        shared=True,
    ),
)
