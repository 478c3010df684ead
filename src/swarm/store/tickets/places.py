"""On which hosts a ticket, or a sandbox, may run: what its agent `requires`, beside the hosts' labels.

Whoever would claim one, or a step, and lacks what it requires, marks it with that (`waits_for`), once. A claim
reads those without a mark, and those whose marks its host has: the others are not in its way, however many they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from swarm.fields import IN_WORDS, LABEL, MAX_LABELS, MOST_NUMBER
from swarm.store.sql.conditions import SANDBOX_MARKED, STEP_READY
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import lenient
from swarm.store.sql.rows import parsed as parsed_json
from swarm.store.sql.transaction import Tx

MOST: Final = 64  # marks that one claim looks at
MEMORY: Final = ">memory_mb"  # no label's name: so much memory for one VM

TICKETS: Final = ("tickets", "step_executions")
SANDBOXES: Final = ("sandboxes",)
_READY: Final = {"tickets": "state = 'ready'", "step_executions": STEP_READY, "sandboxes": SANDBOX_MARKED}
_ALL: Final = tuple(_READY)
MARKED, MARKED_SANDBOXES = (
    " OR ".join(f"EXISTS (SELECT 1 FROM {table} WHERE {_READY[table]} AND waits_for > '')" for table in tables)
    for tables in (TICKETS, SANDBOXES)
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
MARKS_OF_TICKETS, MARKS_OF_STEPS, MARKS_OF_SANDBOXES = _MARKS.values()
_HOSTS: Final = Sql("SELECT name, labels, capacity FROM hosts ORDER BY name")
_UNMET: Final = Sql("SELECT requires, since FROM unmet")
_ADD: Final = Sql("INSERT INTO unmet (requires, since) VALUES (:requires, :since) ON CONFLICT (requires) DO NOTHING")
_SINCE: Final = Sql("UPDATE unmet SET since = :since WHERE requires = :requires")
_REMOVE: Final = Sql("DELETE FROM unmet WHERE requires = :requires")
_OF_TICKET: Final = Sql(
    "SELECT NULL AS step_id, waits_for FROM tickets WHERE id = :id AND state = 'ready' AND waits_for > '' "
    "UNION ALL SELECT s.step_id, s.waits_for FROM workflow_runs r JOIN step_executions s ON s.run_id = r.id "
    "WHERE r.ticket_id = :id AND r.status IN ('running', 'waiting') AND s.status = 'ready' AND s.waits_for > '' LIMIT 3"
)
_CLEAR: Final = tuple(
    Sql(f"UPDATE {table} SET waits_for = '' WHERE {ready} AND waits_for > ''") for table, ready in _READY.items()
)
CLEAR_TICKETS, CLEAR_STEPS, CLEAR_SANDBOXES = _CLEAR


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
    """This host's labels, and what memory one VM may have on it (None: any); for how long something waits for what no
    known host has. `read` finds the marks that it has all of, and those that no host has had for too long.
    ``marked``: a claim has added one."""

    labels: Mapping[str, Any]
    memory_mb: int | None
    patience_seconds: float
    here: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    marked: bool = False


def labels(value: object) -> dict[str, Any]:
    """What an agent, a step, a ticket or a sandbox requires, as its row says. Raises ValueError."""
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


def read(tx: Tx, found: Places, *, of: Sequence[str] = TICKETS) -> None:
    """For a claim ``of`` these tables. Writes since when no known host has what is required, by anything."""
    marks, mine, hosts = _marks(tx), set(_marks(tx, of)), _hosts(tx)
    found.here, found.given_up = [], []
    since = {str(row.requires): row.since for row in tx.all(_UNMET)}
    for one in marks:
        requires = _object(one)
        is_here = has(found.labels, found.memory_mb, requires)
        if is_here or any(has(*host, requires) for host in hosts.values()):
            if one in since:
                tx.run(_REMOVE, requires=one)
        elif one not in since:
            tx.run(_ADD, requires=one, since=tx.now_ms)
        elif not isinstance(since[one], int):
            tx.run(_SINCE, requires=one, since=tx.now_ms)
        elif since[one] <= tx.now_ms - found.patience_seconds * 1000 and one in mine and len(found.given_up) < MOST:
            found.given_up.append(one)
        if is_here and one in mine and len(found.here) < MOST:
            found.here.append(one)
    for one in since.keys() - set(marks):
        tx.run(_REMOVE, requires=one)
    if not all(map(_is_ours, marks)):
        clear(tx)  # what no claim has written, none finds by it
        found.here, found.given_up = [], []


def due(tx: Tx, host: Places, *, of: Sequence[str] = TICKETS) -> tuple[bool, list[float]]:
    """May something with a mark start on this host; and when are others given up?"""
    marks = set(_marks(tx, of))
    here = any(has(host.labels, host.memory_mb, _object(one)) or not _is_ours(one) for one in marks)
    unmet = [row for row in tx.all(_UNMET) if row.requires in marks and isinstance(row.since, int)]
    return here, [row.since + host.patience_seconds * 1000 for row in unmet]


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


def _marks(tx: Tx, tables: Sequence[str] = _ALL) -> Sequence[str]:
    found = {row.mark for table in tables for row in tx.all(_MARKS[table])}
    return sorted(one if isinstance(one, str) else "" for one in found)


def _is_ours(text: str) -> bool:
    """Can it be a mark that a claim has written? Any tool may have changed it."""
    found = _object(text)
    return not any(isinstance(value, list | dict) for value in found.values()) and mark(found) == text


def _hosts(tx: Tx) -> dict[str, tuple[Mapping[str, Any], object]]:
    return {
        str(row.name): (_object(row.labels), _object(row.capacity).get("vm_memory_mb", 0)) for row in tx.all(_HOSTS)
    }


def _object(text: object) -> dict[str, Any]:
    return parsed_json(text, dict) or {}
