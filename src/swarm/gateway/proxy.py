"""The way to other hosts, for agents whose policy has one: an HTTP proxy that knows where one may go.

The guest has no route out and no resolver. It names a host; the name is checked, resolved here, and the connection goes
to an address that was checked, so a name that resolves to another address the next time (DNS rebinding) gains nothing.
Never reached, whatever the policy: this host, other VMs, private and other special networks. Every connection is an
event of the ticket.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import ipaddress
import secrets
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

import h11
import psutil

from swarm.gateway.attempt_listener import Record
from swarm.gateway.connection_acceptor import ConnectionAcceptor
from swarm.gateway.policy import Policy

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]

_MAX_CONNECTIONS: Final = 128
_MAX_HEAD_BYTES: Final = 32 * 1024
_HEAD_SECONDS: Final = 30.0
_CONNECT_SECONDS: Final = 10.0
_IDLE_SECONDS: Final = 600.0
_LINGER_SECONDS: Final = 10.0  # in which a peer must have taken the last of it
_CLOSE_SECONDS: Final = 2.0
# Of one attempt; of further ones there is a sum for each of so many hosts.
MAX_EVENTS: Final[Mapping[str, int]] = {"made": 1000, "refused": 200}
_MAX_HOSTS: Final = 200
_SUMMED: Final = ("made", "refused", "sent_bytes", "received_bytes")
_CHUNK_BYTES: Final = 64 * 1024
_USER: Final = "swarm"
# All that IANA has given out for the public, and of this what leads to addresses that may not be: Teredo, 6to4.
_PUBLIC_V6: Final = ipaddress.IPv6Network("2000::/3")
_DISGUISES: Final = tuple(map(ipaddress.ip_network, ("2001::/32", "2002::/16")))


class Refused(Exception):
    """Not allowed, or not possible; the message is for the guest and the ticket."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressRules:
    """Which addresses may be connected to. ``within``: networks that may be although they are private (a registry of
    one's own); ``never``: Swarm's own."""

    within: tuple[Network, ...] = ()
    never: tuple[Network, ...] = ()
    resolve: Resolve = field(default_factory=lambda: resolved)

    def why_not(self, address: Address) -> str:
        """'' when it may be."""
        plain = getattr(address, "ipv4_mapped", None) or address
        if any(plain in network for network in self.never):
            return "an address of Swarm's own"
        ours = plain in _of_this_host()
        if any(plain in network for network in self.within):
            return "an address of this host" if ours and not plain.is_loopback else ""
        foreign = plain.version == 6 and plain not in _PUBLIC_V6
        if foreign or not plain.is_global or plain.is_multicast or any(plain in network for network in _DISGUISES):
            return "a private or special address"
        return "an address of this host" if ours else ""


class Proxy:
    """One attempt's; made and closed by `swarm.engine.egress`."""

    def __init__(
        self, *, policy: Policy, borders: EgressRules, listener: socket.socket, address: str, record: Record
    ) -> None:
        self._policy = policy
        self._borders = borders
        self._record = record
        self._noted: Counter[str] = Counter()
        self._further: dict[str, Counter[str]] = {}
        self._address = address
        self.token = secrets.token_urlsafe(32)
        self._credentials = base64.b64encode(f"{_USER}:{self.token}".encode())
        self._reception = ConnectionAcceptor(listener, most=_MAX_CONNECTIONS, welcome=self._welcome)

    @property
    def env(self) -> dict[str, str]:
        """What HTTP clients look at. The gateway's services are not behind the proxy."""
        url = f"http://{_USER}:{self.token}@{self._address}"
        direct = f"localhost,127.0.0.1,{self._address.partition(':')[0]}"
        names = {"http_proxy": url, "https_proxy": url, "no_proxy": direct}
        return names | {name.upper(): value for name, value in names.items()}

    def shut(self) -> None:
        self._reception.shut()

    async def close(self) -> None:
        await self._reception.close(seconds=_CLOSE_SECONDS)
        further, self._further = self._further, {}
        if further:
            sums = {host: {kind: counts[kind] for kind in _SUMMED} for host, counts in further.items()}
            self._record("egress", {"via": "proxy", "further": sums})

    async def _welcome(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection, limit=_MAX_HEAD_BYTES)
        try:
            await self._serve(reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the guest hung up, or never came to the point
        except BaseException:
            writer.transport.abort()
            raise
        await _closed(writer)
        self._reception.left()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(_HEAD_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
        began = time.monotonic()
        seen: dict[str, object] = {"via": "proxy"}
        try:
            request = self._request(head)
            host, port, forwarded = _target(request)
            seen |= {"method": request.method.decode()[:16], "host": host[:255], "port": port}
            if not self._policy.allows(host):
                raise Refused(403, f"the agent's network policy does not allow {host}")
            address = await self._address_of(host, port)
            seen["address"] = str(address)
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    there, back = await asyncio.open_connection(str(address), port)
            except (OSError, TimeoutError) as error:
                raise Refused(502, f"{host} can't be reached: {type(error).__name__}") from None
        except Refused as refused:
            self._note({**seen, "refused": str(refused)})
            writer.write(_refusal(refused))
            await writer.drain()
            return
        carried = [0, 0]
        try:
            if forwarded:
                back.write(forwarded)
            else:
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await _relay(carried, (reader, back), (there, writer))
            await _closed(back)
        finally:
            back.transport.abort()
            took = round((time.monotonic() - began) * 1000, 1)
            sent, received = carried  # of one that goes on until its attempt ends, too
            self._note({**seen, "sent_bytes": sent + len(forwarded), "received_bytes": received, "ms": took})

    def _request(self, head: bytes) -> h11.Request:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD_BYTES)
        try:
            connection.receive_data(head)
            request = connection.next_event()
        except h11.RemoteProtocolError as error:
            raise Refused(400, f"no HTTP request: {error}") from None
        if not isinstance(request, h11.Request):
            raise Refused(400, "no HTTP request")
        given = dict(request.headers).get(b"proxy-authorization", b"")
        scheme, _, credentials = given.partition(b" ")
        if scheme.lower() != b"basic" or not hmac.compare_digest(credentials.strip(), self._credentials):
            raise Refused(407, "the proxy wants the credentials that are in HTTP_PROXY")
        return request

    async def _address_of(self, host: str, port: int) -> Address:
        """The first of a host's addresses that may be connected to. Raises Refused."""
        try:
            addresses: Sequence[Address] = [ipaddress.ip_address(host)]
        except ValueError:
            try:
                addresses = await self._borders.resolve(host, port)
            except OSError as error:
                raise Refused(502, f"{host} can't be resolved: {error.strerror or error}") from None
            except UnicodeError:  # a part of it is empty, or too long
                raise Refused(502, f"{host[:255]} can't be resolved: it is no name") from None
        reasons = [self._borders.why_not(address) for address in addresses]
        for address, reason in zip(addresses, reasons, strict=True):
            if not reason:
                return address
        raise Refused(403, f"{host} is {reasons[0]}, which no policy allows" if reasons else f"{host} has no address")

    def _note(self, data: Mapping[str, object]) -> None:
        kind = "refused" if "refused" in data else "made"
        self._noted[kind] += 1
        if self._noted[kind] <= MAX_EVENTS[kind]:
            last = self._noted[kind] == MAX_EVENTS[kind]
            self._record("egress", {**data, **({"more": "further ones are summed up in the end"} if last else {})})
            return
        host = str(data.get("host", ""))
        if host not in self._further and len(self._further) >= _MAX_HOSTS:
            host = "(others)"
        counts = self._further.setdefault(host, Counter())
        counts[kind] += 1
        for name in ("sent_bytes", "received_bytes"):
            counts[name] += int(str(data.get(name, 0)))


def _refusal(refused: Refused) -> bytes:
    body = f"{refused}\n".encode()
    reason = {403: "Forbidden", 407: "Proxy Authentication Required"}.get(refused.status, "Error")
    lines = [f"HTTP/1.1 {refused.status} {reason}", "content-type: text/plain", f"content-length: {len(body)}"]
    lines += ['proxy-authenticate: Basic realm="swarm"'] if refused.status == 407 else []
    return "\r\n".join([*lines, "connection: close", "", ""]).encode() + body


def _target(request: h11.Request) -> tuple[str, int, bytes]:
    """Host, port, and the head that goes to it: rewritten, for one request; none for a tunnel. Raises Refused."""
    target = request.target.decode("latin-1")
    tunnel = request.method == b"CONNECT"
    try:
        parts = urlsplit(f"//{target}" if tunnel else target)
        host, port = (parts.hostname or "").rstrip("."), parts.port or (443 if tunnel else 80)
    except ValueError:
        raise Refused(400, "the address is none") from None
    if not host or not host.isascii() or parts.username or (tunnel and (parts.path or parts.query)):
        raise Refused(400, "the address is none")
    if tunnel:
        return host, port, b""
    if parts.scheme != "http":
        raise Refused(400, "the proxy takes http:// addresses, and CONNECT for all others")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [request.method + b" " + path.encode("latin-1") + b" HTTP/1.1", b"host: " + parts.netloc.encode("latin-1")]
    lines += [
        name + b": " + value
        for name, value in request.headers
        if not name.startswith(b"proxy-") and name not in (b"connection", b"keep-alive", b"host")
    ]
    return host, port, b"\r\n".join([*lines, b"connection: close", b"", b""])


async def _closed(writer: asyncio.StreamWriter) -> None:
    """Gone, in any case: a peer that reads nothing would keep its descriptor for as long as it likes."""
    writer.close()
    try:
        async with asyncio.timeout(_LINGER_SECONDS):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        writer.transport.abort()


async def _relay(carried: list[int], *ways: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
    """Both ways until both have ended, or nothing came for long. ``carried``: how many bytes each has."""
    last = time.monotonic()

    async def carry(which: int, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        nonlocal last
        with contextlib.suppress(OSError):
            while data := await source.read(_CHUNK_BYTES):
                last = time.monotonic()
                carried[which] += len(data)
                sink.write(data)
                await sink.drain()
            if sink.can_write_eof():
                sink.write_eof()

    tasks = [asyncio.ensure_future(carry(number, *way)) for number, way in enumerate(ways)]
    try:
        while True:
            left = last + _IDLE_SECONDS - time.monotonic()
            _, running = await asyncio.wait(tasks, timeout=max(left, 0.01))
            if not running or time.monotonic() - last >= _IDLE_SECONDS:
                return
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def resolved(host: str, port: int) -> Sequence[Address]:
    """By the host's resolver. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found]


def _of_this_host() -> set[Address]:
    found = set()
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            with contextlib.suppress(ValueError):
                found.add(ipaddress.ip_address(one.address.partition("%")[0]))
    return found
