"""A short kill campaign (`make chaos` runs a long one). Its seed is random, and printed."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from swarm import config
from swarm.app import setup
from swarm.config import Settings
from swarm.vm.driver import Image
from tests.chaos import hosts, sandboxes
from tests.chaos.campaign import campaign

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

SEED = int(os.environ.get("SWARM_CHAOS_SEED", "0")) or random.SystemRandom().randrange(1 << 31)


async def run(settings: Settings, home: Path, driver: str, *, tickets: int, max_vms: int, kills: int = 0) -> None:
    values = {**settings.model_dump(), "home": home, "driver": driver, "templates_dir": settings.templates}
    own = config.load(**values)
    await setup.init(own, image=False)
    report, strikes = await campaign(own, seed=SEED, tickets=tickets, max_vms=max_vms, kills=kills)
    assert report.attempts >= tickets - report.cancelled - report.deleted
    assert strikes.total() > 0
    assert strikes["kill_engine"] >= kills


async def test_nothing_is_lost_on_plain_processes(settings: Settings, tmp_path: Path) -> None:
    await run(settings, tmp_path / "h", "process", tickets=60, max_vms=3, kills=6)


@pytest.mark.needs("qemu")
async def test_nothing_is_lost_in_real_vms(settings: Settings, image: Image, tmp_path: Path) -> None:
    await run(settings, tmp_path / "h", "qemu", tickets=6, max_vms=1)


@pytest.mark.needs("qemu")
async def test_sandboxes_survive_what_they_can(settings: Settings, image: Image, tmp_path: Path) -> None:
    values = {**settings.model_dump(), "home": tmp_path / "h", "driver": "qemu", "templates_dir": settings.templates}
    own = config.load(**values)
    await setup.init(own, image=False)
    await sandboxes.campaign(own, seed=SEED, moves=12, kills=1)


@pytest.mark.needs("netns", "postgres", "cc")
async def test_nothing_is_lost_across_three_hosts(tmp_path: Path) -> None:
    report, strikes = await hosts.campaign(tmp_path, seed=SEED, tickets=30)
    assert report.attempts >= 30 - report.cancelled - report.deleted
    assert strikes.total() > 0
