"""The gateway's process: `python -m swarm.gateway.confined DESCRIPTOR`, started by `swarm.gateway.process`.

It parses what guests send and what services answer, so it has no rights: see `_confine`. Sockets, keys, tokens and
prices come over its link to the engine, which does the books. It reads no settings, and keeps nothing.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401
import encodings.idna  # noqa: F401  both are otherwise loaded when first used, which is too late: see _confine
import ipaddress
import os
import resource
import socket
import sys
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Final

import structlog

from swarm.base import privileges
from swarm.errors import LeaseLost, NotFound, StoreError
from swarm.gateway.attempt_listener import AttemptListener
from swarm.gateway.forward import Gateway
from swarm.gateway.link import Link, Message
from swarm.gateway.policy import Policy
from swarm.gateway.prices import Price, Prices
from swarm.gateway.proxy import EgressRules, Proxy
from swarm.gateway.upstreams import Upstream
from swarm.ledger import Account, Bill, Busy, Granted, Limit, Order, Refused, Reservation, Spend

_THREADS: Final = 2048  # look-ups, four for each attempt
_ERRORS: Final = {kind.__name__: kind for kind in (NotFound, LeaseLost, StoreError)}


class Ledger:
    """The engine's, asked over the link. An account's attempt is the listener's number there."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._asked: dict[int, asyncio.Future[Message]] = {}
        self._last = 0

    async def reserve(self, order: Order) -> Reservation:
        answer = await self._ask(
            "reserve",
            n=int(order.account.attempt_id),
            call=order.id,
            upstream=order.upstream,
            model=order.model,
            most=_spend(order.most),
            least=_spend(order.least),
            counts=order.counts,
        )
        if answer["verdict"] == "granted":
            return Granted(usd=answer["usd"], tokens=answer["tokens"], short=answer["short"])
        return (Busy if answer["verdict"] == "busy" else Refused)(message=answer["message"])

    async def book(self, bill: Bill) -> None:
        values = {name: getattr(bill, name) for name in bill.__slots__ if name not in ("id", "account", "upstream")}
        await self._ask("book", n=int(bill.account.attempt_id), call=bill.id, bill=values)

    def answered(self, message: Message) -> None:
        future = self._asked.get(message["id"])
        if future is not None and not future.done():
            future.set_result(message)

    async def _ask(self, op: str, **fields: object) -> Message:
        self._last = number = self._last + 1
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        try:
            self._link.send({"op": op, "id": number, **fields})
            await answer
        finally:
            del self._asked[number]
        found = answer.result()
        if "error" in found:
            raise _ERRORS[found["error"]](found["message"])
        return found


class Served:
    """What the engine has handed over. Whatever goes wrong in here ends the process: the engine starts another."""

    def __init__(self, sock: socket.socket, ended: Callable[[int], None]) -> None:
        self._ended = ended
        self.link = Link(sock, self._received, lambda: ended(0), descriptors=True)
        self._ledger = Ledger(self.link)
        self._prices: dict[str, Price] = {}
        self._rules = EgressRules()
        self._gateway: Gateway | None = None
        self._servers: dict[int, AttemptListener | Proxy] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def _received(self, message: Message, descriptor: int | None) -> None:
        try:
            self._act(message, descriptor)
        except Exception:
            structlog.get_logger().error("the gateway can't do what it is told", exc_info=True)
            self._ended(1)

    def _act(self, message: Message, descriptor: int | None) -> None:
        match message["op"]:
            case "answer":
                self._ledger.answered(message)
            case "prices":
                self._prices |= {name: Price.model_validate(fields) for name, fields in message["models"].items()}
            case "serve":
                within, never = (tuple(map(ipaddress.ip_network, message[name])) for name in ("within", "never"))
                self._rules = EgressRules(within=within, never=never)
                prices = Prices(self._prices, date=message["date"])
                self._gateway = Gateway(prices=prices, ledger=self._ledger, day=Limit())  # the engine knows the day's
                self.link.send({"op": "ready"})
            case "gateway" | "proxy" as kind:
                assert descriptor is not None
                sock = socket.socket(fileno=descriptor)
                self._servers[message["n"]] = (self._listener if kind == "gateway" else self._proxy)(message, sock)
            case "stop":
                self._servers[message["n"]].stop()
            case "close":
                task = asyncio.create_task(self._close(message["n"]))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case other:
                raise AssertionError(other)

    def _listener(self, message: Message, sock: socket.socket) -> AttemptListener:
        assert self._gateway is not None
        n = message["n"]
        services = {name: (Upstream.model_validate(fields), key) for name, (fields, key) in message["services"].items()}
        listener = self._gateway.open_listener(
            _account(n),
            services,
            sock=sock,
            url=message["url"],
            token=message["token"],
            record=self._recorder(n),
        )
        listener.failed_calls = message["failed"]
        listener.exceeded.add_done_callback(lambda reason: self._exceeded(n, reason))
        return listener

    def _proxy(self, message: Message, sock: socket.socket) -> Proxy:
        allow = message["policy"]
        return Proxy(
            policy=Policy(allow=tuple(allow["allow"]), open=allow["open"]),
            rules=self._rules,
            sock=sock,
            address=message["url"],
            token=message["token"],
            record=self._recorder(message["n"]),
        )

    def _recorder(self, n: int) -> Callable[[str, Mapping[str, object]], None]:
        def record(_: str, data: Mapping[str, object]) -> None:
            try:
                self.link.send({"op": "event", "n": n, "data": data})
            except ValueError:
                self.link.send({"op": "event", "n": n, "data": {"via": data["via"], "more": "too long to be recorded"}})

        return record

    def _exceeded(self, n: int, reason: asyncio.Future[str]) -> None:
        if not reason.cancelled():
            self.link.send({"op": "exceeded", "n": n, "message": reason.result()})

    async def _close(self, n: int) -> None:
        try:
            await self._servers.pop(n).close()
            self.link.send({"op": "closed", "n": n})
        except Exception:
            structlog.get_logger().error("a listener could not be closed", exc_info=True)
            self._ended(1)


def _account(n: int) -> Account:
    """Whose calls these are, the engine knows."""
    return Account(
        ticket_id=None, run_id="", step_execution_id="", step_id="", attempt_id=str(n), agent_id="", agent_name=""
    )


def _spend(spend: Spend) -> dict[str, object]:
    return {"tokens": spend.tokens, "usd": spend.usd}


def _confine() -> None:
    """Rights go when everything is loaded: what is below a home may not be readable for the user that this becomes."""
    socket.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)  # loads the resolver's libraries
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    privileges.drop({resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NOFILE: files})
    privileges.die_with_parent()
    if os.geteuid() == privileges.UID:  # nobody else has it, so these are threads of the gateways of this host
        resource.setrlimit(resource.RLIMIT_NPROC, (_THREADS, _THREADS))


def _log_to(link: Link) -> None:
    def told(_: object, method: str, entry: MutableMapping[str, Any]) -> str:
        text = ", ".join(f"{key}={value}"[:4000] for key, value in entry.items() if key != "event")
        link.send({"op": "log", "level": method, "event": str(entry["event"])[:500], "more": text[:4000]})
        raise structlog.DropEvent

    structlog.configure(
        processors=[structlog.processors.format_exc_info, told],
        wrapper_class=structlog.make_filtering_bound_logger(30),
    )


async def _main(sock: socket.socket) -> int:
    loop = asyncio.get_running_loop()
    end: asyncio.Future[int] = loop.create_future()

    def ended(status: int) -> None:
        if not end.done():
            end.set_result(status)

    def unexpected(_: object, context: Mapping[str, Any]) -> None:
        """Of one connection: no reason to break those of others."""
        structlog.get_logger().error(context["message"], exc_info=context.get("exception"))

    served = Served(sock, ended)
    _log_to(served.link)
    loop.set_exception_handler(unexpected)
    try:
        _confine()
    except OSError as error:
        structlog.get_logger().error("can't give up its rights", error=str(error))
        return 1
    return await end


if __name__ == "__main__":
    with asyncio.Runner() as runner:
        status = runner.run(_main(socket.socket(fileno=int(sys.argv[1]))))
        os._exit(status)  # nothing is kept, and calls under way are the engine's to book
