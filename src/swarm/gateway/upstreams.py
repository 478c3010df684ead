"""The table of services that the gateway forwards to, and where their keys are. Fields: see `upstreams.toml`."""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import pydantic
from pydantic import Field, StringConstraints

from swarm.errors import UsageError
from swarm.fields import HEADER, PATH, PRICED, SERVICE, reason, sentence
from swarm.gateway import routes
from swarm.gateway.policy import Policy

SHIPPED: Final = Path(__file__).with_name("upstreams.toml")
_MAX_KEY_BYTES: Final = 16 * 1024
_AUTHORITY: Final = re.compile(r"(?:[^@]*@)?(?P<host>\[[^\]]*\]|[^:@\[\]]+)(?::(?P<port>[0-9A-Za-z-]*))?")
# What services of the known dialects bill: nothing of it may be among the paths that cost nothing. What can't be booked
# is billed later, or in units that no answer reports.
_BILLED: Final = (
    "/messages", "/complete", "/chat/completions", "/completions", "/responses", "/embeddings", "/images/generations",
    "/images/edits", "/images/variations", "/audio/speech", "/audio/transcriptions", "/audio/translations",
)  # fmt: skip
_UNBOOKABLE: Final = (
    "/messages/batches", "/batches", "/fine_tuning/jobs", "/videos", "/evals/x/runs", "/threads/runs",
    "/threads/x/runs", "/sessions", "/sessions/x/events", "/realtime/sessions", "/realtime/client_secrets",
)  # fmt: skip


def _route(text: str) -> str:
    if why := routes.why_not(text):
        raise ValueError(why)
    return text


def _base_url(text: str) -> str:
    """Without slashes at its end. One that no call could use is refused here: later, each call would fail."""
    if not text.startswith(("http://", "https://")):
        raise ValueError("it must begin with http:// or https://")
    if re.search(r"[\s?#\\]", text) or not text.isprintable():
        raise ValueError("it can't have spaces, backslashes, a query (?) or a fragment (#)")
    found = _AUTHORITY.fullmatch(text.split("/")[2])
    if found is None:
        raise ValueError("between // and the next slash must be a host, or HOST:PORT")
    host, port = found["host"], found["port"]
    if port is not None and not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65_536):
        raise ValueError(f"its port {port[:20]!r} is no number from 1 to 65535")
    if not _is_host(host):
        raise ValueError(f"its host {host[:100]!r} is no name or address of a host")
    return text.rstrip("/")


def _is_host(host: str) -> bool:
    try:
        if host.startswith("[") or re.fullmatch(r"[0-9.]+", host):
            return bool(ipaddress.ip_address(host.strip("[]")))
        name = host.encode("idna").decode()
    except (ValueError, UnicodeError):  # a label may be empty, or longer than 63
        return False
    return bool(re.fullmatch(r"[A-Za-z0-9_.-]{1,253}", name))


_Name = Annotated[str, StringConstraints(pattern=SERVICE)]
_Header = Annotated[str, StringConstraints(pattern=HEADER)]
_Route = Annotated[str, pydantic.AfterValidator(_route)]
_BaseUrl = Annotated[str, pydantic.AfterValidator(_base_url)]
_Condition = Annotated[str, StringConstraints(pattern=PRICED)]  # FIELD=VALUE
Kind = Literal[
    "model", "input", "output", "total", "reasoning", "cache_read", "cache_write", "cache_write_1h", "web_search",
    "speed", "inference_geo", "service_tier",
]  # fmt: skip


class Upstream(pydantic.BaseModel):
    """One service, with the fields of the table."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    name: _Name
    base_url: _BaseUrl
    base_url_env: str = ""
    key: _Name
    header: dict[_Header, str] = Field(min_length=1)
    env: dict[str, str] = Field(default_factory=dict)
    metered: tuple[_Route, ...] = ()
    paths: tuple[_Route, ...] = ()
    body_mb: float = Field(default=32, gt=0, le=1024)
    idle_seconds: float = Field(default=600, gt=0, le=86_400)
    output_limit: tuple[str, ...] = ()
    output_default: int = Field(default=8192, gt=0)
    answers: tuple[str, ...] = ()
    surcharges: tuple[_Condition, ...] = ()
    fields: tuple[str, ...] = ()
    tools: dict[str, Annotated[int, Field(ge=0, le=10**9)]] = Field(default_factory=dict)
    limited_tools: tuple[str, ...] = ()
    stored_prompts: tuple[str, ...] = ()
    context_tokens: int = Field(default=1_000_000, gt=0, le=10**9)
    image_tokens: int = Field(default=5_000, ge=0, le=10**9)
    count: str = Field(default="", pattern=PATH)
    count_fields: tuple[str, ...] = ()
    list_price: tuple[_Condition, ...] = ()
    finished: tuple[str, ...] = ()
    iterations: tuple[str, ...] = ()
    searched: tuple[_Condition, ...] = ()
    text: tuple[str, ...] = ()
    cache_in_input: bool = False
    stream_body: dict[str, Any] = Field(default_factory=dict)
    usage: dict[Kind, tuple[str, ...]] = Field(default_factory=dict)
    refused: tuple[str, ...] = ()
    client_tools: tuple[str, ...] = ()
    differs: dict[_Route, dict[str, Any]] = Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _check_differs(self) -> Upstream:
        for route, fields in self.differs.items():
            if route not in self.metered:
                raise ValueError(f"differs has {route!r}, which is not in metered")
            whole = Upstream.model_validate({**self.model_dump(exclude={"differs"}), **fields})
            self.differs[route] = {name: getattr(whole, name) for name in fields}  # `dialect` validates nothing
        return self

    def dialect(self, method: str, path: str) -> Upstream:
        """This service, as it is for a call that `route` found to be metered."""
        route = routes.find(method, path, self.differs) or routes.might_mean(method, path, self.differs)
        return self.model_copy(update=self.differs[route]) if route else self

    @pydantic.model_validator(mode="after")
    def _one_authorization(self) -> Upstream:
        if "@" in self.base_url.split("/")[2] and "authorization" in map(str.lower, self.header):
            raise ValueError(
                "base_url: a user and a password in it are an authorization header, and `header` has another"
            )
        return self

    @property
    def key_env(self) -> str:
        return self.key.upper().replace("-", "_")

    def route(self, method: str, path: str) -> Literal["metered", "plain"] | None:
        """The kind of this call; None when the path is not allowed. ``path`` is the raw path."""
        if routes.find(method, path, self.metered):
            return "metered"
        if not routes.find(method, path, self.paths):
            return None
        return "metered" if routes.might_mean(method, path, self.metered) else "plain"


def load(own: Path | None, environment: Mapping[str, str]) -> dict[str, Upstream]:
    """The built-in table, with the user's own file merged over it. Raises UsageError with the file and the field."""
    table = tomllib.loads(SHIPPED.read_text())
    if own is not None:
        try:
            given = tomllib.loads(own.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"the table of upstreams {own} can't be read: {reason(error)}; correct it") from None
        for name, fields in given.items():
            if not isinstance(fields, dict):
                raise UsageError(f"the table of upstreams {own}: {name} must be a table: [{name}]")
            like = fields.pop("like", name)
            if not isinstance(like, str):
                raise UsageError(f"the table of upstreams {own}: [{name}]: `like` must be the name of a service above")
            if like != name and like not in table:
                raise UsageError(
                    f"the table of upstreams {own}: [{name}] is to be like {like!r}, which is not above it"
                )
            merged = {**table.get(like, {}), **fields}
            if "differs" not in fields:  # what is no longer metered differs in nothing
                kept = merged.get("metered", ())
                merged["differs"] = {route: more for route, more in merged.get("differs", {}).items() if route in kept}
            table[name] = merged
    found = {}
    for name, fields in table.items():
        where = f"the table of upstreams {own or SHIPPED}: [{name}]"
        try:
            variable = str(fields.get("base_url_env", ""))
            if override := environment.get(variable, "") if variable else "":
                fields, where = {**fields, "base_url": override}, f"{variable}, or {where}"
            found[name] = Upstream.model_validate({**fields, "name": name})
        except pydantic.ValidationError as error:
            raise UsageError(f"{where}: {sentence(error, Upstream)}") from None
        if why := _unbooked(found[name]):
            raise UsageError(f"{where}: {why}")
    return found


def _unbooked(upstream: Upstream) -> str:
    """Which of its routes allows a call that is billed and not booked; '' if none does."""
    host = urlsplit(upstream.base_url).hostname or ""
    if not upstream.metered and not host.endswith(("anthropic.com", "openai.com")):
        return ""
    for path in (f"{prefix}{tail}" for tail in (*_BILLED, *_UNBOOKABLE) for prefix in ("/v1", "")):
        free = [route for route in upstream.paths if _allows(route, path)]
        metered = [route for route in upstream.metered if _allows(route, path)]
        if path.removeprefix("/v1") in _UNBOOKABLE and (free or metered):
            return (
                f"{(free + metered)[0]!r} allows POST {path}, which no budget can bound: no answer says what it costs"
            )
        if free and not metered:
            return f"{free[0]!r} in `paths` allows POST {path}, which is billed: it belongs in `metered`, or nowhere"
    return ""


def _allows(route: str, path: str) -> bool:
    """Also if it spells the path in a way that only some servers read as that one."""
    method, _, spelled = route.partition(" ")
    odd = method == "POST" and "*" not in spelled and routes.might_mean("POST", spelled, [f"POST {path}"])
    return bool(odd or routes.find("POST", path, [route]))


def variables(table: Mapping[str, Upstream]) -> frozenset[str]:
    """The variables of the host's environment that keys and URLs come from."""
    names = {"CREDENTIALS_DIRECTORY"}
    for upstream in table.values():
        names |= {upstream.base_url_env, upstream.key_env, f"{upstream.key_env}_FILE"}
    return frozenset(names - {""})


SecretOf = Callable[[str], Awaitable[str | None]]


class UpstreamKeys:
    """Finds the keys of services. They are read again for each attempt, and kept only in memory."""

    def __init__(self, *, environment: Mapping[str, str] | None = None, secret: SecretOf | None = None) -> None:
        self._environment = os.environ if environment is None else environment
        self._secret = secret

    async def find(self, upstream: Upstream) -> str | None:
        """The key, or None. Raises UsageError for a file that can't be read or doesn't hold a key."""
        if key := self._environment.get(upstream.key_env, "").strip():
            return _checked(key, upstream.key_env)
        if file := self._environment.get(f"{upstream.key_env}_FILE", ""):
            return _read(Path(file), f"{upstream.key_env}_FILE")
        if credentials := self._environment.get("CREDENTIALS_DIRECTORY", ""):
            credential = Path(credentials) / upstream.key
            if credential.is_file():
                return _read(credential, "the systemd credential")
        if self._secret is not None and (kept := await self._secret(upstream.key)):
            return _checked(kept.strip(), f"the secret {upstream.key}")
        return None

    @staticmethod
    def how_to_set(upstream: Upstream) -> str:
        return (
            f"set {upstream.key_env} in the environment of the engine, or run `swarm secret set {upstream.key}` "
            "(the VM never gets it: the gateway adds it)"
        )


class Services:
    """Which services attempts may use, each with its key."""

    def __init__(self, *, upstreams: Mapping[str, Upstream], keys: UpstreamKeys) -> None:
        self._upstreams = upstreams
        self._keys = keys

    async def of(self, policy: Policy) -> dict[str, tuple[Upstream, str]]:
        """The services of a policy, each with its key. Raises UsageError: one sentence on what is missing."""
        found = {}
        for name in policy.upstreams:
            upstream = self._upstreams.get(name)
            if upstream is None:
                known = ", ".join(sorted(self._upstreams))
                raise UsageError(f"the gateway knows no service {name!r}; it knows {known} (docs/claude.md)")
            key = await self._keys.find(upstream)
            if key is None:
                raise UsageError(f"no key for {name} on this host: {UpstreamKeys.how_to_set(upstream)}")
            found[name] = (upstream, key)
        return found


def environment(services: Mapping[str, tuple[Upstream, str]], *, url: str, token: str) -> dict[str, str]:
    """The variables by which an agent's programs find services. The first service has the plain URL, and of services
    with the same variables the first has these; those of the others begin with the service's name: ``VLLM_OPENAI_…``"""
    found: dict[str, str] = {}
    for number, (name, (upstream, _)) in enumerate(services.items()):
        base = url if number == 0 else f"{url}/{name}"
        taken = not found.keys().isdisjoint(upstream.env)
        for variable, text in upstream.env.items():
            own = f"{name.upper().replace('-', '_')}_{variable}" if taken else variable
            found.setdefault(own, text.replace("{url}", base).replace("{token}", token))
    return found


def _read(file: Path, where: str) -> str:
    try:
        if file.stat().st_size > _MAX_KEY_BYTES:
            raise UsageError(f"{where}: {file} is too large for a key")
        return _checked(file.read_text().strip(), f"{where}: {file}")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: {file} can't be read: {error}") from None


def _checked(key: str, where: str) -> str:
    """A key goes into a header: one line of printable ASCII. The message never shows it."""
    if not key or not key.isascii() or not key.isprintable():
        raise UsageError(f"{where} does not hold a key: it must be one line of printable characters")
    return key
