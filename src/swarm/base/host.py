"""Which machine this is. Its name alone does not tell: two may have one, and a name may change."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import Final

from swarm.base import files
from swarm.errors import HostError

ID_FILE: Final = "host-id"


def host_id(state_dir: Path) -> str | None:
    """That of this machine; None before an engine ran on it, or if it can't be read."""
    with contextlib.suppress(OSError, ValueError):
        return str(uuid.UUID((state_dir / ID_FILE).read_text(encoding="ascii").strip()))
    return None


def make_host_id(state_dir: Path) -> str:
    """The same, made if there is none yet. Raises HostError."""
    file = state_dir / ID_FILE
    try:
        if not file.exists():
            files.make_directory(state_dir)
            made = file.with_name(f".{ID_FILE}.{os.getpid()}")
            files.write_atomically(made, f"{uuid.uuid4()}\n", flush=True)
            try:
                with contextlib.suppress(FileExistsError):  # another process was faster
                    os.link(made, file)
            finally:
                made.unlink()
    except OSError as error:
        raise HostError(f"can't write the id of this host to {file}: {error.strerror}; are you root?") from None
    if (found := host_id(state_dir)) is None:
        raise HostError(f"can't read the id of this host in {file}: if it is damaged, remove it to make a new host")
    return found


def machine_id() -> str:
    """That of the operating system, '' if it has none. A cloned disk has the same."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path("/etc/machine-id").read_text(encoding="ascii").strip()
    return ""
