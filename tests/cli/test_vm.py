"""The commands with real VMs: a ticket from row to outputs, a manual VM, and `swarm doctor` on a broken one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from swarm.app import wiring
from swarm.config import Settings
from swarm.model import ECHO_AGENT_ID, Agent
from swarm.vm.driver import Image
from swarm.vm.network import netns
from swarm.vm.slots.inventory import VmRecord
from tests.agents.write import registered
from tests.conftest import PATIENCE_SECONDS

pytestmark = pytest.mark.needs("qemu")
BIN = Path(sys.executable).parent
Run = Callable[..., subprocess.CompletedProcess[str]]
N = 7


@pytest.fixture(scope="module")
def run(settings: Settings, image: Image) -> Run:
    env = os.environ | {"SWARM_HOME": str(settings.home), "SWARM_IMAGES_DIR": str(settings.images)}

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        program = str(BIN / argv[0]) if argv[0].startswith("swarm") else argv[0]
        done = subprocess.run(
            [program, *argv[1:]],
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
            env=env,
            stdin=subprocess.DEVNULL,
        )
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def vm(run: Run) -> Iterator[int]:
    """One VM, started manually, for the whole module; each test leaves it healthy or replaces it."""
    done = run("swarm-spawn-ns", str(N))
    assert done.returncode == 0, done.stderr
    yield N
    assert run("swarm", "vm", "rm", str(N)).returncode == 0


def checks(run: Run) -> dict[str, dict[str, str]]:
    """The doctor's checks of the VM, by name."""
    found = json.loads(run("swarm", "doctor", "--json").stdout)
    prefix = f"VM {N}: "
    return {c["name"].removeprefix(prefix): c for c in found if c["name"].startswith(prefix)}


def failed(run: Run) -> list[str]:
    return [name for name, check in checks(run).items() if check["status"] == "fail"]


def test_a_healthy_vm_passes_each_check(run: Run, vm: int) -> None:
    found = checks(run)
    assert list(found) == [
        "process", "namespace", "bridge port", "tap", "address", "routing", "ping", "agentd", "sshd", "entropy",
    ]  # fmt: skip
    assert {check["status"] for check in found.values()} == {"ok"}, found
    assert found["sshd"]["detail"].startswith("SSH-2.0-")
    assert f"VM {N}" in run("swarm", "doctor").stdout


def test_ssh_keeps_the_words_of_a_command(run: Run, vm: int) -> None:
    assert run("swarm", "vm", "ssh", str(N), "--", "echo", "a  b", "$(id)", "it's").stdout == "a  b $(id) it's\n"
    assert run("swarm", "vm", "ssh", str(N), "--", "sh", "-c", "exit 9").returncode == 9


def test_list_shows_it(run: Run, vm: int) -> None:
    (shown,) = json.loads(run("swarm", "vm", "list", "--json").stdout)
    assert (shown["n"], shown["kind"], shown["address"]) == (N, "manual", f"10.0.0.{N + 1}")
    assert f"10.0.0.{N + 1}" in run("swarm", "vm", "list").stdout


# How to cause each fault, and the check that must find it. The fix that the check suggests must then work.
FAULTS = {
    "tap not on the bridge": (["ip", "link", "set", f"tap{N}", "nomaster"], "bridge port"),
    "bridge down": (["ip", "link", "set", "br0", "down"], "bridge port"),
    "namespace does not forward": (
        ["ip", "netns", "exec", f"vm{N}", "sysctl", "-q", "-w", "net.ipv4.ip_forward=0"],
        "routing",
    ),
    "namespace does not translate": (
        ["ip", "netns", "exec", f"vm{N}", "nft", "flush", "chain", "ip", "swarm", "prerouting"],
        "routing",
    ),
    "namespace has no way back": (["ip", "-n", f"vm{N}", "route", "del", "default"], "routing"),
    "address lost": (["ip", "-n", f"vm{N}", "addr", "flush", "dev", "eth0"], "address"),
    "tap down": (["ip", "-n", f"vm{N}", "link", "set", "tap0", "down"], "tap"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_its_fix_works(run: Run, vm: int, fault: str) -> None:
    make, named = FAULTS[fault]
    assert run(*make).returncode == 0
    broken = checks(run)
    assert [name for name, check in broken.items() if check["status"] == "fail"] == [named], broken
    advice = broken[named]["fix"].partition("   (")[0]
    done = run(*advice.split())
    assert done.returncode == 0, f"{advice}: {done.stderr}"
    assert failed(run) == []


def test_a_missing_sshd_is_not_taken_for_a_network_fault(run: Run, vm: int) -> None:
    assert run("swarm", "vm", "ssh", str(N), "--", "mv", "/usr/sbin/sshd", "/usr/sbin/sshd.away").returncode == 0
    run("swarm", "vm", "ssh", str(N), "--", "true")  # uses up the sshd that was started ahead
    found = checks(run)
    assert [name for name, check in found.items() if check["status"] == "fail"] == ["sshd"], found
    assert found["entropy"]["status"] == "ok"
    assert run("swarm-spawn-ns", str(N)).returncode == 0  # replaces the VM
    assert failed(run) == []


# Replaces the guest's sshd: without a random device, and with a getrandom that fails as in a kernel without entropy.
STARVED_SSHD = """#!/usr/bin/python3 -IS
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x20000) == 0 and libc.mount(b"none", b"/", None, 0x44000, None) == 0
for name in (b"/dev/urandom", b"/dev/random", b"/dev/hwrng"):
    libc.mount(b"/dev/null", name, None, 4096, None)
# Seccomp (linux/seccomp.h): system call 318, getrandom, fails with EAGAIN; everything else is allowed.
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 318), (6, 0, 0, 0x50000 | 11), (6, 0, 0, 0x7FFF0000)]
filter = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(filter)))
assert libc.prctl(22, ctypes.c_ulong(2), program, ctypes.c_ulong(0), ctypes.c_ulong(0)) == 0
os.execv("/usr/sbin/sshd.fed", sys.argv)
"""


def test_an_sshd_that_lacks_entropy(run: Run, vm: int) -> None:
    starve = 'mv /usr/sbin/sshd /usr/sbin/sshd.fed; printf %s "$1" > /usr/sbin/sshd; chmod 755 /usr/sbin/sshd'
    done = run("swarm", "vm", "ssh", str(N), "--", "sh", "-c", starve, "sh", STARVED_SSHD)
    assert done.returncode == 0, done.stderr
    run("swarm", "vm", "ssh", str(N), "--", "true")  # uses up the sshd that was started ahead
    assert run("swarm", "vm", "ssh", str(N), "--", "true").returncode == 255
    found = checks(run)
    assert [name for name, check in found.items() if check["status"] == "fail"] == ["sshd", "entropy"], found
    assert "random" in found["entropy"]["detail"]
    assert run("swarm-spawn-ns", str(N)).returncode == 0
    assert failed(run) == []


def test_a_ticket_from_a_plain_insert_to_its_outputs(run: Run, settings: Settings) -> None:
    with sqlite3.connect(settings.data_dir / "swarm.db", timeout=60) as db:
        db.execute(
            "INSERT INTO tickets (id, title, state, agent_id, inputs) VALUES ('vm-echo', 'T', 'ready', ?, ?)",
            (ECHO_AGENT_ID, '{"n": 1}'),
        )
    done = run("swarm-engine", "run-ticket", "vm-echo", "--wait", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["ticket"]["outputs"]["echo"] == {"n": 1}
    assert result["attempts"][-1]["timings"]["total"] > 0
    assert run("swarm", "ticket", "logs", "vm-echo").stdout == "echo: ticket vm-echo, attempt 1\n"
    assert "attempt 1: succeeded" in run("swarm", "ticket", "show", "vm-echo").stdout


async def _until_it_prints(settings: Settings, ticket_id: str) -> None:
    async with wiring.store(settings) as store, store.watching() as wake, asyncio.timeout(PATIENCE_SECONDS):
        while not any(event.kind == "output" for event in await store.events(ticket_id)):
            await wake.changed(timeout_seconds=5)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=lambda v: str(v)
)
def test_a_run_that_is_ended_from_outside_leaves_nothing(
    run: Run, settings: Settings, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    """As in a terminal, the signal reaches the whole process group. What SIGKILL leaves, the next run removes."""
    code = "import time\nprint('up', flush=True)\ntime.sleep(600)\n"

    async def register() -> Agent:
        async with wiring.store(settings) as store:
            return await registered(store, settings, tmp_path / "sleeper", code, f"sleeper-{number}")

    agent = asyncio.run(register())
    sleeper, after = f"ended-by-{number}", f"after-{number}"
    with sqlite3.connect(settings.data_dir / "swarm.db", timeout=60) as db:
        for id_, agent_id in ((sleeper, agent.id), (after, ECHO_AGENT_ID)):
            row = (id_, "T", "ready", agent_id)
            db.execute("INSERT INTO tickets (id, title, state, agent_id) VALUES (?, ?, ?, ?)", row)
    env = os.environ | {"SWARM_HOME": str(settings.home), "SWARM_IMAGES_DIR": str(settings.images)}
    argv = [str(BIN / "swarm-engine"), "run-ticket", sleeper, "--wait"]
    with subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, start_new_session=True) as child:
        try:
            asyncio.run(_until_it_prints(settings, sleeper))
        except BaseException:
            child.terminate()
            raise
        os.killpg(child.pid, number)
        assert child.wait(timeout=300) == status
    if number == signal.SIGKILL:
        assert [record.ticket_id for record in _engines_vms(settings)] == [sleeper]
        assert run("swarm-engine", "run-ticket", after, "--wait").returncode == 0
    else:
        (attempt,) = json.loads(run("swarm", "ticket", "show", sleeper, "--json").stdout)["attempts"]
        assert attempt["outcome"] == "interrupted"
    assert _engines_vms(settings) == []
    assert [name for name in netns.names() if int(name.removeprefix("vm")) >= settings.first_engine_slot] == []
    with sqlite3.connect(settings.data_dir / "swarm.db", timeout=60) as db:
        db.execute("DELETE FROM tickets WHERE id IN (?, ?)", (sleeper, after))


def _engines_vms(settings: Settings) -> list[VmRecord]:
    return [record for record in wiring.inventory(settings).records() if record.n >= settings.first_engine_slot]
