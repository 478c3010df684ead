"""Which files of a directory go into a VM for a command."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from swarm.base.trees import Entry
from swarm.cli import moving
from swarm.errors import UsageError


def git(top: Path, *words: str) -> None:
    argv = ["git", "-C", str(top), "-c", "user.name=t", "-c", "user.email=t@t", "-c", "protocol.file.allow=always"]
    subprocess.run([*argv, *words], check=True, capture_output=True)


def picked(top: Path, *, all_files: bool = False) -> moving.Picked:
    return asyncio.run(moving.pick(top, all_files=all_files))


def names(found: moving.Picked) -> list[str]:
    return [entry.name for entry, _ in found.files]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A work tree with every kind of file that belongs to it or does not."""
    inner = tmp_path / "inner"
    inner.mkdir()
    git(inner, "init", "-q")
    (inner / "in.txt").write_text("in")
    git(inner, "add", ".")
    git(inner, "commit", "-qm", "x")
    top = tmp_path / "top"
    (top / "src/deep").mkdir(parents=True)
    git(top, "init", "-q")
    (top / ".gitignore").write_text("*.log\nbuild/\n")
    (top / "run.sh").write_text("#!/bin/sh\n")
    (top / "run.sh").chmod(0o755)
    (top / "gone").write_text("tracked, and deleted")
    (top / "src/a b\n\u00e9'\"").write_text("odd")
    (top / os.fsdecode(b"src/\xff\xfe")).write_text("not UTF-8")
    (top / "-rf").write_text("a name that looks like options")
    (top / "link").symlink_to("src/deep/../x")
    (top / "here").symlink_to("run.sh")
    git(top, "submodule", "add", "-q", str(inner), "sub")
    git(top, "add", ".")
    git(top, "commit", "-qm", "x")
    (top / "gone").unlink()
    (top / "new.txt").write_text("untracked")
    (top / "noise.log").write_text("ignored")
    (top / "build").mkdir()
    (top / "build/big").write_text("ignored too")
    return top


def test_of_a_git_work_tree_what_belongs_to_it(tree: Path) -> None:
    found = picked(tree)
    assert sorted(names(found)) == sorted(
        [
            "-rf", ".gitignore", ".gitmodules", "here", "new.txt", "run.sh", "src/a b\n\u00e9'\"",
            os.fsdecode(b"src/\xff\xfe"), "sub/in.txt",
        ]
    )  # fmt: skip
    assert [what.partition(",")[0] for what in found.left_out] == ["link"]
    modes = {entry.name: entry.mode & 0o777 for entry, _ in found.files}
    assert modes["run.sh"] == 0o755 and modes["new.txt"] & 0o111 == 0
    assert sorted(names(picked(tree / "src"))) == ["a b\n\u00e9'\"", os.fsdecode(b"\xff\xfe")]


def test_all_files_are_all(tree: Path) -> None:
    found = names(picked(tree, all_files=True))
    assert {"noise.log", "build/big", ".git/HEAD"} <= {*found} and "gone" not in found


def test_another_directory_goes_as_it_is_but_for_what_cannot(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "out").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    found = picked(tmp_path)
    assert names(found) == ["file", "empty/"]
    assert [what.partition(",")[0] for what in found.left_out] == ["out", "pipe"]


def test_its_limits_are_told_before_all_is_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(moving.MAX_BYTES + 1)
    with pytest.raises(UsageError, match=r"more than 256 MiB.*--dir.*--all-files.*--no-files"):
        picked(tmp_path)
    assert names(picked(tmp_path, all_files=True)) == ["large"]
    git(tmp_path, "init", "-q")
    assert names(picked(tmp_path)) == ["large"]


def test_many_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "0").touch()
    for number in range(1, moving.MAX_FILES + 1):
        os.link(tmp_path / "0", tmp_path / str(number))
    with pytest.raises(UsageError, match=r"more than 20,000 files"):
        picked(tmp_path)


def test_contents_come_as_long_as_they_were_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 3)
    (tmp_path / "b").write_bytes(b"b" * 5)
    (tmp_path / "c").symlink_to("a")
    found = picked(tmp_path)
    (tmp_path / "b").write_bytes(b"b" * 50)  # it grows meanwhile, as a log does
    assert moving._Pieces(found).take(9) == b"aaabbbbba"
    (tmp_path / "b").write_bytes(b"b")
    with pytest.raises(UsageError, match="changed while it was read"):
        moving._Pieces(found).take(9)
    (tmp_path / "b").unlink()
    (tmp_path / "b").symlink_to("/etc/passwd")
    with pytest.raises(OSError, match="symbolic links"):
        moving._Pieces(found).take(9)
    assert found.files[0][0] == Entry("a", 0o100644, 3)


def test_a_directory_that_is_none() -> None:
    with pytest.raises(UsageError, match="is not a directory"):
        picked(Path("/etc/passwd"))
