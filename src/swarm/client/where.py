"""Where the server is, and how to talk to it."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from swarm.client.errors import Invalid, Unreachable

_HOME: Final = "/opt/swarm-platform"
_DEFAULT_URL: Final = "http://127.0.0.1:8420"  # of `swarm serve`; a token alone is for this
_MAX_SOCKET_BYTES: Final = 107  # of the kernel's
# The server closes a connection that has been idle for 5 s: one that is about to be closed isn't used.
# The server serves 64 requests of one holder of a token at once, streams included.
LIMITS: Final = httpx.Limits(max_connections=60, max_keepalive_connections=16, keepalive_expiry=3.0)


@dataclass(frozen=True, kw_only=True)
class Where:
    """``url``, or else the Unix socket of a home."""

    url: str
    token: str | None = field(default=None, repr=False)
    socket: Path | None = None

    @property
    def silence(self) -> str:
        """What to say if nothing answers."""
        if self.socket is not None:
            return f"`swarm serve` is not running: nothing answers on {self.socket}"
        return f"nothing answers at {self.url}: is `swarm serve` running there?"


def find(url: str | None, token: str | None, home: str | os.PathLike[str] | None) -> Where:
    """What is given, else `SWARM_URL` and `SWARM_TOKEN`, else the Unix socket of the home. Raises Invalid for an
    address that is none, and Unreachable if there is no socket, or not one that this user may open."""
    if home is None:
        url = url or os.environ.get("SWARM_URL")
        token = token or os.environ.get("SWARM_TOKEN")
        url = url or (_DEFAULT_URL if token else None)
    elif url is not None:
        raise Invalid("give `url` or `home`, not both")
    if url is not None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise Invalid(f"the server's address {url!r} is not valid: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise Invalid(f"the server's address {url!r} must begin with http:// or https:// and a host")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise Invalid("the token has characters that no token has")
        return Where(url=url.rstrip("/"), token=token)
    socket = Path(home or os.environ.get("SWARM_HOME") or _HOME).absolute() / "data" / "api.sock"
    here = Where(url="http://swarm", socket=socket)
    elsewhere = "or set SWARM_URL and SWARM_TOKEN (`swarm token create` makes a token)"
    try:
        socket.stat()
    except PermissionError:
        raise Unreachable(f"{socket} is not this user's: run this as the user of `swarm serve`, {elsewhere}") from None
    except OSError:
        raise Unreachable(f"{here.silence}; start it, {elsewhere}") from None
    if not os.access(socket, os.W_OK):
        raise Unreachable(f"{socket} is not this user's: run this as the user of `swarm serve`, {elsewhere}")
    return here


def options(where: Where, timeout_seconds: float) -> dict[str, Any]:
    """For both of httpx's clients, without the transport."""
    headers = {"user-agent": "swarm-client", "accept": "application/json, text/event-stream;q=0.9, */*;q=0.1"}
    if where.token is not None:
        headers["authorization"] = f"Bearer {where.token}"
    timeout = httpx.Timeout(timeout_seconds, connect=min(timeout_seconds, 10.0), pool=None)
    # A proxy of the environment is not for servers of this host.
    trust_env = where.socket is None and not _is_loopback(httpx.URL(where.url).host)
    return {"base_url": where.url, "headers": headers, "timeout": timeout, "trust_env": trust_env}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class ShortPath:
    """A name for a Unix socket that is short enough for the kernel, however deep its directory is."""

    def __init__(self, path: Path) -> None:
        self._directory: int | None = None
        self.name = str(path)
        if len(os.fsencode(path)) > _MAX_SOCKET_BYTES:
            self._directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
            self.name = f"/proc/self/fd/{self._directory}/{path.name}"

    def close(self) -> None:
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None
