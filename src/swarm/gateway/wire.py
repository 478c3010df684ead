"""HTTP between a guest and a service: which headers pass, and which proxy the host uses to reach the service."""

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

# RFC 9110 7.6.1, and headers that concern only one of the two connections.
_HOP_BY_HOP: Final = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade",
    }
)  # fmt: skip
# The gateway adds the key and the length itself. It can't read compressed answers.
_NOT_FORWARDED: Final = _HOP_BY_HOP | {
    "host", "content-length", "content-encoding", "accept-encoding", "authorization", "x-api-key", "cookie", "expect",
    "forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip",
}  # fmt: skip
_NOT_RETURNED: Final = _HOP_BY_HOP | {"content-encoding", "set-cookie", "alt-svc"}


def forwarded(request: web.BaseRequest, upstream: Upstream, key: str) -> CIMultiDict[str]:
    """The guest's headers, as sent to the service. Repeated headers stay repeated."""
    ours = {name.lower() for name in upstream.header}
    headers = _passed(request.headers, _NOT_FORWARDED | ours)
    for name, text in upstream.header.items():
        headers[name] = text.replace("{key}", key)
    headers["Accept-Encoding"] = "identity"
    return headers


def returned(answer: aiohttp.ClientResponse, masker: KeyMasker) -> CIMultiDict[str]:
    headers = _passed(answer.headers, _NOT_RETURNED | {"content-length"})
    return CIMultiDict((name, masker.text(value)) for name, value in headers.items())


class KeyMasker:
    """Masks the key in an answer: some services quote the request in their errors. The mask is as long as the key, so
    that content-length stays right."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()
        self._held = b""

    def text(self, text: str) -> str:
        key = self._key.decode()
        return text.replace(key, "*" * len(key))

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


def event(kind: str, message: str) -> bytes:
    """An error inside a stream, as the Messages API sends it."""
    body = {"type": "error", "error": {"type": kind, "message": message}}
    return f"event: error\ndata: {json.dumps(body)}\n\n".encode()


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
