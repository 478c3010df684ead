"""Webhook requests: each creates one ticket, even if it arrives several times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from swarm.errors import Conflict
from swarm.model import Ticket
from swarm.store.registry import schedules
from swarm.store.sql.dialect import Sql
from swarm.store.sql.transaction import Tx
from swarm.store.tickets import tickets

KEPT_DAYS: Final = 30
_DELETED_AT_ONCE: Final = 100

_KNOWN: Final = Sql(
    "SELECT key, digest, ticket_id FROM webhook_calls WHERE workflow = :workflow AND key IN (:signature, :key)"
)
_INSERT: Final = Sql(
    "INSERT INTO webhook_calls (workflow, key, digest, ticket_id, at) "
    "VALUES (:workflow, :key, :digest, :ticket_id, :at)"
)
_DELETE_OLD: Final = Sql(
    "DELETE FROM webhook_calls WHERE (workflow, key) IN "
    "(SELECT workflow, key FROM webhook_calls WHERE at < :before ORDER BY at LIMIT :limit)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookCall:
    """An authenticated request. ``signature``: the HMAC of what was signed; ``key``: the sender's own id for the
    request, if any; ``digest``: of the body. ``ticket`` is created unless an earlier request did."""

    workflow: str
    signature: str
    key: str | None
    digest: str
    ticket: Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookAnswer:
    ticket_id: str
    repeated: bool


def call(tx: Tx, request: WebhookCall) -> WebhookAnswer:
    """An exact replay is recognised by its signature: another key can't make a second ticket of it."""
    signature, key = f"signature:{request.signature}", f"key:{request.key}" if request.key is not None else None
    known = {row.key: row for row in tx.all(_KNOWN, workflow=request.workflow, signature=signature, key=key)}
    first = known.get(signature) or known.get(key or "")
    if first is not None and first.digest != request.digest:
        raise Conflict(f"the key {request.key!r} was used with another body; use a different key for each event")
    ticket_id = first.ticket_id if first is not None else request.ticket.id
    if first is None:
        schedules.add(tx, [request.ticket])
    for one in (signature, key):
        if one is not None and one not in known:
            tx.run(
                _INSERT, workflow=request.workflow, key=one, digest=request.digest, ticket_id=ticket_id, at=tx.now_ms
            )
    tx.run(_DELETE_OLD, before=tx.now_ms - KEPT_DAYS * 86_400_000, limit=_DELETED_AT_ONCE)
    return WebhookAnswer(ticket_id=ticket_id, repeated=first is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Once:
    """A request that a sender may repeat. ``scope``: whose ``key`` it is; ``digest``: of what was asked."""

    scope: str
    key: str
    digest: str


def add_once(
    tx: Tx, ticket: Ticket, *, once: Once, depends_on: Sequence[str], uses: int, sent_as: str | None, by: str
) -> tuple[Ticket, bool]:
    """Add a ticket, or return the one that this request added before, as it is now, and True. Raises Conflict if the
    key was used for something else, NotFound if that ticket was deleted."""
    known = tx.first(_KNOWN, workflow=once.scope, signature=None, key=f"key:{once.key}")
    if known is not None:
        if known.digest != once.digest:
            raise Conflict(f"the key {once.key!r} was used for another request; use a different key for each")
        return tickets.ticket(tx, known.ticket_id), True
    added = tickets.add(tx, ticket, depends_on=depends_on, uses=uses, sent_as=sent_as, by=by)
    tx.run(_INSERT, workflow=once.scope, key=f"key:{once.key}", digest=once.digest, ticket_id=added.id, at=tx.now_ms)
    tx.run(_DELETE_OLD, before=tx.now_ms - KEPT_DAYS * 86_400_000, limit=_DELETED_AT_ONCE)
    return added, False
