"""What an agent's `network` setting lets it reach.

::

    none    gateway    gateway:anthropic,github    allow:example.com,*.example.org    open    gateway;open
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from swarm.errors import UsageError
from swarm.fields import no_domain

DEFAULT_UPSTREAM: Final = "anthropic"
PROXY_USER: Final = "swarm"
_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """``upstreams``: services behind the gateway. ``allow``: domains that the proxy connects to ('*.example.org': all
    its subdomains). ``open``: the proxy connects to every public address."""

    upstreams: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    open: bool = False

    @property
    def proxied(self) -> bool:
        return self.open or bool(self.allow)

    def allows(self, host: str) -> bool:
        """May the proxy connect to this name? (Its addresses are checked separately.)"""
        name = host.lower().rstrip(".")
        return self.open or any(
            name.endswith(domain[1:]) if domain.startswith("*.") else name == domain for domain in self.allow
        )


def proxy_environment(address: str, token: str) -> dict[str, str]:
    """The variables that HTTP clients read. The gateway's services are not behind the proxy."""
    url = f"http://{PROXY_USER}:{token}@{address}"
    direct = f"localhost,127.0.0.1,{address.partition(':')[0]}"
    names = {"http_proxy": url, "https_proxy": url, "no_proxy": direct}
    return names | {name.upper(): value for name, value in names.items()}


def parse(text: str) -> Policy:
    """Raises UsageError: the row may have been written by other programs."""
    upstreams: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    is_open = False
    for part in text.split(";"):
        word, colon, rest = part.partition(":")
        names = tuple(rest.split(",")) if colon else ()
        if word == "none" and not colon and text == "none":
            continue
        if word == "gateway" and all(_NAME.fullmatch(name) for name in names):
            upstreams += names or (DEFAULT_UPSTREAM,)
        elif word == "allow" and names and not any(why := no_domain(name) for name in names):
            allow += names
        elif word == "allow" and names:
            raise UsageError(f"its network policy can't allow {why}")
        elif word == "open" and not colon:
            is_open = True
        else:
            raise UsageError(
                f"the network policy {text[:200]!r} is unknown: use none, gateway, gateway:NAME,…, allow:DOMAIN,…, "
                "open, or several with ';' between"
            )
    return Policy(upstreams=upstreams, allow=allow, open=is_open)
