"""VMs that outlive their attempts, in real guests: forks of a prepared one race; a failed one can be looked into."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from swarm import config
from swarm.app import wiring
from swarm.base import process
from swarm.engine.run_once import run_ticket
from swarm.store.sandboxes.snapshots import SnapshotFilter
from tests.engine.conftest import Bench, ended, engine_process, proved, serving
from tests.engine.test_crash import restart
from tests.engine.test_workflows import add, flow, statuses

pytestmark = [pytest.mark.slow, pytest.mark.needs("qemu")]

# Prepares a directory, and leaves a program running that answers with what it holds in its memory alone.
SETUP = """
import json, os, subprocess
os.makedirs('repo')
os.mkfifo('ask')
answer = 'read secret; while read one < /work/ask; do echo $secret $one > /work/told; done'
child = subprocess.Popen(['/bin/sh', '-c', answer], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
child.stdin.write(b'xyzzy\\n')
child.stdin.close()
json.dump({'pid': child.pid}, open('output.json', 'w'))
"""
# Works in what was prepared. Item 1 succeeds once that program has answered; the others wait until they are killed.
TRY = """
import json, os, socket, time
inputs = json.load(open('input.json'))['inputs']
assert os.path.isdir('repo') and not os.path.exists('output.json')
assert not os.path.exists('/agent/of-setup'), 'the files of the agent before'
os.kill(inputs['pid'], 0)
open('ask', 'w').write('there?\\n')
while not os.path.exists('told') or open('told').read() != 'xyzzy there?\\n': time.sleep(0.02)
print('works', flush=True)
while inputs['n'] != 1: time.sleep(1)
own = {'host': socket.gethostname(), 'machine': open('/etc/machine-id').read(), 'random': os.urandom(8).hex()}
open('repo/fixed', 'w').write(json.dumps(own))
json.dump({**own, 'n': inputs['n']}, open('output.json', 'w'))
"""
SHIP = """
import json, os
json.dump({'fixed': json.load(open('repo/fixed')), 'machine': open('/etc/machine-id').read()}, open('output.json', 'w'))
"""
RACE = """
  - {id: setup, agent: setup}
  - id: try
    agent: try
    from: setup
    for_each: {items: [0, 1], join: first_success}
    inputs: {n: "${item}", pid: "${steps.setup.outputs.pid}"}
  - {id: ship, agent: ship, from: try}
"""


async def agents(bench: Bench) -> None:
    own = bench.dir / "of-setup"
    own.write_text("")
    await bench.agent(SETUP, "setup", files=[own])
    await bench.agent(TRY, "try")
    await bench.agent(SHIP, "ship")


async def snapshots(bench: Bench, *kinds: str) -> list[Any]:
    return (await bench.store.snapshot_page(SnapshotFilter(kinds=kinds))).snapshots


async def swarm(bench: Bench, *argv: str, status: int = 0) -> str:
    """What the command prints."""
    own = bench.settings
    places = {"HOME": own.home, "STATE_DIR": own.state_dir, "IMAGES_DIR": own.images, "TEMPLATES_DIR": own.templates}
    env = os.environ | {"SWARM_DRIVER": "qemu"} | {f"SWARM_{name}": str(place) for name, place in places.items()}
    program = str(Path(sys.executable).with_name("swarm"))
    child = await asyncio.create_subprocess_exec(
        program, *argv, env=env, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await child.communicate()
    assert child.returncode == status, said.decode()
    return said.decode()


async def test_forks_of_a_prepared_vm_race_and_the_next_step_goes_on_in_the_winners(bench: Bench) -> None:
    await agents(bench)
    await add(bench, flow(RACE))
    async with serving(bench, max_vms=2):
        assert await ended(bench, "t") == ["done"], (await bench.store.ticket("t")).error
    outputs = json.loads((await bench.store.ticket("t")).outputs or "")
    rows = {step.step_id: step for step in await bench.store.steps("t")}
    winner = json.loads(rows["try[1]"].outputs or "")
    assert rows["try[0]"].status == "cancelled"
    assert outputs["fixed"] == {key: winner[key] for key in ("host", "machine", "random")}
    assert outputs["machine"] != winner["machine"], "each fork has an identity of its own"
    assert bench.live_vms() == []


async def test_an_engine_that_dies_in_the_middle_begins_again_from_the_snapshot(bench: Bench) -> None:
    await agents(bench)
    steps = RACE.partition("  - {id: ship")[0].replace("items: [0, 1]", "items: [0]")
    await add(bench, flow(steps))
    async with engine_process(bench, driver="qemu") as engine:

        async def works() -> bool:
            return any(
                "works" in str(e.data.get("text")) for e in await bench.store.events("t") if e.step_id == "try[0]"
            )

        await bench.until(works)
        [left] = await snapshots(bench, "step")
        engine.kill()
        await engine.wait()
    assert (await statuses(bench))["setup"] == "completed"
    bench.sql("UPDATE step_executions SET inputs = replace(inputs, '\"n\":0', '\"n\":1') WHERE step_id = 'try[0]'")
    assert await restart(bench, "t") == ["done"]
    tries = [(one.step_id, one.outcome) for one in await bench.attempts()]
    assert tries == [("setup", "succeeded"), ("try[0]", "lost"), ("try[0]", "succeeded")]
    assert left.id in {one.id for one in await bench.store.expired_snapshots(left.host)}, (
        "they go when the run has ended"
    )
    assert (await proved(bench)).lost == []


async def test_the_vm_of_a_failed_attempt_is_kept_for_a_time(bench: Bench) -> None:
    code = "open('/work/clue', 'w').write('here'); raise SystemExit(3)"
    agent = await bench.agent(code, keep_vm="failure", keep_vm_seconds=3600)
    bench.insert("t", agent.id)
    bench.insert("never", agent.id, keep_vm="never")
    for id in ("t", "never"):
        assert (await run_ticket(bench.store, bench.worker, id)).state == "failed"
    [attempt] = await bench.attempts()
    assert (attempt.outcome, attempt.exit_code) == ("failed", 3)
    [event] = [e for e in await bench.store.events("t") if e.kind == "vm_kept"]
    [kept] = await snapshots(bench, "attempt")
    assert event.data == {"snapshot": kept.id, "bytes": kept.size_bytes, "seconds": 3600.0, "host": kept.host}
    assert (kept.ticket_id, kept.step_id, kept.attempt_id) == ("t", "main", attempt.id) and kept.expires_at
    place = bench.settings.snapshots / kept.id
    assert {stat.S_IMODE(file.stat().st_mode) for file in place.iterdir()} == {0o600}
    said = await swarm(bench, "ticket", "shell", "t", "--", "sh", "-c", "cat clue; ls /sys/class/net; exit 7", status=7)
    assert "hereeth0\nlo\n" in said and "its network is off" in said
    assert "main.py" in await swarm(bench, "ticket", "get", "t", "--vm", "/agent/main.py", "--to", str(bench.dir))
    assert (bench.dir / "main.py").read_text() == code
    links = await process.run(["ip", "-o", "link"])
    assert b": br0:" not in links.stdout or b": swarm" in links.stdout, "the bridge, and no VM that uses it"
    assert "no VM of the ticket never was kept" in await swarm(bench, "ticket", "shell", "never", status=125)
    assert bench.live_vms() == [] and [one.id for one in await snapshots(bench)] == [kept.id]
    await bench.store.shift_clock(3_600_000)
    assert [one.id for one in await bench.store.expired_snapshots(kept.host)] == [kept.id]


async def test_a_vm_that_can_not_be_kept_is_told_and_changes_nothing_else(bench: Bench) -> None:
    own = config.load(**{**bench.settings.model_dump(), "snapshots_gb": 0.001})
    agent = await bench.agent("import json; json.dump({'n': 1}, open('output.json', 'w'))", keep_vm="always")
    bench.insert("t", agent.id)
    await add(bench, flow("  - {id: a, agent: agent}\n  - {id: b, agent: agent, from: a}\n"), "forks")
    async with wiring.worker(own, bench.store) as worker:
        ticket = await run_ticket(bench.store, worker, "t")
        forks = await run_ticket(bench.store, worker, "forks")
    assert "its VM can't be kept for the steps that start from it: the snapshots in" in (forks.error or "")
    assert [one.outcome for one in await bench.attempts("forks")] == ["failed"], "not again and again"
    assert (ticket.state, ticket.outputs) == ("done", '{"n":1}')
    [event] = [e for e in await bench.store.events("t") if e.kind == "vm_kept"]
    assert "SWARM_SNAPSHOTS_GB allows 0.001" in str(event.data["error"])
    assert await snapshots(bench) == [] and not list(own.snapshots.iterdir())


async def test_a_step_whose_source_is_gone_says_how_to_go_on(bench: Bench) -> None:
    await agents(bench)
    steps = "  - {id: setup, agent: setup}\n  - {id: gate, needs: setup, approval: true}\n"
    await add(bench, flow(f"{steps}  - {{id: ship, agent: ship, needs: gate, from: setup}}\n"))
    async with serving(bench, max_vms=1):

        async def asks() -> bool:
            return (await bench.store.ticket("t")).state == "waiting"

        await bench.until(asks)
        [left] = await snapshots(bench, "step")
        await wiring.snapshots(bench.settings).remove(left.id)
        await bench.store.answer("t", approved=True, by="ann")
        assert await ended(bench, "t") == ["failed"]
    said = (await bench.store.ticket("t")).error or ""
    assert "the VM that the step starts from is not there any more" in said and "`swarm ticket retry`" in said
