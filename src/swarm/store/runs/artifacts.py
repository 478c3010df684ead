"""Artifacts: large values of workflow steps, stored once by digest and replaced by references.

References (see `packing`) stay within their ticket and are deleted with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from swarm.cel.expression import ExpressionError
from swarm.errors import NotFound, UsageError
from swarm.store.runs.packing import MAX_BYTES, REFERENCE, Gone, resolve, unpack
from swarm.store.sql.dialect import Sql
from swarm.store.sql.transaction import Tx

_DATA: Final = Sql("SELECT data FROM artifacts WHERE digest = :digest")
_PUT: Final = Sql(
    "INSERT INTO artifacts (digest, bytes, data, created_at) VALUES (:digest, :bytes, :data, :now) "
    "ON CONFLICT (digest) DO NOTHING"
)
_USE: Final = Sql(
    "INSERT INTO artifact_uses (ticket_id, digest) VALUES (:ticket_id, :digest) "
    "ON CONFLICT (ticket_id, digest) DO NOTHING"
)
_USED_BY_PROJECT: Final = Sql(
    "SELECT u.digest FROM artifact_uses u JOIN tickets t ON t.id = u.ticket_id "
    "WHERE u.digest = :digest AND t.project_id = :project_id LIMIT 1"
)
_DATA_OF_TICKET: Final = Sql(
    "SELECT a.data FROM artifact_uses u JOIN artifacts a ON a.digest = u.digest "
    "WHERE u.ticket_id = :ticket_id AND u.digest = :digest"
)
_OF_TICKET: Final = Sql(
    "SELECT a.digest, a.bytes, a.created_at FROM artifact_uses u JOIN artifacts a ON a.digest = u.digest "
    "WHERE u.ticket_id = :ticket_id ORDER BY a.created_at, a.digest"
)
_LARGEST: Final = Sql(
    "SELECT a.digest, a.bytes, a.created_at, "
    "(SELECT count(*) FROM artifact_uses u WHERE u.digest = a.digest) AS tickets "
    "FROM artifacts a ORDER BY a.bytes DESC, a.digest LIMIT :limit"
)
_BY_PREFIX: Final = Sql("SELECT digest FROM artifacts WHERE digest >= :low AND digest < :high ORDER BY digest LIMIT 2")
_UNUSED: Final = Sql(
    "DELETE FROM artifacts WHERE NOT EXISTS (SELECT 1 FROM artifact_uses u WHERE u.digest = artifacts.digest)"
)
_USES_WITHOUT_TICKET: Final = Sql(
    "DELETE FROM artifact_uses WHERE NOT EXISTS (SELECT 1 FROM tickets t WHERE t.id = artifact_uses.ticket_id)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactRow:
    digest: str
    bytes: int
    created_at: str
    tickets: int | None = None


# --- the database -----------------------------------------------------------------------------------------------------


def keep(tx: Tx, ticket_id: str, parts: Mapping[str, str]) -> None:
    """Store the parts of a `Packed`, in the transaction that writes its text."""
    if parts:
        tx.exact()
    for digest, text in parts.items():
        tx.run(_PUT, digest=digest, bytes=len(text.encode()), data=text, now=tx.now)
        tx.run(_USE, ticket_id=ticket_id, digest=digest)


def sent_as(ticket_id: str, project_id: str | None) -> str:
    """In place of a ticket's id, for what a caller of this project sends before the ticket is added: whoever takes the
    id first, or meanwhile, gets only what its own project sent. No ticket has such an id, since none may have a NUL."""
    return f"\0{json.dumps([project_id, ticket_id])}"


def of_ticket(tx: Tx, ticket_id: str, digest: str) -> str:
    """The text of an artifact that the ticket uses. Raises NotFound."""
    row = tx.first(_DATA_OF_TICKET, ticket_id=ticket_id, digest=digest)
    if row is None:
        raise NotFound(f"the ticket {ticket_id} has no artifact {digest[:12]}")
    return str(row.data)


def text(tx: Tx, digest: str) -> str:
    """The JSON text of an artifact. Raises `Gone` for one that was deleted."""
    row = tx.first(_DATA, digest=digest)
    if row is None:
        raise Gone(_gone(digest))
    return str(row.data)


def loader(tx: Tx) -> Callable[[str], Any]:
    """For `unpack`, until the transaction ends. Raises `Gone`."""

    def load(digest: str) -> Any:
        return unpack(text(tx, digest), load)

    return load


def referred(tx: Tx, text: str) -> dict[str, str]:
    """The JSON texts of all artifacts that a packed value needs, by digest. Found without reading the JSON: a reference
    has one form only. Raises NotFound if one is missing, UsageError if the whole is too large."""
    found: dict[str, str] = {}
    queue, left = [text], MAX_BYTES
    for one in queue:  # grows while it is walked
        for digest in REFERENCE.findall(one):
            if digest not in found:
                row = tx.first(_DATA, digest=digest)
                if row is None:
                    raise NotFound(_gone(digest))
                found[digest] = row.data
                queue.append(row.data)
                if (left := left - len(row.data)) < 0:
                    raise UsageError(f"needs artifacts of more than {MAX_BYTES >> 20} MiB")
    return found


def _gone(digest: str) -> str:
    return f"the artifact {digest[:12]} is gone from the table artifacts"


def data(tx: Tx, prefix: str) -> str:
    """An artifact as JSON text without references, by its digest or a prefix of that. Raises NotFound."""
    wanted = prefix.lower().removeprefix("sha256:")
    rows = []
    if wanted and all(c in "0123456789abcdef" for c in wanted):
        rows = tx.all(_BY_PREFIX, low=wanted, high=wanted + "g")
    if len(rows) != 1:
        why = "several artifacts begin" if rows else "no artifact begins"
        raise NotFound(f"{why} with {prefix[:80]!r}; `swarm artifact list` shows all")
    row = tx.first(_DATA, digest=rows[0].digest)
    assert row is not None
    try:
        return resolve(row.data, loader(tx))
    except Gone as error:
        raise NotFound(str(error)) from None
    except ExpressionError as error:
        raise UsageError(str(error)) from None


def of_project(tx: Tx, digest: str, project_id: str) -> str:
    """The same, by its whole digest, if a ticket of the project uses it. Raises NotFound."""
    if len(digest) != 64 or tx.first(_USED_BY_PROJECT, digest=digest, project_id=project_id) is None:
        raise NotFound(f"no artifact {digest[:80]!r} in the project; write its whole digest")
    return data(tx, digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListRequest:
    ticket_id: str | None
    limit: int


def artifacts(tx: Tx, request: ListRequest) -> list[ArtifactRow]:
    if request.ticket_id is not None:
        rows = tx.all(_OF_TICKET, ticket_id=request.ticket_id)
        return [ArtifactRow(digest=row.digest, bytes=row.bytes, created_at=row.created_at) for row in rows]
    return [
        ArtifactRow(digest=row.digest, bytes=row.bytes, created_at=row.created_at, tickets=row.tickets)
        for row in tx.all(_LARGEST, limit=request.limit)
    ]


def sweep(tx: Tx, request: None) -> None:
    """Delete unused artifacts. There are none unless somebody deleted rows with triggers switched off."""
    tx.run(_USES_WITHOUT_TICKET)
    tx.run(_UNUSED)
