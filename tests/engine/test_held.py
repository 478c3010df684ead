"""What is asked of one sandbox, and what those who wait for it are told."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any, cast

import pytest

from swarm.engine.held import Done, Ending, Held
from swarm.engine.machines import agent_of
from swarm.engine.room import Disk, VmInUse
from swarm.engine.sandboxes import Sandboxes
from swarm.errors import ChannelError, Conflict, NoSpace, OutcomeUnknown
from swarm.live.wire import NotHeld
from swarm.model import Sandbox, SandboxClaim, SandboxState
from swarm.store.tickets.room import Room


def held(id: str = "s", project: str | None = None) -> Held:
    sandbox = Sandbox(id=id, state=SandboxState.RUNNING, project_id=project)
    claim = SandboxClaim(sandbox=sandbox, hold_id="h", agent=None, snapshot=None, resumes=False, memory_mb=128)
    return Held(claim, agent_of(claim), idle_seconds=60, emit=lambda event: None)


async def test_a_pause_that_fails_leaves_an_end_that_was_asked_for() -> None:
    one = held()
    pause = asyncio.create_task(one.ends(Ending.PAUSED, "ann"))
    end = asyncio.create_task(one.ends(Ending.ENDED, "bob"))
    await asyncio.sleep(0)
    one.refuse(NoSpace("no room"), seconds=60)
    with pytest.raises(NoSpace):
        await pause
    assert (one.asked, one.by, end.done()) == (Ending.ENDED, "bob", False)
    one.done = Done(state=SandboxState.ENDED)
    one.answer()
    await end


@pytest.mark.parametrize(
    ("done", "pause", "end"),
    [
        (Done(state=SandboxState.PAUSED), None, NotHeld),
        (Done(state=SandboxState.ENDED), Conflict, None),
        (Done(state=SandboxState.LOST, error="its VM died"), Conflict, None),
        (None, NotHeld, NotHeld),
    ],
)
async def test_who_waits_for_another_end_is_told(
    done: Done | None, pause: type[Exception] | None, end: type[Exception] | None
) -> None:
    one = held()
    waits = [asyncio.create_task(one.ends(ending, "ann")) for ending in (Ending.PAUSED, Ending.ENDED)]
    await asyncio.sleep(0)
    one.done = done
    one.answer()
    said = await asyncio.gather(*waits, return_exceptions=True)
    assert [None if error is None else type(error) for error in said] == [pause, end]


class Guest:
    """Answers no thaw, or the second one."""

    def __init__(self, *, answers: bool) -> None:
        self.answers, self.asked = answers, 0

    async def thaw(self) -> None:
        self.asked += 1
        if not self.answers or self.asked < 2:
            raise ChannelError("no answer")


async def test_programs_that_stand_still_go_on_or_it_is_told() -> None:
    one, guest = held(), Guest(answers=True)
    await one.let_go_on(cast(Any, guest))
    assert guest.asked == 2
    with pytest.raises(OutcomeUnknown, match=r"stand still since a snapshot.*no answer"):
        await one.let_go_on(cast(Any, Guest(answers=False)))


async def test_the_one_that_is_idle_for_longest_makes_room() -> None:
    """For others of its project, if that has its share."""
    holder = Sandboxes(
        store=cast(Any, None), worker="w", machines=cast(Any, None), lease_seconds=30, most=4, emit=lambda event: None
    )
    holder.yield_seconds = -1.0
    some = (a, b, old, _) = held("a", "a"), held("b", "b"), held("old", "b"), held("new", "a")
    cast(Any, holder)._held.update({one.id: one for one in some})
    for one in (old, b, a):  # in this order they were used last; the new one has not started
        one.started.set_result(None)
        one.used()
    holder.make_room("a")
    assert [one.asked for one in some] == [Ending.PAUSED, None, None, None]
    holder.make_room()
    assert [one.asked for one in some] == [Ending.PAUSED, None, Ending.PAUSED, None]


def test_a_large_vm_takes_no_more_than_its_own_disk(tmp_path: Path) -> None:
    """Of 42 GB that are free, of 200."""
    free, all_ = 42 << 10, 200 << 10

    def space(dir: Path) -> os.statvfs_result:
        block = 1 << 20
        return os.statvfs_result((block, block, all_, free, free, 10**6, 10**6, 10**6, 0, 255))

    disk = Disk(dir=tmp_path, used_bytes=lambda n: 1000 << 20, space=space)

    def room(*disks_mb: int) -> Room:
        vms = [VmInUse(memory_mb=256, disk_mb=mb, vm_id=1, executing=True, settled=True) for mb in disks_mb]
        left, shortage = disk.room(vms)
        assert shortage == ""
        return left

    whole = free - 512
    alone = room()
    assert (alone.disk_mb, alone.most_disk_mb) == (whole, whole)
    assert "needs 1048576 MB of disk, and all VMs of this host together may take 42496 MB" in alone.not_now(1 << 20)
    assert "needs 1048576 MB of disk, and all VMs of this host together may take 204288 MB" in alone.never(128, 1 << 20)
    assert alone.not_now(whole) == "" != alone.not_now(whole + 1) and alone.never(128, whole + 1) == "", "free some"
    beside = room(25_000)
    assert (beside.disk_mb, beside.most_disk_mb) == (whole - 24_000, whole + 1000)
    assert beside.lacks(128, 2048) == "", "a ticket of the usual size starts beside a large sandbox"
    assert beside.lacks(128, 25_000).startswith("disk: 18496 MB are left")
    free = 1000
    assert room().lacks(128, 2048) == "" == room().never(128, 2048), "the usual one may always be the only one"
    assert room(2048).lacks(128, 2048) != "" == room(2048).never(128, 2048)
    assert room().not_now(2048) == "" == room(2048).not_now(2048)
