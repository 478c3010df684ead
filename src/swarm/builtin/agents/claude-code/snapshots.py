"""Snapshots of a directory in a git directory of our own, for work_tree.py, which says why. mini-swe and claude-code
each have this file; the copies are equal (a test checks it).
"""

import contextlib
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 16 << 20  # a larger file that was added or changed is left out, and named
MAX_NEW_BYTES = 24 << 20  # of all together, largest first: patch and bundle must fit into the 64 MiB of /work/out
SECONDS = 1800.0
TOO_LARGE = "too large"

EXCLUDED = """\
__pycache__/
*.pyc
node_modules/
.venv/
.tox/
.nox/
.mypy_cache/
.pytest_cache/
.ruff_cache/
.hypothesis/
"""
# Above those of any .gitattributes: files as they are; or with line ends, $Id$ and encodings as their owner's git has
# them in its work tree. Filters, which are programs, never.
AS_THEY_ARE = "* -text !eol -ident -filter !working-tree-encoding !diff\n"
CONVERTED = "* -filter !diff\n"
SETTINGS = {
    "core.fsmonitor": "false", "core.hooksPath": "/dev/null", "core.autocrlf": "false", "core.fileMode": "true",
    "core.symlinks": "true", "core.ignoreCase": "false", "core.logAllRefUpdates": "false", "gc.auto": "0",
    "maintenance.auto": "false", "safe.directory": "*", "protocol.ext.allow": "never", "core.looseCompression": "1",
    "diff.renameLimit": "2000", "core.excludesFile": "/dev/null",
}  # fmt: skip
WHO = {"NAME": "Swarm agent", "EMAIL": "agent@swarm.invalid"}


class WorkTreeError(Exception):
    """The message says what can't be done, and why."""


@dataclass(kw_only=True)
class Base:
    """A repository at the start: ``commit`` is its snapshot, ``known`` are the commits that its owner has."""

    directory: Path
    store: Path  # our git directory
    had_git: bool = False
    converted: bool = False
    commit: str = ""  # "": nothing was there
    known: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    nested: dict[bytes, "Base"] = field(default_factory=dict)


# --- snapshots --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class State:
    nested: list[bytes]
    links: dict[bytes, str]  # those of them that are submodules
    left_out: dict[bytes, str]


def snapshot(base: Base, *, limited: bool = True) -> State:
    """Bring our index up to what is in the directory, as `git add --all` would, except for repositories inside."""
    links: dict[bytes, str] = {}
    gone: list[bytes] = []
    for entry in to_names(run_git(base, "ls-files", "-z", "--stage")):
        if entry.startswith(b"160000 "):
            about, _, path = entry.partition(b"\t")
            place = below(base.directory, path)
            if os.path.lexists(place / ".git"):
                links[path] = about.split()[1].decode()
            elif not place.is_dir() or any(place.iterdir()):
                gone.append(path)
    update(base, "--force-remove", gone)
    left_out: dict[bytes, str] = {}
    new = to_names(run_git(base, "ls-files", "-z", "--others", "--exclude-standard", unreadable=base.directory))
    nested = [*links, *(path.rstrip(b"/") for path in new if path.endswith(b"/"))]
    gone, sizes = [], {}
    for path in [*to_names(run_git(base, "ls-files", "-z", "--modified")), *new]:
        if path in links or path.endswith(b"/"):
            continue
        place = below(base.directory, path)
        try:
            status = place.lstat()
        except OSError:
            gone.append(path)
            continue
        if stat.S_ISREG(status.st_mode):
            sizes[path] = status.st_size
            if not os.access(place, os.R_OK):
                place.chmod(status.st_mode | stat.S_IRUSR)
        elif stat.S_ISLNK(status.st_mode):
            sizes[path] = 0
        else:
            gone.append(path)
    total = sum(sizes.values())
    for path, size in sorted(sizes.items(), key=lambda item: -item[1]) if limited else ():
        if size <= MAX_FILE_BYTES and total <= MAX_NEW_BYTES:
            break
        left_out[path] = f"{TOO_LARGE}: {size} bytes"
        total -= size
    update(base, "--force-remove", gone)
    stage(base, [path for path in sizes if path not in left_out], left_out)
    held = set(to_names(run_git(base, "ls-files", "-z")))
    left_out |= {path: "git can't hold a file of this name" for path in sizes if path not in held | left_out.keys()}
    return State(nested=sorted(set(nested)), links=links, left_out=left_out)


def use_attributes(base: Base, *, converted: bool) -> None:
    base.converted = converted
    (base.store / "info/attributes").write_text(CONVERTED if converted else AS_THEY_ARE)


def convert(base: Base, tree: str, *, on: bool, limited: bool) -> State:
    """A snapshot upon ``tree`` with or without conversions."""
    use_attributes(base, converted=on)
    run_git(base, "read-tree", tree)  # with no file's date, so that all are looked at
    return snapshot(base, limited=limited)


def stage(base: Base, paths: list[bytes], left_out: dict[bytes, str]) -> None:
    """If git refuses one path (a file that is gone again, say), the others still come in."""
    try:
        update(base, "--replace --add --remove", paths)
    except WorkTreeError as error:
        if len(paths) == 1:
            left_out[paths[0]] = str(error)
            return
        middle = len(paths) // 2
        stage(base, paths[:middle], left_out)
        stage(base, paths[middle:], left_out)


def update(base: Base, how: str, paths: Collection[bytes]) -> None:
    if paths:
        run_git(base, "update-index", *how.split(), "-z", "--stdin", given=b"".join(path + b"\0" for path in paths))


def set_link(base: Base, state: State, path: bytes, commit: str) -> None:
    if path in state.links and commit != state.links[path]:
        run_git(base, "update-index", "--cacheinfo", f"160000,{commit},{os.fsdecode(path)}")


def make_commit(base: Base, tree: str, parents: list[str], message: str) -> str:
    return git_line(base, "commit-tree", tree, *(word for one in parents for word in ("-p", one)), "-m", message)


# --- git --------------------------------------------------------------------------------------------------------------


def git_dir(directory: Path) -> Path | None:
    """The repository of a directory, which for a submodule is elsewhere."""
    git = directory / ".git"
    try:
        if git.is_file():
            git = directory / git.read_text().removeprefix("gitdir:").strip()
        return git if (git / "HEAD").exists() else None
    except (OSError, ValueError):
        return None


def objects_of(git: Path) -> tuple[Path, Path]:
    """Where a repository keeps its objects, and the list of commits whose parents it lacks."""
    with contextlib.suppress(OSError, ValueError):
        git = git / (git / "commondir").read_text().strip()
    return git / "objects", git / "shallow"


def keep_objects(git: Path, store: Path) -> None:
    """Link them, so that they stay whatever the agent does to the repository."""
    objects, shallow = objects_of(git)
    for place, _, names in os.walk(objects):
        into = store / "objects" / Path(place).relative_to(objects)
        into.mkdir(parents=True, exist_ok=True)
        for name in names:
            if name.startswith("tmp_") or name == "alternates" or (into / name).exists():
                continue
            try:
                os.link(Path(place, name), into / name)
            except OSError:
                shutil.copyfile(Path(place, name), into / name)
    if shallow.exists():
        shutil.copyfile(shallow, store / "shallow")


def borrow_objects(git: Path, store: Path) -> None:
    objects, shallow = objects_of(git)
    quoted = "".join(f"\\{byte:03o}" for byte in os.fsencode(objects.absolute()))
    (store / "objects/info").mkdir(parents=True, exist_ok=True)
    (store / "objects/info/alternates").write_text(f'"{quoted}"\n')
    if shallow.exists():
        shutil.copyfile(shallow, store / "shallow")


def refs_of(git: Path) -> dict[str, str]:
    kinds = ("refs/heads", "refs/tags", "refs/remotes", "refs/stash")
    said = run_git(None, f"--git-dir={git}", "for-each-ref", "--format=%(objectname) %(refname)", *kinds)
    pairs = (line.partition(" ") for line in said.decode(errors="surrogateescape").splitlines())
    return {name: commit for commit, _, name in pairs}


def head_of(git: Path) -> str:
    """'' before the first commit."""
    return run_git(None, f"--git-dir={git}", "rev-parse", "--quiet", "--verify", "HEAD", ok=(0, 1)).decode().strip()


def existing(base: Base, objects: Collection[str]) -> list[str]:
    """Those that are there, and are commits or lead to one."""
    said = run_git(base, "cat-file", "--batch-check", given=to_lines([f"{one}^{{commit}}" for one in sorted(objects)]))
    lines = (line.split() for line in said.splitlines())
    return sorted({one.decode() for one, kind, *_ in lines if kind == b"commit"})


def is_ancestor(base: Base, one: str, other: str) -> bool:
    return not run_git(base, "rev-list", "-n1", one, f"^{other}")


def branch_name(name: str) -> str:
    """As a name that git takes."""
    name = re.sub(r"[^\w./+@=-]+|\.\.+|@\{|//+|\.lock(?=/|$)|(?<=/)[.-]", "-", name, flags=re.ASCII).strip("/.-")
    return name[:200].rstrip("/.") or "swarm/work"


def below(directory: Path, path: bytes) -> Path:
    return directory / os.fsdecode(path)


def as_text(path: bytes) -> str:
    return path.decode(errors="backslashreplace")


def to_names(said: bytes) -> list[bytes]:
    return said.split(b"\0")[:-1]


def to_lines(words: list[str]) -> bytes:
    return "".join(f"{word}\n" for word in words).encode(errors="surrogateescape")


def tree_of(base: Base, commit: str) -> str:
    return git_line(base, "rev-parse", f"{commit}^{{tree}}")


def git_line(base: Base, *words: str) -> str:
    return run_git(base, *words).decode().strip()


def run_git(
    base: Base | None,
    *words: str,
    given: bytes = b"",
    to: Any = subprocess.PIPE,
    ok: Collection[int] = (0,),
    unreadable: Path | None = None,
) -> bytes:
    """Run git, with nobody's settings but ours; in ``base``'s store upon its directory, if it is given."""
    env = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"}
    env |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_COUNT": str(len(SETTINGS))}
    for number, (name, value) in enumerate(SETTINGS.items()):
        env |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    env |= {f"GIT_{role}_{what}": value for role in ("AUTHOR", "COMMITTER") for what, value in WHO.items()}
    if base is not None:
        env |= {"GIT_DIR": str(base.store), "GIT_WORK_TREE": str(base.directory)}
    done = run(["git", *words], given=given, to=to, ok=ok, env=env, cwd=base.directory if base else None)
    if unreadable and b"could not open directory" in done.stderr:
        for place, names, _ in os.walk(unreadable):
            for name in names:
                inside = Path(place, name)
                if not inside.is_symlink() and not os.access(inside, os.R_OK | os.X_OK):
                    inside.chmod(inside.stat().st_mode | stat.S_IRWXU)
        return run_git(base, *words, given=given, to=to, ok=ok)
    return done.stdout or b""


def run(
    words: list[str], *, given: bytes = b"", to: Any = subprocess.PIPE, ok: Collection[int] = (0,), **how: Any
) -> subprocess.CompletedProcess[bytes]:
    what = " ".join(words[:2])
    try:
        done = subprocess.run(
            words, input=given, stdout=to, stderr=subprocess.PIPE, timeout=SECONDS, check=False, **how
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise WorkTreeError(f"{what}: {error}") from error
    if done.returncode not in ok:
        said = done.stderr.decode(errors="replace").strip()
        raise WorkTreeError(f"{what}: {said[-400:] or f'exit status {done.returncode}'}")
    return done
