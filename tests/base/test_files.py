"""Files replaced atomically and locked between tasks, threads and processes."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swarm.base import files
from swarm.errors import HostError


def test_a_file_is_replaced_with_its_permissions_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_atomically(path, b"one", mode=0o604)
    files.write_atomically(path, "two", flush=True)
    files.write_atomically(path, "three", mode=0o640)
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("three", 0o640)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    (tmp_path / "directory" / "x").mkdir(parents=True)
    with pytest.raises(OSError):
        files.write_atomically(tmp_path / "directory", b"over a directory")
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]


@pytest.mark.parametrize(("held", "wanted", "free"), [(False, False, False), (True, False, False), (True, True, True)])
def test_a_lock_is_exclusive_unless_it_is_shared(tmp_path: Path, held: bool, wanted: bool, free: bool) -> None:
    with files.locked(tmp_path, shared=held):
        fd = files.try_lock(tmp_path, shared=wanted)
        assert (fd is not None) is free
        if fd is not None:
            os.close(fd)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = "import sys; from pathlib import Path; from swarm.base import files\n"
    code += "files.try_lock(Path(sys.argv[1]), create=0o600)"
    code += "; print('held', flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert files.try_lock(lock) is None
        assert lock.stat().st_mode & 0o777 == 0o600
        holder.kill()
    fd = files.try_lock(lock)
    assert fd is not None
    os.close(fd)


async def test_a_coroutine_waits_for_a_lock_and_can_be_cancelled(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def wait() -> None:
        async with files.locked_async(tmp_path, poll_seconds=0.001, waiting=asked.set):
            pass

    with files.locked(tmp_path):
        waiting, cancelled = asyncio.create_task(wait()), asyncio.create_task(wait())
        await asked.wait()
        cancelled.cancel()
        await asyncio.wait([cancelled])
        assert cancelled.cancelled() and not waiting.done()
    await asyncio.wait_for(waiting, 60)


def test_a_thread_does_not_wait_for_ever_for_a_lock(tmp_path: Path) -> None:
    with (
        files.locked(tmp_path, shared=True),
        pytest.raises(HostError, match=r"has held the lock on .* find it with `lsof"),
        files.locked(tmp_path, timeout_seconds=0.01),
    ):
        pass


def test_a_sparse_file_is_hashed_without_its_holes(tmp_path: Path) -> None:
    """4 TiB: read as sha256_of does, they would take hours."""
    blocks = 0

    def count() -> None:
        nonlocal blocks
        blocks += 1
        assert blocks < 100

    def digest(name: str, size: int, *, data: dict[int, bytes]) -> str:
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
            for at, content in data.items():
                file.seek(at)
                file.write(content)
        return files.sparse_sha256_of(tmp_path / name, count)

    size = 1 << 42
    one = digest("one", size, data={5 << 20: b"a", size - 1: b"z"})
    assert one == digest("zeros instead of holes", size, data={5 << 20: b"a", size - 1: b"z", 7 << 20: b"\0" * 9000})
    others = [
        digest("empty", size, data={}),
        digest("longer", size + 1, data={5 << 20: b"a", size - 1: b"z"}),
        digest("shifted", size, data={6 << 20: b"a", size - 1: b"z"}),
        digest("changed", size, data={5 << 20: b"b", size - 1: b"z"}),
    ]
    assert len({one, *others}) == 5


def test_a_full_disk_is_told_from_other_errors() -> None:
    assert files.is_full(OSError(errno.ENOSPC, "")) and files.is_full(OSError(errno.EDQUOT, ""))
    assert not files.is_full(OSError(errno.EIO, "")) and not files.is_full(ValueError())
    said = files.no_space(Path("/here"), "it was not written", setting="SWARM_HERE")
    assert said == (
        "no space left in /here: it was not written; free some, or set SWARM_HERE to a place on another disk"
    )


def test_an_error_of_the_system_says_what_could_not_be_done(tmp_path: Path) -> None:
    with (
        pytest.raises(HostError, match=r"can't read the file: No such file or directory"),
        files.host_errors("can't read the file"),
    ):
        (tmp_path / "missing").read_bytes()
