"""Tokens as rows: who may call the API, and as what. A token itself is kept nowhere, only its SHA-256."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from swarm.base import versions
from swarm.errors import Conflict, NotFound, UsageError
from swarm.model import Role
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import iso, new_id, value
from swarm.store.sql.transaction import Row, Tx, one_row
from swarm.store.tickets import events

SESSION_SECONDS: Final = 86_400
LINK_SECONDS: Final = 300
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
_UNITS: Final = {"m": 60, "h": 3600, "d": 86_400}
MAX_SESSIONS: Final = 20  # of one name; the oldest goes
_USED_MS: Final = 60_000  # `last_used_at` is no more exact than that: a token is used often

_COLUMNS: Final = "id, name, kind, role, project_id, created_by, created_at, expires_at, last_used_at"
_INSERT: Final = one_row(
    "INSERT INTO tokens (id, name, kind, hash, role, project_id, created_by, created_at, expires_at) "
    "VALUES (:id, :name, :kind, :hash, :role, :project_id, :created_by, :now, :expires_at)"
)
_NAMED: Final = Sql("SELECT id FROM tokens WHERE kind = 'token' AND name = :name")
_LIST: Final = Sql(
    f"SELECT {_COLUMNS} FROM tokens WHERE kind = 'token' OR expires_at > :now_ms ORDER BY name, kind DESC, id"
)
_BY_HASH: Final = Sql(f"SELECT {_COLUMNS} FROM tokens WHERE hash = :hash")
_USED: Final = Sql("UPDATE tokens SET last_used_at = :now WHERE id = :id")
_DELETE: Final = Sql("DELETE FROM tokens WHERE id = :id")
_DELETE_OLD: Final = Sql("DELETE FROM tokens WHERE kind <> 'token' AND expires_at < :now_ms")
# With a token go the sessions that it began.
_DELETE_MADE: Final = Sql("DELETE FROM tokens WHERE kind <> 'token' AND created_by = :id")
_DELETE_NAMED: Final = Sql("DELETE FROM tokens WHERE name = :name")
_DELETE_OLDEST: Final = Sql(
    "DELETE FROM tokens WHERE kind = 'session' AND name = :name AND id NOT IN (SELECT id FROM tokens "
    f"WHERE kind = 'session' AND name = :name ORDER BY created_at DESC, id DESC LIMIT {MAX_SESSIONS})"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who asks. ``name``: as events have it. With a ``project_id``, other projects don't exist for it."""

    name: str
    role: Role
    project_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """What may be shown of a token, of a browser's session, or of a link that begins one. Times are ISO-8601."""

    id: str
    name: str
    kind: str
    role: str
    project_id: str | None
    created_by: str
    created_at: str | None
    expires_at: str | None
    last_used_at: str | None


def new_token() -> str:
    return f"swarm_{secrets.token_urlsafe(32)}"


def checked_name(name: str) -> str:
    """Raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError("a token's name has up to 63 letters, digits and . _ @ -, with a letter or digit first")
    return name


def expires_seconds(text: str) -> float:
    """Raises UsageError."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})([mhd])", text)
    if not found:
        raise UsageError(f"a token expires after a number and m, h or d, such as 30d, not {text[:80]!r}")
    return float(int(found[1]) * _UNITS[found[2]])


def digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


def add(tx: Tx, token: str, actor: Actor, *, kind: str, by: str, expires_seconds: float | None) -> None:
    """``kind``: 'token', 'session' or 'link'. Raises Conflict if a token has this name, and UsageError for a project
    without a name: tickets of that one would be of none."""
    if actor.project_id == "":
        raise UsageError("the project has no name: leave it out for a token of all projects")
    if kind == "token" and tx.first(_NAMED, name=actor.name) is not None:
        raise Conflict(f"there is a token {actor.name!r}; choose another name, or revoke that one first")
    tx.run(
        _INSERT,
        id=new_id(tx.now_ms),
        name=actor.name,
        kind=kind,
        hash=digest(token),
        role=str(actor.role),
        project_id=actor.project_id,
        created_by=by,
        now=tx.now,
        expires_at=None if expires_seconds is None else tx.now_ms + round(expires_seconds * 1000),
    )
    if kind == "token":
        events.record(tx, "token.create", by=by, name=actor.name, role=actor.role, project=actor.project_id)
    tx.run(_DELETE_OLD, now_ms=tx.now_ms)


def tokens(tx: Tx) -> list[TokenRow]:
    return [_row(row) for row in tx.all(_LIST, now_ms=tx.now_ms)]


def find(tx: Tx, token: str) -> tuple[Actor, str, bool] | None:
    """The holder of a token or session that has not expired, its id, and whether `use` should say that it is used."""
    row = _valid(tx, token)
    if row is None or row.kind == "link":
        return None
    stale = row.last_used_at is None or row.last_used_at < iso(tx.now_ms - _USED_MS)
    return _actor(row), row.id, stale


def may_log_in(tx: Tx, given: str) -> Actor | None:
    """Whose a token or a link is that has not expired."""
    row = _valid(tx, given)
    return None if row is None or row.kind == "session" else _actor(row)


def _valid(tx: Tx, token: str) -> Row | None:
    row = tx.first(_BY_HASH, hash=digest(token))
    return row if row is not None and (row.expires_at is None or _expires(row) > tx.now_ms) else None


def use(tx: Tx, ids: Sequence[str]) -> list[None]:
    tx.many(_USED, [{"id": id, "now": tx.now} for id in ids])
    return [None for _ in ids]


def open_session(tx: Tx, given: str, session: str) -> Actor | None:
    """Make a session of a link, which is then worth nothing more, or of a token. None if it is neither."""
    row = _valid(tx, given)
    if row is None or row.kind == "session":
        return None
    if row.kind == "link":
        tx.run(_DELETE, id=row.id)
    left = SESSION_SECONDS if row.expires_at is None or row.kind == "link" else (row.expires_at - tx.now_ms) / 1000
    actor = _actor(row)
    by = row.created_by if row.kind == "link" else row.id
    add(tx, session, actor, kind="session", by=by, expires_seconds=min(SESSION_SECONDS, left))
    tx.run(_DELETE_OLDEST, name=actor.name)
    return actor


def close_session(tx: Tx, session: str) -> None:
    row = tx.first(_BY_HASH, hash=digest(session))
    if row is not None and row.kind == "session":
        tx.run(_DELETE, id=row.id)


def revoke(tx: Tx, ref: str, *, by: str) -> TokenRow:
    """By id: a token and the sessions that it began, or one session. By name: all that have the name. Raises
    NotFound."""
    known = tokens(tx)  # of a name, the token first
    found = next((row for row in known if row.id == ref), next((row for row in known if row.name == ref), None))
    if found is None:
        hint = versions.did_you_mean(ref, [row.name for row in known])
        raise NotFound(f"no token {ref[:80]!r}{hint or '; `swarm token list` shows all'}")
    tx.run(_DELETE, id=found.id)
    tx.run(_DELETE_MADE, id=found.id)
    if ref == found.name:
        tx.run(_DELETE_NAMED, name=ref)
    events.record(tx, f"{found.kind}.revoke", by=by, name=found.name)
    return found


def _actor(row: Row) -> Actor:
    known = Role(row.role) if row.role in tuple(Role) else Role.VIEWER  # another program wrote it
    return Actor(name=row.name, role=known, project_id=row.project_id)


def _row(row: Row) -> TokenRow:
    return value(TokenRow, row, expires_at=None if row.expires_at is None else iso(_expires(row)))


def _expires(row: Row) -> float:
    """What is no number, another program wrote: it has expired."""
    return row.expires_at if isinstance(row.expires_at, int | float) else 0.0
