"""Agents and workflows into the registry, and out of it: rows in the store, and for agents a copy of their files."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from pathlib import Path

from swarm import agents, workflow
from swarm.base import versions
from swarm.errors import Conflict, NotFound, StoreError
from swarm.model import Agent
from swarm.store.registry.workflows import WorkflowRow
from swarm.store.store import Store
from swarm.workflow import validate
from swarm.workflow.definition import Workflow
from swarm.workflow.pinning import Registry


async def ship(store: Store, into: Path) -> list[str]:
    """Register the agents and workflows that ship with Swarm. Returns what was done, a line each.

    One that is there with other content under the same version (of another build of Swarm) stays as it is.
    """
    said = []
    for directory in agents.builtin():
        try:
            agent = await add_agent(store, directory, into)
            said.append(f"agent      {agent.name} {agent.version}, id {agent.id}")
        except Conflict as error:
            said.append(f"agent      {directory.name} stays as it is: {error}")
    for file in workflow.builtin():
        try:
            row = await add_workflow(store, file.read_bytes(), name=file.name)
            said.append(f"workflow   {row.name} {row.version}, id {row.id}")
        except Conflict as error:
            said.append(f"workflow   {file.stem} stays as it is: {error}")
    return said


async def add_agent(store: Store, directory: Path, into: Path) -> Agent:
    """Copy an agent's files below ``into`` and register it. The same again is nothing.

    Raises UsageError for a bad package, Conflict when that name and version is registered with other content.
    """
    agent = await asyncio.to_thread(agents.install, directory, into)
    try:
        return await store.put_agent(agent)
    except Conflict:
        await _remove_files(store, agent, into)
        raise


async def remove_agent(store: Store, reference: str, into: Path) -> Agent:
    """Forget an agent and remove its files. Raises NotFound, and Conflict while a ticket or a workflow needs it."""
    gone = await store.agent(reference)
    others = [one for one in await store.agents(broken=False) if one.id != gone.id]
    for row in await store.workflows():
        with contextlib.suppress(StoreError):  # a row that somebody wrote by hand, and that can't be run
            for wanted in row.parsed().agents():
                if versions.pick(wanted, [gone, *others]) == gone and versions.pick(wanted, others) is None:
                    raise Conflict(
                        f"the workflow {row.name}@{row.version} names the agent {wanted!r}, and only "
                        f"{gone.name}@{gone.version} fits"
                    )
    await store.remove_agent(gone.id)
    await _remove_files(store, gone, into)
    return gone


async def add_workflow(store: Store, text: bytes, *, name: str) -> WorkflowRow:
    """Check a workflow's file and register it. Raises manifest.Invalid with every problem, Conflict as `add_agent`."""
    return await store.put_workflow(validate.checked(text, await registry(store), name=name))


async def registry(store: Store) -> Registry:
    """The agents and workflows of this moment, for what refers to them."""
    known, rows = await store.agents(broken=False), await store.workflows()

    def agent(reference: str) -> Agent:
        found = versions.pick(reference, known)
        if found is None:
            raise NotFound(f"no agent {reference!r}; `swarm agent list` shows those there are")
        return found

    def workflow(reference: str) -> Workflow:
        found = versions.pick(reference, rows)
        if found is None:
            raise NotFound(f"no workflow {reference!r}; `swarm workflow list` shows those there are")
        return found.parsed()

    return Registry(agent=agent, workflow=workflow)


async def _remove_files(store: Store, agent: Agent, into: Path) -> None:
    """Of an agent that is not registered (any more); only what was copied here, never a directory by hand."""
    if agent.path.parent == into and agent.path not in {other.path for other in await store.agents(broken=False)}:
        await asyncio.to_thread(shutil.rmtree, agent.path, ignore_errors=True)
