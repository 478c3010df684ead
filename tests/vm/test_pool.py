"""The pool: VMs kept ready, and what may happen to them before they are taken."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any, cast

import pytest

from swarm.app import wiring
from swarm.base import priority, process
from swarm.base.clock import Timeline
from swarm.config import Settings
from swarm.errors import ChannelError, HostError
from swarm.vm import pool as pools
from swarm.vm.driver import Image, Template, VmSpec
from swarm.vm.launcher import Assignment, Launcher, LiveVm
from swarm.vm.pool import Pool, PoolStatus
from swarm.vm.slots.inventory import MAX_SLOT
from swarm.vm.slots.slot_pool import SlotPool
from tests.base.test_priority import below_ours, nice_of
from tests.conftest import PATIENCE_SECONDS

qemu = pytest.mark.needs("qemu")


@pytest.fixture
def spec(image: Image) -> VmSpec:
    return VmSpec(image=image, memory_mb=192, disk_mb=64)


@asynccontextmanager
async def a_vm(launcher: Launcher, spec: VmSpec, timeline: Timeline | None = None) -> AsyncIterator[LiveVm]:
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


class Clock:
    """The real one, which can be put forward."""

    ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


def status_of(pool: Pool) -> PoolStatus:
    [status] = pool.inspect()
    return status


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - the pool does not notify
            await asyncio.sleep(0.01)


@qemu
async def test_a_ready_vm_is_used_and_replaced(launcher: Launcher, spec: VmSpec, settings: Settings) -> None:
    inventory = wiring.inventory(settings)
    async with Pool(launcher, warm=1, specs=[spec]) as pool:
        await pool.filled()
        [waiting] = [r for r in inventory.records() if r.pid]  # the other records are free slots
        assert (waiting.ticket_id, waiting.kind) == (None, "attempt")
        timeline = Timeline()
        async with a_vm(launcher, spec, timeline) as taken:
            assert taken.n == waiting.n
            [record] = [r for r in inventory.records() if r.n == taken.n]
            assert (record.ticket_id, record.attempt_id) == ("t1", "a1")
            assert "running" in timeline
            assert await hello_world(taken) == "hello ['out'] ['main.py']\n", "no trace of the warm-up"
            await pool.filled()
            assert len([r for r in inventory.records() if r.pid]) == 2
        assert (pool.hits, pool.misses) == (1, 0)
        first = taken.identity
        async with a_vm(launcher, spec) as other:
            assert other.identity.generation != first.generation
            assert other.vm.pid != taken.vm.pid
    assert not Path(f"/proc/{taken.vm.pid}").exists()


@qemu
async def test_vms_yield_to_the_engine_and_ready_ones_to_used_ones(launcher: Launcher, spec: VmSpec) -> None:
    async with Pool(launcher, warm=1, specs=[spec]) as pool:
        await pool.filled()
        waiting = status_of(pool).ready[0].pid
        assert nice_of(waiting) == below_ours(priority.LOWEST)
        async with a_vm(launcher, spec) as taken:
            assert taken.vm.pid == waiting
            assert nice_of(waiting) == below_ours(priority.BELOW_ENGINE)


@qemu
async def test_an_empty_pool_makes_no_one_wait(launcher: Launcher, spec: VmSpec) -> None:
    async with Pool(launcher, warm=0) as pool, a_vm(launcher, spec) as taken:
        assert "hello" in await hello_world(taken)
        assert (pool.hits, pool.misses) == (0, 1)


@qemu
async def test_a_dead_vm_is_replaced(launcher: Launcher, spec: VmSpec) -> None:
    async with Pool(launcher, warm=1, specs=[spec]) as pool:
        await pool.filled()
        victim = status_of(pool).ready[0].pid
        os.kill(victim, signal.SIGKILL)
        async with a_vm(launcher, spec) as taken:
            assert taken.vm.pid != victim
            assert "hello" in await hello_world(taken)


@qemu
async def test_a_vm_that_does_not_answer_is_not_used(launcher: Launcher, spec: VmSpec) -> None:
    async with Pool(launcher, warm=1, specs=[spec]) as pool:
        await pool.filled()
        victim = status_of(pool).ready[0].pid
        os.kill(victim, signal.SIGSTOP)  # the VMM lives, the guest does not answer
        async with a_vm(launcher, spec) as taken:
            assert taken.vm.pid != victim
            assert "hello" in await hello_world(taken)


@qemu
async def test_filled_fails_if_no_vm_can_be_made(settings: Settings, spec: VmSpec, launcher: Launcher) -> None:
    await launcher.template(spec)
    nowhere = settings.model_copy(update={"first_engine_slot": MAX_SLOT + 1})
    async with Pool(wiring.launcher(nowhere, launcher.choice), warm=2, specs=[spec], back_off_seconds=0.05) as pool:
        with pytest.raises(HostError, match=r"no warm VM can be made, after \d tries: no free slot"):
            await within(pool.filled())


@qemu
async def test_no_fault_of_the_host_ends_the_making(
    settings: Settings, spec: VmSpec, launcher: Launcher, tmp_path: Path
) -> None:
    """Not even an error that Swarm does not know."""
    await launcher.template(spec)
    (tmp_path / "ssh").write_text("in the way of a directory")
    own = settings.model_copy(update={"state_dir": tmp_path})
    async with Pool(wiring.launcher(own, launcher.choice), warm=2, specs=[spec], back_off_seconds=0.05) as pool:
        with pytest.raises(HostError, match="File exists"):
            await within(pool.filled())
        assert status_of(pool).failures >= 3 and "File exists" in status_of(pool).trouble
        (tmp_path / "ssh").unlink()
        await until(lambda: len(status_of(pool).ready) == 2)  # `filled` may still raise for the failures
        assert status_of(pool).failures == 0


@qemu
async def test_filled_fails_if_the_template_can_not_be_built(spec: VmSpec, launcher: Launcher) -> None:
    broken = dataclasses.replace(spec, preload=("no_such_module_at_all",))
    async with Pool(launcher, warm=1, specs=[broken]) as pool:
        with pytest.raises(HostError, match="no_such_module_at_all"):
            await within(pool.filled())


async def within(work: Awaitable[None], *, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        await work


@qemu
async def test_the_pool_follows_a_template_that_is_removed_or_changed(
    settings: Settings, spec: VmSpec, launcher: Launcher
) -> None:
    """It is rebuilt, with another token, before the next VM is made of it."""
    clock = Clock()
    async with Pool(launcher, warm=1, specs=[spec], back_off_seconds=0.05, look_seconds=0.05, clock=clock) as pool:
        await within(pool.filled())
        first = await launcher.template(spec)
        assert first is not None
        await wiring.templates(settings).remove(first.key)
        async with a_vm(launcher, spec) as taken:
            assert "hello" in await hello_world(taken)
            await within(pool.filled())
        second = await launcher.template(spec, build=False)
        assert second is not None and second.token != first.token
        with (second.dir / "memory").open("r+b") as file:  # by a VMM that a guest took over, say
            file.write(b"\xff" * 4096)
        damaged_since = status_of(pool).ready[0].pid
        clock.ahead += pools.MAX_AGE_SECONDS
        await until(lambda: damaged_since not in [vm.pid for vm in status_of(pool).ready])
        await within(pool.filled())
        third = await launcher.template(spec, build=False)
        assert third is not None and third.token != second.token
        async with a_vm(launcher, spec) as taken:
            assert "hello" in await hello_world(taken)
        assert (pool.hits, pool.misses) == (2, 0)


@qemu
async def test_a_vm_with_other_limits_is_not_used(launcher: Launcher, spec: VmSpec) -> None:
    """Limits are not in the template's key: a driver sets them for each clone."""
    slow = dataclasses.replace(spec, disk_mb_per_second=1.0)
    async with Pool(launcher, warm=1, specs=[spec]) as pool:
        await pool.filled()
        async with a_vm(launcher, slow):
            pass
        assert (pool.hits, pool.misses) == (0, 1)
        async with a_vm(launcher, spec):
            pass
        assert (pool.hits, pool.misses) == (1, 1)


@qemu
async def test_an_old_vm_is_not_used(launcher: Launcher, spec: VmSpec) -> None:
    clock = Clock()
    async with Pool(launcher, warm=1, specs=[spec], clock=clock) as pool:
        await pool.filled()
        old = status_of(pool).ready[0].pid
        clock.ahead += pools.MAX_AGE_SECONDS
        async with a_vm(launcher, spec) as taken:
            assert taken.vm.pid != old


@qemu
async def test_a_pool_that_is_left_while_it_fills_leaves_nothing(launcher: Launcher, spec: VmSpec) -> None:
    async with Pool(launcher, warm=3, specs=[spec]) as pool:
        await until(lambda: bool(pool.inspect()))
        assert status_of(pool).wanted == 3


@qemu
async def test_slots_are_used_again(launcher: Launcher, spec: VmSpec) -> None:
    async with launcher.keeping(1, ahead=1):
        [making] = [task for task in asyncio.all_tasks() if task.get_name() == "slots-ahead"]
        await making
        assert launcher.slots.free == 1
        numbers = set()
        for _ in range(3):
            async with a_vm(launcher, spec) as taken:
                numbers.add(taken.n)
                assert "hello" in await hello_world(taken), "the network works again"
        assert len(numbers) == 1
        await launcher.slots.idle()
        assert launcher.slots.free == 1
    assert launcher.slots.free == 0


@qemu
async def test_a_slot_that_was_tampered_with_is_made_anew(settings: Settings) -> None:
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


@qemu
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
    async with asyncio.timeout(PATIENCE_SECONDS):
        async for line in owner.stdout:
            if line == b"full\n":
                break
    owner.kill()
    await owner.communicate()
    [record] = [r for r in wiring.inventory(settings).records() if r.n not in before and r.pid]
    await wiring.sweep(settings)
    assert wiring.inventory(settings).numbers() == before
    assert not Path(f"/proc/{record.pid}").exists()


@qemu
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


# --- without VMs: what is kept, made and ended, by a clock that the test sets -----------------------------------------


class Guest:
    """A VM of which there is nothing but its end. Its agentd answers whatever it is asked."""

    pid = 0

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def wait(self) -> str:
        await self.ended.wait()
        return "ended"

    async def put(self, *_: object, **__: object) -> None: ...
    async def run(self, *_: object, **__: object) -> None: ...
    async def get(self, *_: object, **__: object) -> None: ...
    async def hello(self) -> Mapping[str, object]:
        raise ChannelError("it is not used")


class Cloner:
    """Stands in for a launcher: clones of any template, at once, or ``fault``. ``making`` is called for each;
    ``ending`` is what their ends wait for."""

    def __init__(self, *, fault: Exception | None = None, making: Callable[[], None] = lambda: None) -> None:
        self.fault = fault
        self.making = making
        self.ending = asyncio.Event()
        self.ending.set()
        self.ends_begun = self.ends = 0

    def attach(self, source: object) -> None: ...
    def detach(self) -> None: ...

    async def template(self, spec: VmSpec) -> Template:
        return a_template(spec)

    async def clone(self, template: Template, undo: AsyncExitStack) -> LiveVm:
        if self.fault:
            raise self.fault
        self.making()
        guest = Guest()
        undo.push_async_callback(self._end, guest)
        vm = cast(Any, guest)
        return LiveVm(n=1, spec=NONE, vm=vm, channel=vm, renewed=NONE, vm_slot=NONE, identity=NONE)

    async def renew(self, live: LiveVm) -> None: ...

    async def _end(self, guest: Guest) -> None:
        self.ends_begun += 1
        await self.ending.wait()
        guest.ended.set()
        self.ends += 1


NONE = cast(Any, None)
SPEC = VmSpec(
    image=Image(
        digest="d", dir=Path("/"), kernel=Path("/"), kernel_elf=Path("/"), root=Path("/"), initramfs=None, boot_args=""
    )
)


def a_template(spec: VmSpec = SPEC) -> Template:
    return Template(key=f"template of {spec.memory_mb} MB", dir=Path("/"), spec=spec, token=b"")


def a_pool(cloner: Cloner, clock: Callable[[], float], *, warm: int | None, **more: Any) -> Pool:
    return Pool(cast(Launcher, cloner), warm=warm, clock=clock, look_seconds=0.01, **more)


async def request(pool: Pool, times: int = 1, *, template: Template | None = None) -> None:
    for _ in range(times):
        async with AsyncExitStack() as undo:
            await pool.take(template or a_template(), Assignment(), undo)


async def test_auto_follows_the_arrivals() -> None:
    now = 1000.0
    pool = a_pool(Cloner(), lambda: now, warm=None)  # not entered: nothing is made
    await request(pool)
    now += pools.WINDOW_SECONDS + 1
    assert status_of(pool).wanted == 1, "used a moment ago"
    await request(pool, 90)  # three a second, and one takes a second to make
    assert status_of(pool).wanted == 4
    await request(pool, 900)
    assert status_of(pool).wanted == pools.AUTO_MAX
    now += pools.FORGET_SECONDS + 1
    assert status_of(pool).wanted == 0


async def test_what_was_requested_at_the_start_is_never_forgotten() -> None:
    now = 1000.0
    async with a_pool(Cloner(), lambda: now, warm=None, specs=[SPEC]) as pool:
        await within(pool.filled())
        now += 10 * pools.FORGET_SECONDS
        assert status_of(pool).wanted == 1


async def test_more_than_is_wanted_is_ended_at_once() -> None:
    now = 1000.0

    def a_second_later() -> None:
        nonlocal now
        now += 1

    cloner = Cloner(making=a_second_later)
    async with a_pool(cloner, lambda: now, warm=None, specs=[SPEC]) as pool:
        await request(pool, 900)
        await until(lambda: len(status_of(pool).ready) == pools.AUTO_MAX)
        assert cloner.ends == 0
        now += pools.WINDOW_SECONDS + 1
        await until(lambda: cloner.ends == pools.AUTO_MAX - 2)
        assert (status_of(pool).wanted, len(status_of(pool).ready)) == (1, 2)


async def test_two_makers_may_forget_the_same_templates() -> None:
    now, cloner = 1000.0, Cloner()
    async with a_pool(cloner, lambda: now, warm=1) as pool:
        for memory_mb in (128, 256):
            await request(pool, template=a_template(dataclasses.replace(SPEC, memory_mb=memory_mb)))
        await until(lambda: [len(status.ready) for status in pool.inspect()] == [1, 1])
        cloner.ending.clear()
        now += pools.FORGET_SECONDS + 1
        await until(lambda: cloner.ends_begun == 2)  # each maker ends one
        cloner.ending.set()
        await until(lambda: cloner.ends == 2)
        assert pool.inspect() == []
        await request(pool)
        await within(pool.filled())  # both makers are at work


async def test_filled_returns_when_less_is_wanted() -> None:
    now, cloner = 1000.0, Cloner(fault=HostError("not now"))
    async with a_pool(cloner, lambda: now, warm=1, back_off_seconds=float("inf")) as pool:
        await request(pool)
        await until(lambda: status_of(pool).failures == 1)
        assert (status_of(pool).trouble, status_of(pool).ready) == ("not now", ())
        waiting = asyncio.ensure_future(pool.filled())
        await asyncio.sleep(0)
        now += pools.FORGET_SECONDS + 1
        await within(waiting)


async def test_filled_ends_when_the_pool_is_left() -> None:
    async with a_pool(Cloner(fault=HostError("not now")), time.monotonic, warm=1, back_off_seconds=1e9) as pool:
        await request(pool)
        await until(lambda: status_of(pool).failures == 1)
        waiting = asyncio.ensure_future(pool.filled())
        await asyncio.sleep(0)
    with pytest.raises(HostError, match="the pool was left"):
        await within(waiting)
