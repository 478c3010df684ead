"""Adds agents and workflows to the registry, and removes them: rows in the store, and copies of agents' files."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from swarm import agents, workflow
from swarm.base import versions
from swarm.errors import Conflict, NotConfigured, NotFound, StoreError, UsageError
from swarm.model import Agent
from swarm.store.registry.workflows import WorkflowRow
from swarm.store.store import Store
from swarm.workflow import validate
from swarm.workflow.definition import Workflow
from swarm.workflow.pinning import Registry


async def ship(store: Store, into: Path, *, by: str | None = None) -> list[str]:
    """Register the agents and workflows that ship with Swarm. Returns a line for each. ``by``, here and below: who does
    it, for events.

    One that is registered with the same version but other content (of another build of Swarm) is kept.
    """
    lines = []
    for directory in agents.builtin():
        try:
            agent = await add_agent(store, directory, into, by=by)
            lines.append(f"agent      {agent.name} {agent.version}, id {agent.id}")
        except Conflict as error:
            lines.append(f"agent      {directory.name} is kept unchanged: {error}")
    for file in workflow.builtin():
        try:
            row = await add_workflow(store, file.read_bytes(), name=file.name, by=by)
            lines.append(f"workflow   {row.name} {row.version}, id {row.id}")
        except Conflict as error:
            lines.append(f"workflow   {file.stem} is kept unchanged: {error}")
    return lines


async def add_agent(
    store: Store, directory: Path, into: Path, *, replace: bool = False, by: str | None = None
) -> Agent:
    """Copy an agent's files below ``into`` and register it. Does nothing if it is registered already.

    Raises UsageError for a bad package, Conflict when that name and version is registered with other content: that is
    replaced if ``replace``.
    """
    agent = await asyncio.to_thread(agents.install, directory, into)
    package = await asyncio.to_thread(agents.packed, agent.path)
    replaced = None
    if replace:
        with contextlib.suppress(NotFound, StoreError):
            replaced = await store.agent(agent.id)
    try:
        with package:
            added = await store.put_agent(agent, package=package, replace=replace, by=by)
    except Conflict:
        await _remove_files(store, agent, into)
        raise
    # A step that was claimed before may read the old files yet.
    if replaced is not None and replaced.path != added.path and not (await store.queue()).running:
        await _remove_files(store, replaced, into)
        await store.sweep_packages()
    return added


async def keep_packages(store: Store, into: Path) -> None:
    """Keep the files of agents that were added before the database had them, if they are on this host."""
    kept = await store.packages()
    for agent in await store.agents(broken=False):
        if agent.path.name not in kept and agents.is_copy(agent, into):
            with contextlib.suppress(UsageError, NotConfigured):
                whole = await agents.Installed(into).here(agent)
                with await asyncio.to_thread(agents.packed, whole.path) as package:
                    await store.keep_package(whole.path.name, package)


async def remove_agent(store: Store, reference: str, into: Path, *, by: str | None = None) -> Agent:
    """Unregister an agent and remove its files. Raises NotFound; Conflict while a ticket or a workflow needs it."""
    agent = await store.agent(reference)
    others = [one for one in await store.agents(broken=False) if one.id != agent.id]
    await asyncio.to_thread(
        _check_unneeded, agent, others, await store.workflows(), kind="agent", needs=Workflow.agents
    )
    await store.remove_agent(agent.id, by=by)
    await _remove_files(store, agent, into)
    return agent


async def add_workflow(store: Store, text: bytes, *, name: str, by: str | None = None) -> WorkflowRow:
    """Check and register a workflow's file. Raises manifest.Invalid with every problem, Conflict like `add_agent`."""
    return await store.put_workflow(await checked_workflow(store, text, name=name), by=by)


async def checked_workflow(store: Store, text: bytes, *, name: str) -> Workflow:
    """A workflow's file, checked against what is registered. Raises manifest.Invalid with every problem."""
    return await asyncio.to_thread(validate.checked, text, await registry(store), name=name)


async def remove_workflow(store: Store, reference: str, *, by: str | None = None) -> WorkflowRow:
    """Unregister a workflow. Raises NotFound; Conflict while a ticket, a schedule or another workflow needs it."""
    found = await store.workflow(reference)
    others = [row for row in await store.workflows() if row.id != found.id]
    await asyncio.to_thread(_check_unneeded, found, others, others, kind="workflow", needs=Workflow.workflows)
    return await store.remove_workflow(found.id, by=by)


def _check_unneeded(
    one: Agent | WorkflowRow,
    others: Sequence[Agent | WorkflowRow],
    rows: Sequence[WorkflowRow],
    *,
    kind: str,
    needs: Callable[[Workflow], Iterable[str]],
) -> None:
    """Raises Conflict if a workflow names something that only ``one`` is."""
    for row in rows:
        with contextlib.suppress(StoreError):  # a row that was written by another program and can't be run
            for wanted in needs(row.parsed()):
                if versions.pick(wanted, [one, *others]) == one and versions.pick(wanted, others) is None:
                    raise Conflict(
                        f"the workflow {row.name}@{row.version} names the {kind} {wanted!r}, and only "
                        f"{one.name}@{one.version} fits"
                    )


async def registry(store: Store) -> Registry:
    """A snapshot of the registered agents and workflows, to resolve references in."""
    known, rows = await store.agents(broken=False), await store.workflows()

    def agent(reference: str) -> Agent:
        found = versions.pick(reference, known)
        if found is None:
            raise NotFound(f"no agent {reference!r}; `swarm agent list` lists all")
        return found

    def workflow(reference: str) -> Workflow:
        found = versions.pick(reference, rows)
        if found is None:
            raise NotFound(f"no workflow {reference!r}; `swarm workflow list` lists all")
        return found.parsed()

    return Registry(agent=agent, workflow=workflow)


async def _remove_files(store: Store, agent: Agent, into: Path) -> None:
    """Remove the files of an unregistered agent: only a copy that `add_agent` made, whatever the row says."""
    named = {one.path.name for one in await store.agents(broken=False)}
    if agents.is_copy(agent, into) and agent.path.name not in named:
        await asyncio.to_thread(shutil.rmtree, into / agent.path.name, ignore_errors=True)
