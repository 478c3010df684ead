"""Tokens: who may call; and who this caller is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import Field

from swarm.api.endpoint import Call, Endpoint, Fields
from swarm.fields import NO_NUL
from swarm.model import Role
from swarm.store.registry import tokens
from swarm.store.registry.tokens import Actor, TokenRow


class NewToken(Fields):
    name: str = Field(description="whose it is; events name it")
    role: Role = Role.VIEWER
    project: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        pattern=NO_NUL,
        description="only tickets of this project exist for it",
    )
    expires: str | None = Field(default=None, description="such as 30d, 12h or 45m; default: never")


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatedToken:
    """``token`` is shown this once."""

    name: str
    role: Role
    project: str | None
    token: str


async def whoami(call: Call) -> Actor:
    return call.actor


async def list_tokens(call: Call) -> list[TokenRow]:
    return await call.store.tokens()


async def create_token(call: Call) -> CreatedToken:
    given: NewToken = call.body
    seconds = tokens.expires_seconds(given.expires) if given.expires is not None else None
    token = tokens.new_token()
    actor = Actor(name=tokens.checked_name(given.name), role=given.role, project_id=given.project)
    await call.store.add_token(token, actor, by=call.actor.name, expires_seconds=seconds)
    return CreatedToken(name=given.name, role=given.role, project=given.project, token=token)


async def revoke_token(call: Call) -> TokenRow:
    return await call.store.revoke_token(call.path["name"], by=call.actor.name)


ENDPOINTS: Final[Sequence[Endpoint]] = (
    Endpoint(
        method="GET",
        path="/v1/whoami",
        role=Role.VIEWER,
        summary="Who is calling, and what they may do",
        handler=whoami,
        answer=Actor,
    ),
    Endpoint(
        method="GET",
        path="/v1/tokens",
        role=Role.ADMIN,
        summary="List tokens and sessions of browsers; no token is shown again",
        handler=list_tokens,
        shared=True,
        answer=list[TokenRow],
    ),
    Endpoint(
        method="POST",
        path="/v1/tokens",
        role=Role.ADMIN,
        summary="Create a token; only this answer shows it",
        handler=create_token,
        body=NewToken,
        shared=True,
        answer=CreatedToken,
        status=201,
    ),
    Endpoint(
        method="DELETE",
        path="/v1/tokens/{name}",
        role=Role.ADMIN,
        summary="Revoke a token or end a session, by its id, or by name all that have it",
        handler=revoke_token,
        shared=True,
        answer=TokenRow,
    ),
)
