"""The engine's side of the gateway's process: starts it, hands listeners over to it, and does its books.

The process (`swarm.gateway.confined`) reads what hostile guests send, so it isn't trusted: it may book only calls that
it has reserved, for attempts that are open, and a message that makes no sense ends it. It starts when an attempt first
needs it. If it dies, a new one gets the listeners of all attempts, under the same tokens; calls under way break, and
count with all that they may have cost.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, Final

import pydantic

from swarm.base import process
from swarm.base.aio import cancel_all
from swarm.base.log import logger
from swarm.errors import HostError, LeaseLost, NotFound, StoreError, UsageError
from swarm.gateway import messages, policy, upstreams
from swarm.gateway.link import Link, Message, encode
from swarm.gateway.policy import Policy
from swarm.gateway.prices import Prices
from swarm.gateway.upstreams import Upstream
from swarm.ledger import Account, Bill, Busy, Granted, Ledger, Limit, Order, Reservation, Spend

log = logger(__name__)

Record = Callable[[str, Mapping[str, object]], None]  # kind and data of an event of the ticket

_READY_SECONDS: Final = 60.0
# More than the closing of connections and the last bills may take together.
CLOSE_SECONDS: Final = 30.0
_MAX_STILLBORN: Final = 3  # so many in a row are no chance: attempts are told
_DYING_SECONDS: Final = 1.0
_LONG_SECONDS: Final = 60.0  # who lived so long has worked
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 30.0
_BOOK_TRIES, _BOOK_AGAIN_SECONDS = 20, 0.5
# More than an honest process records for one attempt: 200 of its gateway, 1,201 of its proxy.
_MAX_EVENTS: Final = 1500
_MAX_TASKS: Final = 1000  # a VM has 128 connections
_MAX_LOG_LINES: Final = 200
_PRICES_AT_ONCE: Final = 200


class Server:
    """A listener of one attempt, which the gateway's process serves. ``env``: the variables of the attempt's programs.
    ``exceeded`` is done once a budget has stopped the attempt; its result says which budget, with the amounts."""

    def __init__(
        self, gateway: GatewayProcess, sock: socket.socket, account: Account | None, record: Record, token: str
    ) -> None:
        self.token = token or secrets.token_urlsafe(32)
        self.env: dict[str, str] = {}
        self.exceeded: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.sock = sock
        self.account = account
        self.n = 0
        self.order: dict[str, object] = {}  # the message that hands it over
        self.link: Link | None = None  # to whom it was handed over last
        self.failed = 0
        self.calls: dict[str, tuple[Order, float]] = {}  # reserved, not booked; and since when
        self.tasks: set[asyncio.Task[None]] = set()
        self.stopped = False
        self.closed = asyncio.Event()  # the process has, or is dead
        self._gateway = gateway
        self._record = record
        self._events = 0

    def stop(self) -> None:
        """Accept no more connections, and cancel calls under way. Idempotent; doesn't wait."""
        if not self.stopped:
            self.stopped = True
            with contextlib.suppress(OSError):  # in the kernel: also if the process hangs
                self.sock.shutdown(socket.SHUT_RDWR)
            self._gateway.tell("stop", self)

    async def close(self) -> None:
        """Stop, and wait until the calls are booked. Never raises."""
        self.stop()
        await self._gateway.close_server(self)
        self.exceeded.cancel()

    def record(self, data: Mapping[str, object]) -> None:
        self._events += 1
        if self._events <= _MAX_EVENTS:
            self._record("egress", data)


class GatewayProcess:
    """Close all its servers before it. ``day``: what all calls of a day may cost together. ``within``, ``never``: see
    `swarm.gateway.proxy.EgressRules`. ``close_seconds``: how long a listener's close may take; a process that takes
    longer hangs, and is ended."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        prices: Prices,
        day: Limit,
        within: Sequence[IPv4Network | IPv6Network] = (),
        never: Sequence[IPv4Network | IPv6Network] = (),
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        self._close_seconds = close_seconds
        self._ledger = ledger
        self._prices = prices
        self._day = day
        self._networks = {"within": [str(one) for one in within], "never": [str(one) for one in never]}
        self._servers: dict[int, Server] = {}
        self._last = 0
        self._link: Link | None = None
        self._end = asyncio.Event()  # of the present process
        self._ready = False
        self._changed = asyncio.Event()  # set, and replaced, when the process is ready or has ended
        self._failures = 0  # deaths in a row, each soon after the start
        self._stillborn = 0  # deaths in a row, each before the process was ready
        self._why = ""
        self._lines, self._last_line = 0, ""
        self._was_ready = False
        self._supervisor: asyncio.Task[None] | None = None
        self.pid: int | None = None

    def start(self) -> None:
        """Start the process if it is not running; don't wait for it."""
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise())

    async def close(self) -> None:
        if self._supervisor is not None:
            await cancel_all([self._supervisor])

    async def open_listener(
        self,
        account: Account,
        services: Mapping[str, tuple[Upstream, str]],
        *,
        sock: socket.socket,
        url: str,
        record: Record,
        token: str = "",
    ) -> Server:
        """Serve one attempt's calls of these services until the caller closes the server. ``sock`` listens where only
        the attempt's VM can connect, and is closed with the server; ``url`` is its address as the VM sees it.
        ``token``: the one that the programs of a resumed VM know; '' makes a new one. Raises HostError."""
        server = Server(self, sock, account, record, token)
        server.env = upstreams.environment(services, url=url, token=server.token)
        given = {name: (upstream.model_dump(mode="json"), key) for name, (upstream, key) in services.items()}
        return await self._open(server, {"op": "gateway", "url": url, "services": given})

    async def open_proxy(
        self, rules: Policy, *, sock: socket.socket, address: str, record: Record, token: str = ""
    ) -> Server:
        """The proxy of one attempt, likewise. Raises HostError."""
        server = Server(self, sock, None, record, token)
        server.env = policy.proxy_environment(address, server.token)
        given = {"allow": rules.allow, "open": rules.open}
        return await self._open(server, {"op": "proxy", "url": address, "policy": given})

    async def _open(self, server: Server, order: dict[str, object]) -> Server:
        self._last = server.n = self._last + 1
        server.order = {**order, "n": server.n, "token": server.token}
        try:
            encode(server.order)
        except ValueError as problem:
            server.sock.close()
            raise UsageError(f"the agent's network policy is too long for the gateway: {problem}") from None
        self._servers[server.n] = server
        try:
            self.start()
            if self._ready:
                self._hand_over(server)
            async with asyncio.timeout(_READY_SECONDS):
                while not self._ready:
                    if self._stillborn >= _MAX_STILLBORN:
                        raise HostError(f"the gateway's process can't be started: {self._why}")
                    await self._changed.wait()
        except BaseException as problem:
            await server.close()
            if isinstance(problem, TimeoutError):
                raise HostError(f"the gateway's process was not ready within {_READY_SECONDS:g} s") from None
            raise
        return server

    def tell(self, op: str, server: Server) -> None:
        if server.link is not None and server.link is self._link:
            server.link.send({"op": op, "n": server.n})

    async def close_server(self, server: Server) -> None:
        if server.link is not None and server.link is self._link:
            self.tell("close", server)
            try:
                async with asyncio.timeout(self._close_seconds):
                    await server.closed.wait()
            except TimeoutError:
                log.error("the gateway's process hangs, and is ended")
                self._end.set()
                await server.closed.wait()  # soon: the process is killed
        server.closed.set()  # what it says of this one from now on is refused, so this ends
        while server.tasks:  # each is bounded
            await asyncio.wait(set(server.tasks))
        calls, server.calls = server.calls, {}  # the process gave up on them
        await asyncio.gather(*(self._book_broken(order, since) for order, since in calls.values()))
        self._servers.pop(server.n, None)
        server.sock.close()

    # --- the process --------------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        while True:
            began = time.monotonic()
            try:
                self._why = await self._run()
            except (HostError, OSError, ValueError) as problem:  # without descriptors, for example
                self._why = str(problem)
            self._stillborn = 0 if self._was_ready else self._stillborn + 1
            self._failures = 1 if time.monotonic() - began > _LONG_SECONDS else self._failures + 1
            pause = 0.0 if self._failures == 1 else _PAUSE_SECONDS * 2 ** min(self._failures, 20)
            self._change()
            log.error("the gateway's process has ended; a new one takes over", why=self._why)
            await asyncio.sleep(min(pause, _LONGEST_PAUSE_SECONDS))

    async def _run(self) -> str:
        """Run one process to its end; returns why it ended. Raises HostError when it can't be started."""
        self._end, self._lines, self._last_line, self._was_ready = asyncio.Event(), 0, "", False
        child: process.Child | None = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link = link = Link(ours, lambda message, _: self._received(message), self._end.set)
        try:
            with theirs:
                argv = [sys.executable, "-I", "-m", "swarm.gateway.confined", str(theirs.fileno())]
                proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
                output, fds = Path(os.devnull), [theirs.fileno()]
                child = await process.spawn(argv, output=output, pass_fds=fds, env=proxies, cwd=Path("/"), deaf=True)
            self.pid = child.pid
            self._configure(link)
            await self._end.wait()
            with contextlib.suppress(TimeoutError):  # an end of its own has a status
                async with asyncio.timeout(_DYING_SECONDS):
                    await child.wait()
        finally:
            self._link, self._ready = None, False
            link.close()
            if child is not None:
                await process.kill(child)
            self.pid = None
            self._break_calls()
        code = child.returncode or 0
        return process.signal_name(-code) if code < 0 else f"status {code}{self._last_line}"

    def _configure(self, link: Link) -> None:
        models = [(name, price.model_dump(mode="json")) for name, price in self._prices.models.items()]
        for at in range(0, len(models), _PRICES_AT_ONCE):
            link.send({"op": "prices", "models": dict(models[at : at + _PRICES_AT_ONCE])})
        link.send({"op": "serve", "date": self._prices.date, **self._networks})

    def _hand_over(self, server: Server) -> None:
        if self._link is not None:
            self._link.send({**server.order, "failed": server.failed}, server.sock.fileno())
            server.link = self._link  # only now does the process know it

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _break_calls(self) -> None:
        """The process is dead: nobody else will book its calls, or close its listeners."""
        for server in list(self._servers.values()):
            calls, server.calls = server.calls, {}
            for order, since in calls.values():
                self._spawn(server, self._book_broken(order, since))
            if server.stopped:
                server.closed.set()

    async def _book_broken(self, order: Order, since: float, *, sent: bool = True) -> None:
        """As the rule for broken calls is: what may have been sent counts with all that it may have cost."""
        note = "the gateway's process gave no bill for the call: counted with all that it may have cost"
        bill = Bill(
            id=order.id,
            account=order.account,
            upstream=order.upstream,
            model=order.model,
            status=0,
            counts=order.counts if sent else {},
            cost_usd=order.most.usd if sent else 0.0,
            latency_ms=(time.monotonic() - since) * 1000,
            estimated=sent,
            note=note if sent else "not sent: the gateway's process had died, or its listener was closed",
        )
        for number in range(1, _BOOK_TRIES + 1):
            try:
                await self._ledger.book(bill)
                return
            except StoreError as problem:
                if number == _BOOK_TRIES:  # the reservation stays and counts in full
                    log.error("a model call could not be booked", call=bill.id, error=str(problem))
                    return
                await asyncio.sleep(_BOOK_AGAIN_SECONDS)

    # --- what it says -------------------------------------------------------------------------------------------------

    def _received(self, message: Message) -> None:
        try:
            said = messages.ADAPTER.validate_python(message)
        except (pydantic.ValidationError, RecursionError) as error:
            log.error("the gateway's process said what makes no sense, and is ended", error=str(error)[:500])
            self._end.set()
            if self._link is not None:
                self._link.close()
            return
        if isinstance(said, messages.Log):
            self._lines, self._last_line = self._lines + 1, f": {said.event}: {said.more}"[:500]
            if self._lines <= _MAX_LOG_LINES:
                log.warning(said.event, of="the gateway's process", more=said.more)
            return
        if isinstance(said, messages.Ready):
            self._ready = self._was_ready = True
            self._change()
            try:
                for waiting in self._servers.values():
                    if not waiting.stopped:
                        self._hand_over(waiting)
            except OSError as error:  # no descriptor left: the next process is handed them after a pause
                log.error("the gateway's process can't be handed its listeners, and is ended", error=str(error))
                self._end.set()
            return
        server, link = self._servers.get(said.n), self._link
        if link is None:
            return
        if server is None or server.closed.is_set():
            if isinstance(said, messages.Reserve | messages.Book):
                link.send({"op": "answer", "id": said.id, "error": "NotFound", "message": "its listener is closed"})
            return
        match said:
            case messages.Reserve() if len(server.tasks) + len(server.calls) > _MAX_TASKS:
                why = "too many calls of this attempt at once"
                link.send({"op": "answer", "id": said.id, "error": "StoreError", "message": why})
            case messages.Reserve():
                self._spawn(server, self._reserve(link, server, said))
            case messages.Book():
                self._spawn(server, self._book(link, server, said))
            case messages.Event():
                server.record(said.data)
            case messages.Exceeded():
                if not server.exceeded.done():
                    server.exceeded.set_result(said.message)
            case messages.Closed():
                server.closed.set()

    async def _reserve(self, link: Link, server: Server, said: messages.Reserve) -> None:
        since = time.monotonic()
        account = server.account
        if account is None or said.call in server.calls:
            link.send({"op": "answer", "id": said.id, "error": "NotFound", "message": "not a listener of the gateway"})
            return
        most, least = (Spend(tokens=one.tokens, usd=one.usd) for one in (said.most, said.least))
        order = Order(
            id=said.call,
            account=account,
            upstream=said.upstream,
            model=said.model,
            most=most,
            least=least,
            day=self._day,
            counts=said.counts,  # type: ignore[arg-type]
        )
        answer: dict[str, object] = {"op": "answer", "id": said.id}
        try:
            reservation = await self._ledger.reserve(order)
        except (NotFound, LeaseLost, StoreError) as problem:
            kind = next(kind for kind in (NotFound, LeaseLost, StoreError) if isinstance(problem, kind))
            link.send(answer | {"error": kind.__name__, "message": str(problem)[:4000]})
            return
        if isinstance(reservation, Granted):
            if link.closed or server.closed.is_set():
                await self._book_broken(order, since, sent=False)
                link.send(answer | {"error": "NotFound", "message": "its listener is closed"})
                return
            server.calls[order.id] = order, since
        link.send(answer | _verdict(reservation))

    async def _book(self, link: Link, server: Server, said: messages.Book) -> None:
        answer: dict[str, object] = {"op": "answer", "id": said.id}
        if (call := server.calls.pop(said.call, None)) is not None:
            order, since = call
            bill = Bill(id=order.id, account=order.account, upstream=order.upstream, **said.bill.model_dump())
            try:
                await self._ledger.book(bill)
                server.failed += bill.failed
            except StoreError as problem:
                if link.closed:  # nobody will say it again
                    await self._book_broken(order, since)
                    return
                server.calls[order.id] = call
                answer |= {"error": "StoreError", "message": str(problem)[:4000]}
        link.send(answer)

    def _spawn(self, server: Server, work: Any) -> None:
        task = asyncio.create_task(work)
        server.tasks.add(task)
        task.add_done_callback(server.tasks.discard)


def _verdict(reservation: Reservation) -> dict[str, object]:
    if isinstance(reservation, Granted):
        left = {"usd": reservation.usd, "tokens": reservation.tokens, "short": reservation.short[:4000]}
        return {"verdict": "granted", **left}
    kind = "busy" if isinstance(reservation, Busy) else "refused"
    return {"verdict": kind, "message": reservation.message[:4000]}
