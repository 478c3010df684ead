"""Images and templates of the server's host."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from swarm.api.endpoint import Call, Endpoint
from swarm.errors import Conflict, ImageError
from swarm.model import Role
from swarm.vm.image.image import ImageInfo
from swarm.vm.template import TemplateInfo


async def list_images(call: Call) -> list[ImageInfo]:
    return await asyncio.to_thread(call.context.images.list)


async def remove_image(call: Call) -> None:
    try:
        digest = await asyncio.to_thread(call.context.images.remove, call.path["digest"])
    except ImageError as error:  # several begin so
        raise Conflict(str(error)) from None
    await call.store.record("image.remove", by=call.actor.name, name=digest)


async def list_templates(call: Call) -> list[TemplateInfo]:
    """Most recently used first."""
    found = await asyncio.to_thread(call.context.templates.all)
    return sorted(found, key=lambda template: -template.used_at)


async def remove_template(call: Call) -> None:
    key = await call.context.templates.remove(call.path["key"])
    await call.store.record("template.remove", by=call.actor.name, name=key)


ENDPOINTS: Final[Sequence[Endpoint]] = (
    Endpoint(
        method="GET",
        path="/v1/images",
        role=Role.VIEWER,
        summary="List the guest images of the server's host, newest first",
        handler=list_images,
        shared=True,
        answer=list[ImageInfo],
    ),
    Endpoint(
        method="DELETE",
        path="/v1/images/{digest}",
        role=Role.ADMIN,
        summary="Remove a guest image, by its digest or a unique beginning of it",
        handler=remove_image,
        shared=True,
    ),
    Endpoint(
        method="GET",
        path="/v1/templates",
        role=Role.VIEWER,
        summary="List the templates of the server's host, most recently used first",
        handler=list_templates,
        shared=True,
        answer=list[TemplateInfo],
    ),
    Endpoint(
        method="DELETE",
        path="/v1/templates/{key}",
        role=Role.ADMIN,
        summary="Remove a template, by its key or a unique beginning of it",
        handler=remove_template,
        shared=True,
    ),
)
