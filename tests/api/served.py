"""A server of a test's own, over a real database, and clients of each role."""

from __future__ import annotations

import contextlib
import sqlite3
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from swarm import config
from swarm.api.auth import AGAIN_SECONDS
from swarm.app import serve, wiring
from swarm.base.unix_socket import short_path
from swarm.config import Settings
from swarm.model import ECHO_AGENT_ID, Agent, Role, Ticket
from swarm.store.registry.tokens import Actor, new_token
from swarm.store.store import Store
from tests.api import described

SSL: Final = ssl.create_default_context()  # one for all clients, which have no use for it
ECHO = Agent(id=ECHO_AGENT_ID, name="echo", version="1.0.0", path=Path("/nowhere"), entry=("main.py",))

CHECKED: Final[Mapping[str, list[Any]]] = {"response": [described.check]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """``clients``: one for each role, with its token, and 'nobody' without one."""

    settings: Settings
    store: Store
    url: str
    tokens: Mapping[str, str]
    clients: Mapping[str, httpx.AsyncClient]

    @property
    def viewer(self) -> httpx.AsyncClient:
        return self.clients["viewer"]

    @property
    def operator(self) -> httpx.AsyncClient:
        return self.clients["operator"]

    @property
    def admin(self) -> httpx.AsyncClient:
        return self.clients["admin"]

    @property
    def nobody(self) -> httpx.AsyncClient:
        return self.clients["nobody"]

    async def add(self, id: str, **fields: Any) -> Ticket:
        values = {"title": id, "state": "ready", "agent_id": ECHO.id, "execution_mode": "agent", **fields}
        return await self.store.add_ticket(Ticket(id=id, **values))


_database: list[bytes] = []  # see `made`
_TOKENS: Final = {str(role): new_token() for role in Role}


async def made(settings: Settings) -> Mapping[str, str]:
    """A database with the echo agent and a token for each role. It is migrated once, then copied: that takes a
    hundredth of the time."""
    file = settings.data_dir / "swarm.db"
    if _database:
        file.write_bytes(_database[0])
        return _TOKENS
    async with wiring.store(settings) as store:
        await store.migrate()
        await store.put_agent(ECHO)
        for role, token in _TOKENS.items():
            await store.add_token(token, Actor(name=f"the-{role}", role=Role(role)), by="test")
    with contextlib.closing(sqlite3.connect(file, timeout=60)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    _database.append(file.read_bytes())
    return _TOKENS


@asynccontextmanager
async def serving(home: Path, *, again_seconds: float = AGAIN_SECONDS) -> AsyncIterator[Served]:
    settings = config.load(home=home)
    settings.data_dir.mkdir(parents=True)
    tokens = await made(settings)
    async with (
        wiring.store(settings) as store,
        serve.served(settings, host="127.0.0.1", port=0, remote=False, again_seconds=again_seconds) as (url, _),
    ):
        options: dict[str, Any] = {"base_url": url, "timeout": 60, "event_hooks": CHECKED, "verify": SSL}
        clients = {
            role: httpx.AsyncClient(headers={"authorization": f"Bearer {token}"}, **options)
            for role, token in tokens.items()
        }
        clients["nobody"] = httpx.AsyncClient(**options)
        try:
            yield Served(settings=settings, store=store, url=url, tokens=tokens, clients=clients)
        finally:
            for client in clients.values():
                await client.aclose()


@asynccontextmanager
async def on_the_socket(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    with short_path(settings.api_socket) as path:
        transport = httpx.AsyncHTTPTransport(uds=path)
        async with httpx.AsyncClient(transport=transport, base_url="http://swarm", timeout=60) as client:
            yield client
