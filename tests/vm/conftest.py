"""What the tests of VMs share: a network and a launcher that must leave the host as it was."""

from __future__ import annotations

from collections.abc import AsyncIterator
from ipaddress import IPv4Network

import pytest

from swarm.app import wiring
from swarm.config import Settings
from swarm.vm.driver import Image
from swarm.vm.launcher import Launcher
from swarm.vm.network.network import Network
from tests.vm.standin import host_state


@pytest.fixture
async def network() -> AsyncIterator[Network]:
    """A host without Swarm's network, which must look the same afterwards."""
    network = Network(subnet=IPv4Network("10.0.0.0/16"), bridge="br0")
    await network.remove_host()
    before = await host_state()
    yield network
    for slot in await network.list():
        await network.destroy(slot.n)
    await network.remove_host()
    assert await host_state() == before


@pytest.fixture
async def launcher(settings: Settings, image: Image) -> AsyncIterator[Launcher]:
    """Whatever a test does with it, no VM, directory, process or network of it stays."""
    launcher = wiring.launcher(settings, await wiring.choice(settings))
    before = wiring.inventory(settings).numbers()
    yield launcher
    assert wiring.inventory(settings).numbers() == before
    assert {n.n for n in await wiring.network(settings).list()} <= set(before)
