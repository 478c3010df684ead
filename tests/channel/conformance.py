"""What programs that evaluate agents expect of a sandbox, a case each: they run on each kind of guest.

The cases are those that such programs check in sandboxes of others before they trust them, in our own words.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from swarm.channel import Open
from swarm.channel import guest_files as files
from swarm.channel.processes import Done, Order, run, start
from swarm.errors import Conflict, GuestRefused, NotFound

Case = Callable[[Open, bool], Awaitable[None]]  # the second: has the guest users of its own?
CASES: list[Case] = []
_TEXT = "caf\u00e9 \u20ac100 \u4e2d\u6587 \U0001f600"


def case(function: Case) -> Case:
    CASES.append(function)
    return function


def sh(open_: Open, script: str, **options: object) -> Awaitable[Done]:
    return run(open_, Order(argv=["/bin/sh", "-c", script], **options))  # type: ignore[arg-type]


# --- files


@case
async def text_and_bytes_come_back(open_: Open, _: bool) -> None:
    for name, data in {
        "text": b"great #content\nincluding newlines",
        "utf8": _TEXT.encode(),
        "binary": b"\xc3\x28\x00\xff\r\n",
        "empty": b"",
        "to the file \u00fc with 'spaces' \"$HOME\" `x` *.py": b"x",
        "no/such/dir/yet/x": b"y",
        "/work/absolute/x": b"z",
    }.items():
        for round_ in (data, data[::-1]):  # it replaces what is there
            await files.write(open_, name, round_, parents=True)
            assert await files.read_bytes(open_, name) == round_


@case
async def a_hundred_megabytes_come_back(open_: Open, in_vm: bool) -> None:
    block, blocks = os.urandom(1 << 20), 20 if in_vm else 100  # an emulated CPU needs longer

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(blocks):
            yield block

    assert await files.write(open_, "large", pieces(), size=blocks << 20) == blocks << 20
    at = 0
    async for piece in files.read(open_, "large"):
        assert piece == block
        at += len(piece)
    assert at == blocks << 20
    with pytest.raises(Conflict, match="more than the limit"):
        await files.read_bytes(open_, "large", limit_bytes=(blocks << 20) - 1)
    await files.remove(open_, "large")


@case
async def errors_name_the_file_and_what_is_wrong(open_: Open, in_vm: bool) -> None:
    with pytest.raises(NotFound, match="nonexistent"):
        await files.read_bytes(open_, "nonexistent")
    with pytest.raises(NotFound):
        await files.read_bytes(open_, "https:/example.org/wiki/Bart%27s_(Day)")
    await files.make_dir(open_, "directory")
    with pytest.raises(Conflict, match="directory: Is a directory"):
        await files.read_bytes(open_, "directory")
    for data in (b"x", b""):
        with pytest.raises(Conflict, match="directory: Is a directory"):
            await files.write(open_, "directory", data)
    if in_vm:  # root may do all
        await files.write(open_, "sealed", b"x", mode=0o444)
        with pytest.raises(Conflict, match="sealed: Permission denied"):
            await files.write(open_, "sealed", b"y")
        assert (await sh(open_, "chmod 0 sealed")).ended.code == 0
        with pytest.raises(Conflict, match="sealed: Permission denied"):
            await files.read_bytes(open_, "sealed")
        assert await files.read_bytes(open_, "sealed", user="root") == b"x"


# --- programs


@case
async def output_and_status(open_: Open, _: bool) -> None:
    done = await sh(open_, "echo foo; echo bar; echo baz >&2; exit 70")
    assert (done.stdout, done.stderr, done.ended.code) == (b"foo\nbar\n", b"baz\n", 70)
    octal = "".join(f"\\{byte:03o}" for byte in _TEXT.encode())
    done = await sh(open_, f"printf '{octal}'; printf '{octal}' >&2")
    assert (done.stdout.decode(), done.stderr.decode()) == (_TEXT, _TEXT)
    done = await sh(open_, "kill -TERM $$", timeout_seconds=60.0)
    assert (done.ended.signal, done.ended.timed_out, done.ended.status) == (15, False, 143)


@case
async def ten_megabytes_of_output_and_a_limit(open_: Open, _: bool) -> None:
    script = "head -c 10485760 /dev/zero; head -c 1000 /dev/zero >&2"
    done = await sh(open_, script)
    assert (len(done.stdout), len(done.stderr), done.truncated) == (10 << 20, 1000, False)
    done = await run(open_, Order(argv=["/bin/sh", "-c", script]), limit_bytes=1 << 20)
    assert (len(done.stdout), done.truncated, done.ended.code) == (1 << 20, True, 0)


@case
async def a_time_out_ends_it_and_its_children(open_: Open, _: bool) -> None:
    mark = f"mark-{os.urandom(4).hex()}"
    script = f"(sleep 100; : {mark}) & setsid sh -c 'sleep 100; : {mark}' & sleep 100; : {mark}"
    done = await sh(open_, script, timeout_seconds=1.0)
    assert (done.ended.timed_out, done.ended.status) == (True, 124)
    look = f"cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -ac '[m]{mark[1:]}'"
    assert (await sh(open_, look)).stdout.strip() == b"0"


@case
async def what_can_not_be_started_says_why(open_: Open, _: bool) -> None:
    for argv, said in (("/etc/passwd", "Permission denied"), ("/no/such/program", "No such file")):
        with pytest.raises(GuestRefused, match=said):
            await run(open_, Order(argv=[argv]))
    with pytest.raises(GuestRefused, match="no such user: 'nonexistent'"):
        await run(open_, Order(argv=["/bin/true"], user="nonexistent"))
    with pytest.raises(GuestRefused, match="nowhere"):
        await run(open_, Order(argv=["/bin/true"], cwd="/nowhere"))


@case
async def input_arrives_byte_for_byte(open_: Open, in_vm: bool) -> None:
    for data in (b"hello\nworld\n", b"", b"$HOME `whoami` 'single' \"double\" \\back\nx\n", b"\xc3\x28\x00\xff\x01"):
        assert (await run(open_, Order(argv=["/bin/cat"], stdin=data))).stdout == data
    blocks = 5 if in_vm else 50
    async with start(open_, Order(argv=["/usr/bin/wc", "-c"], open_stdin=True)) as process:
        for _ in range(blocks):
            await process.write(bytes(1 << 20))
        await process.close_stdin()
        done = await process.collect(100)
    assert int(done.stdout) == blocks << 20


@case
async def a_large_command(open_: Open, _: bool) -> None:
    """Many arguments of some size: one of more than 128 KiB no Linux takes."""
    chunk = "x" * (64 << 10)
    done = await run(open_, Order(argv=["/usr/bin/printf", "%s", *[chunk] * 16]))
    assert (done.ended.code, done.stdout) == (0, chunk.encode() * 16)


@case
async def environment_directory_and_user(open_: Open, in_vm: bool) -> None:
    done = await sh(open_, 'echo "$A"; echo "$B"', env={"A": "chonko zamboodle", "B": "'\"$x\n"})
    assert done.stdout == b"chonko zamboodle\n'\"$x\n\n"
    await files.write(open_, "sub/here", b"", parents=True)
    assert b"sub" in (await sh(open_, "ls")).stdout
    assert b"env" in (await sh(open_, "ls", cwd="/usr/bin")).stdout
    assert (await sh(open_, "ls", cwd="sub")).stdout == b"here\n"
    await files.write(open_, "/tmp/swarm-conformance/here", b"", parents=True) if in_vm else None
    assert not in_vm or (await sh(open_, "ls", cwd="/tmp/swarm-conformance")).stdout == b"here\n"
    for user in ("agent", "root") if in_vm else ():
        assert (await sh(open_, "whoami", user=user)).stdout.decode().strip() == user
