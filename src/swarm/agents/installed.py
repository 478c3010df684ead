"""An agent is what `swarm agent add` made, not what a row says: rows are written by other programs too.

A row is run only if its files are a copy below the home's `agents/` directory, with the digest that is in the copy's
name, and if what decides about rights (program, secrets, network, budgets) is as in the manifest of that copy. A host
without such a copy makes one of what `swarm agent add` put into the database. So a row can't hand a directory of
this host to a VM, and a row named like another agent doesn't get that agent's secrets.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

from swarm.agents.bundle import bundle_digest, unpacked
from swarm.agents.package import Package, read_package
from swarm.base.files import host_errors
from swarm.errors import NotConfigured, UsageError
from swarm.model import Agent

# What a row can't change. Limits, time-outs, schemas and texts can be tuned in a row, within their bounds.
BOUND_FIELDS: Final = (
    "name", "version", "runtime", "entry", "image", "env", "secrets", "network", "preload", "requirements", "packages",
    "npm", "budget_usd", "budget_tokens", "over_budget",
)  # fmt: skip


def digest_in_name(agent: Agent) -> str:
    """The first digits of the digest that `bundle.install` put into the directory's name; '' in any other name."""
    found = re.fullmatch(re.escape(f"{agent.name}-{agent.version}-") + "([0-9a-f]{12})", agent.path.name)
    return found[1] if found else ""


def here(agent: Agent, agents_dir: Path) -> Agent:
    """The same, with the directory of its copy on this host: that of its row is where it was added, maybe elsewhere."""
    path = agents_dir / agent.path.name
    return agent if agent.path == path or not digest_in_name(agent) else replace(agent, path=path)


def is_copy(agent: Agent, agents_dir: Path) -> bool:
    """Is there a copy of the agent, which `swarm agent add` can have made? Only such a directory may ever be removed.
    Only its name counts: in the row of an agent that was added on another host, all above it is that host's."""
    if not digest_in_name(agent):
        return False
    try:
        return stat.S_ISDIR((agents_dir / agent.path.name).lstat().st_mode)
    except OSError:
        return False


class Archives(Protocol):
    """Files of agents that were added on other hosts: what `bundle.packed` made."""

    async def package(self, name: str, number: int) -> str | None:
        """Raises StoreError, also where others might have written it."""


class Installed:
    """The copies below ``agents_dir``. Each is read once: only who may write there can change it later. One that lacks
    is made from the ``archives``, if there are any."""

    def __init__(self, agents_dir: Path, archives: Archives | None = None) -> None:
        self._dir = agents_dir
        self._archives = archives
        self._known: dict[tuple[str, int, int], Package] = {}

    async def here(self, agent: Agent) -> Agent:
        """The same, with the directory of its copy on this host. Raises as `check`."""
        await self.check(agent)
        return here(agent, self._dir)

    async def check(self, agent: Agent) -> Package:
        """The package that this agent's row stands for. Raises NotConfigured; StoreError and HostError when its files
        can't be had now."""
        path = self._dir / agent.path.name
        package = self._known.get(_identity(path))
        if package is None:
            if self._archives is not None and digest_in_name(agent) and not os.path.lexists(path):
                await self._unpack(agent, self._archives)
            package = await asyncio.to_thread(self._read, agent)
        changed = [name for name in BOUND_FIELDS if getattr(agent, name) != getattr(package.agent, name)]
        if changed:
            raise _refused(agent, f"its row has another {', '.join(changed)} than the manifest that was added")
        return package

    async def _unpack(self, agent: Agent, archives: Archives) -> None:
        name = agent.path.name
        try:
            if await archives.package(name, 0) is not None:
                with host_errors(f"can't write the files of the agent {agent.name!r} to {self._dir}"):
                    await unpacked(name, self._dir, lambda number: archives.package(name, number))
        except UsageError as error:
            raise _refused(agent, str(error)) from None

    def _read(self, agent: Agent) -> Package:
        if not is_copy(agent, self._dir):
            raise _refused(agent, f"its row names {str(agent.path)[:200]!r}, which is no copy of it in {self._dir}")
        path = self._dir / agent.path.name
        identity = _identity(path)
        try:
            package = read_package(path)
            digest = bundle_digest(path)
        except (UsageError, OSError) as error:
            cause = error.__cause__ if isinstance(error, UsageError) else error
            if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise cause from None  # that says nothing about the agent
            raise _refused(agent, str(error)) from None
        if digest[:12] != digest_in_name(agent):
            raise _refused(agent, f"the files in {path} were changed since it was added")
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
