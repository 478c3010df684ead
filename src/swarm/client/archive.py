"""What is uploaded from this computer."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Final

_LEFT_OUT: Final = frozenset({"__pycache__", ".git"})


def text_of(file: str | os.PathLike[str]) -> bytes:
    return Path(file).read_bytes()


def packed(directory: str | os.PathLike[str]) -> bytes:
    """The directory as a .tar.gz, without owners and times."""

    def entry(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if info.name.rpartition("/")[2] in _LEFT_OUT:
            return None
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for path in sorted(Path(directory).iterdir()):
            tar.add(path, arcname=path.name, filter=entry)
    return archive.getvalue()
