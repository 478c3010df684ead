"""agentd in a real guest: what it does only there. One VM, cold-booted, for all tests of this file."""

from __future__ import annotations

import asyncio
import os
import tarfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import asyncssh
import pytest

from swarm.channel import Channel, Exit, Hello, Identity, Open, Renewed, ports, processes
from swarm.channel import Guest as Connections
from swarm.channel import guest_files as files
from swarm.channel import guest_trees as trees
from swarm.channel.dial import Endpoint
from swarm.config import Settings
from swarm.errors import AgentTimeout, ChannelError, Conflict, NoSpace, UsageError
from swarm.vm.driver import AGENTD_PORT, Image, VmSpec
from swarm.vm.drivers.qemu import QemuDriver
from swarm.vm.network.network import Network
from tests.channel.conformance import CASES
from tests.conftest import PATIENCE_SECONDS

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
        async with Channel.connect(endpoint, token=token, timeout_seconds=120):
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
    assert abs(guest.do(guest.channel.hello()).clock_ns - time.time_ns()) < 20e9


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
        sock.settimeout(60)
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


# --- programs of `exec` ----------------------------------------------------------------------------------------------

# Processes but those that wait for the next program; how many control groups there are.
LEFT = "ps -o pid=,args= -u 1000 | grep -v -e 'ps -o' -e agentd -e grep; ls -d /sys/fs/cgroup/swarm/*/ | wc -l"


def shell(script: str, **options: Any) -> processes.Order:
    return processes.Order(argv=["/bin/sh", "-c", script], **options)


def test_programs_of_both_users(guest: Guest) -> None:
    async def work(open_: Open) -> None:
        script = "id -un; pwd; cat /proc/self/oom_score_adj; nice; bash -c 'ulimit -u'; tty"
        mine = await processes.run(open_, shell(f"{script}; echo $$ > /sys/fs/cgroup/cgroup.procs && echo no!"))
        assert mine.stdout.split() == [b"agent", b"/work", b"500", b"0", b"512", b"not", b"a", b"tty"]
        roots = await processes.run(open_, shell(script, user="root", pty=(80, 24)))
        assert roots.stdout.split()[:4] == [b"root", b"/root", b"500", b"0"]
        assert roots.stdout.endswith(b"/dev/pts/0\r\n")

    with_files(guest, work)


def test_nothing_escapes_its_time_out(guest: Guest) -> None:
    """Not what leaves its session and changes its pid all the time, and not a fork bomb."""
    escape = "import os\nos.setsid() if os.fork() == 0 else None\nwhile True: os.fork() and os._exit(0)"
    # The kernel ends it before its time is up, if it needs all of this VM's memory: for the 512 processes that it may
    # start, or for those that were refused, which are freed later (RCU).
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: time.sleep(0.05)"

    async def work(open_: Open) -> None:
        for source in (escape, bomb):
            limited = ["sh", "-c", 'ulimit -u 100; exec "$@"', "sh", "python3", "-S", "-c", f"import time\n{source}"]
            order = processes.Order(argv=limited, timeout_seconds=3)
            async with processes.start(open_, order) as process:
                if source is escape:
                    await processes.run(open_, shell("sleep 1", user="root"))
                    await processes.signal(open_, process.name, "KILL", descendants=True)
                    await process.exit()
                else:
                    assert (await process.exit()).timed_out
        # That of ps itself, and of the next program; agentd removes the others when all in them have ended.
        while (await processes.run(open_, shell(LEFT, user="root"))).stdout not in (b"1\n", b"2\n"):
            pass

    with_files(guest, work)


def test_out_of_memory_of_one_program(guest: Guest) -> None:
    async def work(open_: Open) -> None:
        source = "x = []\nwhile True: x.append(bytearray(8 << 20))"
        done = await processes.run(open_, processes.Order(argv=["python3", "-S", "-c", source]))
        assert (done.ended.signal, done.ended.oom) == (9, True)
        done = await processes.run(open_, shell("kill -9 $$"))
        assert (done.ended.signal, done.ended.oom) == (9, False)

    with_files(guest, work)


def test_frozen_is_all_that_anybody_started(guest: Guest) -> None:
    """By `exec`, left behind by it, by ssh; and the guest takes a new identity while they stand still."""
    count = "n=0; until [ -e /work/stop ]; do n=$((n+1)); echo $n > /work/{0}; done"

    async def counts() -> list[bytes | None]:
        return [
            await guest.channel.get(f"/work/{name}", limit_bytes=100) for name in ("held", "left", "ssh", "grouped")
        ]

    async def work(open_: Open) -> None:
        known = asyncssh.import_known_hosts(f"{guest.address} {HOST_KEY.export_public_key().decode()}")
        async with (
            asyncssh.connect(
                guest.address, username="root", client_keys=[USER_KEY], known_hosts=known, config=None, login_timeout=60
            ) as ssh,
            ssh.create_process(count.format("ssh")),
            processes.start(open_, shell(count.format("held"), process="held")),
        ):
            await processes.run(open_, shell(f"({count.format('left')}) > /dev/null 2>&1 &", process="left"))
            own = f"mkdir /sys/fs/cgroup/own; echo $$ > /sys/fs/cgroup/own/cgroup.procs; {count.format('grouped')}"
            await processes.run(open_, shell(f"sh -c '{own}' > /dev/null 2>&1 &", process="grouped", user="root"))
            while None in await counts():
                pass
            await processes.freeze(guest.channel.converse)
            before = await counts()
            renewed = await guest.channel.renew(IDENTITY)
            assert renewed.generation == IDENTITY.generation
            assert await counts() == before
            await processes.thaw(guest.channel.converse)
            while any(new in (b"", old) for new, old in zip(await counts(), before, strict=True)):
                pass
            ours = await processes.run(open_, shell("wc -l < /sys/fs/cgroup/own/cgroup.procs"))
            assert int(ours.stdout) >= 1, "it is in the group that it made"
            for name in ("held", "left"):
                await processes.signal(open_, name, "KILL", descendants=True)
            await guest.channel.put({"stop": b""}, dest="/work")
        await processes.run(open_, shell("until rmdir /sys/fs/cgroup/own 2> /dev/null; do :; done", user="root"))
        left = await processes.run(open_, shell(LEFT, user="root"))
        assert left.stdout in (b"2\n", b"3\n")  # and that of what agentd did not start

    with_files(guest, work)


# --- files and ports --------------------------------------------------------------------------------------------------


def test_file_operations_have_the_rights_of_their_user(guest: Guest) -> None:
    async def work(open_: Open) -> None:
        await files.write(open_, "/work/mine", b"1")
        mine = await files.stat(open_, "/work/mine")
        assert (mine.uid, mine.gid, mine.mode) == (1000, 1000, 0o644)
        await files.write(open_, "/run/roots", b"secret", user="root", mode=0o640)
        assert await files.read_bytes(open_, "/run/roots", user="root") == b"secret"
        with pytest.raises(UsageError, match="no such user"):
            await files.stat(open_, "/work", user="nobody")
        guest_link = "/work/link"
        await files.write(open_, "/work/main.py", f"import os; os.symlink('/run', '{guest_link}')".encode())
        ended = await guest.channel.run(["/work/main.py"], warm=True, timeout_seconds=120)
        assert ended.code == 0
        for path in ("/run/roots", f"{guest_link}/roots", "/etc/shadow", "/proc/1/environ", "/proc/self/mem"):
            with pytest.raises(Conflict, match="Permission denied"):
                await files.read_bytes(open_, path)
        for forbidden in (
            files.write(open_, "/etc/x", b""),
            files.write(open_, f"{guest_link}/roots", b""),
            files.write(open_, "/work/x", b"", owner="root"),
            files.move(open_, "/run/roots", "/run/others"),
            files.remove(open_, "/run/roots"),
            files.make_dir(open_, "/etc/x"),
            trees.unpack(open_, "/etc", tarfile.TarInfo("x").tobuf() + bytes(1024)),
            files.list_dir(open_, "/root"),
        ):
            with pytest.raises(Conflict, match=r"Permission denied|not permitted|Read-only"):
                await forbidden
        with pytest.raises(Conflict, match="Permission denied"):
            async with files.watch(open_, "/root"):
                pass
        # The same thread is root again for what comes next.
        assert (await files.stat(open_, "/etc/shadow", user="root")).uid == 0
        await files.write(open_, "/root/given", b"", user="root", owner="agent")
        assert (await files.stat(open_, "/root/given", user="root")).uid == 1000
        await files.write(open_, "/work/mine", b"2", user="root")
        assert (await files.stat(open_, "/work/mine")).uid == 1000
        assert not await files.exists(open_, "/work/x")
        left_out: list[str] = []
        async for _ in trees.pack(open_, "/run", left_out=left_out):
            pass
        assert "Permission denied" in left_out[0] or "it is a" in left_out[0]

    with_files(guest, work)


def test_names_of_any_bytes_and_a_full_disk(guest: Guest) -> None:
    async def work(open_: Open) -> None:
        names = [os.fsdecode(b"\xff\xfe\n"), "é", "a\nb"]
        for name in names:
            await files.write(open_, f"odd/{name}", b"", parents=True)
        assert {one.name for one in (await files.list_dir(open_, "odd")).entries} == set(names)
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            while True:
                sent += 1
                yield bytes(1 << 20)

        with pytest.raises(NoSpace, match="No space left"):
            await files.write(open_, "/run/much", endless(), user="root")  # 16 MB, in memory
        assert sent < 200
        assert not [one for one in (await files.list_dir(open_, "/run")).entries if one.name.startswith(".swarm")]

    with_files(guest, work)


def test_a_port_of_a_program_in_the_guest(guest: Guest) -> None:
    source = b"""
import socket
with socket.create_server(("127.0.0.1", 8000)) as server:
    print("ready", flush=True)
    for _ in range(2):
        with server.accept()[0] as sock:
            while data := sock.recv(65536):
                sock.sendall(data.upper())
"""

    async def work(open_: Open) -> None:
        await files.write(open_, "/work/server.py", source)
        order = processes.Order(argv=["/usr/bin/python3", "-I", "-S", "/work/server.py"])
        async with processes.start(open_, order) as server:
            assert await anext(aiter(server)) == ("stdout", b"ready\n")
            async with ports.forward(open_, 8000) as port:
                for text in (b"x" * 200_000, b"y"):
                    reader, writer = await asyncio.open_connection(ports.HOST, port)
                    writer.write(text)
                    writer.write_eof()
                    assert await reader.read(-1) == text.upper()
                    writer.close()
                    await writer.wait_closed()
            assert (await server.exit()).code == 0

    with_files(guest, work)


def test_what_others_expect_of_a_sandbox(guest: Guest) -> None:
    async def work(open_: Open) -> None:
        for case in CASES:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await case(open_, True)

    with_files(guest, work)


def with_files(guest: Guest, work: Callable[[Open], Coroutine[Any, Any, None]]) -> None:
    async def connected() -> None:
        connections = Connections(Endpoint(host=guest.address, port=AGENTD_PORT), IDENTITY.token)
        try:
            await work(connections.open)
        finally:
            await connections.close()

    guest.do(asyncio.wait_for(connected(), 300))
