"""Programs in a guest by `exec`: a real agentd on this host. What only a VM has is in test_in_vm."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from swarm.channel import Guest, processes
from swarm.channel.conversation import Open
from swarm.channel.processes import SCROLLBACK_BYTES, Order, Process, run
from swarm.errors import ChannelError, GuestRefused, UsageError
from tests.channel import agentd_here
from tests.conftest import PATIENCE_SECONDS

EVERY_BYTE = bytes(range(256))


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[agentd_here.Guest]:
    async with agentd_here.running(tmp_path) as it:
        yield it


@pytest.fixture
async def there(here: agentd_here.Guest) -> AsyncIterator[Open]:
    guest = Guest(here.vm.endpoint, agentd_here.TOKEN)
    yield guest.open
    await guest.close()


def sh(script: str, *arguments: str, **options: object) -> Order:
    return Order(argv=["/bin/sh", "-c", script, *arguments], **options)  # type: ignore[arg-type]


async def heard(process: Process, text: bytes) -> None:
    """Until it has printed that."""
    found = b""
    async with asyncio.timeout(PATIENCE_SECONDS):
        async for _, data in process:
            found += data
            if text in found:
                return
    raise AssertionError(f"it ended after {found!r}")


# --- what tools that run programs for models need -------------------------------------------------------------------

WHOLE: dict[str, tuple[Order, bytes, bytes, int]] = {
    "streams": (sh("echo out; echo err >&2; exit 3"), b"out\n", b"err\n", 3),
    "input": (Order(argv=["cat"], stdin=b"a\nb"), b"a\nb", b"", 0),
    "no input": (Order(argv=["cat"]), b"", b"", 0),
    "binary": (Order(argv=["cat"], stdin=EVERY_BYTE * 2000), EVERY_BYTE * 2000, b"", 0),
    "not UTF-8": (sh(r"printf '\377\376'; printf '\200' >&2"), b"\xff\xfe", b"\x80", 0),
    "odd arguments": (
        Order(argv=["printf", "%s|", "a b", "", "'\"\\$x`", "new\nline", "☃", "-n"]),
        "a b||'\"\\$x`|new\nline|☃|-n|".encode(),
        b"",
        0,
    ),
    "long argument": (Order(argv=["printf", "%s", "x" * 60_000]), b"x" * 60_000, b"", 0),
    "longest argument": (Order(argv=["printf", "%s", "é" * 65_535 + "x"]), ("é" * 65_535 + "x").encode(), b"", 0),
    "very long arguments": (
        sh('printf "%s" "$*" | wc -c; wc -c', "sh", *["é" * 50_000] * 20, stdin=b"x" * (1 << 20)),
        b"2000019\n1048576\n",
        b"",
        0,
    ),
    "long arguments": (
        sh('printf "%s" "$#$1$L" | wc -c; cat', "sh", *["x" * 100_000] * 7, env={"L": "y" * 131_000}, stdin=b"in"),
        b"231001\nin",
        b"",
        0,
    ),
    "odd names": (
        Order(
            argv=["/bin/sh", "-c", 'cd "$(mktemp -d)"; echo body > "$1"; cat < "$1"; ls', "sh", " ☃ '\"$x;&.txt"],
        ),
        "body\n ☃ '\"$x;&.txt\n".encode(),
        b"",
        0,
    ),
    "environment": (sh('echo "$A|$B"', env={"A": "x=y ☃\nz", "B": ""}), "x=y ☃\nz|\n".encode(), b"", 0),
    "its name": (sh("echo $SWARM_PROCESS", process="me-2"), b"me-2\n", b"", 0),
    "directory": (sh("pwd", cwd="/usr/bin"), b"/usr/bin\n", b"", 0),
    "search path": (Order(argv=["env", "true"]), b"", b"", 0),
    "status 255": (sh("exit 255"), b"", b"", 255),
    "signal": (sh("kill -SEGV $$"), b"", b"", 128 + signal.SIGSEGV),
    "not found by the shell": (sh("exec /no/such 2>&-"), b"", b"", 127),
    "closes its streams": (sh("exec >&- 2>&-; exit 4"), b"", b"", 4),
    "reads nothing": (sh("exit 5", stdin=b"x" * (1 << 20)), b"", b"", 5),
    "leaves one behind": (sh("sleep 1000 & exit 6"), b"", b"", 6),
}


async def test_whole_programs(there: Open) -> None:
    for name, (order, stdout, stderr, status) in WHOLE.items():
        done = await run(there, order)
        assert (done.stdout, done.stderr, done.ended.status) == (stdout, stderr, status), name
        assert not done.ended.timed_out, name
        assert not done.truncated, name


TRICKLE = """
import os, time
for _ in range(1000):
    os.write(1, b"x" * 20)
    until = time.perf_counter() + 0.0003
    while time.perf_counter() < until: pass
"""


async def test_many_small_writes_come_in_few_pieces(here: agentd_here.Guest, there: Open) -> None:
    async def of_a_program() -> int:
        async with processes.start(there, Order(argv=["python3", "-S", "-c", TRICKLE])) as process:
            parts = [data async for _, data in process]
        assert b"".join(parts) == b"x" * 20_000
        return len(parts)

    async def of_an_agent() -> int:
        parts: list[bytes] = []
        await here.channel.run(
            ["/usr/bin/python3", "-S", "-c", TRICKLE], timeout_seconds=60, on_output=lambda _, data: parts.append(data)
        )
        assert b"".join(parts) == b"x" * 20_000
        return len(parts)

    for pieces in (of_a_program, of_an_agent):
        found: list[int] = []
        while len(found) < 5 and min(found, default=1000) > 250:  # a busy machine may let pauses come between writes
            found.append(await pieces())
        assert min(found) <= 250, found


async def test_what_linux_would_not_take_is_refused_in_plain_words(here: agentd_here.Guest, there: Open) -> None:
    for order, said in (
        (sh("true", "x" * 131_072), "has 131,072 bytes: Linux takes 131,071 in one"),
        (sh("true", env={"A": "é" * 65_535}), "has 131,072 bytes"),
        (sh("true", *["x" * 100_000] * 21), "take 2,100,229 bytes: Linux takes 2,097,152 together"),
    ):
        with pytest.raises(UsageError, match=said):
            await run(there, order)
    listed = await processes.processes(there)
    assert listed == [], "none was begun"
    done = await run(there, Order(argv=["/bin/true", *["x"] * 150_000]))  # the kernel counts 10 bytes for each
    assert done.ended.code == 0
    assert [len(one.argv) for one in await processes.processes(there)] == [32]


async def test_ten_megabytes(there: Open) -> None:
    script = "import random, sys; sys.stdout.buffer.write(random.Random(1).randbytes(10_000_000))"
    random = await asyncio.create_subprocess_exec("python3", "-c", script, stdout=asyncio.subprocess.PIPE)
    wanted, _ = await random.communicate()
    done = await run(there, Order(argv=["python3", "-c", script]))
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(wanted).digest()
    cut = await run(there, Order(argv=["python3", "-c", script]), limit_bytes=1000)
    assert (cut.stdout, cut.truncated) == (wanted[:1000], True)


@pytest.mark.parametrize(
    ("argv", "cwd", "said"),
    [
        (["/no/such"], None, "No such file"),
        (["no-such-program"], None, "No such file"),
        (["/etc"], None, "Permission denied"),
        (["/etc/passwd"], None, "Permission denied"),
        (["true"], "/no/such", "No such file"),
        (["./odd"], None, "Exec format error"),
        (["./alien"], None, "No such file"),
    ],
)
async def test_what_cannot_start(
    here: agentd_here.Guest, there: Open, argv: list[str], cwd: str | None, said: str
) -> None:
    for name, text in (("odd", "true"), ("alien", "#!/no/such\n")):
        (here.work / name).write_text(text)
        (here.work / name).chmod(0o755)
    with pytest.raises(GuestRefused, match=said) as caught:
        async with processes.start(there, Order(argv=argv, cwd=cwd)):
            raise AssertionError("it started")
    assert caught.value.kind == "CannotStart"
    assert await processes.processes(there) == []


async def test_orders_that_make_no_sense(there: Open) -> None:
    for order, error in (
        (Order(argv=[]), UsageError),
        (Order(argv=["a\0b"]), UsageError),
        (Order(argv=["true"], stdin=b"x" * ((1 << 20) + 1)), UsageError),
        (Order(argv=["x" * 70_000]), GuestRefused),
        (Order(argv=[""]), UsageError),
        (Order(argv=["true"], user="nobody"), GuestRefused),
        (Order(argv=["true"], process="../x"), GuestRefused),
        (Order(argv=["true"], process="x" * 65), GuestRefused),
        (Order(argv=["true"], pty=(0, 24)), GuestRefused),
        (Order(argv=["true"], timeout_seconds=-1), GuestRefused),
    ):
        with pytest.raises(error):
            await run(there, order)
    assert (await run(there, Order(argv=["true"]))).ended.code == 0


async def test_time_is_up_for_all_that_it_started(there: Open, tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    script = f"setsid sh -c 'echo here; sleep 1000' > {pipe} & (trap '' TERM INT; sleep 1000) & echo on; wait"
    for seconds in (1, 6, 30):  # a busy machine takes its time to start them
        alive = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        done = await run(there, sh(script, timeout_seconds=seconds))
        os.set_blocking(alive, True)
        with os.fdopen(alive, "rb") as file:
            said = await asyncio.to_thread(file.read)  # until nobody has it open any more
        assert (done.ended.timed_out, done.ended.signal, done.ended.status) == (True, 9, 124)
        if said and done.stdout:
            break
    assert (said, done.stdout) == (b"here\n", b"on\n")


async def test_leaving_kills_it_and_all_that_it_started(there: Open, tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    async with processes.start(there, sh(f"setsid sh -c 'echo here; exec sleep 1000' > {pipe} & sleep 1000")):
        alive = await asyncio.to_thread(pipe.open, "rb")
        assert await asyncio.to_thread(alive.readline) == b"here\n"
    with alive:
        assert await asyncio.to_thread(alive.read) == b""


async def test_many_at_once(there: Open) -> None:
    done = await asyncio.gather(*(run(there, sh("read x; exit $x", stdin=f"{n}\n".encode())) for n in range(40)))
    assert [one.ended.code for one in done] == list(range(40))


async def test_no_more_than_it_can_look_after(there: Open) -> None:
    for n in range(64):
        async with processes.start(there, sh("read x", background=True, open_stdin=True, process=f"p{n}")):
            pass
    with pytest.raises(GuestRefused, match="64 processes are running already"):
        await run(there, Order(argv=["true"]))
    await processes.signal(there, "p0", "KILL")
    async with processes.attach(there, "p0") as process:
        assert (await process.exit()).signal == 9
    assert (await run(there, Order(argv=["true"]))).ended.code == 0


async def test_the_process_that_waits_for_the_next_program_may_be_killed(here: agentd_here.Guest, there: Open) -> None:
    """A program of the same user can do that."""
    zygote = Path(f"/proc/{here.vm.pid}/task/{here.vm.pid}/children").read_text().split()[0]
    children = Path(f"/proc/{zygote}/task/{zygote}/children")
    for _ in range(3):
        assert (await run(there, Order(argv=["true"]))).ended.code == 0
        while not (waiting := children.read_text().split()):
            await processes.processes(there)
        os.kill(int(waiting[0]), signal.SIGKILL)
        while waiting[0] in children.read_text().split():
            await processes.processes(there)
    assert (await run(there, sh("cat", stdin=b"x"))).stdout == b"x"


# --- input, signals, terminals --------------------------------------------------------------------------------------


async def test_input_of_any_length_both_ways(there: Open) -> None:
    data = secrets.token_bytes(3_000_000)
    async with processes.start(there, Order(argv=["cat"], open_stdin=True)) as process:

        async def feed() -> None:
            await process.write(data)
            await process.close_stdin()

        feeding = asyncio.create_task(feed())
        done = await process.collect(4_000_000)
        await feeding
    assert done.stdout == data


async def test_a_signal_passes_input_that_nobody_reads(there: Open) -> None:
    script = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.01; done"
    async with processes.start(there, sh(script, open_stdin=True)) as process:
        await heard(process, b"ready")
        writing = asyncio.create_task(process.write(b"x" * 5_000_000))
        await process.signal("INT")
        done = await process.collect(100)
        await writing  # nobody will read it, and it does not wait for ever
    assert (done.stdout, done.ended.code) == (b"caught\n", 9)


async def test_a_program_that_closes_its_input(there: Open) -> None:
    async with processes.start(there, sh("exec <&-; echo closed; sleep 1000", open_stdin=True)) as it:
        await heard(it, b"closed")
        await it.write(b"x" * 2_000_000)
        await it.signal("KILL")
        assert (await it.exit()).signal == 9


async def test_signals_that_do_not_exist(there: Open) -> None:
    async with processes.start(there, sh("echo on; read x", open_stdin=True, process="it")) as process:
        await heard(process, b"on")
        for name in ("NONE", "", "INT; KILL", "_DFL", "RTMAX99"):
            with pytest.raises(GuestRefused, match="no such signal"):
                await processes.signal(there, "it", name)
        await process.signal("NONE")
        await heard(process, b"no such signal")
        await process.close_stdin()
        assert (await process.exit()).code == 1
    with pytest.raises(GuestRefused, match="has ended"):
        await processes.signal(there, "it", "TERM")
    with pytest.raises(GuestRefused, match="no such process"):
        await processes.signal(there, "that", "TERM")


async def test_a_terminal(there: Open) -> None:
    script = "test -t 0 && test -t 1 && test -t 2 && trap 'stty size' WINCH; stty size; until read x; do :; done; cat"
    async with processes.start(there, sh(f"{script}; echo $TERM", pty=(91, 33))) as process:
        await heard(process, b"33 91\r\n")
        await process.resize(100, 40)
        await process.write(b"\n")
        await heard(process, b"40 100\r\n")
        await process.write(b"typed\n")
        await heard(process, b"typed\r\ntyped\r\n")
        await process.close_stdin()  # Ctrl+D: the end of cat
        done = await process.collect(1000)
    assert done.stdout.endswith(b"xterm-256color\r\n")
    assert done.ended.code == 0


@pytest.mark.parametrize("how", ["typed", "sent"])
async def test_ctrl_c_in_a_terminal_goes_to_the_foreground(there: Open, how: str) -> None:
    """And not to the shell that waits for it."""
    loop = "trap 'echo caught; exit 0' INT; echo ready; while :; do sleep 0.01; done"
    script = f'set -m; sh -c "{loop}"; echo shell lives'
    async with processes.start(there, Order(argv=["bash", "-c", script], pty=(80, 24))) as process:
        await heard(process, b"ready")
        await (process.write(b"\3") if how == "typed" else process.signal("INT"))
        await heard(process, b"shell lives")


async def test_a_terminal_that_hangs_up(there: Open, tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    async with processes.start(there, sh(f"exec > {pipe}; echo here; read x", pty=(80, 24))):
        alive = await asyncio.to_thread(pipe.open, "rb")
        assert await asyncio.to_thread(alive.readline) == b"here\n"
    with alive:
        assert await asyncio.to_thread(alive.read) == b""


# --- in the background ----------------------------------------------------------------------------------------------


async def test_one_in_the_background_is_found_again(there: Open) -> None:
    script = "read x; echo $x; read x; exit $x"
    async with processes.start(there, sh(script, open_stdin=True, background=True, process="it")) as process:
        await process.write(b"first\n")
        await heard(process, b"first")
    (listed,) = await processes.processes(there)
    assert (listed.process, listed.ended, listed.background, listed.output_bytes) == ("it", None, True, 6)
    async with processes.attach(there, "it") as process, processes.attach(there, "it") as second:
        await heard(process, b"first")
        await process.write(b"7\n")
        assert (await process.exit()).code == (await second.exit()).code == 7
    async with processes.attach(there, "it") as process:  # it has ended, and that is still known
        done = await process.collect(100)
    assert (done.stdout, done.ended.code) == (b"first\n", 7)
    with pytest.raises(GuestRefused, match="already"):
        await run(there, sh("true", process="it"))


async def test_scroll_back_is_bounded_and_says_so(there: Open) -> None:
    size = 1_000_000
    script = f"head -c {size} /dev/zero | tr '\\0' x; echo end; read x"
    async with processes.start(there, sh(script, open_stdin=True, background=True, process="it")) as process:
        await heard(process, b"end\n")
    async with processes.attach(there, "it") as process:
        await process.write(b"\n")
        done = await process.collect(2 * size)
    assert 0 < len(done.stdout) <= SCROLLBACK_BYTES
    assert done.stdout.endswith(b"end\n")
    assert process.dropped_bytes == done.ended.dropped_bytes == size + 4 - len(done.stdout)
    assert process.output_bytes == size + 4
    async with processes.attach(there, "it", after=size) as process:
        done = await process.collect(100)
    assert (done.stdout, done.ended.dropped_bytes) == (b"end\n", 0)
    async with processes.attach(there, "it", after=10 * size) as process:
        assert (await process.collect(100)).stdout == b""


async def test_a_listener_that_reads_nothing_holds_the_program_not_the_guest(there: Open) -> None:
    script = "n=0; while :; do n=$((n+1)); printf '%01000d\\n' $n; done"
    async with processes.start(there, sh(script, background=True, process="flood")):
        before, now = -1, 0
        while now != before:  # until nothing is read from it any more
            assert (await run(there, Order(argv=["sleep", "0.3"]))).ended.code == 0
            before, now = now, (await processes.processes(there))[0].output_bytes
    assert now < 64 << 20
    await processes.signal(there, "flood", "KILL", descendants=True)


async def test_only_the_last_hundred_are_remembered(here: agentd_here.Guest, there: Open) -> None:
    for n in range(105):
        await run(there, Order(argv=["true"], process=f"p{n}"))
    listed = await processes.processes(there)
    assert [one.process for one in listed] == [f"p{n}" for n in range(5, 105)]
    for pid in (here.vm.pid, int(Path(f"/proc/{here.vm.pid}/task/{here.vm.pid}/children").read_text().split()[0])):
        assert len([*Path(f"/proc/{pid}/fd").iterdir()]) < 20  # nothing of them is left open


# --- frozen ---------------------------------------------------------------------------------------------------------

TICKS = "n=0; while :; do n=$((n+1)); echo $n > ticks; done"


async def ticks(here: agentd_here.Guest) -> bytes:
    return await here.channel.get("/work/ticks", limit_bytes=100) or b""


async def test_frozen_programs_stand_still_through_a_renewal(here: agentd_here.Guest, there: Open) -> None:
    async with processes.start(there, sh(f"echo on; {TICKS}", timeout_seconds=60, process="it")) as process:
        await heard(process, b"on")
        await processes.freeze(here.channel.converse)
        await processes.freeze(here.channel.converse)  # again: nothing
        with pytest.raises(GuestRefused, match="frozen"):
            await run(there, Order(argv=["true"]))
        with pytest.raises(ChannelError, match="frozen"):
            await here.sh("true")
        before = await ticks(here)
        await here.channel.renew(agentd_here.identity(generation="g2"))
        with pytest.raises(ChannelError):  # its connection belongs to the time before
            await process.exit()
    (listed,) = await processes.processes(there)
    assert (listed.ended, listed.background, await ticks(here)) == (None, True, before)
    await processes.thaw(there)
    await processes.thaw(there)
    while await ticks(here) in (before, b""):  # agentd answers at its own pace
        pass
    await processes.signal(there, "it", "KILL", descendants=True)
    async with processes.attach(there, "it") as process:
        assert (await process.exit()).signal == 9


async def test_time_does_not_pass_for_the_frozen(here: agentd_here.Guest, there: Open) -> None:
    for seconds in (1, 6, 30):  # a busy machine takes its time to start it, to freeze it and to end it
        task = asyncio.create_task(run(there, sh("sleep 0.2; echo done", timeout_seconds=seconds)))
        while not any(one.ended is None for one in await processes.processes(there)) and not task.done():
            pass
        with contextlib.suppress(GuestRefused):  # also to freeze it within agentd's limit
            await processes.freeze(here.channel.converse)
            await asyncio.sleep(1.2 * seconds)
        await processes.thaw(here.channel.converse)
        if (done := await task).stdout:
            break
    assert done.stdout == b"done\n"


async def test_a_pause_does_not_end_a_program_whose_client_it_cuts_off(here: agentd_here.Guest, there: Open) -> None:
    async with processes.start(there, sh("echo on; read x; exit 3", open_stdin=True, process="it")) as process:
        await heard(process, b"on")
        await processes.freeze(here.channel.converse)
    while (await processes.processes(there))[0].attached:
        pass
    await processes.thaw(here.channel.converse)
    async with processes.attach(there, "it") as process:
        await process.close_stdin()
        assert (await process.exit()).code == 3
