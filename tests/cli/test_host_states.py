"""Commands where the host is not as usual: closed or narrow streams, odd paths, another host name."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swarm import config
from swarm.app import setup, wiring
from swarm.base import process
from swarm.cli import service
from swarm.model import Ticket

TITLE = "caf\u00e9 \u2603"


def swarm(home: Path, line: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of the shell, whose first word stands for the program."""
    line = line.replace("swarm", f'"{sys.executable}" -m swarm.cli.main', 1)
    environment = os.environ | {"SWARM_HOME": str(home)} | env
    return subprocess.run(["sh", "-c", line], check=False, capture_output=True, env=environment, timeout=60)


def made(place: Path) -> Path:
    """A home with one ticket."""
    settings = config.load(home=place)

    async def make() -> None:
        await setup.init(settings, image=False)
        async with wiring.store(settings) as store:
            await store.add_ticket(Ticket(id="1", title=TITLE, state="draft"))

    asyncio.run(make())
    return place


@pytest.fixture(scope="module", params=["has # in it", "has ? in it", "has %41 in it", "\u00e4 ?#%3F"])
def odd_home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("odd") / request.param)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("plain") / "home")


def test_the_database_is_where_the_home_is(odd_home: Path) -> None:
    assert (odd_home / "data" / "swarm.db").exists()
    assert [path.name for path in odd_home.parent.iterdir()] == [odd_home.name]
    (ticket,) = json.loads(swarm(odd_home, "swarm ticket list --json").stdout)
    assert ticket["title"] == TITLE


async def test_a_commit_is_seen(odd_home: Path) -> None:
    async with wiring.store(config.load(home=odd_home)) as store, store.watching() as wake:
        await store.heartbeat("w", host="h", pid=1, info={})
        assert await wake.changed(timeout_seconds=30)
        await store.forget_worker("w")


@pytest.mark.parametrize(
    ("line", "encoding", "out"),
    [
        ("swarm ticket list", "ascii", b"caf? ?"),
        ("swarm ticket show 1", "latin-1", b"caf\xe9 ?"),
        ("swarm ticket list", "utf-8", TITLE.encode()),
        ("swarm ticket list --json", "ascii", rb'"title": "caf\u00e9 \u2603"'),
        ("swarm ticket list --json", "utf-8", f'"title": "{TITLE}"'.encode()),
        ("swarm ticket list >&-", "utf-8", b""),
        ("swarm ticket show 1 >&-", "ascii", b""),
        ("swarm ticket list --json <&- >&- 2>&-", "utf-8", b""),
    ],
)
def test_streams_that_can_not_take_everything(place: Path, line: str, encoding: str, out: bytes) -> None:
    done = swarm(place, line, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert out in done.stdout
    assert (done.stdout == b"") == (out == b"")


@pytest.mark.parametrize(
    ("machine", "here"),
    [(process.machine(), True), (f"{process.boot_id()} 1", False), ("another boot", False), (None, False)],
    ids=["this", "another container", "another boot", "unknown"],
)
async def test_an_engine_is_found_after_the_host_got_another_name(place: Path, machine: str | None, here: bool) -> None:
    """Its row has the old name. A process of another host, or container, is not looked for here."""
    async with wiring.store(config.load(home=place)) as store:
        info = {"started": process.start_time(os.getpid()), "machine": machine}
        await store.heartbeat("w", host="the-old-name", pid=os.getpid(), info=info)
        (row,) = await store.workers()
        assert (service.of_row(row) is not None) == here
        await store.heartbeat("w", host="the-old-name", pid=os.getpid(), info=info | {"started": 1})
        await service.forget_dead(store)
        assert len(await store.workers()) == (0 if here else 1)
        await store.forget_worker("w")
