"""A full disk of the host, in each place that Swarm writes to: it is named, nothing is lost or hangs, and work goes on
by itself when there is room again. (tests/engine/test_faults.py has the database's.)"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swarm import config
from swarm.app import setup, wiring
from swarm.config import Settings
from swarm.doctor import host
from swarm.engine.room import Disk, VmInUse
from swarm.errors import NoSpace
from swarm.model import FailureReason
from swarm.vm.driver import Image
from tests.engine.conftest import Bench, ended, proved, serving
from tests.engine.test_faults import DONE, bench_at, fill, remount, small_disk

pytestmark = pytest.mark.needs("netns")  # mounts of our own

GATED = "import json\nprint('up', flush=True)\nopen({gate!r}).read()\njson.dump({{}}, open('output.json', 'w'))"


DISKS = ["disk: VMs", "disk: images", "disk: database", "disk: temporary files"]


@pytest.mark.parametrize("name", DISKS)
def test_doctor_names_each_disk_that_is_full(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {
        each: tmp_path / each for each in ("disk: VMs", "disk: images", "disk: database", "disk: temporary files")
    }
    for place in places.values():
        place.mkdir()
    monkeypatch.setenv("TMPDIR", str(places["disk: temporary files"]))
    with small_disk(places[name], 1024):
        checks = host.disks(places["disk: VMs"], places["disk: images"], places["disk: database"])
    assert [check.name for check in checks if check.status == "fail"] == [name]
    (check,) = [check for check in checks if check.name == name]
    assert str(places[name]) in check.detail and str(places[name]) in check.fix


async def test_an_engine_that_found_no_space_waits_for_it(settings: Settings, tmp_path: Path) -> None:
    """The files of VMs; admission does not see it, as with a quota. The ticket goes back, uncounted."""
    with small_disk(tmp_path / "vms", 4096) as disk:
        ours = settings.model_copy(update={"state_dir": disk})
        async with bench_at(ours, tmp_path / "home", tmp_path) as bench:
            agent = await bench.agent(DONE)
            async with serving(bench) as dispatcher:
                bench.insert("first", agent.id)
                assert await ended(bench, "first") == ["done"]
                ballast = fill(disk)
                bench.insert("t", agent.id)

                async def outcomes() -> list[str]:
                    return [attempt.outcome for attempt in await bench.attempts() if attempt.outcome is not None]

                async def waits() -> bool:
                    return dispatcher.waits_for.startswith("disk: ") and len(await outcomes()) >= 2

                await bench.until(waits)
                assert str(disk) in dispatcher.waits_for
                assert set(await outcomes()) == {"interrupted"}
                (step,) = await bench.store.steps("t")
                assert step.retry_count == 0
                ballast.unlink()
                assert await ended(bench, "t") == ["done"]
            await proved(bench)


async def test_an_attempt_too_large_for_the_disk_fails_in_the_end(plain: Bench, tmp_path: Path) -> None:
    """Also what is put back uncounted is put back only so often."""
    agent = await plain.agent(DONE)
    with small_disk(tmp_path / "vms", 4096) as disk:
        ours = plain.settings.model_copy(update={"state_dir": disk})
        async with wiring.worker(ours, plain.store) as worker:
            plain.insert("t", agent.id)
            fill(disk)
            tries = 0
            while (claims := await worker.claim(ticket_id="t")) and claims[0].attempt_number < 20:
                with pytest.raises(NoSpace, match=str(disk)):
                    await worker.attempt(claims[0])
                tries += 1
            assert tries == 19
            await worker.attempt(claims[0])
            (last,) = [attempt for attempt in await plain.attempts() if attempt.number == 20]
            assert last.reason == FailureReason.HOST_ERROR and str(disk) in str(last.error)
    plain.sql("UPDATE tickets SET state = 'cancelled' WHERE id = 't'")


@pytest.mark.needs("qemu")
async def test_a_full_disk_of_templates_is_waited_for(settings: Settings, image: Image, tmp_path: Path) -> None:
    with small_disk(tmp_path / "templates", 16 << 10) as disk:
        own = config.load(**{**settings.model_dump(), "home": tmp_path / "home", "templates_dir": disk})
        await setup.init(own, image=False)
        async with wiring.store(own) as store, wiring.worker(own, store) as worker:
            bench = Bench(settings=own, store=store, worker=worker, dir=tmp_path)
            agent = await bench.agent(DONE)
            async with serving(bench) as dispatcher:
                bench.insert("t", agent.id)

                async def waits() -> bool:
                    return dispatcher.waits_for.startswith("disk: ")

                await bench.until(waits)
                assert str(disk) in dispatcher.waits_for and "SWARM_TEMPLATES_DIR" in dispatcher.waits_for
                remount(disk, f"size={800 << 10}k")
                assert await ended(bench, "t", timeout_seconds=120) == ["done"]


async def test_what_running_vms_may_still_write_is_kept_for_them(settings: Settings, tmp_path: Path) -> None:
    """64 MB, and VMs of 25 MB: two run, the third waits until one has ended."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with small_disk(tmp_path / "vms", 64 << 10) as disk:
        ours = settings.model_copy(update={"state_dir": disk})
        async with bench_at(ours, tmp_path / "home", tmp_path) as bench:
            agent = await bench.agent(GATED.format(gate=str(gate)), disk_mb=25)
            used = dict.fromkeys(range(2000), 0)
            async with serving(bench, disk=Disk(dir=disk, used_bytes=lambda n: used[n])) as dispatcher:
                for id_ in ("1", "2", "3"):
                    bench.insert(id_, agent.id)
                await bench.until_it_prints("1")
                await bench.until_it_prints("2")

                async def waits() -> bool:
                    return dispatcher.waits_for.startswith("disk: ")

                await bench.until(waits)
                assert "running VMs may still write, and the next one needs 25 MB" in dispatcher.waits_for
                assert len(dispatcher.running) == 2
                used.update(dict.fromkeys(used, 20 << 20))  # written, and so counted by the file system in this case
                await bench.until_it_prints("3")
                writers = [asyncio.to_thread(gate.write_text, "go")]
                await asyncio.gather(*writers)
                assert await ended(bench, "1", "2", "3") == ["done"] * 3


class IdleSandbox:
    """Holds one with a work disk, until it is to make room."""

    def __init__(self, disk_mb: int) -> None:
        self.takes = [VmInUse(memory_mb=128, disk_mb=disk_mb, vm_id=1, executing=True, settled=True)]
        self.most, self.draining, self.waits_for = 0, False, ""

    def vms(self) -> list[VmInUse]:
        return self.takes

    def make_room(self) -> None:
        self.takes = []

    async def collecting(self) -> None:
        await asyncio.Event().wait()

    async def drained(self) -> None: ...

    def stop(self) -> None: ...

    def look(self) -> None: ...


async def test_an_idle_sandbox_sleeps_for_a_ticket_that_lacks_disk(settings: Settings, tmp_path: Path) -> None:
    """And one that can never fit fails, and is in nobody's way."""
    with small_disk(tmp_path / "vms", 64 << 10) as disk:
        ours = settings.model_copy(update={"state_dir": disk})
        async with bench_at(ours, tmp_path / "home", tmp_path) as bench:
            sandbox: Any = IdleSandbox(disk_mb=50)
            huge = await bench.agent(DONE, "huge", disk_mb=1 << 20)
            agent = await bench.agent(DONE, disk_mb=25)
            bench.insert("huge", huge.id, priority=9)
            bench.insert("t", agent.id)
            async with serving(bench, disk=Disk(dir=disk, used_bytes=lambda n: 0), sandboxes=sandbox):
                assert await ended(bench, "huge", "t") == ["failed", "done"]
            assert sandbox.takes == []
            error = (await bench.store.ticket("huge")).error
            assert error and "needs 1048576 MB of disk, and all VMs of this host together may take" in error


async def test_a_large_ticket_goes_on_when_others_have_left_the_disk(settings: Settings, tmp_path: Path) -> None:
    """A fault of the host says nothing about its agent; meanwhile all others run, and sandboxes go on."""
    free_mb = 10_000

    def space(dir: Path) -> os.statvfs_result:
        block = 1 << 20
        return os.statvfs_result((block, block, 100_000, free_mb, free_mb, 10**6, 10**6, 10**6, 0, 255))

    async with bench_at(settings, tmp_path / "home", tmp_path) as bench:
        sandbox: Any = IdleSandbox(disk_mb=1)
        large, agent = await bench.agent(DONE, "large", disk_mb=30_000), await bench.agent(DONE)
        bench.insert("large", large.id, priority=9)
        disk = Disk(dir=tmp_path, used_bytes=lambda n: 0, space=space)
        async with serving(bench, disk=disk, sandboxes=sandbox) as dispatcher:

            async def waits() -> bool:
                return "needs 30000 MB of disk, and all VMs" in dispatcher.waits_for

            await bench.until(waits)
            bench.insert("small", agent.id)
            assert await ended(bench, "small") == ["done"]
            await bench.until(waits)
            assert (await bench.store.ticket("large")).state == "ready" and sandbox.takes != []
            free_mb = 50_000
            assert await ended(bench, "large") == ["done"]


@pytest.mark.parametrize("pages", [1, 2, 3, 5])
def test_a_one_off_run_without_temporary_space_says_so(home: Path, tmp_path: Path, pages: int) -> None:
    """With no page left Python takes another directory; so there is a bit, of which the run needs more."""
    with small_disk(tmp_path / "tmp", 128) as disk:
        ballast = fill(disk)
        os.truncate(ballast, ballast.stat().st_size - pages * 4096)
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": str(disk), "SWARM_HOME": str(home)}
        done = subprocess.run(
            [sys.executable, "-m", "swarm.cli.main", "agent", "run", "echo", "--no-vm", "--input", "name=Ada"],
            env=env, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        left = [path.name for path in disk.iterdir()]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert str(disk) in done.stderr and "space" in done.stderr.lower(), done.stderr
    assert left == ["ballast"]
