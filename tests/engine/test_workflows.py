"""Workflows by the real engine, on plain processes: what ships, what the documents show, crashes, several engines."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from swarm.admin import packages
from swarm.app import wiring
from swarm.base import crash_points
from swarm.engine.dispatch import Dispatcher
from swarm.engine.run_once import run_ticket
from swarm.model import Ticket
from swarm.store.store import Store
from tests.conftest import PATIENCE_SECONDS
from tests.engine.conftest import Bench, ended, engine_process, log_until, proved, serving
from tests.engine.test_crash import restart
from tests.workflow.test_docs import INPUTS, OUTPUTS, blocks

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

# Each says 'up' and then does as its inputs say; "wait" is for a file that a test makes.
AGENT = """
import json, os, time
given = json.load(open('input.json'))
inputs = given['inputs']
with open(inputs['log'], 'a') as log:
    log.write(given['step']['id'] + '\\n')
print('up', flush=True)
while inputs.get('wait') and not os.path.exists(inputs['wait']): time.sleep(0.01)
json.dump({'n': inputs.get('n', 0)}, open('output.json', 'w'))
"""


async def add(bench: Bench, text: str, id: str = "t", **columns: Any) -> None:
    """Register a workflow and make a ticket of it."""
    row = await packages.add_workflow(bench.store, text.encode(), name="workflow.yaml")
    await begin(bench, row.id, id, **columns)


async def begin(bench: Bench, workflow_id: str, id: str = "t", **columns: Any) -> None:
    await bench.store.add_ticket(
        Ticket(id=id, title=id, state="ready", execution_mode="workflow", workflow_id=workflow_id, **columns)
    )


def flow(steps: str, name: str = "flow") -> str:
    return f"name: {name}\nversion: 1.0.0\nsteps:\n{steps}"


async def stop(*engines: asyncio.subprocess.Process) -> None:
    for engine in engines:
        engine.terminate()
        await log_until(engine, "engine stopped")
        await engine.wait()


async def statuses(bench: Bench, id: str = "t") -> Mapping[str, str]:
    return {step.step_id: step.status for step in await bench.store.steps(id)}


async def test_what_ships_and_what_the_documents_show(plain: Bench) -> None:
    ids: list[str] = []
    for row in await plain.store.workflows():
        ids.append(row.name)
        await begin(plain, row.id, row.name)
    assert sorted(ids) == ["echo-chain", "fan-out-demo", "fix-until-green"]
    for text in blocks("workflows.md", "yaml"):
        if "\n    from: " in text:
            continue  # needs VMs: test_kept_vms.py
        name = text.split()[1]
        ids.append(name)
        await add(plain, text, name, inputs=json.dumps(INPUTS.get(name, {})))
    async with serving(plain, max_vms=4):

        async def asked() -> bool:
            return (await plain.store.ticket("publish")).state == "waiting"

        await plain.until(asked)
        await plain.store.answer("publish", approved=True, by="ann")
        states = await ended(plain, *ids, timeout_seconds=120)
    assert dict(zip(ids, states, strict=True)) == dict.fromkeys(ids, "done")
    wanted = {
        "echo-chain": {"heard": "hello", "story": "the first step said: Echo of ticket echo-chain"},
        "fan-out-demo": {"counts": [5, 2, 5, 8], "total": 20},
        "fix-until-green": {"file": "answer = 42\n"},
        **{name: outputs for name, outputs in OUTPUTS.items() if name in ids},
    }
    for name, outputs in wanted.items():
        assert json.loads((await plain.store.ticket(name)).outputs or "") == outputs, name
    assert plain.live_vms() == []
    await proved(plain)


async def test_run_ticket_runs_steps_together(plain: Bench) -> None:
    """Each of the two waits for the other's file: one after the other they would never end."""
    await plain.agent(
        "import json, time, os\ni = json.load(open('input.json'))['inputs']\nopen(i['mine'], 'w').close()\n"
        "while not os.path.exists(i['other']): time.sleep(0.01)\njson.dump({}, open('output.json', 'w'))"
    )
    one, two = plain.dir / "one", plain.dir / "two"
    await add(
        plain,
        flow(
            f"  - {{id: a, agent: agent, inputs: {{mine: '{one}', other: '{two}'}}}}\n"
            f"  - {{id: b, agent: agent, inputs: {{mine: '{two}', other: '{one}'}}}}\n"
            f"  - {{id: c, agent: echo@1, needs: [a, b]}}\n"
        ),
    )
    ticket = await run_ticket(plain.store, plain.worker, "t", max_vms=2, timeout_seconds=60)
    assert ticket.state == "done"
    await proved(plain)


CRASHING = """
  - {{id: a, agent: agent, inputs: {{log: '{log}', n: 1}}}}
  - {{id: b, agent: agent, needs: a, inputs: {{log: '{log}', n: '${{steps.a.outputs.n + 1}}'}}}}
  - {{id: c, agent: agent, needs: a, inputs: {{log: '{log}', n: '${{[1, 2].map(x, x + steps.a.outputs.n)[0]}}'}}}}
  - {{id: d, agent: agent, needs: [b, c], inputs: {{log: '{log}', n: '${{steps.b.outputs.n + steps.c.outputs.n}}'}}}}
"""
# Three commits are certain: b and c may end in one transaction.
BOUNDARIES = ["claim:committed@2", "finish:uncommitted@2", *(f"finish:committed@{count}" for count in (1, 2, 3))]


@pytest.mark.parametrize("point", [*BOUNDARIES, *crash_points.OF_WORKFLOWS])
async def test_a_crash_at_a_boundary(plain: Bench, point: str) -> None:
    """A diamond, one of whose expressions is evaluated outside: whatever was written is not done again."""
    await plain.agent(AGENT)
    log = plain.dir / "log"
    await add(plain, flow(CRASHING.format(log=log)))
    async with engine_process(plain, SWARM_FAULT=point) as engine, asyncio.timeout(PATIENCE_SECONDS):
        _, said = await engine.communicate()
        assert engine.returncode == -signal.SIGKILL, said.decode()
    before = {step.step_id for step in await plain.store.steps("t") if step.status == "completed"}
    ran = log.read_text().split() if log.exists() else []
    assert await restart(plain, "t") == ["done"]
    ticket = await plain.store.ticket("t")
    assert json.loads(ticket.outputs or "") == {"n": 4}
    again = log.read_text().split()[len(ran) :]
    assert not before & set(again), "what had been completed ran again"
    assert set(ran) | set(again) == {"a", "b", "c", "d"}
    for step in await plain.store.steps("t"):
        outcomes = [a.outcome for a in await plain.attempts() if a.step_execution_id == step.id]
        assert outcomes in (["succeeded"], ["lost", "succeeded"]), (step.step_id, outcomes)
    report = await proved(plain)
    assert (report.done, report.finished_twice) == (1, [])


POINTS_AHEAD = [f"{point}@{count}" for point in crash_points.OF_ITEMS for count in (1, 3)]


@pytest.mark.parametrize("point", [*POINTS_AHEAD, *crash_points.OF_WORKFLOWS])
async def test_a_crash_while_rows_are_written_ahead(plain: Bench, point: str) -> None:
    """Of 250 items, whose rows take three transactions, three run."""
    await plain.agent(AGENT)
    log = plain.dir / "log"
    each = (
        f"  - {{id: e, agent: agent, needs: a, for_each: {list(range(250))}, when: '${{item % 100 == 0}}', "
        f"inputs: {{log: '{log}', n: '${{item}}'}}}}\n"
    )
    await add(plain, flow(f"  - {{id: a, agent: agent, inputs: {{log: '{log}', n: 1}}}}\n{each}"))
    async with engine_process(plain, SWARM_FAULT=point) as engine, asyncio.timeout(PATIENCE_SECONDS):
        _, said = await engine.communicate()
        assert engine.returncode == -signal.SIGKILL, said.decode()
    assert await restart(plain, "t") == ["done"]
    assert sorted(log.read_text().split()) == ["a", "e[0]", "e[100]", "e[200]"]
    found = await statuses(plain)
    assert [found[f"e[{n}]"] for n in range(250)] == ["skipped" if n % 100 else "completed" for n in range(250)]
    await proved(plain)


class StoppingStore(Store):
    """Calls ``stop`` when an outcome is queued to be written, after the engine's own callback."""

    stop: Callable[[], None] = staticmethod(lambda: None)

    async def finish(self, *values: Any, queued: Callable[[], None] = lambda: None, **options: Any) -> None:
        def queued_and_stopped() -> None:
            queued()
            self.stop()

        await super().finish(*values, queued=queued_and_stopped, **options)


async def test_stopped_between_an_end_and_the_claim_of_what_follows(plain: Bench) -> None:
    """The claim was requested together with the end: its attempts are put back, and are not counted."""
    await plain.agent(AGENT)
    steps = "  - {{id: {id}, agent: agent, needs: {needs}, inputs: {{log: '{log}'}}}}\n"
    links = (("a", "[]"), ("b", "a"), ("c", "b"))
    await add(plain, flow("".join(steps.format(id=id_, needs=needs, log=plain.dir / "log") for id_, needs in links)))
    async with StoppingStore.open(plain.settings.database) as store, wiring.worker(plain.settings, store) as worker:
        assert isinstance(store, StoppingStore)
        async with serving(replace(plain, store=store, worker=worker), grace_seconds=30) as dispatcher:

            def stop() -> None:
                dispatcher.stop()
                dispatcher.stop()  # the second time ends what runs

            store.stop = stop
            await plain.until(lambda: _stopped(dispatcher))
    assert {a.outcome for a in await plain.attempts()} == {"succeeded", "interrupted"}
    assert await statuses(plain) == {"a": "completed", "b": "ready", "c": "pending"}
    async with serving(plain):
        assert await ended(plain, "t") == ["done"]
    assert (plain.dir / "log").read_text().split() == ["a", "b", "c"]
    assert [step.retry_count for step in await plain.store.steps("t")] == [0, 0, 0]
    await proved(plain)


async def _stopped(dispatcher: Dispatcher) -> bool:
    return dispatcher.stopping


async def test_a_chain_of_150_and_a_fan_out_of_50(plain: Bench) -> None:
    """Each step a process of its own, which uses what the one before it left."""
    await plain.agent(AGENT)
    log = plain.dir / "log"
    first = f"  - {{id: s0, agent: agent, inputs: {{log: '{log}', n: 0}}}}\n"
    link = "  - {{id: s{n}, agent: agent, needs: s{m}, inputs: {{log: '{log}', n: '${{steps.s{m}.outputs.n + 1}}'}}}}\n"
    await add(plain, flow(first + "".join(link.format(n=n, m=n - 1, log=log) for n in range(1, 150)), "chain"), "chain")
    each = f"  - {{id: s, agent: agent, for_each: {list(range(50))}, inputs: {{log: '{log}2', n: '${{item}}'}}}}\n"
    last = "  - {id: last, agent: echo@1, needs: s, inputs: {all: '${steps.s.outputs.map(o, o.n)}'}}\n"
    async with serving(plain, max_vms=8):
        assert await ended(plain, "chain", timeout_seconds=300) == ["done"]
        await add(plain, flow(each + last, "fan"), "fan")
        assert await ended(plain, "fan", timeout_seconds=120) == ["done"]
    assert json.loads((await plain.store.ticket("chain")).outputs or "") == {"n": 149}
    assert json.loads((await plain.store.ticket("fan")).outputs or "")["echo"] == {"all": list(range(50))}
    assert log.read_text().split() == [f"s{n}" for n in range(150)]
    assert sorted((plain.dir / "log2").read_text().split()) == sorted(f"s[{n}]" for n in range(50))
    await proved(plain)


async def test_two_engines_share_a_fan_out(plain: Bench) -> None:
    await plain.agent(AGENT)
    go = plain.dir / "go"
    await add(
        plain,
        flow(
            f"  - {{id: s, agent: agent, for_each: [1, 2, 3, 4], inputs: {{log: '{plain.dir}/log', wait: '{go}'}}}}\n"
            "  - {id: last, agent: echo@1, needs: s}\n"
        ),
    )
    async with engine_process(plain) as one, engine_process(plain) as other:

        async def all_four_run() -> bool:
            return len([a for a in await plain.attempts() if a.outcome is None]) == 4

        await plain.until(all_four_run)  # two engines, two VMs each
        go.touch()
        assert await ended(plain, "t") == ["done"]
        await stop(one, other)
    assert len({attempt.worker for attempt in await plain.attempts()}) == 2
    assert len(await plain.attempts()) == 5
    await proved(plain)


async def test_an_approval_over_a_restart_of_the_engine(plain: Bench) -> None:
    await add(
        plain,
        flow(
            "  - {id: draft, agent: echo@1}\n"
            "  - {id: check, needs: draft, approval: 'Publish ${steps.draft.outputs.title}?'}\n"
            "  - {id: publish, agent: echo@1, needs: check, inputs: {by: '${steps.check.outputs.by}'}}\n"
        ),
    )

    async def waits() -> bool:
        return (await plain.store.ticket("t")).state == "waiting"

    async with engine_process(plain) as engine:
        await plain.until(waits)
        engine.kill()
        await engine.wait()
    assert await waits()
    async with engine_process(plain) as engine:
        await log_until(engine, "engine serves")
        await plain.store.answer("t", approved=True, by="ann", why="read it")
        assert await ended(plain, "t") == ["done"]
        await stop(engine)
    assert json.loads((await plain.store.ticket("t")).outputs or "")["echo"] == {"by": "ann"}
    await proved(plain)


@pytest.mark.parametrize("how", ["cancel", "delete"])
async def test_cancelled_half_way_through_a_fan_out(plain: Bench, how: str) -> None:
    await plain.agent(AGENT)
    log, never = plain.dir / "log", plain.dir / "never"
    await add(
        plain,
        flow(
            "  - {id: s, agent: agent, for_each: [0, 1, 2, 3, 4, 5], max_parallel: 3, "
            f"inputs: {{log: '{log}', wait: '${{item > 2 ? \"{never}\" : \"\"}}'}}}}\n"
        ),
    )
    async with serving(plain, max_vms=4):

        async def half() -> bool:
            return log.exists() and len(log.read_text().split()) == 6

        await plain.until(half)
        assert len(plain.live_vms()) == 3
        if how == "cancel":
            await plain.store.cancel("t", "ann")
        else:
            plain.sql("DELETE FROM tickets WHERE id = 't'")

        async def gone() -> bool:
            return plain.live_vms() == []

        await plain.until(gone)
    if how == "cancel":
        found = list((await statuses(plain)).values())
        assert (found.count("completed"), found.count("cancelled")) == (3, 4)
    else:
        assert plain.sql("SELECT count(*) FROM step_executions") == [(0,)]
    await proved(plain)


@pytest.mark.needs("qemu")
async def test_a_fan_out_in_real_vms(bench: Bench) -> None:
    """Two VMs at once, then one that gathers: each step in a microVM of its own."""
    await bench.agent("import json\njson.dump(json.load(open('input.json'))['inputs'], open('output.json', 'w'))")
    await add(
        bench,
        flow(
            "  - {id: s, agent: agent, for_each: [1, 2], inputs: {n: '${item}'}}\n"
            "  - {id: sum, agent: agent, needs: s, inputs: {all: '${steps.s.outputs.map(o, o.n)}'}}\n"
        ),
    )
    ticket = await run_ticket(bench.store, bench.worker, "t", max_vms=2)
    assert (ticket.state, ticket.outputs) == ("done", '{"all":[1,2]}')
    first, second, last = await bench.attempts()
    assert first.ended_at and second.started_at and second.started_at < first.ended_at
    assert len({first.vm_id, second.vm_id}) == 2 and last.outcome == "succeeded"
    assert bench.live_vms() == []
    await proved(bench)
