"""Every way an agent can end, in real VMs: only one of them is `done`, and each error names its cause."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from swarm.base import process
from swarm.base.clock import PHASES
from swarm.engine.run_once import run_ticket
from tests.conftest import PATIENCE_SECONDS
from tests.engine.conftest import Bench

pytestmark = pytest.mark.needs("qemu")

WRITE = "import json, os, sys, time\ndef out(v): json.dump(v, open('output.json', 'w'))\n"


async def test_done_with_its_outputs_and_its_clock(bench: Bench) -> None:
    ticket = await bench.run(
        WRITE + "out({'sum': sum(json.load(open('input.json'))['inputs']['n'])})", inputs={"n": [1, 2]}
    )
    assert (ticket.state, ticket.outputs, ticket.error) == ("done", '{"sum":3}', None)
    (attempt,) = await bench.attempts()
    assert list(attempt.timings) == [*PHASES, "total"]
    assert attempt.vm_id is not None and attempt.vm_id >= bench.settings.first_engine_slot
    assert abs(sum(v for k, v in attempt.timings.items() if k != "total") - attempt.timings["total"]) < 1
    assert bench.live_vms() == []


@pytest.mark.parametrize(
    ("code", "reason", "says"),
    [
        ("print('oh no'); sys.exit(3)", "agent_failed", ["ended with status 3", "oh no"]),
        ("out({}); raise KeyError('lost')", "agent_failed", ["ended with status 1", "KeyError: 'lost'"]),
        ("out({}); os.kill(os.getpid(), 9)", "agent_failed", ["killed by signal 9 (SIGKILL)"]),
        ("def f(): __import__('ctypes').string_at(0)\nf()", "agent_failed", ["signal 11 (SIGSEGV)", "main.py", "in f"]),
        ("sys.exit(os.system('kill -SEGV $$') and 139)", "agent_failed", ["status 139", "signal 11 (SIGSEGV)"]),
        ("print('fine')", "no_output", ["left no output.json"]),
        ("open('output.json','w').write('{oops')", "output_invalid", ["not JSON"]),
        ("open('output.json','w').write('NaN')", "output_invalid", ["NaN is not JSON"]),
        ("open('output.json','wb').write(b'\\xff\\xfe')", "output_invalid", ["not UTF-8"]),
        ("open('output.json','w').write('['*200000)", "output_invalid", ["nested too deeply"]),
        ("open('output.json','w').write('['*300 + ']'*300)", "output_invalid", ["nested too deeply"]),
        ("os.symlink('/etc/passwd', 'output.json')", "output_invalid", ["link"]),
        ("os.mkfifo('output.json')", "output_invalid", ["not a regular file"]),
        ("out('x' * (17 << 20))", "output_too_large", ["the limit is 16777216"]),
    ],
    ids=lambda v: v if isinstance(v, str) and v.isidentifier() else None,
)  # fmt: skip
async def test_failed_with_the_reason(bench: Bench, code: str, reason: str, says: list[str]) -> None:
    ticket = await bench.run(WRITE + code)
    (attempt,) = await bench.attempts()
    assert (ticket.state, ticket.outputs, attempt.reason) == ("failed", None, reason)
    assert ticket.error
    for words in says:
        assert words in ticket.error
    assert bench.live_vms() == []


async def test_the_word_error_in_an_output_is_not_a_failure(bench: Bench) -> None:
    ticket = await bench.run(WRITE + "print('error: error'); out({'error': 'none'})")
    assert ticket.state == "done"


async def test_timeout(bench: Bench) -> None:
    code = "def wait():\n    time.sleep(600)\nprint('working', flush=True); wait()"
    for number, seconds in enumerate((1.0, 10.0, 60.0)):  # a busy machine may be slow to start it
        bench.insert(id := f"t{number}", (await bench.agent(WRITE + code, id, timeout_seconds=seconds)).id)
        ticket = await run_ticket(bench.store, bench.worker, id)
        if "working" in (ticket.error or ""):
            break
    (attempt,) = await bench.attempts(id)
    assert (ticket.state, attempt.reason) == ("failed", "timeout")
    assert ticket.error and "working" in ticket.error
    assert 'main.py", line 4 in wait' in ticket.error  # where it hung


async def test_silence_is_a_timeout_of_its_own(bench: Bench) -> None:
    ticket = await bench.run(WRITE + "time.sleep(600)", timeout_seconds=600.0, idle_timeout_seconds=1.0)
    (attempt,) = await bench.attempts()
    assert (ticket.state, attempt.reason) == ("failed", "timeout")


async def test_out_of_memory_in_the_guest(bench: Bench) -> None:
    ticket = await bench.run(WRITE + "b = []\nwhile True: b.append(bytearray(8 << 20))")
    (attempt,) = await bench.attempts()
    assert (ticket.state, attempt.reason) == ("failed", "out_of_memory")
    assert ticket.error and "memory_mb" in ticket.error


async def test_a_full_work_disk_hurts_nobody_else(bench: Bench) -> None:
    code = """
try:
    with open('fill', 'wb') as f:
        while True: f.write(b'x' * (1 << 20))
except OSError as e: full = e.errno
os.unlink('fill')
out({'errno': full, 'gone': True})"""
    ticket = await bench.run(WRITE + code, disk_mb=32, timeout_seconds=120.0)
    assert (ticket.state, ticket.outputs) == ("done", '{"errno":28,"gone":true}')


async def test_the_agent_is_nobody_in_its_vm(bench: Bench) -> None:
    code = """
def denied(f):
    try: f(); return False
    except OSError: return True
import socket
out({'uid': os.getuid(), 'cwd': os.getcwd(), 'env': sorted(os.environ),
     'shadow': denied(lambda: open('/etc/shadow')), 'agent': denied(lambda: open('/agent/x', 'w')),
     'agentd': denied(lambda: os.kill(1, 9)), 'init': denied(lambda: os.listdir('/root')),
     'host': denied(lambda: socket.create_connection(('10.0.0.1', 22), 1))})"""
    ticket = await bench.run(WRITE + code)
    assert ticket.outputs, ticket.error
    seen = json.loads(ticket.outputs)
    assert seen["uid"] == 1000
    assert seen["cwd"] == "/work"
    assert all(seen[k] for k in ("shadow", "agent", "agentd", "init", "host")), seen
    assert not [name for name in seen["env"] if "TOKEN" in name or "KEY" in name]


async def test_a_person_can_log_in_while_it_runs(bench: Bench) -> None:
    code = "print('up', flush=True)\nwhile not os.path.exists('/work/go'): time.sleep(0.05)\nout({})"
    bench.insert("t", (await bench.agent(WRITE + code)).id)
    running = asyncio.create_task(run_ticket(bench.store, bench.worker, "t"))
    await bench.until_it_prints()
    [record] = bench.vms()
    env = {"SWARM_HOME": str(bench.settings.home), "SWARM_STATE_DIR": str(bench.settings.state_dir)}
    ssh = [str(Path(sys.executable).with_name("swarm")), "vm", "ssh", str(record.n), "--", "touch", "/work/go"]
    await process.run(ssh, env=env)
    assert (await running).state == "done"


async def _while_running(bench: Bench, code: str, act: object) -> str:
    """Run an agent; once it has printed, do something to its VM; the ticket's error."""
    agent = await bench.agent(WRITE + code)
    bench.insert("t", agent.id)
    running = asyncio.create_task(run_ticket(bench.store, bench.worker, "t"))
    await bench.until_it_prints()
    assert callable(act)
    act()
    ticket = await running
    assert ticket.state == "failed"
    assert ticket.error
    assert bench.live_vms() == []
    return ticket.error


async def test_the_vmm_is_killed_from_outside(bench: Bench) -> None:
    def kill() -> None:
        (record,) = bench.vms()
        os.kill(record.pid, signal.SIGKILL)

    error = await _while_running(bench, "print('up', flush=True); time.sleep(600)", kill)
    assert "the VM died while it was in use" in error
    assert (await bench.attempts())[0].reason == "vm_died"


async def test_cancelled_while_it_runs(bench: Bench) -> None:
    agent = await bench.agent(WRITE + "print('up', flush=True); time.sleep(600)")
    bench.insert("t", agent.id)
    running = asyncio.create_task(run_ticket(bench.store, bench.worker, "t"))
    await bench.until_it_prints()
    bench.sql("UPDATE tickets SET state = 'cancelled' WHERE id = 't'")
    async with asyncio.timeout(PATIENCE_SECONDS):
        ticket = await running
    assert ticket.state == "cancelled"
    assert bench.live_vms() == []
    assert (await bench.attempts())[0].outcome == "cancelled"


async def test_interrupted_goes_back_uncounted(bench: Bench) -> None:
    agent = await bench.agent(WRITE + "print('up', flush=True); time.sleep(600)")
    bench.insert("t", agent.id)
    running = asyncio.create_task(run_ticket(bench.store, bench.worker, "t"))
    await bench.until_it_prints()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert bench.live_vms() == []
    (attempt,) = await bench.attempts()
    (step,) = await bench.store.steps("t")
    assert (attempt.outcome, step.status, step.retry_count) == ("interrupted", "ready", 0)


async def test_hostile_text_arrives_byte_for_byte(bench: Bench) -> None:
    nasty = "quote ' \" $(reboot) `id` \\ \n\r\t \u0000 \U0001f600 ; DROP TABLE tickets; -- "
    agent = await bench.agent(WRITE + "out(json.load(open('input.json')))")
    long = nasty + "x" * (1 << 20)
    bench.insert("t'; --", agent.id, title=nasty, description=long, inputs=json.dumps({nasty: nasty}))
    ticket = await run_ticket(bench.store, bench.worker, "t'; --")
    assert ticket.outputs, ticket.error
    seen = json.loads(ticket.outputs)
    assert (seen["ticket"]["title"], seen["ticket"]["description"]) == (nasty, long)
    assert seen["inputs"] == {nasty: nasty}
