"""What coding agents bring back: real repositories, odd files, and hostile settings (builtin/agents/…/work_tree.py)."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from swarm import agents

pytestmark = pytest.mark.slow  # starts git, very often

OWN = ("work_tree.py", "snapshots.py")
SWE = Path(agents.__file__).parent.parent / "builtin/agents/mini-swe"
BUILDER = {f"GIT_{role}_{what}": "b@c.invalid" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
# Without gc in the background, which takes files away from a clone that links them.
NO_GC = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "gc.auto", "GIT_CONFIG_VALUE_0": "0"}
ENV = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1", **BUILDER, **NO_GC}

Tree = dict[bytes, tuple[str, bytes]]


@pytest.fixture(scope="module")
def work_tree() -> Iterator[Any]:
    sys.path.insert(0, str(SWE))
    yield importlib.import_module("work_tree")
    sys.path.remove(str(SWE))
    for name in OWN:
        del sys.modules[name.removesuffix(".py")]


def git(at: Path, *words: str | bytes, given: bytes = b"", **env: str) -> bytes:
    done = subprocess.run(["git", *words], cwd=at, input=given, capture_output=True, env=ENV | env, check=False)
    assert done.returncode == 0, (words, done.stderr.decode(errors="replace"))
    return done.stdout


def make(at: Path, tree: Tree) -> None:
    for path, (kind, data) in tree.items():
        place = at / os.fsdecode(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        if kind == "link":
            place.symlink_to(os.fsdecode(data))
        else:
            place.write_bytes(data)
            place.chmod(0o755 if kind == "exec" else 0o644)


def look(at: Path) -> Tree:
    """What git would see of a directory."""
    found: Tree = {}
    for place in at.rglob("*"):
        path = os.fsencode(place.relative_to(at))
        if path.startswith(b".git/") or path == b".git":
            continue
        if place.is_symlink():
            found[path] = ("link", os.fsencode(place.readlink()))
        elif place.is_file():
            found[path] = ("exec" if place.stat().st_mode & 0o100 else "file", place.read_bytes())
    return found


def applied(at: Path, patch: Path) -> Tree:
    if patch.exists():
        git(at, "apply", "--binary", "--whitespace=nowarn", str(patch))
    return look(at)


def fetched(at: Path, bundle: Path, branch: str, aside: Path) -> Tree:
    """The tree of a bundle's branch in somebody's repository."""
    git(at, "fetch", "-q", str(bundle), f"refs/heads/{branch}:refs/heads/theirs")
    git(at, "worktree", "add", "-q", str(aside), "theirs")
    return look(aside)


NAMES = [b"a", b"b", b"src/app.py", b"src/b", b"a b", b'quote"', b"tab\t", b"new\nline", b"\xff\xfe", "ö".encode()]
NAMES += [b"-x", b"deep/er/c", b"back\\slash", b".gitattributes", b"sp /x ", b"*?[", b"\x01", b":(top)"]
PIECES = [b"one\n", b"two\r\n", b"\f", b"\v", b"\r", "\x85".encode(), "\u2028".encode(), b"\0", b"\xff", b"last", b"\n"]
PIECES += [b"* text=auto eol=crlf\n", b"*.py ident filter=x diff=y\n", b"$Id$\n", b"--- a/b\n", b"diff --git a/x b/x\n"]

contents = st.lists(st.sampled_from(PIECES), max_size=6).map(b"".join)
entries = st.one_of(
    st.tuples(st.sampled_from(["file", "exec"]), contents),
    st.tuples(st.just("link"), st.sampled_from([b"a", b"nowhere", b"src", b"\xff", b"../.."])),
)


def compatible(tree: Tree) -> Tree:
    """Without files whose place is a directory."""
    return {path: what for path, what in tree.items() if not any(other.startswith(path + b"/") for other in tree)}


trees = st.dictionaries(st.sampled_from(NAMES), entries, max_size=8).map(compatible)


@settings(max_examples=15, phases=[Phase.generate], deadline=None, suppress_health_check=list(HealthCheck))
@given(start=trees, steps=st.lists(st.tuples(trees, st.booleans()), min_size=1, max_size=3), history=st.booleans())
def test_whatever_was_changed_comes_back(
    work_tree: Any, start: Tree, steps: list[tuple[Tree, bool]], history: bool
) -> None:
    """Base and patch make the result, and so does the bundle; each step is committed by the agent, or not."""
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        there, mine = top / "work" / "repo", top / "mine"
        for place in (there, mine):
            place.mkdir(parents=True)
            make(place, start)
        # Git itself would make all line ends of a file equal then: see below.
        history = history and b"crlf" not in start.get(b".gitattributes", ("", b""))[1]
        if history:
            git(there, "init", "-q", "-b", "main")
            git(there, "-c", "core.autocrlf=false", "add", "-A")
            git(there, "commit", "-q", "--allow-empty", "-m", "start")
            shutil.rmtree(mine)
            git(top, "clone", "-q", "--no-checkout", str(there), str(mine))
            make(mine, start)
        base = work_tree.prepare(there)
        for tree, commits in steps:
            for path in there.iterdir():
                if path.name != ".git":
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            make(there, tree)
            if commits:
                git(there, "add", "-A")
                git(there, "commit", "-q", "--allow-empty", "-m", "a step")
        result = steps[-1][0]
        found = work_tree.collect(there, base, branch="swarm/t 1")
        out = there.with_name("out")
        assert found["left_out"] == [] and found["repositories"] == []
        assert bool(found["patch"]) == (result != start)
        assert applied(mine, out / "changes.patch") == look(there) == result
        if found["bundle"]:
            if not history:
                git(mine, "init", "-q")
            raw = mine / ".git/info/attributes"
            raw.parent.mkdir(exist_ok=True)
            raw.write_text("* -text !eol -ident -filter\n")
            assert fetched(mine, out / found["bundle"], found["branch"], top / "aside") == result
        assert found["bundle"] or result == start


# --- one by one -------------------------------------------------------------------------------------------------------


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    place = tmp_path / "work" / "repo"
    place.mkdir(parents=True)
    return place


def commit(at: Path, message: str = "theirs", **files: str) -> str:
    for name, text in files.items():
        (at / name).write_text(text)
    git(at, "add", "-A")
    git(at, "commit", "-q", "--allow-empty", "-m", message)
    return git(at, "rev-parse", "HEAD").decode().strip()


def history(at: Path, **files: str) -> str:
    git(at, "init", "-q", "-b", "main")
    return commit(at, "start", **files)


def statuses(found: dict[str, Any]) -> dict[str, str]:
    return {change["path"]: change["status"] for change in found["changes"]}


def test_commits_are_kept_and_the_rest_comes_upon_them(work_tree: Any, repo: Path, tmp_path: Path) -> None:
    start = history(repo, a="1\n", b="1\n")
    git(tmp_path, "clone", "-q", str(repo), "mine")
    (repo / "a").write_text("not committed at the start\n")
    base = work_tree.prepare(repo)
    assert git(repo, "status", "--porcelain") == b" M a\n", "as it came"
    git(repo, "checkout", "-q", "-b", "feature")
    first = commit(repo, "feature", c="new\n")
    git(repo, "tag", "v1")
    git(repo, "checkout", "-q", "-b", "other", "main")
    (repo / "d").write_text("last\n")
    found = work_tree.collect(repo, base, branch="swarm/t")
    assert statuses(found) == {"a": "changed", "d": "added"}, "a is as it was committed"
    bundle, mine = repo.parent / "out/branch.bundle", tmp_path / "mine"
    heads = git(mine, "bundle", "list-heads", str(bundle)).decode()
    assert f"{first} refs/heads/feature" in heads and f"{first} refs/tags/v1" in heads
    tree = fetched(mine, bundle, "swarm/t", tmp_path / "aside")
    assert tree == look(repo)
    assert start in git(mine, "rev-list", "theirs").decode().split()
    assert git(mine, "diff", "--name-only", "main...theirs").split() == [b"d"]


def test_only_commits_of_the_agents_own(work_tree: Any, repo: Path, tmp_path: Path) -> None:
    history(repo, a="1\n")
    git(tmp_path, "clone", "-q", str(repo), "mine")
    base = work_tree.prepare(repo)
    commit(repo, "one", a="2\n")
    last = commit(repo, "two", a="3\n")
    found = work_tree.collect(repo, base)
    assert (found["commit"], found["commits"], statuses(found)) == (last, 2, {"a": "changed"})
    assert "-1\n+3\n" in found["diff"] and not found["diff_cut"]


ATTRIBUTES = {
    "* text=auto eol=crlf": (b"1\r\n2\r\n", b"1\r\n3\r\n"),
    "* text=auto": (b"1\n2\n", b"1\n3\n"),
    "* text ident": (b"$Id: 0 $\n2\n", b"$Id: 0 $\n3\n"),
    "* text working-tree-encoding=UTF-16": ("1\n2\n".encode("utf-16"), "1\n3\n".encode("utf-16")),
}


@pytest.mark.parametrize("attributes", ATTRIBUTES)
def test_a_branch_has_files_as_the_owners_git_has_them(
    work_tree: Any, repo: Path, tmp_path: Path, attributes: str
) -> None:
    """And so changes what the agent changed: not every line end, or the encoding of a file."""
    before, after = ATTRIBUTES[attributes]
    git(repo, "init", "-q", "-b", "main")
    (repo / ".gitattributes").write_text(f"[ab] {attributes.removeprefix('* ')}\n")
    for name in ("a", "b"):
        (repo / name).write_bytes(before)
    commit(repo, "start")
    git(tmp_path, "clone", "-q", str(repo), "mine")
    mine = tmp_path / "mine"
    base = work_tree.prepare(repo)
    (repo / "a").write_bytes(after)
    found = work_tree.collect(repo, base)
    assert statuses(found) == {"a": "changed"} and found["left_out"] == [] and found["commits"] == 1
    fetched(mine, repo.parent / "out/branch.bundle", found["branch"], tmp_path / "aside")
    assert git(mine, "diff", "--numstat", "main", "theirs").split() == [b"1", b"1", b"a"]
    assert git(tmp_path / "aside", "status", "--porcelain") == b""
    applied(mine, repo.parent / "out/changes.patch")
    assert git(mine, "diff", "theirs") == b""


def test_what_cannot_be_converted_comes_back_as_it_is(work_tree: Any, repo: Path, tmp_path: Path) -> None:
    git(repo, "init", "-q", "-b", "main")
    (repo / ".gitattributes").write_text("a text working-tree-encoding=UTF-16\n")
    (repo / "a").write_bytes("1\n".encode("utf-16"))
    commit(repo, "start")
    base = work_tree.prepare(repo)
    (repo / "a").write_bytes(b"no UTF-16")
    found = work_tree.collect(repo, base)
    assert statuses(found) == {"a": "changed"} and found["left_out"] == []
    assert git(repo, "-C", str(base.store), "show", f"{found['commit']}:a") == b"no UTF-16"


@pytest.mark.parametrize("how", ["removed", "another", "amended", "broken"])
def test_whatever_happens_to_the_repository(work_tree: Any, repo: Path, tmp_path: Path, how: str) -> None:
    """The base is kept where the agent's git doesn't clean up."""
    history(repo, a="1\n", b="same\n")
    git(tmp_path, "clone", "-q", str(repo), "mine")
    base = work_tree.prepare(repo)
    (repo / "a").write_text("2\n")
    if how in ("removed", "another"):
        shutil.rmtree(repo / ".git")
    if how == "another":
        history(repo)
    if how == "amended":
        git(repo, "commit", "-qa", "--amend", "-m", "another start")
        git(repo, "-c", "gc.reflogExpireUnreachable=now", "-c", "gc.reflogExpire=now", "gc", "-q", "--prune=now")
    if how == "broken":
        (repo / ".git/HEAD").write_text("nonsense\n")
    found = work_tree.collect(repo, base)
    assert statuses(found) == {"a": "changed"}
    mine = tmp_path / "mine"
    assert fetched(mine, repo.parent / "out/branch.bundle", found["branch"], tmp_path / "aside") == look(repo)
    assert applied(mine, repo.parent / "out/changes.patch") == look(repo)


def test_settings_and_attributes_of_a_hostile_repository_do_nothing(work_tree: Any, repo: Path, tmp_path: Path) -> None:
    """Neither of one that came with the ticket, nor of what the agent made of it."""
    spy, ran = tmp_path / "spy", tmp_path / "ran"
    spy.write_text(f'#!/bin/sh\necho "$0 $*" >> {ran}\ncat\n')
    spy.chmod(0o755)
    history(repo, a="1\n")

    def poison() -> None:
        for name in ("core.fsmonitor", "filter.x.clean", "filter.x.process", "diff.x.command", "diff.x.textconv",
                     "core.editor", "core.pager", "diff.external", "core.sshCommand", "gpg.program", "core.askPass",
                     "credential.helper", "uploadpack.packObjectsHook", "core.alternateRefsCommand"):  # fmt: skip
            git(repo, "config", name, str(spy))
        for name, value in {"commit.gpgSign": "true", "core.autocrlf": "true", "core.fileMode": "false",
                            "core.symlinks": "false", "core.ignoreCase": "true", "diff.noprefix": "true",
                            "core.worktree": "/", "core.bare": "true", "core.quotePath": "false"}.items():  # fmt: skip
            git(repo, "config", name, value, GIT_DIR=str(repo / ".git"))
        (repo / ".git/hooks").mkdir(exist_ok=True)
        for hook in ("pre-commit", "post-index-change", "reference-transaction", "post-checkout", "pre-auto-gc"):
            shutil.copy(spy, repo / ".git/hooks" / hook)
        (repo / ".git/info/attributes").write_text(
            "* filter=x diff=x ident text eol=crlf working-tree-encoding=UTF-16\n"
        )

    poison()
    (repo / ".gitattributes").write_text("* filter=x diff=x text eol=crlf working-tree-encoding=UTF-16\n")
    base = work_tree.prepare(repo)
    poison()
    (repo / "a").write_bytes(b"1\r\n")
    (repo / "a").chmod(0o755)
    (repo / "link").symlink_to("a")
    found = work_tree.collect(repo, base)
    assert statuses(found) == {"a": "changed", "link": "added"}
    assert "+1\r\n" in found["diff"] and "new mode 100755" in found["diff"] and "120000" in found["diff"]
    assert not ran.exists(), ran.read_text()


def test_repositories_inside(work_tree: Any, repo: Path, tmp_path: Path) -> None:
    """A clone's commit is told apart from what was cloned; a submodule's is what the outer patch refers to."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    history(elsewhere, **{f"file{n}": f"{n}\n" for n in range(200)})
    history(repo, a="1\n")
    git(repo, "-c", "protocol.file.allow=always", "submodule", "-q", "add", str(elsewhere), "sub")
    git(repo, "commit", "-q", "-m", "with a submodule")
    base = work_tree.prepare(repo)
    git(repo, "clone", "-q", str(elsewhere), "clone")
    own = commit(repo / "clone", "mine", file7="mine\n")
    (repo / "sub/file8").write_text("eight\n")
    (repo / "made").mkdir()
    history(repo / "made", x="fresh\n")
    found = work_tree.collect(repo, base)
    assert statuses(found) == {"clone/file7": "changed", "made/x": "added", "sub": "changed", "sub/file8": "changed"}
    assert all(text in found["diff"] for text in ("# in clone/", "-7\n+mine\n", "-8\n+eight\n", "+fresh\n"))
    inner = {part["path"]: part for part in found["repositories"]}
    assert inner["clone/"]["commit"] == own and [part["commits"] for part in inner.values()] == [1, 1, 1]
    out = repo.parent / "out"
    for path, part in inner.items():
        if path != "made/":
            git(tmp_path, "clone", "-q", str(elsewhere), f"mine-{path[:-1]}")
            assert applied(tmp_path / f"mine-{path[:-1]}", out / part["patch"]) == look(repo / path)
        assert (
            own not in git(repo / path, "bundle", "list-heads", str(out / part["bundle"])).decode() or path == "clone/"
        )
    assert f"+Subproject commit {inner['sub/']['commit']}" in (out / "changes.patch").read_text()


def test_caches_push_nothing_out_and_what_is_large_is_named(work_tree: Any, repo: Path) -> None:
    (repo / "src").mkdir()
    base = work_tree.prepare(repo, {"src/app.py": "1\n", ".gitignore": "ignored/\n"})
    for place in ("ignored", "node_modules/x", "src/__pycache__", "aaa"):
        (repo / place).mkdir(parents=True)
        for n in range(500):
            (repo / place / f"{n}").write_text("x" * 70)
    (repo / "src/app.py").write_text("2\n")
    with (repo / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    os.mkfifo(repo / "fifo")
    (repo / ".GIT").write_text("a name that git takes from nobody")
    (repo / "aaa/large.txt").write_text("line\n" * 100_000)
    found = work_tree.collect(repo, base)
    assert found["changes"][0] == {"path": "src/app.py", "status": "changed"} and len(found["changes"]) == 502
    assert found["diff"].startswith("diff --git a/src/app.py b/src/app.py\n") and "-1\n+2\n" in found["diff"]
    assert len(found["diff"]) <= work_tree.MAX_DIFF_BYTES and found["diff_cut"]
    assert "diff --git a/aaa/large.txt b/aaa/large.txt\n# only in the patch" in found["diff"]
    left = {one["path"]: one["why"] for one in found["left_out"]}
    assert left == {"sparse": f"too large: {1 << 40} bytes", ".GIT": "git can't hold a file of this name"}
    assert (repo.parent / "out/changes.patch").read_text().count("\ndiff --git ") == 501


def test_what_the_agent_may_not_read_any_more(work_tree: Any, repo: Path) -> None:
    base = work_tree.prepare(repo, {"a": "1\n", "deep/b": "1\n"})
    (repo / "a").write_text("2\n")
    (repo / "a").chmod(0)
    (repo / "deep/c").write_text("2\n")
    (repo / "deep").chmod(0)
    found = work_tree.collect(repo, base)
    assert statuses(found) == {"a": "changed", "deep/c": "added"}


def test_a_file_that_becomes_a_directory_and_back(work_tree: Any, repo: Path, tmp_path: Path) -> None:
    base = work_tree.prepare(repo, {"a": "1\n", "b/c": "1\n"})
    mine = tmp_path / "mine"
    shutil.copytree(repo, mine)
    (repo / "a").unlink()
    (repo / "a").mkdir()
    (repo / "a/x").write_text("1\n")
    shutil.rmtree(repo / "b")
    (repo / "b").symlink_to("a")
    work_tree.collect(repo, base)
    assert applied(mine, repo.parent / "out/changes.patch") == look(repo)


@pytest.mark.parametrize("how", ["bundle of all", "bundle of HEAD", "archive", "archive of the directory"])
def test_the_ways_in(work_tree: Any, repo: Path, tmp_path: Path, how: str) -> None:
    mine = tmp_path / "repo"
    mine.mkdir()
    start = history(mine, a="1\n")
    if how.startswith("bundle"):
        git(mine, "bundle", "create", str(repo.parent / "repo.bundle"), "--all" if how.endswith("all") else "HEAD")
    else:
        words = ["-C", str(tmp_path), "repo"] if how.endswith("directory") else ["-C", str(mine), "."]
        subprocess.run(["tar", "-czf", str(repo.parent / "repo.tar.gz"), *words], check=True)
    repo.rmdir()
    base = work_tree.prepare(repo, {"b": "laid over it\n"})
    assert git(repo, "rev-parse", "HEAD").decode().strip() == start
    assert git(repo, "status", "--porcelain") == b"?? b\n"
    (repo / "a").write_text("2\n")
    found = work_tree.collect(repo, base)
    assert statuses(found) == {"a": "changed"}, "the rest was there at the start"
    assert fetched(mine, repo.parent / "out/branch.bundle", found["branch"], tmp_path / "aside") == look(repo)


@pytest.mark.parametrize(
    ("files", "beside", "said"),
    [
        ({"../x": ""}, {}, "not a path below"),
        ({"/etc/x": ""}, {}, "not a path below"),
        ({".git/hooks/x": ""}, {}, "not a path below"),
        ({"a": "", "a/b": ""}, {}, "inputs.files"),
        ({}, {"repo.bundle": b"no bundle"}, "git bundle"),
        ({}, {"repo.tar.gz": b"no archive"}, "tar"),
        ({}, {"repo.bundle": b"", "repo.tar.gz": b""}, "repo.bundle and repo.tar.gz: give one"),
        ({}, {"repo/.git": b"gitdir: /elsewhere"}, "is not a repository"),
    ],
)
def test_what_makes_no_sense(
    work_tree: Any, repo: Path, files: dict[str, str], beside: dict[str, bytes], said: str
) -> None:
    if not any(name.startswith("repo/") for name in beside):
        repo.rmdir()
    for name, data in beside.items():
        (repo.parent / name).write_bytes(data)
    with pytest.raises(work_tree.WorkTreeError, match=said):
        work_tree.prepare(repo, files)


def test_nothing_changed(work_tree: Any, repo: Path) -> None:
    history(repo, a="1\n")
    base = work_tree.prepare(repo)
    found = work_tree.collect(repo, base)
    assert (found["changes"], found["diff"], found["patch"], found["bundle"], found["commits"]) == ([], "", "", "", 0)
    assert list((repo.parent / "out").iterdir()) == []


def test_ten_thousand_files_in_and_a_branch_out(work_tree: Any, repo: Path, tmp_path: Path) -> None:
    for n in range(10_000):
        place = repo / f"{n % 100}" / f"{n}"
        place.parent.mkdir(exist_ok=True)
        place.write_text(f"{n}\n" * 20)
    history(repo)
    base = work_tree.prepare(repo)
    (repo / "7/4207").write_text("changed\n")
    shutil.rmtree(repo / "8")
    found = work_tree.collect(repo, base, branch="swarm/big")
    assert len(found["changes"]) == 101 and found["commits"] == 1
    git(tmp_path, "clone", "-q", "--bare", str(repo), "mine")
    git(tmp_path / "mine", "fetch", "-q", str(repo.parent / "out/branch.bundle"), "swarm/big:big")
    assert git(tmp_path / "mine", "diff", "--shortstat", "HEAD", "big").startswith(b" 101 files changed, 1 insertion")
    assert (repo.parent / "out/branch.bundle").stat().st_size < 100_000


@pytest.mark.parametrize("name", ["t 1", "../x", ".lock", "a.lock", "~^:?*[\\", "ö", "@{", "-x", "a//b", "", "x" * 900])
def test_branch_names_that_git_takes(work_tree: Any, name: str, tmp_path: Path) -> None:
    made = sys.modules["snapshots"].branch_name(f"swarm/{name}")
    assert git(tmp_path, "check-ref-format", "--branch", made).decode().strip() == made.removesuffix("\n")
    assert made.startswith("swarm/") or made == "swarm"


def test_agents_have_the_same_copies() -> None:
    copies = [place for name in OWN for place in SWE.parent.glob(f"*/{name}")]
    assert len(copies) == 2 * len(OWN)
    assert {place.read_bytes() for place in copies} == {(SWE / name).read_bytes() for name in OWN}
