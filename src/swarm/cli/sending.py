"""`--file`: files of this host that a ticket is given. A git work tree goes without ignored files, but with history."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from swarm.base.process import Completed
    from swarm.store.store import Store

FileOptions = Annotated[
    list[str] | None,
    typer.Option("--file", "-f", metavar="PLACE=PATH", help="A file, or a directory, to put to /work/PLACE."),
]
AllFiles = Annotated[
    bool,
    typer.Option("--all-files", help="Of a git work tree, send ignored files and .git as they are, too."),
]
_GIT_SECONDS: Final = 300.0
_MAX_DEPTH: Final = 16  # of repositories in each other


@dataclass(frozen=True, slots=True)
class Source:
    """Files below one directory, and what their names get in front. ``chosen``: by git, so they are few of what is
    there."""

    top: Path
    names: Iterable[str]
    prefix: str = ""
    chosen: bool = False


async def send(store: Store, ticket_id: str, given: Sequence[str], *, all_files: bool) -> tuple[dict[str, str], int]:
    """Keep these files for a ticket that is about to be added. Returns its ``$files``, and how many
    artifacts they are, for `Store.add_ticket`. Raises UsageError, and Conflict when there is a ticket with this id."""
    from swarm.base import trees
    from swarm.errors import Conflict, NotFound, UsageError

    with contextlib.suppress(NotFound):
        await store.ticket(ticket_id)
        raise Conflict(f"the ticket id {ticket_id!r} is taken; choose another one")
    found: dict[str, str] = {}
    kept: set[str] = set()
    for option in given:
        place, path = _parsed(option)
        if place in found:
            raise UsageError(f"--file {option}: another --file has the place {place!r} too")
        async with AsyncExitStack() as stack:
            try:
                sources = await sources_of(path, stack, all_files=all_files)
                files = (file for one in sources for file in trees.read(one.top, one.names, prefix=one.prefix))
                parts = trees.pack(files)
                while batch := await asyncio.to_thread(trees.batch, parts):
                    await store.keep_artifacts(ticket_id, dict(batch))
                    kept.update(digest for digest, _ in batch)
                    found[place] = batch[-1][0]  # at last, that of the manifest
            except UsageError as error:
                raise UsageError(f"--file {option}: {error}") from None
            except OSError as error:
                raise UsageError(f"--file {option}: {error.filename} can't be read: {error.strerror}") from None
    return found, len(kept)


def _parsed(option: str) -> tuple[str, Path]:
    from swarm.base import trees
    from swarm.errors import UsageError

    place, equals, text = option.partition("=")
    if not equals:
        place, text = "", option
    path = Path(text)
    if not text or not path.exists():
        raise UsageError(f"--file {option}: {text or 'PATH'} does not exist; write PLACE=PATH, such as repo/=./repo")
    name = path.resolve().name
    if path.is_dir():
        place = f"{(place or name).rstrip('/')}/"
    elif not place or place.endswith("/"):
        place += name
    if not trees.is_place(place):
        raise UsageError(f"--file {option}: {place!r} is not below /work, or is the agent's own; choose another place")
    return place, path


async def sources_of(path: Path, stack: AsyncExitStack, *, all_files: bool, history: bool = True) -> list[Source]:
    """The files at ``path``; of a git work tree those that belong to it, and its ``history``. Raises UsageError."""
    from swarm.base import trees
    from swarm.errors import UsageError

    if not path.is_dir():
        return [Source(path.resolve().parent, [path.resolve().name])]
    path = path.resolve()
    if all_files or not any((above / ".git").exists() for above in (path, *path.parents)):
        return [Source(path, trees.walk(path))]
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-files-")))
    if shutil.which("git") is None:
        raise UsageError(f"{path} is in a git work tree, and this host has no git: install it, or use --all-files")
    return await _Git(path, scratch).work_tree(history=history)


class _Git:
    """What belongs to a work tree: tracked and new files, not ignored ones; and its history, in a new repository that
    has no hooks, remotes, stashes or settings of the old one: there may be passwords in them.

    A repository may be hostile: its settings name programs, and its index, links and gitfiles can lead to other places.
    """

    def __init__(self, path: Path, scratch: Path) -> None:
        self._path = path
        # The user has named this directory, whoever owns it.
        quoted = str(path).replace("\\", "\\\\").replace('"', '\\"')
        config = scratch / "gitconfig"
        config.write_text(f'[safe]\ndirectory = "{quoted}"\ndirectory = "{quoted}/.git"\n')
        # What its settings could run is switched off where they can't switch it on again.
        off = {"core.fsmonitor": "false", "core.hooksPath": os.devnull}
        self._env = {
            "GIT_CONFIG_GLOBAL": str(config),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_NO_LAZY_FETCH": "1",
            "GIT_CONFIG_COUNT": str(len(off)),
        }
        for number, (key, value) in enumerate(off.items()):
            self._env |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
        self._clone = scratch / "git"

    async def work_tree(self, *, history: bool) -> list[Source]:
        from swarm.base import trees
        from swarm.errors import UsageError

        whole = os.path.lexists(self._path / ".git")
        if whole and history:
            await self._check_its_own()
        if not whole and (await self._run("-C", str(self._path), "check-ignore", "-q", ".")).returncode == 0:
            return [Source(self._path, trees.walk(self._path))]
        names = await self._list(self._path)
        if not whole and not names and any(self._path.iterdir()):
            raise UsageError(f"git ignores all files in {self._path}; --all-files sends them")
        sources = [Source(self._path, names, chosen=True)]
        if whole and history:
            await self._git(
                "clone", "--quiet", "--bare", "--no-local", "--template=", "--", str(self._path), str(self._clone),
                protocol="file",
            )  # fmt: skip
            inside = f"--git-dir={self._clone}"
            await self._git(inside, "config", "core.bare", "false")
            await self._git(inside, "config", "--remove-section", "remote.origin")
            if (await self._run(inside, "rev-parse", "-q", "--verify", "HEAD")).returncode == 0:
                await self._git(inside, "read-tree", "HEAD")
            sources.append(Source(self._clone, trees.walk(self._clone), ".git/"))
        return sources

    async def _check_its_own(self) -> None:
        """Raises UsageError if its history is that of a repository elsewhere, to which something in it leads."""
        from swarm.errors import UsageError

        place = self._path / ".git"
        gitdir, own = place, place.is_dir() and not os.path.lexists(place / "commondir")
        if place.is_file():
            text = place.read_bytes()[:5000].removeprefix(b"gitdir:").strip()
            gitdir = (self._path / os.fsdecode(text)).resolve()
            set_ = await self._run("config", "--file", str(gitdir / "config"), "core.worktree")
            if set_.returncode == 0:  # a submodule
                own = (gitdir / os.fsdecode(set_.stdout[:-1])).resolve() == self._path
                own = own and not os.path.lexists(gitdir / "commondir")
            else:  # a linked work tree
                with contextlib.suppress(FileNotFoundError):
                    both = [os.fsdecode((gitdir / one).read_bytes().strip()) for one in ("gitdir", "commondir")]
                    own = [(gitdir / one).resolve() for one in both] == [place, gitdir.parent.parent]
                gitdir = gitdir.parent.parent
        parts = ("HEAD", "packed-refs", "refs", "objects", "refs/**/*", "objects/*")
        links = place.is_symlink() or (own and any(one.is_symlink() for part in parts for one in gitdir.glob(part)))
        if links or not own:
            raise UsageError(f"{place} leads to a repository elsewhere; --all-files sends the directory as it is")

    async def _list(self, path: Path, depth: int = 0) -> list[str]:
        """Without names deleted; submodules and nested repositories with what belongs to them."""
        from swarm.base import trees
        from swarm.errors import UsageError

        if depth > _MAX_DEPTH:
            raise UsageError(f"{path} is nested in more than {_MAX_DEPTH} repositories; --all-files sends it")
        # A nested repository must not be one only for us: without the options, git would take the outer one.
        at = ["-C", str(path), *(["--git-dir=.git", "--work-tree=."] if depth else [])]
        partial = r"^(extensions\.partialclone|remote\..*\.(promisor|partialclonefilter))$"
        if (await self._run(*at, "config", "--get-regexp", partial)).returncode == 0:
            raise UsageError(
                f"{path} is a partial clone, of which git would fetch the rest; --all-files sends it as it is"
            )
        listed = await self._git(*at, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        names = sorted({os.fsdecode(name).rstrip("/") for name in listed.split(b"\0") if name})
        found: list[str] = []
        known: dict[str, bool] = {}
        for name in names:
            # A hostile index can name anything; what is behind a link is deleted, for git.
            if not trees.is_plain(name) or trees.names_git(name) or not _is_real(path, name, known):
                continue
            one = path / name
            if one.is_symlink() or not one.is_dir():
                found += [name] if os.path.lexists(one) else []
            elif os.path.lexists(one / ".git"):
                found += [f"{name}/{below}" for below in await self._list(one, depth + 1)]
            else:
                found += [f"{name}/{below}" for below in trees.walk(one) if not trees.names_git(below)]
        return found

    async def _git(self, *arguments: str, protocol: str = "none") -> bytes:
        from swarm.errors import UsageError

        done = await self._run(*arguments, protocol=protocol)
        if done.returncode:
            why = done.stderr.decode(errors="replace").strip()[-1000:]
            raise UsageError(f"git can't read {self._path}: {why}; --all-files sends it as it is")
        return done.stdout

    async def _run(self, *arguments: str, protocol: str = "none") -> Completed:
        from swarm.base.process import run

        env = self._env | {"GIT_ALLOW_PROTOCOL": protocol}
        return await run(["git", *arguments], env=env, timeout_seconds=_GIT_SECONDS, check=False)


def _is_real(top: Path, name: str, known: dict[str, bool]) -> bool:
    """Is the directory of this file below ``top`` reached without a link?"""
    for end in (place for place, letter in enumerate(name) if letter == "/"):
        if (parent := name[:end]) not in known:
            known[parent] = (top / parent).is_dir() and not (top / parent).is_symlink()
        if not known[parent]:
            return False
    return True
