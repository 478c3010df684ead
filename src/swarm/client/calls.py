"""The requests, and when one is sent again. No I/O: the clients in sync.py and aio.py send."""

from __future__ import annotations

import base64
import json
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote

import httpx

from swarm.client.errors import CommandFailed, Invalid, NotFound, ServerError, Unreachable, refused
from swarm.client.values import Command, Executed, Filters, NewSandbox, Submission, read
from swarm.client.where import Where

# Of any number of waits, so many ask at a time, for so long: other calls find a connection.
WAITS: Final = 32
POLL_SECONDS: Final = 5.0
PAGE: Final = 200
_BUILD_SECONDS: Final = 3600.0  # of an agent's packages
START_SECONDS: Final = 900.0  # of a sandbox: its VM may boot without KVM, and wait for room
_VERY_LONG_SECONDS: Final = 30 * 86_400.0
_FIRST_DELAY_SECONDS: Final = 0.1
_MAX_DELAY_SECONDS: Final = 5.0
_MAX_RETRY_AFTER_SECONDS: Final = 60.0
_BUSY: Final = frozenset({502, 503, 504})  # the first and the last are a proxy's
# Then no server has seen the request.
_NOT_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request. ``repeatable``: to do it twice is the same as to do it once."""

    method: str
    path: str
    query: Mapping[str, Any] = field(default_factory=dict)
    body: Any = None
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = False
    extra_seconds: float = 0.0  # how long the server may think about it

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        timeout = http.timeout.as_dict()
        if timeout["read"] is not None:
            timeout["read"] += self.extra_seconds
        return http.build_request(
            self.method,
            self.path,
            params={name: each for name, each in self.query.items() if each not in (None, "", ())} or None,
            json=self.body,
            content=self.content,
            headers=dict(self.headers),
            timeout=httpx.Timeout(**timeout),
        )


@dataclass(kw_only=True)
class Server:
    """``retry_seconds``: how long a call is sent again; ``reached``: whether anything ever listened there."""

    where: Where
    retry_seconds: float
    reached: bool = False

    def tries(self, call: Call) -> Tries:
        return Tries(call, self)


class Tries:
    """The tries of one call. Anything that no server has seen or that a server refused at once is sent again; what may
    have been done, only if it is repeatable. All of them together take `Server.retry_seconds` at most, from the first
    fault on; `went_well` begins anew. A server that was never reached is not waited for: it isn't running."""

    def __init__(self, call: Call, server: Server) -> None:
        self._call, self._server, self._where = call, server, server.where
        self._faults, self._end = 0, 0.0
        self._unsure = False  # a try before this one may have been done

    def went_well(self) -> None:
        self._faults = 0

    def broke(self, error: httpx.TransportError) -> float:
        """How long to wait before the next try. Raises Unreachable if there is none."""
        sent = not isinstance(error, _NOT_SENT)
        self._unsure = self._unsure or sent
        self._server.reached = self._server.reached or sent
        again = self._call.repeatable if sent else self._server.reached
        if again and (delay := self._delay()) is not None:
            return delay
        said = str(error) or type(error).__name__
        changes = self._call.method != "GET"
        if self._unsure and changes:
            what = f"{self._call.method} {self._call.path}"
            said = f"the connection broke ({said}) and nobody knows whether {what} was done"
        else:
            said = f"the connection broke: {said}" if sent else f"{self._where.silence} ({said})"
        raise Unreachable(said, may_be_done=self._unsure and changes) from error

    def cut(self) -> float:
        """The same, after an answer that ended too early."""
        return self.broke(httpx.RemoteProtocolError("the server ended the answer"))

    def answered(self, response: httpx.Response) -> float | None:
        """How long to wait before the next try; None: this is the answer."""
        status = response.status_code
        self._server.reached = True
        if status == 429 or (status in _BUSY and self._call.repeatable):
            self._unsure = self._unsure or status != 429
            return self._delay(response.headers.get("retry-after", ""))
        return None

    def value(self, response: httpx.Response) -> Any:
        """What a read answer says. Raises SwarmError."""
        status = response.status_code
        if status == 404 and self._call.method == "DELETE" and self._unsure:
            return None  # a try before this one did it
        if status == 401 and self._where.token is None:
            how = "set SWARM_TOKEN, or give `token` (`swarm token create` makes one)"
            raise refused(status, f"{self._where.url} needs a token: {how}")
        if not 200 <= status < 300:
            raise refused(status, _detail(response))
        if status == 204 or not response.content:
            return None
        try:
            return json.loads(response.content)
        except ValueError:
            raise ServerError(f"the answer of {self._where.url} is not JSON: is it Swarm's server?") from None

    def _delay(self, retry_after: str = "") -> float | None:
        now = time.monotonic()
        if not self._faults:
            self._end = now + self._server.retry_seconds
        self._faults += 1
        delay = min(_FIRST_DELAY_SECONDS * 2 ** min(self._faults - 1, 20), _MAX_DELAY_SECONDS) * random.uniform(
            0.5, 1.0
        )
        if retry_after.isdecimal():
            delay += min(int(retry_after[:6]), _MAX_RETRY_AFTER_SECONDS)
        return delay if now + delay < self._end else None


def _detail(response: httpx.Response) -> str:
    try:
        said = json.loads(response.content)["detail"]
    except (ValueError, LookupError, TypeError):
        said = None
    if isinstance(said, str):
        return said
    return f"the server answered {response.status_code} {response.reason_phrase}: {response.text[:200]!r}"


def get(path: str, **query: Any) -> Call:
    return Call(method="GET", path=path, query=query, repeatable=True)


def new_id(given: Submission) -> str:
    if given.get("files") and given.get("key"):
        raise Invalid("give `files` or a `key`: files are sent for one ticket")
    return given.get("id") or str(uuid.uuid4())


def send_files(id: str, archive: bytes) -> Call:
    """For the ticket that will have this id."""
    return _upload("/v1/files", archive, "application/x-tar", {"ticket": id})


def submit(agent: str | None, given: Submission, id: str, files: Mapping[str, str]) -> Call:
    """Made once for all tries, so that they have one key. ``files``: digests by place, sent for this ``id``."""
    body: dict[str, Any] = {name: each for name, each in given.items() if name not in ("key", "prompt", "files")}
    if agent is not None:
        body["agent"] = agent
    inputs = dict(given.get("inputs", {}))
    if (prompt := given.get("prompt")) is not None:
        inputs["prompt"] = prompt
    if files:
        inputs["$files"], body["id"] = files, id
    named = (prompt or "").strip().partition("\n")[0][:200]
    body["title"] = given.get("title") or named or agent or given.get("workflow") or ""
    body["inputs"] = inputs
    return _once("/v1/tickets", body, given.get("key"))


def run(ref: str, inputs: Mapping[str, Any]) -> Call:
    return _once(named("workflows", ref, "runs"), {"inputs": inputs}, None)


def _once(path: str, body: Mapping[str, Any], key: str | None) -> Call:
    key = key or str(uuid.uuid4())
    if not (key.isascii() and key.isprintable()):
        raise Invalid("a key must be printable ASCII")
    return Call(method="POST", path=path, body=body, headers={"idempotency-key": key}, repeatable=True)


def named(kind: str, name: str, verb: str = "") -> str:
    if name in ("", ".", ".."):
        raise NotFound(f"{name!r} is no name")  # in an address it would name something else
    return f"/v1/{kind}/{quote(name, safe='')}" + (f"/{verb}" if verb else "")


def ticket(id: str, verb: str = "") -> str:
    return named("tickets", id, verb)


def upload_workflow(text: bytes, verb: str = "") -> Call:
    return _upload(f"/v1/workflows{verb}", text, "application/yaml")


def upload_agent(archive: bytes, *, dev: bool) -> Call:
    return _upload("/v1/agents", archive, "application/gzip", {"dev": "true"} if dev else {})


def _upload(path: str, content: bytes, kind: str, query: Mapping[str, str] | None = None) -> Call:
    """To register the same twice is to do it once."""
    return Call(
        method="POST",
        path=path,
        query=query or {},
        content=content,
        headers={"content-type": kind},
        repeatable=True,
        extra_seconds=_BUILD_SECONDS,
    )


def sandbox(id: str, verb: str = "") -> str:
    return named("sandboxes", id, verb)


def create_sandbox(given: NewSandbox) -> Call:
    return Call(method="POST", path="/v1/sandboxes", body=dict(given))


def execute(id: str, argv: Sequence[str], given: Command) -> Call:
    """One word with spaces in it is a line for a shell."""
    if not argv:
        raise Invalid("which command?")
    words = ["/bin/sh", "-c", argv[0]] if len(argv) == 1 and " " in argv[0].strip() else list(argv)
    body: dict[str, Any] = {name: each for name, each in given.items() if name not in ("stdin", "check")}
    stdin = given.get("stdin", b"")
    if stdin:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        body["stdin_base64"] = base64.b64encode(data).decode()
    body |= {"argv": words, "encoding": "base64"}
    seconds = given.get("timeout_seconds")
    return Call(
        method="POST",
        path=sandbox(id, "exec"),
        body=body,
        extra_seconds=START_SECONDS + (seconds if seconds is not None else _VERY_LONG_SECONDS),
    )


def executed(data: Mapping[str, Any], given: Command) -> Executed:
    """Raises CommandFailed, if it was to be checked."""
    texts = {"output": base64.b64decode(data["stdout"]), "errors": base64.b64decode(data["stderr"])}
    found = read(Executed, data, **texts)
    if given.get("check") and not found.ok and not given.get("background"):
        raise CommandFailed(found)
    return found


def process(id: str, process: str, verb: str) -> str:
    return named("sandboxes", id, f"processes/{quote(process, safe='')}/{verb}")


def signal(id: str, name: str, signal: str) -> Call:
    return _slow("POST", process(id, name, "signal"), body={"signal": signal})


def write_file(id: str, path: str, data: bytes | str, mode: int) -> Call:
    content = data.encode() if isinstance(data, str) else data
    return Call(
        method="PUT",
        path=sandbox(id, "files/content"),
        query={"path": path, "mode": f"{mode:o}"},
        content=content,
        headers={"content-type": "application/octet-stream"},
        repeatable=True,
        extra_seconds=START_SECONDS,
    )


def put_archive(id: str, path: str, archive: bytes) -> Call:
    return Call(
        method="PUT",
        path=sandbox(id, "files/archive"),
        query={"path": path},
        content=archive,
        headers={"content-type": "application/x-tar"},
        repeatable=True,
        extra_seconds=_BUILD_SECONDS,
    )


def in_sandbox(id: str, what: str, **query: Any) -> Call:
    """It may be paused, or not have started."""
    return _slow("GET", sandbox(id, what), query=query, repeatable=True)


def remove_file(id: str, path: str, *, recursive: bool) -> Call:
    return _slow("DELETE", sandbox(id, "files"), query={"path": path, "recursive": "true" if recursive else ""})


def change_sandbox(id: str, verb: str) -> Call:
    """To pause or resume twice is to do it once."""
    return _slow("POST", sandbox(id, verb), repeatable=True)


def act_on_sandbox(id: str, verb: str, **body: Any) -> Call:
    return _slow("POST", sandbox(id, verb), body={name: each for name, each in body.items() if each is not None})


def end_sandbox(id: str) -> Call:
    return _slow("DELETE", sandbox(id), repeatable=True)


def remove_snapshot(id: str) -> Call:
    return Call(method="DELETE", path=named("snapshots", id), repeatable=True)


def _slow(method: str, path: str, **more: Any) -> Call:
    return Call(method=method, path=path, extra_seconds=START_SECONDS, **more)


def page(filters: Filters, after: str | None) -> Call:
    return get("/v1/tickets", **filters, limit=PAGE, after=after)


def wait(id: str, seconds: float, kind: str = "tickets") -> Call:
    call = get(named(kind, id, "wait"), timeout_seconds=seconds)
    return Call(**{**vars(call), "extra_seconds": seconds})


def cancel(id: str) -> Call:
    return Call(method="POST", path=ticket(id, "cancel"), repeatable=True)  # of a cancelled one it does nothing


def act(id: str, verb: str, **body: Any) -> Call:
    """To approve, reject or retry twice is an error of the second: it is not repeated once it may have been done."""
    return Call(method="POST", path=ticket(id, verb), body={n: each for n, each in body.items() if each is not None})


def delete(id: str, *, force: bool) -> Call:
    return Call(method="DELETE", path=ticket(id), query={"force": "true"} if force else {}, repeatable=True)
