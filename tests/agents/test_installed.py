"""Rows of agents that point elsewhere: an agent is what `swarm agent add` made, and nothing else is sent or removed."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swarm import agents
from swarm.admin import packages
from swarm.agents.installed import BOUND_FIELDS
from swarm.app import setup, wiring
from swarm.config import Settings
from swarm.engine.run_once import run_ticket
from swarm.errors import NotConfigured
from swarm.model import Agent, Ticket
from tests.agents.write import registered
from tests.engine.conftest import Bench, plain  # noqa: F401

DONE = "open('output.json', 'w').write('{}')"
# Other values for every field that a row may not change.
CHANGED: dict[str, Any] = {
    "name": "other", "version": "1.0.1", "runtime": "exec", "entry": ("/bin/sh", "-c", "env"), "image": "0123abcd",
    "env": {"LD_PRELOAD": "/tmp/x.so"}, "secrets": ("KEY",), "network": "open", "preload": ("json",),
    "requirements": ("x==1.0",), "packages": ("git",), "npm": ("x@1.0.0",),
    "budget_usd": 1000.0, "budget_tokens": 10**6,
    "over_budget": "wait",
}  # fmt: skip


@pytest.fixture
async def mine(settings: Settings, tmp_path: Path) -> tuple[Settings, Agent]:
    own = settings.model_copy(update={"home": tmp_path / "home"})
    await setup.init(own, image=False)
    async with wiring.store(own) as store:
        return own, await registered(store, own, tmp_path / "mine", DONE, "mine")


async def test_what_was_added_may_run_with_limits_of_its_row(mine: tuple[Settings, Agent]) -> None:
    own, agent = mine
    installed = agents.Installed(own.agents)
    for row in (agent, replace(agent, id="x", memory_mb=512, timeout_seconds=1.0, description="tuned")):
        assert (await installed.check(row)).agent.name == "mine"


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("field", BOUND_FIELDS)
async def test_a_row_cannot_change_what_gives_rights(mine: tuple[Settings, Agent], field: str, known: bool) -> None:
    own, agent = mine
    installed = agents.Installed(own.agents)
    if known:
        await installed.check(agent)
    with pytest.raises(NotConfigured, match="swarm agent add"):
        await installed.check(replace(agent, **{field: CHANGED[field]}))


async def test_foreign_paths(mine: tuple[Settings, Agent], tmp_path: Path) -> None:
    own, agent = mine
    copy, home = agent.path, own.home
    elsewhere = tmp_path / copy.name
    elsewhere.mkdir()
    for file in copy.iterdir():
        (elsewhere / file.name).write_bytes(file.read_bytes())
    link = own.agents / "mine-1.0.0-0123456789ab"
    link.symlink_to(copy)
    other = next(path for path in own.agents.iterdir() if path.name.startswith("echo-"))
    foreign = [
        own.agents, own.agents / "..", own.agents / ".", home, Path("/"), Path("/etc"), link, other,
        copy / "..", copy / ".." / "..", own.agents / "mine-1.0.0-ba9876543210", Path("/\0"),
        own.agents / ".." / "agents" / ".." / "data",
    ]  # fmt: skip
    for path in foreign:
        row = replace(agent, path=path)
        assert not agents.is_copy(row, own.agents), path
        with pytest.raises(NotConfigured, match="no copy"):
            await agents.Installed(own.agents).check(row)
    for path in (elsewhere, Path(copy.name)):  # of another host, for all that this one knows: the name alone counts
        assert (await agents.Installed(own.agents).here(replace(agent, path=path))).path == copy


async def test_changed_files(mine: tuple[Settings, Agent]) -> None:
    own, agent = mine
    (agent.path / "main.py").chmod(0o644)
    (agent.path / "main.py").write_text("changed")
    with pytest.raises(NotConfigured, match="changed since"):
        await agents.Installed(own.agents).check(agent)


@pytest.mark.parametrize("path", ["{home}/agents/..", "{home}/agents", "{home}", "{home}/agents/.", "{home}/kept"])
async def test_removing_an_agent_removes_nothing_else(settings: Settings, tmp_path: Path, path: str) -> None:
    own = settings.model_copy(update={"home": tmp_path / "home"})
    await setup.init(own, image=False)
    (own.home / "kept").mkdir()
    (own.home / "kept" / "file").write_text("kept")
    with sqlite3.connect(own.data_dir / "swarm.db", timeout=60) as database:
        row = ("x", "x", "1.0.0", path.format(home=own.home), json.dumps(["main.py"]))
        database.execute("INSERT INTO agents (id, name, version, path, entry) VALUES (?, ?, ?, ?, ?)", row)
    database.close()
    before = {file for file in own.home.rglob("*") if not file.name.startswith("swarm.db")}
    async with wiring.store(own) as store:
        await packages.remove_agent(store, "x", own.agents)
    assert {file for file in own.home.rglob("*") if not file.name.startswith("swarm.db")} == before


async def test_a_ticket_of_such_a_row_sends_nothing(plain: Bench, tmp_path: Path) -> None:  # noqa: F811
    """The root-only directory, and the secret of the agent that the row is named after."""
    private = tmp_path / "private"
    private.mkdir(0o700)
    (private / "main.py").write_text("import os\nopen('output.json', 'w').write('1')\n")
    async with wiring.store(plain.settings) as store:
        await wiring.vault(plain.settings, store).set("KEY", "a secret", scope="agent:echo")
    entry, wanted = json.dumps(["main.py"]), json.dumps(["KEY"])
    columns = "INSERT INTO agents (id, name, version, path, entry, secrets) VALUES (?, ?, ?, ?, ?, ?)"
    plain.sql(columns, "foreign", "foreign", "1.0.0", str(private), entry, "[]")
    plain.sql(columns, "namesake", "echo", "9.9.9", str(private), entry, wanted)
    for agent in ("foreign", "namesake"):
        ticket = await _run(plain, agent)
        assert ticket.state == "failed" and "no copy of it" in str(ticket.error)


async def _run(bench: Bench, agent: str) -> Ticket:
    bench.insert(agent, agent)
    return await run_ticket(bench.store, bench.worker, agent)
