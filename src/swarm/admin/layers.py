"""The layers of registered agents: what is built for them, and who needs what is there."""

from __future__ import annotations

from functools import partial

from swarm import agents
from swarm.engine.engine import ImageSource
from swarm.errors import SwarmError
from swarm.model import Agent
from swarm.store.store import Store
from swarm.vm.driver import Layer
from swarm.vm.image.build import Progress
from swarm.vm.image.layer import HostLayers, LayerInfo, Layers, own_modules


async def build(
    agent: Agent, images: ImageSource, layers: Layers | HostLayers, *, progress: Progress, force: bool = False
) -> Layer | None:
    """What the agent's manifest asks for, built unless it is there; None when it asks for nothing."""
    if not agent.needs_layer:
        return None
    return await layers.build(agent, await images.find(agent.image), force=force, progress=progress)


async def shipped(store: Store, images: ImageSource, layers: Layers | HostLayers, progress: Progress) -> list[str]:
    """Build those of the agents that ship; a line for each. The rest of an installation is as good without."""
    wanting: dict[tuple[frozenset[object], ...], list[Agent]] = {}
    for one in map(agents.read, agents.builtin()):
        if one.needs_layer:
            wanted = frozenset(one.requirements), frozenset(one.packages), frozenset(own_modules(one).items())
            wanting.setdefault(wanted, []).append(await store.agent(one.id))
    said = []
    for users in wanting.values():
        names = " and ".join(f"{one.name} {one.version}" for one in users)
        try:
            layer = await build(users[0], images, layers, progress=partial(_step, progress, names))
            said.append(f"layer      {layer.digest[:12] if layer else ''} of {names}")
        except SwarmError as error:
            said.append(f"layer      of {names} is not built ({error}): until `swarm agent build`, they can't run")
    return said


def _step(progress: Progress, names: str, step: str, share: float) -> None:
    progress(f"layer of {names}: {step}", share)


async def in_use(store: Store, images: ImageSource, layers: Layers) -> list[tuple[LayerInfo, list[str]]]:
    """Every layer, with the registered agents that need it upon the images of today."""
    users: dict[str, list[str]] = {}
    for agent in await store.agents(broken=False):
        if agent.needs_layer:
            key = layers.key(agent, await images.find(agent.image))
            users.setdefault(key, []).append(f"{agent.name}@{agent.version}")
    return [(info, users.get(info.key, [])) for info in layers.list()]
