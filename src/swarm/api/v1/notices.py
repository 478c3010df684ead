"""Notices: who is told what happens. Only admins see them: an address may let others in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import Field

from swarm.api import notices
from swarm.api.endpoint import Call, Endpoint, Fields
from swarm.model import Role
from swarm.store.registry.notices import NoticeKind, NoticeRow


class NewNotice(Fields):
    url: str = Field(max_length=2000, description="where the POSTs go")
    on: Annotated[tuple[NoticeKind, ...], Field(min_length=1, max_length=10)] = Field(description="what it tells of")
    project: str | None = Field(default=None, min_length=1, max_length=200, description="only of its tickets")


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatedNotice:
    """``secret`` signs the POSTs, and is shown this once."""

    notice: NoticeRow
    secret: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    """``error``: why it was not taken."""

    taken: bool
    error: str


async def list_notices(call: Call) -> list[NoticeRow]:
    return await call.store.notices()


async def create_notice(call: Call) -> CreatedNotice:
    given: NewNotice = call.body
    row, secret = await notices.add(
        call.store, call.context.vault, url=given.url, kinds=given.on, project_id=given.project, by=call.actor.name
    )
    return CreatedNotice(notice=row, secret=secret)


async def remove_notice(call: Call) -> NoticeRow:
    return await notices.remove(call.store, call.context.vault, call.path["id"], by=call.actor.name)


async def test_notice(call: Call) -> Tested:
    error = await call.context.notices.test(await call.store.notice(call.path["id"]))
    return Tested(taken=not error, error=error)


ENDPOINTS: Final[Sequence[Endpoint]] = (
    Endpoint(
        method="GET",
        path="/v1/notices",
        role=Role.ADMIN,
        shared=True,
        summary="List notices: who is told what, and how the last one went",
        handler=list_notices,
        answer=list[NoticeRow],
    ),
    Endpoint(
        method="POST",
        path="/v1/notices",
        role=Role.ADMIN,
        shared=True,
        summary="Add a notice: signed POSTs to an address",
        handler=create_notice,
        body=NewNotice,
        answer=CreatedNotice,
        status=201,
    ),
    Endpoint(
        method="DELETE",
        path="/v1/notices/{id}",
        role=Role.ADMIN,
        shared=True,
        summary="Remove a notice",
        handler=remove_notice,
        answer=NoticeRow,
    ),
    Endpoint(
        method="POST",
        path="/v1/notices/{id}/test",
        role=Role.ADMIN,
        shared=True,
        summary="Send a test to a notice's address",
        handler=test_notice,
        answer=Tested,
    ),
)
