"""On which hosts a ticket may run: what its agent `requires`, beside the hosts' labels.

Whoever would claim a ticket, or a step, and lacks what it requires, marks it with that (`waits_for`), once. A claim
reads those without a mark, and those whose marks its host has: the others are not in its way, however many they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from swarm.fields import IN_WORDS, LABEL, MAX_LABELS, MOST_NUMBER
from swarm.store.sql.conditions import STEP_READY
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import lenient
from swarm.store.sql.transaction import Tx

MOST: Final = 64  # marks that one claim looks at
MEMORY: Final = ">memory_mb"  # no label's name: so much memory for one VM

_READY: Final = {"tickets": "state = 'ready'", "step_executions": STEP_READY}
MARKED: Final = " OR ".join(
    f"EXISTS (SELECT 1 FROM {table} WHERE {ready} AND waits_for > '')" for table, ready in _READY.items()
)


def _next(table: str, after: str) -> str:
    return f"(SELECT min(waits_for) FROM {table} WHERE {_READY[table]} AND waits_for > {after})"


# Each mark by one look into the index, however many tickets have it.
_MARKS: Final = {
    table: Sql(
        f"WITH RECURSIVE marks(mark) AS (SELECT {_next(table, repr(''))} UNION ALL "
        f"SELECT {_next(table, 'marks.mark')} FROM marks WHERE marks.mark IS NOT NULL) "
        "SELECT mark FROM marks WHERE mark IS NOT NULL LIMIT 1000"
    )
    for table in _READY
}
MARKS_OF_TICKETS, MARKS_OF_STEPS = _MARKS["tickets"], _MARKS["step_executions"]
_HOSTS: Final = Sql("SELECT name, labels, capacity FROM hosts ORDER BY name")
_UNMET: Final = Sql("SELECT requires, since FROM unmet")
_ADD: Final = Sql("INSERT INTO unmet (requires, since) VALUES (:requires, :since) ON CONFLICT (requires) DO NOTHING")
_REMOVE: Final = Sql("DELETE FROM unmet WHERE requires = :requires")
_OF_TICKET: Final = Sql(
    "SELECT NULL AS step_id, waits_for FROM tickets WHERE id = :id AND state = 'ready' AND waits_for > '' "
    "UNION ALL SELECT s.step_id, s.waits_for FROM workflow_runs r JOIN step_executions s ON s.run_id = r.id "
    "WHERE r.ticket_id = :id AND r.status IN ('running', 'waiting') AND s.status = 'ready' AND s.waits_for > '' LIMIT 3"
)
_CLEAR: Final = tuple(
    Sql(f"UPDATE {table} SET waits_for = '' WHERE {ready} AND waits_for > ''") for table, ready in _READY.items()
)
CLEAR_TICKETS, CLEAR_STEPS = _CLEAR


@dataclass(frozen=True, slots=True, kw_only=True)
class Elsewhere:
    """Something waits for a host with this; ``hosts``: those that are known and have it."""

    requires: str
    hosts: list[str]
    step_id: str | None = None

    def __str__(self) -> str:
        known = ", ".join(self.hosts) or "none is known"
        return f"{self.step_id or 'it'} waits for a host with {self.requires} ({known})"


@dataclass(slots=True, kw_only=True)
class Places:
    """Of the marks: those that this host has all of, and those that no host has had for too long."""

    here: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)


def labels(value: object) -> dict[str, Any]:
    """What an agent, a step or a ticket requires, as its row says. Raises ValueError."""
    items = value.items() if isinstance(value, dict) and len(value) <= MAX_LABELS else [("", None)]
    for name, wanted in items:
        text = "x" if isinstance(wanted, int) and abs(wanted) <= MOST_NUMBER else wanted
        if not isinstance(text, str) or not all(re.fullmatch(LABEL.removesuffix("$"), one) for one in (name, text)):
            raise ValueError(
                f"requires must be a JSON object of at most {MAX_LABELS} labels with values, each {IN_WORDS[LABEL]}"
            )
    return dict(items)


def parsed(text: str) -> dict[str, Any]:
    """The same of a JSON text."""
    try:
        return labels(json.loads(text))
    except RecursionError:
        return labels(None)


def mark(requires: Mapping[str, Any]) -> str:
    return json.dumps(dict(requires), sort_keys=True, separators=(",", ":"))


def has(labels: Mapping[str, Any], memory_mb: object, requires: Mapping[str, Any]) -> bool:
    """Has a host with these labels, and so much memory for one VM (None: any), what is required?"""
    for name, value in requires.items():
        if name == MEMORY:
            if not isinstance(value, int) or (isinstance(memory_mb, int) and memory_mb < value):
                return False  # another program may have written the mark
        elif name not in labels or type(labels[name]) is not type(value) or labels[name] != value:
            return False
    return True


def words(text: str) -> str:
    said = []
    for name, value in _object(text).items():
        if name == MEMORY:
            said.append(f"{value} MB of memory for one VM")
        else:
            said.append(f"{name}={value if isinstance(value, str) else json.dumps(value)}")
    return ", ".join(said)


def read(tx: Tx, labels: Mapping[str, Any], memory_mb: int | None, *, patience_ms: float) -> Places:
    """For a claim, or for whoever asks what is due, on the host with these labels. Writes since when no known host has
    what is required."""
    marks, hosts, found = _marks(tx), _hosts(tx), Places()
    since = {str(row.requires): row.since for row in tx.all(_UNMET)}
    for one in marks:
        requires = _object(one)
        is_here = has(labels, memory_mb, requires)
        if is_here or any(has(*host, requires) for host in hosts.values()):
            if one in since:
                tx.run(_REMOVE, requires=one)
        elif one not in since:
            tx.run(_ADD, requires=one, since=tx.now_ms)
        elif since[one] <= tx.now_ms - patience_ms and len(found.given_up) < MOST:
            found.given_up.append(one)
        if is_here and len(found.here) < MOST:
            found.here.append(one)
    for one in since.keys() - set(marks):
        tx.run(_REMOVE, requires=one)
    return found


def due(tx: Tx, labels: Mapping[str, Any], memory_mb: int | None, *, patience_ms: float) -> tuple[bool, list[float]]:
    """May something with a mark start on this host; and when are others given up?"""
    here = any(has(labels, memory_mb, _object(one)) for one in _marks(tx))
    return here, [row.since + patience_ms for row in tx.all(_UNMET) if isinstance(row.since, int)]


def elsewhere(tx: Tx) -> list[Elsewhere]:
    """All that something waits for."""
    hosts = _hosts(tx)
    return [_said(one, hosts) for one in _marks(tx)]


def of_ticket(tx: Tx, id: str) -> list[Elsewhere]:
    rows = tx.all(_OF_TICKET, id=id)
    hosts = _hosts(tx) if rows else {}
    return [_said(str(lenient(row.waits_for)), hosts, lenient(row.step_id)) for row in rows]


def known(tx: Tx, requires: Mapping[str, Any]) -> bool:
    """Is there a host that has it, alive or not?"""
    return any(has(*host, requires) for host in _hosts(tx).values())


def clear(tx: Tx) -> None:
    """Agents have changed: whoever would claim what is ready looks at it anew."""
    for statement in _CLEAR:
        tx.run(statement)


def _said(text: str, hosts: Mapping[str, tuple[Mapping[str, Any], object]], step_id: str | None = None) -> Elsewhere:
    fitting = [name for name, host in hosts.items() if has(*host, _object(text))]
    return Elsewhere(requires=words(text), hosts=fitting, step_id=step_id)


def _marks(tx: Tx) -> Sequence[str]:
    rows = [*tx.all(MARKS_OF_TICKETS), *tx.all(MARKS_OF_STEPS)]
    return sorted({str(lenient(row.mark)) for row in rows})


def _hosts(tx: Tx) -> dict[str, tuple[Mapping[str, Any], object]]:
    return {
        str(row.name): (_object(row.labels), _object(row.capacity).get("vm_memory_mb", 0)) for row in tx.all(_HOSTS)
    }


def _object(text: object) -> dict[str, Any]:
    try:
        value = json.loads(str(text))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
