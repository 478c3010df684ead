"""Agents that tests write on the spot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from swarm import agents
from swarm.config import Settings
from swarm.model import Agent, RetryPolicy
from swarm.store.store import Store


async def registered(
    store: Store, settings: Settings, place: Path, code: str, name: str, *, files: Sequence[Path] = (), **fields: object
) -> Agent:
    """Write an agent's files to the new directory ``place``, install and register it under the id ``name``.

    ``files`` are copied in beside the program. ``fields``: those of `swarm.model.Agent`.
    """
    place.mkdir(parents=True)
    (place / "main.py").write_text(code)
    for file in files:
        shutil.copy(file, place)
    manifest = {"name": name, "version": "1.0.0", "entry": ["main.py"]}
    (place / agents.MANIFEST).write_text(json.dumps(manifest | {key: _in_yaml(key, v) for key, v in fields.items()}))
    return await store.put_agent(replace(agents.install(place, settings.agents), id=name))


def _in_yaml(key: str, value: object) -> object:
    if isinstance(value, RetryPolicy):
        return asdict(value) | {"on": sorted(value.on)}
    if key.endswith("_schema"):
        return json.loads(str(value))
    if key == "network" and value not in ("none", "gateway", "open"):
        parts = [part.partition(":") for part in str(value).split(";")]
        return {word: names.split(",") if names else True for word, _, names in parts}
    return value
