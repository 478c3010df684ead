"""Sparse copies: equal to their source whatever is changed in it, and never larger."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.base import sparse

KB = 1 << 10


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    """A megabyte's file of holes and data."""
    path = tmp_path / "source"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 3 << 20)
    for at, size in ((0, 4 * KB), (200 * KB, 300 * KB), ((2 << 20) + 7, 90 * KB)):
        os.pwrite(fd, os.urandom(size), at)
    yield fd
    os.close(fd)


def blocks(path: Path) -> int:
    return path.stat().st_blocks


def test_a_copy_has_the_content_and_the_holes(source: int, tmp_path: Path) -> None:
    sparse.copy(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "source").read_bytes()
    assert blocks(tmp_path / "copy") <= blocks(tmp_path / "source")
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        sparse.copy(source, tmp_path / "copy")


def test_to_another_file_system(source: int, tmp_path: Path) -> None:
    other = Path("/dev/shm") / f"sparse-{os.getpid()}"
    try:
        sparse.copy(source, other)
        assert other.read_bytes() == (tmp_path / "source").read_bytes()
        sparse.link_or_copy(other, tmp_path / "back")
        sparse.move(other, tmp_path / "moved")
        assert (tmp_path / "back").read_bytes() == (tmp_path / "moved").read_bytes() == os.pread(source, 3 << 20, 0)
        assert not other.exists()
    finally:
        other.unlink(missing_ok=True)


@pytest.mark.parametrize("seed", range(10))
def test_an_update_makes_it_equal_again(source: int, tmp_path: Path, seed: int) -> None:
    """Written, discarded, longer, shorter: whatever a guest may do to its disk after the copy."""
    chance = random.Random(seed)
    sparse.copy(source, tmp_path / "copy")
    changed = 0
    for _ in range(chance.randrange(6)):
        at, size = chance.randrange(3 << 20), chance.randrange(200 * KB)
        if chance.random() < 0.5:
            changed += os.pwrite(source, chance.randbytes(size), at)
        else:
            sparse._punch(source, at, at + size)
    target = os.open(tmp_path / "copy", os.O_RDWR)
    try:
        written = sparse.update(source, target)
    finally:
        os.close(target)
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "source").read_bytes()
    # Of each change at most the 64 KiB around its ends are written too, and of a hole less than a page at each end.
    assert written <= changed + 6 * 2 * 2 * 64 * KB
    assert changed or written <= 6 * 2 * 64 * KB
    assert blocks(tmp_path / "copy") <= blocks(tmp_path / "source") + 2 * 8 * 6


@pytest.mark.parametrize("old", [True, False])
def test_a_copy_made_ahead_is_right_in_the_end(source: int, tmp_path: Path, old: bool) -> None:
    if old:  # long ago: only then does the time of the last write say anything
        os.utime(tmp_path / "source", (1, 1))
    for turn in range(3):
        ahead = sparse.Ahead(tmp_path / "source", tmp_path / f"copy{turn}")
        try:
            if turn:
                os.pwrite(source, bytes([turn]) * 5000, 1 << 20)  # perhaps within one tick after the last
            written = ahead.finish()
        finally:
            ahead.close()
        assert (tmp_path / f"copy{turn}").read_bytes() == (tmp_path / "source").read_bytes()
        assert bool(written) == bool(turn)


def test_nothing_is_written_where_nothing_differs(source: int, tmp_path: Path) -> None:
    sparse.copy(source, tmp_path / "copy")
    os.utime(tmp_path / "copy", ns=(1, 1))
    target = os.open(tmp_path / "copy", os.O_RDWR)
    try:
        assert sparse.write_differing(target, 200 * KB, os.pread(source, 300 * KB, 200 * KB)) == 0
        assert (tmp_path / "copy").stat().st_mtime_ns == 1
        assert sparse.write_differing(target, 200 * KB, bytes(300 * KB)) == 300 * KB
    finally:
        os.close(target)


def test_zeros_become_holes(tmp_path: Path) -> None:
    path = tmp_path / "dense"
    path.write_bytes(bytes(1 << 20) + b"x" * 100 + bytes(1 << 20))
    before, content = blocks(path), path.read_bytes()
    sparse.dig(path)
    assert path.read_bytes() == content
    assert blocks(path) < before / 8


def test_it_can_be_stopped_at_any_piece(source: int, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def check() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        sparse.copy(source, tmp_path / "copy", check=check)
    target = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(Stopped):
            sparse.update(source, target, check)
    finally:
        os.close(target)
