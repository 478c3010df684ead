"""Frozen workflows and the contexts of runs: read once, prepared for planning, cached.

Shared by the writing thread and the one for expensive decisions. Preparing compiles expressions, about a millisecond
each, so the writing thread never does it: it raises `TooExpensive`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Generic, TypeVar

from swarm.base import versions
from swarm.cel import template
from swarm.errors import StoreError
from swarm.store.registry import agents, workflows
from swarm.store.registry.workflows import WorkflowRow
from swarm.store.runs.limits import TooExpensive
from swarm.store.sql.dialect import Sql
from swarm.store.sql.transaction import Tx
from swarm.store.tickets import validation
from swarm.workflow import definition, pinning
from swarm.workflow.definition import Workflow
from swarm.workflow.pinning import Registry
from swarm.workflow.state import RunContext
from swarm.workflow.structure import Graph

T = TypeVar("T")

_CACHED: Final = 256
_CACHED_BYTES: Final = 16 << 20  # of contexts, as JSON: in memory they may be thirty times as large
_TEXT: Final = Sql("SELECT definition FROM definitions WHERE digest = :digest")
NAMED: Final = Sql("SELECT id, name, version FROM agents WHERE name IN :ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A frozen workflow, ready for planning. ``within``: the definitions of its nested workflows, by step id."""

    digest: str
    text: str
    graph: Graph
    within: Mapping[str, Definition]


@dataclass(frozen=True, slots=True)
class _Pinned:
    text: str  # as registered
    agents: Mapping[str, str]  # reference → name@version
    definition: Definition


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of a run without reading it. ``ticket_id``, ``agents`` (references): it has just been begun."""

    definition: Definition
    path: str = ""
    ticket_id: str | None = None
    agents: Collection[str] = ()


class _Cache(Generic[T]):
    """Keeps the newest values. Safe for several threads."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[T, int]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> T | None:
        found = self._values.get(key)
        return found[0] if found is not None else None

    def put(self, key: str, value: T, size_bytes: int = 0) -> T:
        with self._lock:
            self._bytes += size_bytes - self._values.pop(key, (value, 0))[1]
            self._values[key] = value, size_bytes
            while len(self._values) > _CACHED or (self._bytes > _CACHED_BYTES and len(self._values) > 1):
                self._bytes -= self._values.pop(next(iter(self._values)))[1]
        return value


class Definitions:
    """``in_transaction``: the caller holds the write lock."""

    def __init__(self) -> None:
        self._frozen: _Cache[Definition] = _Cache()  # by digest
        self._pinned: _Cache[_Pinned] = _Cache()  # by the workflow's id
        self.contexts: _Cache[RunContext] = _Cache()  # by run
        self.large: _Cache[int] = _Cache()  # sizes of contexts that were too large here, by run
        self.known: _Cache[Known] = _Cache()  # by run

    def begun(self, run_id: str, workflow_id: str, ticket_id: str) -> None:
        """Remember a run that this transaction adds, if its workflow is prepared."""
        if (found := self._pinned.get(workflow_id)) is not None:
            self.known.put(run_id, Known(definition=found.definition, ticket_id=ticket_id, agents=tuple(found.agents)))

    def frozen(self, tx: Tx, digest: str, *, in_transaction: bool) -> Definition:
        """Raises StoreError if it is gone, or this version of Swarm can't read it."""
        known = self._frozen.get(digest)
        if known is not None:
            return known
        if in_transaction:
            raise TooExpensive
        row = tx.first(_TEXT, digest=digest)
        if row is None:
            raise StoreError(f"the frozen workflow {digest[:12]} is gone from the table definitions")
        return self.of_text(digest, row.definition)

    def of_text(self, digest: str, text: str) -> Definition:
        """A frozen workflow whose JSON has been read. Raises StoreError."""
        known = self._frozen.get(digest)
        if known is not None:
            return known
        try:
            return self._prepared(definition.from_json(json.loads(text)))
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise StoreError(f"can't read the frozen workflow {digest[:12]}: {error}") from None

    def pinned(self, tx: Tx, id: str, *, in_transaction: bool) -> Definition:
        """The workflow with this id, frozen now for a new run: its references become versions.

        Raises NotFound for missing references, StoreError, manifest.Invalid.
        """
        row = workflows.workflow(tx, id, once=True)
        check_enabled(row)
        known = self._pinned.get(row.id)
        if known is not None and known.text == row.definition and _still_pinned(tx, known.agents):
            return known.definition
        if in_transaction:
            raise TooExpensive
        unpinned = row.parsed()
        found = self._prepared(pinning.pin(unpinned, _registry(tx)))
        if not any(isinstance(step.workflow, str) for step in _all_steps(unpinned)):  # named workflows may change
            agents = {reference: _version(tx, reference) for reference in unpinned.agents()}
            self._pinned.put(row.id, _Pinned(row.definition, agents, found))
        return found

    def _prepared(self, workflow: Workflow) -> Definition:
        text, digest = definition.canonical(workflow), definition.digest(workflow)
        known = self._frozen.get(digest)
        if known is not None:
            return known
        for _, source in template.texts(definition.to_json(workflow)):
            template.text(source)  # compiles and caches it
        within = {
            step.id: self._prepared(step.workflow)
            for step in workflow.all_steps()
            if isinstance(step.workflow, Workflow)
        }
        return self._frozen.put(digest, Definition(digest=digest, text=text, graph=Graph(workflow), within=within))


def check_enabled(row: WorkflowRow) -> None:
    """Raises StoreError."""
    if not row.enabled:
        raise StoreError(str(validation.disabled_workflow(row.name, row.version)))


def _registry(tx: Tx) -> Registry:
    def workflow(reference: str) -> Workflow:
        row = workflows.workflow(tx, reference)
        check_enabled(row)
        return row.parsed()

    return Registry(agent=partial(agents.agent, tx), workflow=workflow)


def _all_steps(workflow: Workflow) -> Any:
    for step in workflow.all_steps():
        yield step
        if isinstance(step.workflow, Workflow):
            yield from _all_steps(step.workflow)


def _version(tx: Tx, reference: str) -> str:
    agent = agents.agent(tx, reference)
    return f"{agent.name}@{agent.version}"


def names(references: Collection[str]) -> Sequence[str]:
    """The agents that are meant, without their versions, in one order."""
    return sorted({one.partition("@")[0] for one in references})


def _still_pinned(tx: Tx, agents: Mapping[str, str]) -> bool:
    """Do these references (to their name@version) still mean the same versions?"""
    rows = tx.all_in(NAMED, names(agents))
    for reference, pinned in agents.items():
        found = versions.pick(reference, rows)
        if found is None or f"{found.name}@{found.version}" != pinned:
            return False
    return True
