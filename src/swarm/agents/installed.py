"""An agent is what `swarm agent add` made, not what a row says: rows are written by other programs too.

A row is run only if its files are a copy below the home's `agents/` directory, with the digest that is in the copy's
name, and if what decides about rights (program, secrets, network, budgets) is as in the manifest of that copy. So a row
can't hand a directory of this host to a VM, and a row named like another agent doesn't get that agent's secrets.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import stat
from pathlib import Path
from typing import Final

from swarm.agents.bundle import bundle_digest
from swarm.agents.package import Package, read_package
from swarm.errors import NotConfigured, UsageError
from swarm.model import Agent

# What a row can't change. Limits, time-outs, schemas and texts can be tuned in a row, within their bounds.
BOUND_FIELDS: Final = (
    "name", "version", "runtime", "entry", "image", "env", "secrets", "network", "preload", "requirements", "packages",
    "budget_usd", "budget_tokens", "over_budget",
)  # fmt: skip


def digest_in_name(agent: Agent) -> str:
    """The first digits of the digest that `bundle.install` put into the directory's name; '' in any other name."""
    found = re.fullmatch(re.escape(f"{agent.name}-{agent.version}-") + "([0-9a-f]{12})", agent.path.name)
    return found[1] if found else ""


def is_copy(agent: Agent, agents_dir: Path) -> bool:
    """Is the agent's path one that `swarm agent add` can have made? Only such a directory may ever be removed."""
    if not digest_in_name(agent) or not agent.path.is_absolute() or "\0" in str(agent.path):
        return False
    path = agents_dir / agent.path.name
    same = agent.path == path or os.path.realpath(agent.path.parent) == os.path.realpath(agents_dir)
    try:
        return same and stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


class Installed:
    """The copies below ``agents_dir``. Each is read once: only who may write there can change it later."""

    def __init__(self, agents_dir: Path) -> None:
        self._dir = agents_dir
        self._known: dict[tuple[str, int, int], Package] = {}

    async def check(self, agent: Agent) -> Package:
        """The package that this agent's row stands for. Raises NotConfigured."""
        package = self._known.get(_identity(agent.path))
        if package is None:
            package = await asyncio.to_thread(self._read, agent)
        changed = [name for name in BOUND_FIELDS if getattr(agent, name) != getattr(package.agent, name)]
        if changed:
            raise _refused(agent, f"its row has another {', '.join(changed)} than the manifest that was added")
        return package

    def _read(self, agent: Agent) -> Package:
        identity = _identity(agent.path)
        if not is_copy(agent, self._dir):
            raise _refused(agent, f"its row names {str(agent.path)[:200]!r}, which is no copy of it in {self._dir}")
        try:
            package = read_package(agent.path)
            digest = bundle_digest(agent.path)
        except (UsageError, OSError) as error:
            cause = error.__cause__ if isinstance(error, UsageError) else error
            if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise cause from None  # that says nothing about the agent
            raise _refused(agent, str(error)) from None
        if digest[:12] != digest_in_name(agent):
            raise _refused(agent, f"the files in {agent.path} were changed since it was added")
        self._known[identity] = package
        return package


def _identity(path: Path) -> tuple[str, int, int]:
    try:
        found = path.lstat()
    except (OSError, ValueError):
        return "", 0, 0
    return str(path), found.st_ino, found.st_mtime_ns


def _refused(agent: Agent, why: str) -> NotConfigured:
    return NotConfigured(f"the agent {agent.name!r} can't run here: {why}; add it with `swarm agent add`")
