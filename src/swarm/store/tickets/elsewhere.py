"""What can't run on the host that would claim it, and waits for another one: see `swarm.store.tickets.places`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from swarm.store.sql.dialect import Sql
from swarm.store.sql.transaction import Tx, one_row
from swarm.store.tickets import places, validation
from swarm.store.tickets.changes import Changes, Culprit
from swarm.store.tickets.places import Places
from swarm.store.tickets.validation import BadRow

_MOST: Final = 16  # labels: a mark is in an index
MARK_TICKET: Final = Sql("UPDATE tickets SET waits_for = :mark WHERE id = :id")
MARK_STEP: Final = Sql("UPDATE step_executions SET waits_for = :mark WHERE id = :id")
MARK_SANDBOX: Final = one_row("UPDATE sandboxes SET waits_for = :mark, error = :error WHERE id = :id")


def required(requires: Mapping[str, Any], *texts: object) -> dict[str, Any]:
    """By the agent, and by columns `requires` beside it, together. Raises BadRow if no host can have it."""
    found = dict(requires)
    for text in texts:
        if not text:
            continue
        try:
            labels = places.parsed(str(text))
        except ValueError as error:
            raise BadRow(str(error)) from None
        for name, value in labels.items():
            if name in found and not places.has(found, None, {name: value}):
                one, other = (places.words(places.mark({name: each})) for each in (found[name], value))
                raise BadRow(f"it requires {one} and {other}, and no host has both")
            found[name] = value
    if len(found) > _MOST:
        raise BadRow(f"it requires {len(found)} labels; the limit is {_MOST}")
    return found


def mark(tx: Tx, requires: dict[str, Any], memory_mb: int, host: Places) -> str | None:
    """What is required, with so much memory, if the claiming host lacks some of it. Raises BadRow if no known host has
    had that for too long. What lacks memory alone waits only if a known host has so much: else it is refused as
    ever."""
    if host.memory_mb is not None and memory_mb > host.memory_mb:
        requires[places.MEMORY] = memory_mb
        if not places.known(tx, requires):
            return None
    if not requires or places.has(host.labels, host.memory_mb, requires):
        return None
    if (lacks := places.mark(requires)) in host.given_up:
        raise validation.no_host(places.words(lacks), host.patience_seconds)
    return lacks


def read(changes: Changes, found: Places) -> None:
    """`places.read`. Who refuses what it writes stops no claim: only what has a mark waits."""
    for _ in changes.each([Culprit("duty", "unmet")], lambda duty: duty):
        places.read(changes.tx, found)
