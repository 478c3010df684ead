"""Wiring of the HTTP server of `swarm serve`."""

from __future__ import annotations

import secrets
from asyncio import Task
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from swarm.admin.vault import scope_of
from swarm.api import server
from swarm.api.webhooks import Hooks
from swarm.app import wiring
from swarm.cel.jail import Jail
from swarm.config import Settings
from swarm.errors import Conflict
from swarm.store.store import Store

# How long a request waits for a locked database.
_BUSY_SECONDS = 5.0


@asynccontextmanager
async def served(settings: Settings, *, host: str, port: int, remote: bool) -> AsyncIterator[tuple[str, Task[None]]]:
    """Run the HTTP server inside the block; yields its URL, and the task that ends if the server does.

    Raises UsageError for an address that other hosts can reach, unless ``remote``; HostError, StoreError.
    """
    server.check_host(host, remote=remote)
    patience = min(settings.busy_timeout_seconds, _BUSY_SECONDS)
    with Jail() as jail:
        async with Store.open(settings.database, busy_timeout_seconds=patience) as opened:
            await opened.workflows()  # reports a broken database now instead of to the first sender
            vault = wiring.vault(settings, opened)

            async def secret(name: str, workflow: str) -> str | None:
                return await vault.get(name, scope=scope_of(None, None, workflow))

            hooks = Hooks(store=opened, secret=secret, evaluator=jail)
            async with server.serving(hooks.app(), host=host, port=port) as serving:
                yield serving


async def new_secret(settings: Settings, name: str, workflow: str, *, replace: bool) -> str:
    """Make and store the secret that senders to a workflow sign with. Raises Conflict if it exists, unless
    ``replace``."""
    async with wiring.store(settings) as opened:
        vault, scope = wiring.vault(settings, opened), scope_of(None, None, workflow)
        if not replace and any((row.name, row.scope) == (name, scope) for row in await vault.list()):
            raise Conflict(f"the secret {name} of {workflow} exists, and is shown only once; --new makes another")
        value = secrets.token_hex(32)
        await vault.set(name, value, scope=scope)
        return value
