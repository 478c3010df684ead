"""The layers of registered agents: builds them, and lists which agents need them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from swarm import agents
from swarm.base.progress import Progress
from swarm.errors import SwarmError
from swarm.model import Agent
from swarm.store.store import Store
from swarm.vm.driver import Layer
from swarm.vm.image.layer import HostLayers, LayerInfo, Layers, own_modules

if TYPE_CHECKING:
    from swarm.engine.engine import ImageSource  # with all that runs a VM, which the server does not need


async def build(
    agent: Agent, images: ImageSource, layers: Layers | HostLayers, *, progress: Progress, force: bool = False
) -> Layer | None:
    """Build the agent's layer unless it exists; None for an agent that needs none. An imported image must be there."""
    if not agent.needs_layer and not agent.imported:
        return None
    return await layers.build(agent, await images.find(agent.image), force=force, progress=progress)


def on_request(agent: Agent) -> bool:
    """Is this one that ships, whose layer (a compiler, hundreds of megabytes) is built only when somebody asks?"""
    return bool(agent.packages) and agent.id in {agents.read(directory).id for directory in agents.builtin()}


async def shipped(
    store: Store, into: Path, images: ImageSource, layers: Layers | HostLayers, progress: Progress
) -> list[str]:
    """Build the layers of the built-in agents, but for the large ones. Returns a line for each; a failure doesn't stop
    the installation. ``into``: where agents' files are."""
    agents_by_content: dict[tuple[frozenset[object], ...], list[Agent]] = {}
    lines = []
    for one in map(agents.read, agents.builtin()):
        if on_request(one):
            lines.append(f"layer      of {one.name} {one.version} is large: `swarm agent build {one.name}` makes it")
        elif one.needs_layer:
            wanted = one.requirements, one.packages, one.npm, own_modules(one).items()
            content = tuple(frozenset(some) for some in wanted)
            agents_by_content.setdefault(content, []).append(agents.here(await store.agent(one.id), into))
    for users in agents_by_content.values():
        names = " and ".join(f"{one.name} {one.version}" for one in users)
        try:
            layer = await build(users[0], images, layers, progress=partial(_step, progress, names))
            lines.append(f"layer      {layer.digest[:12] if layer else ''} of {names}")
        except SwarmError as error:
            lines.append(f"layer      of {names} is not built ({error}): they can't run before `swarm agent build`")
    return lines


def _step(progress: Progress, names: str, step: str, share: float) -> None:
    progress(f"layer of {names}: {step}", share)


async def in_use(store: Store, into: Path, images: ImageSource, layers: Layers) -> list[tuple[LayerInfo, list[str]]]:
    """Every layer, with the registered agents that need it on the current images."""
    users: dict[str, list[str]] = {}
    for agent in await store.agents(broken=False):
        if agent.needs_layer:
            key = layers.key(agents.here(agent, into), await images.find(agent.image))
            users.setdefault(key, []).append(f"{agent.name}@{agent.version}")
    return [(info, users.get(info.key, [])) for info in layers.list()]
