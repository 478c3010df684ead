"""Work disks: right size, empty, sparse, each its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.base.process import run
from swarm.errors import HostError
from swarm.vm.drivers.disk import make_work_disk, used_bytes


async def test_a_disk_is_a_sound_empty_ext4(tmp_path: Path) -> None:
    for name in ("a", "b"):
        await make_work_disk(tmp_path / name, size_mb=2048, cache=tmp_path / "cache")
    assert (tmp_path / "a").stat().st_size == 2048 << 20
    assert used_bytes(tmp_path / "a") < 1 << 20
    await run(["e2fsck", "-f", "-n", str(tmp_path / "a")])
    listed = (await run(["debugfs", "-R", "ls -p /", str(tmp_path / "a")])).stdout.decode().split()
    # No lost+found, which only root could read; /work/out belongs to the agent.
    assert [line.split("/")[2:6] for line in listed if line.split("/")[5] not in (".", "..")] == [
        ["040755", "1000", "1000", "out"]
    ]
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("rb") as b:
        assert a.read(1 << 16) == b.read(1 << 16)
    assert [f.name for f in (tmp_path / "cache").iterdir()] == ["work-v2-2048.ext4"]


async def test_too_small(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="at least 8 MB"):
        await make_work_disk(tmp_path / "d", size_mb=1, cache=tmp_path)


async def test_too_large_for_the_hosts_file_system(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"File too large|No space left"):
        await make_work_disk(tmp_path / "d", size_mb=1 << 40, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    """A real file system without room: a tmpfs of a few pages, in our own mount namespace."""
    small = tmp_path / "small"
    small.mkdir()
    await make_work_disk(tmp_path / "d", size_mb=64, cache=tmp_path / "cache")
    try:
        await run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(small)])
    except HostError:
        pytest.skip("needs the right to mount")
    try:
        with pytest.raises(HostError, match="no space left"):
            await make_work_disk(small / "d", size_mb=64, cache=tmp_path / "cache")
        assert list(small.iterdir()) == []
    finally:
        await run(["umount", str(small)])
