"""The process of an engine that hands out files to other hosts: this host's images and layers, by their digests.

It listens to a network, so it has no rights: it can open no file of the host's, and is handed descriptors of those that
it may send. A request names a digest, never a path, and bears the token of that file (`swarm.vm.image.elsewhere`).
Messages of the engine come over a socket, a packet each: ``{"keys": […]}``, those from which tokens may be made;
``{"sha256": …}`` with a descriptor, a file more; ``{"gone": …}``, one less. The process ends when that socket does.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import re
import resource
import socket
import sys
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.lifespan import off as _loaded  # noqa: F401  which uvicorn would do later, without rights

from swarm.api import server
from swarm.api.problem import problem
from swarm.base import privileges
from swarm.vm.image.elsewhere import PREFIX, token

AT_ONCE: Final = 16
_CHUNK_BYTES: Final = 256 << 10
_MESSAGE_BYTES: Final = 4096
_PATH: Final = re.compile(re.escape(PREFIX) + "([0-9a-f]{64})")
_RANGE: Final = re.compile("bytes=([0-9]{1,18})-")


class SharedFiles:
    """An ASGI app. ``files``: digest -> descriptor."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.files: dict[str, int] = {}
        self._sending = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        answer = self._refusal(Request(scope))
        if answer is not None:
            await answer(scope, receive, send)
            return
        self._sending += 1
        try:
            await self._send(Request(scope), send)
        finally:
            self._sending -= 1

    def _refusal(self, request: Request) -> Response | None:
        found = _PATH.fullmatch(request.scope["path"])
        if not found:
            return problem(404, "there is nothing at this address")
        if request.method not in ("GET", "HEAD"):
            return problem(405, "this address takes no such method", headers={"allow": "GET, HEAD"})
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        good = [hmac.compare_digest(token(key, found[1]).encode(), given.strip().encode()) for key in self.keys]
        if scheme.lower() != "bearer" or not any(good):
            headers = {"www-authenticate": 'Bearer realm="swarm files"'}
            return problem(401, "the token of this file is needed", headers=headers)
        if found[1] not in self.files:
            return problem(404, "this host has no such file")
        if self._sending >= AT_ONCE:
            return problem(503, f"{AT_ONCE} files are being sent: try again", headers={"retry-after": "1"})
        return None

    async def _send(self, request: Request, send: Send) -> None:
        fd = os.dup(self.files[request.scope["path"].removeprefix(PREFIX)])  # it may be taken back meanwhile
        try:
            size = os.fstat(fd).st_size
            given = _RANGE.fullmatch(request.headers.get("range", ""))
            start = int(given[1]) if given else 0
            status, headers = 200, {"content-type": "application/octet-stream", "accept-ranges": "bytes"}
            if given and start >= size:
                status, headers["content-range"], start = 416, f"bytes */{size}", size
            elif given:
                status, headers["content-range"] = 206, f"bytes {start}-{size - 1}/{size}"
            headers["content-length"] = str(size - start)
            told = [(name.encode(), text.encode()) for name, text in headers.items()]
            await send({"type": "http.response.start", "status": status, "headers": told})
            while request.method == "GET" and start < size:
                if not (data := os.pread(fd, min(_CHUNK_BYTES, size - start), start)):
                    raise OSError("the file was cut")  # nobody changes one; the client sees that it broke off
                start += len(data)
                await send({"type": "http.response.body", "body": data, "more_body": start < size})
            if request.method == "HEAD" or status == 416 or not size:
                await send({"type": "http.response.body", "body": b""})
        finally:
            os.close(fd)

    def told(self, message: dict[str, Any], descriptors: list[int]) -> None:
        """By the engine."""
        if "keys" in message:
            self.keys = message["keys"]
        for name in (message.get("sha256"), message.get("gone")):
            if name in self.files:
                os.close(self.files.pop(name))
        if "sha256" in message:
            self.files[message["sha256"]] = descriptors[0]


async def _main(bound: socket.socket, engine: socket.socket) -> None:
    app, ended = SharedFiles(), asyncio.Event()

    def hear() -> None:
        with contextlib.suppress(BlockingIOError):
            data, descriptors, _, _ = socket.recv_fds(engine, _MESSAGE_BYTES, 1)
            if data:
                app.told(json.loads(data), descriptors)
            else:
                ended.set()

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NPROC: 0}
    privileges.drop({**limits, resource.RLIMIT_NOFILE: files})
    privileges.die_with_parent()
    engine.setblocking(False)
    asyncio.get_running_loop().add_reader(engine, hear)
    async with server.serving_on(app, bound) as serving:
        waiting = asyncio.create_task(ended.wait())
        await asyncio.wait({waiting, serving}, return_when=asyncio.FIRST_COMPLETED)
        os._exit(0)  # nothing is kept; transfers under way break, and are continued elsewhere or later


if __name__ == "__main__":
    asyncio.run(_main(socket.socket(fileno=int(sys.argv[1])), socket.socket(fileno=int(sys.argv[2]))))
