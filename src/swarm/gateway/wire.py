"""HTTP between a guest and a service: which headers pass, and which way the host reaches the service."""

from __future__ import annotations

import ipaddress
import json
import urllib.request
from typing import Final
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

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


def forwarded(request: web.BaseRequest, upstream: Upstream, key: str) -> dict[str, str]:
    named = {name.strip().lower() for name in request.headers.get("connection", "").split(",")}
    ours = {name.lower() for name in upstream.header}
    headers = {
        name: value
        for name, value in request.headers.items()
        if name.lower() not in _NOT_FORWARDED and name.lower() not in named and name.lower() not in ours
    }
    headers |= {name: text.replace("{key}", key) for name, text in upstream.header.items()}
    return headers | {"Accept-Encoding": "identity"}


def returned(answer: aiohttp.ClientResponse) -> dict[str, str]:
    named = {name.strip().lower() for name in answer.headers.get("connection", "").split(",")}
    return {
        name: value
        for name, value in answer.headers.items()
        if name.lower() not in _NOT_RETURNED and name.lower() not in named and name.lower() != "content-length"
    }


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
