"""Files of a sandbox: list, read, write, move, remove; directories as tar archives. All streamed, of any size."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import quote

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from swarm.api import body
from swarm.api.endpoint import EVENT_STREAM, Call, Endpoint, Fields
from swarm.api.problem import Refused
from swarm.api.v1.events import KEEP_ALIVE_SECONDS
from swarm.api.v1.files import BYTES, TAR, ranged
from swarm.api.v1.guests import begun, live_of
from swarm.base.aio import cancel_all
from swarm.base.plain import plain
from swarm.channel import guest_files, guest_trees
from swarm.channel.guest_files import Info, Listing
from swarm.channel.guest_trees import Moved
from swarm.errors import Conflict, NoSpace
from swarm.fields import NO_NUL
from swarm.model import Role
from swarm.store.tickets.validation import shown

MAX_FILE_BYTES: Final = 1 << 40
STALLED_SECONDS: Final = 60.0  # in which nothing of a body comes
_PATH: Final = "absolute, or below /work"
_UPLOAD: Final = r"^[A-Za-z0-9-]{1,64}$"
User = Literal["agent", "root"]


class PathQuery(Fields):
    path: str = Field(min_length=1, max_length=4096, pattern=NO_NUL, description=_PATH)
    user: User = Field(default="agent", description="with whose rights")


class RemoveQuery(PathQuery):
    recursive: bool = False


class WatchQuery(PathQuery):
    recursive: bool = False


class WriteQuery(PathQuery):
    mode: str | None = Field(
        default=None, pattern=r"^[0-7]{1,4}$", description="such as 755; default: as it is, or 644"
    )
    parents: bool = Field(default=False, description="make the directories above it")
    upload: str = Field(default="", pattern=r"^[A-Za-z0-9-]{0,64}$", description="a name, to go on if this breaks off")
    offset: int = Field(default=0, ge=0, lt=1 << 63, description="where this goes on: as `uploaded` says")


class UploadedQuery(PathQuery):
    upload: str = Field(pattern=_UPLOAD)


class Moving(Fields):
    path: str = Field(min_length=1, max_length=4096, pattern=NO_NUL, description=_PATH)
    to: str = Field(min_length=1, max_length=4096, pattern=NO_NUL)
    user: User = "agent"


class NewDirectory(Fields):
    path: str = Field(min_length=1, max_length=4096, pattern=NO_NUL, description=_PATH)
    parents: bool = False
    user: User = "agent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    bytes: int


async def list_guest_files(call: Call) -> Listing:
    query: PathQuery = call.query
    return await guest_files.list_dir((await live_of(call)).open, query.path, user=query.user)


async def show_guest_file(call: Call) -> Info:
    query: PathQuery = call.query
    return await guest_files.stat((await live_of(call)).open, query.path, user=query.user, follow=False)


async def read_guest_file(call: Call) -> Response:
    query: PathQuery = call.query
    live = await live_of(call)
    info = await guest_files.stat(live.open, query.path, user=query.user)
    if info.kind != "file":
        raise Conflict(f"{shown(query.path)} is a {info.kind}, and no file")
    headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(info.name, safe='', errors='replace')}"}
    if not info.size:  # files of /proc say so, and have much in them
        parts = await begun(guest_files.read(live.open, query.path, user=query.user))
        return StreamingResponse(parts, media_type=BYTES, headers=headers | {"cache-control": "no-store"})

    def chunks(start: int, size: int) -> AsyncIterator[bytes]:
        return guest_files.read(live.open, query.path, user=query.user, offset=start, length=size)

    return ranged(call, info.size, chunks, BYTES, headers)


async def write_guest_file(call: Call) -> Written:
    query: WriteQuery = call.query
    live = await live_of(call)
    length = call.request.headers.get("content-length", "")
    with _guests_disk():
        size = await guest_files.write(
            live.open,
            query.path,
            _arriving(call.request),
            user=query.user,
            size=query.offset + int(length[:18]) if length.isdecimal() else None,
            mode=int(query.mode, 8) if query.mode is not None else None,
            parents=query.parents,
            upload=query.upload,
            offset=query.offset,
        )
    return Written(bytes=size)


async def show_uploaded(call: Call) -> Written:
    query: UploadedQuery = call.query
    live = await live_of(call)
    return Written(bytes=await guest_files.uploaded(live.open, query.path, query.upload, user=query.user))


async def remove_guest_file(call: Call) -> None:
    query: RemoveQuery = call.query
    await guest_files.remove((await live_of(call)).open, query.path, user=query.user, recursive=query.recursive)


async def move_guest_file(call: Call) -> None:
    given: Moving = call.body
    await guest_files.move((await live_of(call)).open, given.path, given.to, user=given.user)


async def make_guest_directory(call: Call) -> None:
    given: NewDirectory = call.body
    await guest_files.make_dir((await live_of(call)).open, given.path, user=given.user, parents=given.parents)


async def show_guest_archive(call: Call) -> Response:
    query: PathQuery = call.query
    live = await live_of(call)
    parts = await begun(guest_trees.pack(live.open, query.path, user=query.user))
    headers = {"content-disposition": "attachment; filename=files.tar", "cache-control": "no-store"}
    return StreamingResponse(parts, media_type=TAR, headers=headers)


async def unpack_guest_archive(call: Call) -> Moved:
    query: PathQuery = call.query
    live = await live_of(call)
    with _guests_disk():
        return await guest_trees.unpack(live.open, query.path, _arriving(call.request), user=query.user)


@contextmanager
def _guests_disk() -> Iterator[None]:
    """It is the guest's disk that is full, and not the server's."""
    try:
        yield
    except NoSpace as error:
        raise Refused(507, str(error)) from None


async def watch_guest_files(call: Call) -> StreamingResponse:
    """Each change is an event of its kind; after 'lost', some are not told."""
    query: WatchQuery = call.query
    live, feed = await live_of(call), call.context.feed

    async def told() -> AsyncIterator[bytes]:
        watching = guest_files.watch(live.open, query.path, user=query.user, recursive=query.recursive)
        async with watching as changes:
            yield b": open\n\n"
            coming = asyncio.ensure_future(anext(changes, None))
            try:
                while not feed.closed:
                    quiet = asyncio.ensure_future(feed.pause(KEEP_ALIVE_SECONDS))
                    await asyncio.wait({coming, quiet}, return_when=asyncio.FIRST_COMPLETED)
                    await cancel_all([quiet])
                    if not coming.done():
                        yield b": \n\n"
                    elif (change := coming.result()) is None:
                        yield b"event: end\ndata: {}\n\n"
                        return
                    else:
                        yield f"event: {change.event}\ndata: {json.dumps(plain(change))}\n\n".encode()
                        coming = asyncio.ensure_future(anext(changes, None))
            finally:
                await cancel_all([coming])

    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(await begun(told()), media_type=EVENT_STREAM, headers=headers)


async def _arriving(request: Request) -> AsyncIterator[bytes]:
    """The body, as fast as the guest takes it. Raises Refused when nothing comes for some time."""
    parts = body.parts(request, MAX_FILE_BYTES)
    while True:
        try:
            async with asyncio.timeout(STALLED_SECONDS):
                part = await anext(parts, None)
        except TimeoutError:
            raise Refused(408, f"nothing of the body came for {STALLED_SECONDS:g} s", headers=body.CLOSE) from None
        if part is None:
            return
        if part:
            yield part


ENDPOINTS: Final[Sequence[Endpoint]] = (
    Endpoint(
        method="GET",
        path="/v1/sandboxes/{id}/files",
        role=Role.OPERATOR,
        summary="List a directory of a sandbox",
        handler=list_guest_files,
        query=PathQuery,
        answer=Listing,
        large=True,
    ),
    Endpoint(
        method="DELETE",
        path="/v1/sandboxes/{id}/files",
        role=Role.OPERATOR,
        summary="Remove a file or a directory of a sandbox",
        handler=remove_guest_file,
        query=RemoveQuery,
    ),
    Endpoint(
        method="GET",
        path="/v1/sandboxes/{id}/files/info",
        role=Role.OPERATOR,
        summary="Size, kind, mode and owner of a file of a sandbox; a link is not followed",
        handler=show_guest_file,
        query=PathQuery,
        answer=Info,
    ),
    Endpoint(
        method="GET",
        path="/v1/sandboxes/{id}/files/content",
        role=Role.OPERATOR,
        summary="Read a file of a sandbox, or a range of it",
        handler=read_guest_file,
        query=PathQuery,
        media_type=BYTES,
        ranges=True,
    ),
    Endpoint(
        method="PUT",
        path="/v1/sandboxes/{id}/files/content",
        role=Role.OPERATOR,
        summary="Write a file of a sandbox: it is replaced once all has come",
        handler=write_guest_file,
        query=WriteQuery,
        upload=(BYTES,),
        max_body_bytes=MAX_FILE_BYTES,
        answer=Written,
        errors={507: "the sandbox's disk is full"},
    ),
    Endpoint(
        method="GET",
        path="/v1/sandboxes/{id}/files/uploaded",
        role=Role.OPERATOR,
        summary="How much of a file came, whose `upload` broke off",
        handler=show_uploaded,
        query=UploadedQuery,
        answer=Written,
    ),
    Endpoint(
        method="POST",
        path="/v1/sandboxes/{id}/files/move",
        role=Role.OPERATOR,
        summary="Move or rename a file of a sandbox",
        handler=move_guest_file,
        body=Moving,
    ),
    Endpoint(
        method="POST",
        path="/v1/sandboxes/{id}/files/directory",
        role=Role.OPERATOR,
        summary="Make a directory in a sandbox",
        handler=make_guest_directory,
        body=NewDirectory,
    ),
    Endpoint(
        method="GET",
        path="/v1/sandboxes/{id}/files/watch",
        role=Role.OPERATOR,
        summary="What changes in a directory of a sandbox, as it does (Server-Sent Events)",
        handler=watch_guest_files,
        query=WatchQuery,
        media_type=EVENT_STREAM,
    ),
    Endpoint(
        method="GET",
        path="/v1/sandboxes/{id}/files/archive",
        role=Role.OPERATOR,
        summary="A directory of a sandbox as a tar archive",
        handler=show_guest_archive,
        query=PathQuery,
        media_type=TAR,
    ),
    Endpoint(
        method="PUT",
        path="/v1/sandboxes/{id}/files/archive",
        role=Role.OPERATOR,
        summary="Unpack a tar archive into a directory of a sandbox",
        handler=unpack_guest_archive,
        query=PathQuery,
        upload=(TAR,),
        max_body_bytes=MAX_FILE_BYTES,
        answer=Moved,
        errors={507: "the sandbox's disk is full"},
    ),
)
