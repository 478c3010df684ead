"""Files of a guest, watches and ports: agentd as it is, a real process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import pytest

from swarm.channel import guest_files as gf
from swarm.channel import guest_trees as gt
from swarm.channel import ports
from swarm.channel.conversation import Open
from swarm.channel.dial import Endpoint
from swarm.channel.guest import Guest as Connections
from swarm.errors import Conflict, NotFound, UsageError
from tests.channel.agentd_here import TOKEN, Guest, running, serving
from tests.conftest import PATIENCE_SECONDS

pytestmark = pytest.mark.slow  # starts programs


@pytest.fixture
async def guest(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    async with running(tmp_path_factory.mktemp("g")) as it:
        yield it


@pytest.fixture
async def opens(guest: Guest) -> AsyncIterator[Open]:
    connections = Connections(guest.vm.endpoint, TOKEN)
    yield connections.open
    await connections.close()


async def test_a_file_there_and_back(guest: Guest, opens: Open) -> None:
    data = os.urandom((3 << 20) + 7)
    assert await gf.write(opens, "dir/x", data, parents=True) == len(data)
    assert (guest.work / "dir" / "x").read_bytes() == data
    assert await gf.read_bytes(opens, "/work/dir/x") == data
    info = await gf.stat(opens, "dir/x")
    assert (info.name, info.kind, info.size, info.mode) == ("x", "file", len(data), 0o644)
    part = b"".join([piece async for piece in gf.read(opens, "dir/x", offset=5, length=1 << 20)])
    assert part == data[5 : 5 + (1 << 20)]
    with pytest.raises(Conflict, match="more than the limit of 100 bytes"):
        await gf.read_bytes(opens, "dir/x", limit_bytes=100)
    with pytest.raises(NotFound, match="No such file"):
        await gf.read_bytes(opens, "dir/y")
    with pytest.raises(Conflict, match="Is a directory"):
        await gf.read_bytes(opens, "dir")


async def test_a_directory_there_and_back(guest: Guest, opens: Open, tmp_path: Path) -> None:
    top = tmp_path / "top"
    long = "n" * 120
    for name in ("a", "b/c/d", "b/e\n\\'\" é 🐝", f"{long}/{long}/f", os.fsdecode(b"not\xffutf8")):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(os.urandom(700))
    (top / "empty").mkdir()
    (top / "sealed").mkdir()
    (top / "sealed" / "x").touch()
    (top / "sealed").chmod(0o555)
    (top / "a").chmod(0o750)
    (top / "link").symlink_to("b/c/d")
    (top / f"far{long}").symlink_to(f"{long}/{long}/f")
    (top / "big").write_bytes(os.urandom((3 << 20) + 11))
    os.utime(top / "a", (1000, 2000))
    sent = await gt.put_tree(opens, top, "t/u")
    assert _seen(guest.work / "t" / "u") == _seen(top)
    assert (guest.work / "t/u/a").stat().st_mtime == 2000
    os.mkfifo(guest.work / "t" / "u" / "pipe")
    (guest.work / "t" / "u" / "out").symlink_to("/etc/passwd")
    (guest.work / "t" / "u" / ".git").mkdir()
    (guest.work / "t" / "u" / ".git" / "config").touch()
    got = await gt.get_tree(opens, "t/u", tmp_path / "back")
    back = _seen(tmp_path / "back")
    assert back.pop("sealed")[0] == 0o755
    want = _seen(top)
    del want["sealed"]
    assert back == want
    assert got.entries == sent.entries + 3
    told = " ".join(got.left_out)
    assert "pipe: it is a pipe" in told and "leads out" in told and ".git" in told
    pieces = [piece async for piece in gt.pack(opens, "t/u")]
    (tmp_path / "x.tar").write_bytes(b"".join(pieces))
    with tarfile.open(tmp_path / "x.tar") as archive:
        names = {member.name for member in archive}
    assert names == {*_seen(top), "out", ".git", ".git/config"}


async def test_no_repository_comes_of_a_guest(guest: Guest, opens: Open, tmp_path: Path) -> None:
    """A bare one is no .git, and git would run what its settings name as well, for whoever only looks around in it."""

    def is_repository(path: Path) -> bool:
        env = {"PATH": os.environ["PATH"], "GIT_CEILING_DIRECTORIES": str(tmp_path)}
        return subprocess.run(["git", "-C", path, "rev-parse"], env=env, stderr=subprocess.DEVNULL).returncode == 0

    top = guest.work / "t"

    def make(name: str) -> None:
        subprocess.run(["git", "init", "-q", "--bare", "--template=", top / name], check=True)

    for name in ("bare", "deep/er/x.git", "linked"):
        make(name)
    (top / "linked" / "HEAD").rename(top / "linked" / "real")
    (top / "linked" / "HEAD").symlink_to("refs/heads/x")
    (top / "a" / "HEAD" / "b").mkdir(parents=True)
    assert is_repository(top / "bare") and is_repository(top / "linked")
    got = await gt.get_tree(opens, "t", tmp_path / "back")
    assert sorted(one.partition(":")[0] for one in got.left_out) == ["bare/HEAD", "deep/er/x.git/HEAD", "linked/HEAD"]
    for name in ("bare", "deep/er/x.git", "linked"):
        assert (tmp_path / "back" / name / "config").exists() and not is_repository(tmp_path / "back" / name)
    assert (tmp_path / "back/a/HEAD/b").is_dir()
    await gt.get_tree(opens, "t", tmp_path / "all", git=True)
    assert is_repository(tmp_path / "all/bare"), "asked for"
    for to in ("all", "all/bare"):  # where there is one, or half of one, nothing is added to it
        with pytest.raises(Conflict, match="has a HEAD in it"):
            await gt.get_tree(opens, "t/deep" if to == "all/bare" else "t", tmp_path / to)
    before = _seen(tmp_path / "all")
    for to in ("all/bare/new", "all/bare/hooks/new", "all/bare/config"):  # nor below it, be it one file or a tree
        (tmp_path / "here").unlink(missing_ok=True)
        (tmp_path / "here").symlink_to((tmp_path / to).parent)  # by whichever way
        for place in (tmp_path / to, tmp_path / "here" / Path(to).name):
            for getting in (gt.get_tree(opens, "t/deep", place), gf.get(opens, "t/bare/config", place)):
                with pytest.raises(Conflict, match="has a HEAD in it"):
                    await getting
    assert _seen(tmp_path / "all") == before
    (tmp_path / "all/bare/tree/.git").mkdir(parents=True)
    assert await gf.get(opens, "t/bare/config", tmp_path / "all/bare/tree/x")


def _seen(top: Path) -> dict[str, tuple[int, bytes | str]]:
    found: dict[str, tuple[int, bytes | str]] = {}
    for path in top.rglob("*"):
        mode = path.lstat().st_mode & 0o777
        name = str(path.relative_to(top))
        if path.is_symlink():
            found[name] = (mode, str(path.readlink()))
        else:
            found[name] = (mode, b"" if path.is_dir() else path.read_bytes())
    return found


async def test_looking_making_moving_removing(guest: Guest, opens: Open) -> None:
    await gf.make_dir(opens, "a/b", parents=True)
    await gf.make_dir(opens, "a/b", parents=True)  # may be there
    with pytest.raises(Conflict, match="File exists"):
        await gf.make_dir(opens, "a/b")
    (guest.work / "f").touch()
    for path in ("f", "f/x"):
        with pytest.raises(Conflict, match=r"File exists|Not a directory"):
            await gf.make_dir(opens, path, parents=True)
    await gf.make_dir(opens, "/".join("d" * 1500), parents=True)
    assert await gf.exists(opens, "/".join("d" * 1500))
    await gf.remove(opens, "d", recursive=True)
    with pytest.raises(NotFound):
        await gf.make_dir(opens, "x/y")
    odd = [os.fsdecode(b"\xff\xfe"), "line\nfeed", "{[,]}", "-rf", "é"]
    for name in odd:
        await gf.write(opens, f"a/{name}", b"1")
        assert await gf.read_bytes(opens, f"a/{name}") == b"1"
    (guest.work / "a" / "link").symlink_to("nowhere")
    os.mkfifo(guest.work / "a" / "pipe")
    listed = await gf.list_dir(opens, "a")
    assert {one.name: one.kind for one in listed.entries} == {
        "b": "directory", "link": "link", "pipe": "pipe", **dict.fromkeys(odd, "file")
    }  # fmt: skip
    assert listed.complete
    assert next(one for one in listed.entries if one.kind == "link").target == "nowhere"
    short = await gf.list_dir(opens, "a", limit=3)
    assert (len(short.entries), short.complete) == (3, False)
    await gf.move(opens, "a/-rf", "a/b/moved")
    assert (guest.work / "a" / "b" / "moved").exists()
    await gf.remove(opens, "a/link")
    with pytest.raises(Conflict, match="not empty"):
        await gf.remove(opens, "a/b")
    await gf.remove(opens, "a", recursive=True)
    assert not await gf.exists(opens, "a")
    with pytest.raises(NotFound):
        await gf.remove(opens, "a", recursive=True)


async def test_links_are_followed_and_in_a_process_never_out(guest: Guest, opens: Open, tmp_path: Path) -> None:
    (guest.work / "real").write_text("1")
    (guest.work / "real").chmod(0o600)
    (guest.work / "link").symlink_to("real")
    await gf.write(opens, "link", b"22")
    assert (guest.work / "real").read_bytes() == b"22"
    assert (guest.work / "link").is_symlink()
    assert ((await gf.stat(opens, "link")).mode, (await gf.stat(opens, "link", follow=False)).kind) == (0o600, "link")
    (tmp_path / "file").write_text("host's own")
    (guest.work / "out").rmdir()  # agentd's own
    (guest.work / "out").symlink_to(tmp_path)
    for path in ("out/file", "/etc/passwd", "../../x", str(tmp_path / "file"), "out"):
        for work in (gf.read_bytes(opens, path), gf.write(opens, path, b"evil"), gf.list_dir(opens, path)):
            with pytest.raises(UsageError, match="outside of /work"):
                await work
    with pytest.raises(UsageError, match="outside of /work"):
        await gf.move(opens, "real", "out/real")
    await gf.remove(opens, "out", recursive=True)  # the link
    assert (tmp_path / "file").read_text() == "host's own"


async def test_nobody_sees_half_of_a_file_and_a_broken_one_is_taken_up(guest: Guest, opens: Open) -> None:
    (guest.work / "x").write_text("old")
    data = os.urandom(3 << 20)

    async def broken() -> AsyncIterator[bytes]:
        yield data[: 1 << 20]
        yield data[1 << 20 : 2 << 20]
        raise RuntimeError

    for upload in ("", "u-1"):
        with pytest.raises(RuntimeError):
            await gf.write(opens, "x", broken(), size=len(data), upload=upload)
        assert (guest.work / "x").read_text() == "old"

    async def settled() -> int:
        """Once agentd has seen that both broke, only the one with a name is left."""
        while True:
            have = await gf.uploaded(opens, "x", "u-1")
            if have and len(list(guest.work.glob(".swarm-*"))) == 1:
                return have

    async with asyncio.timeout(PATIENCE_SECONDS):
        have = await settled()
    assert await gf.uploaded(opens, "x", "other") == await gf.uploaded(opens, "no/dir", "u-1") == 0
    with pytest.raises(UsageError, match=r"only \d+ bytes of it are there"):
        await gf.write(opens, "x", b"", upload="u-1", offset=len(data) + 1)
    with pytest.raises(NotFound):
        await gf.write(opens, "x", b"", upload="u-2", offset=1)
    assert await gf.write(opens, "x", data[have:], size=len(data), upload="u-1", offset=have) == len(data)
    assert (guest.work / "x").read_bytes() == data
    with pytest.raises(UsageError, match="10 bytes came, and 11 were announced"):
        await gf.write(opens, "x", data[:10], size=11)
    assert (guest.work / "x").read_bytes() == data
    assert not list(guest.work.glob(".swarm-*"))


async def test_a_file_is_taken_up_where_its_connection_broke(guest: Guest, tmp_path: Path) -> None:
    """By a host in between, which breaks the first connections after some megabytes."""
    data = os.urandom(8 << 20)
    (tmp_path / "x").write_bytes(data)
    let, passed = [3 << 20, 1 << 20], 0

    async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal passed
        inner, out = await asyncio.open_unix_connection(guest.vm.endpoint.unix)

        async def back() -> None:
            while said := await inner.read(65536):
                writer.write(said)
            writer.close()

        answers = asyncio.create_task(back())
        sent = 0
        while piece := await reader.read(65536):
            sent += len(piece)
            out.write(piece)
            await out.drain()
            if let and sent > let[0]:
                let.pop(0)
                writer.transport.abort()
                break
        passed += sent
        out.close()
        await asyncio.gather(answers, out.wait_closed(), return_exceptions=True)

    async with serving(tmp_path / "s", between):
        connections = Connections(Endpoint(unix=tmp_path / "s"), TOKEN)
        assert await gf.put(connections.open, tmp_path / "x", "x") == len(data)
        await connections.close()
    assert (guest.work / "x").read_bytes() == data
    assert not let
    assert passed < 2 * len(data)
    assert not list(guest.work.glob(".swarm-*"))


async def test_a_refusal_ends_the_sending(guest: Guest, opens: Open) -> None:
    (guest.work / "file").touch()
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield bytes(1 << 20)

    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(Conflict, match="Not a directory"):
            await gf.write(opens, "file/x", endless())
    assert sent < 1000


async def test_a_file_of_this_host_keeps_mode_and_holes(guest: Guest, opens: Open, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(os.urandom(5 << 20))
    (tmp_path / "x").chmod(0o751)
    assert await gf.put(opens, tmp_path / "x", "bin/x", parents=True) == 5 << 20
    assert (guest.work / "bin" / "x").stat().st_mode & 0o777 == 0o751
    with (guest.work / "sparse").open("wb") as file:
        file.write(b"begin")
        file.seek(100 << 30)
        file.write(b"end")
        file.truncate(101 << 30)
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await gf.get(opens, "sparse", tmp_path / "back") == 101 << 30
    assert (tmp_path / "back").stat().st_blocks < 1000
    with (tmp_path / "back").open("rb") as file:
        assert file.read(6) == b"begin\0"
        file.seek((100 << 30) - 1)
        assert file.read(4) == b"\0end"
    with pytest.raises(Conflict, match="more than the limit"):
        await gf.get(opens, "sparse", tmp_path / "back", limit_bytes=1 << 30)
    with pytest.raises(UsageError, match="its files have more than 1,073,741,824 bytes, with sparse"):
        await gt.get_tree(opens, "/work", tmp_path / "all", limit_bytes=1 << 30)


async def test_a_tree_a_thousand_levels_deep_and_very_many_names(guest: Guest, opens: Open, tmp_path: Path) -> None:
    here = os.open(guest.work, os.O_RDONLY)
    for _ in range(1000):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("last", os.O_CREAT, dir_fd=here))
    os.close(here)
    got = await gt.get_tree(opens, "d", guest.work / "copy")
    assert got.entries == 1000
    await gf.remove(opens, "copy", recursive=True)
    async with gf.watch(opens, "d", recursive=True):
        pass
    await gf.remove(opens, "d", recursive=True)
    await gf.remove(opens, "out")  # agentd's own
    assert not list(guest.work.iterdir())
    # Deeper than any path can be long, so it can't be sent; and it can be removed.
    here = os.open(guest.work, os.O_RDONLY)
    for _ in range(30):
        os.mkdir("e" * 250, dir_fd=here)
        below = os.open("e" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    with pytest.raises(UsageError, match="nested too deep"):
        await gt.get_tree(opens, "/work", guest.agent / "copy")
    await gf.remove(opens, "/agent/copy", recursive=True)
    await gf.remove(opens, "e" * 250, recursive=True)
    assert not list(guest.work.iterdir())
    (guest.work / "many").mkdir()
    for number in range(2_500):
        os.close(os.open(guest.work / "many" / str(number), os.O_CREAT))
    listed = await gf.list_dir(opens, "many", limit=2_000)
    assert (len(listed.entries), listed.complete) == (2_000, False)
    with pytest.raises(UsageError, match="more than 1,500 files"):
        await gt.get_tree(opens, "/work", tmp_path / "many", limit_entries=1_500)
    await gf.remove(opens, "many", recursive=True)
    assert not list(guest.work.iterdir())


async def test_a_process_leaves_nothing_however_deep_it_was(tmp_path: Path) -> None:
    async with running(tmp_path) as guest:
        here = os.open(guest.work, os.O_RDONLY)
        for _ in range(1500):
            os.mkdir("d", dir_fd=here)
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(here)
    assert not (tmp_path / "root").exists()


async def test_an_archive_can_do_no_harm(guest: Guest, opens: Open, tmp_path: Path) -> None:
    def archive(*members: tuple[str, dict[str, object]], form: Literal[0, 1, 2] = tarfile.PAX_FORMAT) -> bytes:
        out = b""
        for name, fields in members:
            info = tarfile.TarInfo(name)
            for key, value in fields.items():
                setattr(info, key, value)
            out += info.tobuf(form, "utf-8", "surrogateescape") + b"x" * info.size + bytes(-info.size % 512)
        return out + bytes(1024)

    file: dict[str, object] = {"size": 5}
    out: dict[str, object] = {"type": tarfile.SYMTYPE, "linkname": str(tmp_path)}
    for said, data in {
        "has a file named": archive(("../x", file)),
        "Not a directory|Too many": archive(("l", out), ("l/x", file)),
        "neither a file nor": archive(("d", {"type": tarfile.CHRTYPE})),
        "not a tar archive": b"x" * 1024,
        "cut off": archive(("x", file))[:700],
        "damaged": archive(("x", {"pax_headers": {"comment": "y" * 70_000}})),
    }.items():
        with pytest.raises((UsageError, Conflict), match=said):
            await gt.unpack(opens, "t", data)
    assert not list(tmp_path.iterdir())
    deep = "/".join(["n" * 90] * 5)
    forms: tuple[Literal[0, 1, 2], ...] = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)
    for form in forms:
        data = archive(
            ("/abs", file), ("./dir/", {"type": tarfile.DIRTYPE}), (deep, file),
            ("hard", {"type": tarfile.LNKTYPE, "linkname": deep}), ("exec", {"mode": 0o755, "mtime": 1000}),
            form=form,
        )  # fmt: skip
        moved = await gt.unpack(opens, f"fine{form}", data)
        top = guest.work / f"fine{form}"
        assert (moved.entries, moved.bytes) == (5, 10)
        assert (top / "abs").read_bytes() == (top / deep).read_bytes() == (top / "hard").read_bytes() == b"xxxxx"
        assert (top / "hard").stat().st_nlink == 2
        assert ((top / "exec").stat().st_mode & 0o777, (top / "exec").stat().st_mtime) == (0o755, 1000)


# --- watches ----------------------------------------------------------------------------------------------------------


async def test_a_watch_tells_what_changes(guest: Guest, opens: Open) -> None:
    (guest.work / "old").mkdir()
    told: set[tuple[str, str, str | None]] = set()

    async def until(changes: AsyncIterator[gf.Change], *wanted: tuple[str, str, str | None]) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not told.issuperset(wanted):
                one = await anext(changes)
                told.add((one.event, one.path, one.to))

    async with gf.watch(opens, "/work", recursive=True) as changes:
        (guest.work / "a\nb").write_text("1")
        await until(changes, ("created", "a\nb", None), ("written", "a\nb", None))
        async with guest.another() as channel:
            await gf.write(channel.converse, "sent", b"1")
        await until(changes, ("written", "sent", None))
        (guest.work / "old" / "x" / "y").mkdir(parents=True)
        (guest.work / "old" / "x" / "y" / "z").touch()
        await until(changes, ("created", "old/x", None), ("created", "old/x/y", None), ("created", "old/x/y/z", None))
        (guest.work / "old" / "x").rename(guest.work / "new")
        await until(changes, ("moved", "old/x", "new"))
        (guest.work / "new" / "y" / "z").chmod(0o600)
        await until(changes, ("attributes", "new/y/z", None))
        (guest.work / "new" / "y" / "z").unlink()
        await until(changes, ("removed", "new/y/z", None))
        (guest.work / "new").rename(guest.work.parent / "elsewhere")
        await until(changes, ("removed", "new", None))
    assert not [path for _, path, _ in told if path.startswith(".")]
    (guest.work / "file").touch()
    async with gf.watch(opens, "file") as changes:
        (guest.work / "file").write_text("1")
        await until(changes, ("written", "", None))
        (guest.work / "file").unlink()
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert [one.event async for one in changes][-1] == "removed"
    with pytest.raises(NotFound):
        async with gf.watch(opens, "none"):
            pass


async def test_a_watch_that_is_too_much_says_so(guest: Guest, opens: Open) -> None:
    async with gf.watch(opens, "/work", recursive=True) as changes:
        for name in "ab":
            (guest.work / name).touch()
        os.kill(guest.vm.pid, signal.SIGSTOP)
        for number in range(10_000):  # the kernel keeps 16384
            for name in "ab":
                (guest.work / name).chmod(0o600 + number % 2)
        os.kill(guest.vm.pid, signal.SIGCONT)
        async with asyncio.timeout(PATIENCE_SECONDS):
            async for one in changes:
                if one.event == "lost":
                    break


async def test_a_watch_on_everything_is_bounded_and_says_so() -> None:
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as place:  # in memory: it makes very many directories
        async with running(Path(place)) as guest:
            for number in range(8300):
                (guest.work / str(number)).mkdir()
            async with (
                gf.watch(guest.channel.converse, "/work", recursive=True) as changes,
                asyncio.timeout(PATIENCE_SECONDS),
            ):
                one = await anext(changes)
                assert (one.event, one.why) == ("lost", "more than 8,192 directories")


# --- ports ------------------------------------------------------------------------------------------------------------


async def test_a_port_of_the_guest(opens: Open) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            said = await reader.readexactly(1)
            if said == b"r":
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
                return
            data = await reader.read()  # until the other side has ended, and only then it answers
            writer.write(str(len(data)).encode())
            writer.write(data)
            await writer.drain()
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        inner = server.sockets[0].getsockname()[1]
        errors: list[object] = []
        async with ports.forward(opens, inner, on_error=errors.append) as port:

            async def ask(size: int) -> bytes:
                reader, writer = await asyncio.open_connection(ports.HOST, port)
                writer.write(b"d" + bytes(size))
                writer.write_eof()
                data = await reader.read()
                writer.close()
                await writer.wait_closed()
                return data

            async with asyncio.timeout(PATIENCE_SECONDS):
                answers = await asyncio.gather(*[ask(size) for size in (0, 1, 300_000, 3 << 20)])
            assert [len(one) for one in answers] == [1, 2, 300_006, (3 << 20) + 7]
            reader, writer = await asyncio.open_connection(ports.HOST, port)
            writer.write(b"r")
            with pytest.raises(ConnectionResetError):
                await reader.readexactly(1)
            writer.close()
            assert not errors
            # One that leaves in the middle takes nothing with it.
            _, writer = await asyncio.open_connection(ports.HOST, port)
            writer.write(b"d" + bytes(1 << 20))
            writer.transport.abort()
            assert len(await ask(5)) == 6
    with pytest.raises(Conflict, match="nothing answers on port"):
        async with ports.dial(opens, inner):
            pass
    async with ports.forward(opens, inner, on_error=errors.append) as port:
        reader, writer = await asyncio.open_connection(ports.HOST, port)
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        writer.close()
    assert "nothing answers" in str(errors[0])
    with pytest.raises(UsageError):
        async with ports.dial(opens, 65536):
            pass
