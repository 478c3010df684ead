"""HTTP as clients speak it beside what SDKs send: older versions, chunks, expectations, compression, odd paths."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from swarm.gateway.attempt_listener import AttemptListener
from swarm.gateway.process import Server
from tests.conftest import PATIENCE_SECONDS
from tests.gateway.conftest import Harness, ask
from tests.gateway.messages_api import HAIKU
from tests.serving import serving

BODY = json.dumps(ask()).encode()
Answer = tuple[int, dict[str, str], bytes]


class Shop:
    """A service that costs nothing. It tells what it was sent; ``/packed/NAME`` answers compressed, though nobody
    asked for it."""

    def __init__(self) -> None:
        self.url = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Shop]:
        async with serving(self._serve, auto_decompress=False) as self.url:
            yield self

    async def _serve(self, request: web.Request) -> web.Response:
        body = await request.read()
        if request.path.startswith("/packed/"):
            encoding = request.path.rpartition("/")[2]
            text = b"plain text"
            packed = {"gzip": gzip.compress(text), "deflate": zlib.compress(text)}.get(encoding, text)
            return web.Response(body=packed, headers={"content-encoding": encoding, "content-type": "text/plain"})
        headers = {name.lower(): value for name, value in request.headers.items()}
        said = {"method": request.method, "path": request.raw_path, "headers": headers, "body": body.decode("latin-1")}
        return web.json_response(said, headers={"etag": '"1"'})


@asynccontextmanager
async def shop_of(harness: Harness) -> AsyncIterator[Server]:
    """A listener whose service is a shop that allows every path."""
    async with Shop().serving() as shop:
        paths = tuple(f"{method} /**" for method in ("GET", "POST", "PUT"))
        claim = await harness.claim()
        async with harness.listener(claim, base_url=shop.url, metered=(), paths=paths) as listener:
            yield listener


async def exchange(
    listener: Server | AttemptListener, *pieces: bytes, pause: str = "", to_end: bool = True, close: bool = True
) -> bytes:
    """Sends these bytes as they are, and returns all that comes back. ``pause``: what must have come before the second
    piece is sent."""
    host, port = listener.env["ANTHROPIC_BASE_URL"].removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    token = f"x-api-key: {listener.token}\r\n{'connection: close' if close else 'x-a: b'}\r\n".encode()
    async with asyncio.timeout(PATIENCE_SECONDS):
        writer.write(pieces[0].replace(b"TOKEN\r\n", token))
        before = await reader.readuntil(pause.encode()) if pause else b""
        for piece in pieces[1:]:
            writer.write(piece)
        rest = await reader.read() if to_end else b""
        writer.close()
        await writer.wait_closed()
    return before + rest


def parsed(answer: bytes) -> Answer:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = b"".join(body.split(b"\r\n")[1::2])
    return int(first.split()[1]), headers, body


async def told(listener: Server, request: bytes) -> dict[str, object]:
    status, _, body = parsed(await exchange(listener, request))
    assert status == 200, body
    return json.loads(body)  # type: ignore[no-any-return]


async def test_a_path_arrives_byte_for_byte(harness: Harness) -> None:
    async with shop_of(harness) as listener:
        for path in ["/", "/simple/a+b/", "/a%2Fb/c", "/a%20b", "/@x/y:z!$&'()*,;=~", "/a/b?q=a+b%2Fc", "/caf%C3%A9"]:
            seen = await told(listener, f"GET {path} HTTP/1.1\r\nhost: x\r\nTOKEN\r\n\r\n".encode())
            assert seen["path"] == path


async def test_a_slash_at_the_end_of_a_base_url_is_not_doubled(harness: Harness) -> None:
    async with shop_of(harness) as listener:
        base = listener.env["ANTHROPIC_BASE_URL"]
        assert not base.endswith("/")
        status, _, body = parsed(await exchange(listener, b"GET //simple/ HTTP/1.1\r\nhost: x\r\nTOKEN\r\n\r\n"))
        assert (status, b"does not forward GET //simple/" in body) == (404, True)


async def test_head_is_answered_as_get_would_be_without_its_body(harness: Harness) -> None:
    async with shop_of(harness) as listener:
        answer = await exchange(listener, b"HEAD /simple/a/ HTTP/1.1\r\nhost: x\r\nTOKEN\r\n\r\n")
        status, headers, body = parsed(answer)
        assert (status, body, headers["etag"]) == (200, b"", '"1"')
        assert int(headers["content-length"]) > 100
        answer = await exchange(listener, b"HEAD /packed/gzip HTTP/1.1\r\nhost: x\r\nTOKEN\r\n\r\n")
        assert parsed(answer)[0] == 200


async def test_who_expects_100_continue_gets_it(harness: Harness) -> None:
    async with shop_of(harness) as listener:
        head = b"PUT /a HTTP/1.1\r\nhost: x\r\nTOKEN\r\ncontent-length: 5\r\nexpect: 100-Continue\r\n\r\n"
        answer = await exchange(listener, head, b"hello", pause="HTTP/1.1 100 Continue\r\n\r\n")
        status, _, body = parsed(answer.partition(b"\r\n\r\n")[2])
        seen = json.loads(body)
        assert (status, seen["body"], "expect" in seen["headers"]) == (200, "hello", False)


async def test_who_expects_100_continue_is_told_at_once_what_can_not_be(harness: Harness) -> None:
    async with shop_of(harness) as listener:
        head = b"PUT /a HTTP/1.1\r\nhost: x\r\nTOKEN\r\ncontent-length: 99000000\r\nexpect: 100-continue\r\n\r\n"
        assert parsed(await exchange(listener, head, pause="\r\n\r\n", to_end=False))[0] == 413
        head = b"DELETE /a HTTP/1.1\r\nhost: x\r\nTOKEN\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n"
        assert parsed(await exchange(listener, head, pause="\r\n\r\n", to_end=False))[0] == 404


async def test_a_body_in_chunks(harness: Harness) -> None:
    async with shop_of(harness) as listener:
        head = b"POST /a HTTP/1.1\r\nhost: x\r\nTOKEN\r\ntransfer-encoding: chunked\r\n\r\n"
        seen = await told(listener, head + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n")
        assert seen["body"] == "abcde"
        assert seen["headers"]["content-length"] == "5"  # type: ignore[index]
        assert "transfer-encoding" not in seen["headers"]  # type: ignore[operator]


async def test_http_1_0(harness: Harness) -> None:
    """It knows neither chunks nor 100 Continue; the end of the connection is the end of the answer."""
    message = json.dumps({**ask(), "stream": True}).encode()
    async with harness.listener(await harness.claim()) as listener:
        head = b"POST /v1/messages HTTP/1.0\r\nTOKEN\r\nexpect: 100-continue\r\n"
        answer = await exchange(listener, head + b"content-length: %d\r\n\r\n" % len(message), message, close=False)
        status, headers, body = parsed(answer)
        assert (status, headers.get("transfer-encoding")) == (200, None)
        assert body.rstrip().endswith(b'data: {"type": "message_stop"}')
        assert [row[0] for row in await harness.booked(1)] == [200]


async def test_an_answer_that_comes_compressed_is_readable(harness: Harness) -> None:
    """What the gateway undoes it doesn't claim; what it can't it passes on as it is."""
    async with shop_of(harness) as listener:
        for encoding in ("gzip", "deflate", "x-whatever"):
            request = f"GET /packed/{encoding} HTTP/1.1\r\nhost: x\r\naccept-encoding: br\r\nTOKEN\r\n\r\n".encode()
            status, headers, body = parsed(await exchange(listener, request))
            assert (status, body) == (200, b"plain text")
            assert headers.get("content-encoding") == (encoding if encoding == "x-whatever" else None)


async def test_a_compressed_request_of_a_service_without_cost_is_passed_on(harness: Harness) -> None:
    packed = gzip.compress(b"want 1234", mtime=0)
    async with shop_of(harness) as listener:
        head = b"POST /it/git-upload-pack HTTP/1.1\r\nhost: x\r\nTOKEN\r\ncontent-encoding: gzip\r\n"
        seen = await told(listener, head + b"content-length: %d\r\n\r\n" % len(packed) + packed)
        assert seen["body"] == packed.decode("latin-1")
        assert seen["headers"]["content-encoding"] == "gzip"  # type: ignore[index]


async def test_a_header_that_would_change_method_or_path_is_not_passed_on(harness: Harness) -> None:
    async with shop_of(harness) as listener:
        for name in ("x-http-method-override", "X-Method-Override", "x-original-url", "X-Rewrite-URL"):
            seen = await told(listener, f"GET /a HTTP/1.1\r\nhost: x\r\n{name}: DELETE\r\nTOKEN\r\n\r\n".encode())
            assert name.lower() not in seen["headers"]  # type: ignore[operator]


async def post(listener: Server | AttemptListener, body: bytes, encoding: str) -> Answer:
    head = f"POST /v1/messages HTTP/1.1\r\nhost: x\r\nTOKEN\r\ncontent-encoding: {encoding}\r\n"
    return parsed(await exchange(listener, head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body))


async def test_a_compressed_model_call_is_read_and_counted(harness: Harness) -> None:
    async with harness.listener(await harness.claim()) as listener:
        for encoding, body in (("gzip", gzip.compress(BODY)), ("Deflate", zlib.compress(BODY))):
            status, _, answer = await post(listener, body, encoding)
            assert (status, json.loads(answer)["content"][0]["text"]) == (200, HAIKU)
        for seen in harness.api.seen:
            assert seen["body"] == ask()
            assert "content-encoding" not in {name.lower() for name in seen["headers"]}
        assert [row[0] for row in await harness.booked(2)] == [200, 200]


BAD = {
    "not gzip": ("gzip", BODY, 415),
    "cut": ("gzip", gzip.compress(BODY)[:-9], 415),
    "two in one": ("gzip", gzip.compress(BODY) + gzip.compress(BODY), 415),
    "another kind": ("br", BODY, 415),
    "twice": ("gzip, gzip", gzip.compress(gzip.compress(BODY)), 415),
    "a bomb": ("gzip", gzip.compress(bytes(3_000_000)), 413),
}


async def test_a_compressed_body_that_can_not_be_read_is_refused_with_a_reason(harness: Harness) -> None:
    async with harness.listener_here(await harness.claim(), body_mb=1) as listener:
        for kind, (encoding, body, expected) in BAD.items():
            for _ in range(5):  # more than may be held at once
                status, _, said = await post(listener, body, encoding)
                assert status == expected, (kind, said)
                assert json.loads(said)["error"]["message"]
        assert harness.api.seen == []
        assert listener.failed_calls == 5 * len(BAD)
