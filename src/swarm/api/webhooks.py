"""`POST /hooks/NAME`: a signed request becomes a ticket that runs the workflow NAME.

202 with the ticket's id; all other answers are problems (`swarm.api.problem`). Nothing of a request is trusted or
stored before its signature is verified.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from swarm.api import body as bodies
from swarm.api.endpoint import guarded
from swarm.api.problem import RETRY_SECONDS, Refused, busy
from swarm.base import jsontext
from swarm.base.log import logger
from swarm.cel.evaluate import Evaluator
from swarm.errors import Conflict, HostError, NotFound, StoreError
from swarm.store.registry.webhooks import WebhookCall
from swarm.store.registry.workflows import WorkflowRow
from swarm.store.sql.rows import iso, new_id
from swarm.store.store import Store
from swarm.store.tickets.validation import storable
from swarm.triggers import schedules
from swarm.triggers.schedules import InputsRefused
from swarm.workflow.definition import Webhook, Workflow

log = logger(__name__)

MAX_BODY_BYTES: Final = 1 << 20
MAX_KEY_CHARS: Final = 255
LEAST_SECRET_BYTES: Final = 16
MAX_AT_ONCE: Final = 32
_KEPT: Final = 32
TIMESTAMP_HEADER: Final = "X-Swarm-Timestamp"
TIMESTAMP_SECONDS: Final = 300  # allowed clock difference and transmission time

_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# Headers whose names suggest that their values are confidential.
_CONFIDENTIAL: Final = re.compile(r"auth|cookie|key|pass|secret|signature|token")


def sign(secret: bytes, body: bytes, timestamp: str | None = None) -> str:
    """The value of the signature header."""
    signed = body if timestamp is None else timestamp.encode() + b"." + body
    return "sha256=" + hmac.new(secret, signed, hashlib.sha256).hexdigest()


class Hooks:
    """``secret`` returns the secret of this name and workflow, or None. It may raise HostError."""

    def __init__(
        self,
        *,
        store: Store,
        secret: Callable[[str, str], Awaitable[str | None]],
        evaluator: Evaluator,
        strangers: bodies.Strangers,
    ) -> None:
        self._store = store
        self._get_secret = secret
        self._evaluator = evaluator
        self._strangers = strangers
        self._busy = 0
        self._flows: dict[str, tuple[str, Workflow]] = {}  # by id, with what they were read from

    def route(self) -> Route:
        async def post(request: Request) -> Response:
            return await guarded(lambda: self._post(request))

        return Route("/hooks/{name}", post, methods=["POST"])

    async def _post(self, request: Request) -> Response:
        try:
            return await self._receive(request)
        except StoreError as error:
            log.warning("a webhook could not be served", error=str(error))
            raise _try_again("the database can't take it now") from None

    async def _receive(self, request: Request) -> Response:
        """Only a request that has arrived whole takes a place."""
        async with self._strangers.place():
            body = await bodies.read(request, MAX_BODY_BYTES)
        if self._busy >= MAX_AT_ONCE:
            raise _try_again("too many requests at once")
        self._busy += 1
        try:
            return await self._serve(request, body)
        finally:
            self._busy -= 1

    async def _serve(self, request: Request, body: bytes) -> Response:
        row, flow = await self._workflow(request.path_params["name"])
        hook = flow.webhook
        if hook is None:
            raise _no_hook(row.name)
        given, timestamp = _signature(request.headers, hook)  # before the secret is fetched: anybody may send anything
        signature = _verified(given, timestamp, hook, await self._secret(row.name, hook), body)
        # From here on the sender is authenticated.
        if not row.enabled:
            raise Refused(409, f"the workflow {row.name}@{row.version} is disabled")
        key = _key(request.headers, hook)
        now_ms = time.time_ns() // 1_000_000
        trigger = {
            "type": "webhook",
            "time": iso(now_ms),
            "body": _json(body, request.headers.get("content-type", "")),
            "headers": _trigger_headers(request.headers, hook),
            "key": key,
        }
        try:
            ticket = await asyncio.to_thread(
                schedules.ticket,
                flow,
                row.id,
                hook.inputs,
                trigger,
                evaluator=self._evaluator,
                id=new_id(now_ms),
                title=f"{flow.name}, webhook {trigger['time'][:16].replace('T', ' ')} UTC",
            )
            digest = hashlib.sha256(body).hexdigest()
            call = WebhookCall(workflow=row.name, signature=signature, key=key, digest=digest, ticket=ticket)
            answer = await self._store.call_webhook(call)
        except InputsRefused as error:
            raise Refused(422, str(error)) from None
        except Conflict as error:
            raise Refused(409, str(error)) from None
        log.info("webhook", workflow=row.name, ticket=answer.ticket_id, repeated=answer.repeated)
        shown = {"ticket_id": answer.ticket_id, "workflow": f"{row.name}@{row.version}", "repeated": answer.repeated}
        return JSONResponse(shown, status_code=202)

    async def _workflow(self, name: str) -> tuple[WorkflowRow, Workflow]:
        if not _NAME.fullmatch(name):
            raise _no_hook(name[:80])
        try:
            row = await self._store.workflow(name)
        except NotFound:
            raise _no_hook(name) from None
        try:
            return row, await self.flow(row)
        except StoreError as error:  # this row is broken, not the database
            log.error("a webhook's workflow is broken", workflow=name, error=str(error))
            raise Refused(500, f"the workflow {name} is broken here; its owner must add it again") from None

    async def flow(self, row: WorkflowRow) -> Workflow:
        """Kept: senders that are not known yet can't have a large one read again and again."""
        kept = self._flows.get(row.id)
        if kept is None or kept[0] != row.definition:
            kept = self._flows[row.id] = row.definition, await asyncio.to_thread(row.parsed)
            if len(self._flows) > _KEPT:
                del self._flows[next(iter(self._flows))]
        return kept[1]

    async def _secret(self, name: str, hook: Webhook) -> bytes:
        found, why = b"", f"not set; `swarm workflow webhook {name}` makes it"
        try:
            found = (await self._get_secret(hook.secret, name) or "").encode()
        except HostError as error:
            why = str(error)
        if found and len(found) < LEAST_SECRET_BYTES:
            found, why = b"", f"it has fewer than {LEAST_SECRET_BYTES} bytes and could be guessed"
        if not found:
            log.error("a webhook has no secret", workflow=name, secret=hook.secret, error=why)
            raise Refused(500, f"the webhook of {name} has no secret here; its owner must give it one")
        return found


def _signature(headers: Mapping[str, str], hook: Webhook) -> tuple[str, str | None]:
    """What the sender gave, and the timestamp that is signed too, if the hook wants one."""
    given = headers.get(hook.header)
    if given is None:
        raise Refused(401, f"the header {hook.header} is missing: sha256= and the HMAC-SHA256 in hex")
    timestamp = headers.get(TIMESTAMP_HEADER) if hook.timestamp else None
    if hook.timestamp and timestamp is None:
        raise Refused(401, f"the header {TIMESTAMP_HEADER} is missing: the seconds since 1970, signed too")
    return given, timestamp


def _verified(given: str, timestamp: str | None, hook: Webhook, secret: bytes, body: bytes) -> str:
    """The signature, as `sign` writes it."""
    expected = sign(secret, body, timestamp)
    if not hmac.compare_digest(given.strip().lower().encode("latin-1"), expected.encode()):
        what = f"{TIMESTAMP_HEADER}, a dot and the body" if hook.timestamp else "the body"
        raise Refused(401, f"the signature in {hook.header} is wrong: sign {what} with this hook's secret")
    if timestamp is not None:
        if not re.fullmatch(r"[0-9]{1,12}", timestamp):
            raise Refused(401, f"{TIMESTAMP_HEADER} must be the seconds since 1970, a whole number")
        if abs(time.time() - int(timestamp)) > TIMESTAMP_SECONDS:
            raise Refused(401, f"{TIMESTAMP_HEADER} is more than {TIMESTAMP_SECONDS} s off: is a clock wrong?")
    return expected


def _key(headers: Mapping[str, str], hook: Webhook) -> str | None:
    key = headers.get(hook.idempotency)
    if key is not None and not (0 < len(key) <= MAX_KEY_CHARS and key.isprintable()):
        raise Refused(400, f"the header {hook.idempotency} must have 1 to {MAX_KEY_CHARS} printable characters")
    return key


def _json(body: bytes, content_type: str) -> Any:
    try:
        return jsontext.loads(body.decode("utf-8"))
    except jsontext.TooDeep as error:
        raise Refused(400, f"the body is {error}") from None
    except ValueError as error:
        kind = content_type.partition(";")[0].strip().lower()[:80]
        if kind and "json" not in kind:
            why = f"but {kind}: send it with Content-Type: application/json (GitHub: set the content type of the hook)"
            raise Refused(400, f"the body must be JSON in UTF-8, {why}") from None
        what = "is empty, not JSON" if not body else f"is not JSON in UTF-8 ({error})"
        raise Refused(400, f"the body {what}: send a JSON value, such as {{}}") from None


def _trigger_headers(headers: Mapping[str, str], hook: Webhook) -> dict[str, str]:
    """The headers that expressions can use and the row keeps: often a header names the event."""
    hidden = hook.header.lower()
    return {
        name: text
        for name, text in headers.items()
        if name != hidden and not _CONFIDENTIAL.search(name) and storable(text)
    }


def _no_hook(name: str) -> Refused:
    return Refused(404, f"no workflow {name!r} takes webhooks here")


def _try_again(why: str) -> Refused:
    return busy(f"{why}: try again in {RETRY_SECONDS} s")
