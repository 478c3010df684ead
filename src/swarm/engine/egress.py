"""What one attempt may reach and know beyond its VM: the gateway's services, allowed domains, its agent's secrets.

Missing services and secrets are reported before a VM is started. Listeners stop the moment the attempt ends; the last
bills are written when its VM is gone. The gateway is a process of its own, started when the first attempt needs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Protocol

from swarm.base.aio import finish_uninterrupted
from swarm.base.redact import Redactor
from swarm.errors import HostError, NotConfigured, NotFound, UsageError
from swarm.gateway import policy
from swarm.gateway.policy import Policy
from swarm.ledger import Account, Limit
from swarm.model import Agent, Claim
from swarm.vm.driver import GATEWAY_PORT, PROXY_PORT

if TYPE_CHECKING:
    from swarm.gateway.process import GatewayProcess, Server
    from swarm.gateway.upstreams import Services, Upstream

Record = Callable[[str, Mapping[str, object]], None]  # kind and data of an event of the ticket
# From a port in the VM's namespace to a socket that listens there, and its address as the VM sees it.
Listen = Callable[[int], Awaitable[tuple[socket.socket, str]]]


class Secrets(Protocol):
    """Where agents' secrets are kept: `swarm.admin.vault`."""

    async def of(self, names: Sequence[str], agent: Agent, workflow_id: str | None) -> Mapping[str, str]:
        """Raises NotFound with the name of the first missing secret, and how to set it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What an attempt is allowed to reach and to know. ``former``: secrets that it is not given, but which may be in
    its memory, since it starts from a snapshot: they are replaced as the others."""

    account: Account
    policy: Policy
    services: Mapping[str, tuple[Upstream, str]] = field(repr=False)
    secrets: Mapping[str, str] = field(repr=False)
    former: Mapping[str, str] = field(repr=False, default_factory=dict)


class AttemptEgress:
    """One attempt's gateway listener and proxy. ``env``: the variables its programs need for them, and its secrets."""

    def __init__(self, grant: Grant, gateway: Callable[[], GatewayProcess], record: Record) -> None:
        self._grant = grant
        self._gateway = gateway
        self._record_unredacted = record
        self._listener: Server | None = None
        self._proxy: Server | None = None
        self.env: dict[str, str] = dict(grant.secrets)
        self.redacted = {**grant.former, **grant.secrets}  # name → what is replaced by it
        self.redactor = Redactor(self.redacted)

    def _record(self, kind: str, data: Mapping[str, object]) -> None:
        """A refusal quotes the request, which may contain a secret."""
        self._record_unredacted(kind, self.redactor.value(dict(data)))

    async def open(self, listen: Listen, *, tokens: Mapping[str, str] = MappingProxyType({})) -> None:
        """``listen`` opens sockets in the namespace of the attempt's VM. ``tokens``: of an earlier `AttemptEgress` of
        the same VM, whose programs still use them. Raises HostError, UsageError."""
        if self._grant.services:
            sock, address = await listen(GATEWAY_PORT)
            self._listener = await self._gateway().open_listener(
                self._grant.account,
                self._grant.services,
                sock=sock,
                url=f"http://{address}",
                record=self._record,
                token=tokens.get("gateway", ""),
            )
            self.env |= self._listener.env
        if self._grant.policy.proxied:
            sock, address = await listen(PROXY_PORT)
            self._proxy = await self._gateway().open_proxy(
                self._grant.policy, sock=sock, address=address, record=self._record, token=tokens.get("proxy", "")
            )
            self.env |= self._proxy.env
        self.redacted |= {f"the {name}'s token": it for name, it in self.tokens.items()}
        self.redactor = Redactor(self.redacted)

    @property
    def tokens(self) -> dict[str, str]:
        """What the programs of the VM show to the gateway and the proxy."""
        servers = {"gateway": self._listener, "proxy": self._proxy}
        return {name: server.token if server else "" for name, server in servers.items()}

    async def exceeded(self) -> str:
        """Returns once a budget has stopped the attempt, with the amounts; otherwise never."""
        if self._listener is None:
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]
        return await asyncio.shield(self._listener.exceeded)

    @property
    def over_budget(self) -> str | None:
        if self._listener is None or not self._listener.exceeded.done() or self._listener.exceeded.cancelled():
            return None
        return self._listener.exceeded.result()

    def stop(self) -> None:
        for server in (self._listener, self._proxy):
            if server is not None:
                server.stop()

    async def close(self) -> None:
        self.stop()
        await asyncio.gather(*(server.close() for server in (self._listener, self._proxy) if server is not None))


class Egress:
    """``services`` and ``gateway`` make what their types say, once at most; ``async with`` closes it. ``one_off``:
    attempts here have no ticket."""

    def __init__(
        self,
        *,
        services: Callable[[], Services],
        gateway: Callable[[], GatewayProcess],
        secrets: Secrets | None = None,
        one_off: bool = False,
    ) -> None:
        self._make_services = services
        self._make_gateway = gateway
        self._services: Services | None = None
        self._made: GatewayProcess | None = None
        self._secrets = secrets
        self._one_off = one_off

    async def __aenter__(self) -> Egress:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._made is not None:
            await self._made.close()

    def _gateway(self) -> GatewayProcess:
        if self._made is None:
            self._made = self._make_gateway()
        return self._made

    async def grant(self, claim: Claim) -> Grant:
        """Raises NotConfigured: one sentence on what is missing on this host, or wrong with the agent."""
        account = account_of(claim, one_off=self._one_off)
        return await self.granted(claim.agent, account, workflow_id=claim.ticket.workflow_id)

    async def granted(
        self, agent: Agent, account: Account, *, workflow_id: str | None = None, to: str | None = None
    ) -> Grant:
        """What the rows of this agent say, for this account. ``to`` names who asks, if it is not the agent. Raises
        NotConfigured."""
        try:
            allowed = policy.parse(agent.network)
            services: Mapping[str, tuple[Upstream, str]] = {}
            if allowed.upstreams:
                self._services = self._services or self._make_services()
                services = await self._services.of(allowed)
            if allowed.upstreams or allowed.proxied:
                self._gateway().start()  # while the VM starts
            secrets: Mapping[str, str] = {}
            if agent.secrets:
                if self._secrets is None:
                    first = agent.secrets[0]
                    how = f"`swarm init` makes one, `swarm secret set {first}` then sets it"
                    raise NotFound(f"there is no database here that could have the secret {first!r}: {how}")
                secrets = await self._secrets.of(agent.secrets, agent, workflow_id)
        except (UsageError, NotFound, HostError) as error:
            raise NotConfigured(f"{to or f'the agent {agent.name!r}'} can't run here: {error}") from None
        return Grant(account=account, policy=allowed, services=services, secrets=secrets)

    async def former(self, names: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Values of secrets that somebody else was given, by name, as far as they are still set. ``names``: with the
        agents (or '') for which they were looked up."""
        found = dict[str, str]()
        if self._secrets is None:
            return found
        for name, agent in names:
            to = Agent(id="", name=agent, version="", path=Path(), entry=(), runtime="exec")
            with contextlib.suppress(UsageError, NotFound, HostError):
                value = (await self._secrets.of([name], to, None))[name]
                found[name if found.get(name, value) == value else f"{name} of {agent}"] = value
        return found

    @asynccontextmanager
    async def attempt(self, grant: Grant, record: Record) -> AsyncIterator[AttemptEgress]:
        """To be opened within the block. Leave the block when the VM is gone: that waits for the last bills."""
        egress = AttemptEgress(grant, self._gateway, record)
        try:
            yield egress
        finally:
            await finish_uninterrupted(egress.close())  # it bounds its time; half-way, a listener would stay for ever


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
