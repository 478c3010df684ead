"""An HTTP proxy for agents whose policy allows other hosts. It connects only where the policy and the rules allow.

The guest has no route out and no resolver. The proxy checks the host's name, resolves it, checks the addresses, and
connects to a checked one, so a name that resolves to another address the next time (DNS rebinding) gains nothing.
No policy allows this host, other VMs, private or other special networks. Every connection is an event of the ticket.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import ipaddress
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol
from urllib.parse import urlsplit

import h11
import psutil

from swarm.base.aio import cancel_all
from swarm.gateway import hello
from swarm.gateway.attempt_listener import Record
from swarm.gateway.connection_acceptor import ConnectionAcceptor
from swarm.gateway.policy import PROXY_USER, Policy, proxy_environment
from swarm.gateway.resolver import LOOKUP_SECONDS, Address, Lookups, Resolve, resolved

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_MAX_CONNECTIONS: Final = 128
_MAX_HEAD_BYTES: Final = 32 * 1024
_HEAD_SECONDS: Final = 30.0
_CONNECT_SECONDS: Final = 10.0
_MAX_ADDRESSES: Final = 4  # of one host, tried in turn within that time
_IDLE_SECONDS: Final = 600.0
_LINGER_SECONDS: Final = 10.0  # in which a peer must have read the rest
_CLOSE_SECONDS: Final = 2.0
# Events of one attempt. Further connections are summed up by host, for this many hosts.
MAX_EVENTS: Final[Mapping[str, int]] = {"made": 1000, "refused": 200}
_MAX_HOSTS: Final = 200
_SUMMED: Final = ("made", "refused", "sent_bytes", "received_bytes")
_CHUNK_BYTES: Final = 64 * 1024
# The public IPv6 addresses that IANA has assigned; and of these, the ones that contain an IPv4 address: Teredo, 6to4.
_PUBLIC_V6: Final = ipaddress.IPv6Network("2000::/3")
_EMBEDDED_V4: Final = tuple(map(ipaddress.ip_network, ("2001::/32", "2002::/16")))
# Public by IANA's tables, but answered by the platform that this host runs on, or by whoever announces them: Azure's
# host agent, IBM Cloud's services, IETF protocols and Oracle's metadata, 6to4 relays, documentation, ORCHID.
_PLATFORM: Final = tuple(
    map(
        ipaddress.ip_network,
        (
            "168.63.129.16/32",
            "161.26.0.0/16",
            "166.8.0.0/14",
            "192.0.0.0/24",
            "192.88.99.0/24",
            "3fff::/20",
            "2001:20::/28",
        ),
    )
)
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})  # a client can't have them left out
# Below 1024 only these: SSH and HTTP. Not mail (25), not what a router or a printer listens on.
_LOW_PORTS: Final = frozenset({22, 80, 443})


class Refused(Exception):
    """Not allowed or not possible; the message is for the guest and the ticket."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressRules:
    """Which addresses proxies may connect to. ``within``: private networks that are allowed (for example your own
    package registry); ``never``: Swarm's own networks."""

    within: tuple[Network, ...] = ()
    never: tuple[Network, ...] = ()
    resolve: Resolve = resolved

    def why_not(self, address: Address) -> str:
        """Why this address is not allowed; '' when it is."""
        plain = getattr(address, "ipv4_mapped", None) or address
        if any(plain in network for network in self.never):
            return "an address of Swarm's own"
        ours = plain in _of_this_host()
        if any(plain in network for network in self.within):
            return "an address of this host" if ours and not plain.is_loopback else ""
        foreign = plain.version == 6 and plain not in _PUBLIC_V6
        if (
            foreign
            or not plain.is_global
            or plain.is_multicast
            or any(plain in network for network in _EMBEDDED_V4 + _PLATFORM)
        ):
            return "a private or special address"
        return "an address of this host" if ours else ""


class Proxy:
    """The proxy of one attempt; made and closed by `swarm.engine.egress`. ``max_events``: see `MAX_EVENTS`;
    ``lookup_seconds``: how long a name may take to be resolved."""

    def __init__(
        self,
        *,
        policy: Policy,
        rules: EgressRules,
        sock: socket.socket,
        address: str,
        token: str,
        record: Record,
        max_events: Mapping[str, int] = MAX_EVENTS,
        lookup_seconds: float = LOOKUP_SECONDS,
    ) -> None:
        self._lookups = Lookups(rules.resolve, seconds=lookup_seconds)
        self._policy = policy
        self._rules = rules
        self._record = record
        self._max_events = max_events
        self._connections: Counter[str] = Counter()  # by kind: made, refused
        self._unrecorded: dict[str, Counter[str]] = {}  # by host
        self._address = address
        self.token = token
        self._credentials = base64.b64encode(f"{PROXY_USER}:{token}".encode())
        self._acceptor = ConnectionAcceptor(sock, max_connections=_MAX_CONNECTIONS, handle=self._handle)

    @property
    def env(self) -> dict[str, str]:
        return proxy_environment(self._address, self.token)

    def stop(self) -> None:
        self._acceptor.stop()

    async def close(self) -> None:
        await self._acceptor.close(seconds=_CLOSE_SECONDS)
        await self._lookups.close()
        unrecorded, self._unrecorded = self._unrecorded, {}
        if unrecorded:
            sums = {host: {kind: counts[kind] for kind in _SUMMED} for host, counts in unrecorded.items()}
            self._record("egress", {"via": "proxy", "further": sums})

    async def _handle(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection, limit=_MAX_HEAD_BYTES)
        try:
            await self._serve(reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the guest disconnected, or never sent a whole request
        except BaseException:
            writer.transport.abort()
            raise
        await _close(writer)
        self._acceptor.connection_ended()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        began = time.monotonic()
        details: dict[str, object] = {"via": "proxy"}
        try:
            try:
                async with asyncio.timeout(_HEAD_SECONDS):
                    head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.LimitOverrunError:
                raise Refused(431, f"the head of a request may have at most {_MAX_HEAD_BYTES} bytes") from None
            request, connection = self._parse(head)
            host, port, forwarded = _target(request)
            details |= {"method": request.method.decode()[:16], "host": host[:255], "port": port}
            if not self._policy.allows(host):
                raise Refused(403, f"the agent's network policy does not allow {host[:255]}")
            if port < 1024 and port not in _LOW_PORTS:
                raise Refused(403, f"port {port} is for no agent: 22, 80, 443, and 1024 and above are")
            remote_reader, remote_writer = await self._connect(host, port, details)
        except Refused as refused:
            self._record_connection({**details, "refused": str(refused)})
            writer.write(_refusal(refused))
            await writer.drain()
            return
        relayed = [0, 0]
        try:
            if forwarded:
                remote_writer.write(forwarded)
            else:
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            sent: _Sent = _FirstBytes(host, details, must_match=not self._policy.open)
            if forwarded:
                sent = _Body(connection, request)
            await _relay(relayed, sent, (reader, remote_writer), (remote_reader, writer))
            await _close(remote_writer)
        except Refused as refused:
            details["refused"] = str(refused)
        finally:  # also when the attempt ends first
            remote_writer.transport.abort()
            took = round((time.monotonic() - began) * 1000, 1)
            sent_bytes, received_bytes = relayed
            traffic = {"sent_bytes": sent_bytes + len(forwarded), "received_bytes": received_bytes, "ms": took}
            self._record_connection({**details, **traffic})

    def _parse(self, head: bytes) -> tuple[h11.Request, h11.Connection]:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD_BYTES)
        try:
            connection.receive_data(head)
            request = connection.next_event()
        except h11.RemoteProtocolError as error:
            raise Refused(400, f"not an HTTP request: {error}") from None
        if not isinstance(request, h11.Request):
            raise Refused(400, "not an HTTP request")
        given = dict(request.headers).get(b"proxy-authorization", b"")
        scheme, _, credentials = given.partition(b" ")
        if scheme.lower() != b"basic" or not hmac.compare_digest(credentials.strip(), self._credentials):
            raise Refused(407, "the proxy needs the credentials in HTTP_PROXY")
        return request, connection

    async def _connect(
        self, host: str, port: int, details: dict[str, object]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To the first of its allowed addresses that answers, which becomes part of ``details``. Raises Refused."""
        addresses = (await self._addresses_of(host, port))[:_MAX_ADDRESSES]
        until, failed = time.monotonic() + _CONNECT_SECONDS, ""
        for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            details["address"] = str(address)
            try:
                async with asyncio.timeout((until - time.monotonic()) / left):
                    return await asyncio.open_connection(str(address), port)
            except (OSError, TimeoutError) as error:
                failed = type(error).__name__
        raise Refused(502, f"{host} can't be reached: {failed}")

    async def _addresses_of(self, host: str, port: int) -> Sequence[Address]:
        """The allowed addresses of a host. Raises Refused."""
        try:
            addresses: Sequence[Address] = [ipaddress.ip_address(host)]
        except ValueError:
            try:
                addresses = await self._lookups.addresses(host, port)
            except TimeoutError:
                raise Refused(504, f"{host} can't be resolved: its name server does not answer") from None
            except OSError as error:
                raise Refused(502, f"{host} can't be resolved: {error.strerror or error}") from None
            except UnicodeError:  # a label is empty or too long
                raise Refused(502, f"{host[:255]} can't be resolved: it is not a valid name") from None
        reasons = [self._rules.why_not(address) for address in addresses]
        allowed = [address for address, reason in zip(addresses, reasons, strict=True) if not reason]
        if not allowed:
            why = f"{host} is {reasons[0]}, which no policy allows" if reasons else f"{host} has no address"
            raise Refused(403, why)
        return allowed

    def _record_connection(self, data: Mapping[str, object]) -> None:
        kind = "refused" if "refused" in data else "made"
        self._connections[kind] += 1
        if self._connections[kind] <= self._max_events[kind]:
            last = self._connections[kind] == self._max_events[kind]
            self._record("egress", {**data, **({"more": "further ones are summed up at the end"} if last else {})})
            return
        host = str(data.get("host", ""))
        if host not in self._unrecorded and len(self._unrecorded) >= _MAX_HOSTS:
            host = "(others)"
        counts = self._unrecorded.setdefault(host, Counter())
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
    """Host, port, and the rewritten head of a single request to send there (empty for a tunnel). Raises Refused."""
    target = request.target.decode("latin-1")
    tunnel = request.method == b"CONNECT"
    try:
        parts = urlsplit(f"//{target}" if tunnel else target)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        raise Refused(400, "invalid target address") from None
    port = (443 if tunnel else 80) if port is None else port
    if not host or not host.isascii() or not port or "@" in parts.netloc or (tunnel and (parts.path or parts.query)):
        raise Refused(400, "invalid target address")
    if tunnel:
        return host, port, b""
    if parts.scheme != "http":
        raise Refused(400, "the proxy accepts http:// URLs; use CONNECT for everything else")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [request.method + b" " + path.encode("latin-1") + b" HTTP/1.1", b"host: " + parts.netloc.encode("latin-1")]
    headers = dict(request.headers)
    ours = {b"host", b"connection", b"keep-alive", b"upgrade", b"te", b"trailer"}  # and what it names itself
    ours |= {name.strip() for name in headers.get(b"connection", b"").lower().split(b",")} - _FRAMING
    if _is_chunked(request):
        ours |= {b"content-length"}
    lines += [
        name + b": " + value for name, value in request.headers if not name.startswith(b"proxy-") and name not in ours
    ]
    return host, port, b"\r\n".join([*lines, b"connection: close", b"", b""])


def _is_chunked(request: h11.Request) -> bool:
    return any(name == b"transfer-encoding" for name, _ in request.headers)  # h11 takes no other


async def _close(writer: asyncio.StreamWriter) -> None:
    """Close within a bounded time: a peer that reads nothing must not keep the descriptor open."""
    writer.close()
    try:
        async with asyncio.timeout(_LINGER_SECONDS):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        writer.transport.abort()


class _Sent(Protocol):
    """What a client sends behind its request."""

    def passed(self, data: bytes) -> bytes:
        """What may be sent on now. Raises Refused."""


class _Body:
    """The body of a request, framed anew, and nothing behind it: that could be a request for another host."""

    def __init__(self, connection: h11.Connection, request: h11.Request) -> None:
        self._connection = connection
        self._chunked = _is_chunked(request)
        self._ended = False

    def passed(self, data: bytes) -> bytes:
        out = b""
        try:
            if not self._ended:
                self._connection.receive_data(data)
            while not self._ended and isinstance(event := self._connection.next_event(), h11.Data | h11.EndOfMessage):
                self._ended = isinstance(event, h11.EndOfMessage)
                piece = bytes(event.data) if isinstance(event, h11.Data) else b""
                if piece or self._ended:
                    out += b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece
        except h11.RemoteProtocolError as error:
            raise Refused(400, f"not a body of HTTP: {error}") from None
        return out


class _FirstBytes:
    """What a client sends first through a tunnel: if that is TLS, it must ask for the host that the policy allowed.

    Otherwise a front that serves many hosts would connect it to another one (domain fronting). What is asked for inside
    the encryption can't be seen.
    """

    def __init__(self, host: str, details: dict[str, object], *, must_match: bool) -> None:
        self._host = host.lower()
        self._details = details
        self._must_match = must_match
        self._held: bytes | None = b""  # None: decided

    def passed(self, data: bytes) -> bytes:
        """What may be sent on now. Raises Refused."""
        if self._held is None:
            return data
        self._held += data
        if hello.is_tls(self._held):
            try:
                name = hello.server_name(self._held)
            except hello.NoHello:
                raise Refused(403, "it begins as TLS does, without a ClientHello that asks for one host") from None
            if name is None:
                return b""
            if name != self._host:
                self._details["server_name"] = name[:255]
                if self._must_match:
                    raise Refused(403, f"TLS asks for {name[:255] or 'no host'} in a tunnel to {self._host}")
        data, self._held = self._held, None
        return data


async def _relay(
    relayed: list[int], sent: _Sent, *directions: tuple[asyncio.StreamReader, asyncio.StreamWriter]
) -> None:
    """Relay both directions until both have ended or are idle for too long. Counts the bytes of each in ``relayed``.
    Raises what ``sent`` raises for the first direction."""
    last = time.monotonic()

    async def relay(which: int, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        nonlocal last
        with contextlib.suppress(OSError):
            while data := await source.read(_CHUNK_BYTES):
                last = time.monotonic()
                if which == 0 and not (data := sent.passed(data)):
                    continue
                relayed[which] += len(data)
                sink.write(data)
                await sink.drain()
            if sink.can_write_eof():
                sink.write_eof()

    tasks = [asyncio.ensure_future(relay(number, *direction)) for number, direction in enumerate(directions)]
    try:
        while True:
            left = last + _IDLE_SECONDS - time.monotonic()
            ended, running = await asyncio.wait(tasks, timeout=max(left, 0.01), return_when=asyncio.FIRST_EXCEPTION)
            for task in ended:
                task.result()
            if not running or time.monotonic() - last >= _IDLE_SECONDS:
                return
    finally:
        await cancel_all(tasks)


def _of_this_host() -> set[Address]:
    found = set()
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            with contextlib.suppress(ValueError):
                found.add(ipaddress.ip_address(one.address.partition("%")[0]))
    return found
