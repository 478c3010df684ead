"""An agent that was added on one host runs on another, which gets its files from the database."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from swarm import agents, config
from swarm.admin import backup, packages
from swarm.app import setup, wiring
from swarm.base import trees
from swarm.base.files import is_full
from swarm.config import Settings
from swarm.engine.run_once import run_ticket
from swarm.errors import HostError, NotConfigured
from swarm.model import Agent, Ticket
from swarm.store.store import Store
from tests.engine.test_faults import small_disk
from tests.store.databases import Outside, database_of_hosts, insert

CODE = """
import json, pathlib, subprocess
here = pathlib.Path(__file__).parent
said = subprocess.run([here / "bin" / "say"], capture_output=True, text=True, check=True).stdout
sizes = [(here / name).stat().st_size for name in ("large", "link")]
json.dump({"said": said.strip(), "sizes": sizes}, open("output.json", "w"))
"""
_PART = "name = :name AND number = :number"
SAYS = {"said": "hello", "sizes": [2_500_000, 2_500_000]}


@dataclass(frozen=True)
class Hosts:
    """Two homes with state directories of their own, and one database."""

    first: Settings
    second: Settings
    outside: Outside
    place: Path

    @asynccontextmanager
    async def store(self, of: Settings | None = None) -> AsyncIterator[Store]:
        async with wiring.store(of or self.first) as store:
            yield store

    async def add(self, version: str = "1.0.0", *, code: str = CODE, replace: bool = False) -> Agent:
        """On the first host."""
        source = self.place / "source"
        if not source.exists():
            (source / "bin").mkdir(parents=True)
            (source / "bin" / "say").write_text("#!/bin/sh\necho hello\n")
            (source / "bin" / "say").chmod(0o755)
            (source / "large").write_bytes(os.urandom(2_500_000))
            (source / "link").symlink_to("large")
        (source / "main.py").write_text(code)
        (source / agents.MANIFEST).write_text(f'{{"name": "far", "version": "{version}", "entry": ["main.py"]}}')
        async with self.store() as store:
            return await packages.add_agent(store, source, self.first.agents, replace=replace)

    async def run(self, id: str = "t") -> Ticket:
        """On the second host."""
        insert(self.outside, id, agent_id="far")
        async with self.store(self.second) as store, wiring.worker(self.second, store) as worker:
            return await run_ticket(store, worker, id)

    def kept(self) -> list[str]:
        rows = self.outside.execute("SELECT name FROM packages WHERE name LIKE 'far-%' AND number = 0 ORDER BY name")
        return [str(name) for (name,) in rows]

    def left(self) -> set[str]:
        """What is in the second host's directory of agents."""
        return {one.name for one in self.second.agents.iterdir()} if self.second.agents.exists() else set()


def _hosts(settings: Settings, place: Path, url: str, open_outside: Callable[[str], Outside]) -> Iterator[Hosts]:
    given = {**settings.model_dump(), "driver": "process", "database_url": url}
    first = config.load(**{**given, "home": place / "1", "state_dir": place / "state1"})
    second = config.load(**{**given, "home": place / "2", "state_dir": place / "state2"})
    asyncio.run(setup.init(first, image=False))
    with contextlib.closing(open_outside(url)) as outside:
        yield Hosts(first, second, outside, place)


@pytest.fixture
def hosts(request: pytest.FixtureRequest, settings: Settings, tmp_path: Path) -> Iterator[Hosts]:
    yield from _hosts(settings, tmp_path, *database_of_hosts(request, "sqlite", tmp_path))


@pytest.fixture(params=["sqlite", "postgresql"])
def both(request: pytest.FixtureRequest, settings: Settings, tmp_path: Path) -> Iterator[Hosts]:
    yield from _hosts(settings, tmp_path, *database_of_hosts(request, request.param, tmp_path))


async def test_a_host_that_never_saw_the_agent_runs_its_ticket(both: Hosts) -> None:
    agent = await both.add()
    ticket = await both.run()
    assert (ticket.state, ticket.error) == ("done", None)
    assert ticket.outputs is not None and all(str(value) in ticket.outputs for value in SAYS["sizes"])
    copy = both.second.agents / agent.path.name
    assert agents.bundle_digest(copy) == agents.bundle_digest(agent.path)
    assert stat.S_IMODE((copy / "bin" / "say").stat().st_mode) == 0o555
    assert stat.S_IMODE((copy / "main.py").stat().st_mode) == 0o444
    assert both.left() == {agent.path.name}


async def test_engines_of_one_host_make_its_copy_once(both: Hosts) -> None:
    agent = await both.add()
    both.second.agents.mkdir(parents=True)
    (both.second.agents / ".restored-killed").mkdir()
    async with both.store(both.second) as one, both.store(both.second) as two:
        installed = [agents.Installed(both.second.agents, store) for store in (one, one, two, two)]
        found = await asyncio.gather(*(each.here(agent) for each in installed for _ in range(3)))
    assert {one.path for one in found} == {both.second.agents / agent.path.name}
    assert both.left() == {agent.path.name}


async def test_a_changed_byte_is_refused_until_it_is_added_again(both: Hosts) -> None:
    agent = await both.add()
    for number in (0, 1, 3):
        shutil.rmtree(both.second.agents, ignore_errors=True)
        which = {"name": agent.path.name, "number": number}
        ((text,),) = both.outside.execute(f"SELECT data FROM packages WHERE {_PART}", which)
        at = len(text) // 2
        other = text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]
        both.outside.execute(f"UPDATE packages SET data = :data WHERE {_PART}", which | {"data": other})
        async with both.store(both.second) as store:
            with pytest.raises(NotConfigured, match=r"is damaged; add it with `swarm agent add`$"):
                await agents.Installed(both.second.agents, store).here(agent)
            assert both.left() == set()
            await both.add()
            assert (await agents.Installed(both.second.agents, store).here(agent)).path.is_dir()


async def test_what_is_not_an_agents_file_is_not_written(hosts: Hosts) -> None:
    agent = await hosts.add()
    link = trees.Entry("out", stat.S_IFLNK | 0o777, len(b"/etc"))
    with agents.packed(agent.path) as package:  # a file to be filled anew
        package.seek(0)
        package.truncate()
        for _, text in trees.pack([(link, (b"/etc",))]):
            package.write(f"{text}\n")
        async with hosts.store() as store:
            await store.keep_package(agent.path.name, package)
    ticket = await hosts.run()
    assert ticket.state == "failed" and "leads out of its directory" in str(ticket.error)
    assert hosts.left() == set()


async def test_a_row_without_files_says_what_to_do_and_init_keeps_them(hosts: Hosts) -> None:
    """An agent of a version that did not keep them."""
    await hosts.add()
    hosts.outside.execute("DELETE FROM packages")
    ticket = await hosts.run("before")
    assert ticket.state == "failed" and "add it with `swarm agent add`" in str(ticket.error)
    await setup.init(hosts.first, image=False)
    assert (await hosts.run("after")).state == "done"


async def test_its_files_go_with_the_agent(both: Hosts) -> None:
    old = await both.add()
    new = await both.add(code=f"{CODE}# changed\n", replace=True)
    assert both.kept() == [new.path.name] != [old.path.name]
    second = await both.add("2.0.0")
    assert len(both.kept()) == 2
    async with both.store() as store:
        await packages.remove_agent(store, "far@1.0.0", both.first.agents)
        assert both.kept() == [second.path.name]
        both.outside.execute("DELETE FROM agents WHERE name = 'far'")
        await store.prune(0)
    assert both.kept() == []


class Stopped:
    """Files of which no more come than the first two parts."""

    def __init__(self, store: Store) -> None:
        self._store, self.asked = store, asyncio.Event()

    async def package(self, name: str, number: int) -> str | None:
        if number > 1:
            self.asked.set()
            await asyncio.Event().wait()
        return await self._store.package(name, number)


async def test_what_is_stopped_leaves_nothing(hosts: Hosts) -> None:
    agent = await hosts.add()
    async with hosts.store(hosts.second) as store:
        stopped = Stopped(store)
        task = asyncio.create_task(agents.Installed(hosts.second.agents, stopped).here(agent))
        await stopped.asked.wait()
        assert hosts.left() != set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert hosts.left() == set()


@pytest.mark.needs("netns")  # mounts of our own
async def test_a_full_disk_leaves_nothing(hosts: Hosts) -> None:
    agent = await hosts.add()
    with small_disk(hosts.place / "disk", 1024) as disk:
        async with hosts.store(hosts.second) as store:
            with pytest.raises(HostError, match="can't write the files of the agent 'far'") as caught:
                await agents.Installed(disk / "agents", store).here(agent)
            cause = caught.value.__cause__
            assert isinstance(cause, OSError) and is_full(cause)  # so that its ticket waits for room
            assert list((disk / "agents").iterdir()) == []


async def test_others_who_may_write_an_sqlite_file_add_no_agents(hosts: Hosts) -> None:
    agent = await hosts.add()
    file = hosts.first.data_dir / "swarm.db"
    async with hosts.store(hosts.second) as store:
        installed = agents.Installed(hosts.second.agents, store)
        for path, mode in ((file, 0o660), (file, 0o606), (file.parent, 0o770)):
            before = stat.S_IMODE(path.stat().st_mode)
            path.chmod(mode)
            with pytest.raises(NotConfigured, match=r"other users may write there; add it with `swarm agent add`$"):
                await installed.here(agent)
            path.chmod(before)
        assert (await installed.here(agent)).path.is_dir()


async def test_a_backup_has_them(hosts: Hosts, tmp_path: Path) -> None:
    agent = await hosts.add()
    await backup.make(hosts.first.database, hosts.first.agents, tmp_path / "backup", now_ms=0)
    url, into = f"sqlite:///{tmp_path}/new/swarm.db", tmp_path / "agents"
    await backup.put_back(url, into, tmp_path / "backup", replace=False)
    shutil.rmtree(into)
    async with Store.open(url) as store:
        assert (await agents.Installed(into, store).here(await store.agent(agent.id))).path == into / agent.path.name
