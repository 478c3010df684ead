"""VMs saved, paused, resumed and forked: with QEMU, by the launcher."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from swarm.app import wiring
from swarm.base.clock import Timeline
from swarm.config import Settings
from swarm.errors import ImageError, NoSpace, NotFound
from swarm.vm.driver import Image, Snapshot, VmSpec
from swarm.vm.launcher import Assignment, Launcher, LiveVm
from swarm.vm.snapshots import Snapshots

pytestmark = pytest.mark.needs("qemu")


@pytest.fixture
def spec(image: Image) -> VmSpec:
    return VmSpec(image=image)


@pytest.fixture
def snapshots(settings: Settings, tmp_path: Path) -> Snapshots:
    return wiring.snapshots(settings.model_copy(update={"snapshots_dir": tmp_path / "snapshots"}))


def names(snapshots: Snapshots) -> list[str]:
    return sorted(path.name for path in snapshots.dir.iterdir())


async def sh(live: LiveVm, command: str) -> str:
    said = bytearray()
    ended = await live.channel.run(
        ["/bin/sh", "-c", command], user="root", timeout_seconds=60, on_output=lambda _, data: said.extend(data)
    )
    assert ended.code == 0, said
    return said.decode().strip()


@asynccontextmanager
async def a_vm(launcher: Launcher, spec: VmSpec) -> AsyncIterator[LiveVm]:
    async with launcher.vm(spec, Assignment(), Timeline()) as live:
        yield live


@asynccontextmanager
async def going_on(
    launcher: Launcher, snapshots: Snapshots, snapshot: Snapshot, *, fork: bool
) -> AsyncIterator[LiveVm]:
    found = await snapshots.find(snapshot.id)
    assert found.digest == snapshot.digest
    async with launcher.restored(found, Assignment(), Timeline(), fork=fork) as live:
        yield live


async def test_a_vm_is_saved_forked_paused_and_resumed(launcher: Launcher, snapshots: Snapshots, spec: VmSpec) -> None:
    async with a_vm(launcher, spec) as parent:
        # In memory (a tmpfs), on disk, and on disk but not flushed.
        await sh(parent, "echo memory > /run/x; echo disk > /work/x; sync; echo late > /work/y")
        async with snapshots.stage() as stage:
            saved = await launcher.save(parent, stage)
        assert await sh(parent, "cat /run/x /work/x /work/y; echo parent > /work/x") == "memory\ndisk\nlate"
        assert (saved.dir.stat().st_mode & 0o777, saved.dir.parent.stat().st_mode & 0o777) == (0o700, 0o700)
        assert {path.stat().st_mode & 0o177 for path in saved.dir.iterdir()} == {0}
        assert names(snapshots) == [saved.id]
        assert saved.size_bytes <= snapshots.used_bytes() < 400 << 20

        async with going_on(launcher, snapshots, saved, fork=True) as fork:
            assert await sh(fork, "cat /run/x /work/x /work/y; echo fork > /work/x") == "memory\ndisk\nlate"
            assert fork.identity.token != parent.identity.token
            async with snapshots.stage() as stage:
                paused = await launcher.pause(fork, stage)
            assert await fork.vm.wait()  # it has ended
        assert await sh(parent, "cat /work/x") == "parent"
        await snapshots.find(saved.id)  # still as it was: verified

    for turn in ("first", "second"):  # the second VM's memory file was its own
        async with going_on(launcher, snapshots, paused, fork=False) as again:
            assert await snapshots.remove(paused.id)
            assert await sh(again, "cat /work/x; cat /run/x") == "fork\nmemory", turn
            assert again.identity.machine_id == fork.identity.machine_id
            async with snapshots.stage() as stage:
                paused = await launcher.pause(again, stage)
    assert names(snapshots) == sorted([saved.id, paused.id])


async def test_a_damaged_snapshot_is_found_before_it_runs(
    launcher: Launcher, snapshots: Snapshots, spec: VmSpec
) -> None:
    async with a_vm(launcher, spec) as parent, snapshots.stage() as stage:
        saved = await launcher.save(parent, stage)
    for name in ("memory", "state", "work"):
        with (saved.dir / name).open("r+b") as file:
            file.seek(4096)
            kept = file.read(1)
            file.seek(4096)
            file.write(bytes([kept[0] ^ 1]))
        with pytest.raises(ImageError, match=f"damaged.*{name}"):
            await snapshots.find(saved.id)
        with (saved.dir / name).open("r+b") as file:
            file.seek(4096)
            file.write(kept)
        await snapshots.find(saved.id)
    (saved.dir / "snapshot.json").write_text("{}")
    with pytest.raises(ImageError, match="damaged"):
        await snapshots.find(saved.id)
    assert await snapshots.remove(saved.id)
    with pytest.raises(NotFound):
        await snapshots.find(saved.id)


async def test_without_room_the_vm_runs_on_and_nothing_is_left(
    launcher: Launcher, snapshots: Snapshots, spec: VmSpec
) -> None:
    snapshots.limit_bytes = 1 << 20
    async with a_vm(launcher, spec) as live:
        for take in (launcher.save, launcher.pause):
            with pytest.raises(NoSpace, match="SWARM_SNAPSHOTS_GB"):
                async with snapshots.stage() as stage:
                    await take(live, stage)
            assert names(snapshots) == []
            assert await sh(live, "echo alive") == "alive"


async def test_collect_spares_what_is_wanted_new_or_being_written(snapshots: Snapshots) -> None:
    async with snapshots.stage() as stage:
        (stage.dir / "memory").write_bytes(b"x")
        for name in ("a" * 32, "b" * 32, ".building-" + "c" * 32):
            (snapshots.dir / name).mkdir()
        assert await snapshots.collect({"a" * 32}) == []
        assert names(snapshots) == sorted(["a" * 32, "b" * 32, stage.dir.name])
        assert await snapshots.collect({"a" * 32}, new_seconds=-1) == ["b" * 32]
        assert (stage.dir / "memory").exists()
    assert names(snapshots) == ["a" * 32]


async def test_the_manifest_tells_no_seed(launcher: Launcher, snapshots: Snapshots, spec: VmSpec) -> None:
    async with a_vm(launcher, spec) as live, snapshots.stage() as stage:
        saved = await launcher.save(live, stage)
    manifest = json.loads((saved.dir / "snapshot.json").read_text())
    assert live.identity.seed.hex() not in json.dumps(manifest)
