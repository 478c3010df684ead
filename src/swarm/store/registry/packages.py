"""Agents' files, so that each host can have them: what `swarm.agents.packed` made, a row for each part.

They belong to the agents in whose rows the name of their directory is; it ends in their digest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

from swarm.model import Agent
from swarm.store.registry import agents
from swarm.store.sql.dialect import Sql
from swarm.store.sql.transaction import Tx

_PART: Final = Sql("SELECT data FROM packages WHERE name = :name AND number = :number")
_NAMES: Final = Sql("SELECT name FROM packages WHERE number = 0")
_PUT: Final = Sql(
    "INSERT INTO packages (name, number, data) VALUES (:name, :number, :data) "
    "ON CONFLICT (name, number) DO UPDATE SET data = excluded.data"
)
_CUT: Final = Sql("DELETE FROM packages WHERE name = :name AND number > :number")
_REMOVE: Final = Sql("DELETE FROM packages WHERE name = :name")
_PATHS: Final = Sql("SELECT path FROM agents")


class Package(Protocol):
    """The parts, one in each line, and the list of their files at last, which is number 0."""

    def seek(self, offset: int, /) -> int: ...

    def __iter__(self) -> Iterator[str]: ...


def add(tx: Tx, agent: Agent, package: Package | None, *, replace: bool, by: str | None) -> Agent:
    """Register an agent and keep its files. Raises as `put_agent`."""
    added = agents.put_agent(tx, agent, replace=replace, by=by)
    if package is not None:
        keep(tx, agent.path.name, package)
    return added


def remove(tx: Tx, ref: str, *, by: str | None = None) -> Agent:
    """Unregister an agent. Raises as `remove_agent`."""
    removed = agents.remove_agent(tx, ref, by=by)
    sweep(tx)
    return removed


def keep(tx: Tx, name: str, package: Package) -> None:
    last = 0
    package.seek(0)  # a transaction may be tried again
    for line in package:
        text = line.rstrip("\n")
        number = 0 if text.startswith("{") else last + 1
        last = max(last, number)
        row = tx.first(_PART, name=name, number=number)
        if row is None or row.data != text:
            tx.run(_PUT, name=name, number=number, data=text)
    if tx.first(_PART, name=name, number=last + 1) is not None:
        tx.run(_CUT, name=name, number=last)


def part(tx: Tx, name: str, number: int) -> str | None:
    row = tx.first(_PART, name=name, number=number)
    return None if row is None else str(row.data)


def names(tx: Tx) -> set[str]:
    return {row.name for row in tx.all(_NAMES)}


def sweep(tx: Tx) -> None:
    """Delete what no agent names."""
    named = {str(row.path).rpartition("/")[2] for row in tx.all(_PATHS)}
    tx.many(_REMOVE, [{"name": name} for name in sorted(names(tx) - named)])
