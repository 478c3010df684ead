"""agentd as it is, a real process: connections, identity, files."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm.base import process
from swarm.channel import Channel
from swarm.channel.dial import Endpoint
from swarm.errors import AgentFailed, ChannelError, OutputInvalid, UsageError
from swarm.model import FailureReason
from tests.channel.agentd_here import TOKEN, Guest, frame, identity, raw, running, token
from tests.conftest import PATIENCE_SECONDS


@pytest.fixture
async def guest(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    async with running(tmp_path_factory.mktemp("g")) as it:
        yield it


# --- who may talk ---------------------------------------------------------------------------------------------------


async def test_hello(guest: Guest) -> None:
    hello = await guest.channel.hello()
    assert (hello.mode, hello.generation, hello.sshd, hello.crng_ready) == ("process", "g1", False, True)
    assert hello.preload_failed == {}
    assert hello.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


async def test_only_the_token_opens(guest: Guest) -> None:
    with pytest.raises(ChannelError, match="wrong token"):
        async with guest.another(token()):
            pass
    async with raw(guest.vm.endpoint.unix) as connection:
        connection.say("get", path="/work/x", limit=1)
        with pytest.raises(ChannelError, match="closed"):
            await connection.hear()


async def test_renew_changes_the_token(guest: Guest) -> None:
    new = token()
    await guest.channel.renew(identity(generation="g2", token=new))
    assert (await guest.channel.hello()).generation == "g2"
    with pytest.raises(ChannelError, match="wrong token"):
        async with guest.another(TOKEN):
            pass
    async with guest.another(new) as channel:
        assert channel.greeting.generation == "g2"


async def test_on_the_host_renew_changes_nothing_of_the_host(guest: Guest) -> None:
    before = (socket.gethostname(), Path("/etc/hostname").read_bytes() if Path("/etc/hostname").exists() else b"")
    clock = time.time_ns() - time.monotonic_ns()
    renewed = await guest.channel.renew(identity(seed=b"s" * 32, ssh_host_key="key", authorized_keys="key"))
    assert renewed.done == ("interpreter",)
    assert set(renewed.skipped) == {"seed", "clock", "machine_id", "hostname", "work", "ssh"}
    assert before[0] == socket.gethostname() == renewed.hostname
    assert not before[1] or before[1] == Path("/etc/hostname").read_bytes()
    assert abs(time.time_ns() - time.monotonic_ns() - clock) < 1e9


async def test_calls_sent_ahead_are_skipped_after_a_failure(guest: Guest) -> None:
    """An agent never runs in a guest that failed to renew."""
    results = await asyncio.gather(
        guest.channel.renew(identity(token=b"short")),
        guest.channel.put({"input.json": b"{}"}, dest="/work"),
        guest.channel.run(["/usr/bin/touch", "ran"], timeout_seconds=60),
        guest.channel.get("/work/ran", limit_bytes=10),
        return_exceptions=True,
    )
    assert "32 to 128 characters" in str(results[0])
    assert all(isinstance(r, ChannelError) and "the request before it failed" in str(r) for r in results[1:])
    assert not (guest.work / "ran").exists()
    assert (await guest.sh("true")).code == 0  # the connection still works


async def test_one_round_trip(guest: Guest) -> None:
    program = b"import json; json.dump(json.load(open('input.json')) + 1, open('output.json', 'w'))"
    *_, ended, output = await asyncio.gather(
        guest.channel.renew(identity()),
        guest.channel.put({"input.json": b"41"}, dest="/work"),
        guest.channel.put({"main.py": program}, dest="/agent", owner="root"),
        guest.channel.run(["/agent/main.py"], warm=True, timeout_seconds=60),
        guest.channel.get("/work/output.json", limit_bytes=100),
    )
    assert (ended.code, output) == (0, b"42")


HEADERS = [b"{}", b"[]", b'{"id":1}', b'{"id":1,"op":[]}', b'{"id":{},"op":"hello"}', b"[" * 9999]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.one_of(
    st.binary(max_size=200),
    st.builds(frame, st.binary(max_size=50), st.binary(max_size=50)),
    st.builds(frame, st.sampled_from(HEADERS)),
))  # fmt: skip
def test_garbage_closes_the_connection_and_nothing_else(agentd: tuple[Path, asyncio.Runner], data: bytes) -> None:
    path, runner = agentd

    async def talk() -> None:
        async with raw(path) as connection:
            connection.writer.write(data)
            connection.writer.write_eof()
            await asyncio.gather(connection.reader.read(), return_exceptions=True)  # closed or reset
        async with raw(path) as connection:
            connection.hello()
            assert (await connection.hear()).flag("ok")

    runner.run(talk())


@pytest.fixture
def agentd(tmp_path_factory: pytest.TempPathFactory) -> object:
    with asyncio.Runner() as runner:
        context = running(tmp_path_factory.mktemp("g"))
        guest = runner.run(context.__aenter__())
        yield guest.vm.endpoint.unix, runner
        runner.run(context.__aexit__(None, None, None))


@pytest.mark.parametrize(
    "fields",
    [
        {"op": "no-such-thing"},
        {"op": "put"},
        {"op": "put", "dest": "/work", "owner": "nobody", "files": []},
        {"op": "put", "dest": "/work", "owner": "agent", "files": [["../../x", 0, 420]]},
        {"op": "put", "dest": "/work", "owner": "agent", "files": [["x", 1 << 40, 420]]},
        {"op": "put", "dest": "work", "owner": "agent", "files": [["x", 0, 420]]},
        {"op": "get", "path": "/work/../../../etc/passwd", "limit": 1000},
        {"op": "get", "path": "/work/x", "limit": -1},
        {"op": "run", "argv": "ls", "env": {}},
        {"op": "run", "argv": [], "env": {}, "user": "agent"},
        {"op": "run", "argv": ["a\0b"], "env": {}, "user": "agent"},
        {"op": "renew"},
    ],
)  # fmt: skip
async def test_a_senseless_request_gets_an_error(guest: Guest, fields: dict[str, object]) -> None:
    async with raw(guest.vm.endpoint.unix) as connection:
        connection.hello()
        assert (await connection.hear()).flag("ok")
        connection.say(id=2, **fields)  # type: ignore[arg-type]
        assert (await connection.hear()).mapping("error")["type"] in ("Refused", "FileNotFoundError", "ValueError")
        connection.hello(id=3)
        assert (await connection.hear()).flag("ok")


async def test_too_many_connections(guest: Guest) -> None:
    opened = [await asyncio.open_unix_connection(guest.vm.endpoint.unix) for _ in range(80)]
    closed = [asyncio.create_task(reader.read()) for reader, _ in opened]
    done, _ = await asyncio.wait(closed, timeout=60, return_when=asyncio.FIRST_COMPLETED)
    assert done
    for _, writer in opened:
        writer.transport.abort()
    await asyncio.wait(closed)
    async with guest.another() as channel:
        assert channel.greeting.mode == "process"


# --- the zygote -----------------------------------------------------------------------------------------------------


def zygote_of(guest: Guest) -> int:
    return int(Path(f"/proc/{guest.vm.pid}/task/{guest.vm.pid}/children").read_text().split()[0])


async def test_the_zygote_holds_no_secret(guest: Guest) -> None:
    secret = token()
    await guest.channel.renew(identity(token=secret))
    await guest.python("pass")

    def found(pid: int) -> bool:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                span, rights, *_ = line.split()
                if rights.startswith("rw"):
                    start, end = (int(part, 16) for part in span.split("-"))
                    memory.seek(start)
                    if secret in memory.read(end - start):
                        return True
        return False

    assert found(guest.vm.pid), "the search itself must work"
    assert not found(zygote_of(guest))


async def test_a_dead_zygote_is_said_so(guest: Guest) -> None:
    os.kill(zygote_of(guest), signal.SIGKILL)
    with pytest.raises(ChannelError, match="zygote"):
        await guest.python("pass")
    assert (await guest.channel.hello()).mode == "process"


# --- files ----------------------------------------------------------------------------------------------------------


async def test_files_arrive_byte_for_byte(guest: Guest) -> None:
    files = {
        "big": os.urandom((5 << 20) + 3),
        "empty": b"",
        "a mega": b"m" * (1 << 20),
        "dir/deeper/$(touch x); '\"\n\t\\ é 🐝": b"\0\r\n",
    }
    await guest.channel.put(files, dest="/work")
    for name, data in files.items():
        assert await guest.channel.get(f"/work/{name}", limit_bytes=8 << 20) == data
        assert (guest.work / name).read_bytes() == data
    await guest.channel.put({"big": b"small"}, dest="/work", mode=0o600)
    assert (guest.work / "big").read_bytes() == b"small"
    assert (guest.work / "big").stat().st_mode & 0o777 == 0o600


async def test_many_files_take_several_requests(guest: Guest) -> None:
    files = {f"{'d' * 200}/{n:04}": str(n).encode() for n in range(500)}
    await guest.channel.put(files, dest="/work")
    assert len(list((guest.work / ("d" * 200)).iterdir())) == 500


async def test_a_tree_is_copied(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "lib" / "__pycache__").mkdir(parents=True)
    (tmp_path / "lib" / "__pycache__" / "x.pyc").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "lib" / "x.py").write_text("x = 1\n")
    (tmp_path / "tool").write_text("#!/bin/sh\n")
    (tmp_path / "tool").chmod(0o700)
    assert await guest.channel.put_tree(tmp_path, dest="/agent") == 4
    assert sorted(str(p.relative_to(guest.agent)) for p in guest.agent.rglob("*")) == [
        "empty",
        "lib",
        "lib/x.py",
        "tool",
    ]
    assert (guest.agent / "tool").stat().st_mode & 0o777 == 0o755
    (tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(UsageError, match="link"):
        await guest.channel.put_tree(tmp_path, dest="/agent")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", ".", "a//b", "a\0b", "x" * 256])
async def test_names_that_lead_elsewhere(guest: Guest, name: str) -> None:
    with pytest.raises(UsageError, match="not a plain relative path"):
        await guest.channel.put({name: b""}, dest="/work")


async def test_links_in_the_work_directory_lead_nowhere(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("host's own")
    (guest.work / "dir").symlink_to(tmp_path)
    (guest.work / "file").symlink_to(tmp_path / "file")
    (guest.work / "hard").hardlink_to(tmp_path / "file")
    with pytest.raises(ChannelError, match="Not a directory"):
        await guest.channel.put({"dir/file": b"evil"}, dest="/work")
    for name in ("file", "hard"):
        with pytest.raises(OutputInvalid, match=r"link|one name"):
            await guest.channel.get(f"/work/{name}", limit_bytes=100)
        await guest.channel.put({name: b"replaced"}, dest="/work")
    assert (tmp_path / "file").read_text() == "host's own"
    assert await guest.channel.get("/work/dir/file", limit_bytes=100) is None


async def test_get_what_is_not_a_file(guest: Guest) -> None:
    os.mkfifo(guest.work / "pipe")
    (guest.work / "dir").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(guest.work / "s"))
        for name in ("pipe", "dir", "s"):
            with pytest.raises(OutputInvalid, match=r"regular file|a link, a socket"):
                await guest.channel.get(f"/work/{name}", limit_bytes=100)
    assert await guest.channel.get("/work/absent", limit_bytes=100) is None
    assert await guest.channel.get("/work/absent/too", limit_bytes=100) is None


async def test_get_at_the_limit(guest: Guest) -> None:
    (guest.work / "x").write_bytes(b"x" * 1000)
    assert await guest.channel.get("/work/x", limit_bytes=1000) == b"x" * 1000
    with pytest.raises(OutputInvalid, match="has 1000 bytes; the limit is 999") as caught:
        await guest.channel.get("/work/x", limit_bytes=999)
    assert caught.value.reason is FailureReason.OUTPUT_TOO_LARGE
    assert await guest.channel.get("/work/x", limit_bytes=2000) == b"x" * 1000  # the connection goes on


async def test_a_put_that_fails_leaves_the_connection_in_step(guest: Guest) -> None:
    (guest.work / "x").mkdir()
    with pytest.raises(ChannelError, match="Is a directory"):
        await guest.channel.put({"x": b"1" * (3 << 20), "y": b"2"}, dest="/work")
    await guest.channel.put({"y": b"2"}, dest="/work")  # the data of the failed one was skipped
    assert await guest.channel.get("/work/y", limit_bytes=10) == b"2"


# --- its own life ---------------------------------------------------------------------------------------------------


async def test_poweroff(guest: Guest) -> None:
    await guest.channel.poweroff()
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await guest.vm.wait() == f"agentd (pid {guest.vm.pid}) ended with status 0"


async def test_a_port_that_stays_closed() -> None:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        endpoint = Endpoint(host="127.0.0.1", port=place.getsockname()[1])
        with pytest.raises(ChannelError, match=r"did not answer in 0\.2 s: .*(refused|Connect call failed)"):
            async with Channel.connect(endpoint, token=TOKEN, timeout_seconds=0.2):
                pass


async def test_no_program(guest: Guest) -> None:
    (guest.work / "data").write_text("no program")
    with pytest.raises(AgentFailed, match="Permission denied") as caught:
        await guest.channel.run(["/work/data"], timeout_seconds=60)
    assert not caught.value.retryable
    for argv, warm in ((["/no/such"], False), (["no-such-program"], False), (["/agent/none.py"], True)):
        with pytest.raises(AgentFailed, match="No such file"):
            await guest.channel.run(argv, warm=warm, timeout_seconds=60)
    with pytest.raises(AgentFailed, match="No such file or directory: '/nowhere'"):
        await guest.channel.run(["/bin/true"], cwd="/nowhere", timeout_seconds=60)
    with pytest.raises(UsageError, match="NUL"):
        await guest.channel.run(["a\0"], timeout_seconds=60)
    with pytest.raises(UsageError, match="too long"):
        await guest.channel.run(["x" * 70_000], timeout_seconds=60)
    assert process.start_time(zygote_of(guest))


async def test_memory_that_ends_while_a_request_is_sent() -> None:
    """What follows on the same descriptor is heard: see the program."""
    done = await process.run([sys.executable, "-m", "tests.channel.starved"], cwd=Path(__file__).parents[2])
    starved, deaf = map(int, done.stdout.split())
    assert starved > 10
    assert deaf == 0
