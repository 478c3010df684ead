"""The egress proxy: names that are allowed, addresses that never are, and the events that are recorded."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import ipaddress
import json
import socket
import ssl
import struct
import termios
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from swarm import agents, config
from swarm.app import setup, wiring
from swarm.config import Settings
from swarm.engine.run_once import run_ticket
from swarm.errors import UsageError
from swarm.gateway import hello, policy
from swarm.gateway.proxy import MAX_EVENTS, EgressRules, Proxy, Refused, _FirstBytes
from swarm.gateway.resolver import AT_ONCE, LOOKUP_SECONDS, Address, Resolve, resolved
from tests.conftest import PATIENCE_SECONDS
from tests.engine.conftest import Bench

LOOPBACK = ipaddress.IPv4Network("127.0.0.0/8")


@dataclass
class Site:
    """A web site of ours on loopback, and a proxy to it. ``names``: what resolves to what, in turn."""

    port: int
    seen: list[web.Request]
    events: list[Mapping[str, object]] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    async def resolve(self, host: str, port: int) -> Sequence[Address]:
        self.asked.append(host)
        answers = self.names.get(host)
        if not answers:
            raise OSError(-2, "Name or service not known")
        return [ipaddress.ip_address(answers.pop(0) if len(answers) > 1 else answers[0])]

    @asynccontextmanager
    async def proxy(
        self,
        network: str,
        *,
        within: tuple[ipaddress.IPv4Network, ...] = (),
        resolve: Resolve | None = None,
        max_events: Mapping[str, int] = MAX_EVENTS,
        lookup_seconds: float = LOOKUP_SECONDS,
    ) -> AsyncIterator[Proxy]:
        sock = socket.create_server(("127.0.0.1", 0))
        proxy = Proxy(
            policy=policy.parse(network),
            rules=EgressRules(
                within=within, never=(ipaddress.ip_network("10.0.0.0/16"),), resolve=resolve or self.resolve
            ),
            sock=sock,
            address=f"127.0.0.1:{sock.getsockname()[1]}",
            token="token-of-the-proxy",
            record=lambda kind, data: self.events.append(data),
            max_events=max_events,
            lookup_seconds=lookup_seconds,
        )
        try:
            yield proxy
        finally:
            await proxy.close()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async def answer(request: web.Request) -> web.Response:
        seen.append(request)
        return web.Response(text=f"{request.method} {request.path_qs} {len(await request.read())}")

    seen: list[web.Request] = []
    runner = web.ServerRunner(web.Server(answer))  # type: ignore[arg-type]
    await runner.setup()
    listening = web.TCPSite(runner, "127.0.0.1", 0)
    await listening.start()
    made = Site(port=runner.addresses[0][1], seen=seen)
    await web.TCPSite(runner, "127.0.0.2", made.port).start()
    made.names["www.example.com"] = ["127.0.0.1"]
    yield made
    await runner.cleanup()


async def get(proxy: Proxy, url: str, **options: object) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session:
        env = proxy.env["HTTP_PROXY"]
        async with session.get(url, proxy=env, **options) as answer:  # type: ignore[arg-type]
            return answer.status, await answer.text()


async def tunnel(
    proxy: Proxy,
    target: str,
    *,
    credentials: str | None = None,
    sends: bytes = b"GET /through HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
) -> bytes:
    """What comes of CONNECT, and, when that was granted, of a request through the tunnel."""
    host, _, port = proxy.env["HTTP_PROXY"].rpartition("@")[2].partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    given = base64.b64encode((credentials or f"swarm:{proxy.token}").encode()).decode()
    writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nProxy-Authorization: Basic {given}\r\n\r\n".encode())
    answer = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " in answer:
        writer.write(sends)
    answer += await reader.read()
    writer.close()
    return answer


async def test_allowed_by_name(site: Site) -> None:
    async with site.proxy("allow:www.example.com", within=(LOOPBACK,)) as proxy:
        url = f"http://www.example.com:{site.port}/page?a=b"
        assert await get(proxy, url) == (200, "GET /page?a=b 0")
        assert b"GET /through 0" in await tunnel(proxy, f"www.example.com:{site.port}")
        assert (await get(proxy, f"http://other.example.com:{site.port}/"))[0] == 403
        assert b"403 Forbidden" in await tunnel(proxy, f"other.example.com:{site.port}")
    [request, _] = site.seen
    assert request.headers["host"] == f"www.example.com:{site.port}"
    assert not [name for name in request.headers if name.lower().startswith("proxy")]
    why = "the agent's network policy does not allow other.example.com"
    assert {(e["host"], e["method"], e.get("refused")) for e in site.events} == {
        ("www.example.com", "GET", None),
        ("www.example.com", "CONNECT", None),
        ("other.example.com", "GET", why),
        ("other.example.com", "CONNECT", why),
    }
    assert len(site.events) == 4
    assert site.events[0]["address"] == "127.0.0.1"
    assert int(str(site.events[0]["received_bytes"])) > 0
    assert "other.example.com" not in site.asked  # not even resolved


async def test_a_body_goes_along(site: Site) -> None:
    async with site.proxy("open", within=(LOOPBACK,)) as proxy, aiohttp.ClientSession() as session:
        url = f"http://www.example.com:{site.port}/"
        async with session.post(url, data=b"x" * 300_000, proxy=proxy.env["HTTP_PROXY"]) as answer:
            assert await answer.text() == "POST / 300000"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "fe80::1", "fd00::1",
        "::127.0.0.1", "::ffff:0:127.0.0.1", "fec0::1", "64:ff9b::7f00:1", "64:ff9b:1::1", "5f00::1",
        "2002:7f00:1::", "2001:0:7f00:1::", "168.63.129.16", "::ffff:168.63.129.16", "100.100.100.200", "161.26.0.10",
        "166.9.1.1", "192.88.99.1", "fd00:ec2::254", "192.0.0.192",
    ],
)  # fmt: skip
async def test_addresses_that_no_policy_reaches(site: Site, address: str) -> None:
    site.names["evil.example.com"] = [address]
    async with site.proxy("open") as proxy:
        assert b"403 Forbidden" in await tunnel(proxy, f"evil.example.com:{site.port}")
        literal = f"[{address}]" if ":" in address else address
        assert b"403 Forbidden" in await tunnel(proxy, f"{literal}:{site.port}")
    assert all("which no policy allows" in str(event["refused"]) for event in site.events)
    assert site.seen == []


async def test_swarms_own_subnet_is_never_within(site: Site) -> None:
    rules = EgressRules(within=(ipaddress.ip_network("10.0.0.0/8"),), never=(ipaddress.ip_network("10.0.0.0/16"),))
    assert rules.why_not(ipaddress.ip_address("10.0.0.2")) == "an address of Swarm's own"
    assert rules.why_not(ipaddress.ip_address("10.9.0.2")) == ""
    assert rules.why_not(ipaddress.ip_address("93.184.215.14")) == ""


async def test_a_name_that_changes_its_mind_gains_nothing(site: Site) -> None:
    """DNS rebinding: first an address that may be, then one that may not. It is resolved once, and that is used."""
    site.names["two.example.com"] = ["127.0.0.1", "169.254.169.254"]
    async with site.proxy("allow:two.example.com", within=(LOOPBACK,)) as proxy:
        assert b"GET /through 0" in await tunnel(proxy, f"two.example.com:{site.port}")
        assert site.asked == ["two.example.com"]
        assert b"403 Forbidden" in await tunnel(proxy, f"two.example.com:{site.port}")


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nhost: www.example.com\r\n\r\n", b"CONNECT www.example.com/x HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET ftp://www.example.com/ HTTP/1.1\r\nhost: x\r\n\r\n", b"\x16\x03\x01\r\n\r\n",
        b"CONNECT  HTTP/1.1\r\n\r\n",
        b"GET http://a@www.example.com/ HTTP/1.1\r\nhost: x\r\n\r\n", b"CONNECT x:99999999 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET http://:p@www.example.com/ HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET http://@www.example.com/ HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT :p@www.example.com HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT www.example.com:0 HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
)  # fmt: skip
async def test_what_is_no_request_for_a_proxy(site: Site, head: bytes) -> None:
    async with site.proxy("open", within=(LOOPBACK,)) as proxy:
        host, _, port = proxy.env["HTTP_PROXY"].rpartition("@")[2].partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        given = base64.b64encode(f"swarm:{proxy.token}".encode())
        writer.write(head[:-2] + b"Proxy-Authorization: Basic " + given + b"\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
    assert site.seen == []


NEXT = b"GET /next HTTP/1.1\r\nHost: evil.example.org\r\n\r\n"
CHUNKED, END = b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("headers", "pieces", "head", "body"),
    [
        (b"", [NEXT], b"", b""),
        (b"Content-Length: 5\r\n", [b"he", b"llo" + NEXT], b"content-length: 5", b"hello"),
        (b"Content-Length: 0\r\n", [NEXT], b"content-length: 0", b""),
        (CHUNKED, [b"5;x=y\r\nhello\r\n" + END + NEXT], CHUNKED.lower().strip(), b"5\r\nhello\r\n" + END),
        (CHUNKED, [b"0\r\nx-a: b\r\n\r\n" + NEXT], CHUNKED.lower().strip(), END),
        (CHUNKED + b"Content-Length: 99\r\n", [END + NEXT], CHUNKED.lower().strip(), END),
        (CHUNKED + b"Connection: transfer-encoding\r\n", [END], CHUNKED.lower().strip(), END),
        (CHUNKED, [b"0\r\n\r", b"\n", NEXT], CHUNKED.lower().strip(), END),
        (b"Connection: upgrade, x-a\r\nUpgrade: h2c\r\nX-A: b\r\nTE: trailers\r\n", [NEXT], b"", b""),
    ],
)  # fmt: skip
async def test_nothing_is_sent_behind_a_request(
    site: Site, headers: bytes, pieces: list[bytes], head: bytes, body: bytes
) -> None:
    """One more would be for whatever host it names, and no event would say so."""
    came, ended = bytearray(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            came.extend(data)
        writer.close()
        ended.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    at = f"www.example.com:{server.sockets[0].getsockname()[1]}".encode()
    async with site.proxy("allow:www.example.com", within=(LOOPBACK,)) as proxy, server:
        host, _, port = proxy.env["HTTP_PROXY"].rpartition("@")[2].partition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        given = b"Proxy-Authorization: Basic " + base64.b64encode(f"swarm:{proxy.token}".encode()) + b"\r\n"
        writer.write(b"POST http://" + at + b"/ HTTP/1.1\r\nHost: x\r\n" + given + headers + b"\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.write_eof()
        await asyncio.wait_for(ended.wait(), PATIENCE_SECONDS)
        writer.close()
        await writer.wait_closed()
    framing = [b"host: " + at, *([head] if head else []), b"connection: close"]
    assert bytes(came) == b"\r\n".join([b"POST / HTTP/1.1", *framing, b"", body])


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (CHUNKED, b"zz\r\n"),
        (b"Transfer-Encoding: gzip, chunked\r\n", b""),
        (b"Content-Length: 1\r\nContent-Length: 2\r\n", b""),
        (b"Content-Length: -1\r\n", b""),
        (b"X-Long: " + b"x" * 40_000 + b"\r\n", b""),
    ],
)
async def test_a_request_that_servers_may_read_in_several_ways_is_an_event(
    site: Site, headers: bytes, body: bytes
) -> None:
    async with site.proxy("allow:www.example.com", within=(LOOPBACK,)) as proxy:
        host, _, port = proxy.env["HTTP_PROXY"].rpartition("@")[2].partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        given = b"Proxy-Authorization: Basic " + base64.b64encode(f"swarm:{proxy.token}".encode()) + b"\r\n"
        at = f"www.example.com:{site.port}".encode()
        writer.write(b"POST http://" + at + b"/ HTTP/1.1\r\nHost: x\r\n" + given + headers + b"\r\n" + body)
        with contextlib.suppress(ConnectionError):
            assert (await reader.read())[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431")
        writer.transport.abort()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not site.events:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert "refused" in site.events[0] and (body or site.seen == [])


@pytest.mark.parametrize("host", ["a..example.com", "x" * 70 + ".example.com", ".example.com"])
async def test_names_that_no_resolver_takes(site: Site, host: str) -> None:
    """The guest gets an error, and the refusal is recorded."""
    async with site.proxy("open", resolve=resolved) as proxy:
        assert b"can't be resolved" in await tunnel(proxy, f"{host}:443")
    assert "can't be resolved" in str(site.events[0]["refused"])


async def test_credentials(site: Site) -> None:
    async with site.proxy("open", within=(LOOPBACK,)) as proxy:
        assert b" 407 " in await tunnel(proxy, f"www.example.com:{site.port}", credentials="swarm:wrong")
    assert site.seen == []


async def test_nothing_is_left_of_connections_when_it_closes(site: Site) -> None:
    async with site.proxy("open", within=(LOOPBACK,)) as proxy:
        host, _, port = proxy.env["HTTP_PROXY"].rpartition("@")[2].partition(":")
        idle = [await asyncio.open_connection(host, int(port)) for _ in range(200)]
        assert b"GET /through 0" in await asyncio.wait_for(_once_some_left(proxy, site, idle), 60)
    for reader, _ in idle:
        assert await reader.read() == b""


async def _once_some_left(
    proxy: Proxy, site: Site, idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
) -> bytes:
    asking = asyncio.create_task(tunnel(proxy, f"www.example.com:{site.port}"))
    for _, writer in idle:
        writer.close()
    return await asking


async def test_a_place_that_takes_nothing_holds_no_descriptor(site: Site) -> None:
    """It and the guest may be friends: what neither of them reads must not stay with the engine for good."""
    took: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: took.append(writer), "127.0.0.1", 0, limit=1)
    port = server.sockets[0].getsockname()[1]
    async with site.proxy("allow:www.example.com", within=(LOOPBACK,)) as proxy:
        host, _, door = proxy.env["HTTP_PROXY"].rpartition("@")[2].partition(":")
        reader, writer = await asyncio.open_connection(host, int(door))
        given = base64.b64encode(f"swarm:{proxy.token}".encode()).decode()
        head = f"CONNECT www.example.com:{port} HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic {given}\r\n\r\n"
        writer.write(head.encode())
        await reader.readuntil(b"\r\n\r\n")
        took[0].transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"x" * (32 << 20))
        unread = bytearray(4)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not any(unread):
                await asyncio.sleep(0.01)
                fcntl.ioctl(took[0].get_extra_info("socket").fileno(), termios.FIONREAD, unread)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(writer.drain(), 0.5)  # as much as fits on the way
        assert open_to(port)
    assert not open_to(port)
    assert int(str(site.events[0]["sent_bytes"])) > 0  # though it was cut off
    writer.transport.abort()
    took[0].transport.abort()
    server.close()


def open_to(port: int) -> list[int]:
    """Descriptors of this process whose other end is there."""
    found = psutil.Process().net_connections("tcp")
    return [one.fd for one in found if one.raddr and one.raddr.port == port and one.fd > 0]


async def test_no_connection_hides_behind_many_others(site: Site) -> None:
    """The first ones of each kind are events; the rest is summed up by host at the end."""
    one_each = {"made": 1, "refused": 1}
    async with site.proxy("allow:www.example.com", within=(LOOPBACK,), max_events=one_each) as proxy:
        for _ in range(2):
            assert b" 403 " in await tunnel(proxy, f"evil.example.com:{site.port}")
        for _ in range(3):
            assert b"GET /through 0" in await tunnel(proxy, f"www.example.com:{site.port}")
    refused, made, rest = site.events
    assert (refused["host"], made["host"]) == ("evil.example.com", "www.example.com")
    assert refused["more"] == made["more"] == "further ones are summed up at the end"
    further = rest["further"]
    assert isinstance(further, dict)
    assert further["evil.example.com"] == {"refused": 1, "made": 0, "sent_bytes": 0, "received_bytes": 0}
    assert further["www.example.com"]["made"] == 2
    assert further["www.example.com"]["received_bytes"] > 100


async def test_the_hosts_resolver() -> None:
    assert ipaddress.ip_address("127.0.0.1") in await resolved("localhost", 80)


async def test_the_hosts_resolver_needs_none_of_the_shared_threads() -> None:
    """Everything else waits for those: the disk, the database, the schemas."""
    busy = threading.Event()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    blocked = asyncio.ensure_future(asyncio.to_thread(busy.wait))
    try:
        assert ipaddress.ip_address("127.0.0.1") in await asyncio.wait_for(resolved("localhost", 80), 30)
    finally:
        busy.set()
        await blocked


async def test_names_that_are_never_answered_delay_nobody_else(site: Site) -> None:
    asked, at_once, most, full, never = 0, 0, 0, asyncio.Event(), asyncio.Event()

    async def silent(host: str, port: int) -> Sequence[Address]:
        nonlocal asked, at_once, most
        if host == "www.example.com":
            return [ipaddress.ip_address("127.0.0.1")]
        asked, at_once = asked + 1, at_once + 1
        most = max(most, at_once)
        if at_once == AT_ONCE:
            full.set()
        try:
            await never.wait()
        finally:
            at_once -= 1
        raise AssertionError

    within = (LOOPBACK,)
    async with (
        site.proxy("open", within=within, resolve=silent, lookup_seconds=1.0) as hostile,
        site.proxy("open", within=within, resolve=silent) as other,
    ):
        waiting = [asyncio.ensure_future(tunnel(hostile, f"n{n}.example.com:{site.port}")) for n in range(100)]
        await asyncio.wait_for(full.wait(), 30)
        assert b"GET /through 0" in await tunnel(other, f"www.example.com:{site.port}")
        answers = await asyncio.gather(*waiting)
    assert all(b" 504 " in answer and b"does not answer" in answer for answer in answers)
    assert (asked, most, at_once) == (AT_ONCE, AT_ONCE, 0)


async def test_the_next_address_is_tried(site: Site) -> None:
    async def several(host: str, port: int) -> Sequence[Address]:
        return [ipaddress.ip_address(text) for text in ("10.0.0.9", "127.0.0.9", "127.0.0.1")]

    async with site.proxy("open", within=(LOOPBACK,), resolve=several) as proxy:
        assert b"GET /through 0" in await tunnel(proxy, f"www.example.com:{site.port}")
    assert [event["address"] for event in site.events] == ["127.0.0.1"]


def client_hello(name: str | None) -> bytes:
    """As OpenSSL sends it."""
    out = ssl.MemoryBIO()
    context = ssl.create_default_context()
    context.check_hostname = name is not None
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name).do_handshake()
    return out.read()


@pytest.mark.parametrize("cut", [1, 6, 50, 10_000])
@pytest.mark.parametrize(
    ("network", "name", "sent"),
    [
        ("allow:www.example.com", "www.example.com", True), ("allow:www.example.com", "WWW.example.com", True),
        ("allow:www.example.com", "evil.example.org", False), ("allow:www.example.com", None, False),
        ("open", "evil.example.org", True),
    ],
)  # fmt: skip
async def test_tls_asks_for_the_host_that_was_allowed(network: str, name: str | None, sent: bool, cut: int) -> None:
    sent_hello = client_hello(name)
    details: dict[str, object] = {}
    first, got = _FirstBytes("www.example.com", details, must_match=network != "open"), b""
    try:
        for at in range(0, len(sent_hello), cut):
            got += first.passed(sent_hello[at : at + cut])
        got += first.passed(b"more")
    except Refused as refused:
        assert not sent and "in a tunnel to www.example.com" in str(refused)
    assert got == (sent_hello + b"more" if sent else b"")
    assert details == ({} if (name or "").lower() == "www.example.com" else {"server_name": name or ""})


def names(*each: tuple[int, bytes]) -> bytes:
    """The extension server_name with this list."""
    listed = b"".join(struct.pack(">BH", kind, len(name)) + name for kind, name in each)
    return struct.pack(">HHH", 0, len(listed) + 2, len(listed)) + listed


OURS, THEIRS = (0, b"www.example.com"), (0, b"evil.example.org")


@pytest.mark.parametrize(
    ("extensions", "sent"),
    [
        (names(OURS), True), (names(OURS) + names(THEIRS), False), (names(OURS) + names(OURS), False),
        (names(OURS, THEIRS), False), (names((1, b"www.example.com"), THEIRS), False), (names(), False),
        (names((1, b"www.example.com")), False), (struct.pack(">HH", 0, 0), False), (names(OURS)[:-1], False),
        (struct.pack(">HH", 21, 3) + bytes(3) + names(OURS), True),
    ],
)  # fmt: skip
def test_tls_that_asks_for_several_hosts_is_refused(extensions: bytes, sent: bool) -> None:
    """Some servers take the first, some the last."""
    body = struct.pack(">H32xB", 0x0303, 0) + b"\0\2\x13\1" + b"\1\0" + struct.pack(">H", len(extensions)) + extensions
    message = b"\1" + len(body).to_bytes(3) + body
    data = b"\x16\3\1" + len(message).to_bytes(2) + message
    first = _FirstBytes("www.example.com", {}, must_match=True)
    with contextlib.nullcontext() if sent else pytest.raises(Refused):
        assert first.passed(data) == data


@pytest.mark.parametrize("name", ["www.example.com", "evil.example.org"])
async def test_domain_fronting_is_refused_and_named(site: Site, name: str) -> None:
    async with site.proxy("allow:www.example.com", within=(LOOPBACK,)) as proxy:
        answer = await tunnel(proxy, f"www.example.com:{site.port}", sends=client_hello(name))
    [event] = site.events
    fronted = name != "www.example.com"
    assert ("refused" in event) == fronted and event.get("server_name") == (name if fronted else None)
    assert (event["sent_bytes"] == 0) == fronted and answer.startswith(b"HTTP/1.1 200")


@given(st.binary(max_size=300))
def test_whatever_begins_as_tls(data: bytes) -> None:
    with contextlib.suppress(hello.NoHello):
        assert isinstance(hello.server_name(b"\x16\x03\x01" + data), str | None)


@pytest.mark.parametrize(
    ("port", "allowed"), [(25, False), (23, False), (587, False), (22, True), (80, True), (443, True)]
)
async def test_ports(site: Site, port: int, allowed: bool) -> None:
    async with site.proxy("open", within=(LOOPBACK,)) as proxy:
        answer = await tunnel(proxy, f"www.example.com:{port}")
    assert (b" 403 " in answer) != allowed


@pytest.mark.parametrize(
    ("domain", "said"),
    [
        ("GitHub.com", "write it as 'github.com'"), ("example.com.", "write it as 'example.com'"),
        ("192.168.1.1", "is an address"), ("[2001:db8::1]", "is an address"), ("localhost", "one label only"),
        ("*", "one label only"), ("https://example.com/x", "is a URL"), ("example.com:443", "has a port"),
        ("a_b.example.com", "is no domain"), ("", "one label only"),
    ],
)  # fmt: skip
def test_what_allow_refuses_it_refuses_in_words(domain: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "main.py").touch()
    manifest = {"name": "a", "version": "1.0.0", "entry": ["main.py"], "network": {"allow": [domain]}}
    (tmp_path / "agent.yaml").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=said) as of_manifest:
        agents.read(tmp_path)
    with pytest.raises(UsageError, match=said) as of_row:
        policy.parse(f"allow:{domain}")
    assert "[a-z" not in str(of_manifest.value) + str(of_row.value)


async def test_an_agent_behind_it(site: Site, settings: Settings, tmp_path: Path) -> None:
    """http-fetch, which ships, by its policy `open`; and one whose policy is none."""
    own = config.load(
        **{**settings.model_dump(), "home": tmp_path / "home", "driver": "process", "egress_private": ("127.0.0.0/8",)}
    )
    await setup.init(own, image=False)
    async with wiring.store(own) as store, wiring.worker(own, store) as worker:
        bench = Bench(settings=own, store=store, worker=worker, dir=tmp_path)
        agent = await store.agent("http-fetch")
        # `localhost` is for no proxy; and in here is no resolver, so the address has to do.
        bench.insert("fetch", agent.id, inputs=json.dumps({"url": f"http://127.0.0.2:{site.port}/x"}))
        ticket = await run_ticket(store, worker, "fetch")
        assert json.loads(ticket.outputs or "{}").get("text") == "GET /x 0", ticket.error
        [event] = [e.data for e in await store.events("fetch") if e.kind == "egress"]
        assert (event["via"], event["host"], event["port"]) == ("proxy", "127.0.0.2", site.port)
        code = "import json, os; json.dump([n for n in os.environ if 'proxy' in n.lower()], open('output.json', 'w'))"
        assert json.loads((await bench.run(code)).outputs or "") == []
