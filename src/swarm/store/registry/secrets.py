"""Secrets as rows: names, scopes, and values already sealed (`swarm.admin.vault`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from swarm.base import versions
from swarm.errors import NotFound
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import value
from swarm.store.sql.transaction import Tx
from swarm.store.tickets import events

_PUT: Final = Sql(
    "INSERT INTO secrets (name, scope, sealed, created_at, updated_at) VALUES (:name, :scope, :sealed, :now, :now) "
    "ON CONFLICT (name, scope) DO UPDATE SET sealed = excluded.sealed, updated_at = excluded.updated_at"
)
_LIST: Final = Sql("SELECT name, scope, updated_at FROM secrets ORDER BY name, scope")
_OF_NAMES: Final = Sql("SELECT name, scope, sealed FROM secrets WHERE name IN :ids")
_ONE: Final = Sql("SELECT name FROM secrets WHERE name = :name AND scope = :scope")
_DELETE: Final = Sql("DELETE FROM secrets WHERE name = :name AND scope = :scope")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    name: str
    scope: str
    sealed: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretRow:
    """What may be shown of a secret."""

    name: str
    scope: str
    updated_at: str | None


def put(tx: Tx, secret: Sealed, *, by: str | None = None) -> None:
    tx.run(_PUT, name=secret.name, scope=secret.scope, sealed=secret.sealed, now=tx.now)
    if by is not None:
        events.record(tx, "secret.set", by=by, name=secret.name, scope=secret.scope)


def secrets(tx: Tx) -> list[SecretRow]:
    return [value(SecretRow, row) for row in tx.all(_LIST)]


def of_names(tx: Tx, names: Sequence[str]) -> list[Sealed]:
    """Those of all scopes."""
    return [value(Sealed, row) for row in tx.all_in(_OF_NAMES, names)]


def remove(tx: Tx, name: str, scope: str, *, by: str | None = None) -> None:
    if tx.first(_ONE, name=name, scope=scope) is None:
        rows = tx.all(_LIST)
        near = versions.did_you_mean(name, dict.fromkeys(row.name for row in rows))
        if scopes := [row.scope for row in rows if row.name == name]:
            near = f"; it is set for {', '.join(scopes)}"
        raise NotFound(f"no secret {name!r} for {scope}{near or '; `swarm secret list` shows all'}")
    tx.run(_DELETE, name=name, scope=scope)
    if by is not None:
        events.record(tx, "secret.remove", by=by, name=name, scope=scope)
