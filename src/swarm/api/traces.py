"""Traces for OpenTelemetry: one for each ticket, made of its rows when it has ended, and sent by OTLP/HTTP (as JSON) to
where `OTEL_EXPORTER_OTLP_ENDPOINT` says. The engine does nothing for it. At least once: the position moves on when the
collector has taken the spans, and a repeated span has the same id."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

import httpx

from swarm.api.feed import Feed
from swarm.base import trace
from swarm.base.clock import PHASES
from swarm.base.log import logger
from swarm.errors import NotFound, StoreError
from swarm.model import TERMINAL_TICKET_STATES, Ticket
from swarm.store.sql.rows import LONGEST_MS, milliseconds
from swarm.store.store import Store
from swarm.store.tickets.display import ModelCall
from swarm.store.tickets.facts import Traced, ended_as

log = logger(__name__)

POSITION: Final = "traces"
SPANS: Final = 5000  # of one trace; further ones are left out
_CALLS: Final = 1000
_EVENTS_AT_ONCE: Final = 5000
_TRIES: Final = 10  # of one trace, some five minutes; while no connection is made, none is given up
_CHECK_SECONDS: Final = 30.0
_EVERY_SECONDS: Final = 1.0
_LONGEST_PAUSE_SECONDS: Final = 60.0
_NO_ANSWER: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_INTERNAL, _CLIENT = 1, 3  # SpanKind
_ERROR: Final = 2  # StatusCode
_OPERATION: Final = "chat"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where spans go, as the variables of OpenTelemetry's specification say."""

    url: str
    headers: Mapping[str, str]
    timeout_seconds: float
    resource: Mapping[str, str]


def target(env: Mapping[str, str] = os.environ) -> Target | None:
    """None if nothing is to be exported; a wrong URL or header is logged once."""
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true" or env.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return None
    url = env.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "")
    if not url and (base := env.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")):
        url = f"{base.rstrip('/')}/v1/traces"
    if not url:
        return None
    headers = _pairs(env.get("OTEL_EXPORTER_OTLP_TRACES_HEADERS") or env.get("OTEL_EXPORTER_OTLP_HEADERS", ""))
    if why := _wrong(url, headers):
        log.warning("no traces are exported: OpenTelemetry's variables are wrong", error=why)
        return None
    timeout = env.get("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT") or env.get("OTEL_EXPORTER_OTLP_TIMEOUT") or "10000"
    resource = _pairs(env.get("OTEL_RESOURCE_ATTRIBUTES", ""))
    return Target(
        url=url,
        headers=headers,
        timeout_seconds=min(60.0, int(timeout) / 1000) if timeout.isdecimal() else 10.0,
        resource={"service.name": "swarm"} | resource | _named(env.get("OTEL_SERVICE_NAME")),
    )


def _wrong(url: str, headers: Mapping[str, str]) -> str:
    """Why nothing can be sent there; '' if something can. Found later, it would end the server, with the first ticket
    that ends."""
    try:
        with httpx.Client(headers=dict(headers)):  # a proxy of the environment may be wrong too
            parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError, OSError) as error:
        return str(error)
    if parsed.scheme not in ("http", "https") or not parsed.host or not 0 < (parsed.port or 1) < 65536:
        return "the endpoint is no http or https URL"
    return ""


def _named(name: str | None) -> dict[str, str]:
    return {"service.name": name} if name else {}


def _pairs(text: str) -> dict[str, str]:
    """`name=value,name=value`, percent-encoded."""
    parts = [one.partition("=") for one in text.split(",")]
    return {unquote(name).strip(): unquote(value).strip() for name, _, value in parts if name.strip()}


async def export(
    store: Store, feed: Feed, to: Target, *, at_once: int = _EVENTS_AT_ONCE, pause_seconds: float = _EVERY_SECONDS
) -> None:
    """Never ends by itself. Begins, the first time, with what ends from now on."""
    tries, pause = 0, pause_seconds  # of the trace that is next
    async with httpx.AsyncClient(headers=dict(to.headers), timeout=to.timeout_seconds) as client:
        while True:
            since = feed.now()
            try:
                after = await store.position(POSITION)
                facts = await store.facts(after=after, limit=at_once)
                for event in facts.events:
                    if ended_as(event):
                        await _send(store, client, to, event.ticket_id, last=tries + 1 >= _TRIES)
                        await store.set_position(POSITION, event.seq)  # what was taken is not sent again
                        tries, pause = 0, pause_seconds
                if facts.after != after:
                    await store.set_position(POSITION, facts.after)
                pause = pause_seconds
            except (StoreError, httpx.HTTPError) as error:
                log.warning("can't export traces", error=str(error) or type(error).__name__, again_in_seconds=pause)
                if not isinstance(error, (StoreError, *_NO_ANSWER)):
                    tries += 1
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            if not facts.more:
                await feed.changed(since, timeout_seconds=_CHECK_SECONDS)
                await asyncio.sleep(pause_seconds)


async def _send(store: Store, client: httpx.AsyncClient, to: Target, ticket_id: str, *, last: bool) -> None:
    """Raises httpx.HTTPError if it is to be tried again: always when nobody answers, and unless this try is the
    ``last`` when this trace may be why."""
    try:
        ticket = await store.ticket(ticket_id)
    except NotFound:  # deleted meanwhile
        return
    if ticket.state not in TERMINAL_TICKET_STATES:  # it runs again, and will end again
        return
    names = await store.names((ticket.agent_id, ticket.workflow_id))
    name = names.get(ticket.workflow_id or ticket.agent_id or "", "?")
    rows = await store.traced(ticket_id, run_id=ticket.run_id, limit=SPANS)
    calls = await store.model_calls(ticket_id, limit=_CALLS)
    try:
        body = await asyncio.to_thread(_body, to, ticket, rows, calls, name)
    except (ValueError, TypeError, OverflowError) as error:  # another program wrote its rows
        log.warning("a ticket makes no trace", ticket=ticket_id, error=str(error))
        return
    try:
        answer = await client.post(to.url, content=body, headers={"content-type": "application/json"})
        if answer.status_code in (408, 429) or answer.status_code >= 500:
            answer.raise_for_status()
    except _NO_ANSWER:
        raise
    except httpx.HTTPError as error:
        if not last:
            raise
        log.warning("a trace is given up", ticket=ticket_id, error=str(error) or type(error).__name__)
        return
    if answer.status_code >= 300:  # it will never take them
        log.warning("the collector refused a trace", ticket=ticket_id, status=answer.status_code)


def _body(to: Target, ticket: Ticket, rows: Traced, calls: Sequence[ModelCall], name: str) -> bytes:
    scope = {"scope": {"name": "swarm"}, "spans": spans(ticket, rows, calls, name)}
    resource = {"attributes": _attributes(to.resource)}
    return json.dumps({"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]}).encode()


def nanoseconds(ms: float) -> str:
    """Of a time: by whole microseconds, since a float has no more digits."""
    return str(round(ms * 1000) * 1000)


def spans(ticket: Ticket, rows: Traced, calls: Sequence[ModelCall], name: str) -> list[dict[str, Any]]:
    """Those of a ticket's last run: the ticket, its steps, their attempts, the phases of each, and model calls."""
    given = trace.parent(ticket.trigger_data)
    trace_id = trace.trace_id(ticket.id, ticket.trigger_data)
    root = trace.span_id(ticket.id, ticket.run_id or "")
    found: list[dict[str, Any]] = []

    def add(
        id: str, name: str, parent: str, start: float | None, end: float | None, error: str | None, kind: int,
        **attributes: object,
    ) -> None:  # fmt: skip
        if start is None or len(found) >= SPANS:
            return
        span = {
            "traceId": trace_id,
            "spanId": id,
            "name": name,
            "kind": kind,
            "startTimeUnixNano": nanoseconds(start),
            "endTimeUnixNano": nanoseconds(max(start, end if end is not None else start)),
            "attributes": _attributes({key.replace("__", "."): value for key, value in attributes.items()}),
        }
        if parent:
            span["parentSpanId"] = parent
        if error:
            span["status"] = {"code": _ERROR, "message": error[:1000]}
        found.append(span)

    made = milliseconds(ticket.created_at)
    add(
        root, f"ticket {name}", given[1] if given else "", made, milliseconds(ticket.completed_at), ticket.error,
        _INTERNAL, swarm__ticket__id=ticket.id, swarm__ticket__state=ticket.state, swarm__project=ticket.project_id,
        swarm__run__id=ticket.run_id,
    )  # fmt: skip
    of_step = {step.id: step for step in rows.steps}
    for step in of_step.values():
        start = milliseconds(step.queued_at if step.retry_count == 0 else None) or milliseconds(step.started_at)
        add(
            trace.span_id(step.id), f"step {step.step_id}", root, start, milliseconds(step.completed_at), step.error,
            _INTERNAL, swarm__step__id=step.step_id, swarm__step__status=step.status, swarm__agent=step.agent_name,
        )  # fmt: skip
    kept = [attempt for attempt in rows.attempts if attempt.step_execution_id in of_step]
    for attempt in kept:
        began, step = milliseconds(attempt.started_at), of_step[attempt.step_execution_id]
        own = trace.span_id(attempt.id)
        add(
            own, f"attempt {attempt.number}", trace.span_id(step.id), began, milliseconds(attempt.ended_at),
            attempt.error, _INTERNAL, swarm__attempt__id=attempt.id, swarm__attempt__outcome=attempt.outcome,
            swarm__attempt__reason=attempt.reason, swarm__agent=step.agent_name, swarm__vm=attempt.vm_id,
            swarm__engine=attempt.worker, swarm__cost_usd=attempt.cost_usd,
        )  # fmt: skip
        at = float(began) if began is not None else None
        for phase in PHASES:
            took = attempt.timings.get(phase)
            if took is None or at is None or not 0 <= took < LONGEST_MS:
                continue
            phase_start, at = (at - took, at) if phase == "queue" else (at, at + took)
            add(trace.span_id(attempt.id, phase), phase, own, phase_start, phase_start + took, None, _INTERNAL)
    own_attempts = {attempt.id for attempt in kept}
    for number, call in enumerate(calls):
        called = milliseconds(call.at)
        if call.attempt_id in own_attempts and called is not None:
            failed = call.status is None or call.status >= 400
            add(
                trace.span_id(call.attempt_id or "", "call", call.at, str(number)), f"{_OPERATION} {call.model}",
                trace.span_id(call.attempt_id or ""), called, called + (call.latency_ms or 0.0),
                (call.note or f"status {call.status}") if failed else None, _CLIENT,
                gen_ai__operation__name=_OPERATION, gen_ai__provider__name=call.upstream,
                gen_ai__request__model=call.model, gen_ai__usage__input_tokens=call.input_tokens,
                gen_ai__usage__output_tokens=call.output_tokens,
                gen_ai__usage__cache_read__input_tokens=call.cache_read_tokens,
                gen_ai__usage__cache_creation__input_tokens=call.cache_write_tokens,
                http__response__status_code=call.status, swarm__cost_usd=call.cost_usd,
            )  # fmt: skip
    return found


def _attributes(values: Mapping[str, object]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in values.items() if value is not None]


def _value(value: object) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    return {"doubleValue": value} if isinstance(value, float) else {"stringValue": str(value)[:1000]}
