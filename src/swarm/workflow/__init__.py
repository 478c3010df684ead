"""Workflows: read (`parse`), checked (`validate`), frozen (`definition`), planned (`plan`), drawn (`graph`).

All of it is pure: the store and the workers carry out what the planner decides.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def builtin() -> list[Path]:
    """The files of the workflows that ship with Swarm."""
    return sorted((Path(str(resources.files("swarm"))) / "builtin" / "workflows").glob("*.yaml"))
