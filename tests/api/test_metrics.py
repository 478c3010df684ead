"""Metrics: what happens is counted, and a real Prometheus reads it; rules, dashboard and page name what exists."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from swarm.api import traces
from swarm.api.feed import Feed
from swarm.api.metrics import OTHER, VALUES, _Some
from swarm.ledger import Bill, Order, Spend
from swarm.model import Failed, FailureReason, Role, Succeeded
from swarm.store.registry.tokens import Actor, new_token
from tests import prometheus_here
from tests.api.served import Served
from tests.conftest import PATIENCE_SECONDS
from tests.serving import serving
from tests.store.databases import account_of

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "docs" / "monitoring"
PAGE = MONITORING.with_suffix(".md").read_text(encoding="utf-8")
PAGE_COMMANDS = PAGE.partition("```bash\n")[2].partition("```")[0].splitlines()
TIMINGS = {"queue": 12.0, "boot": 300.0, "agent": 2000.0, "total": 2312.0}


async def families(served: Served) -> dict[str, Any]:
    answer = await served.viewer.get("/metrics")
    assert answer.status_code == 200, answer.text
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


async def value(served: Served, name: str, **labels: str) -> float:
    for family in (await families(served)).values():
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return float(sample.value)
    return 0.0


async def until(served: Served, wanted: float, name: str, **labels: str) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await value(served, name, **labels) != pytest.approx(wanted):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def work(served: Served) -> None:
    """Two tickets end, one of them with a model call; one is left ready."""
    store = served.store
    for id in ("good", "bad"):
        await served.add(id)
    good, bad = await store.claim("w", limit=2, lease_seconds=60)
    account = account_of(good)
    some = Spend(usd=1.0, tokens=1000)
    await store.reserve(Order(id="call", account=account, upstream="anthropic", model="m-1", most=some, least=some))
    await store.book(
        Bill(
            id="call", account=account, upstream="anthropic", model="m-1", status=200,
            counts={"input": 100, "output": 20}, cost_usd=0.25, latency_ms=700,
        )
    )  # fmt: skip
    await store.finish(good.attempt_id, Succeeded(outputs="{}"), timings=TIMINGS, vm_time_ms=1)
    failed = Failed(reason=FailureReason.AGENT_FAILED, message="no")
    await store.finish(bad.attempt_id, failed, timings=TIMINGS, vm_time_ms=1)
    await served.add("left")
    info = {"running": 2, "max_vms": 4, "kept_ready": 1, "store": store.use(), "stopping": False}
    await store.heartbeat("w", host="host-1", pid=7, info=info)
    await store.heartbeat("x", host="bad\nhost", pid=8, info={"running": "many", "store": {"write": 3}, "max_vms": -1})
    with contextlib.closing(sqlite3.connect(served.settings.data_dir / "swarm.db", timeout=60)) as database, database:
        database.execute("UPDATE workers SET seen_at = '2100-01-01T00:00:00.000Z'")  # they live as long as this test


async def counted(served: Served) -> None:
    """Until all that `work` did is: an end may be counted while what came after it is not."""
    await until(served, 1, "swarm_tickets_ended_total", state="done")
    await until(served, 1, "swarm_tickets_ended_total", state="failed")
    await until(served, 2, "swarm_attempt_phase_seconds_count", phase="boot")
    await until(served, 1, "swarm_model_calls_total", model="m-1", status="2xx")
    await until(served, 1, "swarm_attempt_failures_total", reason="agent_failed")
    await until(served, 1, "swarm_tickets", state="ready")
    await until(served, 2, "swarm_engine_vms", engine="host-1:7")


async def test_what_happens_is_counted(served: Served) -> None:
    assert await value(served, "swarm_tickets_ended_total", state="done") == 0
    await work(served)
    await counted(served)
    for wanted, name, labels in (
        (1, "swarm_tickets_ended_total", {"state": "failed"}),
        (1, "swarm_attempts_ended_total", {"agent": "echo", "outcome": "succeeded"}),
        (1, "swarm_attempt_failures_total", {"reason": "agent_failed"}),
        (2, "swarm_attempt_phase_seconds_count", {"phase": "boot"}),
        (0.6, "swarm_attempt_phase_seconds_sum", {"phase": "boot"}),
        (1, "swarm_model_calls_total", {"model": "m-1", "status": "2xx"}),
        (100, "swarm_model_tokens_total", {"model": "m-1", "kind": "input"}),
        (0.25, "swarm_model_cost_dollars_total", {"model": "m-1"}),
        (0.7, "swarm_model_call_seconds_sum", {}),
        (0, "swarm_leases_lost_total", {}),
    ):
        await until(served, wanted, name, **labels)
    found = await families(served)
    assert await value(served, "swarm_engine_vms", engine="other:8") == 0
    assert await value(served, "swarm_store_transactions_total", engine="host-1:7", kind="write") > 5
    assert await value(served, "swarm_store_transactions_total", engine="server", kind="read") > 0
    assert found["swarm_engines"].samples[0].value == 2 and found["process_resident_memory_bytes"].samples
    # A lease runs out: another engine takes the attempt over, and the first one's outcome is refused.
    (lost,) = await served.store.claim("w", lease_seconds=60)
    await served.store.shift_clock(120_000)
    await served.store.claim("v", lease_seconds=60)
    await until(served, 1, "swarm_leases_lost_total")
    assert lost.ticket.id == "left"


HOSTILE = [
    '{"of": "ticket", "to": ["done"]}', '{"of": "ticket", "to": {"a": 1}}', '{"of": ["ticket"]}', "[]", "3", "nonsense",
    '{"of": "step", "from": "running", "to": []}', '{"of": "step", "to": "waiting", "why": ["over_budget"]}',
]  # fmt: skip


async def test_what_other_programs_write_ends_nothing(served: Served) -> None:
    """Events and rows of any form: the server counts, traces and tells on."""
    places: list[str] = []

    async def collector(request: web.Request) -> web.Response:
        body = await request.json()
        spans = body["resourceSpans"][0]["scopeSpans"][0]["spans"]
        places.append(spans[0]["attributes"][0]["value"]["stringValue"])
        return web.Response(text="{}")

    await served.add("t")
    (claim,) = await served.store.claim("w", lease_seconds=60)
    await served.store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings=TIMINGS, vm_time_ms=1)
    async with serving(collector) as url, Feed.of(served.store) as feed:
        await served.store.position(traces.POSITION)
        notice = {"url": url, "on": ["ended", "approval", "budget", "failed"]}
        assert (await served.admin.post("/v1/notices", json=notice)).status_code == 201
        with contextlib.closing(sqlite3.connect(served.settings.data_dir / "swarm.db", timeout=60)) as another:
            for kind in ("transition", "model_call", "approval", "refused"):
                for data in HOSTILE:
                    values = ("t", claim.attempt_id, kind, data)
                    another.execute(
                        "INSERT INTO events (ticket_id, attempt_id, kind, data) VALUES (?, ?, ?, ?)", values
                    )
            another.execute('UPDATE attempts SET timings = \'{"boot": 1e400, "agent": -1, "queue": "x"}\'')
            ended = '{"of": "ticket", "to": "done"}'
            another.execute("INSERT INTO events (ticket_id, kind, data) VALUES ('t', 'transition', ?)", (ended,))
            another.commit()
        to = traces.target({"OTEL_EXPORTER_OTLP_ENDPOINT": url})
        assert to is not None
        task = asyncio.create_task(traces.export(served.store, feed, to))
        try:
            newest = await served.store.newest_event()
            async with asyncio.timeout(PATIENCE_SECONDS):
                while await served.store.position(traces.POSITION) < newest:
                    assert not task.done()
                    await asyncio.sleep(0.05)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    await until(served, 8, "swarm_writes_refused_total")
    await until(served, 2, "swarm_tickets_ended_total", state="done")
    assert (await served.viewer.get("/v1/tickets")).status_code == 200


async def test_a_project_sees_no_metrics(served: Served) -> None:
    token = new_token()
    await served.store.add_token(token, Actor(name="team", role=Role.ADMIN, project_id="a"), by="test")
    answer = await served.nobody.get("/metrics", headers={"authorization": f"Bearer {token}"})
    assert answer.status_code == 403


def test_labels_have_a_bounded_number_of_values() -> None:
    some = _Some()
    named = [some(f"agent-{n}") for n in range(VALUES)]
    assert len(set(named)) == VALUES
    assert some("one more") == OTHER and some("agent-0") == "agent-0"
    assert _Some()("a\nb") == OTHER and _Some()(None) == OTHER and _Some()(3) == OTHER


@asynccontextmanager
async def prometheus(served: Served, place: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Debian's, by the commands of the docs and with its configuration; addresses and intervals differ."""
    go, make_token, start = PAGE_COMMANDS
    there = place / "docs" / "monitoring"
    there.mkdir(parents=True)
    (there / "alerts.yml").write_text((MONITORING / "alerts.yml").read_text())
    text = (MONITORING / "prometheus.yml").read_text().replace("127.0.0.1:8420", served.url.removeprefix("http://"))
    assert served.url.removeprefix("http://") in text
    (there / "prometheus.yml").write_text(f"global: {{scrape_interval: 200ms, evaluation_interval: 200ms}}\n{text}")
    env = {**os.environ, "SWARM_HOME": str(served.settings.home), "SWARM_STATE_DIR": str(served.settings.state_dir)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    made = await asyncio.to_thread(
        subprocess.run, ["bash", "-c", f"{go}\n{make_token}"], cwd=place, env=env, capture_output=True, check=False
    )
    assert made.returncode == 0, made.stderr
    assert (there / "swarm-token").stat().st_mode & 0o777 == 0o600
    promtool = prometheus_here.program("promtool")
    program, (_, *options) = prometheus_here.program("prometheus"), shlex.split(start)
    assert program and promtool
    (config,) = [one.removeprefix("--config.file=") for one in options]
    checked = await asyncio.to_thread(_run, [promtool, "check", "config", str(there / config)], "")
    assert checked.returncode == 0, checked.stderr
    with (place / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            program, *options, f"--storage.tsdb.path={place}/data", "--web.listen-address=127.0.0.1:19090", cwd=there,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
        )  # fmt: skip
    try:
        async with httpx.AsyncClient(base_url="http://127.0.0.1:19090/api/v1", timeout=60) as client:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while True:
                    try:
                        if await _query(client, 'up{job="swarm"} == 1'):
                            break
                    except (httpx.TransportError, ValueError):  # it starts
                        assert process.returncode is None, (place / "log").read_text()
                    await asyncio.sleep(0.1)
            yield client
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _query(client: httpx.AsyncClient, expression: str) -> list[Any]:
    answer = (await client.get("/query", params={"query": expression})).json()
    assert answer["status"] == "success", (expression, answer)
    found: list[Any] = answer["data"]["result"]
    return found


def expressions() -> list[str]:
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    of_panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [one.replace("$__rate_interval", "5m") for one in of_panels]


@pytest.mark.needs("netns", "prometheus")
async def test_a_real_prometheus(served: Served, tmp_path: Path) -> None:
    await work(served)
    await counted(served)
    text = (await served.viewer.get("/metrics")).text
    ignored = await asyncio.to_thread(_run, ["git", "-C", str(ROOT), "check-ignore", "docs/monitoring/swarm-token"], "")
    assert ignored.returncode == 0, "the token of the page's first command must not be committed"
    promtool = prometheus_here.program("promtool")
    assert promtool
    for argv, given in (
        ([promtool, "check", "metrics"], text),
        ([promtool, "check", "rules", str(MONITORING / "alerts.yml")], ""),
    ):
        done = await asyncio.to_thread(_run, argv, given)
        assert done.returncode == 0 and not done.stderr.strip(), done.stderr + done.stdout
    async with prometheus(served, tmp_path) as client:
        assert await _query(client, 'swarm_tickets_ended_total{state="done"} == 1')
        rules = (await client.get("/rules")).json()["data"]["groups"][0]["rules"]
        async with asyncio.timeout(PATIENCE_SECONDS):
            while any(rule["health"] == "unknown" for rule in rules):
                await asyncio.sleep(0.1)
                rules = (await client.get("/rules")).json()["data"]["groups"][0]["rules"]
        assert {rule["health"] for rule in rules} == {"ok"}
        known = {series["__name__"] for series in await _names(client)}
        for expression in [*expressions(), *(rule["query"] for rule in rules)]:
            await _query(client, expression)
            named = set(re.findall(r"\bswarm_\w+", expression))
            assert named <= known, expression


def _run(argv: list[str], given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, input=given, capture_output=True, text=True, check=False)


async def _names(client: httpx.AsyncClient) -> list[dict[str, str]]:
    answer = (await client.get("/series", params={"match[]": '{__name__=~"swarm_.+"}'})).json()
    found: list[dict[str, str]] = answer["data"]
    return found


async def test_the_page_lists_all_metrics(served: Served) -> None:
    """Name, type and labels."""
    await work(served)
    await counted(served)
    page = (ROOT / "docs" / "monitoring.md").read_text()
    rows = re.findall(r"^\| `(swarm_\w+)` \| (\w+) \|([^|]*)\|", page, re.MULTILINE)
    listed = {name: (kind, set(re.findall(r"\w+", labels))) for name, kind, labels in rows}
    exported = {}
    for name, family in (await families(served)).items():
        if name.startswith("swarm_"):
            labels = set[str]().union(*(sample.labels for sample in family.samples)) - {"le"}
            exported[f"{name}_total" if family.type == "counter" else name] = (family.type, labels)
    assert listed == exported
