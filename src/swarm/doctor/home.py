"""Checks of a home: database, registry, agents."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

from swarm.base import files
from swarm.doctor.check import Check, fail, ok, warn
from swarm.errors import SwarmError
from swarm.model import ECHO_AGENT_ID, Agent
from swarm.store.audit import Audit
from swarm.store.sql.rows import WorkerRow


class OpenStore(Protocol):
    async def revision(self) -> str | None: ...
    async def agents(self) -> list[Agent]: ...
    async def workers(self) -> list[WorkerRow]: ...
    async def packages(self) -> set[str]: ...
    async def audit(self, judge: Callable[[Audit], list[str]]) -> list[str]: ...


async def database(place: str, store: OpenStore, head: str, agents_dir: Path) -> list[Check]:
    """Check a database that could be opened."""
    found = await store.revision()
    if found != head:
        was = f"at migration {found}" if found else "empty"
        return [fail("database", f"{place} is {was}; this version of Swarm needs {head}", "swarm init")]
    checks = [ok("database", f"{place} can be opened, at migration {head}")]
    if missing := await store.audit(lambda facts: facts.missing()):
        what = f"{place} has lost {', '.join(missing)}: a program that rebuilt a table dropped them"
        return [fail("database", what, "create them again, as in swarm/store/migrations/versions")]
    agents = await store.agents()
    if not any(agent.id == ECHO_AGENT_ID for agent in agents):
        checks.append(warn("agents", "the echo agent is not registered", "swarm init"))
    from swarm.agents import here

    kept = await store.packages()
    for agent in agents:
        if agent.path.name not in kept and not here(agent, agents_dir).path.is_dir():
            checks.append(
                fail("agents", f"the files of {agent.name} {agent.version} are missing: {agent.path}", "swarm init")
            )
    if len(checks) == 1:
        checks.append(ok("agents", ", ".join(f"{agent.name} {agent.version}" for agent in agents)))
    return [*checks, *skipped(await store.workers())]


def skipped(workers: Sequence[WorkerRow]) -> list[Check]:
    """Tickets whose rows an engine can't change, not even to fail them: it says so with its sign of life."""
    found: dict[str, str] = {}
    for worker in workers:
        of_worker = worker.info.get("skipped")
        found |= {str(k): str(v) for k, v in of_worker.items()} if isinstance(of_worker, dict) else {}
    fix = "drop the trigger, index or constraint that refuses it (`sqlite3 DATABASE .schema` shows all), or the ticket"
    return [fail("skipped", f"{what} is skipped by an engine: {why}", fix) for what, why in found.items()]


def registry(link: Path, database_file: Path) -> Check:
    if link.is_symlink() and files.real(link) == files.real(database_file):
        return ok("registry", f"{link} is the same database")
    if link.exists():
        return fail("registry", f"{link} is not the database {database_file}", f"mv {link} {link}.old && swarm init")
    return fail("registry", f"{link} does not exist", "swarm init")


async def attempt(name: str, fix: str, work: Callable[[], Awaitable[str]]) -> Check:
    """A check that tries something: ``work`` returns the detail, or raises the fault."""
    try:
        return ok(name, await work())
    except SwarmError as error:
        return fail(name, str(error), fix)
