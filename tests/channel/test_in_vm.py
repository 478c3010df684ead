"""agentd in a real guest: what it does only there. One VM, cold-booted, for all tests of this file."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import asyncssh
import pytest

from swarm.channel import Channel, Exit, Hello, Identity, Renewed
from swarm.channel.dial import Endpoint
from swarm.config import Settings
from swarm.errors import AgentTimeout, ChannelError
from swarm.vm.driver import AGENTD_PORT, Image, VmSpec
from swarm.vm.drivers.qemu import QemuDriver
from swarm.vm.network.network import Network

pytestmark = pytest.mark.needs("qemu")
T = TypeVar("T")
N = 65_000
HOST_KEY = asyncssh.generate_private_key("ssh-ed25519")
USER_KEY = asyncssh.generate_private_key("ssh-ed25519")
FIRST_TOKEN = os.urandom(16)
IDENTITY = Identity(
    generation="the-first",
    seed=os.urandom(64),
    hostname="somebody",
    machine_id="0123456789abcdef" * 2,
    ssh_host_key=HOST_KEY.export_private_key().decode(),
    authorized_keys=USER_KEY.export_public_key().decode(),
    token=os.urandom(16),
)


@dataclass(kw_only=True)
class Guest:
    runner: asyncio.Runner
    channel: Channel
    address: str
    before: Hello
    renewed: Renewed
    out: bytearray = field(default_factory=bytearray)

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def python(self, source: str, *, timeout_seconds: float = 60, user: str = "agent") -> Exit:
        async def work() -> Exit:
            await self.channel.put({"main.py": source.encode()}, dest="/agent", owner="root")
            return await self.channel.run(
                ["/agent/main.py"],
                warm=True,
                user=user,
                timeout_seconds=timeout_seconds,
                on_output=lambda _, data: self.out.extend(data),
            )

        self.out.clear()
        return self.do(work())


@asynccontextmanager
async def booted(settings: Settings, image: Image, place: Any) -> AsyncIterator[tuple[Channel, str, Hello, Renewed]]:
    async with AsyncExitStack() as stack:
        network = Network(subnet=settings.subnet, bridge=settings.bridge)
        await network.ensure_host()
        stack.push_async_callback(network.destroy, N)
        slot = await network.create(N)
        driver = QemuDriver(accelerator="tcg", disk_cache=place / "cache")
        directory = place / "vm"
        directory.mkdir()
        vm = await driver.boot(VmSpec(image=image, memory_mb=256), slot, directory, token=FIRST_TOKEN)
        stack.push_async_callback(vm.kill)
        first = Channel.connect(vm.endpoint, token=FIRST_TOKEN, timeout_seconds=60)
        channel = await stack.enter_async_context(first)
        yield channel, str(slot.address), channel.greeting, await channel.renew(IDENTITY)


@pytest.fixture(scope="module")
def guest(settings: Settings, image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    with asyncio.Runner() as runner:
        context = booted(settings, image, tmp_path_factory.mktemp("v"))
        channel, address, before, renewed = runner.run(context.__aenter__())
        try:
            yield Guest(runner=runner, channel=channel, address=address, before=before, renewed=renewed)
        finally:
            runner.run(context.__aexit__(None, None, None))


def test_the_token_of_the_boot_is_void_after_renew(guest: Guest) -> None:
    """Agents can read it on the kernel's command line."""

    async def knock(token: bytes) -> None:
        endpoint = Endpoint(host=guest.address, port=AGENTD_PORT)
        async with Channel.connect(endpoint, token=token, timeout_seconds=30):
            pass

    guest.python("print(open('/proc/cmdline').read())")
    assert FIRST_TOKEN.hex().encode() in guest.out
    with pytest.raises(ChannelError, match="wrong token"):
        guest.do(knock(FIRST_TOKEN))
    guest.do(knock(IDENTITY.token))


def test_before_renew_it_is_nobody(guest: Guest) -> None:
    assert (guest.before.generation, guest.before.machine_id, guest.before.sshd) == (None, "", False)
    assert guest.before.mode == "vm"


def test_renew_gives_an_identity(guest: Guest) -> None:
    renewed = guest.renewed
    assert set(renewed.done) == {"seed", "clock", "machine_id", "hostname", "work", "ssh", "interpreter"}
    assert renewed.skipped == ()
    assert (renewed.hostname, renewed.machine_id) == (IDENTITY.hostname, IDENTITY.machine_id)
    assert renewed.generation == IDENTITY.generation
    assert renewed.crng_ready
    assert abs(guest.do(guest.channel.hello()).clock_ns - time.time_ns()) < 2e9


def test_an_agent_is_nobody(guest: Guest) -> None:
    ended = guest.python("""
import os, resource
print(os.getresuid(), os.getresgid(), os.getgroups(), os.getcwd(), os.nice(0))
print(resource.getrlimit(resource.RLIMIT_NPROC), open("/proc/self/oom_score_adj").read().strip())
print([line.split()[3] for line in open("/proc/mounts") if " /work " in line])
for act in (
    lambda: open("/agent/x", "w"),
    lambda: open("/etc/shadow"),
    lambda: open("/root/.ssh/authorized_keys"),
    lambda: open("/proc/self/oom_score_adj", "w").write("-1000"),
    lambda: os.kill(os.getppid(), 9),
    lambda: open(f"/proc/{os.getppid()}/mem", "rb"),
    lambda: os.setpriority(os.PRIO_PROCESS, 0, -1),
    lambda: os.setuid(0),
):
    try:
        act()
        print("no!")
    except PermissionError:
        pass
""")
    assert ended.code == 0, guest.out.decode()
    ids, limits, mounts = guest.out.decode().splitlines()
    assert ids == "(1000, 1000, 1000) (1000, 1000, 1000) [1000] /work 0"
    assert limits == "(512, 512) 500"
    assert "nosuid,nodev,noatime" in mounts


def test_agents_reach_neither_agentd_nor_its_past(guest: Guest) -> None:
    ended = guest.python("""
import socket
for address in ("172.16.0.2", "127.0.0.1"):
    with socket.socket() as sock:
        sock.settimeout(10)
        try:
            sock.connect((address, 1024))
            print(sock.recv(1))
        except ConnectionError:
            print(b"")
""")
    assert (ended.code, guest.out.decode()) == (0, "b''\nb''\n")


def test_ssh_with_the_keys_that_renew_gave(guest: Guest) -> None:
    async def talk() -> str:
        known = asyncssh.import_known_hosts(f"{guest.address} {HOST_KEY.export_public_key().decode()}")
        async with asyncssh.connect(
            guest.address, username="root", client_keys=[USER_KEY], known_hosts=known, config=None, login_timeout=60
        ) as connection:
            return str((await connection.run("echo success; cat /proc/self/oom_score_adj", check=True)).stdout)

    assert guest.do(talk()) == "success\n0\n"


def test_out_of_memory_is_known_by_the_kernels_count(guest: Guest) -> None:
    ended = guest.python("x = []\nwhile True: x.append(bytearray(8 << 20))")
    assert (ended.code, ended.signal, ended.oom) == (None, 9, True)
    helper = "import subprocess, sys; sys.exit(-subprocess.run([sys.executable, '-c', {!r}]).returncode)"
    ended = guest.python(helper.format("x = []\nwhile True: x.append(bytearray(8 << 20))"))
    assert (ended.code, ended.oom) == (9, True)
    ended = guest.python("import os; os.kill(os.getpid(), 9)")
    assert (ended.signal, ended.oom) == (9, False)


def test_a_process_that_never_stays(guest: Guest) -> None:
    ended = guest.python(
        "import os\nif os.fork() == 0:\n    os.setsid()\n    while True:\n        os.fork() and os._exit(0)"
    )
    assert (ended.code, ended.clean) == (0, True)


def test_a_fork_bomb_is_stopped_from_inside(guest: Guest) -> None:
    source = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    with pytest.raises(AgentTimeout, match="ran for longer than 2 s"):
        guest.python(source, timeout_seconds=2)
    assert guest.python("pass").code == 0
