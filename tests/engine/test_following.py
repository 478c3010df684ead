"""What a user sees of a ticket that waits, runs and ends: on plain processes, with a real engine or with none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from swarm.store.registry.workers import is_alive
from tests.engine.conftest import Bench, ended, engine_process, log_until
from tests.engine.test_service import command

pytestmark = pytest.mark.slow  # starts programs

UNSERVED = "no engine serves "
Swarm = Callable[..., Coroutine[Any, Any, tuple[int, str, str]]]
ASKS = """
name: asks
version: 1.0.0
steps:
  - {id: check, approval: "Publish?\\r\\nReally?"}
  - {id: say, agent: shell, needs: check, inputs: {commands: "printf one; sleep 0; echo two >&2"}}
  - {id: too, agent: shell, needs: check, inputs: {commands: "echo three"}}
"""


@pytest.fixture
def swarm(plain: Bench) -> Swarm:
    return lambda *argv: command(plain, *argv)


async def test_without_an_engine_each_command_says_how_to_start_one(plain: Bench, swarm: Swarm) -> None:
    (plain.dir / "asks.yaml").write_text(ASKS)
    await swarm("swarm", "workflow", "add", str(plain.dir / "asks.yaml"))
    _, _, said = await swarm("swarm", "ticket", "add", "t", "--workflow", "asks", "--id", "it's")
    start, alone = "`swarm-engine start`", "`swarm-engine run-ticket 'it'\"'\"'s' --wait`"
    assert said.count("\n") == 1 and UNSERVED in said and start in said and alone in said
    assert UNSERVED in (await swarm("swarm", "ticket", "show", "it's"))[2]
    assert UNSERVED not in (await swarm("swarm", "ticket", "show", "it's", "--json"))[2]
    for seconds in (3, 40):  # a busy machine takes longer
        code, _, said = await swarm("swarm-engine", "run-ticket", "it's", "--wait", "--timeout", str(seconds))
        if "waits for a person" in said:
            break
    assert code == 1 and "waits for a person" in said
    _, shown, said = await swarm("swarm", "ticket", "show", "it's")
    assert UNSERVED not in said, "it waits for a person, not for an engine"
    assert "check asks  Publish?\n            Really?\n" in shown and "\N{REPLACEMENT CHARACTER}" not in shown
    assert UNSERVED in (await swarm("swarm", "ticket", "approve", "it's"))[2]
    code, _, said = await swarm("swarm-engine", "run-ticket", "it's", "--wait")
    assert code == 0 and {"say | one", "say | two", "too | three"} <= {*said.splitlines()}
    _, said, _ = await swarm("swarm", "ticket", "logs", "it's")
    assert {"say | one", "say | two", "too | three"} <= {*said.splitlines()}
    plain.sql("UPDATE tickets SET state = 'failed'")
    assert UNSERVED in (await swarm("swarm", "ticket", "retry", "it's"))[2]
    plain.sql("UPDATE tickets SET state = 'blocked'")
    _, _, said = await swarm("swarm", "ticket", "show", "it's")
    assert start in said and "run-ticket" not in said, "a blocked ticket can't be run alone"


async def test_with_an_engine_none_says_anything(plain: Bench, swarm: Swarm) -> None:
    async with engine_process(plain) as engine:
        await log_until(engine, "engine serves")
        assert await swarm("swarm", "ticket", "add", "t", "--agent", "echo", "--id", "t") == (0, "t\n", "")
        assert await ended(plain, "t") == ["done"]
        engine.kill()
        await engine.wait()
    (row,) = await plain.store.workers()
    assert not is_alive(row), "its heartbeat is young, but its process has ended"
    _, _, said = await swarm("swarm", "ticket", "add", "t", "--agent", "echo", "--id", "u")
    assert UNSERVED in said


async def test_a_command_that_runs_one_ticket_serves_it(plain: Bench, swarm: Swarm) -> None:
    plain.insert("t", (await plain.agent("import time\nprint('on', flush=True)\ntime.sleep(600)")).id)
    running = asyncio.create_task(swarm("swarm-engine", "run-ticket", "t", "--wait"))
    await plain.until_it_prints()
    assert (await swarm("swarm", "ticket", "show", "t"))[2] == ""
    await plain.store.cancel("t", "a test")
    assert (await running)[0] == 1


@pytest.mark.parametrize(
    ("code", "state", "status"), [("pass", "failed", 1), ("open('output.json', 'w').write('{}')", "done", 0)]
)
async def test_logs_follow_to_the_end(plain: Bench, swarm: Swarm, code: str, state: str, status: int) -> None:
    plain.insert("t", (await plain.agent(f"print('one', end='', flush=True)\n{code}")).id)
    following = asyncio.create_task(swarm("swarm", "ticket", "logs", "-f", "t"))
    ran = await swarm("swarm-engine", "run-ticket", "t", "--wait")
    assert ran[0] == status and ran[2] == "one\n" and f" {state}\n" in ran[1], ran
    code_, out, said = await following
    assert (code_, out) == (status, "one\n") and f"ticket t is {state}" in said
    assert (await swarm("swarm", "ticket", "logs", "t"))[0] == 0, "it only prints"
    code_, out, said = await swarm("swarm", "ticket", "logs", "-f", "t", "--json")
    assert (code_, said) == (status, "") and all(json.loads(line) for line in out.splitlines())
