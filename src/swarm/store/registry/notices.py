"""Who is told what happens, by a signed POST. The secret that signs is in the vault."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from swarm.errors import Conflict, NotFound
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import new_id, parsed
from swarm.store.sql.transaction import Row, Tx, one_row
from swarm.store.tickets import events

MOST: Final = 50  # each has a task in the server

_COLUMNS: Final = "id, url, kinds, project_id, created_by, created_at, sent_at, error"
_INSERT: Final = one_row(
    "INSERT INTO notices (id, url, kinds, project_id, created_by, created_at) "
    "VALUES (:id, :url, :kinds, :project_id, :by, :now)"
)
_LIST: Final = Sql(f"SELECT {_COLUMNS} FROM notices ORDER BY id")
_DELETE: Final = Sql("DELETE FROM notices WHERE id = :id")
_FORGET: Final = Sql("DELETE FROM positions WHERE name = :name")
_SENT: Final = Sql("UPDATE notices SET sent_at = :now, error = NULL WHERE id = :id")
_FAILED: Final = Sql("UPDATE notices SET error = :error WHERE id = :id")


class NoticeKind(StrEnum):
    ENDED = "ended"
    FAILED = "failed"
    APPROVAL = "approval"
    BUDGET = "budget"


@dataclass(frozen=True, slots=True, kw_only=True)
class NoticeRow:
    """``kinds``: what it tells of; with a ``project_id``, only of that project's tickets. ``sent_at``: the last one
    that was taken; ``error``: why the next one was not, so far."""

    id: str
    url: str
    kinds: tuple[str, ...]
    project_id: str | None
    created_by: str
    created_at: str | None
    sent_at: str | None
    error: str | None


def position_of(id: str) -> str:
    return f"notice:{id}"


def add(tx: Tx, *, url: str, kinds: Sequence[NoticeKind], project_id: str | None, by: str) -> NoticeRow:
    """Raises Conflict when there are too many."""
    if len(tx.all(_LIST)) >= MOST:
        raise Conflict(f"there are {MOST} notices, and no more are possible: remove one first")
    id = new_id(tx.now_ms)
    tx.run(_INSERT, id=id, url=url, kinds=json.dumps(kinds), project_id=project_id, by=by, now=tx.now)
    events.record(tx, "notice.add", by=by, notice=id, on=list(kinds), project=project_id)
    return next(row for row in notices(tx) if row.id == id)


def notices(tx: Tx) -> list[NoticeRow]:
    return [_row(row) for row in tx.all(_LIST)]


def notice(tx: Tx, ref: str) -> NoticeRow:
    """By id, or its beginning. Raises NotFound."""
    found = [row for row in notices(tx) if row.id == ref or (len(ref) >= 4 and row.id.startswith(ref))]
    if len(found) != 1:
        raise NotFound(f"no notice {ref[:80]!r}, or several; `swarm notice list` shows all")
    return found[0]


def remove(tx: Tx, ref: str, *, by: str) -> NoticeRow:
    found = notice(tx, ref)
    tx.run(_DELETE, id=found.id)
    tx.run(_FORGET, name=position_of(found.id))
    events.record(tx, "notice.remove", by=by, notice=found.id)
    return found


def note(tx: Tx, id: str, error: str | None) -> None:
    """How the last try ended."""
    if error is None:
        tx.run(_SENT, id=id, now=tx.now)
    else:
        tx.run(_FAILED, id=id, error=error[:500])


def _row(row: Row) -> NoticeRow:
    kinds = tuple(kind for kind in parsed(row.kinds, list) or () if kind in tuple(NoticeKind))
    return NoticeRow(
        id=row.id, url=row.url, kinds=kinds, project_id=row.project_id, created_by=row.created_by,
        created_at=row.created_at, sent_at=row.sent_at, error=row.error,
    )  # fmt: skip
