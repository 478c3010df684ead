"""Secrets: encrypted at rest with AES-256-GCM, decrypted for attempts whose agent names them.

The key is a file beside the database that only root can read, or a systemd credential; without it the rows are useless.
A sealed value is bound to its name and scope, so that a row copied to another name or scope can't be opened.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from swarm.base import versions
from swarm.base.redact import SHORTEST
from swarm.errors import HostError, NotFound, UsageError
from swarm.model import Agent
from swarm.store.registry.secrets import Sealed, SecretRow
from swarm.store.store import Store

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

CREDENTIAL: Final = "swarm_secret_key"
ALL: Final = "all"
MAX_BYTES: Final = 64 * 1024
_KEY_BYTES, _NONCE_BYTES = 32, 12  # NIST SP 800-38D
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


def scope_of(agent: str | None, workflow: str | None, webhook: str | None = None) -> str:
    """Raises UsageError when more than one is given."""
    given = {"agent": agent, "workflow": workflow, "webhook": webhook}
    scopes = [f"{kind}:{name}" for kind, name in given.items() if name]
    if len(scopes) > 1:
        raise UsageError("a secret is for one agent, workflow or webhook, or for all: give one of these options")
    return scopes[0] if scopes else ALL


class Vault:
    """``key_file`` is made when it is first needed. ``gateway_keys``: secrets that the gateway uses as keys, and
    for which service; agents and workflows get them only if they are set in their own scope."""

    def __init__(self, store: Store, *, key_file: Path, gateway_keys: Callable[[], Mapping[str, str]] = dict) -> None:
        self._store = store
        self._key_file = key_file
        self._gateway_keys = gateway_keys

    async def set(self, name: str, value: str, *, scope: str = ALL, by: str | None = None) -> None:
        """``by``: who sets it, for an event. Raises UsageError, which never quotes the value."""
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} is not a valid name for a secret: use letters, digits and '_', no digit first")
        if "\0" in value or len(value) < SHORTEST or len(value.encode(errors="replace")) > MAX_BYTES:
            raise UsageError(f"a secret must have {SHORTEST} to {MAX_BYTES} characters, and no NUL")
        await self.check(but=(name, scope))
        nonce = os.urandom(_NONCE_BYTES)
        cipher = await asyncio.to_thread(self._cipher, make=True)  # reads the key, or makes it
        try:
            sealed = nonce + cipher.encrypt(nonce, value.encode(), _bound(name, scope))
        except UnicodeEncodeError:
            raise UsageError("a secret must be text that UTF-8 can hold") from None
        row = Sealed(name=name, scope=scope, sealed=base64.b64encode(sealed).decode())
        await self._store.put_secret(row, by=by)

    async def sealed(self, text: str, *, what: str) -> str:
        """``text`` for somebody who may keep it but not read it, and give it back to `unsealed` with the same
        ``what``."""
        cipher, nonce = await asyncio.to_thread(self._cipher, make=True), os.urandom(_NONCE_BYTES)
        return base64.urlsafe_b64encode(nonce + cipher.encrypt(nonce, text.encode(), what.encode())).decode()

    async def unsealed(self, text: str, *, what: str) -> str | None:
        """None for what `sealed` did not make."""
        from cryptography.exceptions import InvalidTag

        cipher = await asyncio.to_thread(self._cipher, make=True)
        try:
            data = base64.urlsafe_b64decode(text)
            return cipher.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], what.encode()).decode()
        except (InvalidTag, ValueError):
            return None

    async def check(self, *, but: tuple[str, str] | None = None) -> int:
        """The number of secrets, those of one name and scope aside. Raises HostError if there are some, and the key of
        this host opens none: it is another host's. With two keys, each host could open but its own."""
        rows = await self._store.sealed_secrets([row.name for row in await self.list()])
        others = [row for row in rows if (row.name, row.scope) != but]
        file = self._place()
        if others and file.exists():
            await asyncio.to_thread(self._cipher, make=False)  # that it is no key, or others can read it, is said so
        for row in others:
            with contextlib.suppress(HostError):
                await asyncio.to_thread(self._open, row)
                return len(others)
        if others:
            raise HostError(
                f"none of the {len(others)} secrets here can be opened with the key in {file}: copy that file from the "
                "host where they were set, or, if it is lost, remove them (`swarm secret rm`)"
            )
        return 0

    async def list(self) -> list[SecretRow]:
        return await self._store.secrets()

    async def remove(self, name: str, *, scope: str = ALL, by: str | None = None) -> None:
        """Raises NotFound."""
        await self._store.remove_secret(name, scope, by=by)

    async def get(self, name: str, *, scope: str = ALL) -> str | None:
        """A secret for Swarm itself: a key of a gateway service, or of a webhook. Raises HostError when it can't be
        opened."""
        rows = [row for row in await self._store.sealed_secrets([name]) if row.scope == scope]
        return self._open(rows[0]) if rows else None

    async def of(self, names: Sequence[str], agent: Agent, workflow_id: str | None) -> Mapping[str, str]:
        """The secrets of an agent, by name. The agent's own scope comes first, then its workflow's, then `all`. Raises
        NotFound; UsageError for a key of the gateway."""
        scopes = [f"agent:{agent.name}"]
        if workflow_id:
            workflow = await self._store.workflow(workflow_id)  # by id, or by name as another tool may write it
            scopes += [f"workflow:{workflow.id}", f"workflow:{workflow.name}"]
        scopes.append(ALL)
        rows = {(row.name, row.scope): row for row in await self._store.sealed_secrets(names)}
        found = {}
        for name in names:
            row = next((rows[name, scope] for scope in scopes if (name, scope) in rows), None)
            if row is None:
                near = versions.did_you_mean(name, {row.name: row for row in await self.list() if row.name != name})
                scope = f" --agent {agent.name}" if agent.name else ""  # a VM of somebody's own has no agent
                raise NotFound(
                    f"it needs the secret {name!r}, which is not set{near}: `swarm secret set {name}{scope}`"
                )
            if row.scope == ALL and (service := self._gateway_keys().get(name)):
                raise UsageError(
                    f"the secret {name!r} is the gateway's key for {service}: no VM gets it. An agent reaches "
                    f"{service} by its network policy; if it must have its own key: "
                    f"`swarm secret set {name} --agent {agent.name}`"
                )
            found[name] = self._open(row)
        return found

    def _open(self, row: Sealed) -> str:
        from cryptography.exceptions import InvalidTag

        try:
            sealed = base64.b64decode(row.sealed, validate=True)
            cipher, where = self._cipher(make=False), _bound(row.name, row.scope)
            return cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], where).decode()
        except (InvalidTag, ValueError):
            raise HostError(
                f"the secret {row.name!r} can't be opened with the key in {self._key_file}: it was sealed with another "
                "key, or changed since; set it again"
            ) from None

    def _cipher(self, *, make: bool) -> AESGCM:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(self._key(make=make))

    def _place(self) -> Path:
        credentials = os.environ.get("CREDENTIALS_DIRECTORY", "")
        file = Path(credentials) / CREDENTIAL if credentials else self._key_file
        return file if file.is_file() else self._key_file

    def _key(self, *, make: bool) -> bytes:
        file = self._place()
        if make and file == self._key_file:
            _make_key(file)
        try:
            if file == self._key_file and file.stat().st_mode & 0o077:
                raise HostError(f"others can read the key of all secrets in {file}: `chmod 600 {file}`")
            key = base64.b64decode(file.read_bytes().strip())
        except (OSError, ValueError) as error:
            raise HostError(f"the key of all secrets in {file} can't be read: {error}") from None
        if len(key) != _KEY_BYTES:
            raise HostError(f"{file} does not hold a key for secrets: base64 of {_KEY_BYTES} bytes is needed")
        return key


def _make_key(file: Path) -> None:
    """Make the key unless it exists. Atomic: of several processes that do this at once, one wins."""
    if file.exists():
        return
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as written:
            written.write(base64.b64encode(os.urandom(_KEY_BYTES)) + b"\n")
            written.flush()
            os.fsync(written.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(partial, file)
    except OSError as error:
        raise HostError(f"can't make the key of all secrets {file}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def _bound(name: str, scope: str) -> bytes:
    return f"{scope}\0{name}".encode()
