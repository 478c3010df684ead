from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from swarm.app import serve, wiring
from swarm.client import AsyncSwarm
from tests.api.served import Served, serving
from tests.engine.conftest import Bench
from tests.engine.conftest import plain as plain  # the fixture: agents as plain processes


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path / "home") as served:
        yield served


@pytest.fixture
async def at_work(plain: Bench) -> AsyncIterator[Bench]:
    """An engine that runs tickets and holds sandboxes, and a server."""
    engine = wiring.dispatcher(plain.settings, plain.store, max_vms=4, max_sandboxes=4, grace_seconds=0.0)
    async with engine as dispatcher, serve.served(plain.settings, host="127.0.0.1", port=0, remote=False):
        running = asyncio.create_task(dispatcher.run())
        yield plain
        dispatcher.stop()
        await running


@pytest.fixture
async def s(at_work: Bench) -> AsyncIterator[AsyncSwarm]:
    async with AsyncSwarm(home=at_work.settings.home, timeout_seconds=120) as s:
        yield s
