"""The user's acceptance commands, as typed, on a system install: literal shell text, real paths, real VMs.

Private mounts cover `/opt` and ssh's configuration directory, so this system install is invisible to the host, and is
gone afterwards.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import pytest

from swarm.app import wiring
from swarm.config import Settings
from swarm.store.sql.wake import FileWake
from swarm.vm.driver import Image
from tests.gateway.messages_api import HAIKU

pytestmark = pytest.mark.needs("qemu")

QEMUS = "pgrep -f 'qemu-system-x86_64 .*sandbox.*chardev=qmp' || true"  # others on this machine may run VMs too
INSERT_ECHO = (  # of acceptance 2
    'sqlite3 /opt/swarm-platform/data/swarm.db "INSERT INTO tickets (id, project_id, title, description, state, '
    "agent_id, assignee_id, assignee_type, execution_mode) VALUES ('test-echo-002', 'test-project', 'Echo Test 2', "
    "'Test ticket for echo agent', 'ready', '$ECHO_ID', '$ECHO_ID', 'agent', 'agent');\""
)
COVERED = ("/opt", "/etc/ssh/ssh_config.d", "/root/.ssh")


@dataclass(frozen=True, kw_only=True)
class Shell:
    """A root shell on a host with a system install."""

    env: dict[str, str]

    def __call__(self, script: str, *, status: int = 0, timeout: float = 300) -> str:
        done = subprocess.run(
            ["bash", "-c", script],
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == status, f"{script}\nstatus {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def shell(settings: Settings, image: Image) -> Iterator[Shell]:
    env = {k: v for k, v in os.environ.items() if k not in ("SWARM_HOME", "ECHO_ID")}
    env |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SWARM_IMAGES_DIR": str(settings.images),
        "SWARM_TEMPLATES_DIR": str(settings.templates),
        "ECHO_ID": "0d72b1b5-a98e-4356-bf52-f654d0509dc4",
    }
    run = Shell(env=env)
    mounted = [place for place in COVERED if Path(place).is_dir()]
    for place in mounted:
        subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    try:
        run("swarm init")
        yield run
    finally:
        run("swarm-cleanup --force")
        for place in mounted:
            subprocess.run(["umount", place], check=True)


def test_0_clean_and_one_vm_by_hand(shell: Shell) -> None:
    shell("swarm-cleanup")
    spawned = shell("swarm-spawn-ns 1")
    assert "10.0.0.2" in spawned
    assert "because" in spawned  # which driver runs it, and why not a better one
    assert shell("pgrep -a firecracker || pgrep -a qemu-system-x86")
    (vm,) = json.loads(shell("swarm vm list --json"))
    assert str(vm["pid"]) in shell(QEMUS).split()
    assert "vm1" in shell("ip netns list")
    assert "2 received" in shell("ping -c 2 10.0.0.2")
    ssh = 'ssh -o ConnectTimeout=5 -o StrictHostKeyChecking=no root@10.0.0.2 "echo success"'
    assert shell(ssh) == "success\n"
    assert "10.0.0.1/16" in shell("ip addr show br0")
    assert "altname tap1" in shell("ip link show tap1")
    assert "healthy: process, namespace" in shell("swarm doctor")
    before = json.loads(shell("swarm vm list --json"))
    shell("swarm-spawn-ns 1")  # replaces an older VM 1
    after = json.loads(shell("swarm vm list --json"))
    assert [vm["n"] for vm in after] == [1]
    assert before[0]["pid"] != after[0]["pid"]
    assert shell(ssh) == "success\n"  # though its host key has changed
    shell("swarm-spawn-ns 300")  # past 253
    assert shell("ssh -o ConnectTimeout=5 -o StrictHostKeyChecking=no root@10.0.1.45 hostname") == "vm300\n"
    assert shell(ssh) == "success\n"  # both are up, both are reachable
    shell("swarm-cleanup")
    shell("swarm-cleanup")
    assert shell("ip netns list") == ""
    shell("ip link show br0", status=1)
    assert str(vm["pid"]) not in shell(QEMUS).split()


def test_2_one_ticket_echo_agent(shell: Shell) -> None:
    shell(INSERT_ECHO)
    shell("swarm-engine run-ticket test-echo-002 --wait")
    for database in ("/opt/swarm-platform/data/swarm.db", "/opt/swarm-registry/registry.db"):
        state = shell(f"sqlite3 {database} \"SELECT state FROM tickets WHERE id='test-echo-002';\"")
        assert state == "done\n"
    outputs = shell(
        "sqlite3 /opt/swarm-platform/data/swarm.db \"SELECT outputs FROM tickets WHERE id='test-echo-002';\""
    )
    assert json.loads(outputs)["title"] == "Echo Test 2"
    assert (
        shell("sqlite3 /opt/swarm-registry/registry.db \"SELECT id FROM agents WHERE name = 'echo';\"").strip()
        == (shell.env["ECHO_ID"])
    )


@contextmanager
def messages_api(key: str, place: Path) -> Iterator[str]:
    """Run a server with the Messages API in a separate process; the address of it."""
    address = place / "messages-api"
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.gateway.messages_api", "--key", key, "--port-file", str(address)],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.DEVNULL,
    )
    try:
        for _ in range(1200):
            if address.exists():
                break
            assert server.poll() is None, "the server has ended"
            time.sleep(0.1)
        yield address.read_text()
    finally:
        server.kill()
        server.wait()


def test_3_claude_agent(shell: Shell, tmp_path: Path) -> None:
    key = "sk-ant-of-the-acceptance-test-0123456789"
    with messages_api(key, tmp_path) as address:
        host = Shell(env={**shell.env, "ANTHROPIC_API_KEY": key, "ANTHROPIC_BASE_URL": address})
        found = host(
            "sqlite3 /opt/swarm-registry/registry.db \"SELECT id, name FROM agents WHERE name LIKE '%claude%';\""
        )
        assert "|claude\n" in found
        host(
            "CLAUDE_ID=$(sqlite3 /opt/swarm-registry/registry.db "
            "\"SELECT id FROM agents WHERE name LIKE '%claude%' LIMIT 1;\")\n"
            'sqlite3 /opt/swarm-platform/data/swarm.db "INSERT INTO tickets (id, project_id, title, description, '
            "state, agent_id, assignee_id, assignee_type, execution_mode, inputs) VALUES ('test-claude-001', "
            "'test-project', 'Claude Test', 'Write a haiku about distributed systems', 'ready', '$CLAUDE_ID', "
            "'$CLAUDE_ID', 'agent', "
            '\'agent\', \'{\\"prompt\\":\\"Write a haiku about distributed systems\\"}\');"'
        )
        host("swarm-engine run-ticket test-claude-001 --wait", timeout=300)
        state, outputs, error = host(
            "sqlite3 /opt/swarm-platform/data/swarm.db "
            "\"SELECT state, outputs, error FROM tickets WHERE id='test-claude-001';\""
        ).split("|")
        assert (state, error) == ("done", "\n")
        assert json.loads(outputs)["text"] == HAIKU
        seen = json.loads(urlopen(f"{address}/_seen").read())
        assert [call["headers"]["x-api-key"] for call in seen] == [key]  # it was called, once, with the key
        assert seen[0]["body"]["messages"][0]["content"] == "Write a haiku about distributed systems"
        assert "test-claude-001" in host("swarm cost --by ticket")
    for place in ("/opt", "/var/lib/swarm", os.environ.get("SWARM_STATE_DIR", "/var/lib/swarm")):
        host(f"grep -r --text --quiet --fixed-strings {key} {place}", status=2 if not Path(place).is_dir() else 1)


DATABASE = Path("/opt/swarm-platform/data/swarm.db")


@contextmanager
def terminal_1(shell: Shell, command: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command that stays in the foreground until Ctrl+C."""
    running = subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        env=shell.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def after_each_commit(holds: Callable[[], bool], *, timeout_seconds: float = 300) -> None:
    """Wait until ``holds`` returns True; it is called after every commit to the database."""

    async def wait() -> None:
        async with FileWake.watching(DATABASE) as wake, asyncio.timeout(timeout_seconds):
            while not await asyncio.to_thread(holds):
                await wake.changed(timeout_seconds=0.1)

    asyncio.run(wait())


def ctrl_c(running: subprocess.Popen[str]) -> str:
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 0, said
    assert "Traceback" not in said
    return said


def test_4_polling(shell: Shell) -> None:
    with terminal_1(shell, "swarm-engine start --foreground --max-vms=2") as engine:
        assert engine.stdout is not None
        assert "engine serves" in engine.stdout.readline()
        shell(
            'sqlite3 /opt/swarm-platform/data/swarm.db "INSERT INTO tickets (id, project_id, title, description, state,'
            " agent_id, assignee_id, assignee_type, execution_mode) VALUES ('test-poll-001', 'test-project', "
            "'Echo Test', 'Test ticket for echo agent', 'ready', '$ECHO_ID', '$ECHO_ID', 'agent', 'agent');\""
        )
        state = "sqlite3 /opt/swarm-platform/data/swarm.db \"SELECT state FROM tickets WHERE id='test-poll-001';\""
        after_each_commit(lambda: shell(state) == "done\n")
        assert "serving" in shell("swarm-engine status")
        assert "ticket ended" in ctrl_c(engine)
    assert json.loads(shell("swarm vm list --json")) == []
    assert "no engine" in shell("swarm-engine status")


def test_5_five_at_once(shell: Shell, settings: Settings) -> None:
    for name in ("parallel", "again", "once-more"):  # a busy machine may let one go before it is held
        overlap, alive = five_at_once(shell, settings, name)
        if overlap == "1|5\n":
            break
    assert overlap == "1|5\n"
    assert alive == 5
    assert json.loads(shell("swarm vm list --json")) == []
    shell("swarm prove")


def five_at_once(shell: Shell, settings: Settings, name: str) -> tuple[str, int]:
    """Whether they overlapped, and how many VMs they had; how many lived at the same time."""
    for number in range(1, 6):
        shell(
            'sqlite3 /opt/swarm-platform/data/swarm.db "INSERT INTO tickets (id, project_id, title, description, state,'
            f" agent_id, assignee_id, assignee_type, execution_mode) VALUES ('test-{name}-00{number}', "
            "'test-project', 'Echo Test', 'Test ticket for echo agent', 'ready', '$ECHO_ID', '$ECHO_ID', 'agent', "
            "'agent');\""
        )
    vms, together, over = wiring.inventory(settings), set[int](), threading.Event()

    def hold_them() -> None:
        """Halt each VM as it appears, until there are five: a ticket takes 0.3 s, and this host may be busy."""
        while len(together) < 5 and not over.wait(0.002):
            for pid in {vm.pid for vm in vms.records() if vm.alive and vm.ticket_id} - together:  # not a template's
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    together.add(pid)
        alive.append(sum(vm.alive for vm in vms.records()))
        for pid in together:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    alive: list[int] = []

    count = (
        "sqlite3 /opt/swarm-platform/data/swarm.db "
        f"\"SELECT count(*) FROM tickets WHERE id LIKE 'test-{name}-%' AND state = 'done';\""
    )
    holding = threading.Thread(target=hold_them)
    holding.start()
    try:
        with terminal_1(shell, "swarm-engine start --foreground --max-vms=5") as engine:
            after_each_commit(lambda: shell(count) == "5\n")
            ctrl_c(engine)
    finally:
        over.set()
        holding.join()
    # All ran at the same time: the last one started before the first one ended.
    overlap = shell(
        'sqlite3 /opt/swarm-platform/data/swarm.db "SELECT max(a.started_at) < min(a.ended_at), '
        "count(DISTINCT a.vm_id) "
        "FROM attempts a JOIN step_executions s ON s.id = a.step_execution_id JOIN workflow_runs r ON r.id = s.run_id "
        f"WHERE r.ticket_id LIKE 'test-{name}-%';\""
    )
    return overlap, alive[0]


def test_6_workflow(shell: Shell) -> None:
    shell("""
        WORKFLOW_ID=$(sqlite3 /opt/swarm-registry/registry.db "SELECT id FROM workflows LIMIT 1;")
        sqlite3 /opt/swarm-platform/data/swarm.db "INSERT INTO tickets (id, project_id, title, description, state, execution_mode, workflow_id) VALUES ('test-workflow-001', 'test-project', 'Workflow Test', 'Test workflow execution', 'ready', 'workflow', '$WORKFLOW_ID');"
        swarm-engine run-ticket test-workflow-001 --wait
    """)  # noqa: E501 - as typed
    ticket = shell(
        "sqlite3 /opt/swarm-platform/data/swarm.db "
        "\"SELECT state, outputs, error FROM tickets WHERE id = 'test-workflow-001';\""
    )
    state, outputs, error = ticket.rstrip("\n").split("|")
    assert (state, error) == ("done", "")
    assert json.loads(outputs) == {"heard": "hello", "story": "the first step said: Echo of ticket test-workflow-001"}
    run = shell(
        'sqlite3 /opt/swarm-registry/registry.db "SELECT * FROM workflow_runs ORDER BY started_at DESC LIMIT 1;"'
    )
    assert "|test-workflow-001|completed|ticket|" in run
    steps = shell(
        'sqlite3 /opt/swarm-registry/registry.db "SELECT * FROM step_executions ORDER BY started_at DESC LIMIT 5;"'
    ).splitlines()
    run_id = run.partition("|")[0]
    ours = [line.split("|") for line in steps if f"|{run_id}|" in line]
    assert [columns[2] for columns in ours] == ["second", "first"]
    assert {columns[6] for columns in ours} == {"completed"}
    # Each in a microVM of its own.
    vms = shell(
        'sqlite3 /opt/swarm-registry/registry.db "SELECT count(*), count(DISTINCT a.id), min(a.vm_id) > 0 FROM attempts'
        f" a JOIN step_executions s ON s.id = a.step_execution_id WHERE s.run_id = '{run_id}';\""
    )
    assert vms == "2|2|1\n"
    assert json.loads(shell("swarm vm list --json")) == []
    shell("swarm prove")


def test_clean_up(shell: Shell) -> None:
    shell("swarm-cleanup")
    shell("sqlite3 /opt/swarm-platform/data/swarm.db \"DELETE FROM tickets WHERE id LIKE 'test-%';\"")
    shell("swarm-engine status")
    shell("swarm-engine run-ticket test-echo-002 --wait", status=2)
