"""Traces: what a collector gets when tickets end, once it takes it; and what an agent is told."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from swarm.api import traces
from swarm.api.feed import Feed
from swarm.base import trace
from swarm.model import Event, Failed, FailureReason, Succeeded
from tests.api.served import Served
from tests.api.test_metrics import TIMINGS, work
from tests.conftest import PATIENCE_SECONDS
from tests.dashboard import flows
from tests.serving import serving

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """``answers``: the next statuses; 200 when there are none left."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.resources: list[Any] = []
        self.answers: list[int] = []
        self.taken = asyncio.Event()
        self.never = ""  # what it has a fault with
        self.asked = 0

    async def answer(self, request: web.Request) -> web.Response:
        assert request.path == "/v1/traces"
        self.asked += 1
        if self.answers:
            return web.Response(status=self.answers.pop(0))
        body = await request.json()
        if any(self.never and self.never in str(span) for span in body["resourceSpans"][0]["scopeSpans"][0]["spans"]):
            return web.Response(status=500)
        (one,) = body["resourceSpans"]
        self.resources.append(one["resource"]["attributes"])
        self.spans += one["scopeSpans"][0]["spans"]
        self.headers.append(dict(request.headers))
        self.taken.set()
        return web.Response(text="{}")


@asynccontextmanager
async def exporting(
    served: Served, collector: Collector, env: Mapping[str, str] = {}, *, at_once: int = 5000, pause: float = 1.0
) -> AsyncIterator[None]:
    async with serving(collector.answer) as url, Feed.of(served.store) as feed:
        to = traces.target({"OTEL_EXPORTER_OTLP_ENDPOINT": url, **env})
        assert to is not None
        await served.store.position(traces.POSITION)
        task = asyncio.create_task(traces.export(served.store, feed, to, at_once=at_once, pause_seconds=pause))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def until(collector: Collector, *roots: str) -> dict[str, dict[str, Any]]:
    """All spans by name, once these tickets' are there."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not {f"ticket {name}" for name in roots} <= {span["name"] for span in collector.spans}:
            collector.taken.clear()
            await collector.taken.wait()
    return {span["name"]: span for span in collector.spans}


def attributes(span: dict[str, Any]) -> dict[str, Any]:
    return {one["key"]: next(iter(one["value"].values())) for one in span["attributes"]}


async def test_a_collector_receives_a_trace(served: Served) -> None:
    collector = Collector()
    collector.answers = [503]  # it is tried again, and nothing is lost
    env = {"OTEL_EXPORTER_OTLP_HEADERS": "x-key=a%20b", "OTEL_SERVICE_NAME": "night-shift"}
    async with exporting(served, collector, env):
        body = {"title": "t", "agent": "echo"}
        made = (await served.operator.post("/v1/tickets", json=body, headers={"traceparent": PARENT})).json()
        await work(served)  # claims two, of which the first is that one
        (claim,) = await served.store.claim("w", lease_seconds=60)
        await served.store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings=TIMINGS, vm_time_ms=1)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len({span["traceId"] for span in collector.spans}) < 3:
                collector.taken.clear()
                await collector.taken.wait()
            newest = await served.store.newest_event()
            while await served.store.position(traces.POSITION) < newest:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    assert collector.headers[0]["x-key"] == "a b"
    assert {"key": "service.name", "value": {"stringValue": "night-shift"}} in collector.resources[0]
    ours = [span for span in collector.spans if span["traceId"] == PARENT.split("-")[1]]
    by_name = {span["name"]: span for span in ours}
    root = by_name["ticket echo@1.0.0"]
    assert root["parentSpanId"] == PARENT.split("-")[2]
    assert attributes(root)["swarm.ticket.id"] == made["id"]
    step, attempt, boot, agent = (by_name[name] for name in ("step main", "attempt 1", "boot", "agent"))
    assert (step["parentSpanId"], attempt["parentSpanId"]) == (root["spanId"], step["spanId"])
    assert boot["parentSpanId"] == attempt["spanId"]
    took = [int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"]) for span in (boot, agent)]
    assert took == [300_000_000, 2_000_000_000] and agent["startTimeUnixNano"] == boot["endTimeUnixNano"]
    call = by_name["chat m-1"]
    found = attributes(call)
    assert call["parentSpanId"] == attempt["spanId"] and call["kind"] == 3
    assert (found["gen_ai.operation.name"], found["gen_ai.provider.name"]) == ("chat", "anthropic")
    assert (found["gen_ai.request.model"], found["gen_ai.usage.input_tokens"]) == ("m-1", "100")
    failed = [span for span in collector.spans if "status" in span]
    assert failed and {span["status"]["code"] for span in failed} == {2}
    assert len({(span["traceId"], span["spanId"]) for span in collector.spans}) == len(collector.spans)
    # A server that starts again sends nothing again, and what ended meanwhile.
    (claim,) = await served.store.claim("w", lease_seconds=60)
    no = Failed(reason=FailureReason.AGENT_FAILED, message="no")
    await served.store.finish(claim.attempt_id, no, timings={}, vm_time_ms=1)
    again = Collector()
    async with exporting(served, again):
        await until(again, "echo@1.0.0")
    assert {attributes(span).get("swarm.ticket.id") for span in again.spans if "ticket" in span["name"]} == {"left"}


async def test_one_trace_that_is_never_taken_holds_up_no_other(served: Served) -> None:
    collector = Collector()
    collector.never = "bad-1"
    async with exporting(served, collector, pause=0.001):
        for id in ("good-0", "bad-1", "good-2"):
            await served.add(id)
            (claim,) = await served.store.claim("w", lease_seconds=60)
            await served.store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=1)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(collector.headers) < 2:
                collector.taken.clear()
                await collector.taken.wait()
    ids = [attributes(span)["swarm.ticket.id"] for span in collector.spans if "ticket" in span["name"]]
    assert ids == ["good-0", "good-2"], "each once"
    assert collector.asked == 2 + traces._TRIES


async def test_a_backlog_is_sent_without_pauses(served: Served) -> None:
    await served.store.position(traces.POSITION)
    for number in range(100):
        await served.store.append([Event(ticket_id="t", kind="note", data={"text": str(number)})])
    await served.add("last")
    await served.store.cancel("last", "ann")
    collector = Collector()
    async with exporting(served, collector, at_once=1, pause=5.0):
        await until(collector, "echo@1.0.0")


async def test_of_a_large_run_a_part_is_read(served: Served) -> None:
    await flows.start(served.store, flows.large("large", 8), "t")
    await flows.run(served.store)
    with contextlib.closing(sqlite3.connect(served.settings.data_dir / "swarm.db", timeout=60)) as database, database:
        database.execute("UPDATE step_executions SET error = ?", ("x" * 100_000,))
        database.execute("UPDATE attempts SET error = ?, timings = ?", ("x" * 100_000, "nonsense"))
    run_id = (await served.store.ticket("t")).run_id
    found = await served.store.traced("t", run_id=run_id, limit=5)
    assert (len(found.steps), len(found.attempts)) == (5, 5)
    errors = [one.error or "" for one in found.steps] + [one.error or "" for one in found.attempts]
    assert {len(error) for error in errors} == {1000}
    assert (await served.store.traced("t", run_id="another", limit=5)).steps == []
    ticket = await served.store.ticket("t")
    assert len(traces.spans(ticket, await served.store.traced("t", run_id=run_id, limit=traces.SPANS), [], "x")) == 17


@pytest.mark.parametrize("of", [0, 0.25, 0.123])
def test_nanoseconds_are_exact(of: float) -> None:
    for ms in range(1_764_372_190_000, 1_764_372_190_500):
        assert int(traces.nanoseconds(ms + of)) == ms * 1_000_000 + round(of * 1_000_000)


@pytest.mark.parametrize(
    ("env", "url"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/"}, "http://c:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/x"}, "http://c/x"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "true"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "nonsense"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://[::1"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:99999"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:x"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c\n/"}, None),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://" + "a" * 70_000}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_HEADERS": "x=ü"}, None),
    ],
    ids=str,
)
def test_the_usual_variables_say_where(env: dict[str, str], url: str | None) -> None:
    found = traces.target(env)
    assert (found and found.url) == url


@pytest.mark.parametrize(
    "text",
    [None, "", "x", "{}", "[]", '{"traceparent": 5}', '{"traceparent": "00-x-y-01"}',
     '{"traceparent": "00-' + "0" * 32 + '-b7ad6b7169203331-01"}', "[" * 100_000],
    ids=lambda text: str(text)[:20],
)  # fmt: skip
def test_what_is_no_parent(text: str | None) -> None:
    assert trace.parent(text) is None
    assert trace.valid(trace.traceparent("t", text, "a"))


def test_an_attempts_span_is_what_its_agent_is_told() -> None:
    data = f'{{"traceparent": "{PARENT}"}}'
    told = trace.traceparent("t", data, "a").split("-")
    assert told[1] == PARENT.split("-")[1] and told[2] == trace.span_id("a") != trace.span_id("b")


def test_the_page_says_what_is_set() -> None:
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in page and "TRACEPARENT" in page
