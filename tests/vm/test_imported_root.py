"""The root of an imported image, as agents see it: in a VM restored from a template."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from swarm.app import wiring
from swarm.base.clock import Timeline
from swarm.channel import Exit, processes
from swarm.channel import Guest as Connections
from swarm.channel import guest_files as files
from swarm.channel.processes import Order
from swarm.config import Settings
from swarm.errors import AgentFailed, AgentTimeout, BootFailed, Conflict, GuestRefused, NotFound
from swarm.vm.driver import Image, Layer, VmSpec
from swarm.vm.launcher import Assignment, Launcher, LiveVm
from swarm.vm.pool import Pool
from swarm.vm.snapshots import Snapshots
from swarm.vm.warmup import told_to_guest
from tests.vm.roots_here import BAD_PYTHONS, Roots

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

    def run(
        self, *argv: str, cwd: str = "/work", timeout_seconds: float = 60, env: Mapping[str, str] | None = None
    ) -> tuple[Exit, str]:
        out = bytearray()

        async def work() -> Exit:
            return await self.live.channel.run(
                argv, cwd=cwd, env=env, timeout_seconds=timeout_seconds, on_output=lambda _, data: out.extend(data)
            )

        return self.loop.run(work()), out.decode(errors="replace")

    def said(self, *argv: str, **more: Any) -> str:
        ended, out = self.run(*argv, **more)
        assert ended.code == 0, (ended, out)
        assert ended.clean
        return out


def guest(
    loop: asyncio.Runner, launcher: Launcher, image: Image, layer: Layer, preload: tuple[str, ...] | None = None
) -> Iterator[Guest]:
    """With ``preload``, its Python waits for the agent."""
    waits = preload is not None
    spec = VmSpec(
        image=image, layer=layer, memory_mb=256, disk_mb=1024, interpreter=waits, preload=preload if preload else ()
    )
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


@pytest.fixture(scope="module")
def its_python(loop: asyncio.Runner, roots: Roots) -> Layer:
    return loop.run(roots.python(env={"WHO": "python"}, user=(1234, 1234, (77,), "/home/me")))


@pytest.fixture(scope="module")
def python(loop: asyncio.Runner, launcher: Launcher, image: Image, its_python: Layer) -> Iterator[Guest]:
    yield from guest(loop, launcher, image, its_python, preload=("mine",))


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


# --- its own Python, which waits for the agent ------------------------------------------------------------------------

PYTHON = "/usr/bin/python3"
# All that a program can see of how it was started, and whether it was by an interpreter that waited.
LOOK = """
import sys
waited = "mine" in sys.modules
import json, os, re, resource, signal
def lines(path, wanted):
    return re.findall(f"^(?:{wanted}):.*", open(path).read(), re.M)
seen = {
    "words": [sys.argv, sys.orig_argv, sys.path, sys.executable, str(sys.flags), sys.warnoptions, sys._xoptions],
    "main": sorted((name, str(value)) for name, value in globals().items() if name[0] == "_" and name != "__loader__"),
    "loader": [__loader__.name, __loader__.path, __import__("__main__").__dict__ is globals(), sys.dont_write_bytecode],
    "place": [os.getcwd(), os.umask(0o22), os.readlink("/proc/self/root")],
    "environment": dict(os.environ),
    "user": [os.getresuid(), os.getresgid(), os.getgroups()],
    "limits": [resource.getrlimit(number) for number in range(16)],
    "process": [os.getppid(), os.getsid(0) == os.getpgrp() == os.getpid(), os.nice(0), os.sched_getscheduler(0)],
    "memory": open("/proc/self/oom_score_adj").read(),
    "signals": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
    "kernel": lines("/proc/self/status", "Sig...|ShdPnd|Cap...|NoNewPrivs|Seccomp.*|Threads|Groups|Cpus_allowed"),
    "spaces": sorted(os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")),
    "group": open("/proc/self/cgroup").read(),
    "files": sorted((fd, re.sub("[0-9]", "", os.readlink(f"/proc/self/fd/{fd}"))) for fd in "012"),
    "open": len(os.listdir("/proc/self/fd")),
    "streams": [(s.encoding, s.errors, s.line_buffering, s.name, s.mode, s.isatty()) for s in
                (sys.stdin, sys.stdout, sys.stderr)],
    "read": [sys.stdin.seekable(), sys.stdin.read()],
}
print(json.dumps([waited, seen]))
"""


def put(python: Guest, **programs: str) -> None:
    files_ = {f"{name}.py": text.encode() for name, text in programs.items()}
    python.loop.run(python.live.channel.put(files_, dest="/agent", owner="root"))


def look(python: Guest, program: str = PYTHON, **more: Any) -> tuple[bool, dict[str, object]]:
    waited, seen = json.loads(python.said(program, "/agent/look.py", "an argument", "é\n$x", **more))
    return waited, seen


def wait_again(guest: Guest, **interpreter: object) -> Mapping[str, str]:
    """Have another interpreter wait; returns which of its preloads failed."""
    live = guest.live
    guest.said("/bin/busybox", "true")  # in place of the one that waits now
    told: dict[str, Any] = told_to_guest(live.spec) or {}
    told["interpreter"] |= interpreter
    guest.loop.run(live.channel.renew(live.identity, image=told))
    return guest.loop.run(live.channel.hello()).preload_failed


def test_an_interpreter_that_waited_starts_a_program_as_a_new_one_does(python: Guest) -> None:
    put(python, look=LOOK)
    env = {"MORE": "é\udcff", "TRACEPARENT": "1", "WHO": "the agent's"}
    waited, warm = look(python, env=env)
    assert waited
    waited, cold = look(python, env=env)  # an agent is a VM's first, so none waits for the second
    assert not waited
    assert warm == cold
    assert cold["user"] == [[1234] * 3, [1234] * 3, [77, 1234]]
    assert cold["environment"]["WHO"] == "the agent's"  # type: ignore[index]


def test_it_ends_as_any_program(python: Guest) -> None:
    script = """
import atexit, mine, os, subprocess, sys
atexit.register(print, "bye", mine.loaded_by == os.getpid())
subprocess.Popen(["/bin/busybox", "sleep", "1000"], start_new_session=True)
open("/work/output.json", "w").write("{}")
"""
    put(python, end=script, status=f"{script}sys.exit(7)", error=f"{script}1 / 0", aborts="import os; os.abort()",
        hang="import time\ndef here():\n    while True: time.sleep(1)\nhere()")  # fmt: skip
    told = {}
    for name in ("end", "status", "error", "aborts"):
        assert wait_again(python) == {}
        told[name] = python.run(PYTHON, f"/agent/{name}.py")
    assert [(ended.code, ended.signal) for ended, _ in told.values()] == [(0, None), (7, None), (1, None), (None, 6)]
    assert all(ended.clean for ended, _ in told.values())
    assert [told[name][1] for name in ("end", "status")] == ["bye True\n"] * 2
    error = 'Traceback (most recent call last):\n  File "/agent/error.py", line 6, in <module>\n'
    assert told["error"][1].startswith(error)
    assert "ZeroDivisionError" in told["error"][1]
    wait_again(python)
    with pytest.raises(AgentTimeout, match="longer than 2 s"):
        python.run(PYTHON, "/agent/hang.py", timeout_seconds=2)
    assert "sleep" not in python.said("/bin/busybox", "ps")


@pytest.mark.parametrize(
    ("argv", "env"),
    [
        ([PYTHON, "-B", "/agent/look.py"], {}),
        (["/usr/bin/python3.11", "/agent/look.py"], {}),
        ([PYTHON, "/agent/look.py"], {"PYTHONHASHSEED": "1"}),
        ([PYTHON, "/agent/look.py"], {"HOME": "/work"}),
    ],
)
def test_what_one_that_waited_can_not_do_starts_another(python: Guest, argv: list[str], env: dict[str, str]) -> None:
    put(python, look=LOOK)
    wait_again(python)
    assert json.loads(python.said(*argv, env=env))[0] is False


def test_a_file_that_is_not_there(python: Guest) -> None:
    wait_again(python)
    ended, out = python.run(PYTHON, "/agent/none.py")
    assert (ended.code, out) == (
        2,
        f"{PYTHON}: can't open file '/agent/none.py': [Errno 2] No such file or directory\n",
    )


def test_what_it_can_not_import_is_named(python: Guest) -> None:
    assert wait_again(python, preload=["refuses", "mine", "quits", "nowhere.at_all"]) == {
        "refuses": "RuntimeError: not here",
        "quits": "SystemExit: enough",
        "nowhere.at_all": "ModuleNotFoundError: No module named 'nowhere'",
    }
    failed = wait_again(python, preload=["hangs"], seconds=2)
    assert failed == {PYTHON: "it had not imported them in 2 s: timed out"}


def test_a_template_with_what_can_not_be_imported(python: Guest, launcher: Launcher) -> None:
    spec = replace(python.live.spec, preload=("refuses",))
    with pytest.raises(BootFailed, match=r"preloads of the agent's manifest can't be imported: refuses: Run.*not here"):
        python.loop.run(launcher.template(spec))


@pytest.mark.parametrize("name", BAD_PYTHONS)
def test_a_python_that_does_not_wait_runs_a_program_all_the_same(python: Guest, name: str) -> None:
    put(python, look=LOOK)
    wait_again(python, python=f"/bad/{name}", preload=[], seconds=2)
    guest = python.live.channel.converse

    async def none_is_left() -> None:
        while True:
            with contextlib.suppress(GuestRefused):  # at its end all that runs is killed, this too
                done = await processes.run(guest, Order(argv=["/bin/busybox", "ps"], user="root"))
                if done.ended.code == 0 and b"/bad/" not in done.stdout:
                    return

    if name == "runs-nothing":  # nobody can know
        with pytest.raises(AgentTimeout):
            python.run(f"/bad/{name}", "/agent/look.py", timeout_seconds=2)
    else:
        python.loop.run(none_is_left())
    waited, seen = look(python, f"/bad/{name}")
    assert not waited
    assert seen["open"] == 4


async def draws(launcher: Launcher, spec: VmSpec) -> list[str]:
    """What the interpreter that waits in a clone draws by lot."""
    program = (
        b"import sys; assert 'mine' in sys.modules; import random, tempfile; print(random.random(), tempfile.mktemp())"
    )
    out = bytearray()
    async with launcher.vm(spec, Assignment(), Timeline()) as live:
        await live.channel.put({"draw.py": program}, dest="/agent", owner="root")
        argv = [PYTHON, "/agent/draw.py"]
        await live.channel.run(argv, timeout_seconds=60, on_output=lambda _, data: out.extend(data))
    return out.decode().split()


def test_two_clones_share_no_random_numbers(python: Guest, launcher: Launcher) -> None:
    one, other = (python.loop.run(draws(launcher, python.live.spec)) for _ in range(2))
    assert (len(one), len(other), len({*one, *other})) == (2, 2, 4)


def test_one_waits_in_a_vm_of_the_pool_too(python: Guest, launcher: Launcher) -> None:
    async def work() -> None:
        async with Pool(launcher, warm=1, specs=[python.live.spec]) as pool:
            await pool.filled()
            assert len(await draws(launcher, python.live.spec)) == 2
            assert pool.hits == 1

    python.loop.run(work())
