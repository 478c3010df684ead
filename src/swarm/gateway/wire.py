"""HTTP between a guest and a service: which headers pass, and which way the host reaches the service."""

from __future__ import annotations

import ipaddress
import json
import urllib.request
from collections.abc import Mapping, Set
from typing import Final
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from swarm.gateway.upstreams import Upstream

# RFC 9110 7.6.1, and what is between us and either side only.
_HOP_BY_HOP: Final = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade",
    }
)  # fmt: skip
# The key is ours to add, the length ours to count; and an answer that is compressed could not be read.
_NOT_FORWARDED: Final = _HOP_BY_HOP | {
    "host", "content-length", "content-encoding", "accept-encoding", "authorization", "x-api-key", "cookie", "expect",
    "forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip",
}  # fmt: skip
_NOT_RETURNED: Final = _HOP_BY_HOP | {"content-encoding", "set-cookie", "alt-svc"}


def forwarded(request: web.BaseRequest, upstream: Upstream, key: str) -> CIMultiDict[str]:
    """A guest's headers as the service gets them: those that come twice stay two."""
    ours = {name.lower() for name in upstream.header}
    headers = _passed(request.headers, _NOT_FORWARDED | ours)
    for name, text in upstream.header.items():
        headers[name] = text.replace("{key}", key)
    headers["Accept-Encoding"] = "identity"
    return headers


def returned(answer: aiohttp.ClientResponse, veil: KeyMasker) -> CIMultiDict[str]:
    headers = _passed(answer.headers, _NOT_RETURNED | {"content-length"})
    return CIMultiDict((name, veil.text(value)) for name, value in headers.items())


class KeyMasker:
    """An answer without the key that went with its request: some services show in their errors what they were sent.
    What stands in its place is as long, so that lengths stay true."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()
        self._held = b""

    def text(self, text: str) -> str:
        key = self._key.decode()
        return text.replace(key, "*" * len(key))

    def feed(self, data: bytes) -> bytes:
        """What may be passed on: all but what could be the beginning of the key."""
        if self._held:
            data, self._held = self._held + data, b""
        if self._key in data:
            data = data.replace(self._key, b"*" * len(self._key))
        if data.endswith(b"\n"):  # as events do, and keys don't
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


def event(kind: str, message: str) -> bytes:
    """An error within a stream, as the Messages API sends them."""
    body = {"type": "error", "error": {"type": kind, "message": message}}
    return f"event: error\ndata: {json.dumps(body)}\n\n".encode()


async def broken_off(response: web.StreamResponse, request: web.BaseRequest) -> web.StreamResponse:
    """An answer that breaks off must be seen to: its connection ends without the last chunk."""
    if request.transport is not None:
        request.transport.close()
    return response


def proxy_of(base_url: str) -> str | None:
    """The host's own proxy for this address, if the host's environment names one."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if local or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies_environment().get(parts.scheme)
