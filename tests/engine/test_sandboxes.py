"""Sandboxes that an engine holds: real VMs, a real database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from swarm import config
from swarm.app import setup, wiring
from swarm.config import Settings
from swarm.vm.driver import Image
from tests.engine.sandboxing import Desk, shell

pytestmark = [pytest.mark.slow, pytest.mark.needs("qemu")]


@pytest.fixture
async def desk(settings: Settings, image: Image, tmp_path: Path) -> AsyncIterator[Desk]:
    own = config.load(**{**settings.model_dump(), "home": tmp_path / "home", "templates_dir": settings.templates})
    await setup.init(own, image=False)
    async with wiring.store(own) as store:
        yield Desk(settings=own, store=store)


async def test_the_life_of_a_sandbox(desk: Desk) -> None:
    async with desk.engine() as engine:
        desk.insert("s")
        await desk.running("s")
        assert await shell(engine, "s", "echo hello > /work/a; echo $$") != ""
        await engine.pause("s", by="test")
        assert (await desk.store.sandbox("s")).state == "paused"
        assert desk.vms() == []
        await desk.resumed("s")
        assert await shell(engine, "s", "cat /work/a") == "hello"
        (child,) = await engine.fork("s", by="test")
        await desk.running(child)
        assert await shell(engine, child, "cat /work/a") == "hello"
        await engine.end("s", by="test")
        assert (await desk.store.sandbox("s")).state == "ended"
    assert (await desk.store.sandbox(child)).state == "paused"
    assert desk.vms() == []
