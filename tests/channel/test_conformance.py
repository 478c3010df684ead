"""What others expect of a sandbox, in a process of this host; `test_in_vm` asks the same of a VM."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.channel import Guest
from tests.channel.agentd_here import TOKEN, running
from tests.channel.conformance import CASES, Case

pytestmark = pytest.mark.slow  # starts programs


@pytest.mark.parametrize("case", CASES, ids=[case.__name__ for case in CASES])
async def test_in_a_process(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    place: Path = tmp_path_factory.mktemp("g")
    async with running(place) as guest:
        connections = Guest(guest.vm.endpoint, TOKEN)
        try:
            await case(connections.open, False)
        finally:
            await connections.close()
