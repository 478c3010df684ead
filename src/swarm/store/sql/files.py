"""Notices that the files of an SQLite database were removed or replaced while they are open.

SQLite itself does not: it goes on in files that have no name any more, so nobody else sees what is written, and its
last act (a checkpoint of a log that was removed) destroys what others wrote meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import sqlite3
from pathlib import Path
from typing import Final, TypeAlias

from swarm.errors import StoreError

Identity: TypeAlias = tuple[tuple[int, int] | None, ...]
_SUFFIXES: Final = ("", "-wal", "-shm")


def identity(file: Path) -> Identity:
    """Of the database, its log and its index, which all exist as long as a connection in WAL mode is open."""
    found: list[tuple[int, int] | None] = []
    for suffix in _SUFFIXES:
        try:
            info = Path(f"{file}{suffix}").stat()
        except OSError:
            found.append(None)
        else:
            found.append((info.st_dev, info.st_ino))
    return tuple(found)


def check(file: Path, opened: Identity) -> None:
    """Raises StoreError when one of the files that were ``opened`` is gone, or another one has its name."""
    now = identity(file)
    for suffix, before, after in zip(_SUFFIXES, opened, now, strict=True):
        if before is not None and before != after:
            if suffix:
                _keep_open(file)
            raise StoreError(
                f"{file}{suffix} was changed from outside (it was moved, removed or replaced) while an engine was "
                "using it; nothing more is written: stop all engines, check the database, and start again"
            )


def _keep_open(file: Path) -> None:
    """Hold the file until this process has ended: a checkpoint by its last connection would write the log that was
    removed over what others have written since, and remove theirs."""
    connection = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False)
    with contextlib.suppress(sqlite3.Error):
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))  # never closed, not even by the interpreter's end
