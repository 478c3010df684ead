"""Which driver is chosen, and which verdicts are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from swarm.errors import BootFailed, HostError, SwarmError
from swarm.vm.choose import choose
from swarm.vm.driver import Driver, Image, Probe

HERE = Path("/nowhere")
IMAGE = Image(digest="d", dir=HERE, kernel=HERE, kernel_elf=HERE, root=HERE, initramfs=None, boot_args="")


class Faulty:
    """A driver that looks usable and starts nothing."""

    name = "faulty"

    def __init__(self, error: SwarmError) -> None:
        self.error = error
        self.boots = 0

    async def probe(self) -> Probe:
        return Probe(usable=True, reason="looks well", accelerator="none", version="1")

    async def boot(self, *_: Any, **__: Any) -> None:
        self.boots += 1
        raise self.error


@pytest.mark.parametrize(("error", "boots"), [(HostError("no space left"), 2), (BootFailed("it ended"), 1)])
async def test_only_a_verdict_on_the_guest_is_kept(tmp_path: Path, error: SwarmError, boots: int) -> None:
    driver = Faulty(error)
    for _ in range(2):
        with pytest.raises(HostError, match=f"looks well, but .*{error}"):
            await choose([cast(Driver, driver)], IMAGE, state_dir=tmp_path / "state", cache=tmp_path / "cache")
    assert driver.boots == boots
    assert list((tmp_path / "state").iterdir()) == []
