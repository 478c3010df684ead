"""What `swarm doctor` says about the host."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from swarm.doctor import host


@pytest.mark.needs("root", "netns")
def test_it_says_when_vms_can_fill_the_disk_of_the_database(tmp_path: Path) -> None:
    state, data, images = (tmp_path / name for name in ("state", "data", "images"))
    state.mkdir()

    def of_vms() -> str:
        return next(check.detail for check in host.disks(state, images, data) if check.name == "disk: VMs")

    assert "the database is on the same disk" in of_vms()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(state)], check=True)
    try:
        assert "the database" not in of_vms()
    finally:
        subprocess.run(["umount", str(state)], check=True)
