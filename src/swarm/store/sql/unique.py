"""Finds the row that a person means by the beginning of its id."""

from __future__ import annotations

import re
from typing import Final

from swarm.errors import Conflict
from swarm.store.sql.dialect import Sql
from swarm.store.sql.transaction import Row, Tx

_GENERATED: Final = re.compile(r"[0-9a-f]{8}(-?)(?:[0-9a-f]{4}\1){3}[0-9a-f]{12}")


def unique(tx: Tx, statement: Sql, ref: str, what: str, **values: str | None) -> Row | None:
    """The row whose id alone begins with ``ref``, of at least four characters. Raises Conflict if several do.
    ``statement``: rows with :ref <= id < :end; it may have further ``values``.

    Only ids that were generated: `ticket rm test-1` must never mean test-10."""
    if len(ref) < 4:
        return None
    found = tx.all(statement, ref=ref, end=f"{ref}\U0010ffff", **values)
    rows = [row for row in found if _GENERATED.fullmatch(str(row.id))]
    if len(rows) > 1:
        some = ", ".join(str(row.id) for row in rows[:5]) + (", …" if len(rows) > 5 else "")
        raise Conflict(f"the ids of several {what} begin with {ref!r}: {some}; write more of it")
    return rows[0] if rows else None
