"""Running programs: every way to end, what they may leave behind, the warm interpreter's likeness to python3."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from swarm.base import process
from swarm.channel import Channel
from swarm.errors import AgentTimeout, ChannelError
from swarm.vm.drivers.process import AGENTD
from tests.base.test_priority import AUTOGROUP, nice_of
from tests.channel.agentd_here import Guest, raw, running
from tests.conftest import PATIENCE_SECONDS

INTERPRETER = AGENTD.with_name("interpreter.py")
PYTHON = os.path.realpath(sys.executable)  # the guest's own /work may hide where this repository is


@pytest.fixture
async def guest(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    async with running(tmp_path_factory.mktemp("g")) as it:
        yield it


def alive(pid: int | bytes) -> bool:
    return process.start_time(int(pid)) is not None


# --- as python3 would -----------------------------------------------------------------------------------------------

LIKE_PYTHON = {
    "end": "print('out', 1)",
    "exit 3": "import sys; sys.exit(3)",
    "exit 300": "import sys; sys.exit(300)",
    "exit -1": "import sys; sys.exit(-1)",
    "exit none": "raise SystemExit",
    "exit text": "import sys; sys.exit('gone wrong')",
    "os._exit": "import os; print('lost'); os._exit(7)",
    "exception": "def f():\n    raise ValueError('what')\nf()",
    "exception chain": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise RuntimeError('é') from e",
    "exception group": "raise ExceptionGroup('many', [ValueError(1), TypeError(2)])",
    "syntax error": "x = = 1",
    "no utf-8": "# \\xff\nprint('x')",
    "interrupt": "raise KeyboardInterrupt",
    "signal": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "abort": "import os; os.abort()",
    "recursion": "import sys; sys.tracebacklimit = 0\ndef f(): f()\nf()",
    "own hook": "import sys; sys.excepthook = lambda t, e, b: print('hook', t, e, b.tb_lineno); 1 / 0",
    "broken hook": "import sys\ndef hook(*a): print(1, file=sys.stderr); sys.exit(9)\nsys.excepthook = hook\n1 / 0",
    "atexit": "import atexit; atexit.register(print, 'bye'); print('hello')",
    "thread": """
        import threading
        threading.Thread(target=lambda: print('in thread', __name__)).start()
    """,
    "late thread": """
        import threading
        go = threading.Event()
        def work():
            go.wait(); import __main__; print(__main__.value, value)
        threading.Thread(target=work).start()
        value = 5
        threading.main_thread()
        import atexit; threading._register_atexit(go.set)
    """,
    "daemon thread": "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()",
    "open file": "f = open('left-open.txt', 'w'); f.write('flushed at exit')",
    "closed stdout": "import sys; sys.stdout.close(); sys.exit(4)",
    "broken flush": "import os, sys; sys.stdout.write('x'); os.close(1)",
    "main": "print(__name__, __file__ == __import__('sys').argv[0], __doc__, __spec__, __package__, __annotations__)",
    "names": "print(sorted(globals()))",
    "annotations": "x: int = 1\nprint(__annotations__)",
    "future": "print(1 if 'annotations' in dir() else 2); x: y = 3",
    "pickle": """
        import pickle
        class C: pass
        print(type(pickle.loads(pickle.dumps(C()))) is C)
    """,
    "dataclass": """
        from dataclasses import dataclass
        @dataclass
        class C:
            x: 'int'
        print(C(1))
    """,
    "argv and path": "import sys; print(sys.argv[1:], sys.path[0] == __file__.rpartition('/')[0])",
    "streams": """
        import sys
        for s in (sys.stdin, sys.stdout, sys.stderr):
            print(s.name, s.encoding, s.errors, s.newlines, s.mode, s.fileno(), s.buffer.mode)
    """,
    "stdin": "import sys; print(repr(sys.stdin.read()), sys.stdin.isatty())",
    "signals": "import signal; print([signal.getsignal(s) for s in (2, 13, 15, 17)])",
    "fork": "import os\nif os.fork() == 0: print('child'); os._exit(0)\nos.wait(); print('parent')",
    "subprocess": "import subprocess; print(subprocess.run(['sh', '-c', 'trap'], capture_output=True))",
    "multiprocessing": """
        import multiprocessing
        def double(x): return 2 * x
        if __name__ == '__main__':
            with multiprocessing.get_context('fork').Pool(2) as pool: print(pool.map(double, [1, 2]))
    """,
    "asyncio": "import asyncio\nasync def f(): return 3\nprint(asyncio.run(f()))",
    "site": "print(exit, len(__import__('sys').modules) > 5)",
}  # fmt: skip


@pytest.mark.parametrize("source", LIKE_PYTHON.values(), ids=LIKE_PYTHON.keys())
async def test_a_warm_agent_behaves_as_under_python3(guest: Guest, source: str) -> None:
    source = textwrap.dedent(source)
    ended = await guest.python(source, "an argument", "é\n$x")
    env = {"PATH": "/usr/bin:/bin", "HOME": str(guest.work), "LANG": "C.UTF-8", "PYTHONFAULTHANDLER": "1"}
    unbuffered = ["-u"] if source.startswith(("import os; print('lost')", "import os\nif os.fork()")) else []
    argv = [PYTHON, "-B", *unbuffered, str(guest.agent / "main.py"), "an argument", "é\n$x"]
    cold = await asyncio.to_thread(
        subprocess.run, argv, cwd=guest.work, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    code = ended.code if ended.signal is None else -ended.signal
    assert (code, guest.output["stdout"]) == (cold.returncode, cold.stdout)
    # Frames, of agentd and what starts it; a thread's number.
    ours = re.compile(rb'  File "(?:[^"]*(?:agentd|interpreter).py|<string>)", line \d+ in \S+\n|0x[0-9a-f]{16}')
    assert ours.sub(b"", guest.output["stderr"].replace(b"\r", b"")) == ours.sub(b"", cold.stderr)
    if "left-open" in source:
        assert (guest.work / "left-open.txt").read_text() == "flushed at exit"
    waited = await asyncio.to_thread(waiting_python, argv, env, cwd=guest.work)
    assert (waited.returncode, waited.stdout) == (cold.returncode, cold.stdout)
    ours = re.compile(rb'  File "<string>", line \d+ in (?:run|wait|<module>)\n|0x[0-9a-f]{16}')
    assert ours.sub(b"", waited.stderr) == ours.sub(b"", cold.stderr)


def waiting_python(argv: list[str], env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a file by an interpreter that waits for it, as agentd does with the Python of an imported image."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    at = next(number for number, word in enumerate(argv) if word.startswith("/") and number)
    fd = theirs.fileno()
    command = [*argv[:at], "-c", f'exec(__import__("os").read({fd}, 1 << 18), {{}})']
    with ours, subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(fd,)
    ) as child:  # fmt: skip
        theirs.close()
        ours.send(INTERPRETER.read_bytes() + f"\nwait({fd}, ['json', 'threading', 'no_such'], ['nowhere'])".encode())
        assert ours.recv(1000) == b"ready\nnowhere: ModuleNotFoundError: No module named 'nowhere'"
        words = [word.encode() for word in (argv[0], *argv[at:])]
        ours.send(repr((words, {b"MORE": b"1"}, bytes(cwd))).encode())
        out, err = child.communicate()
        return subprocess.CompletedProcess(command, child.returncode, out, err)


def test_an_images_python_may_be_as_old_as_3_8() -> None:
    ast.parse(INTERPRETER.read_text(), feature_version=(3, 8))


async def test_modules_beside_the_entry_are_found(guest: Guest) -> None:
    await guest.channel.put({"helper.py": b"value = 42"}, dest="/agent", owner="root")
    assert (await guest.python("import helper; print(helper.value)")).code == 0
    assert guest.output["stdout"] == b"42\n"


async def test_pythonpath_is_followed_behind_the_agents_own_files(guest: Guest, tmp_path: Path) -> None:
    """As `python3 file` does: where an agent's requirements are when it runs without a VM."""
    for place, text in ((tmp_path / "one", "ONE"), (tmp_path / "two", "TWO")):
        place.mkdir()
        for name in ("helper", "textwrap", text.lower()):
            (place / f"{name}.py").write_text(f"value = {text!r}\n")
    files = {
        "helper.py": b"value = 'OWN'",
        "main.py": b"import helper, two, sys\nprint(helper.value, two.value, sys.path[1:3])",
    }
    await guest.channel.put(files, dest="/agent", owner="root")
    said = bytearray()
    env = {"PYTHONPATH": f"{tmp_path}/one::{tmp_path}/two"}
    ended = await guest.channel.run(
        ["/agent/main.py"], warm=True, env=env, timeout_seconds=120, on_output=lambda _, data: said.extend(data)
    )
    assert ended.code == 0 and said.decode() == f"OWN TWO {[f'{tmp_path}/one', f'{tmp_path}/two']}\n"


async def test_no_two_forks_share_random_state(tmp_path_factory: pytest.TempPathFactory) -> None:
    source = """
import random, uuid, secrets, ssl, os
print(random.random(), uuid.uuid4(), secrets.token_hex(), ssl.RAND_bytes(9).hex(), os.urandom(9).hex(), sep="|")
"""
    async with running(tmp_path_factory.mktemp("g")) as guest:
        for _ in range(3):
            assert (await guest.python(source)).code == 0
        lines = [line.split(b"|") for line in guest.output["stdout"].splitlines()]
        assert all(len(set(column)) == 3 for column in zip(*lines, strict=True))


async def test_nothing_of_ours_is_inherited(guest: Guest) -> None:
    await guest.python(
        """
        import os, resource
        print(sorted(os.listdir('/proc/self/fd'), key=int)[:-1])  # the last is that of listdir itself
        print(sorted(os.environ))
        print(open('/proc/self/oom_score_adj').read().strip(), resource.getrlimit(resource.RLIMIT_CORE))
        print(os.getsid(0) == os.getpid() == os.getpgid(0), oct(os.umask(0)))
        """.replace("\n        ", "\n"),
        env={"GIVEN": "1"},
    )
    fds, env, limits, session = guest.output["stdout"].decode().splitlines()
    assert fds == "['0', '1', '2']"
    names = "GIVEN HOME LANG LOGNAME PATH PYTHONFAULTHANDLER SWARM_AGENT SWARM_WORK USER"
    assert env == str(names.split())
    assert limits == "500 (0, 0)"
    assert session == "True 0o22"


# --- any program ----------------------------------------------------------------------------------------------------


async def test_hostile_words_arrive_byte_for_byte(guest: Guest) -> None:
    words = ["", " ", "'\"`$(id)`\\", "new\nline", "🐝 é \udcff", "-x", "*", "; rm"]
    ended = await guest.channel.run(
        ["/usr/bin/env", "printf", "%s\\0", *words], env={"X": words[2]}, timeout_seconds=60, on_output=guest.hear
    )
    assert ended.code == 0
    assert guest.output["stdout"] == b"".join(os.fsencode(word) + b"\0" for word in words)
    assert (await guest.sh('test "$X" = "$1"', env={"X": "a\n'\""})).code == 1


async def test_exec_is_clean(guest: Guest) -> None:
    await guest.sh("cat /proc/self/status; pwd; env")
    status = guest.output["stdout"].decode()
    # 32 and 33 are the C library's own: its posix_spawn leaves them ignored, and nobody can change that.
    ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
    assert ignored & ~0x1_8000_0000 == 0
    assert "SigBlk:\t0000000000000000" in status
    assert f"\n{guest.work}\n" in status
    assert "TOKEN" not in status


@pytest.mark.needs("root")  # from others, the kernel takes only ten changes a second
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
async def test_an_agent_has_no_larger_share_of_the_cpus_than_its_vm(guest: Guest, warm: bool) -> None:
    """Each has a session of its own, and the kernel gives a new one a whole share."""
    told = [str(AUTOGROUP)] if AUTOGROUP.exists() else []
    if warm:
        await guest.python(
            "import os, sys; print(os.nice(0), *(open(file).read() for file in sys.argv[1:]), sep=chr(10))", *told
        )
    else:
        await guest.sh(" ".join(["nice; cat", *told, "/dev/null"]))
    nices = [int(line.split()[-1]) for line in guest.output["stdout"].splitlines() if line]
    assert set(nices) == nice_of(guest.vm.pid)


@pytest.mark.parametrize(
    ("script", "code", "number"),
    [("exit 0", 0, None), ("exit 3", 3, None), ("exit 255", 255, None), ("kill -9 $$", None, 9), ("kill $$", None, 15)],
)
async def test_exit(guest: Guest, script: str, code: int | None, number: int | None) -> None:
    ended = await guest.sh(script)
    assert (ended.code, ended.signal, ended.oom, ended.clean) == (code, number, False, True)
    assert ended.received_ns <= ended.started_ns <= ended.ended_ns
    assert ended.started_at <= ended.ended_at
    assert ended.stdout_bytes == ended.stderr_bytes == ended.dropped_bytes == 0


async def test_usage_counts_helpers(guest: Guest) -> None:
    ended = await guest.sh(f"{PYTHON} -c 'x = bytearray(60 << 20); [i*i for i in range(3_000_000)]'")
    assert ended.max_rss_kb > 60 << 10
    assert ended.cpu_ms > 20


async def test_stdin(guest: Guest) -> None:
    data = os.urandom(1 << 20)
    assert (await guest.channel.run(["/bin/cat"], stdin=data, timeout_seconds=60, on_output=guest.hear)).code == 0
    assert guest.output["stdout"] == data


async def test_output_streams_while_it_runs(guest: Guest) -> None:
    """The agent goes on only after its first line was seen here."""
    os.mkfifo(guest.work / "go")
    seen = asyncio.Event()

    def hear(stream: str, data: bytes) -> None:
        guest.hear(stream, data)
        seen.set()

    await guest.channel.put({"main.py": b"print('first'); open('go').read(); print('second')"}, dest="/agent")
    run = asyncio.create_task(
        guest.channel.run(["/agent/main.py"], warm=True, timeout_seconds=60, on_output=hear)
    )  # fmt: skip
    await seen.wait()
    assert guest.output["stdout"] == b"first\n"
    await asyncio.to_thread((guest.work / "go").write_text, "")
    assert (await run).code == 0
    assert guest.output["stdout"] == b"first\nsecond\n"


async def test_one_at_a_time(guest: Guest) -> None:
    async with asyncio.TaskGroup() as group:
        started = asyncio.Event()
        first = group.create_task(
            guest.channel.run(
                ["/bin/sh", "-c", "echo; sleep 1000"], timeout_seconds=120, on_output=lambda *_: started.set()
            )
        )
        await started.wait()
        async with guest.another() as other:
            with pytest.raises(ChannelError, match="already running"):
                await other.run(["/bin/true"], timeout_seconds=60)
            assert await other.kill() is True
        ended = await first
    assert ended.signal == signal.SIGKILL
    async with guest.another() as other:
        assert await other.kill() is False


# --- time -----------------------------------------------------------------------------------------------------------


def patiently(guest: Guest, said: bytes = b"\n") -> Iterator[float]:
    """Longer and longer limits of time for a program, until it has said this: a busy machine is slow to start it."""
    for seconds in (0.2, 1, 6, 30):
        guest.output["stdout"] = b""
        yield seconds
        if said in guest.output["stdout"]:
            return
    raise AssertionError(f"{guest.output} after {seconds} s")


async def test_timeout(guest: Guest) -> None:
    for seconds in patiently(guest):
        with pytest.raises(AgentTimeout, match=rf"ran for longer than {seconds} s"):
            await guest.sh("trap '' TERM INT; echo $$; sleep 1000 & wait", timeout_seconds=seconds)
    assert not alive(guest.output["stdout"])
    assert (await guest.sh("exit 4")).code == 4  # the connection still works


async def test_silence(guest: Guest) -> None:
    for seconds in patiently(guest):
        with pytest.raises(AgentTimeout, match=rf"printed nothing for {seconds} s"):
            await guest.sh("echo $$; sleep 1000", timeout_seconds=600, idle_timeout_seconds=seconds)
    assert not alive(guest.output["stdout"])


HANG = """
import sys, threading, time
def lock_up():
    locked.set()
    while True: time.sleep(0.01)
locked = threading.Event()
threading.Thread(target=lock_up, name="other", daemon=True).start()
def wait_for_ever():
    locked.wait()
    print("here", flush=True)
    threading.Event().wait()
wait_for_ever()
"""


@pytest.mark.parametrize("limit", ["timeout_seconds", "idle_timeout_seconds"])
@pytest.mark.parametrize("warm", [True, False])
async def test_the_stacks_of_what_hangs_are_printed(guest: Guest, warm: bool, limit: str) -> None:
    await guest.channel.put({"main.py": HANG.encode()}, dest="/agent", owner="root")
    argv = ["/agent/main.py"] if warm else [PYTHON, str(guest.agent / "main.py")]
    for seconds in patiently(guest):
        guest.output["stderr"] = b""
        limits = {"timeout_seconds": 600, limit: seconds}
        with pytest.raises(AgentTimeout):
            await guest.channel.run(argv, warm=warm, on_output=guest.hear, **limits)  # type: ignore[arg-type]
    said = guest.output["stderr"].decode()
    assert "in wait_for_ever" in said and "in lock_up" in said
    assert (await guest.sh("exit 4")).code == 4  # the connection still works


DEAF = """
import signal
signal.signal(signal.SIGABRT, lambda *_: print("no", flush=True))
print("here", flush=True)
while True: signal.pause()
"""


async def test_what_goes_on_instead_of_telling_its_stacks_is_killed(guest: Guest) -> None:
    for seconds in patiently(guest, b"here\nno\n"):
        with pytest.raises(AgentTimeout, match="longer"):
            await guest.python(DEAF, timeout_seconds=seconds)
    assert guest.output["stdout"] == b"here\nno\n"


CRASH = """
import ctypes
def crash(): ctypes.string_at(0)
def outer(): crash()
outer()
"""


@pytest.mark.parametrize("warm", [True, False])
async def test_the_stack_of_what_crashes_is_printed(guest: Guest, warm: bool) -> None:
    await guest.channel.put({"main.py": CRASH.encode()}, dest="/agent", owner="root")
    argv = ["/agent/main.py"] if warm else [PYTHON, str(guest.agent / "main.py")]
    ended = await guest.channel.run(argv, warm=warm, timeout_seconds=120, on_output=guest.hear)
    assert ended.signal == signal.SIGSEGV
    said = guest.output["stderr"].decode()
    assert "Segmentation fault" in said and said.index("in crash") < said.index("in outer")


async def test_dropped_output_is_no_silence(guest: Guest) -> None:
    for seconds in (1, 10):  # a busy machine may need a second for a line
        script = f"i=0; while [ $i -lt {30 * seconds} ]; do i=$((i+1)); echo line; sleep 0.05; done"
        try:
            assert (
                await guest.sh(script, timeout_seconds=600, idle_timeout_seconds=seconds, max_output_bytes=10)
            ).code == 0
            break
        except AgentTimeout:
            if seconds == 10:
                raise


# --- floods ---------------------------------------------------------------------------------------------------------


def peak_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


async def test_a_flood_is_cut_and_said_so(guest: Guest) -> None:
    ended = await guest.sh("head -c 50000000 /dev/zero; head -c 100 /dev/zero >&2; exit 5", max_output_bytes=100_000)
    assert ended.code == 5
    assert len(guest.output["stdout"]) + len(guest.output["stderr"]) == 100_000
    assert guest.output["swarm"] == b"output truncated after 100000 bytes\n"
    assert (ended.stdout_bytes, ended.stderr_bytes, ended.dropped_bytes) == (50_000_000, 100, 49_900_100)
    assert peak_kb(guest.vm.pid) < 64 << 10


async def test_a_host_that_does_not_read_stops_the_agent(guest: Guest) -> None:
    """Output waits in the agent's pipe, not in agentd's memory."""
    os.mkfifo(guest.work / "told")
    source = b"""
import os, select
os.set_blocking(1, False)
poller = select.poll(); poller.register(1, select.POLLOUT)
total = 0
while poller.poll(500):
    total += os.write(1, bytes(65536))
open('told', 'w').write(str(total))
os.set_blocking(1, True)
"""
    await guest.channel.put({"main.py": source}, dest="/agent")
    async with raw(guest.vm.endpoint.unix) as slow:
        slow.hello()
        assert (await slow.hear()).flag("ok")
        slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
        order: dict[str, Any] = {"argv": ["/agent/main.py"], "env": {}, "cwd": "/work", "user": "agent", "warm": True}
        slow.say("run", id=2, timeout=120, idle_timeout=None, max_output=1 << 40, **order)
        total = int(await asyncio.to_thread((guest.work / "told").read_text))
        assert total < 4 << 20
        assert peak_kb(guest.vm.pid) < 64 << 10
        slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
        received = 0
        while not (frame := await slow.hear()).head.get("ok"):
            received += len(frame.payload)
    assert (received, frame.number("code")) == (total, 0)


# --- what it leaves behind ------------------------------------------------------------------------------------------

DAEMON = """
import os, signal, sys, time
def daemon():
    os.setsid()
    if os.fork(): os._exit(0)
    for s in range(1, 32):
        try: signal.signal(s, signal.SIG_IGN)
        except OSError: pass
    os.closerange(0, 3)
    open('pid', 'w').write(str(os.getpid()))
    os.close(ready)
    while True: time.sleep(1000)
wait, ready = os.pipe()
if os.fork() == 0: daemon()
os.close(ready); os.read(wait, 1)
"""
COMET = "import os\nwhile True:\n    if os.fork(): os._exit(0)\n"


async def test_grandchildren_that_hold_the_pipe(guest: Guest) -> None:
    ended = await guest.sh("sleep 1000 & echo $!; sleep 1000 >/dev/null & echo $!")
    assert (ended.code, ended.clean) == (0, True)
    assert not any(alive(pid) for pid in guest.output["stdout"].split())


async def test_a_daemon_dies_with_its_agent(guest: Guest) -> None:
    ended = await guest.python(DAEMON)
    assert (ended.code, ended.clean) == (0, True)
    assert not alive(int((guest.work / "pid").read_text()))


@pytest.mark.parametrize("warm", [False, True])
async def test_what_an_agent_leaves_on_purpose_lives_until_the_next_has_ended(guest: Guest, warm: bool) -> None:
    for code in (3, 0):  # one that failed leaves nothing
        start = f"sleep 1000 & echo $!; sleep 1000 >/dev/null & echo $!; exit {code}"
        program = f"import subprocess, sys; sys.exit(subprocess.run(['sh', '-c', {start!r}]).returncode)"
        ended = await (guest.python(program, leaves=True) if warm else guest.sh(start, leaves=True))
        pids, guest.output["stdout"] = guest.output["stdout"].split(), b""
        assert (ended.code, ended.clean, len(pids)) == (code, True, 2)
        assert [alive(pid) for pid in pids] == [code == 0] * 2
    ended = await guest.sh("exit 0")
    assert ended.clean and not any(alive(pid) for pid in pids)


async def test_a_process_that_never_stays(guest: Guest) -> None:
    """Each generation forks the next and ends, faster than /proc can be read."""
    ended = await guest.python(f"import os\nif os.fork() == 0:\n    exec({COMET!r})\n")
    assert (ended.code, ended.clean) == (0, True)


async def test_an_agent_that_closes_its_output_goes_on(guest: Guest) -> None:
    script = "exec >&- 2>&-; sleep 0.2; echo done > done; exit 6"
    assert (await guest.sh(script)).code == 6
    assert (guest.work / "done").exists()


async def test_a_stopped_agent_can_be_killed(guest: Guest) -> None:
    for seconds in patiently(guest):
        with pytest.raises(AgentTimeout):
            await guest.sh("echo $$; kill -STOP $$", timeout_seconds=seconds)
    assert not alive(guest.output["stdout"])


@pytest.mark.parametrize("how", ["close", "cancel", "reset"])
async def test_the_agent_dies_with_its_connection(guest: Guest, how: str) -> None:
    pid: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run(channel: Channel) -> None:
        script = "trap '' TERM HUP INT; echo $$; sleep 1000"
        argv = ["/bin/sh", "-c", script]
        await channel.run(argv, timeout_seconds=60, on_output=lambda _, data: pid.set_result(int(data)))

    async with guest.another() as channel:
        task = asyncio.create_task(run(channel))
        agent = os.pidfd_open(await pid)
        if how == "close":
            channel.close()
        elif how == "cancel":
            task.cancel()
        else:
            os.kill(guest.vm.pid, signal.SIGKILL)
        dead = asyncio.Event()
        asyncio.get_running_loop().add_reader(agent, dead.set)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await dead.wait()
        asyncio.get_running_loop().remove_reader(agent)
        os.close(agent)
        with pytest.raises((ChannelError, asyncio.CancelledError)):
            await task
    with pytest.raises(ChannelError, match="can't be used any more"):
        await run(channel)
