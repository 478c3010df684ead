"""What a coding agent is given to work on, and what it changed, by git's semantics. Runs in the VM only.

`prepare` makes the state at the start known, `collect` compares with it. Both snapshot the directory into a git
directory of their own (``.swarm`` beside it), whose settings are ours: neither the repository's hooks, filters and
settings nor what the agent does to its ``.git`` changes the result. Files are taken byte for byte, and a snapshot has
what git would add: no ignored file, no socket, no empty directory. The agent's own commits are kept.

A repository inside the directory has its own patch and bundle, compared with its state at the start, or, if it was
cloned since then, with what it was cloned from. A submodule's entry in the outer patch is its new commit.

mini-swe and claude-code each have this file, because packages share nothing. The copies are equal (a test checks it).
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from snapshots import (
    EXCLUDED,
    TOO_LARGE,
    WHO,
    Base,
    State,
    WorkTreeError,
    as_text,
    below,
    borrow_objects,
    branch_name,
    convert,
    existing,
    git_dir,
    git_line,
    head_of,
    is_ancestor,
    keep_objects,
    make_commit,
    refs_of,
    run,
    run_git,
    set_link,
    snapshot,
    to_lines,
    tree_of,
    use_attributes,
)

__all__ = ["WorkTreeError", "collect", "home", "prepare"]

MAX_DIFF_BYTES = 256 << 10  # of the text in the result; the patch is whole
MAX_CHANGES = 5000  # in the list; the patch has all
MAX_NESTED = 50

DIFF = ("diff-tree", "-r", "-M", "--no-commit-id", "--no-ext-diff", "--no-textconv")
NAMES = ("changes.patch", "branch.bundle")
STATUS = {"A": "added", "M": "changed", "D": "removed", "R": "renamed", "C": "added", "T": "type changed"}


# --- the start --------------------------------------------------------------------------------------------------------


def home(directory: Path) -> Path:
    """A HOME that is not the work directory, with a name for commits."""
    directory.mkdir(exist_ok=True)
    settings = f"[user]\n\tname = {WHO['NAME']}\n\temail = {WHO['EMAIL']}\n[init]\n\tdefaultBranch = main\n"
    (directory / ".gitconfig").write_text(settings + "[safe]\n\tdirectory = *\n[advice]\n\tdetachedHead = false\n")
    return directory


def prepare(directory: Path, files: Mapping[str, str] | None = None) -> Base:
    """Make ``directory`` a repository with what the ticket brought: the directory itself, ``NAME.bundle`` or
    ``NAME.tar.gz`` beside it, and ``files`` (path: text). Without a repository it becomes one, with one commit."""
    directory = directory.absolute()
    bundle, archive = (directory.with_name(directory.name + end) for end in (".bundle", ".tar.gz"))
    came = [path.name for path in (directory, bundle, archive) if path.exists()]
    if len(came) > 1:
        raise WorkTreeError(f"the ticket brought {' and '.join(came)}: give one of them")
    directory.mkdir(exist_ok=True)
    if bundle.exists():
        _unbundle(bundle, directory)
    elif archive.exists():
        _unpack(archive, directory)
    for name, text in (files or {}).items():
        path = directory / name
        if directory.resolve() not in path.resolve().parents or ".git" in Path(name).parts:
            raise WorkTreeError(f"inputs.files: {name!r} is not a path below the work directory")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
        except (OSError, ValueError) as error:
            raise WorkTreeError(f"inputs.files: {error}") from error
    own = directory.with_name(".swarm")
    own.mkdir(exist_ok=True)
    base = _at_start(directory, own)
    if not base.had_git:
        _make_repository(base)
    return base


def _unbundle(bundle: Path, directory: Path) -> None:
    run_git(None, "init", "-q", "-b", "main", str(directory))
    heads: dict[str, str] = {}
    for line in run_git(None, "bundle", "list-heads", str(bundle)).decode(errors="surrogateescape").splitlines():
        commit, _, name = line.partition(" ")
        heads[name] = commit
    branches = [name for name in heads if name.startswith("refs/heads/")]
    wanted = [f"+{name}:{name}" for name in heads if name.startswith(("refs/heads/", "refs/tags/"))]
    if not branches and "HEAD" in heads:
        branches, wanted = ["refs/heads/main"], [*wanted, "+HEAD:refs/heads/main"]
    if not branches:
        raise WorkTreeError(f"{bundle.name} has no branch")
    run_git(
        None, "-C", str(directory), "fetch", "-q", "--update-head-ok", "--no-write-fetch-head", str(bundle), *wanted
    )
    usual = ["refs/heads/main", "refs/heads/master", *branches]
    current = [name for name in usual if name in branches and heads.get(name) == heads.get("HEAD")]
    current += [name for name in usual if name in branches]
    run_git(None, "-C", str(directory), "symbolic-ref", "HEAD", current[0])
    run_git(None, "-C", str(directory), "reset", "-q", "--hard")


def _unpack(archive: Path, directory: Path) -> None:
    run(["tar", "-xzf", str(archive), "-C", str(directory), "--no-same-owner"])
    inside = list(directory.iterdir())
    if len(inside) != 1 or inside[0].name == ".git" or inside[0].is_symlink() or not inside[0].is_dir():
        return
    if (inside[0] / ".git").exists() or inside[0].name == directory.name:  # `tar -czf repo.tar.gz repo`
        aside = inside[0].rename(directory.with_name(f"{directory.name}.unpacked"))
        directory.rmdir()
        aside.rename(directory)


def _at_start(directory: Path, own: Path) -> Base:
    """A repository's state, and those of the repositories inside it."""
    base, git = _open(directory, own)
    head = ""
    if git is not None:
        keep_objects(git, base.store)
        with contextlib.suppress(OSError), (base.store / "info/exclude").open("ab") as ours:
            ours.write((git / "info/exclude").read_bytes())
        base.refs, head = refs_of(git), head_of(git)
    base.known = existing(base, {*base.refs.values(), *([head] if head else [])})
    state = _first_snapshot(base, head) if head else snapshot(base, limited=False)
    for path in state.nested[:MAX_NESTED]:
        base.nested[path] = _at_start(below(directory, path), own)
        set_link(base, state, path, base.nested[path].commit)
    tree = git_line(base, "write-tree")
    clean = head and tree == tree_of(base, head)
    base.commit = head if clean else make_commit(base, tree, [head] if head else [], "The state at the start")
    return base


def _first_snapshot(base: Base, head: str) -> State:
    """With conversions if that is what makes the files those of ``head``, as with `* text eol=crlf`: otherwise the
    branch would change every line end, and the patch would not apply. Else byte by byte, whatever attributes say."""
    state = convert(base, head, on=False, limited=False)
    changed = _count_changed(base, head)
    if changed and run_git(base, "ls-files", "--", ".gitattributes", "*/.gitattributes"):
        index = (base.store / "index").read_bytes()
        converted = convert(base, head, on=True, limited=False)
        if not converted.left_out and _count_changed(base, head) < changed:
            return converted
        use_attributes(base, converted=False)
        (base.store / "index").write_bytes(index)
    return state


def _count_changed(base: Base, head: str) -> int:
    return run_git(base, "diff-index", "--cached", "--name-only", "-z", head).count(b"\0")


def _as_cloned(directory: Path, own: Path) -> Base:
    """The base of a repository that was not there at the start: what it has in common with its remotes."""
    base, git = _open(directory, own)
    if git is None:
        return base
    borrow_objects(git, base.store)
    refs, head = refs_of(git), head_of(git)
    base.refs = {name: commit for name, commit in refs.items() if name.startswith("refs/remotes/")}
    base.known = existing(base, set(base.refs.values()))
    if head and base.known:
        base.commit = run_git(base, "merge-base", head, *base.known[:500], ok=(0, 1)).decode().strip()
    if base.commit:
        run_git(base, "read-tree", base.commit)
    return base


def _open(directory: Path, own: Path) -> tuple[Base, Path | None]:
    git = git_dir(directory)
    if git is None and os.path.lexists(directory / ".git"):
        raise WorkTreeError(f"{directory.name}/.git is not a repository; does it belong to one elsewhere?")
    kind = "sha1"
    if git is not None:
        kind = run_git(None, f"--git-dir={git}", "rev-parse", "--show-object-format").decode().strip()
    store = own / str(len(list(own.iterdir())))
    run_git(None, "init", "-q", "--bare", "--template=", f"--object-format={kind}", str(store))
    (store / "info").mkdir(exist_ok=True)
    (store / "info/exclude").write_text(EXCLUDED)
    base = Base(directory=directory, store=store, had_git=git is not None)
    use_attributes(base, converted=False)
    return base, git


def _make_repository(base: Base) -> None:
    """For the agent: so that it can see its changes, and commit."""
    git = base.directory / ".git"
    run_git(None, "init", "-q", "-b", "main", str(base.directory))
    keep_objects(base.store, git)
    (git / "info").mkdir(exist_ok=True)
    (git / "info/exclude").write_text(EXCLUDED)
    (git / "refs/heads/main").write_text(base.commit + "\n")
    shutil.copyfile(base.store / "index", git / "index")
    base.refs = {"refs/heads/main": base.commit}


# --- the end ----------------------------------------------------------------------------------------------------------


def collect(directory: Path, base: Base, *, branch: str = "swarm/work", out: Path | None = None) -> dict[str, Any]:
    """What changed since ``base``; ``changes.patch`` and ``branch.bundle`` are written to ``out``.

    Returns ``changes`` ({path, status, from}), ``changes_left_out`` (their number, if there are too many), ``diff``
    (text, bounded; ``diff_cut``), ``branch``, ``commit``, ``commits``, ``patch`` and ``bundle`` (names in ``out``, or
    empty), ``left_out`` ({path, why}), and the same for each of ``repositories`` inside."""
    if directory.is_symlink() or not directory.is_dir():
        raise WorkTreeError(f"{directory.name} is no directory any more")
    out = out or directory.with_name("out")
    out.mkdir(exist_ok=True)
    parts: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    _collect(base, branch_name(branch), out, b"", parts, left_out)
    changes = [change for part in parts for change in part.pop("changes")]
    changes.sort(key=lambda change: change["status"] == "added")  # what was there before comes first
    diff, cut = _short([(part["path"], out / part["patch"]) for part in parts if part["patch"]])
    made = {"changes": changes[:MAX_CHANGES], "changes_left_out": max(0, len(changes) - MAX_CHANGES)}
    found = {**parts[0], **made, "diff": diff, "diff_cut": cut, "left_out": left_out[:MAX_CHANGES]}
    del found["path"]
    return {**found, "repositories": [part for part in parts[1:] if part["patch"] or part["bundle"]]}


def _collect(
    base: Base, branch: str, out: Path, prefix: bytes, parts: list[dict[str, Any]], left_out: list[dict[str, str]]
) -> str:
    """Add one repository and those inside it to ``parts``; returns its commit."""
    number = len(parts)
    patch, bundle = (f"repository-{number}.patch", f"repository-{number}.bundle") if number else NAMES
    part: dict[str, Any] = {"path": as_text(prefix), "branch": branch, "patch": "", "bundle": "", "changes": []}
    parts.append(part)

    def leave(path: bytes, why: object) -> None:
        left_out.append({"path": as_text(prefix + path), "why": str(why)[:500]})

    git = git_dir(base.directory)
    head, refs = "", base.refs
    if git is not None:  # else the agent removed or broke it; our own store has the base
        borrow_objects(git, base.store)
        with contextlib.suppress(WorkTreeError):
            head, refs = head_of(git), refs_of(git)
        head = head if head and existing(base, {head}) else ""
    state = snapshot(base)
    if base.converted and not all(why.startswith(TOO_LARGE) for why in state.left_out.values()):
        state = convert(base, base.commit, on=False, limited=True)  # what can't be converted is brought back as it is
    for path, why in state.left_out.items():
        leave(path, why)
    for number, path in enumerate(state.nested):
        if number >= MAX_NESTED or len(parts) > MAX_NESTED:
            leave(path, f"there are more than {MAX_NESTED} repositories")
            continue
        before = len(parts)
        try:
            one = base.nested.get(path) or _as_cloned(below(base.directory, path), base.store.parent)
            set_link(base, state, path, _collect(one, branch, out, prefix + path + b"/", parts, left_out))
        except (WorkTreeError, OSError) as error:
            del parts[before:]
            leave(path, f"a repository that can't be read: {error}")
    tree = git_line(base, "write-tree")
    part["commit"] = commit = _result(base, head, tree)
    against = base.commit or git_line(base, "hash-object", "-t", "tree", "--stdin")
    part["changes"] = _changes(run_git(base, *DIFF, "-z", "--name-status", against, commit), prefix)
    if part["changes"]:
        with (out / patch).open("wb") as file:
            run_git(base, *DIFF, "-p", "--binary", "--full-index", against, commit, to=file)
        if any(" /" in change["path"] for change in part["changes"]):
            _quote_names(out / patch)
        part["patch"] = patch
    theirs = [f"^{known}" for known in base.known] + ([f"^{base.commit}"] if base.commit else [])
    part["commits"] = int(run_git(base, "rev-list", "--count", "--stdin", given=to_lines([commit, *theirs])))
    try:
        if _bundle(base, branch, commit, head, refs, out / bundle):
            part["bundle"] = bundle
    except WorkTreeError as error:  # the agent's commits may lack objects; the patch doesn't need them
        leave(b"", f"{bundle}: {error}")
    return commit


def _result(base: Base, head: str, tree: str) -> str:
    """The commit of ``tree``: the agent's own, or one upon it and the base."""
    on_base = bool(head) and (not base.commit or is_ancestor(base, base.commit, head))
    if on_base and tree == tree_of(base, head):
        return head
    if base.commit and (not head or head in base.known) and tree == tree_of(base, base.commit):
        return base.commit  # as at the start, with what was not committed then
    parents = [] if on_base or not base.commit else [base.commit]
    if head and not (parents and is_ancestor(base, head, base.commit)):
        parents.append(head)
    return make_commit(base, tree, parents, "Work that was not committed")


def _bundle(base: Base, branch: str, commit: str, head: str, refs: Mapping[str, str], file: Path) -> bool:
    """Write ``commit`` as a branch, and other branches and tags that the agent made, upon what the owner has."""
    ours = f"refs/heads/{branch}"
    wanted = {name: at for name, at in refs.items() if base.refs.get(name) != at and not name.startswith("refs/rem")}
    wanted = {name: at for name, at in wanted.items() if at != head and existing(base, {at})} | {ours: commit}
    if all(at in base.known or at == base.commit for at in wanted.values()):
        return False
    names = []
    for name, at in wanted.items():
        with contextlib.suppress(WorkTreeError):  # a branch `swarm` beside one below `swarm/`
            run_git(base, "update-ref", name, at)
            names.append(name)
    given = to_lines([*names, *(f"^{known}" for known in base.known)])
    try:
        run_git(base, "bundle", "create", "-q", str(file.absolute()), "--stdin", given=given)
    except WorkTreeError as error:
        if "empty bundle" in str(error):
            return False
        raise
    return True


def _quote_names(patch: Path) -> None:
    """`git apply` doesn't find the name of an empty file in a directory whose name ends with a space (git 2.39)."""
    whole = patch.with_name(".quoted")
    with patch.open("rb") as lines, whole.open("wb") as quoted:
        for line in lines:
            half = line[13 : 13 + (len(line) - 17) // 2]
            same = b" /" in half and line == b"diff --git a/" + half + b" b/" + half + b"\n"
            quoted.write(b'diff --git "a/' + half + b'" "b/' + half + b'"\n' if same else line)
    whole.rename(patch)


def _changes(listed: bytes, prefix: bytes) -> list[dict[str, str]]:
    fields = iter(listed.split(b"\0")[:-1])
    changes = []
    for letter in fields:
        kind = STATUS.get(letter[:1].decode(), "changed")
        one = {"path": as_text(prefix + next(fields)), "status": kind}
        if kind == "renamed":
            one = {"path": as_text(prefix + next(fields)), "status": kind, "from": one["path"]}
        changes.append(one)
    return changes


def _short(patches: list[tuple[str, Path]]) -> tuple[str, bool]:
    """The patches as one bounded text, and whether anything is missing. Changes of files come before new files, and a
    file that doesn't fit is left out as a whole, so that it pushes out no other."""
    room, cut = MAX_DIFF_BYTES, False
    shown: list[str] = []
    for path, patch in patches:
        shown.append(f"# in {path}\n" if path else "")
        chunks = [*_chunks(patch, new=False), *_chunks(patch, new=True)] if patch.exists() else []
        for size, data in chunks:
            if size > room or b"\nGIT binary patch\n" in data:
                data, cut = data.partition(b"\n")[0] + b"\n# only in the patch: too large, or binary\n", True
            if len(data) <= room:
                room -= len(data)
                shown.append(data.decode(errors="replace").replace("\0", "\ufffd"))
    return "".join(shown), cut


def _chunks(patch: Path, *, new: bool) -> Iterator[tuple[int, bytes]]:
    """Each file's part of a patch: its size, and its first bytes."""
    size, data = 0, b""
    with patch.open("rb") as file:
        for line in file:
            if line.startswith(b"diff --git ") and data:
                if (b"\nnew file mode " in data[:9000]) == new:
                    yield size, data
                size, data = 0, b""
            size += len(line)
            data = data if len(data) > MAX_DIFF_BYTES else data + line
    if data and (b"\nnew file mode " in data[:9000]) == new:
        yield size, data
