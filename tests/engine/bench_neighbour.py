"""What one tenant can do to all others, for `tests.engine.bench`: name `neighbour`.

A real `swarm-engine start` with plain processes runs small echo tickets, one after the other: alone, and beside a bad
neighbour of each kind, who keeps two hostile tickets unfinished. Both take turns, so that a busy moment of the machine
hits both. Beside each figure stands the same for a bare Python process that does nothing, started in the same moments:
what the neighbour's own programs take from the machine, whatever the engine does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarm import config
from swarm.app import setup, wiring
from swarm.config import Settings
from swarm.model import ECHO_AGENT_ID
from swarm.store.store import Store
from swarm.workflow import validate
from swarm.workflow.definition import Workflow
from swarm.workflow.pinning import Registry
from tests.agents.write import registered
from tests.store.bench_queue import out

MIB = 1 << 20
ROUNDS, ECHOES, UNFINISHED = 6, 12, 2
PHASE_SECONDS = 20.0  # of one round beside a neighbour: fewer tickets when they are slow
SMALL_THINGS = '{"x":[' + "[]," * 4_900_000 + "0]}"  # 15 MB of JSON, half a gigabyte in Python
# The most that is taken.
ALLOWED_THINGS = '{"x":[' + "[]," * 990_000 + '"' + "y" * 12_000_000 + '"]}'
WRITE = "import json, os, sys, time\n"
# Takes agentd's connection to the host from it (here both have the same user; in a VM it takes a hole in the guest),
# and sends one byte of output with as long a header as the protocol allows, again and again.
SEIZE = """
import ctypes, os, re, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
def parent(pid):
    return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
def is_agentd(pid):
    return b"agentd.py" in open(f"/proc/{pid}/cmdline", "rb").read()
pid = os.getpid()
found, RUN = [], 5  # hello, renew, put, put, run
while pid > 1:
    pid = parent(pid)
    if is_agentd(pid):
        fd = os.pidfd_open(pid)
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                if not os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                    continue
            except OSError:
                continue
            taken = libc.syscall(438, fd, int(name), 0)
            if taken >= 0:
                one = socket.socket(fileno=taken)
                if one.family == socket.AF_UNIX and one.getsockname() and one.type == socket.SOCK_STREAM:
                    try:
                        one.getpeername()
                        found.append(one)
                    except OSError:
                        pass
head = b'{"id":%d,"stream":"stdout","x":' + b"[" * 200 + b"[]," * 15_000 + b"0" + b"]" * 200 + b"}"
frame = struct.pack(">II", len(head % RUN), 1) + head % RUN + b"."
import time
until = time.monotonic() + 8
for one in found:
    one.setblocking(True)
while time.monotonic() < until and found:
    for one in list(found):
        try:
            one.sendall(frame)
        except OSError:
            found.remove(one)
json.dump(1, open("output.json", "w"))
"""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """``code``: of an agent; ``workflow``: its steps. Without both, the echo agent. ``columns`` of its tickets."""

    code: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    workflow: str = ""
    columns: Mapping[str, object] = field(default_factory=dict)


_LARGE = WRITE + "open('output.json', 'w').write('{\"x\":[' + '[],' * 999_000 + '\"' + 'y' * 12_000_000 + '\"]}')"
_LISTS = WRITE + "json.dump({'x': [['y' * 1000] * 10] * 1400}, open('output.json', 'w'))"
_ANY_OF = [{"type": "array", "items": {"enum": [n, [n]]}} for n in range(100)]
_ITEMS = "json.dump({'x': [{'n': n, 'text': 'y' * 6000} for n in range(2500)]}, open('output.json', 'w'))"

KINDS: Mapping[str, Kind] = {
    "inputs": Kind(columns={"inputs": ALLOWED_THINGS}),
    "refused inputs": Kind(columns={"inputs": SMALL_THINGS}),
    "outputs": Kind(code=_LARGE),
    "schemas": Kind(code=_LARGE, fields={"outputs_schema": json.dumps({"properties": {"x": {"anyOf": _ANY_OF}}})}),
    "log flood": Kind(
        code=WRITE + "for n in range(1500):\n  os.write(1, b'\\1' * 8192)\n  os.write(2, b'\\xff' * 8192)\n"
        "json.dump(1, open('output.json', 'w'))"
    ),
    "log drops": Kind(  # one byte at a time, from two streams in turn
        code=WRITE + "for n in range(300_000):\n  os.write(1, b'o')\n  os.write(2, b'e')\n"
        "json.dump(1, open('output.json', 'w'))"
    ),
    "artifacts": Kind(
        code=_LISTS,
        workflow="""
  - {id: one, agent: AGENT}
  - {id: two, agent: echo, needs: one, inputs: {all: "${steps.one.outputs}"}}
""",
    ),
    "expressions": Kind(
        code=_LISTS,
        workflow="""
  - {id: one, agent: AGENT}
  - {id: two, agent: echo, needs: one, inputs: {n: "${size(steps.one.outputs.x) + size(steps.one.outputs)}"}}
  - {id: three, agent: echo, needs: one, when: "${steps.one.outputs.x[0][0][0] == 'y'}", inputs: {n: 1}}
""",
    ),
    "fan-out": Kind(
        code=WRITE + _ITEMS,
        workflow="""
  - {id: one, agent: AGENT}
  - {id: two, agent: echo, needs: one, for_each: "${steps.one.outputs.x}", inputs: {all: "${item}"}, max_parallel: 1}
""",
    ),
    "long rows": Kind(columns={"description": "y" * (1 * MIB), "trigger_data": f'{{"x": "{"y" * (2 * MIB - 100)}"}}'}),
    "refused long rows": Kind(columns={"description": "y" * (15 * MIB), "inputs": "{}"}),
    "gateway bodies": Kind(
        fields={"network": "gateway"},
        code=WRITE
        + """
import urllib.request, urllib.error, threading
body = ('{"model": "claude-haiku-4-5", "max_tokens": 1, "messages": [' + "[]," * 600_000 + "0]").encode()
until = time.monotonic() + 8
def post():
    while time.monotonic() < until:
        headers = {"x-api-key": os.environ["ANTHROPIC_API_KEY"], "content-type": "application/json"}
        try:
            url = os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages"
            urllib.request.urlopen(urllib.request.Request(url, body, headers))
        except OSError:
            pass
threads = [threading.Thread(target=post) for _ in range(4)]
[one.start() for one in threads]
[one.join() for one in threads]
json.dump(1, open("output.json", "w"))
""",
    ),
    "DNS": Kind(
        fields={"network": "open"},
        code=WRITE
        + """
import socket, urllib.parse, base64
proxy = urllib.parse.urlsplit(os.environ.get("HTTPS_PROXY") or os.environ["https_proxy"])
auth = base64.b64encode(f"{proxy.username}:{proxy.password}".encode()).decode()
open_ = []
for n in range(100):
    one = socket.create_connection((proxy.hostname, proxy.port))
    one.sendall(f"CONNECT n{n}.example.org:443 HTTP/1.1\\r\\nHost: n{n}.example.org:443\\r\\n"
                f"Proxy-Authorization: Basic {auth}\\r\\n\\r\\n".encode())
    open_.append(one)
time.sleep(8)
json.dump(1, open("output.json", "w"))
""",
    ),
    "computes": Kind(  # what sharing the CPUs takes, whatever the engine does
        code=WRITE
        + "until = time.monotonic() + 8\nwhile time.monotonic() < until: x = [[n] for n in range(300_000)]\n"
        + "json.dump(1, open('output.json', 'w'))"
    ),
    "channel headers": Kind(code="import json\n" + SEIZE),
}


# --- the neighbour, in a process of its own ---------------------------------------------------------------------------


def keep(file: str, kind: str, target: str) -> None:
    """Keep tickets of this kind unfinished, until killed."""
    columns = dict(KINDS[kind].columns)
    named = {"agent_id": target} if not KINDS[kind].workflow else {"execution_mode": "workflow", "workflow_id": target}
    row = {"title": kind, "state": "ready", **named, **columns}
    statement = f"INSERT INTO tickets (id, {', '.join(row)}) VALUES (?, {', '.join('?' * len(row))})"
    made = 0
    with contextlib.closing(sqlite3.connect(file, isolation_level=None, timeout=60)) as connection:
        while True:
            (left,) = connection.execute(
                "SELECT count(*) FROM tickets WHERE title = ? AND state NOT IN ('done', 'failed', 'cancelled')", (kind,)
            ).fetchone()
            for _ in range(UNFINISHED - left):
                made += 1
                connection.execute(statement, (f"{kind}-{os.getpid()}-{made}", *row.values()))
            time.sleep(0.1)


@contextlib.contextmanager
def neighbour(file: Path, kind: str, target: str) -> Iterator[None]:
    argv = [sys.executable, "-m", "tests.engine.bench_neighbour", str(file), kind, target]
    with contextlib.closing(sqlite3.connect(file, timeout=60)) as connection:
        [before] = connection.execute("SELECT count(*) FROM tickets WHERE title = ?", (kind,)).fetchone()
        running = subprocess.Popen(argv)
        began = "SELECT count(*) FROM tickets WHERE title = ? AND state <> 'ready'"
        while connection.execute(began, (kind,)).fetchone()[0] <= before:
            time.sleep(0.05)
    try:
        yield
    finally:
        running.kill()
        running.wait()
        with contextlib.closing(sqlite3.connect(file, isolation_level=None, timeout=60)) as connection:
            withdrawn = "UPDATE tickets SET state = 'cancelled' WHERE title = ? AND state IN ('ready', 'in_progress')"
            connection.execute(withdrawn, (kind,))
            while connection.execute("SELECT count(*) FROM attempts WHERE outcome IS NULL").fetchone()[0]:
                time.sleep(0.2)


# --- the others -------------------------------------------------------------------------------------------------------


def echoes(connection: sqlite3.Connection, name: str, count: int) -> tuple[list[float], list[float]]:
    """Milliseconds from the INSERT of a small ticket until another process sees it done, one after the other; and of a
    bare process after each, which shows what the machine itself is slower by."""
    late, bare, until = list[float](), list[float](), time.monotonic() + PHASE_SECONDS
    for number in range(count):
        if time.monotonic() > until:
            break
        id_ = f"echo-{name}-{number}"
        began = time.perf_counter()
        connection.execute(
            "INSERT INTO tickets (id, title, state, agent_id, priority, inputs) VALUES (?, 'echo', 'ready', ?, 0, ?)",
            (id_, ECHO_AGENT_ID, '{"name": "world"}'),
        )
        while True:
            (state,) = connection.execute("SELECT state FROM tickets WHERE id = ?", (id_,)).fetchone()
            if state in ("done", "failed"):
                break
            time.sleep(0.002)
        assert state == "done", connection.execute("SELECT error FROM tickets WHERE id = ?", (id_,)).fetchone()
        late.append((time.perf_counter() - began) * 1e3)
        began = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True)
        bare.append((time.perf_counter() - began) * 1e3)
    return late, bare


def share(values: list[float], part: float) -> float:
    return sorted(values)[min(int(len(values) * part), len(values) - 1)]


async def _target(store: Store, settings: Settings, place: Path, kind: str) -> str:
    """The id of what runs this kind."""
    one, found, name = KINDS[kind], ECHO_AGENT_ID, kind.replace(" ", "-").lower()
    if one.code:
        found = (await registered(store, settings, place / name, one.code, name, **one.fields)).id
    if one.workflow:
        agents = {agent.name: agent for agent in await store.agents()}
        text = f"name: {name}\nversion: 1.0.0\nsteps:{one.workflow.replace('AGENT', name)}"
        checked = validate.checked(text, Registry(agent=lambda ref: agents[ref.partition("@")[0]], workflow=_none))
        found = (await store.put_workflow(checked)).id
    return found


def _none(reference: str) -> Workflow:
    raise AssertionError(reference)


async def measure(directory: Path, kinds: list[str]) -> None:
    out(f"neighbour           {'echo alone, ms':>22} {'beside it':>24} {'ratio':>15}   a bare process, p95")
    for number, kind in enumerate(kinds):
        home = directory / str(number) / "home"
        settings = config.load(home=home, state_dir=home.parent / "state", driver="process")
        await setup.init(settings, image=False)
        async with wiring.store(settings) as store:
            target = await _target(store, settings, home.parent, kind)
        _serve(settings, kind, target)


def _serve(settings: Settings, kind: str, target: str) -> None:
    file, home = settings.data_dir / "swarm.db", str(settings.home)
    argv = ["-m", "swarm.cli.engine", "start", "--foreground", "--driver=process", "--max-vms=4", "--home", home]
    keys = {"ANTHROPIC_API_KEY": "sk-ant-none", "ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}
    env = {**os.environ, "SWARM_STATE_DIR": str(settings.state_dir), **keys}
    with (settings.home.parent / "engine.log").open("wb") as log:
        engine = subprocess.Popen([sys.executable, *argv], env=env, stderr=log, stdout=log, stdin=subprocess.DEVNULL)
        try:
            with contextlib.closing(sqlite3.connect(file, isolation_level=None, timeout=60)) as connection:
                echoes(connection, "warm", 5)
                _one(connection, file, kind, target)
        finally:
            engine.terminate()
            engine.wait()


def _one(connection: sqlite3.Connection, file: Path, kind: str, target: str) -> None:
    alone, beside, bare_alone, bare_beside = list[float](), list[float](), list[float](), list[float]()
    for number in range(ROUNDS):
        late, machine = echoes(connection, f"{kind}-alone-{number}", ECHOES)
        alone, bare_alone = alone + late, bare_alone + machine
        with neighbour(file, kind, target):
            late, machine = echoes(connection, f"{kind}-beside-{number}", ECHOES)
            beside, bare_beside = beside + late, bare_beside + machine
    said = [row[0] for row in connection.execute("SELECT DISTINCT state FROM tickets WHERE title = ?", (kind,))]
    p50, p95 = (share(alone, 0.5), share(beside, 0.5)), (share(alone, 0.95), share(beside, 0.95))
    bare = share(bare_alone, 0.95), share(bare_beside, 0.95)
    out(
        f"{kind:18} alone p50 {p50[0]:6.0f}, p95 {p95[0]:6.0f}; p50 {p50[1]:6.0f}, p95 {p95[1]:6.0f}; "
        f"× {p50[1] / p50[0]:.1f}, {p95[1] / p95[0]:5.1f}; {bare[0]:.0f} → {bare[1]:.0f}, "
        f"× {bare[1] / bare[0]:.1f} (its tickets: {', '.join(sorted(said))})"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("kind")
    parser.add_argument("target")
    options = parser.parse_args()
    keep(options.file, options.kind, options.target)
