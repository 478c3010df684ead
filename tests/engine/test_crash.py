"""The engine dies at each point between two writes, by name: a restart ends right, whatever was done and not done."""

from __future__ import annotations

import asyncio
import signal

import pytest

from swarm.app import wiring
from swarm.base import crash_points
from swarm.store.claims import suspects
from tests.conftest import PATIENCE_SECONDS
from tests.engine.conftest import Bench, ended, engine_process, log_until, proved, serving

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

AGENT = "import json, time\nprint('up', flush=True)\ntime.sleep({})\njson.dump({{}}, open('output.json', 'w'))"
WAITS_AT_FIRST = (
    "import json, os, time\nprint('up', flush=True)\n"
    "first = json.load(open('input.json'))['step']['attempt'] == 1\n"
    "while first: time.sleep(1)\n"
    "json.dump({'first': first}, open('output.json', 'w'))"
)
HOUR_MS = 3_600_000


async def restart(bench: Bench, *tickets: str) -> list[str]:
    """The next engine, once every lease of the dead one is over."""
    await bench.store.shift_clock(HOUR_MS)
    async with wiring.dispatcher(bench.settings, bench.store, max_vms=2, grace_seconds=0) as dispatcher:
        assert bench.live_vms() == []  # what the dead one left was swept
        task = asyncio.create_task(dispatcher.run())
        states = await ended(bench, *tickets)
        dispatcher.stop()
        await task
    return states


@pytest.mark.parametrize("point", crash_points.POINTS)
async def test_a_restart_ends_right(plain: Bench, point: str) -> None:
    # Long enough for events to be flushed, which is every 0.1 s, or leases to be renewed, which is every second.
    agent = await plain.agent(AGENT.format(3 if "renew" in point else 0.4))
    plain.insert("a", agent.id)
    plain.insert("b", agent.id)
    async with engine_process(plain, SWARM_FAULT=point) as engine, asyncio.timeout(PATIENCE_SECONDS):
        _, said = await engine.communicate()
        assert engine.returncode == -signal.SIGKILL, said.decode()
    assert await restart(plain, "a", "b") == ["done", "done"]
    report = await proved(plain)
    assert (report.done, report.finished_twice, report.lost) == (2, [], [])
    # An agent ran a second time only where its end was never written: never after "finished", or before "claimed".
    for id_ in ("a", "b"):
        outcomes = [attempt.outcome for attempt in await plain.attempts(id_)]
        assert outcomes in (["succeeded"], ["lost", "succeeded"]), outcomes
    assert plain.live_vms() == []


@pytest.mark.needs("qemu")
async def test_vms_of_a_killed_engine_die_with_it_and_are_swept(bench: Bench) -> None:
    agent = await bench.agent("print('up', flush=True)\nimport time; time.sleep(600)")
    bench.insert("t", agent.id)
    async with engine_process(bench, driver="auto", SWARM_TEMPLATES_DIR=str(bench.settings.templates)) as engine:
        await bench.until_it_prints()
        (record,) = bench.vms()
        assert record.alive
        async with wiring.store(bench.settings) as store:
            (row,) = await store.workers()
        assert row.info["driver"] == record.driver  # not `auto`
        engine.kill()
        await engine.wait()

        async def dead() -> bool:
            return not record.alive

        await bench.until(dead)
    assert record.n in [stale.n for stale in wiring.inventory(bench.settings).stale()]
    await wiring.sweep(bench.settings)  # what every command that starts VMs does first
    assert bench.live_vms() == []


async def test_the_steps_of_an_engine_killed_on_this_host_are_taken_over_at_once(plain: Bench) -> None:
    """Its lease would last for an hour. Meanwhile a live engine keeps what is its own."""
    agent = await plain.agent(WAITS_AT_FIRST)
    plain.insert("t", agent.id)
    async with engine_process(plain, SWARM_LEASE_SECONDS="3600") as engine:
        await plain.until_it_prints()
        async with serving(plain):
            engine.kill()
            assert await ended(plain, "t") == ["done"]
    first, second = await plain.attempts()
    assert (first.outcome, second.outcome) == ("lost", "succeeded")
    assert await plain.store.workers() == []
    await wiring.sweep(plain.settings)
    await proved(plain)


# Finds the engine above it, and kills it.
GUILTY = """
import os, signal
pid = os.getpid()
while b"swarm.cli.engine" not in open(f"/proc/{pid}/cmdline", "rb").read():
    pid = int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
os.kill(pid, signal.SIGKILL)
"""


async def test_a_ticket_that_kills_its_engine_each_time_is_given_up_and_no_other(plain: Bench) -> None:
    guilty = await plain.agent(GUILTY, "guilty")
    agent = await plain.agent(AGENT.format(0.8), "innocent")
    innocent = [f"i{number}" for number in range(4)]
    plain.insert("guilty", guilty.id)
    for id_ in innocent:
        plain.insert(id_, agent.id)
    deaths = 0
    while (await plain.store.ticket("guilty")).state != "failed":
        async with engine_process(plain, SWARM_LEASE_SECONDS="3600") as engine:
            ending = asyncio.create_task(ended(plain, "guilty"))
            dying = asyncio.create_task(engine.communicate())
            await asyncio.wait((ending, dying), return_when=asyncio.FIRST_COMPLETED)
            deaths += dying.done()
            for task in (ending, dying):
                task.cancel()
            await asyncio.gather(ending, dying, return_exceptions=True)
        assert deaths <= suspects.SUSPECT_AFTER + suspects.ENOUGH
    assert deaths == suspects.SUSPECT_AFTER + suspects.ENOUGH
    assert "while they ran nothing else" in ((await plain.store.ticket("guilty")).error or "")
    assert set(await restart(plain, *innocent)) == {"done"}
    alone = plain.sql("SELECT id, worker FROM attempts WHERE reason = 'alone' AND outcome = 'lost'")
    assert len(alone) == suspects.ENOUGH
    for attempt, worker in alone:  # nothing else of that engine was lost with it, or ran on after it began
        beside = "SELECT count(*) FROM attempts WHERE worker = ? AND id <> ? AND (outcome = 'lost' OR id > ?)"
        assert plain.sql(beside, worker, attempt, attempt) == [(0,)]
    await proved(plain)


async def test_a_stopped_engine_that_comes_back_can_write_nothing(plain: Bench) -> None:
    """SIGSTOP for longer than its lease, then SIGCONT: it kills its VM itself, and the log tells of the refusal."""
    agent = await plain.agent(WAITS_AT_FIRST)
    plain.insert("t", agent.id)
    async with engine_process(plain) as engine:
        await plain.until_it_prints()
        engine.send_signal(signal.SIGSTOP)
        await plain.store.shift_clock(HOUR_MS)
        async with wiring.dispatcher(plain.settings, plain.store, max_vms=1, grace_seconds=0) as dispatcher:
            task = asyncio.create_task(dispatcher.run())
            assert await ended(plain, "t") == ["done"]
            engine.send_signal(signal.SIGCONT)
            said = await log_until(engine, "lease lost")
            dispatcher.stop()
            await task
        assert said["ticket"] == "t"

        async def gone() -> bool:
            return not plain.live_vms()

        await plain.until(gone)
        engine.send_signal(signal.SIGTERM)
        await log_until(engine, "engine stopped")
    first, second = await plain.attempts()
    assert (first.outcome, second.outcome) == ("lost", "succeeded")
    assert (await plain.store.ticket("t")).outputs == '{"first":false}'
    await proved(plain)
