"""Directory trees as values: whoever made them, they are what they say, and stay where they belong."""

from __future__ import annotations

import io
import json
import os
import stat
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.base import trees
from swarm.base.trees import Contents, Entry, Target
from swarm.channel.files import Received
from swarm.errors import ChannelError, Conflict, HostError, StoreError, SwarmError, UsageError

FILE, LINK = stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777


async def of(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(1, 50))
async def test_contents_come_back_from_any_place(files: list[bytes], cut: int) -> None:
    parts = dict(packed := list(trees.pack((Entry(f"f{i}", FILE, len(d)), (d,)) for i, d in enumerate(files))))
    tree = trees.manifest(packed[-1][1])
    whole = b"".join(files)

    async def load(digest: str) -> str:
        return parts[digest]

    contents = Contents(tree.parts, load)
    for (entry, offset), data in zip(tree.offsets(), files, strict=True):
        assert b"".join([piece async for piece in contents.chunks(offset, entry.size)]) == data
    at = min(cut, len(whole))
    assert b"".join([piece async for piece in contents.chunks(at, len(whole) - at)]) == whole[at:]


async def test_parts_are_cut_and_the_same_contents_are_the_same_parts() -> None:
    data = os.urandom(trees.PART_BYTES * 2 + 5)
    one, other = ([*trees.pack([(Entry(name, FILE, len(data)), (data,))])] for name in "ab")
    assert len(one) == 4 and one[:3] == other[:3] and one[3] != other[3]
    digest, text = one[0]
    assert trees.content(digest, text) == data[: trees.PART_BYTES]
    with pytest.raises(StoreError, match="damaged"):
        trees.content(digest, text.replace("A", "B"))


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "null", '{"tree": [], "parts": ["x"]}', '{"tree": [["a", 33188, 1]], "parts": []}',
        '{"tree": [["a", 33188, -1]], "parts": []}', '{"tree": [["a", 33188, true]], "parts": []}',
        '{"tree": [["../a", 33188, 0]], "parts": []}', '{"tree": [["/a", 33188, 0]], "parts": []}',
        '{"tree": [["a//b", 33188, 0]], "parts": []}', '{"tree": [["a", 24576, 0]], "parts": []}',
        '{"tree": [["a/", 33188, 0]], "parts": []}', '{"tree": [["a", 16877, 0]], "parts": []}',
        '{"tree": [["a", 41471, 5000]], "parts": []}', '{"tree": [["a\\u0000", 33188, 0]], "parts": []}',
        json.dumps({"tree": [["a", FILE, trees.MAX_BYTES + 1]], "parts": ["0" * 64] * 257}),
        json.dumps({"tree": [[f"{i}", FILE, 0] for i in range(trees.MAX_ENTRIES + 1)], "parts": []}),
        "[" * 100_000,
    ],
)  # fmt: skip
def test_a_bad_manifest_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no list of files"):
        trees.manifest(text)


@pytest.mark.parametrize(
    ("name", "target", "stays"),
    [
        ("a", "b", True), ("a", "b/c", True), ("d/a", "../b", True), ("d/e/a", "../../b", True), ("d/a", ".", True),
        ("d/a", "./../b", True), ("a", "..", False), ("a", "../b", False), ("d/a", "../../b", False),
        ("a", "/etc/passwd", False), ("d/a", "e/../../b", False), ("a", "b/..", False), ("a", "", False),
        ("d/a", "..//../b", False),
    ],
)  # fmt: skip
def test_where_links_lead(name: str, target: str, stays: bool) -> None:
    assert trees.stays_within(name, target) is stays


@given(st.lists(st.sampled_from(["a", "b", "..", ".", ""]), max_size=6), st.lists(st.sampled_from("ab"), max_size=2))
def test_a_link_that_stays_leads_nowhere_else(target: list[str], below: list[str]) -> None:
    """Against the plain meaning of a path, with each name a directory."""
    name = "/".join([*below, "link"])
    if trees.stays_within(name, "/".join(target)):
        assert os.path.normpath("/".join(["/top/x", *below, *target])).startswith("/top/x")


async def write(top: Path, name: str, mode: int, *contents: bytes) -> None:
    target = Target(top)
    try:
        await target.write(Entry(name, mode, sum(map(len, contents))), of(*contents))
    finally:
        target.close()


def test_a_place_that_can_not_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises(Conflict, match="is not a directory"):
            Target(tmp_path / place)
    with pytest.raises(HostError, match="can't make the directory /proc/x"):
        Target(Path("/proc/x"))


async def test_what_is_cut_off_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("whole")

    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        raise ConnectionError

    target = Target(tmp_path)
    with pytest.raises(ConnectionError):
        await target.write(Entry("f", FILE, 8), broken())
    target.close()
    assert [one.name for one in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "whole"


async def test_nothing_is_written_outside(tmp_path: Path) -> None:
    top, outside = tmp_path / "top", tmp_path / "outside"
    top.mkdir()
    outside.mkdir()
    (outside / "f").write_text("theirs")
    (top / "dir").symlink_to(outside)
    (top / "file").symlink_to(outside / "f")
    for name in ("dir/f", "dir/x/y", "../x", "/x", "a/../../x", "."):
        with pytest.raises(Conflict):
            await write(top, name, FILE, b"x")
    await write(top, "file", FILE, b"mine")  # in place of the link, not through it
    assert (top / "file").read_text() == "mine" and not (top / "file").is_symlink()
    assert [p.name for p in outside.iterdir()] == ["f"] and (outside / "f").read_text() == "theirs"
    # A tree whose own link is in the way of its file.
    await write(top, "l", LINK, b"../outside")
    with pytest.raises(Conflict, match="is a link or a file"):
        await write(top, "l/x", FILE, b"x")
    (top / "d").mkdir()
    with pytest.raises(Conflict, match="is a directory"):
        await write(top, "d", FILE, b"x")
    await write(top, "setuid", stat.S_IFREG | 0o4755, b"")
    assert stat.S_IMODE((top / "setuid").stat().st_mode) == 0o755


def sent(name: bytes, mode: int = FILE, contents: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack(">IIQ", len(name), mode, len(contents) if size is None else size) + name + contents


@pytest.mark.parametrize(
    "stream",
    [
        b"\0", sent(b""), sent(b"../x"), sent(b"/x"), sent(b"a/./b"), sent(b"x" * 256), sent(b"a") + sent(b"a"),
        sent(b"a", size=5), sent(b"a", mode=stat.S_IFCHR), sent(b"a", mode=stat.S_IFDIR), sent(b"a/"),
        sent(b"a", mode=LINK, size=1 << 20), sent(b"a", size=1 << 63), sent(b"a\0"),
        struct.pack(">IIQ", 1 << 31, FILE, 0), b"".join(sent(b"%d" % i) for i in range(trees.MAX_ENTRIES + 1)),
        b"".join(sent(b"%d" % i, mode=0) for i in range(trees.MAX_ENTRIES + 1)),
    ],
)  # fmt: skip
def test_a_hostile_guest_is_refused(stream: bytes) -> None:
    with pytest.raises(SwarmError) as caught:
        list(trees.pack(Received(io.BytesIO(stream)).entries()))
    assert isinstance(caught.value, ChannelError | UsageError)


def test_what_a_guest_left_out_is_told() -> None:
    received = Received(io.BytesIO(sent(b"big", mode=0, size=1 << 40) + sent(b"a", contents=b"x")))
    tree = trees.manifest(list(trees.pack(received.entries()))[-1][1])
    assert received.left_out == [("big", 1 << 40)] and [entry.name for entry in tree.entries] == ["a"]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/etc/passwd")])
def test_what_can_not_be_sent(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "odd")
    with pytest.raises(UsageError, match="can't be sent"):
        list(trees.pack(trees.read(tmp_path, trees.walk(tmp_path))))


async def test_nobody_but_its_owner_may_write_a_file_that_came(tmp_path: Path) -> None:
    async def nothing() -> AsyncIterator[bytes]:
        yield b"x"

    target = trees.Target(tmp_path)
    try:
        await target.write(trees.Entry("f", stat.S_IFREG | 0o777, 1), nothing())
    finally:
        target.close()
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o755
