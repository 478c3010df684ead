"""Wiring of the HTTP server of `swarm serve`."""

from __future__ import annotations

import asyncio
import secrets
from asyncio import Task
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from swarm.admin.uploads import Uploads
from swarm.admin.vault import scope_of
from swarm.api import server, traces
from swarm.api.app import application
from swarm.api.auth import AGAIN_SECONDS, Auth, local
from swarm.api.endpoint import Context
from swarm.api.feed import Feed
from swarm.api.metrics import Metrics
from swarm.api.notices import Sender
from swarm.api.webhooks import Hooks
from swarm.app import wiring
from swarm.base import process
from swarm.base.aio import cancel_all
from swarm.cel.jail import Jail
from swarm.config import Settings
from swarm.dashboard import pages
from swarm.dashboard.render import error_page
from swarm.errors import Conflict
from swarm.gateway.proxy import EgressRules
from swarm.store.store import Store

# How long a request waits for a locked database.
_BUSY_SECONDS = 5.0


@asynccontextmanager
async def served(
    settings: Settings, *, host: str, port: int, remote: bool, again_seconds: float = AGAIN_SECONDS
) -> AsyncIterator[tuple[str, Task[None]]]:
    """Run the HTTP server inside the block; yields its URL, and the task that ends if the server does. It also listens
    on the Unix socket `Settings.api_socket`, for this user's own commands.

    Raises UsageError for an address that other hosts can reach, unless ``remote``; HostError, StoreError.
    """
    server.check_host(host, remote=remote)
    patience = min(settings.busy_timeout_seconds, _BUSY_SECONDS)
    async with AsyncExitStack() as stack:
        jail = stack.enter_context(Jail())
        opened = await stack.enter_async_context(Store.open(settings.database, busy_timeout_seconds=patience))
        await opened.workflows()  # reports a broken database now instead of to the first sender
        feed = await stack.enter_async_context(Feed.of(opened))
        context = context_of(settings, opened, feed, again_seconds=again_seconds)

        async def secret(name: str, workflow: str) -> str | None:
            return await context.vault.get(name, scope=scope_of(None, None, workflow))

        hooks = Hooks(store=opened, secret=secret, evaluator=jail, strangers=context.strangers)
        app = application(context, hooks=hooks.route(), pages=pages.routes(context), error_page=error_page)
        mine = local(app, process.user())
        await context.metrics.begin()
        on_socket = await stack.enter_async_context(server.serving_locally(mine, settings.api_socket))
        url, on_port = await stack.enter_async_context(server.serving(app, host=host, port=port))
        stack.callback(feed.close)  # before the servers stop: they wait for open requests
        loops = [asyncio.create_task(context.metrics.follow(feed)), asyncio.create_task(context.notices.run(feed))]
        if (to := traces.target()) is not None:
            loops.append(asyncio.create_task(traces.export(opened, feed, to)))
        stack.push_async_callback(cancel_all, loops)
        yield url, asyncio.create_task(_either(feed.watch, on_socket, on_port, *loops))


def context_of(settings: Settings, opened: Store, feed: Feed, *, again_seconds: float = AGAIN_SECONDS) -> Context:
    return Context(
        store=opened,
        feed=feed,
        auth=Auth(opened, public_url=settings.public_url, again_seconds=again_seconds),
        settings=settings,
        vault=wiring.vault(settings, opened),
        uploads=Uploads(
            into=settings.agents,
            data_dir=settings.data_dir,
            images=wiring.image_source(settings, opened),
            layers=wiring.layers(settings, opened),
        ),
        images=wiring.images(settings),
        templates=wiring.templates(settings),
        inventory=wiring.inventory(settings),
        metrics=Metrics(opened),
        notices=sender(settings, opened),
    )


def sender(settings: Settings, opened: Store) -> Sender:
    rules = EgressRules(within=settings.notices_private, never=(settings.subnet,))
    return Sender(store=opened, vault=wiring.vault(settings, opened), rules=rules)


async def _either(*servers: Task[None]) -> None:
    done, _ = await asyncio.wait(servers, return_when=asyncio.FIRST_COMPLETED)
    for one in done:
        one.result()


async def new_secret(settings: Settings, name: str, workflow: str, *, replace: bool) -> str:
    """Make and store the secret that senders to a workflow sign with. Raises Conflict if it exists, unless
    ``replace``."""
    async with wiring.store(settings) as opened:
        vault, scope = wiring.vault(settings, opened), scope_of(None, None, workflow)
        if not replace and any((row.name, row.scope) == (name, scope) for row in await vault.list()):
            raise Conflict(f"the secret {name} of {workflow} exists, and is shown only once; --new makes another")
        value = secrets.token_hex(32)
        await vault.set(name, value, scope=scope, by=process.user())
        return value
