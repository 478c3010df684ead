"""The keys that senders of webhooks sign with: from the environment, or a file of its own for each, root's alone.

HMAC needs the key itself, not a hash of it. The files are as safe as the database, which lies beside them.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

from swarm.errors import Conflict, HostError

LEAST_BYTES: Final = 16


class HookSecrets:
    """Secrets by the names that workflows give them. ``dir`` is made when the first is."""

    def __init__(self, dir: Path) -> None:  # noqa: A002
        self._dir = dir

    def place(self, name: str) -> Path:
        return self._dir / name

    def get(self, name: str) -> bytes | None:
        """``SWARM_HOOK_<name>`` of the environment, else the file's text. None when there is neither. Raises HostError
        for one that can't be read, that others can read, or that can be guessed."""
        where = f"SWARM_HOOK_{name}"
        key = os.environ.get(where, "").encode()
        if not key:
            file = self.place(name)
            where = str(file)
            try:
                if file.stat().st_mode & 0o077:
                    raise HostError(
                        f"others can read the webhook secret in {file}: chmod 600 {file}, and make a new one"
                    )
                key = file.read_bytes().strip()
            except FileNotFoundError:
                return None
            except OSError as error:
                raise HostError(f"the webhook secret in {file} can't be read: {error.strerror}") from None
        if len(key) < LEAST_BYTES:
            raise HostError(f"the webhook secret in {where} has fewer than {LEAST_BYTES} bytes: it could be guessed")
        return key

    def make(self, name: str, *, replace: bool) -> str:
        """A new one, kept. Raises Conflict when there is one and it is not to be replaced, HostError."""
        if os.environ.get(f"SWARM_HOOK_{name}"):
            raise Conflict(f"the secret comes from the environment (SWARM_HOOK_{name}): change it there")
        file, key = self.place(name), secrets.token_hex(32)
        if file.exists() and not replace:
            raise Conflict(f"the secret {name} is there already ({file}), and is shown once only; --new makes another")
        partial = file.with_name(f".{name}.{os.getpid()}")
        try:
            self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as written:
                written.write(key + "\n")
                written.flush()
                os.fsync(written.fileno())
            partial.rename(file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise HostError(f"can't write {file}: {error.strerror}") from None
        return key
