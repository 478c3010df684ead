"""Pages of sandboxes and of snapshots: newest first, a bounded number of rows looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swarm.store.sql.dialect import Sql
from swarm.store.sql.transaction import Row, Tx
from swarm.store.tickets.pages import cursor, read_cursor


def newest(
    tx: Tx,
    table: str,
    columns: str,
    *,
    inside: Sequence[str],
    terms: Sequence[str],
    named: dict[str, Any],
    after: str | None,
    limit: int,
    scanned: int,
) -> tuple[list[Row], str | None]:
    """Up to ``limit`` rows of ``table``, and where the next page starts; None at the end.

    ``columns`` and conditions name it by its alias, ``columns``' first letter. ``inside``: the conditions that an index
    serves; ``terms``: those that each of the ``scanned`` rows is looked at for. ``named``: their values. Raises
    UsageError for an ``after`` that no page gave.
    """
    a, inside, named = columns[0], [*inside, "1 = 1"], {**named, "limit": limit, "scanned": scanned}
    if after is not None:
        named["created"], named["after_id"] = read_cursor(after)
        inside.append(f"({a}.created_at < :created OR {a}.created_at = :created AND {a}.id < :after_id)")
        inside.append(f"{a}.created_at <= :created")  # the index starts there
    order = f"ORDER BY {a}.created_at DESC, {a}.id DESC"
    source = f"SELECT {{}} FROM {table} {a} WHERE {' AND '.join(inside)} {order}"
    found = tx.all(
        Sql(
            f"SELECT {columns} FROM ({source.format(columns)} LIMIT :scanned) {a} "
            f"WHERE {' AND '.join([*terms, '1 = 1'])} {order} LIMIT :limit"
        ),
        **named,
    )
    if len(found) == limit:
        last: Row | None = found[-1]
    else:
        keys = Sql(f"{source.format(f'{a}.id, {a}.created_at')} LIMIT 1 OFFSET :skipped")
        last = tx.first(keys, skipped=scanned - 1, **named)
    return found, None if last is None else cursor(last.created_at, last.id)
