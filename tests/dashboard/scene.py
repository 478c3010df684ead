"""A day's work in a database, without an engine: for pages that are looked at."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from swarm.base.clock import iso
from swarm.ledger import Account, Bill, Order, Spend
from swarm.model import (
    Agent,
    Claim,
    Event,
    Failed,
    FailureReason,
    Sandbox,
    SandboxState,
    Snapshot,
    Succeeded,
    Ticket,
)
from swarm.store.store import Store
from tests.api.served import ECHO, Served
from tests.store.databases import account_of
from tests.store.flows import register

CLAUDE: Final = Agent(
    id="5e0b4a1c-90f7-4a6e-8f0e-3b6a4f3f7c11", name="claude", version="1.2.0", path=Path("/nowhere"), entry=("main.py",)
)
_OUTPUT: Final = (
    "Reading the issue and the tests that fail …\n",
    "\x1b[1m$ pytest -q tests/parser\x1b[0m\n\x1b[31mFAILED\x1b[0m tests/parser/test_dates.py::test_leap_day\n"
    "1 failed, 41 passed in 0.84s\n",
    "The month is taken from the wrong group: patching \x1b[36msrc/parser/dates.py\x1b[0m\n",
    "\x1b[1m$ pytest -q tests/parser\x1b[0m\n\x1b[32m42 passed\x1b[0m in 0.79s\n",
)
_PHASES: Final = {
    "queue": 12.0, "template": 3.1, "network": 1.4, "vmm": 38.0, "boot": 61.0, "connect": 14.0, "upload": 22.0,
    "start": 9.0, "agent": 21_400.0, "collect": 31.0, "stop": 12.0,
}  # fmt: skip
_TITLES: Final = (
    "Fix the leap-day bug in the date parser", "Summarise the support mail of this week", "Bump the pinned OpenSSL",
    "Write release notes for 4.2", "Find flaky tests of the last 50 builds", "Translate the tutorial into Czech",
    "Check licences of all dependencies", "Rename `Lane` to `ConnectionThread`", "Draw the sales of Q3 as a chart",
    "Reproduce the crash of report 1881", "Classify 400 invoices", "Update the type stubs of psutil",
)  # fmt: skip


async def call(store: Store, claim: Claim, number: int, *, usd: float, latency_ms: float) -> None:
    """A model call of an attempt, reserved and booked."""
    account = account_of(claim)
    id, most = f"call-{claim.attempt_id}-{number}", Spend(tokens=60_000, usd=1.0)
    order = Order(id=id, account=account, upstream="anthropic", model="claude-sonnet-5", most=most, least=most)
    await store.reserve(order)
    counts = {"input": 2400 + 900 * number, "output": 310, "cache_read": 11_000}
    await store.book(
        Bill(
            id=id,
            account=account,
            upstream="anthropic",
            model="claude-sonnet-5",
            status=200,
            counts=counts,
            cost_usd=usd,
            latency_ms=latency_ms,
        )
    )


async def output(store: Store, claim: Claim, texts: Sequence[str], *, stream: str = "stdout") -> None:
    await store.append([event(claim, "output", stream=stream, text=text) for text in texts])


def event(claim: Claim, kind: str, **data: object) -> Event:
    return Event(ticket_id=claim.ticket.id, kind=kind, data=data, step_id=claim.step_id, attempt_id=claim.attempt_id)


async def claims(store: Store, limit: int) -> list[Claim]:
    """Of an engine that is ours; after all decisions on workflows."""
    found = await store.claim("engine-1", limit=limit, lease_seconds=600)
    while await store.decided():
        found += await store.claim("engine-1", limit=limit - len(found), lease_seconds=600)
    return found


async def approval(served: Served, id: str, *, title: str = "Release 4.2") -> None:
    """A ticket that waits for a person."""
    text = (
        "steps:\n- id: ask\n  approval: Publish 4.2 to the package index?\n"
        "- id: publish\n  needs: [ask]\n  agent: echo\n"
    )
    workflow = await register(served.store, text, name=f"of-{id}")
    await served.add(id, title=title, agent_id=None, execution_mode="workflow", workflow_id=workflow)
    await claims(served.store, 1)


async def sandboxes(store: Store) -> None:
    """Of an engine that is ours: one that runs and has a story, one that sleeps, one that starts, one that is lost."""
    made = {}
    for name, fields in (
        ("repo-main", {"labels": '{"team": "parsers"}', "memory_mb": 1024, "ttl_seconds": 86_400.0, "budget_usd": 5.0}),
        ("asleep", {"memory_mb": 512}), ("gone", {}),
    ):  # fmt: skip
        new = Sandbox(id="", state="starting", name=name, agent_id=CLAUDE.id, **fields)
        await store.add_sandbox(new, by="the-operator")
        (made[name],) = await store.claim_sandboxes("engine-1", "build-7", lease_seconds=600, limit=1)
        await store.sandbox_running(made[name].hold_id, 40 + len(made))
    id = made["repo-main"].sandbox.id
    done: tuple[tuple[list[str], dict[str, object]], ...] = (
        (["git", "clone", "https://git.example/parsers.git", "."], {"code": 0, "ms": 2310.0}),
        (["sh", "-c", "pytest -q tests/parser"], {"code": 1, "ms": 48_200.0}),
        (["python3", "-m", "http.server", "8000"], {}),
        (["sh", "-c", "make -j4 all"], {"code": None, "signal": None, "timed_out": True, "ms": 600_000.0}),
    )
    events = list[Event]()
    for number, (argv, end) in enumerate(done):
        told: dict[str, object] = {"process": f"p{number}", "by": "the-operator"}
        started = {**told, "argv": argv, "user": "agent", "background": not end}
        events.append(Event(ticket_id="", sandbox_id=id, kind="exec", data=started))
        if end:
            events.append(Event(ticket_id="", sandbox_id=id, kind="exit", data={**told, **end}))
    of_files = {"path": "/work/src/dates.py", "op": "write", "bytes": 4123, "by": "the-operator"}
    events.append(Event(ticket_id="", sandbox_id=id, kind="files", data=of_files))
    reached = {"via": "proxy", "host": "pypi.org", "port": 443, "ms": 420.0}
    events.append(Event(ticket_id="", sandbox_id=id, kind="egress", data=reached))
    await store.append(events)
    account = Account(
        ticket_id=None, run_id="", step_execution_id="", step_id="", attempt_id=made["repo-main"].hold_id,
        agent_id=CLAUDE.id, agent_name=CLAUDE.name, sandbox_id=id,
    )  # fmt: skip
    most = Spend(tokens=60_000, usd=1.0)
    await store.reserve(
        Order(id="in-box", account=account, upstream="anthropic", model="claude-sonnet-5", most=most, least=most)
    )
    await store.book(
        Bill(
            id="in-box", account=account, upstream="anthropic", model="claude-sonnet-5", status=200,
            counts={"input": 5200, "output": 410}, cost_usd=0.034, latency_ms=2900.0,
        )
    )  # fmt: skip
    await store.add_snapshot(
        Snapshot(id="kept-1", kind="named", name="after-clone", host="build-7", sandbox_id=id, size_bytes=301 << 20)
    )
    asleep = made["asleep"]
    pause = Snapshot(id="pause-1", kind="pause", host="build-7", sandbox_id=asleep.sandbox.id, size_bytes=188 << 20)
    await store.sandbox_paused(asleep.hold_id, pause)
    why = "the engine died while it ran"
    await store.sandbox_ended(made["gone"].hold_id, SandboxState.LOST, why)
    await store.add_sandbox(Sandbox(id="", state="starting", name="new", agent_id=CLAUDE.id), by="the-operator")


async def fill(served: Served) -> None:
    store = served.store
    await store.put_agent(CLAUDE)
    info = {
        "max_vms": 8,
        "running": 2,
        "per_minute": 14,
        "driver": "firecracker",
        "stopping": False,
        "memory_mb": 24_576,
        "memory_free_mb": 19_200,
    }
    await store.heartbeat("engine-1", host="build-7", pid=os.getpid(), info=info)
    for number, title in enumerate(_TITLES):
        await store.add_ticket(
            replace(await _draft(f"t{number:02d}", title), agent_id=CLAUDE.id, inputs=json.dumps({"prompt": title})),
            by="the-operator",
        )
        [claim] = await claims(store, 1)
        await store.running(claim.attempt_id, 3 + number)
        await output(store, claim, _OUTPUT)
        for one in range(3):
            await call(store, claim, one, usd=0.021 + 0.004 * one, latency_ms=3200.0)
        await store.append([event(claim, "egress", via="proxy", host="pypi.org", port=443, ms=420.0)])
        timings = {**_PHASES, "agent": 9000.0 + 2100.0 * number}
        timings["total"] = sum(timings.values())
        outcome = (
            Failed(reason=FailureReason.AGENT_FAILED, message="the agent ended with status 1: no test fails any more")
            if number % 5 == 4
            else Succeeded(outputs=json.dumps({"answer": "42 tests pass", "files": ["src/parser/dates.py"]}))
        )
        await store.finish(claim.attempt_id, outcome, timings=timings, vm_time_ms=1.0, vm_id=3 + number)
    await approval(served, "release")
    for id, title in (("run-1", "Port the worker to Python 3.14"), ("run-2", "Read 1,200 reviews, list complaints")):
        await store.add_ticket(replace(await _draft(id, title), agent_id=CLAUDE.id), by="the-operator")
    for number, claim in enumerate(await claims(store, 2)):
        if number == 0:
            await store.running(claim.attempt_id, 21)
            await output(store, claim, _OUTPUT[:2])
            await call(store, claim, 0, usd=0.031, latency_ms=2100.0)
    await served.add("next", title="Compare three charting libraries", agent_id=CLAUDE.id)
    await served.add("after", title="Write up the comparison", agent_id=CLAUDE.id)
    await store.add_ticket(
        replace(await _draft("blocked", "Send the write-up"), agent_id=ECHO.id), depends_on=["next"], by="the-operator"
    )
    await claims(store, 0)
    await sandboxes(store)
    await served.add("gone", title="An idea that was dropped")
    await store.cancel("gone", "the-operator")
    _back_date(served.settings.data_dir / "swarm.db")


async def _draft(id: str, title: str) -> Ticket:
    return Ticket(id=id, title=title, state="ready", execution_mode="agent")


def _back_date(database: Path) -> None:
    """The attempts took as long as their phases say, and began one after the other."""
    from datetime import UTC, datetime

    now = datetime.now(UTC).timestamp() * 1000
    with sqlite3.connect(database, timeout=60) as outside:
        rows = outside.execute("SELECT id, timings, step_execution_id FROM attempts ORDER BY id DESC").fetchall()
        for number, (id, timings, step) in enumerate(rows):
            total = json.loads(timings or "{}").get("total", 21_000.0)
            end = now - number * 190_000 if timings else now
            begin = end - total
            made = outside.execute(
                "SELECT t.id FROM step_executions s JOIN workflow_runs r ON r.id = s.run_id "
                "JOIN tickets t ON t.id = r.ticket_id WHERE s.id = ?", (step,)
            ).fetchone()[0]  # fmt: skip
            outside.execute(
                "UPDATE attempts SET started_at = ?, ended_at = CASE WHEN ended_at IS NULL THEN NULL ELSE ? END "
                "WHERE id = ?",
                (iso(begin), iso(end), id),
            )
            outside.execute(
                "UPDATE tickets SET created_at = ?, started_at = ?, completed_at = "
                "CASE WHEN completed_at IS NULL THEN NULL ELSE ? END WHERE id = ?",
                (iso(begin - 12), iso(begin), iso(end), made),
            )
            for table, name in (("model_calls", "attempt_id"), ("events", "attempt_id")):
                key = "id" if table == "model_calls" else "seq"
                some = outside.execute(f"SELECT {key} FROM {table} WHERE {name} = ? ORDER BY {key}", (id,)).fetchall()
                for place, (one,) in enumerate(some):
                    at = begin + 900 + (total - 4500) * place / max(1, len(some))
                    outside.execute(f"UPDATE {table} SET at = ? WHERE {key} = ?", (iso(at), one))
