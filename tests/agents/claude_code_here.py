"""Claude Code for tests: what `make ready` fetched from PyPI, for this host's Python and for the guest's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from swarm import agents, config
from swarm.app import wiring
from swarm.config import Settings
from swarm.errors import LayerMissing
from swarm.model import Agent
from swarm.vm.driver import Image
from tests.channel.agentd_here import SPEC

CODE: Final[Agent] = agents.read(next(place for place in agents.builtin() if place.name == "claude-code"))


def modules() -> Path:
    """The directory with its modules, for this host's Python. Raises LayerMissing."""
    layer = asyncio.run(wiring.layers(config.load(driver="process")).find(CODE, SPEC.image))
    assert layer is not None
    return layer.path


def lacks() -> str:
    try:
        modules()
    except LayerMissing:
        return "needs Claude Code, 180 MB from PyPI: run `make ready`"
    return ""


async def guest_lacks(settings: Settings, image: Image) -> str:
    """The same for the guest: its layer, in the cache of images."""
    try:
        await wiring.layers(settings).find(CODE, image)
    except LayerMissing:
        return "needs the layer of claude-code: run `make ready`"
    return ""
