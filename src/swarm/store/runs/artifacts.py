"""Artifacts: large values of workflow steps, stored once by digest and replaced by references.

A reference is `{"$artifact": {"digest": …, "bytes": …}}` in the JSON of a step's `inputs` or `outputs`. If a value has
such an object in it already, that is escaped: `{"$artifact": {"pairs": …}}`. So nobody can read an artifact by writing
down its digest. References stay within their ticket and are deleted with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import sqlalchemy as sa

from swarm.cel import artifact_refs
from swarm.cel.artifact_refs import KEY, ArtifactRef
from swarm.cel.expression import ExpressionError
from swarm.errors import NotFound, UsageError
from swarm.store.sql.database import Tx
from swarm.store.sql.rows import dump, storable_json

INLINE_BYTES: Final = 64 << 10  # values up to this size stay in the step's row
MAX_BYTES: Final = 16 << 20  # of a step's inputs or a ticket's outputs, references replaced by their values
MARK: Final = f'"{KEY}"'  # JSON without it has no references

_DATA: Final = sa.text("SELECT data FROM artifacts WHERE digest = :digest")
_PUT: Final = sa.text(
    "INSERT INTO artifacts (digest, bytes, data, created_at) VALUES (:digest, :bytes, :data, :now) "
    "ON CONFLICT (digest) DO NOTHING"
)
_USE: Final = sa.text(
    "INSERT INTO artifact_uses (ticket_id, digest) VALUES (:ticket_id, :digest) "
    "ON CONFLICT (ticket_id, digest) DO NOTHING"
)
_OF_TICKET: Final = sa.text(
    "SELECT a.digest, a.bytes, a.created_at FROM artifact_uses u JOIN artifacts a ON a.digest = u.digest "
    "WHERE u.ticket_id = :ticket_id ORDER BY a.created_at, a.digest"
)
_LARGEST: Final = sa.text(
    "SELECT a.digest, a.bytes, a.created_at, "
    "(SELECT count(*) FROM artifact_uses u WHERE u.digest = a.digest) AS tickets "
    "FROM artifacts a ORDER BY a.bytes DESC, a.digest LIMIT :limit"
)
_BY_PREFIX: Final = sa.text(
    "SELECT digest FROM artifacts WHERE digest >= :low AND digest < :high ORDER BY digest LIMIT 2"
)
_UNUSED: Final = sa.text(
    "DELETE FROM artifacts WHERE NOT EXISTS (SELECT 1 FROM artifact_uses u WHERE u.digest = artifacts.digest)"
)
_USES_WITHOUT_TICKET: Final = sa.text(
    "DELETE FROM artifact_uses WHERE NOT EXISTS (SELECT 1 FROM tickets t WHERE t.id = artifact_uses.ticket_id)"
)


class Gone(ExpressionError):
    pass


@dataclass(frozen=True, slots=True)
class Packed:
    """``text``: JSON for a row; ``parts``: digest → JSON text of the new artifacts that it refers to."""

    text: str
    parts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactRow:
    digest: str
    bytes: int
    created_at: str
    tickets: int | None = None


# --- JSON with references ---------------------------------------------------------------------------------------------


def pack(value: Any) -> Packed:
    """A value, which may have references in it (`ArtifactRef`), as JSON. Each large value within becomes an artifact;
    if the rest is still large, it becomes one too. Raises RecursionError for a value nested too deeply for `json`."""
    text = dump(value)
    if MARK not in text and len(text.encode()) <= INLINE_BYTES:
        return Packed(text)
    parts: dict[str, str] = {}
    text = _packed(value, parts)
    return Packed(dump(_part(text, parts)) if len(text.encode()) > INLINE_BYTES else text, parts)


def pack_text(text: str) -> Packed:
    """The same for the JSON text of an agent's outputs."""
    return pack(json.loads(text)) if worth_packing(text) else Packed(storable_json(text))


def worth_packing(text: str) -> bool:
    """False if `pack_text` certainly leaves it unchanged."""
    return len(text) > INLINE_BYTES // 4 or MARK in text


def unpack(text: str | None, load: Callable[[str], Any]) -> Any:
    """The value in a row; its references become `ArtifactRef`, which call ``load`` with the digest."""
    if text is None:
        return None
    if MARK not in text:
        return json.loads(text)

    def hook(found: dict[str, Any]) -> Any:
        inner = found.get(KEY)
        if not isinstance(inner, dict) or len(found) != 1:
            return found
        if isinstance(inner.get("digest"), str) and isinstance(inner.get("bytes"), int):
            return ArtifactRef(inner["digest"], inner["bytes"], load)
        return dict(inner["pairs"]) if isinstance(inner.get("pairs"), list) else found

    return json.loads(text, object_hook=hook)


def _packed(value: Any, parts: dict[str, str]) -> str:
    """JSON in which all large inner values are replaced. Takes only one frame per level: the value may be deep."""
    if isinstance(value, ArtifactRef) or not isinstance(value, dict | list):
        return dump(value)
    named = isinstance(value, dict)
    escaped = named and KEY in value  # not a reference: it came with the value
    pieces = []
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        text = _packed(inner, parts)
        if len(text.encode()) > INLINE_BYTES:
            text = dump(_part(text, parts))
        pieces.append(f"[{dump(name)},{text}]" if escaped else f"{dump(name)}:{text}" if named else text)
    inside = ",".join(pieces)
    if escaped:
        return f'{{"{KEY}":{{"pairs":[{inside}]}}}}'
    return f"{{{inside}}}" if named else f"[{inside}]"


def _part(text: str, parts: dict[str, str]) -> dict[str, Any]:
    data = text.encode()
    digest = hashlib.sha256(data).hexdigest()
    parts[digest] = text
    return {KEY: {"digest": digest, "bytes": len(data)}}


# --- the database -----------------------------------------------------------------------------------------------------


def keep(tx: Tx, ticket_id: str, parts: Mapping[str, str]) -> None:
    """Store the parts of a `Packed`, in the transaction that writes its text."""
    for digest, text in parts.items():
        tx.run(_PUT, digest=digest, bytes=len(text.encode()), data=text, now=tx.now)
        tx.run(_USE, ticket_id=ticket_id, digest=digest)


def loader(tx: Tx) -> Callable[[str], Any]:
    """For `unpack`, until the transaction ends. Raises `Gone` for an artifact that was deleted."""

    def load(digest: str) -> Any:
        row = tx.first(_DATA, digest=digest)
        if row is None:
            raise Gone(f"the artifact {digest[:12]} is gone from the table artifacts")
        return unpack(row.data, load)

    return load


def resolve_references(tx: Tx, text: str) -> str:
    """A step's `inputs` or `outputs` as JSON without references. Raises NotFound if an artifact is missing, UsageError
    if the whole is too large."""
    try:
        return dump(artifact_refs.resolve_references(unpack(text, loader(tx)), limit_bytes=MAX_BYTES))
    except Gone as error:
        raise NotFound(str(error)) from None
    except ExpressionError as error:
        raise UsageError(str(error)) from None


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
    return resolve_references(tx, row.data)


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
