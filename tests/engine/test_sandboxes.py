"""Sandboxes that an engine holds: real VMs, a real database, the rows as any tool writes them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any, cast

import pytest

from swarm.admin.vault import Vault
from swarm.app import wiring
from swarm.base import crash_points
from swarm.channel import processes
from swarm.config import Settings
from swarm.errors import Conflict, NoSpace, UsageError
from swarm.model import Snapshot
from swarm.vm.driver import Image
from tests.agents.write import registered
from tests.conftest import PATIENCE_SECONDS
from tests.engine.conftest import engine_process
from tests.engine.sandboxing import Desk, background, opening, run, shell

pytestmark = [pytest.mark.slow, pytest.mark.needs("qemu")]


@pytest.fixture
async def desk(settings: Settings, image: Image, tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk_at(settings, tmp_path) as desk:
        yield desk
        await desk.settled()


def desk_at(settings: Settings, tmp_path: Path, **more: object) -> AbstractAsyncContextManager[Desk]:
    return Desk.at({**settings.model_dump(), "home": tmp_path / "home", "templates_dir": settings.templates, **more})


async def test_what_is_done_in_one_is_told(desk: Desk, tmp_path: Path) -> None:
    """A plain INSERT makes one; the agent's files and secrets are in it; its events tell the story without secrets."""
    agent = await registered(
        desk.store, desk.settings, tmp_path / "agent", "print('hi')", "helper", env={"A": "1"}, secrets=("KEY",)
    )
    await wiring.vault(desk.settings, desk.store).set("KEY", "swordfish")
    async with desk.engine() as engine:
        desk.insert("s", agent_id=agent.id, env='{"B": "2"}', secrets='["KEY"]')
        await desk.running("s")
        said = "cat /agent/main.py; echo $A$B$KEY; test $KEY = sword'fish' && printf sword; sleep 0.1; printf fish"
        assert await shell(engine, "s", said) == "print('hi')12[KEY]\n[KEY]"
        assert await shell(engine, "s", "printf '%s' swordf; exec 1>&-") == "swordf", "what was no secret after all"
        assert (await run(engine, "s", "/bin/sh", "-c", "exit 3; swordfish", "x" * 495 + "swordfish")).ended.code == 3
        listed = await processes.processes(opening(engine, "s"))
        assert [one.argv[2] for one in listed][-1:] == ["exit 3; [KEY]"]
        with pytest.raises(UsageError, match="freeze can't be asked of a sandbox"):
            async with engine.converse("s", "freeze", {}, b"", by="test"):
                raise AssertionError("it was asked")
        with pytest.raises(Conflict, match="does not hold the sandbox other"):
            await run(engine, "other", "/bin/true")
        await engine.end("s", by="ann")
        row = await desk.store.sandbox("s")
        assert (row.state, row.error, row.hold_id) == ("ended", None, None)
        assert desk.vms() == [], "ended means that its VM is gone"
    story = await desk.story("s")
    assert [event.data.get("to") for event in story if event.kind == "transition"] == ["running", "ended"]
    (*_, failed) = [event.data for event in story if event.kind == "exec"]
    assert failed["argv"] == ["/bin/sh", "-c", "exit 3; [KEY]", "x" * 495 + "[KEY]"] and failed["by"] == "test"
    (*_, how) = [event.data for event in story if event.kind == "exit"]
    assert how["code"] == 3 and how["process"] == failed["process"]
    assert "swordfish" not in str([event.data for event in story])


# Which one it was told, without printing the token in it: that would be replaced.
PROXY = 'test -n "$http_proxy" && echo "$http_proxy" | sha256sum'
# Once it is above this number; it is written without ever being empty.
COUNTED = "until [ -e /work/i ] && [ $(cat /work/i) -gt {} ]; do sleep 0.1; done; cat /work/i"


async def test_a_stop_of_the_engine_loses_none(desk: Desk) -> None:
    """Whatever runs in the background goes on where it stood, in another engine, with the tokens that it knows."""
    async with desk.engine() as engine:
        desk.insert("s", network="open")
        desk.insert("new", state="starting")
        await desk.running("s")
        counts = await background(engine, "s", "i=0; while :; do i=$((i+1)); echo $i 1<> /work/i; sleep 0.05; done")
        await background(engine, "s", "exit 7")
        before = int(await shell(engine, "s", COUNTED.format(0)))
        proxy = await shell(engine, "s", PROXY)
    row = await desk.store.sandbox("s")
    assert (row.state, row.hold_id, row.wanted, desk.vms()) == ("paused", None, None, [])
    assert len(desk.files()) == 1 + ((await desk.store.sandbox("new")).state == "paused")
    async with desk.engine() as engine:
        await desk.resumed("s")
        assert int(await shell(engine, "s", COUNTED.format(before))) > before
        assert await shell(engine, "s", PROXY) == proxy
        assert await desk.store.snapshot_page(desk.pauses_of("s")) == desk.no_snapshots
        found = {one.process: one.ended for one in await processes.processes(opening(engine, "s"))}
        assert found[counts] is None
        await engine.end("s", by="test")
    assert 7 in [event["code"] for event in await desk.told("s", "exit")], "told when it was paused"


async def test_one_that_has_just_started_is_paused_too(desk: Desk) -> None:
    async with desk.engine():
        desk.insert("s")
        await desk.running("s")  # its programs may not run yet
    assert (await desk.store.sandbox("s")).state == "paused"


async def test_after_a_kill_it_is_lost_and_what_slept_is_not(desk: Desk) -> None:
    templates = str(desk.settings.templates)
    async with engine_process(desk, "--max-sandboxes=4", driver="qemu", SWARM_TEMPLATES_DIR=templates) as first:
        desk.insert("runs")
        desk.insert("sleeps", wanted="paused")
        await desk.running("runs")
        await desk.state("sleeps", "paused")
        first.send_signal(signal.SIGKILL)
        await first.wait()
    async with desk.engine():
        lost = await desk.state("runs", "lost")
        assert lost.error and "ran out" in lost.error and "no snapshot to go on from" in lost.error
        assert desk.vms() == [], "swept"
        await desk.resumed("sleeps")
        desk.sql("DELETE FROM sandboxes WHERE id = 'sleeps'")
        await desk.gone()


@pytest.mark.parametrize("point", crash_points.OF_SANDBOXES)
async def test_a_restart_ends_right(settings: Settings, image: Image, tmp_path: Path, point: str) -> None:
    driver = "qemu" if point == "sandbox:saved" else "process"  # which can't be paused
    async with desk_at(settings, tmp_path, driver=driver) as desk:
        desk.insert("s", wanted="paused" if driver == "qemu" else None)
        templates = str(desk.settings.templates)
        async with engine_process(desk, driver=driver, SWARM_FAULT=point, SWARM_TEMPLATES_DIR=templates) as engine:
            _, said = await engine.communicate()
            assert engine.returncode == -signal.SIGKILL, said.decode()
        async with desk.engine() as again:
            if driver == "process":
                await desk.running("s")
                await again.end("s", by="test")
            else:
                await desk.state("s", "lost")
                snapshots = wiring.snapshots(desk.settings)
                assert len(desk.files()) == len(await snapshots.collect([], new_seconds=0)) == 1
        await desk.settled()


async def test_two_engines_never_hold_one(desk: Desk) -> None:
    async with desk.engine(most=2) as one, desk.engine(most=2) as two:
        for number in range(4):
            desk.insert(f"s{number}")
        for number in range(4):
            await desk.running(f"s{number}")
        assert sorted([*one.held, *two.held]) == ["s0", "s1", "s2", "s3"]
        desk.insert("late")
        first = next(iter(one.held))
        await one.pause(first, by="test")  # makes room
        await desk.running("late")
        for id in [*one.held, *two.held]:
            desk.sql("UPDATE sandboxes SET wanted = 'ended' WHERE id = ?", id)
        await desk.gone()
        await desk.resumed(first)

        async def one_is_held() -> bool:
            return len(one.held) + len(two.held) == 1

        await desk.until(one_is_held)


async def test_an_idle_one_makes_room_for_one_that_is_wanted(desk: Desk) -> None:
    async with desk.engine(most=1) as engine:
        engine.yield_seconds = 0.2
        for id in ("a", "b"):
            desk.insert(id)
        first = await desk.one_of("a", "b")
        (other,) = {"a", "b"} - {first}
        await desk.running(other)
        assert (await desk.store.sandbox(first)).state == "paused"


async def test_one_that_starts_or_wakes_is_ended_at_once(desk: Desk) -> None:
    async with desk.engine() as engine:
        starting: asyncio.Semaphore = cast(Any, engine)._machines._starting

        async def held(id: str) -> None:
            async def there() -> bool:
                return id in engine.held

            await desk.until(there)

        async def end(id: str) -> None:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await engine.end(id, by="ann")
            row = await desk.store.sandbox(id)
            assert (row.state, row.error, row.hold_id) == ("ended", None, None)
            assert (await desk.told(id, "transition"))[-1]["why"] == "by ann"

        desk.insert("sleeps")
        await desk.running("sleeps")
        await engine.pause("sleeps", by="test")
        async with AsyncExitStack() as none_starts:
            while not starting.locked():
                await none_starts.enter_async_context(starting)
            desk.insert("new")
            await held("new")
            await end("new")
            await desk.store.want_sandbox("sleeps", "running", by="test")
            await held("sleeps")
            await end("sleeps")
            await engine.collect()
            assert desk.files() == []


async def test_programs_do_not_stand_still_for_ever(desk: Desk) -> None:
    async with desk.engine() as engine:
        desk.insert("s")
        await desk.running("s")
        live = engine.held["s"].live
        assert live is not None
        await live.freeze()  # as a snapshot that could not thaw it leaves it
        engine.held["s"].used()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while live.frozen:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert await shell(engine, "s", "echo alive") == "alive"
        await engine.end("s", by="test")


async def test_forks_are_sandboxes_of_their_own(desk: Desk) -> None:
    async with desk.engine() as engine:
        desk.insert("s", name="box", network="open", ttl_seconds=3600, labels='{"a": "b"}')
        await desk.running("s")
        proxy = await shell(engine, "s", f"echo here > /work/x; {PROXY}")
        children = await engine.fork("s", by="ann", count=2, name="try")
        rows = [await desk.running(id) for id in children]
        assert [row.name for row in rows] == ["try-1", "try-2"]
        assert {(row.parent_id, row.labels, row.created_by) for row in rows} == {("s", '{"a": "b"}', "ann")}
        found = await asyncio.gather(*(shell(engine, id, f"cat /work/x; {PROXY}") for id in ("s", *children)))
        assert {text.split("\n")[0] for text in found} == {"here"}
        assert found[0].split("\n")[1] == proxy and len({text.split("\n")[1] for text in found}) == 3
        (told,) = await desk.told("s", "fork")
        assert told["children"] == list(children)
        named = await engine.snapshot("s", by="ann", name="base", keep_seconds=60)
        assert (await desk.store.snapshot("base")).id == named
        desk.sql("UPDATE snapshots SET expires_at = 1 WHERE kind = 'fork'")
        await engine.collect()
        assert desk.files() == [named], "what forks started from goes when they have"
        await engine.pause(children[0], by="test")
        desk.insert("again", snapshot_id=named)
        await desk.running("again")
        assert await shell(engine, "again", "cat /work/x") == "here"
    assert [(await desk.store.sandbox(id)).state for id in ("s", *children, "again")] == ["paused"] * 4


async def test_it_runs_on_when_there_is_no_room_for_its_snapshot(
    settings: Settings, image: Image, tmp_path: Path
) -> None:
    async with desk_at(settings, tmp_path, snapshots_gb=0.001) as desk, desk.engine() as engine:
        desk.insert("s")
        await desk.running("s")
        for take in (engine.pause("s", by="test"), engine.snapshot("s", by="test"), engine.fork("s", by="test")):
            with pytest.raises(NoSpace, match="SWARM_SNAPSHOTS_GB allows"):
                await take
            assert desk.files() == [], "not half a snapshot"
            assert await shell(engine, "s", "echo still here") == "still here"
        (trouble,) = await desk.told("s", "trouble")
        assert trouble["what"] == "pause" and "SWARM_SNAPSHOTS_GB" in str(trouble["error"])
        assert (await desk.store.sandbox("s")).state == "running"
        await engine.end("s", by="test")


@pytest.mark.parametrize("nothing", ["null", " ", ""])
async def test_what_says_nothing_in_a_row_stops_no_engine(settings: Settings, tmp_path: Path, nothing: str) -> None:
    async with desk_at(settings, tmp_path, driver="process") as desk, desk.engine() as engine:
        desk.insert("s", env=nothing, secrets=nothing, labels=nothing, network=nothing, image=nothing.strip())
        await desk.state("s", "running", "ended")
        desk.insert("other", env=nothing, secrets=nothing)
        await desk.running("other")
        for id in list(engine.held):
            await engine.end(id, by="test")


async def test_one_that_is_taken_again_too_early_goes_back(settings: Settings, tmp_path: Path) -> None:
    """Its engine still holds it when another program makes it new: it does not stay without a VM until a lease ends."""
    async with desk_at(settings, tmp_path, driver="process") as desk, desk.engine() as engine:
        desk.insert("s")
        first = (await desk.running("s")).hold_id
        assert engine.held["s"].claim.hold_id == first
        desk.sql("UPDATE sandboxes SET state = 'starting', hold_id = NULL, lease_until = NULL WHERE id = 's'")

        async def again() -> bool:
            row = await desk.store.sandbox("s")
            return row.state == "running" and row.hold_id != first

        await desk.until(again)
        assert "hold_lost" not in [event.kind for event in await desk.story("s")]
        await engine.end("s", by="test")


async def test_a_project_takes_not_all_places(settings: Settings, tmp_path: Path) -> None:
    async with desk_at(settings, tmp_path, driver="process") as desk, desk.engine(most=2) as engine:
        for id in ("a1", "a2"):
            desk.insert(id, project_id="a")
        first = await desk.one_of("a1", "a2")
        (other,) = {"a1", "a2"} - {first}
        desk.insert("b", project_id="b")
        await desk.running("b")

        async def told() -> bool:
            return "one project take 1 places at most" in ((await desk.store.sandbox(other)).error or "")

        await desk.until(told)
        assert list(engine.held) == [first, "b"] and "SWARM_PROJECT_SHARE" in engine.waits_for
        await engine.end(first, by="test")
        assert (await desk.running(other)).error is None
        for id in ("b", other):
            await engine.end(id, by="test")


async def test_a_project_takes_not_all_that_snapshots_may(settings: Settings, image: Image, tmp_path: Path) -> None:
    async with desk_at(settings, tmp_path, snapshots_gb=1.0, project_share=0.05) as desk:
        async with desk.engine() as engine:
            desk.insert("a", project_id="a")
            await desk.running("a")
            with pytest.raises(NoSpace, match=r"of the project 'a' take 0\.\d+ GB.* one project may take 0\.05 here"):
                await engine.snapshot("a", by="test")
            assert desk.files() == []
        assert (await desk.store.sandbox("a")).state == "paused", "a stop loses none"
        snapshots = wiring.snapshots(desk.settings)
        with pytest.raises(NoSpace, match="of the project 'a'"):
            snapshots.check_limit("a")
        for other in ("b", None):
            snapshots.check_limit(other)
        await desk.store.want_sandbox("a", "ended", by="test")


async def test_a_stop_pauses_beyond_the_limit_of_snapshots(settings: Settings, image: Image, tmp_path: Path) -> None:
    async with desk_at(settings, tmp_path, snapshots_gb=0.001) as desk:
        async with desk.engine():
            desk.insert("s")
            await desk.running("s")
        row = await desk.store.sandbox("s")
        assert (row.state, row.error) == ("paused", None)


async def test_an_engine_that_holds_none_removes_old_snapshots_too(desk: Desk) -> None:
    """Tickets leave them."""
    place = desk.settings.snapshots / ("0" * 32)
    place.mkdir(parents=True)
    await desk.store.add_snapshot(Snapshot(id=place.name, kind="attempt", host=socket.gethostname(), expires_at=1))

    async def forgotten() -> bool:
        return not await desk.store.snapshot_ids(socket.gethostname())

    async with desk.engine(most=0):
        await desk.until(forgotten)
    assert desk.files() == []


async def test_idle_ones_sleep_and_those_whose_time_is_over_end(desk: Desk) -> None:
    async with desk.engine() as engine:
        desk.insert("idle", idle_timeout_seconds=0.3)
        desk.insert("short", ttl_seconds=1.0)
        await desk.state("short", "ended")
        await desk.state("idle", "paused")
        whys = [event.data.get("why") for id in ("idle", "short") for event in await desk.story(id)]
        assert "idle" in whys and "its time to live is over" in whys
        await desk.resumed("idle")
        assert await shell(engine, "idle", "sleep 0.6; echo awake") == "awake", "it is in use"
        live = engine.held["idle"].live
        assert live is not None
        live.channel.close()  # as a hostile guest may do
        await desk.state("idle", "paused")
        desk.sql("UPDATE sandboxes SET wanted = 'ended' WHERE id = 'idle'")
        await desk.state("idle", "ended")


async def test_a_damaged_snapshot_is_found_before_it_runs(desk: Desk) -> None:
    async with desk.engine() as engine:
        desk.insert("s")
        await desk.running("s")
        await engine.pause("s", by="test")
        (snapshot,) = desk.files()
        with (desk.settings.snapshots / snapshot / "memory").open("r+b") as memory:
            memory.seek(1 << 20)
            memory.write(os.urandom(64))
        await desk.store.want_sandbox("s", "running", by="test")
        lost = await desk.state("s", "lost")
        assert lost.error and "damaged" in lost.error
        assert desk.vms() == []


async def test_what_can_be_mended_costs_no_sandbox(desk: Desk) -> None:
    """A secret that is gone: one that sleeps goes on sleeping, and says why it can't be resumed; a new one ends."""
    vault: Vault = wiring.vault(desk.settings, desk.store)
    await vault.set("KEY", "swordfish")
    async with desk.engine() as engine:
        desk.insert("s", secrets='["KEY"]')
        await desk.running("s")
        with pytest.raises(Conflict, match="was given secrets"):
            await engine.snapshot("s", by="test", without_secrets=True)
        await engine.pause("s", by="test")
        await vault.remove("KEY")
        await desk.store.want_sandbox("s", "running", by="test")

        async def refused() -> bool:
            row = await desk.store.sandbox("s")
            return row.state == "paused" and "the secret 'KEY', which is not set" in (row.error or "")

        await desk.until(refused)
        desk.insert("new", secrets='["KEY"]')
        error = (await desk.state("new", "ended")).error or ""
        assert "can't run here" in error and error.endswith("`swarm secret set KEY`")
        await vault.set("KEY", "swordfish")
        await desk.resumed("s")
        await shell(engine, "s", "printf '%s' $KEY > /work/key")
        start = await engine.snapshot("s", by="test", keep_seconds=60)
        await engine.end("s", by="test")
        desk.insert("from-it", snapshot_id=start)
        await desk.running("from-it")
        assert await shell(engine, "from-it", "cat /work/key; printf '%s' $KEY") == "[KEY]", "replaced, and not given"
        await engine.end("from-it", by="test")
