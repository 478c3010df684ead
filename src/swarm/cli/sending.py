"""`--file`: files of this host that a ticket is given. A git work tree goes without ignored files, but with history."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from swarm.base.trees import Part
    from swarm.store.store import Store

FileOptions = Annotated[
    list[str] | None,
    typer.Option("--file", "-f", metavar="PLACE=PATH", help="A file, or a directory, to put to /work/PLACE."),
]
AllFiles = Annotated[
    bool,
    typer.Option("--all-files", help="Of a git work tree, send ignored files and .git as they are, too."),
]
_SEND_BYTES: Final = 4 << 20  # in one transaction
_GIT_SECONDS: Final = 300.0


@dataclass(frozen=True, slots=True)
class _Source:
    """Files below one directory, and what their names get in front."""

    top: Path
    names: Sequence[str]
    prefix: str = ""


async def send(store: Store, ticket_id: str, given: Sequence[str], *, all_files: bool) -> dict[str, str]:
    """Keep these files for a ticket that is about to be added. Returns its ``$files``. Raises UsageError."""
    from swarm.base import trees
    from swarm.errors import UsageError

    found: dict[str, str] = {}
    for option in given:
        place, path = _parsed(option)
        if place in found:
            raise UsageError(f"--file {option}: another --file has the place {place!r} too")
        async with AsyncExitStack() as stack:
            try:
                sources = await _sources(path, stack, all_files=all_files)
                files = (file for one in sources for file in trees.read(one.top, one.names, prefix=one.prefix))
                parts = trees.pack(files)
                while batch := await asyncio.to_thread(_take, parts):
                    await store.keep_artifacts(ticket_id, dict(batch))
                    found[place] = batch[-1][0]  # at last, that of the manifest
            except UsageError as error:
                raise UsageError(f"--file {option}: {error}") from None
            except OSError as error:
                raise UsageError(f"--file {option}: {error.filename} can't be read: {error.strerror}") from None
    return found


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
    if not trees.is_plain(place):
        raise UsageError(f"--file {option}: {place!r} is no place below /work")
    return place, path


async def _sources(path: Path, stack: AsyncExitStack, *, all_files: bool) -> list[_Source]:
    from swarm.base import trees
    from swarm.errors import UsageError

    if not path.is_dir():
        return [_Source(path.resolve().parent, [path.resolve().name])]
    path = path.resolve()
    if all_files or not any((above / ".git").exists() for above in (path, *path.parents)):
        return [_Source(path, list(await asyncio.to_thread(lambda: list(trees.walk(path)))))]
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-files-")))
    if shutil.which("git") is None:
        raise UsageError(f"{path} is in a git work tree, and this host has no git: install it, or use --all-files")
    return await _Git(path, scratch).work_tree()


class _Git:
    """What belongs to a work tree: tracked and new files, not ignored ones; and its history, in a new repository that
    has no hooks, remotes, stashes or settings of the old one: there may be passwords in them."""

    def __init__(self, path: Path, scratch: Path) -> None:
        self._path = path
        # The user has named this directory, whoever owns it. What its settings could run is switched off.
        quoted = str(path).replace("\\", "\\\\").replace('"', '\\"')
        config = scratch / "gitconfig"
        safe = f'directory = "{quoted}"\ndirectory = "{quoted}/.git"'
        config.write_text(f"[safe]\n{safe}\n[core]\nfsmonitor = false\n")
        self._env = {"GIT_CONFIG_GLOBAL": str(config), "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0"}
        self._clone = scratch / "git"

    async def work_tree(self) -> list[_Source]:
        from swarm.base import trees

        listed = await self._git("-C", str(self._path), "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        names = sorted({os.fsdecode(name) for name in listed.split(b"\0") if name})
        sources = [_Source(self._path, await asyncio.to_thread(self._present, names))]
        if (self._path / ".git").exists():
            await self._git(
                "clone", "--quiet", "--bare", "--no-local", "--template=", "--", str(self._path), str(self._clone)
            )
            inside = f"--git-dir={self._clone}"
            await self._git(inside, "config", "core.bare", "false")
            await self._git(inside, "config", "--remove-section", "remote.origin")
            if (await self._git(inside, "for-each-ref", "--count=1")).strip():
                await self._git(inside, "read-tree", "HEAD")
            sources.append(_Source(self._clone, list(trees.walk(self._clone)), ".git/"))
        return sources

    def _present(self, names: Sequence[str]) -> list[str]:
        """Without those deleted; submodules and nested repositories with the files that are in them."""
        from swarm.base import trees

        found: list[str] = []
        for name in names:
            path = self._path / name
            if path.is_dir() and not path.is_symlink():
                found += [f"{name.rstrip('/')}/{one}" for one in trees.walk(path) if ".git" not in one.split("/")]
            elif os.path.lexists(path):
                found.append(name)
        return found

    async def _git(self, *arguments: str) -> bytes:
        from swarm.base.process import run
        from swarm.errors import CommandFailed, UsageError

        try:
            done = await run(["git", *arguments], env=self._env, timeout_seconds=_GIT_SECONDS)
        except CommandFailed as error:
            raise UsageError(f"git can't read {self._path}: {error}") from None
        return done.stdout


def _take(parts: Iterator[Part]) -> list[Part]:
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part[1])
        if size >= _SEND_BYTES:
            break
    return batch
