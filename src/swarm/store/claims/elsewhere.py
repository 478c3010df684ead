"""What can't run on the host that would claim it, and waits for another one: see `swarm.store.tickets.places`."""

from __future__ import annotations

from typing import Any, Final

from swarm.model import Agent, Ticket
from swarm.store.claims.ready import Candidate
from swarm.store.claims.request import ClaimRequest
from swarm.store.sql.dialect import Sql
from swarm.store.sql.transaction import Tx
from swarm.store.tickets import places, validation
from swarm.store.tickets.places import Places
from swarm.store.tickets.validation import BadRow

_MOST: Final = 16  # labels: a mark is in an index
MARK_TICKET: Final = Sql("UPDATE tickets SET waits_for = :mark WHERE id = :id")
MARK_STEP: Final = Sql("UPDATE step_executions SET waits_for = :mark WHERE id = :id")


def required(candidate: Candidate, ticket: Ticket, agent: Agent) -> dict[str, Any]:
    """By the agent, the step and the ticket together. Raises BadRow if no host can have it."""
    requires = dict(agent.requires)
    for text in (candidate.row.step_requires if candidate.is_step else None, ticket.requires):
        if not text:
            continue
        try:
            labels = places.parsed(str(text))
        except ValueError as error:
            raise BadRow(str(error)) from None
        for name, value in labels.items():
            if name in requires and not places.has(requires, None, {name: value}):
                one, other = (places.words(places.mark({name: each})) for each in (requires[name], value))
                raise BadRow(f"it requires {one} and {other}, and no host has both")
            requires[name] = value
    if len(requires) > _MOST:
        raise BadRow(f"it requires {len(requires)} labels; the limit is {_MOST}")
    return requires


def mark(
    tx: Tx, request: ClaimRequest, agent: Agent, requires: dict[str, Any], found: Places, most_memory_mb: int | None
) -> str | None:
    """What is required, if the claiming host lacks some of it. Raises BadRow if no known host has had
    that for too long. What lacks memory alone waits only if a known host has so much: else it is refused as ever."""
    if most_memory_mb is not None and agent.memory_mb > most_memory_mb:
        requires[places.MEMORY] = agent.memory_mb
        if not places.known(tx, requires):
            return None
    if not requires or places.has(request.labels, most_memory_mb, requires):
        return None
    if (lacks := places.mark(requires)) in found.given_up:
        raise validation.no_host(places.words(lacks), request.host_timeout_seconds)
    return lacks


def statement(candidate: Candidate) -> tuple[Sql, Any]:
    """The one that marks its row, and the row's id."""
    row = candidate.row
    return (MARK_STEP, row.step_execution_id) if candidate.is_step else (MARK_TICKET, row.id)
