"""The pool: machines made ahead, and what may become of them before anybody takes one."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from textwrap import dedent
from typing import cast

import pytest

from swarm.app import wiring
from swarm.base import process
from swarm.base.clock import Timeline
from swarm.config import Settings
from swarm.errors import HostError
from swarm.vm import pool as pools
from swarm.vm.driver import Image, Template, VmSpec
from swarm.vm.launcher import Assignment, Launcher, LiveVm
from swarm.vm.pool import Pool, Ready, Shelf
from swarm.vm.slots.inventory import MAX_SLOT
from swarm.vm.slots.slot_pool import SlotPool

pytestmark = pytest.mark.needs("qemu")


@pytest.fixture
def spec(image: Image) -> VmSpec:
    return VmSpec(image=image, memory_mb=192, disk_mb=64)


@asynccontextmanager
async def live(launcher: Launcher, spec: VmSpec, timeline: Timeline | None = None) -> AsyncIterator[LiveVm]:
    async with launcher.vm(spec, Assignment(ticket_id="t1", attempt_id="a1"), timeline or Timeline()) as live:
        yield live


async def hello_world(live: LiveVm) -> str:
    said = bytearray()
    await live.channel.put(
        {"main.py": b"import os\nprint('hello', sorted(os.listdir('/work')), os.listdir('/agent'))"}, dest="/agent"
    )
    ended = await live.channel.run(
        ["/agent/main.py"], warm=True, timeout_seconds=60, on_output=lambda _, data: said.extend(data)
    )
    assert ended.code == 0
    return said.decode()


async def test_a_ready_machine_is_handed_out_and_replaced(launcher: Launcher, spec: VmSpec, settings: Settings) -> None:
    inventory = wiring.inventory(settings)
    async with Pool(launcher, warm=1, specs=[spec]) as pool:
        await pool.filled()
        [waiting] = [r for r in inventory.records() if r.pid]  # the others are free slots
        assert (waiting.ticket_id, waiting.kind) == (None, "attempt")
        timeline = Timeline()
        async with live(launcher, spec, timeline) as taken:
            assert taken.n == waiting.n
            [record] = [r for r in inventory.records() if r.n == taken.n]
            assert (record.ticket_id, record.attempt_id) == ("t1", "a1")
            assert "running" in timeline
            assert await hello_world(taken) == "hello ['lost+found'] ['main.py']\n", "no trace of the practice"
            await pool.filled()
            assert len([r for r in inventory.records() if r.pid]) == 2
        assert (pool.hits, pool.misses) == (1, 0)
        first = taken.identity
        async with live(launcher, spec) as other:
            assert other.identity.generation != first.generation
            assert other.vm.pid != taken.vm.pid
    assert not Path(f"/proc/{taken.vm.pid}").exists()


async def test_waiting_machines_yield_to_working_ones(launcher: Launcher, spec: VmSpec) -> None:
    async with Pool(launcher, warm=1, specs=[spec]) as pool:
        await pool.filled()
        [shelf] = pool._shelves.values()
        waiting = shelf.ready[0].live.vm.pid
        assert nice_of(waiting) == {19}
        async with live(launcher, spec) as taken:
            assert taken.vm.pid == waiting
            assert nice_of(waiting) == {0}


def nice_of(pid: int) -> set[int]:
    return {os.getpriority(os.PRIO_PROCESS, int(t.name)) for t in Path(f"/proc/{pid}/task").iterdir()}


async def test_an_empty_pool_keeps_nobody_waiting(launcher: Launcher, spec: VmSpec) -> None:
    async with Pool(launcher, warm=0) as pool, live(launcher, spec) as taken:
        assert "hello" in await hello_world(taken)
        assert (pool.hits, pool.misses) == (0, 1)


async def test_a_dead_machine_is_noticed_and_replaced(launcher: Launcher, spec: VmSpec) -> None:
    async with Pool(launcher, warm=1, specs=[spec]) as pool:
        await pool.filled()
        [shelf] = pool._shelves.values()
        victim = shelf.ready[0]
        os.kill(victim.live.vm.pid, signal.SIGKILL)
        async with live(launcher, spec) as taken:
            assert taken.vm.pid != victim.live.vm.pid
            assert "hello" in await hello_world(taken)


async def test_a_machine_that_does_not_answer_is_not_handed_out(launcher: Launcher, spec: VmSpec) -> None:
    async with Pool(launcher, warm=1, specs=[spec]) as pool:
        await pool.filled()
        [shelf] = pool._shelves.values()
        victim = shelf.ready[0].live.vm.pid
        os.kill(victim, signal.SIGSTOP)  # the VMM lives, the guest does not answer
        async with live(launcher, spec) as taken:
            assert taken.vm.pid != victim
            assert "hello" in await hello_world(taken)


async def test_nobody_waits_for_machines_that_can_not_be_made(
    settings: Settings, spec: VmSpec, launcher: Launcher
) -> None:
    await launcher.template(spec)
    nowhere = settings.model_copy(update={"first_engine_slot": MAX_SLOT + 1})
    async with Pool(wiring.launcher(nowhere, launcher.choice), warm=2, specs=[spec], back_off_seconds=0.05) as pool:
        with pytest.raises(HostError, match=r"no warm VM can be made, after \d tries: no free slot"):
            await within(pool.filled())


async def test_no_fault_of_the_host_ends_the_filling(
    settings: Settings, spec: VmSpec, launcher: Launcher, tmp_path: Path
) -> None:
    """Not one that no part of Swarm puts into words either."""
    await launcher.template(spec)
    (tmp_path / "ssh").write_text("in the way of a directory")
    own = settings.model_copy(update={"state_dir": tmp_path})
    async with Pool(wiring.launcher(own, launcher.choice), warm=2, specs=[spec], back_off_seconds=0.05) as pool:
        with pytest.raises(HostError, match="File exists"):
            await within(pool.filled())
        (tmp_path / "ssh").unlink()
        async with asyncio.timeout(60):
            while pool.status()[0].ready < 2:  # noqa: ASYNC110 - `filled` may still tell of the faults
                await asyncio.sleep(0.05)


async def test_who_waits_for_a_full_pool_is_told_when_its_template_can_not_be_built(
    spec: VmSpec, launcher: Launcher
) -> None:
    broken = dataclasses.replace(spec, preload=("no_such_module_at_all",))
    async with Pool(launcher, warm=1, specs=[broken]) as pool:
        with pytest.raises(HostError, match="no_such_module_at_all"):
            await within(pool.filled())


async def test_who_waits_for_a_full_pool_is_let_go_when_less_is_wanted(launcher: Launcher, spec: VmSpec) -> None:
    template = await launcher.template(spec)
    assert template is not None
    async with Pool(launcher, warm=None) as pool:
        shelf = pool._shelf(template)
        shelf.retry_at = float("inf")  # as after a failure: nothing is made meanwhile
        waiting = asyncio.ensure_future(pool.filled())
        await asyncio.sleep(0)
        shelf.last_asked -= pools.FORGET_SECONDS + 1
        pool._news.set()
        await within(waiting)


async def test_who_waits_for_a_full_pool_is_let_go_when_it_is_left(launcher: Launcher, spec: VmSpec) -> None:
    template = await launcher.template(spec)
    assert template is not None
    async with Pool(launcher, warm=1) as pool:
        pool._shelf(template).retry_at = float("inf")
        waiting = asyncio.ensure_future(pool.filled())
        await asyncio.sleep(0)
    with pytest.raises(HostError, match="the pool was left"):
        await within(waiting)


async def within(work: Awaitable[None], *, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        await work


async def test_the_pool_follows_a_template_that_is_removed_or_changed(
    settings: Settings, spec: VmSpec, launcher: Launcher
) -> None:
    """It is built again, with another token, before the next machine is made of it."""
    async with Pool(launcher, warm=1, specs=[spec], back_off_seconds=0.05) as pool:
        await within(pool.filled())
        [shelf] = pool._shelves.values()
        first = shelf.template
        await wiring.templates(settings).remove(first.key)
        async with live(launcher, spec) as taken:
            assert "hello" in await hello_world(taken)
            await within(pool.filled())
        second = shelf.template
        assert second.token != first.token
        with (second.dir / "memory").open("r+b") as file:  # by a VMM that a guest took over, say
            file.write(b"\xff" * 4096)
        shelf.ready[0].born -= pools.MAX_AGE_SECONDS
        pool._news.set()
        await within(_other(shelf, second))
        await within(pool.filled())
        async with live(launcher, spec) as taken:
            assert "hello" in await hello_world(taken)
        assert (pool.hits, pool.misses) == (2, 0)


async def _other(shelf: Shelf, template: Template) -> None:
    while shelf.template.token == template.token:  # noqa: ASYNC110 - the pool tells of machines, not of templates
        await asyncio.sleep(0.05)


async def test_a_machine_made_with_other_limits_is_not_handed_out(launcher: Launcher, spec: VmSpec) -> None:
    """They are not in the template's key: a driver gives them to each clone."""
    slow = dataclasses.replace(spec, disk_mb_per_second=1.0)
    async with Pool(launcher, warm=1, specs=[spec]) as pool:
        await pool.filled()
        async with live(launcher, slow):
            pass
        assert (pool.hits, pool.misses) == (0, 1)
        async with live(launcher, spec):
            pass
        assert (pool.hits, pool.misses) == (1, 1)


def on_shelf(pool: Pool, template: Template, count: int, closing: Callable[[], Awaitable[object]]) -> Shelf:
    """Machines of which there is nothing but their end."""
    shelf = pool._shelf(template)
    for _ in range(count):
        undo = AsyncExitStack()
        undo.push_async_callback(closing)
        death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        shelf.ready.append(Ready(live=cast(LiveVm, None), undo=undo, born=time.monotonic(), death=death))
    return shelf


async def test_two_makers_may_let_go_of_the_same_machines(launcher: Launcher, spec: VmSpec) -> None:
    template = await launcher.template(spec)
    assert template is not None
    pool, ending = Pool(launcher, warm=1), asyncio.Event()
    for key in ("one", "two"):
        shelf = on_shelf(pool, dataclasses.replace(template, key=key), 1, ending.wait)
        shelf.last_asked -= pools.FORGET_SECONDS + 1
    makers = [asyncio.create_task(pool._retire()) for _ in range(2)]
    await asyncio.sleep(0)
    ending.set()
    await asyncio.gather(*makers)
    assert pool.status() == []


async def test_more_than_is_wanted_goes_at_once(launcher: Launcher, spec: VmSpec) -> None:
    template = await launcher.template(spec)
    assert template is not None
    pool, closed = Pool(launcher, warm=1), []

    async def close() -> None:
        closed.append(1)

    shelf = on_shelf(pool, template, 10, close)
    await pool._retire()
    assert (len(shelf.ready), len(closed)) == (2, 8)


async def test_an_old_machine_is_not_handed_out(launcher: Launcher, spec: VmSpec) -> None:
    async with Pool(launcher, warm=1, specs=[spec]) as pool:
        await pool.filled()
        [shelf] = pool._shelves.values()
        shelf.ready[0].born -= pools.MAX_AGE_SECONDS
        old = shelf.ready[0].live.vm.pid
        async with live(launcher, spec) as taken:
            assert taken.vm.pid != old


async def test_a_pool_that_is_left_while_it_fills_leaves_nothing(launcher: Launcher, spec: VmSpec) -> None:
    async with Pool(launcher, warm=3, specs=[spec]) as pool:
        await pool._opening
        [status] = pool.status()
        assert status.wanted == 3


async def test_slots_are_used_again(launcher: Launcher, spec: VmSpec) -> None:
    async with launcher.keeping(1, ahead=1):
        [making] = [task for task in asyncio.all_tasks() if task.get_name() == "slots-ahead"]
        await making
        assert launcher._slots.free == 1
        numbers = set()
        for _ in range(3):
            async with live(launcher, spec) as taken:
                numbers.add(taken.n)
                assert "hello" in await hello_world(taken), "the network works again"
        assert len(numbers) == 1
        await launcher._slots.idle()
        assert launcher._slots.free == 1
    assert launcher._slots.free == 0


async def test_a_seat_that_was_tampered_with_is_made_anew(settings: Settings) -> None:
    vm_slots = SlotPool(inventory=wiring.inventory(settings), network=wiring.network(settings), first=41_000)
    vm_slots.keep = 1
    async with AsyncExitStack() as undo:
        vm_slot = await vm_slots.take(undo)
        await process.run(["ip", "link", "del", f"swarm{vm_slot.lease.n}"])
    await vm_slots.idle()
    assert vm_slots.free == 0
    assert 41_000 not in wiring.inventory(settings).numbers()
    async with AsyncExitStack() as undo:
        assert (await vm_slots.take(undo)).lease.n == 41_000
    await vm_slots.idle()
    assert vm_slots.free == 1
    await vm_slots.close()
    assert 41_000 not in wiring.inventory(settings).numbers()


async def test_auto_follows_the_arrivals(launcher: Launcher, spec: VmSpec) -> None:
    template = await launcher.template(spec)
    assert template is not None
    pool = Pool(launcher, warm=None)
    shelf = pool._shelf(template)
    assert pool.wanted(shelf) == 1, "used a moment ago"
    shelf.make_seconds = 1.0
    now = asyncio.get_running_loop().time()
    shelf.arrivals.extend([now] * 90)  # three a second, and one takes a second to make
    assert pool.wanted(shelf) == 4
    shelf.arrivals.extend([now] * 900)
    assert pool.wanted(shelf) == pools.AUTO_MAX
    shelf.arrivals.clear()
    shelf.last_asked -= pools.FORGET_SECONDS + 1
    assert pool.wanted(shelf) == 0
    shelf.pinned = True
    assert pool.wanted(shelf) == 1


async def test_what_a_killed_owner_had_ready_is_swept(launcher: Launcher, spec: VmSpec, settings: Settings) -> None:
    code = """
    import asyncio, sys
    from swarm import config
    from swarm.app import wiring
    from swarm.vm.driver import VmSpec
    from swarm.vm.pool import Pool
    async def main():
        settings = config.load()
        launcher = wiring.launcher(settings, await wiring.choice(settings))
        spec = VmSpec(image=await wiring.images(settings).find(), memory_mb=192, disk_mb=64)
        async with Pool(launcher, warm=1, specs=[spec]) as pool:
            await pool.filled()
            print("full", flush=True)
            await asyncio.Event().wait()
    asyncio.run(main())
    """
    await launcher.template(spec)
    own = {f"SWARM_{k.upper()}": str(getattr(settings, k)) for k in ("home", "state_dir", "images_dir")}
    before = wiring.inventory(settings).numbers()
    owner = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        dedent(code),
        env={**own, "PATH": os.environ["PATH"]},
        stdin=subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    assert owner.stdout
    async with asyncio.timeout(60):
        async for line in owner.stdout:
            if line == b"full\n":
                break
    owner.kill()
    await owner.communicate()
    [record] = [r for r in wiring.inventory(settings).records() if r.n not in before and r.pid]
    await wiring.sweep(settings)
    assert wiring.inventory(settings).numbers() == before
    assert not Path(f"/proc/{record.pid}").exists()


async def test_a_pool_that_is_left_while_its_template_is_built_leaves_nothing(
    settings: Settings, image: Image, tmp_path: Path
) -> None:
    own = settings.model_copy(update={"templates_dir": tmp_path / "templates"})
    before = wiring.inventory(own).numbers()
    async with Pool(
        wiring.launcher(own, await wiring.choice(own)), warm=1, specs=[VmSpec(image=image, memory_mb=160, disk_mb=64)]
    ):
        await asyncio.sleep(0)  # it has begun
    assert wiring.inventory(own).numbers() == before
    assert wiring.templates(own).all() == []
