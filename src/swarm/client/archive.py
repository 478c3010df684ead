"""Files of this computer as archives for the server, and an archive of the server's as files of this computer."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Final, Literal

from swarm.client.errors import Conflict, ServerError

_LEFT_OUT: Final = frozenset({"__pycache__", ".git"})  # git's settings and history may hold passwords


def text_of(file: str | os.PathLike[str]) -> bytes:
    return Path(file).read_bytes()


def placed(place: str, path: str | os.PathLike[str]) -> str:
    """A directory's place ends in '/', a file's doesn't."""
    if Path(path).is_dir():
        return f"{(place or Path(path).resolve().name).rstrip('/')}/"
    return place + Path(path).resolve().name if place.endswith("/") or not place else place


def packed(path: str | os.PathLike[str], *, mode: Literal["w", "w:gz"] = "w") -> bytes:
    """What is in the directory, or the file, as a tar archive without owners and times."""

    def entry(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if info.name.rpartition("/")[2] in _LEFT_OUT:
            return None
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    archive, top = io.BytesIO(), Path(path)
    with tarfile.open(fileobj=archive, mode=mode, format=tarfile.PAX_FORMAT) as tar:
        for one in sorted(top.iterdir()) if top.is_dir() else [top.resolve()]:
            tar.add(one, arcname=one.name, filter=entry)
    return archive.getvalue()


def unpack(archive: BinaryIO, to: str | os.PathLike[str], *, replace: bool) -> list[Path]:
    """Write what is in the archive below ``to``, and nothing outside of it, whatever the names and links in it, which
    an agent chose. What git would run programs by stays out: a .git, the HEAD that makes a directory a
    repository, and links to such. Raises Conflict for a file that is there, unless ``replace``."""
    top = Path(to)
    here = Path(os.path.realpath(top))
    _refuse_repositories(here, here.parents)
    top.mkdir(parents=True, exist_ok=True)
    written, links = list[Path](), list[tuple[Path, str]]()
    archive.seek(0)
    try:
        with tarfile.open(fileobj=archive, mode="r:") as tar:
            for info in tar:
                if _runs_git(info.name) or (info.issym() and _runs_git(info.linkname)):
                    continue
                path = _below(top, info.name)
                if info.isdir():
                    _make(path)
                elif info.issym():
                    links.append((path, info.linkname))
                elif (data := tar.extractfile(info)) is not None and info.isfile():
                    _free(path, replace=replace)
                    with path.open("xb") as file:
                        shutil.copyfileobj(data, file)
                    if info.mode & 0o100:
                        path.chmod(path.stat().st_mode | 0o111)
                    written.append(path)
    except tarfile.TarError as error:
        raise ServerError(f"the server's archive is damaged: {error}") from None
    for path, target in links:  # at last, so that no file is written through one
        inside = os.path.normpath(path.parent.relative_to(top) / target)
        if inside.split("/")[0] not in ("", ".."):
            _free(_below(top, str(path.relative_to(top))), replace=replace)
            path.symlink_to(target)
            written.append(path)
    return written


def _runs_git(name: str) -> bool:
    """Some file systems don't tell HEAD from head."""
    parts = name.lower().split("/")
    return ".git" in parts or (parts[-1] == "head" and (sys.platform != "linux" or name.endswith("HEAD")))


def _below(top: Path, name: str) -> Path:
    path = top / name
    if name.startswith("/") or ".." in Path(name).parts or path == top:
        raise ServerError(f"the server's archive has a file named {name!r}")
    _refuse_repositories(path.parent, path.parent.parents)
    _make(path.parent)
    if path.parent.resolve() != top.resolve() / path.parent.relative_to(top):
        raise Conflict(f"{path.parent} leads through a link")
    return path


def _refuse_repositories(here: Path, above: Sequence[Path]) -> None:
    """Git would take what is there for a part of one. It looks upward likewise, until there is a work tree."""
    for place in (here, *above):
        if os.path.lexists(place / "HEAD"):
            raise Conflict(f"{place} has a HEAD in it: git may take it for a repository, and run what is put there")
        if os.path.lexists(place / ".git"):
            return


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise Conflict(f"{directory} can't be a directory: there is a file") from None


def _free(path: Path, *, replace: bool) -> None:
    if os.path.lexists(path):
        if not replace or (path.is_dir() and not path.is_symlink()):
            raise Conflict(f"{path} is there")
        path.unlink()
