"""What one attempt may reach and know beyond its VM: the gateway's services, allowed domains, its agent's secrets.

What is missing is found out before a VM is started for it. What is opened is shut the moment the attempt ends, and
accounted for when its VM is gone. The gateway is made, and its libraries are loaded, when the first attempt needs it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from swarm.base.redact import Redactor
from swarm.errors import HostError, NotConfigured, NotFound, UsageError
from swarm.gateway import policy
from swarm.gateway.policy import Policy
from swarm.ledger import Account, Limit
from swarm.model import Agent, Claim
from swarm.vm.driver import GATEWAY_PORT, PROXY_PORT

if TYPE_CHECKING:
    from swarm.gateway.attempt_listener import AttemptListener
    from swarm.gateway.forward import Gateway
    from swarm.gateway.proxy import EgressRules, Proxy
    from swarm.gateway.upstreams import Upstream

Record = Callable[[str, Mapping[str, object]], None]  # kind and data of an event of the ticket
# A port, as the machine knows it, to a socket that listens there and its address as the machine sees it.
Listen = Callable[[int], Awaitable[tuple[socket.socket, str]]]


class Secrets(Protocol):
    """Where agents' secrets are kept: `swarm.admin.vault`."""

    async def of(self, names: Sequence[str], agent: Agent, workflow_id: str | None) -> Mapping[str, str]:
        """Raises NotFound that names the first that this agent has not, and how to set it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What an attempt was found to be allowed."""

    account: Account
    policy: Policy
    services: Mapping[str, tuple[Upstream, str]] = field(repr=False)
    secrets: Mapping[str, str] = field(repr=False)


class AttemptEgress:
    """An attempt's open ways. ``env``: what its programs must know of them, its secrets included."""

    def __init__(
        self, permit: Grant, gateway: Callable[[], Gateway], borders: Callable[[], EgressRules], record: Record
    ) -> None:
        self._permit = permit
        self._gateway = gateway
        self._borders = borders
        self._record_as_it_is = record
        self._door: AttemptListener | None = None
        self._proxy: Proxy | None = None
        self.env: dict[str, str] = dict(permit.secrets)
        self.redactor = Redactor(permit.secrets)

    def _record(self, kind: str, data: Mapping[str, object]) -> None:
        """A refusal names what was asked for, which may be a secret."""
        self._record_as_it_is(kind, self.redactor.value(dict(data)))

    async def open(self, listen: Listen) -> None:
        """``listen`` as of the attempt's machine. Raises HostError."""
        if self._permit.services:
            listener, address = await listen(GATEWAY_PORT)
            self._door = self._gateway().door(
                self._permit.account,
                self._permit.services,
                listener=listener,
                url=f"http://{address}",
                record=self._record,
            )
            self.env |= self._door.env
        if self._permit.policy.proxied:
            from swarm.gateway.proxy import Proxy

            listener, address = await listen(PROXY_PORT)
            self._proxy = Proxy(
                policy=self._permit.policy,
                borders=self._borders(),
                listener=listener,
                address=address,
                record=self._record,
            )
            self.env |= self._proxy.env
        tokens = {"the gateway's token": self._door.token if self._door else ""}
        tokens |= {"the proxy's token": self._proxy.token if self._proxy else ""}
        self.redactor = Redactor({**self._permit.secrets, **tokens})

    async def exceeded(self) -> str:
        """Returns when a budget has ended the attempt's work, with the sums; never, otherwise."""
        if self._door is None:
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]
        return await asyncio.shield(self._door.exceeded)

    @property
    def over_budget(self) -> str | None:
        done = self._door is not None and self._door.exceeded.done() and not self._door.exceeded.cancelled()
        return self._door.exceeded.result() if self._door is not None and done else None

    def shut(self) -> None:
        for way in (self._door, self._proxy):
            if way is not None:
                way.shut()

    async def close(self) -> None:
        for way in (self._door, self._proxy):
            if way is not None:
                await way.close()


class Egress:
    """``gateway`` makes one; it is asked once at most. ``async with`` closes it. ``borders``: where proxies stop.
    ``one_off``: attempts here are of no ticket."""

    def __init__(
        self,
        *,
        gateway: Callable[[], Gateway],
        borders: Callable[[], EgressRules],
        secrets: Secrets | None = None,
        one_off: bool = False,
    ) -> None:
        self._make = gateway
        self._borders = borders
        self._made: Gateway | None = None
        self._secrets = secrets
        self._one_off = one_off

    async def __aenter__(self) -> Egress:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._made is not None:
            await self._made.close()

    def _gateway(self) -> Gateway:
        if self._made is None:
            self._made = self._make()
        return self._made

    async def permit(self, claim: Claim) -> Grant:
        """Raises NotConfigured: one sentence on what is missing on this host, or wrong with the agent."""
        agent = claim.agent
        try:
            allowed = policy.parse(agent.network)
            services = await self._gateway().services(allowed) if allowed.upstreams else {}
            secrets: Mapping[str, str] = {}
            if agent.secrets:
                if self._secrets is None:
                    raise NotFound("secrets are not given to agents here")
                secrets = await self._secrets.of(agent.secrets, agent, claim.ticket.workflow_id)
        except (UsageError, NotFound, HostError) as error:
            raise NotConfigured(f"the agent {agent.name!r} can't run here: {error}") from None
        account = account_of(claim, one_off=self._one_off)
        return Grant(account=account, policy=allowed, services=services, secrets=secrets)

    @asynccontextmanager
    async def reach(self, permit: Grant, record: Record) -> AsyncIterator[AttemptEgress]:
        """Ways that can be opened within the block. Leave it when the machine is gone: it waits for the last bills."""
        reach = AttemptEgress(permit, self._gateway, self._borders, record)
        try:
            yield reach
        finally:
            await reach.close()


def account_of(claim: Claim, *, one_off: bool = False) -> Account:
    return Account(
        ticket_id=None if one_off else claim.ticket.id,
        run_id=claim.run_id,
        step_execution_id=claim.step_execution_id,
        step_id=claim.step_id,
        attempt_id=claim.attempt_id,
        agent_id=claim.agent.id,
        agent_name=claim.agent.name,
        agent_budget=Limit(usd=claim.agent.budget_usd, tokens=claim.agent.budget_tokens),
    )
