"""Files on their way to a ticket and back."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tarfile
from pathlib import Path

import pytest

from swarm.client import AsyncSwarm, Conflict, Invalid, NotFound, ServerError
from swarm.client.archive import packed, unpack
from tests.client.faulty import Answer, faulty
from tests.engine.conftest import Bench

COPIES = """
import json, os, shutil
shutil.copytree("repo", "out/repo", symlinks=True)
shutil.copy("notes.txt", "out/notes.txt")
os.symlink("/etc/passwd", "out/outside")
json.dump(sorted(os.listdir("repo")), open("output.json", "w"))
"""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    repo = tmp_path / "given" / "repo"
    (repo / "sub" / "empty").mkdir(parents=True)
    (repo / ".git").mkdir()
    (repo / ".git" / "config").write_text("[remote] url = https://user:password@example")
    (repo / "run.sh").write_text("#!/bin/sh\n")
    (repo / "run.sh").chmod(0o755)
    (repo / "sub" / "ü").write_bytes(b"\0\xff" * 300_000)
    (repo / "link").symlink_to("sub/ü")
    (tmp_path / "given" / "notes").write_text("remember")
    return repo


async def test_there_and_back(s: AsyncSwarm, at_work: Bench, repo: Path, tmp_path: Path) -> None:
    await at_work.agent(COPIES, "copies")
    notes = repo.parent / "notes"
    ticket = await s.tickets.submit("copies", files={"repo": repo, "notes.txt": notes})
    assert await ticket.result(60) == ["link", "run.sh", "sub"]
    listed = {one.name: one.kind for one in await ticket.files()}
    assert {"notes.txt": "file", "repo/link": "link", "repo/sub/ü": "file"}.items() <= listed.items()
    to = tmp_path / "results" / "new"
    written = await ticket.download(to)
    assert {path.relative_to(to).as_posix() for path in written} == {
        "notes.txt", "repo/link", "repo/run.sh", "repo/sub/ü",
    }  # fmt: skip
    assert (to / "notes.txt").read_text() == "remember" and (to / "repo" / "sub" / "empty").is_dir()
    assert (to / "repo" / "link").read_bytes() == (repo / "sub" / "ü").read_bytes()
    assert (to / "repo" / "run.sh").stat().st_mode & stat.S_IXUSR
    with pytest.raises(Conflict, match="is there"):
        await ticket.download(to, "*.txt")
    (to / "notes.txt").write_text("changed")
    assert await ticket.download(to, "*.txt", replace=True) == [to / "notes.txt"]
    notes.write_text("forget")
    second = await s.tickets.submit("copies", files={"repo": repo, "notes.txt": notes})
    await second.result(60)
    compared = await ticket.diff(f"{second.id}:main", attempt="main:1")
    [change] = compared.files
    assert (change.name, change.change, [*change.bytes], compared.outputs) == ("notes.txt", "changed", [8, 6], "")
    assert "-remember\n+forget\n" in (change.diff or "") and compared.a["attempt"]["outcome"] == "succeeded"
    with pytest.raises(NotFound):
        await ticket.diff("nobody")
    assert (to / "notes.txt").read_text() == "remember"
    assert await ticket.download(tmp_path / "none", "nothing") == []


async def test_what_can_not_be_sent(s: AsyncSwarm, at_work: Bench, repo: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await s.tickets.submit("echo", files={"repo/": repo / "nothing"})
    with pytest.raises(Invalid, match="`files` or a `key`"):
        await s.tickets.submit("echo", files={"repo/": repo}, key="k")
    (repo / "away").symlink_to("/etc/passwd")
    with pytest.raises(Invalid, match="leads out"):
        await s.tickets.submit("echo", files={"repo/": repo})
    (repo / "away").unlink()
    ticket = await s.tickets.submit("echo", files={"repo/": repo}, id="mine", draft=True)
    assert ticket.id == "mine" and list(ticket.inputs["$files"]) == ["repo/"]
    with pytest.raises(Conflict, match="is taken"):
        await s.tickets.submit("echo", files={"repo/": repo}, id="mine")
    assert await ticket.files() == []
    with pytest.raises(NotFound, match="no agent"):
        await s.tickets.submit("ecko", files={"repo/": repo})
    assert [one.id async for one in s.tickets.list()] == ["mine"]


def archive(*members: tuple[str, str | None, bytes]) -> io.BytesIO:
    """Names, where links lead, contents."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, target, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), tarfile.SYMTYPE if target else tarfile.REGTYPE
            info.linkname = target or ""
            tar.addfile(info, io.BytesIO(data))
    return file


@pytest.mark.parametrize(
    "members",
    [
        [("../x", None, b"x")],
        [("/x", None, b"x")],
        [("a/../../x", None, b"x")],
        [("l", "..", b""), ("l/x", None, b"x")],
        [("l", "/", b""), ("l/x", None, b"x")],
        [("d/e", ".", b""), ("d/e/l", "../..", b""), ("d/l/x", None, b"x")],
        [("d/e", "..", b""), ("d/e/l", "..", b"")],
        [("l", "a/../../..", b"")],
        [("a", None, b"x"), ("a/b", None, b"x")],
        [(".", None, b"x")],
        [("", None, b"x")],
    ],
    ids=str,
)
def test_nothing_is_written_elsewhere(tmp_path: Path, members: list[tuple[str, str | None, bytes]]) -> None:
    to = tmp_path / "a" / "b"
    with contextlib.suppress(ServerError, Conflict):
        unpack(archive(*members), to, replace=True)
    assert {path.name for path in tmp_path.rglob("*") if to not in path.parents} == {"a", "b"}
    for path in to.rglob("*"):
        assert path.resolve().is_relative_to(to), path


def test_no_repository_comes(tmp_path: Path) -> None:
    members = [
        (".git/hooks/x", None, b"x"), ("d/.GIT/config", None, b"x"), ("bare/HEAD", None, b"x"), ("HEAD", "x", b""),
        ("link", ".git/hooks/x", b""), ("bare/config", None, b"x"), ("bin/head", None, b"x"),
        ("later", "bare/HEAD", b""), ("bare/later", "HEAD", b""), ("bin/up", "../HEAD", b""),
    ]  # fmt: skip
    unpack(archive(*members), tmp_path / "to", replace=True)
    found = {str(path.relative_to(tmp_path / "to")) for path in (tmp_path / "to").rglob("*") if not path.is_dir()}
    assert found == {"bare/config", "bin/head"}
    (tmp_path / "to/bare/HEAD").write_text("mine")
    for name in ("bare/config", "bare/hooks/x"):
        with pytest.raises(Conflict, match="has a HEAD in it"):
            unpack(archive((name, None, b"theirs")), tmp_path / "to", replace=True)
    for below in ("hooks", "hooks/deep"):
        with pytest.raises(Conflict, match="has a HEAD in it"):
            unpack(archive(("x", None, b"theirs")), tmp_path / "to/bare" / below, replace=True)
    assert {path.name for path in (tmp_path / "to/bare").iterdir()} == {"config", "HEAD"}
    (tmp_path / "to/bare/tree/.git").mkdir(parents=True)
    assert unpack(archive(("x", None, b"theirs")), tmp_path / "to/bare/tree/src", replace=True)


def test_links_of_the_user_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "to" / "x").symlink_to(tmp_path / "mine")
    (tmp_path / "to" / "d").symlink_to(tmp_path)
    unpack(archive(("x", None, b"theirs")), tmp_path / "to", replace=True)
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "to" / "x").read_text() == "theirs"
    with pytest.raises(Conflict, match="through a link"):
        unpack(archive(("d/mine", None, b"theirs")), tmp_path / "to", replace=True)
    with pytest.raises(ServerError, match="damaged"):
        unpack(io.BytesIO(b"x" * 10_000), tmp_path / "to", replace=True)


def test_an_archive_tells_nothing_of_its_owner(repo: Path) -> None:
    data = packed(repo)
    assert b"password" not in data
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {(one.uid, one.uname, one.mtime) for one in tar} == {(0, "", 0)}
    os.utime(repo / "run.sh", (1, 1))
    assert packed(repo) == data


async def test_a_download_that_breaks_begins_anew(tmp_path: Path) -> None:
    whole = Answer(200, archive(("x", None, b"x" * 5000)).getvalue())
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + b"y" * 9000
    gone = Answer(404, {"detail": "no ticket t"})
    async with faulty([Answer(200, {"ticket": {"id": "t"}}), cut, whole, gone]) as server, AsyncSwarm(server.url) as s:
        ticket = await s.tickets.get("t")
        assert [path.read_bytes() for path in await ticket.download(tmp_path)] == [b"x" * 5000]
        with pytest.raises(NotFound, match="no ticket t"):
            await ticket.download(tmp_path, replace=True)
    assert len(server.requests) == 4
