"""Where the server of a home is: `data/serve.json` in the home, for as long as it runs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from swarm.base import files, process
from swarm.config import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A live server. ``started``: clock ticks since boot; with the pid, it names the process for ever.
    ``public_url``: how browsers reach it behind a proxy, or ''."""

    url: str
    pid: int
    started: int
    public_url: str = ""


def file(settings: Settings) -> Path:
    return settings.data_dir / "serve.json"


def running(settings: Settings) -> Address | None:
    """The server of this home; of several, the one that started last."""
    try:
        value = json.loads(files.read_own(file(settings)))
        found = Address(
            url=str(value["url"]), pid=int(value["pid"]), started=int(value["started"]),
            public_url=str(value.get("public_url", "")),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if process.start_time(found.pid) == found.started else None


def hidden(settings: Settings) -> bool:
    """May this user not see whether a server of this home runs?"""
    try:
        files.read_own(file(settings))
    except PermissionError:
        return True
    except (OSError, ValueError):
        pass
    return False


@contextlib.contextmanager
def written(settings: Settings, url: str) -> Iterator[None]:
    """Say that this process serves there, for the length of the block. Raises HostError."""
    path = file(settings)
    ours = {"url": url, "pid": os.getpid(), "started": process.start_time(os.getpid())}
    ours |= {"public_url": settings.public_url} if settings.public_url else {}
    with files.host_errors(f"can't write {path}"):
        files.write_atomically(path, json.dumps(ours))
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            if json.loads(files.read_own(path)) == ours:  # a server that started later may have replaced it
                path.unlink()


def forget_dead(settings: Settings) -> list[Path]:
    """Remove what a server that was killed has left. Returns what is removed. Raises HostError."""
    if running(settings) is not None:
        return []
    from swarm.base.unix_socket import listens

    removed = []
    for path in (file(settings), settings.api_socket):
        if path == settings.api_socket and listens(path):
            continue
        with files.host_errors(f"can't remove {path}"), contextlib.suppress(FileNotFoundError):
            path.unlink()
            removed.append(path)
    return removed
