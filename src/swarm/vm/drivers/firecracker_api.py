"""Firecracker's API: HTTP and JSON over the Unix socket of one VM.

Only the three verbs are here. firecracker.py has the paths and bodies, in the words of Firecracker's own specification
(src/firecracker/swagger/firecracker.yaml in its repository).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import ssl
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from swarm.errors import BootFailed

# The VMM is confined, not trusted: a guest that has taken it over could answer here.
_MAX_ANSWER_BYTES = 256 << 10
_TIMEOUT_SECONDS = 10.0


class Refused(BootFailed):
    """Firecracker answered with an error. ``fault`` is its ``fault_message``. The same request would fail again."""

    retryable = False

    def __init__(self, message: str, *, status: int, fault: str) -> None:
        super().__init__(message)
        self.status = status
        self.fault = fault


class Api:
    """Client of the socket at ``path``, opened through its directory: a path may be too long for a socket address."""

    def __init__(self, path: Path) -> None:
        self._dir = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.address = f"/proc/self/fd/{self._dir}/{path.name}"
        # Otherwise httpx makes a TLS context that is never used, with every CA of this host in it: 40 ms.
        transport = httpx.AsyncHTTPTransport(uds=self.address, verify=_no_tls(), trust_env=False)
        self._client = httpx.AsyncClient(
            transport=transport, base_url="http://firecracker", trust_env=False, timeout=_TIMEOUT_SECONDS
        )

    def listener(self) -> tuple[int, int]:
        """Pid and uid of the process that listens. Raises OSError while none does."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(self.address)
            pid, uid, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid, uid & 0xFFFFFFFF

    async def get(self, path: str) -> Any:
        return await self._request("GET", path, None)

    async def put(self, path: str, *, timeout_seconds: float = _TIMEOUT_SECONDS, **body: object) -> Any:
        return await self._request("PUT", path, body, timeout_seconds)

    async def patch(self, path: str, *, timeout_seconds: float = _TIMEOUT_SECONDS, **body: object) -> Any:
        return await self._request("PATCH", path, body, timeout_seconds)

    async def _request(
        self, method: str, path: str, body: Mapping[str, object] | None, timeout_seconds: float = _TIMEOUT_SECONDS
    ) -> Any:
        """The answer's JSON; None if it has no body. Raises Refused, or BootFailed if there is no answer."""
        received = bytearray()
        try:
            async with self._client.stream(method, path, json=body, timeout=timeout_seconds) as answer:
                async for chunk in answer.aiter_raw():
                    received += chunk
                    if len(received) > _MAX_ANSWER_BYTES:
                        limit = f"{_MAX_ANSWER_BYTES >> 10} KiB"
                        raise BootFailed(f"Firecracker's answer to {method} {path} is longer than {limit}")
        except httpx.TimeoutException:
            raise BootFailed(f"Firecracker did not answer {method} {path} within {timeout_seconds:g} s") from None
        except httpx.HTTPError as error:
            raise BootFailed(f"the connection to Firecracker failed at {method} {path}: {error!r}") from error
        try:
            value = json.loads(received) if received else None
        except (ValueError, RecursionError):
            value = None
        if answer.status_code >= 400:
            fault = value.get("fault_message") if isinstance(value, dict) else None
            fault = str(fault if fault is not None else received[:200].decode(errors="replace"))[:1000].strip()
            raise Refused(f"Firecracker refused {method} {path}: {fault}", status=answer.status_code, fault=fault)
        return value

    async def aclose(self) -> None:
        """Idempotent."""
        with contextlib.suppress(OSError, httpx.HTTPError):
            await self._client.aclose()
        if self._dir >= 0:
            os.close(self._dir)
            self._dir = -1


@functools.cache
def _no_tls() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
