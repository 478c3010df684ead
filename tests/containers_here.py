"""Debian's podman, and tools to try a kernel with, for tests: a layer of Debian packages, as agents have them, in the
cache of images. Tests lay it over the guest's own Debian, and have an image's root.

``python -m tests.containers_here`` builds it (10 s, once for each base); status 1 with a line if that fails.
"""
# ruff: noqa: T201 - a command

from __future__ import annotations

import asyncio
import re
import sys
import tempfile
from pathlib import Path
from typing import Final

from swarm import agents, config
from swarm.app import setup, wiring
from swarm.base import log
from swarm.config import Settings
from swarm.errors import LayerMissing, SwarmError
from swarm.model import Agent
from swarm.vm.driver import Image, Layer
from tests.conftest import CACHE

PAGE: Final = Path(__file__).parent.parent / "docs" / "images.md"
TOOLS: Final = ("e2fsprogs", "nftables", "squashfs-tools")


def files() -> dict[str, str]:
    """Of the page's example: name -> text."""
    return dict(re.findall(r"^<!-- file: (\S+) -->\n```\w*\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))


def agent() -> Agent:
    """One with the packages that the example's Dockerfile installs."""
    (said,) = re.findall(r"--no-install-recommends \\\n(.*?)&&", files()["Dockerfile"])
    with tempfile.TemporaryDirectory() as place:
        packages = ", ".join([*said.split(), *TOOLS])
        (Path(place) / "main.py").touch()
        text = f"name: containers\nversion: 1.0.0\nentry: [main.py]\npackages: [{packages}]\n"
        (Path(place) / "agent.yaml").write_text(text)
        return agents.read(Path(place))


async def layer(settings: Settings, image: Image) -> Layer | str:
    """Or what to do."""
    try:
        found = await wiring.guest_layers(settings).find(agent(), image)
    except LayerMissing:
        return "needs Debian's podman, as a layer: run `python -m tests.containers_here`"
    assert found is not None
    return found


async def build() -> None:
    settings = config.load(images_dir=CACHE)
    await wiring.guest_layers(settings).build(agent(), await setup.ensure_image(settings))


def main() -> int:
    log.configure()
    try:
        asyncio.run(build())
    except SwarmError as error:
        print(f"can't build the layer with podman: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
