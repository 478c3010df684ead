"""Files: what a ticket is given, what its agents left, and artifacts, the large values of steps."""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final
from urllib.parse import quote

from pydantic import Field
from starlette.responses import Response, StreamingResponse

from swarm.admin.uploads import scratch
from swarm.api import body
from swarm.api.endpoint import JSON, Call, Endpoint, Fields
from swarm.api.problem import Refused, busy
from swarm.api.v1.tickets import own_ticket_id, ticket_id_of
from swarm.base import tar, trees
from swarm.base.trees import Entry
from swarm.errors import Conflict, NotFound, UsageError
from swarm.model import Role
from swarm.store import comparison, ticket_files
from swarm.store.comparison import Comparison
from swarm.store.runs.artifacts import ArtifactRow, sent_as
from swarm.store.ticket_files import TicketFiles
from swarm.store.tickets.validation import shown

TAR: Final = "application/x-tar"
BYTES: Final = "application/octet-stream"
MAX_UPLOAD_BYTES: Final = trees.MAX_BYTES + (64 << 20)  # headers too
UPLOAD_SECONDS: Final = 600.0
_RANGE: Final = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


class PatternQuery(Fields):
    pattern: str | None = Field(
        default=None, max_length=4000, description="only these: a name, a directory, or a pattern with *"
    )


class UploadQuery(Fields):
    ticket: str | None = Field(
        default=None, min_length=1, max_length=200, description="the id that the ticket will have; default: a new one"
    )


class DiffQuery(Fields):
    other: str = Field(
        min_length=1, max_length=1000, description="TICKET, TICKET:STEP, TICKET:NUMBER or TICKET:STEP:NUMBER"
    )
    attempt: str = Field(default="", max_length=500, description="of this ticket: STEP, NUMBER or STEP:NUMBER")


class ArtifactsQuery(Fields):
    ticket: str | None = Field(default=None, max_length=300, description="only of this ticket")
    limit: int = Field(default=50, ge=1, le=500)


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploaded:
    """Submit the ticket with this ``id``, and ``digest`` in its inputs: `{"$files": {"repo/": digest}}`."""

    id: str
    digest: str
    files: int
    bytes: int


async def list_files(call: Call) -> TicketFiles:
    return await ticket_files.listed(call.store, await own_ticket_id(call))


async def show_file(call: Call) -> Response:
    id, name = await own_ticket_id(call), call.path["name"]
    found = await ticket_files.entry(call.store, id, name)
    if found is None:
        raise NotFound(f"the ticket {shown(id)} left no file {shown(name)}")
    entry, contents, offset = found
    if entry.is_link:
        target = await ticket_files.target_of(contents, entry, offset)
        raise Conflict(f"{shown(name)} is a link to {shown(target)}: ask for that")
    headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(name.rpartition('/')[2], safe='')}"}
    return ranged(call, entry.size, lambda start, size: contents.chunks(offset + start, size), BYTES, headers)


async def show_archive(call: Call) -> Response:
    """Like `swarm ticket get`, it has no link that leads out of it, and nothing by which git would run programs."""
    id, pattern = await own_ticket_id(call), call.query.pattern

    async def files() -> AsyncIterator[tuple[Entry, AsyncIterator[bytes]]]:
        async for entry, contents, offset in ticket_files.entries(call.store, id):
            if trees.runs_git(entry.name) or (pattern is not None and not ticket_files.matches(entry.name, pattern)):
                continue
            if entry.is_link:
                target = await ticket_files.target_of(contents, entry, offset)
                if not trees.may_come(entry.name, target):
                    continue
            yield entry, contents.chunks(offset, entry.size)

    await call.store.files(id)
    headers = {"content-disposition": "attachment; filename=files.tar", "cache-control": "no-store"}
    return StreamingResponse(tar.archive(files()), media_type=TAR, headers=headers)


async def diff_attempts(call: Call) -> Comparison:
    query: DiffQuery = call.query
    attempt = f":{query.attempt}" if query.attempt else ""
    one = f"{await own_ticket_id(call)}{attempt}"
    return await comparison.compare(call.store, one, query.other, project_id=call.actor.project_id)


async def upload_files(call: Call) -> Uploaded:
    id = call.query.ticket or str(uuid.uuid4())
    with contextlib.suppress(NotFound):
        await call.store.ticket(id)
        raise Conflict(f"the ticket id {shown(id)} is taken; files are sent before their ticket is added")
    uploads = call.context.tree_uploads
    if uploads.locked():
        raise busy("other uploads are under way: try again later")
    async with uploads, scratch(call.context.settings.data_dir) as place:
        file = place / "tree.tar"
        await body.save(call.request, MAX_UPLOAD_BYTES, file, seconds=UPLOAD_SECONDS)
        with file.open("rb") as opened:
            return await _kept(call, id, opened)


async def _kept(call: Call, id: str, file: BinaryIO) -> Uploaded:
    parts = trees.pack(tar.entries(file))
    digest = text = ""
    while batch := await asyncio.to_thread(trees.batch, parts):
        await call.store.keep_artifacts(sent_as(id, call.actor.project_id), dict(batch))
        digest, text = batch[-1]  # at last, the manifest
        if await call.request.is_disconnected():
            raise Refused(400, "the connection ended before the files were kept")
    tree = await asyncio.to_thread(trees.manifest, text)
    return Uploaded(id=id, digest=digest, files=len(tree.entries), bytes=tree.bytes)


async def list_artifacts(call: Call) -> list[ArtifactRow]:
    query: ArtifactsQuery = call.query
    if query.ticket is None and call.actor.project_id is not None:
        raise UsageError("this token is of a project: name a `ticket`")
    id = await ticket_id_of(call, query.ticket) if query.ticket is not None else None
    return (await call.store.artifacts(ticket_id=id, limit=query.limit))[: query.limit]


async def show_artifact(call: Call) -> Response:
    digest, project = call.path["digest"], call.actor.project_id
    if project is None:
        text = await call.store.artifact(digest)
    else:
        text = await call.store.artifact_of_project(digest, project)
    data = text.encode(errors="replace")

    async def chunks(start: int, size: int) -> AsyncIterator[bytes]:
        yield data[start : start + size]

    return ranged(call, len(data), chunks, JSON, {})


def ranged(
    call: Call, size: int, chunks: Callable[[int, int], AsyncIterator[bytes]], kind: str, headers: dict[str, str]
) -> Response:
    """All of it, or the one range that is asked for (RFC 9110, 14)."""
    headers = {**headers, "accept-ranges": "bytes", "cache-control": "no-store"}
    start, end, status = 0, size, 200
    given = _RANGE.fullmatch(call.request.headers.get("range", ""))
    if given is not None and (given[1] or given[2]) and not _is_reversed(given[1], given[2]):
        if given[1]:
            start, end = int(given[1]), min(int(given[2]) + 1, size) if given[2] else size
        else:
            start = max(0, size - int(given[2]))
        if start >= size or start >= end:
            raise Refused(416, f"there are {size:,} bytes", headers={"content-range": f"bytes */{size}"})
        status, headers["content-range"] = 206, f"bytes {start}-{end - 1}/{size}"
    headers["content-length"] = str(end - start)
    return StreamingResponse(chunks(start, end - start), status_code=status, media_type=kind, headers=headers)


def _is_reversed(first: str, last: str) -> bool:
    """Such a range is none (RFC 9110, 14.1.1), and so is not looked at."""
    return bool(first and last) and int(last) < int(first)


ENDPOINTS: Final[Sequence[Endpoint]] = (
    Endpoint(
        method="POST",
        path="/v1/files",
        role=Role.OPERATOR,
        summary="Send a tar archive of files, before the ticket that is given them",
        handler=upload_files,
        query=UploadQuery,
        upload=(TAR,),
        max_body_bytes=MAX_UPLOAD_BYTES,
        answer=Uploaded,
        status=201,
        errors={409: "there is a ticket with this id", 507: "a disk is full"},
    ),
    Endpoint(
        method="GET",
        path="/v1/tickets/{id}/diff",
        role=Role.VIEWER,
        summary="Compare two attempts: how they ended, what they cost, their files and outputs",
        handler=diff_attempts,
        query=DiffQuery,
        answer=Comparison,
        large=True,
    ),
    Endpoint(
        method="GET",
        path="/v1/tickets/{id}/files",
        role=Role.VIEWER,
        summary="List what a ticket's agents left in /work/out",
        handler=list_files,
        answer=TicketFiles,
    ),
    Endpoint(
        method="GET",
        path="/v1/tickets/{id}/files/{name:path}",
        role=Role.VIEWER,
        summary="One of these files, or a range of it",
        handler=show_file,
        media_type=BYTES,
        ranges=True,
    ),
    Endpoint(
        method="GET",
        path="/v1/tickets/{id}/archive",
        role=Role.VIEWER,
        summary="These files as a tar archive",
        handler=show_archive,
        query=PatternQuery,
        media_type=TAR,
    ),
    Endpoint(
        method="GET",
        path="/v1/artifacts",
        role=Role.VIEWER,
        summary="List artifacts: of a ticket, or the largest of all",
        handler=list_artifacts,
        query=ArtifactsQuery,
        answer=list[ArtifactRow],
        errors={404: "no such ticket"},
    ),
    Endpoint(
        method="GET",
        path="/v1/artifacts/{digest}",
        role=Role.VIEWER,
        summary="An artifact, or a range of its bytes",
        handler=show_artifact,
        answer=Any,
        ranges=True,
    ),
)
