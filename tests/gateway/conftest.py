"""The gateway in front of a local server of the Messages API, with a real database and without VMs."""

from __future__ import annotations

import asyncio
import secrets
import socket
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import pytest

from swarm.engine.egress import account_of
from swarm.gateway import prices, upstreams
from swarm.gateway.attempt_listener import AttemptListener
from swarm.gateway.forward import Gateway
from swarm.gateway.policy import Policy
from swarm.gateway.process import GatewayProcess, Server
from swarm.gateway.upstreams import Services, Upstream, UpstreamKeys
from swarm.ledger import Bill, Ledger, Limit, Order, Reservation
from swarm.model import Agent, Claim, Ticket
from swarm.store.store import Store
from tests.engine.conftest import plain as plain  # the fixture: agents as plain processes
from tests.gateway.messages_api import MessagesApi

KEY = "sk-ant-the-real-key-0123456789"


@pytest.fixture
async def api() -> AsyncIterator[MessagesApi]:
    async with MessagesApi(key=KEY).serving() as serving:
        yield serving


class WatchedLedger:
    """The store as the gateway's ledger. ``reserved`` is awaited after each reservation, before its caller has it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.reserved: Callable[[Order], Awaitable[None]] | None = None

    async def reserve(self, order: Order) -> Reservation:
        reservation = await self._store.reserve(order)
        if self.reserved is not None:
            await self.reserved(order)
        return reservation

    async def book(self, bill: Bill) -> None:
        await self._store.book(bill)


@dataclass
class Harness:
    """A gateway, in its process, with its database. ``here``: another one, in this process, for tests that look into
    it. ``events``: recorded by their listeners."""

    store: Store
    ledger: WatchedLedger
    database: Path
    api: MessagesApi
    services: Services
    gateway: GatewayProcess
    here: Gateway
    dir: Path
    events: list[tuple[str, Mapping[str, object]]] = field(default_factory=list)

    async def claim(self, ticket_id: str = "t", *, agent: Mapping[str, Any] | None = None, **ticket: Any) -> Claim:
        """A ticket, claimed, so that a call of it has somewhere to be booked."""
        place = self.dir / "agent"
        place.mkdir(exist_ok=True)
        values = {"id": "a", "name": "a", "version": "1.0.0", "path": place, "entry": ("main.py",), **(agent or {})}
        made = await self.store.put_agent(Agent(**values))
        await self.store.add_ticket(Ticket(id=ticket_id, title="t", state="ready", agent_id=made.id, **ticket))
        [claim] = await self.store.claim("worker", lease_seconds=600, ticket_id=ticket_id)
        return claim

    async def _services(self, policy: Policy | None, fields: Mapping[str, Any]) -> dict[str, tuple[Upstream, str]]:
        found = await self.services.of(policy or Policy(upstreams=("anthropic",)))
        return {name: (upstream.model_copy(update=fields), key) for name, (upstream, key) in found.items()}

    @asynccontextmanager
    async def listener(
        self, claim: Claim, policy: Policy | None = None, **upstream_fields: Any
    ) -> AsyncIterator[Server]:
        """``upstream_fields`` replace those of its services."""
        services, (sock, url) = await self._services(policy, upstream_fields), loopback()
        listener = await self.gateway.open_listener(
            account_of(claim), services, sock=sock, url=url, record=lambda *event: self.events.append(event)
        )
        try:
            yield listener
        finally:
            await listener.close()

    @asynccontextmanager
    async def listener_here(self, claim: Claim, **upstream_fields: Any) -> AsyncIterator[AttemptListener]:
        services, (sock, url) = await self._services(None, upstream_fields), loopback()
        listener = self.here.open_listener(
            account_of(claim),
            services,
            sock=sock,
            url=url,
            token=secrets.token_urlsafe(32),
            record=lambda *event: self.events.append(event),
        )
        try:
            yield listener
        finally:
            await listener.close()

    def seen(self) -> list[dict[str, Any]]:
        """The calls that the service had, without those that only count tokens."""
        return [one for one in self.api.seen if "count_tokens" not in one["path"]]

    def sql(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(self.database, timeout=60)
        with connection:
            rows = connection.execute(statement, values).fetchall()
        connection.close()
        return rows

    async def booked(self, count: int, *, seconds: float = 60) -> list[tuple[Any, ...]]:
        """Waits for this many booked calls: status, tokens, cost, note, oldest first. (Bills come after answers.)"""
        async with asyncio.timeout(seconds):
            while True:
                rows = self.sql(
                    "SELECT status, tokens, cost_usd, note FROM model_calls WHERE status IS NOT NULL ORDER BY at"
                )
                if len(rows) >= count:
                    return rows
                await asyncio.sleep(0.01)


@asynccontextmanager
async def open_harness(
    api: MessagesApi,
    dir: Path,
    *,
    day: Limit | None = None,
    keys: bool = True,
) -> AsyncIterator[Harness]:
    environment = {"ANTHROPIC_BASE_URL": api.url, "OPENAI_BASE_URL_HOST": api.url}
    if keys:
        environment |= {"ANTHROPIC_API_KEY": KEY, "OPENAI_API_KEY": KEY}
    database = dir / "swarm.db"
    async with Store.open(f"sqlite:///{database}") as store:
        await store.migrate()
        ledger = WatchedLedger(store)
        table = upstreams.load(None, environment)
        services = Services(upstreams=table, keys=UpstreamKeys(environment=environment))
        async with open_gateways(ledger, day or Limit()) as (gateway, here):
            yield Harness(
                store=store,
                ledger=ledger,
                database=database,
                api=api,
                services=services,
                gateway=gateway,
                here=here,
                dir=dir,
            )


@asynccontextmanager
async def open_gateways(ledger: Ledger, day: Limit) -> AsyncIterator[tuple[GatewayProcess, Gateway]]:
    gateway = GatewayProcess(ledger=ledger, prices=prices.load(None), day=day)
    here = Gateway(prices=prices.load(None), ledger=ledger, day=day)
    try:
        yield gateway, here
    finally:
        await here.close()
        await gateway.close()


def loopback() -> tuple[socket.socket, str]:
    sock = socket.create_server(("127.0.0.1", 0))
    return sock, f"http://127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture
async def harness(api: MessagesApi, tmp_path: Path) -> AsyncIterator[Harness]:
    async with open_harness(api, tmp_path) as made:
        yield made


@asynccontextmanager
async def client_of(
    listener: AttemptListener | Server, *, retries: int = 0, **options: Any
) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """The official SDK, with the environment that the VM would have."""
    env = listener.env
    async with anthropic.AsyncAnthropic(
        base_url=env["ANTHROPIC_BASE_URL"], api_key=env["ANTHROPIC_API_KEY"], max_retries=retries, **options
    ) as client:
        yield client


def ask(text: str = "Write a haiku", *, model: str = "claude-haiku-4-5", max_tokens: int = 200) -> dict[str, Any]:
    return {"model": model, "max_tokens": max_tokens, "messages": [{"role": "user", "content": text}]}
