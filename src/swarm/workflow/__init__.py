"""Workflows: read (`parse`), checked (`validate`), frozen (`definition`), planned (`plan`), drawn (`graph`).

All of it is pure: the store and the workers carry out what the planner decides.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from swarm.errors import UsageError
from swarm.fields import IN_WORDS, NAME


def builtin() -> list[Path]:
    """The files of the workflows that ship with Swarm."""
    return sorted((Path(str(resources.files("swarm"))) / "builtin" / "workflows").glob("*.yaml"))


def template(name: str) -> str:
    """The text of a new workflow's file. Raises UsageError for a bad name."""
    if not re.fullmatch(NAME, name):
        raise UsageError(f"a workflow's name must be {IN_WORDS[NAME]}, but is {name!r}")
    file = Path(str(resources.files("swarm"))) / "builtin" / "templates" / "workflow.yaml"
    return file.read_text(encoding="utf-8").replace("name: my-workflow", f"name: {name}", 1)
