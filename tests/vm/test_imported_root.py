"""The root of an imported image, as agents see it: in a VM restored from a template."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from swarm.app import wiring
from swarm.base.clock import Timeline
from swarm.channel import Exit, processes
from swarm.channel import Guest as Connections
from swarm.channel import guest_files as files
from swarm.channel.processes import Order
from swarm.config import Settings
from swarm.errors import AgentFailed, AgentTimeout, Conflict, NotFound
from swarm.vm.driver import Image, Layer, VmSpec
from swarm.vm.launcher import Assignment, Launcher, LiveVm
from swarm.vm.snapshots import Snapshots
from tests.vm.roots_here import Roots

pytestmark = pytest.mark.needs("qemu")


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def roots(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Roots:
    return Roots(tmp_path_factory.mktemp("roots"), image)


@pytest.fixture(scope="module")
def launcher(settings: Settings, loop: asyncio.Runner) -> Launcher:
    return wiring.launcher(settings, loop.run(wiring.choice(settings)))


@pytest.fixture(scope="module")
def snapshots(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Snapshots:
    return wiring.snapshots(settings.model_copy(update={"snapshots_dir": tmp_path_factory.mktemp("snapshots")}))


@dataclass(kw_only=True)
class Guest:
    loop: asyncio.Runner
    live: LiveVm

    def run(self, *argv: str, cwd: str = "/work", timeout_seconds: float = 60) -> tuple[Exit, str]:
        out = bytearray()

        async def work() -> Exit:
            return await self.live.channel.run(
                argv, cwd=cwd, timeout_seconds=timeout_seconds, on_output=lambda _, data: out.extend(data)
            )

        return self.loop.run(work()), out.decode(errors="replace")

    def said(self, *argv: str, cwd: str = "/work", timeout_seconds: float = 60) -> str:
        ended, out = self.run(*argv, cwd=cwd, timeout_seconds=timeout_seconds)
        assert ended.code == 0, (ended, out)
        assert ended.clean
        return out


def guest(loop: asyncio.Runner, launcher: Launcher, image: Image, layer: Layer) -> Iterator[Guest]:
    spec = VmSpec(image=image, layer=layer, memory_mb=256, disk_mb=1024)
    context = launcher.vm(spec, Assignment(), Timeline())
    yield Guest(loop=loop, live=loop.run(context.__aenter__()))
    loop.run(context.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def bare(loop: asyncio.Runner, launcher: Launcher, image: Image, roots: Roots) -> Iterator[Guest]:
    yield from guest(loop, launcher, image, loop.run(roots.static(env={"WHO": "bare"})))


@pytest.fixture(scope="module")
def small(loop: asyncio.Runner, launcher: Launcher, image: Image, roots: Roots) -> Iterator[Guest]:
    layer = loop.run(roots.dynamic(env={"WHO": "small", "PATH": "/bin:/usr/bin"}, user=(1234, 1234, (77,), "/home/me")))
    yield from guest(loop, launcher, image, layer)


BOX = "/busybox"


def test_a_static_program_alone(bare: Guest) -> None:
    shown = bare.said(BOX, "ls", "-A", "/").split()
    assert sorted(shown) == ["agent", "busybox", "dev", "etc", "proc", "sys", "tmp", "work"]
    assert bare.said(BOX, "cat", "/etc/hosts").startswith("127.0.0.1 localhost\n")
    env = bare.said(BOX, "env").split("\n")
    assert {"WHO=bare", "HOME=/root", "SWARM_WORK=/work"} <= {*env}
    assert not any(line.startswith(("USER=", "LOGNAME=")) for line in env)


def test_root_of_an_image_can_neither_see_nor_end_what_runs_it(bare: Guest) -> None:
    before = bare.live.renewed.boot_id
    assert bare.said(BOX, "id", "-u") == "0\n"
    numbers = [int(name) for name in bare.said(BOX, "ls", "/proc").split() if name.isdigit()]
    assert len(numbers) == 2, "the first process, and itself"
    assert bare.said(BOX, "ls", "/proc/1/root/").split() == bare.said(BOX, "ls", "/").split()
    for order in ("-9 -1", "-9 1", "-TERM 1", "-ABRT 1"):
        bare.run(BOX, "kill", *order.split())  # there is nobody to kill, or it does nothing
    assert bare.loop.run(bare.live.channel.hello()).boot_id == before


def test_more_than_memory_holds_is_written_to_the_root(bare: Guest) -> None:
    script = f"{BOX} dd if=/dev/zero of=/big bs=1M count=400 2>/dev/null && {BOX} stat -c %s /big && {BOX} rm /big"
    assert bare.said(BOX, "sh", "-c", script, timeout_seconds=300.0) == f"{400 << 20}\n"


def test_a_dynamic_program_as_the_images_user(small: Guest) -> None:
    small.loop.run(small.live.channel.put({"words": b"b\na\n"}, dest="/work"))
    assert small.said("sort", "words") == "a\nb\n", "found by the image's PATH, with the image's loader, in /work"
    said = small.said("sh", "-c", "id; echo $HOME; pwd; cat /etc/mine; echo $0 $WHO", cwd="/home/me")
    assert said.split("\n") == [
        "uid=1234(me) gid=1234 groups=77,1234",
        "/home/me",
        "/home/me",
        "the image's",
        "sh small",
        "",
    ]
    assert small.said("sudo-sort", "/etc/secret") == "root's\n", "a set-id program is one"


def test_nothing_of_the_guests_own_files_is_seen(small: Guest) -> None:
    gone = ("/usr/lib/swarm", "/swarm", "/sbin/swarm-init", "/usr/bin/python3", "/etc/ssh", "/mnt")
    for path in gone:
        with pytest.raises(NotFound):
            small.loop.run(files.stat(small.live.channel.converse, path, user="root"))
    ended, out = small.run("ls", "/proc/1/root/")
    assert ended.code == 1
    assert "Permission denied" in out
    # Its link was replaced, not followed.
    assert small.said("stat", "-c", "%F %u", "/work").split("\n")[0] == "directory 1234"
    assert small.said("cat", "/etc/resolv.conf") == ""


def test_files_go_in_and_out(small: Guest) -> None:
    small.loop.run(small.live.channel.put({"in/a": b"one"}, dest="/work"))
    ended, out = small.run("sh", "-c", "cat in/a > out/b; cat in/a > output.json; ls -ln in/a; echo > /agent/x || true")
    assert ended.out
    assert "1234     1234" in out
    assert "/agent/x: Permission denied" in out
    assert small.loop.run(small.live.channel.get("/work/output.json", limit_bytes=10)) == b"one"


def test_ends_are_told_as_ever(small: Guest) -> None:
    assert small.run("sh", "-c", "exit 7")[0].code == 7
    assert small.run("sh", "-c", "kill -KILL $$")[0].signal == 9
    with pytest.raises(AgentFailed, match="No such file or directory"):
        small.run("/usr/bin/python3")
    with pytest.raises(AgentTimeout, match="longer than 2 s"):
        small.run("sleep", "1000", timeout_seconds=2)


def test_nothing_outlives_an_agent(small: Guest) -> None:
    ended, _ = small.run("sh", "-c", "for n in 1 2 3; do setsid sleep 1000 & done; sudo-sort /etc/secret")
    assert (ended.code, ended.clean) == (0, True)
    assert "sleep" not in small.said("ps")


def test_programs_and_files_of_a_sandbox(small: Guest) -> None:
    async def work() -> None:
        guest = small.live.channel.converse
        for _ in range(2):  # in the next agent's process, then in that of the next program
            done = await processes.run(guest, Order(argv=["sh", "-c", "id -u; pwd; cat /etc/mine"]))
            assert done.stdout == b"1234\n/work\nthe image's\n"
        done = await processes.run(guest, Order(argv=["sh", "-c", "id -u; pwd; ls /proc/1/root/"], user="root"))
        assert done.stdout.startswith(b"0\n/\nagent\n")
        done = await processes.run(guest, Order(argv=["sh", "-c", "ls -l /proc/self/fd/0"], pty=(80, 24)))
        assert b"/dev/pts/" in done.stdout
        done = await processes.run(guest, Order(argv=["sh", "-c", "sleep 1000 & sleep 1000"], timeout_seconds=2))
        assert done.ended.timed_out
        assert b"sleep" not in (await processes.run(guest, Order(argv=["ps"]))).stdout

        assert await files.read_bytes(guest, "/etc/mine") == b"the image's\n"
        await files.write(guest, "/home/me/x", b"mine", user="root")
        assert (await files.stat(guest, "/home/me/x")).uid == 0
        assert {one.name for one in (await files.list_dir(guest, "/home/me")).entries} == {"x"}
        with pytest.raises(Conflict):
            await files.remove(guest, "/home/me/x")
        await files.remove(guest, "/home/me/x", user="root")
        assert b"localhost" in await files.read_bytes(guest, "/etc/hosts")

    small.loop.run(work())


def test_files_by_a_thread_that_has_started_another(small: Guest) -> None:
    """That one follows a program for as long as it runs; whoever connects next may be served by the first."""

    async def work() -> None:
        live = small.live
        order = Order(argv=["sleep", "1000"], background=True, process="stays")
        beside = Connections(live.vm.endpoint, live.identity.token)
        async with processes.start(beside.open, order) as stays:
            await stays.started()
        await beside.close()
        for _ in range(8):
            beside = Connections(live.vm.endpoint, live.identity.token)
            await files.write(beside.open, "/etc/after", b"started", user="root")
            assert await files.read_bytes(beside.open, "/etc/after") == b"started"
            await beside.close()
        await processes.signal(live.channel.converse, "stays", "KILL", descendants=True)

    small.loop.run(work())


def test_a_fork_goes_on_with_the_root_as_it_was(small: Guest, launcher: Launcher, snapshots: Snapshots) -> None:
    async def work() -> None:
        live = small.live
        background = Order(argv=["sh", "-c", "while sleep 1; do :; done"], background=True, process="loop")
        beside = Connections(live.vm.endpoint, live.identity.token)
        async with processes.start(beside.open, background) as loop_:
            await loop_.started()
        await files.write(live.channel.converse, "/etc/new", b"written", user="root")
        async with snapshots.stage() as stage:
            saved = await launcher.save(live, stage)
        async with launcher.restored(saved, Assignment(), Timeline(), fork=True) as fork:
            guest = fork.channel.converse
            assert await files.read_bytes(guest, "/etc/new") == b"written"
            order = Order(argv=["sh", "-c", "cat /etc/new /etc/hostname; echo > /work/in-fork"])
            done = await processes.run(guest, order)
            assert done.stdout.decode() == f"written{fork.identity.hostname}\n"
            assert [one.ended for one in await processes.processes(guest) if one.process == "loop"] == [None]
            assert (await fork.channel.run(["true"], timeout_seconds=60)).code == 0
        with pytest.raises(NotFound):
            await files.stat(live.channel.converse, "/work/in-fork")
        await processes.signal(live.channel.converse, "loop", "KILL", descendants=True)
        await beside.close()

    small.loop.run(work())


def test_a_cold_boot(loop: asyncio.Runner, settings: Settings, image: Image, roots: Roots) -> None:
    cold = wiring.launcher(settings, loop.run(wiring.choice(settings)), clones=False)
    layer = loop.run(roots.static("cold", user=(1000, 1000, (), "/")))
    for one in guest(loop, cold, image, layer):
        assert one.said(BOX, "id") == "uid=1000 gid=1000 groups=1000\n"
        assert one.said(BOX, "ls", "/work") == "out\n"
