"""HTTP between a guest and a service: which headers pass, and which proxy the host uses to reach the service."""

from __future__ import annotations

import ipaddress
import json
import re
import urllib.request
import zlib
from collections.abc import Iterable, Mapping, Set
from typing import Final
from urllib.parse import urlsplit

import aiohttp
from aiohttp import HttpVersion11, web
from multidict import CIMultiDict

from swarm.gateway.upstreams import Upstream

# RFC 9110 7.6.1, and headers that concern only one of the two connections.
_HOP_BY_HOP: Final = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade",
    }
)  # fmt: skip
# The gateway adds the key and the length itself, and masks the key in answers, which it can't if they are compressed.
# The last ones make some servers take a call for one of another method or path.
_NOT_FORWARDED: Final = _HOP_BY_HOP | {
    "host", "content-length", "accept-encoding", "authorization", "x-api-key", "cookie", "expect",
    "forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip",
    "x-http-method-override", "x-http-method", "x-method-override", "x-original-url", "x-rewrite-url",
}  # fmt: skip
_NOT_RETURNED: Final = _HOP_BY_HOP | {"set-cookie", "alt-svc"}
_UNDONE: Final = frozenset({"gzip", "deflate", "br", "zstd"})  # by aiohttp, if it stands alone
_COMPRESSED: Final = _UNDONE | {"x-gzip", "compress", "x-compress", "dcb", "dcz"}
_CONTROL: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class UnreadableBody(Exception):
    """The message is for the guest."""


async def answer_expectation(request: web.BaseRequest) -> None:
    """A client that asked whether to send its body (curl, with more than a megabyte) is told to."""
    if request.version >= HttpVersion11 and request.headers.get("expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # else a failure before the answer would count as one within it


def decompressed(body: bytes, encoding: str, most: int) -> bytes:
    """The body as its sender meant it, or its first ``most`` bytes. Raises UnreadableBody."""
    if encoding.lower() not in ("gzip", "x-gzip", "deflate"):
        raise UnreadableBody(
            f"a request with content-encoding {encoding[:50]} can't be counted: send it as gzip or plain"
        )
    decoder = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # of either kind
    try:
        plain = decoder.decompress(body, most)
    except zlib.error:
        raise UnreadableBody(f"the request's body is not {encoding[:50]}, as its content-encoding says") from None
    if len(plain) < most and (not decoder.eof or decoder.unused_data):
        raise UnreadableBody(f"the request's body ends within its {encoding[:50]}, or behind it")
    return plain


def is_decompressed(answer: aiohttp.ClientResponse) -> bool:
    """Has aiohttp undone the answer's compression? (We ask for none, but some services compress all the same.)"""
    return answer.headers.get("content-encoding", "").lower() in _UNDONE


def unreadable(answer: aiohttp.ClientResponse) -> str:
    """How an answer is packed so that its usage could not be read, nor a key in it be masked; '' if it is not."""
    content = answer.headers.getall("content-encoding", [])
    transfer = _words(answer.headers.getall("transfer-encoding", []))
    if transfer not in ([], ["chunked"]):
        return f"transfer-encoding: {', '.join(transfer)[:50]}"
    words = _words(content)
    if len(content) > 1 or len(words) > 1 or (words and words[0] in _COMPRESSED and not is_decompressed(answer)):
        return f"content-encoding: {', '.join(words)[:50]}"
    return ""


def _words(values: Iterable[str]) -> list[str]:
    return [word for value in values for each in value.split(",") if (word := each.strip().lower())]


def forwarded(
    request: web.BaseRequest, upstream: Upstream, key: str, *, decompressed: bool = False
) -> CIMultiDict[str]:
    """The guest's headers, as sent to the service. Repeated headers stay repeated. ``decompressed``: is the body?"""
    ours = {name.lower() for name in upstream.header} | ({"content-encoding"} if decompressed else set())
    headers = _passed(request.headers, _NOT_FORWARDED | ours)
    for name, text in upstream.header.items():
        headers[name] = text.replace("{key}", key)
    headers["Accept-Encoding"] = "identity"
    return headers


def returned(answer: aiohttp.ClientResponse, masker: KeyMasker) -> CIMultiDict[str]:
    undone = {"content-encoding"} if is_decompressed(answer) else set()
    headers = _passed(answer.headers, _NOT_RETURNED | {"content-length"} | undone)
    return CIMultiDict((masker.text(name), masker.text(value)) for name, value in headers.items())


class KeyMasker:
    """Masks the key in an answer: some services quote the request in their errors. The mask is as long as the key, so
    that content-length stays right. In an answer's head (`text`), control characters become spaces (RFC 9110 5.5)."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()
        self._held = b""

    def text(self, text: str) -> str:
        key = self._key.decode()
        return _CONTROL.sub(" ", text.replace(key, "*" * len(key)))

    def feed(self, data: bytes) -> bytes:
        """What may be passed on: everything except what could be the start of the key."""
        if self._held:
            data, self._held = self._held + data, b""
        if self._key in data:
            data = data.replace(self._key, b"*" * len(self._key))
        if data.endswith(b"\n"):  # the end of an event, and never part of a key
            return data
        at = data.find(self._key[:1], max(0, len(data) - len(self._key) + 1))
        while at >= 0:
            if self._key.startswith(data[at:]):
                self._held = data[at:]
                return data[:at]
            at = data.find(self._key[:1], at + 1)
        return data

    def end(self) -> bytes:
        held, self._held = self._held, b""
        return held


def _passed(headers: Mapping[str, str], kept_back: Set[str]) -> CIMultiDict[str]:
    hop_by_hop = {name.strip().lower() for name in headers.get("connection", "").split(",")}
    gone = kept_back | hop_by_hop
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in gone)


def error(status: int, kind: str, message: str, **headers: str) -> web.Response:
    """An error in the Messages API's format, which the SDKs of both dialects understand."""
    return web.json_response(_error(kind, message), status=status, headers=headers)


def event(kind: str, message: str) -> bytes:
    """The same inside a stream."""
    return f"event: error\ndata: {json.dumps(_error(kind, message))}\n\n".encode()


def _error(kind: str, message: str) -> dict[str, object]:
    return {"type": "error", "error": {"type": kind, "message": message}}


def proxy_of(base_url: str) -> str | None:
    """The host's own proxy for this URL, if its environment names one."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if local or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies_environment().get(parts.scheme)
