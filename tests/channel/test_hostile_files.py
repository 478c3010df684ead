"""A guest that lies about its files, changes and ports: each lie is a ChannelError, soon, and nothing is left here."""

from __future__ import annotations

import asyncio
import json
import tarfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from swarm.channel import Channel, ports
from swarm.channel import guest_files as files
from swarm.channel import guest_trees as trees
from swarm.errors import ChannelError, Conflict
from tests.channel.test_hostile_guest import Answer, liar, ok, say
from tests.conftest import PATIENCE_SECONDS

pytestmark = pytest.mark.slow  # starts servers

INFO = {"kind": "file", "size": 1, "mode": 0o644, "uid": 0, "gid": 0, "mtime_ns": 1}
Call = Callable[[Channel, Path], Awaitable[object]]


def stat(channel: Channel, _: Path) -> Awaitable[object]:
    return files.stat(channel.converse, "x")


def listed(channel: Channel, _: Path) -> Awaitable[object]:
    return files.list_dir(channel.converse, "x", limit=10)


async def read(channel: Channel, place: Path) -> None:
    async for _ in files.read(channel.converse, "x", length=10):
        pass


def get(channel: Channel, place: Path) -> Awaitable[object]:
    return files.get(channel.converse, "x", place / "x", limit_bytes=10)


def write(channel: Channel, _: Path) -> Awaitable[object]:
    return files.write(channel.converse, "x", b"x" * (3 << 20))


async def pack(channel: Channel, place: Path) -> None:
    async for _ in trees.pack(channel.converse, "x", limit_bytes=1000, limit_entries=3):
        pass


def get_tree(channel: Channel, place: Path) -> Awaitable[object]:
    return trees.get_tree(channel.converse, "x", place / "tree", limit_bytes=1000, limit_entries=3)


async def watch(channel: Channel, place: Path) -> None:
    async with files.watch(channel.converse, "x") as changes:
        async for _ in changes:
            pass


async def dial(channel: Channel, _: Path) -> None:
    async with ports.dial(channel.converse, 80) as dialled:
        while await dialled.read():
            pass


def data(id: int, payload: bytes) -> bytes:
    return say(id, payload, stream="data")


def lines(id: int, *values: object) -> bytes:
    return data(id, b"".join(json.dumps(value).encode() + b"\n" for value in values))


def member(name: str, contents: bytes = b"", **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(contents)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + contents + bytes(-len(contents) % 512)


def packed(id: int, archive: bytes) -> Answer:
    return [data(id, archive + bytes(1024)), ok(id, entries=1, bytes=1, left_out=0, first="")]


def started(id: int) -> bytes:
    return say(id, started_ns=1)


LIES: dict[str, tuple[Call, Callable[[int], Answer]]] = {
    "an unknown kind": (stat, lambda n: [ok(n, **(INFO | {"kind": "x"}))]),
    "a size in words": (stat, lambda n: [ok(n, **(INFO | {"size": "1"}))]),
    "a mode of many bits": (stat, lambda n: [ok(n, **(INFO | {"mode": 1 << 20}))]),
    "a link to nowhere": (stat, lambda n: [ok(n, **(INFO | {"kind": "link"}))]),
    "data of a stat": (stat, lambda n: [data(n, b"x"), ok(n, **INFO)]),
    "no JSON": (listed, lambda n: [data(n, b"x\n")]),
    "a list": (listed, lambda n: [lines(n, [])]),
    "half a line": (listed, lambda n: [data(n, b"{}")]),
    "a name with /": (listed, lambda n: [lines(n, {"name": "a/b", **INFO})]),
    "the name ..": (listed, lambda n: [lines(n, {"name": "..", **INFO})]),
    "a name of many bytes": (listed, lambda n: [lines(n, {"name": "x" * 9000, **INFO})]),
    "no name": (listed, lambda n: [lines(n, INFO)]),
    "more than the limit": (listed, lambda n: [lines(n, *[{"name": "x", **INFO}] * 11)]),
    "brackets": (listed, lambda n: [data(n, b"[" * 9000 + b"\n")]),
    "a long line": (listed, lambda n: [data(n, b" " * 70_000 + b"\n")]),
    "very many lines": (listed, lambda n: [data(n, b"\n" * 10_000)]),
    "complete is a text": (listed, lambda n: [ok(n, complete="yes")]),
    "more than was asked for": (read, lambda n: [data(n, b"x" * 11)]),
    "more in pieces": (read, lambda n: [data(n, b"x")] * 11),
    "empty pieces": (read, lambda n: [data(n, b"")] * 11),
    "a hole that nobody asked for": (read, lambda n: [say(n, hole=5), ok(n, bytes=5)]),
    "another size": (read, lambda n: [data(n, b"x"), ok(n, bytes=2)]),
    "a foreign stream": (read, lambda n: [say(n, b"x", stream="stdout")]),
    "done too early": (write, lambda n: [ok(n, bytes=3 << 20)]),
    "a frame of a write": (write, lambda n: [data(n, b"x")]),
    "how much, in words": (write, lambda n: [ok(n, bytes="x")]),
    "closes in the middle": (write, lambda n: []),
    "no archive": (pack, lambda n: packed(n, b"x" * 1024)),
    "half an archive": (pack, lambda n: [data(n, member("x", b"x" * 600)[:600]), ok(n)]),
    "no end of the archive": (pack, lambda n: [data(n, member("x")), ok(n)]),
    "an absolute name": (pack, lambda n: packed(n, member("/x"))),
    "a name that leads out": (get_tree, lambda n: packed(n, member("a/../../x"))),
    "a device": (get_tree, lambda n: packed(n, member("x", type=tarfile.CHRTYPE))),
    "a hard link": (get_tree, lambda n: packed(n, member("x", type=tarfile.LNKTYPE, linkname="/etc/passwd"))),
    "a link without a target": (get_tree, lambda n: packed(n, member("x", type=tarfile.SYMTYPE))),
    "a long name": (pack, lambda n: packed(n, member("x" * 5000))),
    "a header that is large": (pack, lambda n: packed(n, member("x", type=tarfile.GNUTYPE_LONGNAME, size=1 << 40))),
    "a size below 0": (pack, lambda n: packed(n, member("x", size=-1))),
    "more files than may be": (get_tree, lambda n: packed(n, b"".join(member(str(i)) for i in range(4)))),
    "more bytes than may be": (get_tree, lambda n: packed(n, member("x", b"x" * 1001))),
    "a size that is a lie": (pack, lambda n: packed(n, member("x", size=1 << 62))),
    "endless nothing": (pack, lambda n: [data(n, bytes(1 << 20))] * 3),
    "a file below a link": (
        get_tree,
        lambda n: packed(n, member("a", type=tarfile.SYMTYPE, linkname="b") + member("a/x", b"x")),
    ),
    "what was left out is no text": (pack, lambda n: [data(n, bytes(1024)), ok(n, left_out=1, first=1)]),
    "a watch that has not begun": (watch, lambda n: [lines(n, {"event": "created", "path": "x"})]),
    "an unknown event": (watch, lambda n: [started(n), lines(n, {"event": "x", "path": "x"})]),
    "an event without a path": (watch, lambda n: [started(n), lines(n, {"event": "created"})]),
    "moved to nowhere": (watch, lambda n: [started(n), lines(n, {"event": "moved", "path": "x"})]),
    "events that are no lines": (watch, lambda n: [started(n), data(n, b"x" * 9)]),
    "a port that answers first": (dial, lambda n: [data(n, b"x")]),
    "a foreign stream of a port": (dial, lambda n: [started(n), say(n, b"x", stream="stdout")]),
    "a port that is maybe reset": (dial, lambda n: [started(n), ok(n, reset=1)]),
}


@pytest.mark.parametrize(("call", "answer"), LIES.values(), ids=LIES.keys())
async def test_a_lie_is_a_channel_error(
    tmp_path_factory: pytest.TempPathFactory, call: Call, answer: Callable[[int], Answer]
) -> None:
    place = tmp_path_factory.mktemp("l")
    async with liar(place, lambda head: answer(head["id"])) as channel:
        with pytest.raises((ChannelError, Conflict)) as caught:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await call(channel, place)
        assert len(str(caught.value)) < 2500
        assert isinstance(caught.value, ChannelError) or answer is LIES["a file below a link"][1]
    assert {one.name for one in place.rglob("*")} <= {"s", "tree", "a", "0", "1", "2"}


async def test_a_file_that_grows_without_end_ends_at_the_limit(tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("l")
    for frame in (lambda n: say(n, hole=1 << 62), lambda n: data(n, b"x" * 11)):

        def answer(head: dict[str, object], frame: Callable[[int], bytes] = frame) -> Answer:
            id = int(str(head["id"]))
            return [ok(id, **INFO)] if head["op"] == "stat" else [frame(id)]

        async with liar(place, answer) as channel:
            with pytest.raises(Conflict, match="more than the limit of 10 bytes"):
                await get(channel, place)
    assert not list(place.glob("*x*"))


ENDLESS: list[tuple[int, Callable[[int], Answer], str]] = [
    (1, lambda n: [data(n, b"x" * (1 << 20))] * 66, "more than the limit of 67108865 bytes"),
    ((1 << 63) - 1, lambda n: [say(n, hole=(1 << 63) - 1), say(n, hole=1)], "more of a file than a file can hold"),
]


@pytest.mark.parametrize(("size", "frames", "says"), ENDLESS, ids=["grows", "holes"])
async def test_a_file_that_never_ends_ends_without_a_limit_too(
    tmp_path_factory: pytest.TempPathFactory, size: int, frames: Callable[[int], Answer], says: str
) -> None:
    """It may have grown since its size was told, but not by as much as this disk holds, nor by more than a file can."""
    place = tmp_path_factory.mktemp("l")

    def answer(head: dict[str, object]) -> Answer:
        id = int(str(head["id"]))
        return [ok(id, **(INFO | {"size": size}))] if head["op"] == "stat" else frames(id)

    async with liar(place, answer) as channel:
        with pytest.raises((Conflict, ChannelError), match=says):
            await files.get(channel.converse, "x", place / "x")
    assert not list(place.glob("*x*"))


async def test_no_link_to_what_git_runs_comes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Who writes to it later would write a hook, or settings, that name programs."""
    place = tmp_path_factory.mktemp("l")
    targets = {"a": ".git/hooks/pre-commit", "d/b": "../.GIT/config", "c": ".git", "ok": "plain"}
    targets |= {"later": "HEAD", "bare/later": "./HEAD", "bare/up": "../bare/HEAD"}  # though there be none yet
    archive = b"".join(member(name, type=tarfile.SYMTYPE, linkname=to) for name, to in targets.items())
    async with liar(place, lambda head: packed(head["id"], archive)) as channel:
        moved = await trees.get_tree(channel.converse, "x", place / "tree")
    assert [one.name for one in (place / "tree").rglob("*") if one.is_symlink()] == ["ok"]
    assert len([one for one in moved.left_out if "into a .git or to a HEAD" in one]) == 6
