"""A ticket's files: what it is given is below /work before its agent starts; what is in /work/out comes back."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from swarm.base import trees
from swarm.cli import files as cli_files
from swarm.cli import sending
from swarm.cli.frame import Cli
from swarm.cli.ui.output import Out
from swarm.engine.run_once import run_ticket
from swarm.errors import Conflict, NotFound, UsageError
from swarm.model import Ticket, TicketState
from tests.engine.conftest import Bench, proved

LIST = """
import hashlib, json, os, stat
found = {}
for here, dirs, files in os.walk("."):
    for name in [*files, *(d for d in dirs if os.path.islink(os.path.join(here, d)))]:
        path = os.path.relpath(os.path.join(here, name))
        if os.path.islink(path):
            found[path] = ["link", os.readlink(path)]
        else:
            data = open(path, "rb").read()
            found[path] = [oct(os.stat(path).st_mode & 0o777), hashlib.sha256(data).hexdigest()]
    for name in dirs:
        if not os.path.islink(os.path.join(here, name)) and not os.listdir(os.path.join(here, name)):
            found[os.path.relpath(os.path.join(here, name)) + "/"] = ["empty"]
"""
PASS_ON = (
    LIST
    + """
import shutil
found.pop("input.json")
os.rmdir("out")
shutil.copytree("repo", "out", symlinks=True)
json.dump({"found": {os.fsencode(k).hex(): v for k, v in found.items()}}, open("output.json", "w"))
"""
)


def run_cli(bench: Bench, *arguments: str) -> str:
    """A `swarm` command of its own, as a user types it."""
    argv = [sys.executable, "-m", "swarm.cli.main", *arguments, "--home", str(bench.settings.home)]
    return subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True).stdout


async def files_of(bench: Bench, id: str) -> list[dict[str, object]]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        await cli_files.files(Cli(settings=bench.settings, out=Out(json=True)), id)
    listed: list[dict[str, object]] = json.loads(printed.getvalue())
    return listed


async def get(bench: Bench, id: str, to: Path, pattern: str | None = None, *, force: bool = False) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        await cli_files.get(Cli(settings=bench.settings, out=Out()), id, pattern, to, force)


def odd_tree(top: Path) -> Path:
    """Every kind of file that a user may have."""
    (top / "src/deep").mkdir(parents=True)
    (top / "empty").mkdir()
    (top / "src/app.py").write_text("print('hi')\n")
    (top / "src/run").write_text("#!/bin/sh\n")
    (top / "src/run").chmod(0o750)
    (top / "nothing").touch(mode=0o600)
    (top / "big").write_bytes(os.urandom(3 << 20) + bytes(1 << 20))
    (top / "a name\nof two lines").write_text("x")
    Path(os.fsdecode(os.fsencode(top) + b"/latin-\xe9")).write_bytes(b"\xff\x00")
    (top / "src/deep/up").symlink_to("../app.py")
    (top / "dir-link").symlink_to("src")
    (top / "dangling").symlink_to("not-there")
    return top


def content(top: Path) -> dict[str, object]:
    def one(path: Path) -> object:
        if path.is_symlink():
            return path.readlink()
        return (path.stat().st_mode & 0o777, path.read_bytes()) if path.is_file() else "directory"

    return {str(path.relative_to(top)): one(path) for path in top.rglob("*")}


async def test_a_directory_goes_in_and_comes_back_unchanged(plain: Bench, tmp_path: Path) -> None:
    await plain.agent(PASS_ON, "passes")
    repo = odd_tree(tmp_path / "repo")
    (tmp_path / "one").write_text("1")
    run_cli(
        plain, "ticket", "add", "t", "--id", "t", "--agent", "passes", "--file", f"repo/={repo}",
        "--file", f"some/name={tmp_path / 'one'}",
    )  # fmt: skip
    done = await run_ticket(plain.store, plain.worker, "t")
    assert done.state == "done", done.error
    outputs = json.loads(done.outputs or "")
    found = {bytes.fromhex(name).decode(errors="replace"): value for name, value in outputs["found"].items()}
    assert found["repo/src/run"][0] == "0o750" and found["repo/src/deep/up"] == ["link", "../app.py"]
    assert found["some/name"][0] == "0o644" and found["repo/empty/"] == ["empty"]
    assert list(outputs["$files"]) == ["out/"]
    listed = {one["name"]: one for one in await files_of(plain, "t")}
    assert listed["src/run"] == {"name": "src/run", "kind": "file", "bytes": 10, "mode": "0750"}

    await get(plain, "t", tmp_path / "back")
    assert content(tmp_path / "back") == content(repo)
    # Nothing is replaced unless one says so; a pattern chooses.
    (tmp_path / "back/src/app.py").write_text("mine")
    with pytest.raises(Conflict, match="exists: give --force"):
        await get(plain, "t", tmp_path / "back")
    assert (tmp_path / "back/src/app.py").read_text() == "mine"
    await get(plain, "t", tmp_path / "back", "src/*.py", force=True)
    assert content(tmp_path / "back") == content(repo)
    await get(plain, "t", tmp_path / "part", "src")
    assert sorted(content(tmp_path / "part")) == ["src", "src/app.py", "src/deep", "src/deep/up", "src/run"]
    with pytest.raises(NotFound, match="named 'src/none'"):
        await get(plain, "t", tmp_path / "part", "src/none")

    # What is sent again is kept once, and goes with the tickets.
    count = plain.sql("SELECT count(*) FROM artifacts")
    await sending.send(plain.store, "again", [f"repo/={repo}"], all_files=False)
    assert plain.sql("SELECT count(*) FROM artifacts") == count
    await plain.store.prune(0)
    assert len(await files_of(plain, "t")) == len(listed)
    await proved(plain)
    plain.sql("DELETE FROM tickets")
    assert plain.sql("SELECT count(*) FROM artifacts") == plain.sql("SELECT count(*) FROM artifact_uses") == [(0,)]


def git(repo: Path, *arguments: str) -> str:
    mine = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *mine, "-C", str(repo), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def repository(top: Path) -> Path:
    top.mkdir()
    git(top, "init", "-q")
    (top / ".gitignore").write_text("*.o\n/build\n")
    for name in ("kept", "deleted", "changed"):
        (top / name).write_text(name)
    git(top, "add", ".")
    git(top, "commit", "-qm", "first")
    git(top, "branch", "other")
    git(top, "remote", "add", "origin", "https://user:password@example.org/repo")
    (top / ".git/hooks/pre-commit").write_text("#!/bin/sh\necho secret\n")
    (top / "deleted").unlink()
    (top / "changed").write_text("anew")
    (top / "new").write_text("new")
    (top / "made.o").write_text("ignored")
    (top / "build").mkdir()
    (top / "build/x").write_text("ignored")
    return top


async def sent(bench: Bench, tmp_path: Path, *files: str, all_files: bool = False) -> Path:
    """The directory /work of a ticket that is given these files, as its agent finds it."""
    code = """
import os, shutil
shutil.copytree("repo", "out", symlinks=True, dirs_exist_ok=True)
for here, dirs, files in os.walk("out", topdown=False):
    for name in {".git", "HEAD"} & {*dirs, *files}:
        os.rename(f"{here}/{name}", f"{here}/dot-{name.strip('.')}")  # such names would not be brought back
open("output.json", "w").write("{}")
"""
    await bench.agent(code, "copies")
    given, _ = await sending.send(bench.store, "s", files, all_files=all_files)
    bench.insert("s", "copies", inputs=json.dumps({"$files": given}))
    done = await run_ticket(bench.store, bench.worker, "s")
    assert done.state == "done", done.error
    await get(bench, "s", tmp_path / "got")
    for name in ("HEAD", ".git"):
        for path in (tmp_path / "got").rglob(f"dot-{name.strip('.')}"):
            path.rename(path.with_name(name))
    return tmp_path / "got"


async def test_a_work_tree_goes_with_its_history_but_without_what_git_ignores_and_passwords(
    plain: Bench, tmp_path: Path
) -> None:
    repo = repository(tmp_path / "repo")
    got = await sent(plain, tmp_path, f"repo={repo}")
    assert sorted(p.name for p in got.iterdir()) == [".git", ".gitignore", "changed", "kept", "new"]
    assert git(got, "status", "--short") == git(repo, "status", "--short") == "M changed\n D deleted\n?? new"
    assert git(got, "log", "--format=%H", "--all") == git(repo, "log", "--format=%H", "--all")
    assert git(got, "branch", "--format=%(refname:short)") == "main\nother"
    assert git(got, "remote") == ""
    everything = b"".join(p.read_bytes() for p in got.rglob("*") if p.is_file())
    assert b"password" not in everything and b"secret" not in everything


async def test_a_linked_work_tree_and_a_repository_without_commits(plain: Bench, tmp_path: Path) -> None:
    repo = repository(tmp_path / "repo")
    git(repo, "worktree", "add", "-q", str(tmp_path / "linked"), "other")
    got = await sent(plain, tmp_path, f"repo={tmp_path / 'linked'}")
    assert git(got, "symbolic-ref", "--short", "HEAD") == "other" and git(got, "status", "--short") == ""
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init", "-q")
    given, _ = await sending.send(plain.store, "e", [str(tmp_path / "empty")], all_files=False)
    assert list(given) == ["empty/"]


async def names_sent(bench: Bench, path: Path, id: str = "n") -> list[str]:
    digests, _ = await sending.send(bench.store, id, [f"x/={path}"], all_files=False)
    return [entry.name for entry in trees.manifest(await bench.store.artifact_of(id, digests["x/"])).entries]


@pytest.mark.parametrize("partial", [False, True])
async def test_a_hostile_repository_runs_nothing(plain: Bench, tmp_path: Path, partial: bool) -> None:
    repo = repository(tmp_path / "repo")
    evil = tmp_path / "evil.sh"
    evil.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\nexit 1\n")
    evil.chmod(0o755)
    if partial:  # the index needs a tree that is to be fetched
        blob = git(repo, "rev-parse", "HEAD:kept")
        git(repo, "config", "remote.origin.url", str(repo))
        git(repo, "config", "remote.origin.promisor", "true")
        git(repo, "config", "remote.origin.uploadpack", str(evil))
        (repo / ".git/objects" / blob[:2] / blob[2:]).unlink()
        with contextlib.suppress(subprocess.CalledProcessError):
            git(repo, "cat-file", "-p", blob)
    else:
        git(repo, "config", "core.fsmonitor", str(evil))
        git(repo, "status")
    assert (tmp_path / "ran").exists()  # git does it by itself
    (tmp_path / "ran").unlink()
    if partial:
        with pytest.raises(UsageError, match=r"partial clone.*--all-files"):
            await names_sent(plain, repo)
    else:
        assert "kept" in await names_sent(plain, repo)
    assert not (tmp_path / "ran").exists()


async def test_names_behind_links_stay_here(plain: Bench, tmp_path: Path) -> None:
    repo = repository(tmp_path / "repo")
    for name in ("d", "sub"):
        (repo / name).mkdir()
        (repo / name / "id_rsa").write_text("mine")
    git(repo / "sub", "init", "-q")
    git(repo / "sub", "add", ".")
    git(repo / "sub", "commit", "-qm", "x")
    head = git(repo / "sub", "rev-parse", "HEAD")
    git(repo, "add", "d")
    git(repo, "update-index", "--add", "--cacheinfo", f"160000,{head},d/sub")
    (tmp_path / "secret").mkdir()
    (repo / "sub").rename(tmp_path / "secret/sub")
    (repo / "d/id_rsa").rename(tmp_path / "secret/id_rsa")
    (repo / "d").rmdir()
    (repo / "d").symlink_to("kept")
    before = await names_sent(plain, repo)
    (repo / "d").unlink()
    (repo / "d").symlink_to("../secret")
    (repo / ".git/info/exclude").write_text("/d\n")
    names = await names_sent(plain, repo, "m")
    assert "d" in before and not [name for name in names if name.startswith("d")]


@pytest.mark.parametrize("how", ["link", "gitfile", "forged", "commondir", "refs"])
async def test_the_history_of_another_repository_is_not_sent(plain: Bench, tmp_path: Path, how: str) -> None:
    other, repo = repository(tmp_path / "other"), tmp_path / "repo"
    repo.mkdir()
    (repo / "x").write_text("x")
    if how == "link":
        (repo / ".git").symlink_to("../other/.git")
    elif how == "gitfile":
        (repo / ".git").write_text("gitdir: ../other/.git\n")
    elif how == "forged":  # it leads back, and on to the other
        (repo / "a/worktrees/b").mkdir(parents=True)
        (repo / ".git").write_text("gitdir: a/worktrees/b\n")
        for name, text in (
            ("gitdir", f"{repo}/.git"),
            ("commondir", f"{other}/.git"),
            ("HEAD", "ref: refs/heads/main"),
        ):
            (repo / "a/worktrees/b" / name).write_text(f"{text}\n")
    else:
        git(repo, "init", "-q")
        if how == "refs":
            shutil.rmtree(repo / ".git/refs")
            (repo / ".git/refs").symlink_to(other / ".git/refs")
        else:
            (repo / ".git/commondir").write_text(str(other / ".git"))
    with pytest.raises(UsageError, match="a repository elsewhere; --all-files"):
        await names_sent(plain, repo)


async def test_submodules_and_nested_repositories_go_without_what_they_ignore(plain: Bench, tmp_path: Path) -> None:
    repo, lib = repository(tmp_path / "repo"), repository(tmp_path / "lib")
    git(repo, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(lib), "lib")
    for top in (repo / "lib", repository(repo / "nested"), repository(repo / "nested/deeper")):
        (top / ".gitignore").write_text(".env\n")
        (top / ".env").write_text("secret")
    names = await names_sent(plain, repo)
    assert {"lib/kept", "nested/kept", "nested/new", "nested/deeper/kept"} <= set(names)
    assert not [name for name in names if name.endswith(".env") or "/.git/" in name]
    # A submodule alone is a repository, whose gitfile leads to a place that leads back.
    assert ".git/HEAD" in await names_sent(plain, repo / "lib", "alone")


async def test_a_directory_that_is_ignored_goes_as_it_is(plain: Bench, tmp_path: Path) -> None:
    repo = repository(tmp_path / "repo")
    assert await names_sent(plain, repo / "build") == ["x"]
    (repo / "objects").mkdir()
    (repo / "objects/a.o").touch()
    with pytest.raises(UsageError, match="--all-files sends them"):
        await names_sent(plain, repo / "objects")


async def test_a_branch_without_commits_beside_others(plain: Bench, tmp_path: Path) -> None:
    repo = repository(tmp_path / "repo")
    git(repo, "checkout", "-q", "--orphan", "fresh")
    assert "new" in await names_sent(plain, repo)


async def test_an_id_that_is_taken_keeps_nothing(plain: Bench, tmp_path: Path) -> None:
    await plain.agent("", "any")
    plain.insert("taken", "any")
    (tmp_path / "x").write_text("x")
    with pytest.raises(Conflict, match="taken"):
        await sending.send(plain.store, "taken", [f"x={tmp_path / 'x'}"], all_files=False)
    assert plain.sql("SELECT count(*) FROM artifacts") == [(0,)]


@pytest.mark.parametrize("pruned", ["", "before", "between"])
async def test_files_that_prune_took_before_their_ticket_was_there(plain: Bench, tmp_path: Path, pruned: str) -> None:
    await plain.agent("", "any")
    (tmp_path / "x").write_text("x")
    given, uses = await sending.send(plain.store, "t", [f"x={tmp_path / 'x'}"], all_files=False)
    assert uses == 2
    if pruned:
        await plain.store.prune(0)
    if pruned == "between":  # of the two, the part is gone
        await plain.store.keep_artifacts("t", {given["x"]: "{}"})
    ticket = Ticket(id="t", title="t", state=TicketState.READY, agent_id="any", inputs=json.dumps({"$files": given}))
    if pruned:
        with pytest.raises(Conflict, match="were removed meanwhile; add it again"):
            await plain.store.add_ticket(ticket, uses=uses)
        assert plain.sql("SELECT count(*) FROM tickets") == [(0,)]
    else:
        assert (await plain.store.add_ticket(ticket, uses=uses)).id == "t"


async def test_git_settings_of_an_agent_do_not_come_back(
    plain: Bench, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = """
import os
for name in ("out/.git/hooks/pre-commit", "out/lib/.GIT/config", "out/.github/x", "out/a"):
    os.makedirs(os.path.dirname(name), exist_ok=True)
    open(name, "w").write("x")
open("output.json", "w").write("{}")
"""
    assert (await plain.run(code)).state == "done"
    await get(plain, "t", tmp_path / "got")
    assert sorted(content(tmp_path / "got")) == [".github", ".github/x", "a"]
    assert "left out: .git/hooks/pre-commit and 1 more" in capfd.readouterr().err


async def test_a_name_that_is_too_long_is_left_out(plain: Bench) -> None:
    code = """
import os
open("out/a", "w").close()
os.chdir("out")
for _ in range(18):
    os.mkdir("d" * 210)
    os.chdir("d" * 210)
open("f" * 250, "w").close()
os.chdir(os.environ.get("HOME", "/"))
"""
    done = await plain.run(f"import os\nopen('output.json', 'w').write('{{}}')\n{code}")
    assert done.state == "done", done.error
    assert [one["name"] for one in await files_of(plain, "t")] == ["a"]


async def test_all_files(plain: Bench, tmp_path: Path) -> None:
    repo = repository(tmp_path / "repo")
    got = await sent(plain, tmp_path, f"repo={repo}", all_files=True)
    assert (got / "build/x").exists() and (got / ".git/hooks/pre-commit").exists()


@pytest.mark.parametrize(
    ("target", "why"),
    [("/etc/passwd", "leads out of"), ("../../x", "leads out of"), ("sub/../../../x", "leads out of")],
)
async def test_a_link_that_leads_out_is_not_sent(plain: Bench, tmp_path: Path, target: str, why: str) -> None:
    (tmp_path / "dir/sub").mkdir(parents=True)
    (tmp_path / "dir/link").symlink_to(target)
    with pytest.raises(UsageError, match=why):
        await sending.send(plain.store, "t", [f"x/={tmp_path / 'dir'}"], all_files=False)


async def test_what_can_not_be_sent_is_said(plain: Bench, tmp_path: Path) -> None:
    async def why(*options: str) -> str:
        with pytest.raises(UsageError) as caught:
            await sending.send(plain.store, "t", options, all_files=False)
        return str(caught.value)

    assert "does not exist" in await why("x=./not-there")
    os.mkfifo(tmp_path / "pipe")
    assert "a socket, a device or a pipe" in await why(f"x/={tmp_path}")
    (tmp_path / "pipe").unlink()
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(257 << 20)
    assert "more than 256 MiB" in await why(f"x/={tmp_path}")
    (tmp_path / "huge").unlink()
    assert "is not below /work" in await why(f"../x={tmp_path}")
    for own in ("input.json", "output.json/"):
        assert "is the agent's own" in await why(f"{own}={tmp_path}")
    assert "more in it than its size says" in await why("x=/proc/cpuinfo")
    (tmp_path / "d").mkdir()
    assert "has the place 'x/' too" in await why(f"x={tmp_path / 'd'}", f"x/={tmp_path / 'd'}")


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ("x", "must be an object"),
        ({"../x": "0" * 64}, "not below /work"),
        ({"input.json": "0" * 64}, "the agent's own"),
        ({"x": "short"}, "no digest"),
        ({"x": "0" * 64}, "has no artifact"),
    ],
)
async def test_bad_files_in_a_row_fail_with_the_reason(plain: Bench, files: object, why: str) -> None:
    done = await plain.run("raise SystemExit('ran')", inputs={"$files": files})
    assert done.state == "failed" and why in (done.error or "")


async def test_another_tickets_files_are_not_given(plain: Bench, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    given, _ = await sending.send(plain.store, "mine", [f"x={tmp_path / 'x'}"], all_files=False)
    done = await plain.run("raise SystemExit('ran')", inputs={"$files": given})
    assert done.state == "failed" and "has no artifact" in (done.error or "")
    # A program that may write the database says so: one row for each artifact.
    plain.sql("INSERT INTO artifact_uses SELECT 'u', digest FROM artifact_uses WHERE ticket_id = 'mine'")
    await plain.agent("open('output.json', 'w').write('{\"x\": \"' + open('x').read() + '\"}')", "reads")
    plain.insert("u", "reads", inputs=json.dumps({"$files": given}))
    assert (await run_ticket(plain.store, plain.worker, "u")).outputs == '{"x":"x"}'


async def test_files_of_a_failed_and_of_a_stopped_agent_come_back(plain: Bench) -> None:
    await plain.agent("open('out/log', 'w').write('why'); raise SystemExit(3)", "fails")
    for name, seconds in (("slow", 2), ("slower", 30)):
        code = "open('out/log', 'w').write('slow'); import time; time.sleep(600)"
        await plain.agent(code, name, timeout_seconds=seconds)
    for names in (("fails",), ("slow", "slower")):
        for name in names:
            plain.insert(name, name)
            assert (await run_ticket(plain.store, plain.worker, name)).state == "failed"
            if [one["name"] for one in await files_of(plain, name)] == ["log"]:
                break  # a busy machine may take 2 s to start it
        else:
            raise AssertionError(f"no file of {names}")


async def test_what_does_not_fit_is_told_and_costs_nothing_else(plain: Bench, tmp_path: Path) -> None:
    code = """
import os, socket
os.makedirs("out/d")
open("out/small", "w").write("x")
with open("out/d/sparse", "wb") as file:
    file.truncate(1 << 30)
os.mkfifo("out/pipe")
os.symlink("/etc/passwd", "out/outside")
open("output.json", "w").write('{"$files": {"x": "forged"}}')
"""
    done = await plain.run(code)
    assert done.state == "done"
    assert list(json.loads(done.outputs or "")["$files"]) == ["out/"]
    listed = {one["name"]: one for one in await files_of(plain, "t")}
    assert listed["d/sparse"]["kind"] == listed["pipe"]["kind"] == "left out"
    assert listed["d/sparse"]["bytes"] == 1 << 30 and listed["small"]["kind"] == "file"
    await get(plain, "t", tmp_path / "got")
    assert [p.name for p in (tmp_path / "got").iterdir()] == ["small"]


async def test_steps_have_the_files_of_their_run_and_of_earlier_steps(plain: Bench, tmp_path: Path) -> None:
    await plain.agent(
        "import os; open('out/made', 'w').write(open('in/a').read() + '!'); open('output.json', 'w').write('{}')",
        "maker",
    )
    await plain.agent(
        "import json, os; json.dump({'has': sorted(os.listdir('.')), 'in': sorted(os.listdir('in'))}, "
        "open('output.json', 'w'))",
        "lists",
        inputs={"n": "integer"},
    )
    flow = tmp_path / "flow.yaml"
    flow.write_text("""
name: flow
version: 1.0.0
inputs: {n: integer}
steps:
  - {id: make, agent: maker}
  - {id: same, agent: lists, inputs: {n: 1}, needs: [make]}
  - id: other
    agent: lists
    needs: [make]
    inputs: {n: 2, $files: {in/: '${steps.make.outputs["$files"]["out/"]}'}}
""")
    run_cli(plain, "workflow", "add", str(flow))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").write_text("a")
    run_cli(plain, "workflow", "run", "flow", "--id", "w", "--input", "n=1", "--file", f"in/={tmp_path / 'in'}")
    done = await run_ticket(plain.store, plain.worker, "w")
    assert done.state == "done", done.error
    outputs = json.loads(done.outputs or "")
    assert outputs["same"]["in"] == ["a"] and outputs["other"]["in"] == ["made"]
    await get(plain, "w", tmp_path / "got")
    assert (tmp_path / "got/make/made").read_text() == "a!"


@pytest.mark.needs("qemu")
async def test_in_a_vm(bench: Bench, tmp_path: Path) -> None:
    """Owned by the agent; /work has nothing that it can't read."""
    code = """
import json, os, shutil, subprocess
subprocess.run(["grep", "-r", "hi", "."], check=True)
subprocess.run(["sh", "-ec", "find . > /dev/null; tar cf out/all.tar repo"], check=True)
os.link("repo/src/run", "out/hard")
os.symlink("hard", "out/l")
open("repo/src/app.py", "a").write("mine")
json.dump({"work": sorted(os.listdir(".")), "owner": os.stat("repo/src").st_uid}, open("output.json", "w"))
"""
    await bench.agent(code, "passes")
    repo = odd_tree(tmp_path / "repo")
    given, _ = await sending.send(bench.store, "t", [f"repo={repo}"], all_files=False)
    bench.insert("t", "passes", inputs=json.dumps({"$files": given}))
    done: Ticket = await run_ticket(bench.store, bench.worker, "t")
    assert done.state == "done", done.error
    outputs = json.loads(done.outputs or "")
    assert outputs["work"] == ["input.json", "out", "repo"] and outputs["owner"] == 1000
    await get(bench, "t", tmp_path / "got")
    assert (tmp_path / "got/hard").stat().st_mode & 0o777 == 0o750 and (tmp_path / "got/l").readlink() == Path("hard")
    with tarfile.open(tmp_path / "got/all.tar") as tar:
        tar.extractall(tmp_path / "got")
    assert content(tmp_path / "got/repo") == content(repo)
