"""Wiring of the HTTP server: what is behind `swarm serve`."""

from __future__ import annotations

from asyncio import Task
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from swarm.api import server
from swarm.api.hooks import Hooks
from swarm.api.secrets import HookSecrets
from swarm.cel.jail import Jail
from swarm.config import Settings
from swarm.store.store import Store

# How long whoever sent a request waits for a locked database.
_BUSY_SECONDS = 5.0


@asynccontextmanager
async def served(settings: Settings, *, host: str, port: int, remote: bool) -> AsyncIterator[tuple[str, Task[None]]]:
    """The HTTP server, while the block lasts: its URL, and the task that ends if it does.

    Raises UsageError for an address that others can reach, unless ``remote``; HostError, StoreError.
    """
    server.check_host(host, remote=remote)
    patience = min(settings.busy_timeout_seconds, _BUSY_SECONDS)
    with Jail() as jail:
        async with Store.open(settings.database, busy_timeout_seconds=patience) as opened:
            await opened.workflows()  # what is wrong with the database is said now, not to the first sender
            hooks = Hooks(store=opened, secrets=hook_secrets(settings), evaluator=jail)
            async with server.serving(hooks.app(), host=host, port=port) as serving:
                yield serving


def hook_secrets(settings: Settings) -> HookSecrets:
    return HookSecrets(settings.data_dir / "webhooks")
