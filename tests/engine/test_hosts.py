"""An engine on its host: who it says that it is, and what it does when the host is drained."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

from swarm.base.host import host_id
from swarm.store.hosts import Machine
from tests.engine.conftest import Bench, ended, engine_process, log_until, serving

SLEEP = "import time; print('up', flush=True); time.sleep(3600)"
ECHO = "import json; json.dump({}, open('output.json', 'w'))"


async def on_a_host(bench: Bench) -> None:
    machine = Machine(id="one", name="one", machine_id="m", boot_id="b", labels={}, capacity={}, versions={})
    await bench.store.register_host(machine)


async def test_a_drained_host_starts_nothing_until_it_is_undrained(plain: Bench) -> None:
    await on_a_host(plain)
    agent = await plain.agent(ECHO, "quick")
    async with serving(plain) as dispatcher:
        await plain.store.drain_host("one", by="p")

        async def told() -> bool:
            return all(one.info.get("draining") for one in await plain.store.workers())

        await plain.until(told)
        plain.insert("t", agent.id)
        await plain.store.heartbeat("another", host="two", pid=1, info={})  # a commit, which the engine looks at
        assert dispatcher.draining and not dispatcher.running
        assert (await plain.store.ticket("t")).state == "ready"
        await plain.store.undrain_host("one", by="p")
        assert await ended(plain, "t") == ["done"]


async def test_what_runs_goes_back_uncounted_when_the_time_is_over(plain: Bench) -> None:
    await on_a_host(plain)
    agent = await plain.agent(SLEEP, "sleeps")
    plain.insert("t", agent.id, max_attempts=1)
    async with serving(plain) as dispatcher:
        await plain.until_it_prints()
        await plain.store.drain_host("one", by="p", within_seconds=0)

        async def back() -> bool:
            return (await plain.attempts())[0].outcome is not None and not dispatcher.running

        await plain.until(back)
        (attempt,) = await plain.attempts()
        assert attempt.outcome == "interrupted"
        (step,) = await plain.store.steps("t")
        assert (step.status, step.retry_count) == ("ready", 0)


async def swarm(bench: Bench, *argv: str, program: str = "main") -> tuple[int | None, str]:
    """A command, from the outside, as an operator types it."""
    env = os.environ | {"SWARM_STATE_DIR": str(bench.settings.state_dir)}
    line = [sys.executable, "-m", f"swarm.cli.{program}", *argv, "--home", str(bench.settings.home)]
    child = await asyncio.create_subprocess_exec(*line, env=env, stdout=-1, stderr=-2)
    out, _ = await child.communicate()
    return child.returncode, out.decode()


@pytest.mark.slow
async def test_an_agent_waits_for_a_host_with_what_it_requires(plain: Bench) -> None:
    agent = await plain.agent(ECHO, "zoned", requires={"zone": "a"})
    plain.insert("t", agent.id)
    async with engine_process(plain, SWARM_LABELS='{"zone": "b"}'):

        async def marked() -> bool:
            return bool(await plain.store.elsewhere("t"))

        await plain.until(marked)
        _, shown = await swarm(plain, "ticket", "show", "t")
        assert "it waits for a host with zone=a (none is known)" in shown
        _, said = await swarm(plain, "status", program="engine")
        assert "with zone=a (none is known)" in said
    async with engine_process(plain, SWARM_LABELS='{"zone": "a"}'):
        assert await ended(plain, "t") == ["done"]


@pytest.mark.slow
async def test_an_engine_registers_its_host_and_drains_by_command(plain: Bench) -> None:
    """`swarm host drain --now --wait` from the outside, as an operator does it."""
    agent = await plain.agent(SLEEP, "sleeps")
    plain.insert("t", agent.id)
    async with engine_process(plain) as process:
        await log_until(process, "ticket started")
        (host,) = await plain.store.hosts()
        assert host.id == host_id(plain.settings.state_dir) and host.capacity["slots"] == 2
        assert host.labels["kvm"] is False, "plain processes, whatever devices this machine has"
        assert {one.host for one in await plain.store.workers()} == {host.name}
        code, said = await swarm(plain, "host", "drain", host.name, "--wait", "--timeout", "0.1")
        assert code == 1 and "still runs" in said
        code, said = await swarm(plain, "host", "drain", host.name, "--now", "--wait", "--timeout", "60")
        assert code == 0 and "is drained: nothing runs there" in said, said
        assert (await plain.store.ticket("t")).state == "in_progress"  # its step waits for another host
        assert (await plain.store.steps("t"))[0].status == "ready"
        await plain.store.undrain_host(host.name, by="p")
        await log_until(process, "ticket started")


async def test_an_engine_of_an_older_version_says_why_it_starts_nothing(plain: Bench) -> None:
    agent = await plain.agent(ECHO, "quick")
    async with serving(plain) as dispatcher:

        async def told() -> bool:
            return any("brought to v9" in str(one.info.get("waits_for")) for one in await plain.store.workers())

        plain.sql("UPDATE alembic_version SET version_num = 'v9'")
        plain.insert("t", agent.id)
        await plain.until(told)
        assert not dispatcher.running and (await plain.store.ticket("t")).state == "ready"
        plain.sql("UPDATE alembic_version SET version_num = ?", plain.store.head())
        assert await ended(plain, "t") == ["done"]


@pytest.mark.slow
async def test_settings_that_differ_between_engines_are_told(plain: Bench) -> None:
    async with engine_process(plain, SWARM_BUDGET_USD_PER_DAY="5") as process:
        await log_until(process, "engine serves")
        assert "settings differ" not in (await swarm(plain, "status", program="engine"))[1]
        async with engine_process(plain) as other:
            await log_until(other, "engine serves")
            _, said = await swarm(plain, "status", program="engine")
            assert "settings differ" in said and "budget_usd_per_day: 5.0 on" in said and "None on" in said, said
