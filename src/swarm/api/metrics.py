"""`GET /metrics`, for Prometheus. Counters and histograms are fed by following the events, from the server's start on;
gauges are read when they are asked for. Every label has a bounded number of values."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.responses import Response

from swarm.api.endpoint import Call, Endpoint
from swarm.api.feed import Feed
from swarm.base.clock import PHASES
from swarm.base.log import logger
from swarm.errors import StoreError
from swarm.model import TERMINAL_TICKET_STATES, AttemptOutcome, Event, FailureReason, Role
from swarm.store.registry.workers import is_alive
from swarm.store.sql.rows import WorkerRow
from swarm.store.store import Store
from swarm.store.tickets.facts import Backlog, EndedAttempt, ended_as, ends_attempt

log = logger(__name__)

VALUES: Final = 50  # of a label such as `agent`; further ones are "other"
OTHER: Final = "other"
_EVENTS_AT_ONCE: Final = 5000
_EVERY_SECONDS: Final = 1.0
_CHECK_SECONDS: Final = 30.0
_PART: Final = 0.05  # of the time, at most, is spent on reading gauges, however often they are asked for
_ENGINES: Final = 100
_LIVE_STATES: Final = ("ready", "in_progress", "waiting", "blocked")
_LIVE_SANDBOXES: Final = ("starting", "running", "paused")
_PHASE_BUCKETS: Final = (0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 1800, 7200)
_CALL_BUCKETS: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS: Final = ("input", "output", "cache_read", "cache_write")


class _Some:
    """The first values that are seen; then OTHER, since each one is a series for ever."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, value: object) -> str:
        text = value[:100] if isinstance(value, str) and value.isprintable() and value else OTHER
        if text not in self._seen:
            if len(self._seen) >= VALUES:
                return OTHER
            self._seen.add(text)
        return text


class Metrics:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._after = 0
        disable_created_metrics()  # type: ignore[no-untyped-call] # a series more for each, which nothing asks for
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self._tickets = Counter("swarm_tickets_ended", "Tickets that ended", ["state"], **own)
        self._attempts = Counter("swarm_attempts_ended", "Attempts that ended", ["agent", "outcome"], **own)
        self._failures = Counter("swarm_attempt_failures", "Attempts that failed, by reason", ["reason"], **own)
        self._phases = Histogram(
            "swarm_attempt_phase_seconds", "How long each phase of an attempt took", ["phase"],
            buckets=_PHASE_BUCKETS, **own,
        )  # fmt: skip
        self._lost = Counter("swarm_leases_lost", "Attempts whose engine died or was silent for too long", **own)
        self._refused = Counter("swarm_writes_refused", "Outcomes of attempts that no longer owned their step", **own)
        self._calls = Counter("swarm_model_calls", "Model calls, by class of HTTP status", ["model", "status"], **own)
        self._tokens = Counter("swarm_model_tokens", "Tokens of model calls", ["model", "kind"], **own)
        self._dollars = Counter("swarm_model_cost_dollars", "What model calls cost, in USD", ["model"], **own)
        self._call_seconds = Histogram(
            "swarm_model_call_seconds", "How long a model call took", buckets=_CALL_BUCKETS, **own
        )
        for state in TERMINAL_TICKET_STATES:
            self._tickets.labels(str(state))
        for reason in FailureReason:
            self._failures.labels(str(reason))
        for phase in PHASES:
            self._phases.labels(phase)
        self._agents, self._models = _Some(), _Some()
        self._gauges = _Gauges()
        self.registry.register(self._gauges)
        ProcessCollector(registry=self.registry)
        self._fresh_until = 0.0
        self._reading = asyncio.Lock()

    # --- what has happened --------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """`follow` counts what happens from now on. To be called before the server answers: what its first clients do
        counts. Raises StoreError."""
        self._after = await self._store.newest_event()

    async def follow(self, feed: Feed) -> None:
        """Count what happens. Never ends by itself."""
        while True:
            since = feed.now()
            more = False
            try:
                facts = await self._store.facts(after=self._after, limit=_EVENTS_AT_ONCE)
                self._after, more = facts.after, facts.more
                for event in facts.events:
                    self._count(event, facts.attempts)
            except StoreError as error:
                log.warning("can't count what happens", error=str(error))
            self._gauges.behind = more
            if not more:
                await feed.changed(since, timeout_seconds=_CHECK_SECONDS)
                await asyncio.sleep(_EVERY_SECONDS)

    def _count(self, event: Event, attempts: Mapping[str, EndedAttempt]) -> None:
        data = event.data
        if state := ended_as(event):
            self._tickets.labels(state).inc()
        elif ends_attempt(event) and (attempt := attempts.get(event.attempt_id or "")) is not None:
            self._count_attempt(attempt)
        elif event.kind == "refused":
            self._refused.inc()
        elif event.kind == "model_call":
            self._count_call(data)

    def _count_attempt(self, attempt: EndedAttempt) -> None:
        outcome = attempt.outcome if attempt.outcome in tuple(AttemptOutcome) else OTHER
        self._attempts.labels(self._agents(attempt.agent), str(outcome)).inc()
        if outcome == AttemptOutcome.FAILED:
            known = attempt.reason in tuple(FailureReason)
            self._failures.labels(str(attempt.reason) if known else OTHER).inc()
        if outcome == AttemptOutcome.LOST:
            self._lost.inc()
        for phase in PHASES:
            if (ms := attempt.timings.get(phase)) is not None:
                self._phases.labels(phase).observe(ms / 1000)

    def _count_call(self, data: Mapping[str, object]) -> None:
        model, status = self._models(data.get("model")), data.get("status")
        known = isinstance(status, int) and 100 <= status < 600
        self._calls.labels(model, f"{str(status)[0]}xx" if known else "none").inc()
        for kind in _TOKENS:
            if (count := _number(data.get(f"{kind}_tokens"))) > 0:
                self._tokens.labels(model, kind).inc(count)
        self._dollars.labels(model).inc(_number(data.get("cost_usd")))
        self._call_seconds.observe(_number(data.get("latency_ms")) / 1000)

    # --- what is ------------------------------------------------------------------------------------------------------

    async def text(self) -> bytes:
        """In Prometheus' text format. Raises StoreError."""
        async with self._reading:
            if time.monotonic() >= self._fresh_until:
                began = time.monotonic()
                counts = await self._store.sandbox_counts()
                self._gauges.read(await self._store.backlog(), counts, await self._store.workers(), self._store.use())
                now = time.monotonic()
                self._fresh_until = now + (now - began) / _PART
        return await asyncio.to_thread(generate_latest, self.registry)


class _Gauges(Collector):
    def __init__(self) -> None:
        self.behind = False
        self._found: list[Metric] = []

    def collect(self) -> Iterator[Metric]:
        yield from self._found
        yield GaugeMetricFamily(
            "swarm_metrics_behind", "1 while counters are behind the events, after a burst of them", self.behind
        )

    def describe(self) -> list[Metric]:
        return []

    def read(
        self,
        backlog: Backlog,
        sandboxes: Mapping[str, int],
        workers: list[WorkerRow],
        use: Mapping[str, Mapping[str, float]],
    ) -> None:
        tickets = GaugeMetricFamily("swarm_tickets", "Tickets that have not ended", labels=["state"])
        oldest = GaugeMetricFamily("swarm_tickets_oldest_seconds", "Age of the oldest of them", labels=["state"])
        for state in _LIVE_STATES:
            tickets.add_metric([state], backlog.tickets.get(state, 0))
            oldest.add_metric([state], backlog.oldest_seconds.get(state, 0.0))
        steps = GaugeMetricFamily("swarm_steps", "Steps of workflows in the queue", labels=["state"])
        steps.add_metric(["ready"], backlog.steps_ready)
        steps.add_metric(["delayed"], backlog.steps_delayed)
        held = GaugeMetricFamily("swarm_sandboxes", "Sandboxes that have not ended", labels=["state"])
        for state in _LIVE_SANDBOXES:
            held.add_metric([state], sandboxes.get(state, 0))
        running = GaugeMetricFamily("swarm_attempts_running", "Attempts under a lease", backlog.attempts_running)
        alive = [row for row in workers if is_alive(row)][:_ENGINES]
        engines = GaugeMetricFamily("swarm_engines", "Engines that gave a sign of life just now", len(alive))
        self._found = [tickets, oldest, steps, held, running, engines, *_of_engines(alive), *_of_store(alive, use)]


def _of_engines(alive: list[WorkerRow]) -> list[Metric]:
    families = []
    for name, key, what in (
        ("swarm_engine_vms", "running", "VMs that an engine runs"),
        ("swarm_engine_vms_max", "max_vms", "VMs that it may run at once"),
        ("swarm_engine_vms_kept_ready", "kept_ready", "VMs that its pool keeps ready"),
        ("swarm_engine_sandboxes", "sandboxes", "Sandboxes that it holds"),
        ("swarm_engine_stopping", "stopping", "1 if it starts no more tickets"),
    ):
        family = GaugeMetricFamily(name, what, labels=["engine"])
        for row in alive:
            family.add_metric([_engine(row)], _number(row.info.get(key)))
        families.append(family)
    return list[Metric](families)


def _of_store(alive: list[WorkerRow], use: Mapping[str, Mapping[str, float]]) -> list[Metric]:
    """Of each engine, by its heartbeat, and of this server."""
    users: list[tuple[str, Any]] = [("server", use), *((_engine(row), row.info.get("store")) for row in alive)]
    families = []
    for name, key, what in (
        ("swarm_store_transactions", "transactions", "Transactions with the database"),
        ("swarm_store_transaction_seconds", "seconds", "Time in transactions, waits for locks included"),
        ("swarm_store_lock_wait_seconds", "lock_seconds", "Time until the write lock was there"),
        ("swarm_store_repeated", "repeated", "Transactions that ran again, as another program wrote meanwhile"),
    ):
        family = CounterMetricFamily(name, what, labels=["engine", "kind"])
        for engine, numbers in users:
            for kind in ("read", "write"):
                of_kind = numbers.get(kind) if isinstance(numbers, Mapping) else None
                if isinstance(of_kind, Mapping):
                    family.add_metric([engine, kind], _number(of_kind.get(key)))
        families.append(family)
    return list[Metric](families)


def _engine(row: WorkerRow) -> str:
    host = row.host if isinstance(row.host, str) and row.host.isprintable() else OTHER
    return f"{host[:100]}:{row.pid}"


def _number(value: object) -> float:
    """Another program may have written anything."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e18 else 0.0


async def show_metrics(call: Call) -> Response:
    text = await call.context.metrics.text()
    return Response(text, media_type=CONTENT_TYPE_LATEST, headers={"cache-control": "no-store"})


ENDPOINTS: Final = (
    Endpoint(
        method="GET",
        path="/metrics",
        role=Role.VIEWER,
        shared=True,
        summary="Metrics, in Prometheus' text format",
        handler=show_metrics,
        media_type="text/plain",
        answer=str,
    ),
)
