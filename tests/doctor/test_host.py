"""What `swarm doctor` says about the host."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from swarm.base import process
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


async def test_a_program_that_only_some_commands_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it most hosts lack nothing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(process, "_SYSTEM_PATH", str(tmp_path))
    found = {
        check.name: check for check in await host.examine(state_dir=tmp_path, images_dir=tmp_path, data_dir=tmp_path)
    }
    for program, status, said in (
        ("skopeo", "ok", "only `swarm image import` needs it (apt-get install --no-install-recommends skopeo)"),
        ("buildah", "ok", "only `swarm image build --dockerfile` needs it"),
        ("mmdebstrap", "warn", "is missing: only `swarm image build` needs it"),
        ("nft", "fail", "is missing"),
    ):
        check = found[f"program {program}"]
        assert check.status == status and said in check.detail, check
