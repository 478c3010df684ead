"""Agents, workflows, schedules, costs and hosts."""

from __future__ import annotations

import json
import re
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from swarm.dashboard.spent import MOST_CALLS, Hours
from swarm.model import ECHO_AGENT_ID
from tests.api.served import Served, serving
from tests.dashboard.flows import HOSTILE, echo, run, start, workflow
from tests.dashboard.test_runs import links, of_project, page


async def test_agents_and_how_they_fared(served: Served) -> None:
    for n in range(4):
        await served.add(f"t{n}", title=HOSTILE, project_id="mine" if n else None)
    await run(served.store)
    assert "100 %" in await page(served.viewer, "/agents")
    shown = await page(served.viewer, f"/agents/{ECHO_AGENT_ID}")
    assert "main.py" in shown and shown.count('href="/tickets/t') == 4 and "none: it needs no packages" in shown
    async with await of_project(served, "mine") as mine:
        assert (await page(mine, f"/agents/{ECHO_AGENT_ID}")).count('href="/tickets/t') == 3
    await page(served.viewer, "/agents/nowhere", 404)


async def test_a_workflow_is_started_from_a_form(served: Served) -> None:
    inputs = {
        "who": {"type": "string", "description": HOSTILE},
        "count": {"type": "integer", "default": 3},
        "kind": {"type": "string", "enum": ["a", "<b>"], "default": "a"},
        "more": {"type": "object", "default": {}},
    }
    flow = workflow("greet", echo("say"), inputs=inputs, description=HOSTILE, variables={"x": HOSTILE})
    await start(served.store, flow, "first", inputs='{"who": "x"}')
    row = await served.store.workflow("greet")
    at = f"/workflows/{row.id}"
    assert at in links(await page(served.viewer, "/workflows"))
    shown = await page(served.operator, at)
    assert {"in.who", "in.count", "in.kind", "in.more", "json"} <= set(re.findall(r'name="([\w.]+)"', shown))
    assert "Start a run" not in await page(served.viewer, at) and "Disable" not in shown
    good = {"title": "", "in.who": "all", "in.count": "2", "in.kind": "a", "in.more": '{"a": [1]}', "json": ""}
    assert (await served.viewer.post(f"{at}/start", data=good)).status_code == 403
    for changed, why in (
        ({"in.count": "two"}, "count: this is not JSON"),
        ({"in.count": "2.5"}, "the inputs don&#39;t fit the workflow greet@"),
        ({"in.who": ""}, ""),
        ({"json": "[1]"}, "must be an object"),
        ({"json": "{" * 100_000}, "the inputs as JSON"),
    ):
        answer = await served.operator.post(f"{at}/start", data={**good, **changed})
        if why:
            assert answer.status_code == 400 and why in answer.text, changed
            assert "{&#34;a&#34;: [1]}" in answer.text  # what was typed is still there
    answer = await served.operator.post(f"{at}/start", data=good)
    assert answer.status_code == 303
    ticket = await served.store.ticket(answer.headers["location"].removeprefix("/tickets/"))
    assert json.loads(ticket.inputs or "") == {"who": "all", "count": 2, "kind": "a", "more": {"a": [1]}}
    assert (ticket.title, ticket.trigger_type, ticket.project_id) == ("greet", "manual", None)
    async with await of_project(served, "mine") as mine:
        answer = await mine.post(f"{at}/start", data=good)
        ticket = await served.store.ticket(answer.headers["location"].removeprefix("/tickets/"))
        assert ticket.project_id == "mine"
    assert (await served.operator.post(f"{at}/enable", data={"enabled": "no"})).status_code == 403
    assert (await served.admin.post(f"{at}/enable", data={"enabled": "perhaps"})).status_code == 400
    assert (await served.admin.post(f"{at}/enable", data={"enabled": "no"})).status_code == 303
    events = await served.store.events(None)
    assert ("workflow.disable", "the-admin") in [(one.data.get("did"), one.data.get("by")) for one in events]
    assert "Start a run" not in await page(served.operator, at) and "Enable" in await page(served.admin, at)
    assert (await served.operator.post(f"{at}/start", data=good)).status_code == 400


async def test_a_broken_workflow_has_a_page(served: Served) -> None:
    connection = sqlite3.connect(served.settings.home / "data" / "swarm.db", timeout=60)
    connection.execute("INSERT INTO workflows (id, name, version, steps) VALUES ('w', ?, '1', ?)", (HOSTILE, HOSTILE))
    connection.commit()
    connection.close()
    shown = await page(served.admin, "/workflows/w")
    assert "has a broken row" in shown and "Start a run" not in shown
    await page(served.viewer, "/workflows")


async def test_schedules_say_when_and_what_came_of_them(served: Served) -> None:
    assert "No workflow has a schedule" in await page(served.viewer, "/schedules")
    flow = workflow("nightly", echo("say"), schedule=[{"cron": "0 6 * * mon-fri", "time_zone": "Europe/Berlin"}])
    await start(served.store, flow, "t")
    connection = sqlite3.connect(served.settings.home / "data" / "swarm.db", timeout=60)
    connection.execute("UPDATE schedules SET last_ticket_id = 't', last_at = '2026-01-01T00:00:00Z', missed_count = 7")
    connection.commit()
    shown = await page(served.viewer, "/schedules")
    assert "/tickets/t" in links(shown) and "Europe/Berlin" in shown and ">7</td>" in shown
    times = [datetime.fromisoformat(one) for one in re.findall(r'datetime="([^"]+)"', shown)]
    assert len(times) == 4 and sorted(times) == [times[3], *times[:3]]
    async with await of_project(served, "mine") as mine:
        assert "of all projects" in await page(mine, "/schedules", 403)
    connection.execute("UPDATE schedules SET next_at = NULL, error = ?", (HOSTILE,))
    connection.commit()
    connection.close()
    assert "never: see the error" in await page(served.viewer, "/schedules")


def calls(served: Served, rows: list[tuple[str, datetime, str, str, float]]) -> None:
    """Model calls: id, time, agent, workflow, USD."""
    connection = sqlite3.connect(served.settings.home / "data" / "swarm.db", timeout=60)
    connection.executemany(
        "INSERT INTO model_calls (id, at, agent, workflow, model, status, tokens, cost_usd) "
        "VALUES (?, ?, ?, ?, 'm', 200, 10, ?)",
        [(id, f"{at:%Y-%m-%dT%H:%M:%S}.000Z", agent, workflow, usd) for id, at, agent, workflow, usd in rows],
    )
    connection.commit()
    connection.close()


async def test_costs_by_day_agent_workflow_and_model(served: Served) -> None:
    now = datetime.now(UTC)
    calls(served, [(f"m{n}", now - timedelta(hours=n), HOSTILE, f"w{n % 2}", 0.5) for n in range(200)])
    connection = sqlite3.connect(served.settings.home / "data" / "swarm.db", timeout=60)
    connection.execute("INSERT INTO model_calls (id, status, tokens) VALUES ('unpriced', 200, 10), ('open', NULL, 0)")
    connection.commit()
    connection.close()
    shown = await page(served.viewer, "/costs?range=24h")
    assert "$12.50" in shown and "27 model calls" in shown and shown.count("<svg") == 4
    assert "1 calls are of models without a price" in shown and "1 calls are under way" in shown
    assert "$100.00" in await page(served.viewer, "/costs?range=30d")
    week = 7 * 24 + now.hour + 1  # from midnight on
    assert f"${week * 0.5:.2f}" in await page(served.viewer, "/costs?range=nonsense")
    assert f"${week * 0.5:.2f}" in await page(served.viewer, "/costs?range=7d")  # now by sums of whole days
    calls(served, [("late", now, "a", "w", 1.0)])  # of the last hours, what is new counts at once
    assert "$101.00" in await page(served.viewer, "/costs?range=30d")
    async with await of_project(served, "mine") as mine:
        await page(mine, "/costs", 403)
        await page(mine, "/hosts", 403)
        assert (await mine.post("/workflows/x/enable", data={"enabled": "no"})).status_code == 403


async def test_any_number_of_calls_is_summed_by_and_by(served: Served) -> None:
    """What one request reads is bounded; the next one reads on, and no call counts twice."""
    now, per_hour = datetime.now(UTC), MOST_CALLS // 4
    start = (now - timedelta(hours=10)).replace(minute=0, second=0)
    for hour in range(6):
        some = [
            (f"{hour}-{n}", start + timedelta(hours=hour, seconds=n % 3000), "a", "w", 0.001) for n in range(per_hour)
        ]
        calls(served, some)
    seen = []
    for _ in range(10):
        answer = await served.viewer.get("/costs?range=24h")
        [number] = re.findall(r"for ([\d,]+) model calls", answer.text)
        seen.append(int(number.replace(",", "")))
        if "refresh" not in answer.headers:
            break
        assert "this page comes again by itself" in answer.text
    assert seen[-1] == 6 * per_hour and 2 <= len(seen) <= 6 and seen == sorted(seen)
    assert "There are older calls" not in await page(served.viewer, "/costs?range=24h")
    assert f"for {6 * per_hour:,} model" in await page(served.viewer, "/costs?range=30d")


async def test_an_hour_with_more_calls_than_a_page_sums_is_said(served: Served) -> None:
    at = datetime.now(UTC).replace(minute=0, second=0) - timedelta(hours=8)
    calls(served, [(f"m{n}", at, "a", "w", 0.001) for n in range(MOST_CALLS + 5)])
    answer = await served.viewer.get("/costs?range=24h")
    assert "There are older calls in this range than a page sums" in answer.text and "refresh" not in answer.headers


async def test_what_is_kept_of_costs_stays_bounded_and_complete(served: Served) -> None:
    hours = Hours(most=5)
    for month in range(1, 7):
        now = datetime(2025, 1, 1, 18, tzinfo=UTC) + timedelta(days=40 * month)
        calls(served, [(f"{month}-{n}", now - timedelta(days=2 + n), "a", "w", 1.0) for n in range(3)])
        sums = await hours.since(served.store, now - timedelta(days=7), now=now)
        assert (sums.complete, sum(row.calls for row in sums.rows)) == (True, 3), month
        assert hours._kept == 3 and len(hours._known) < 24 * 32
    calls(served, [(f"many-{n}", now - timedelta(days=2, hours=n), "a", "w", 1.0) for n in range(10, 20)])
    hours = Hours(most=5)
    for day in range(3):  # there are more than are kept: those of today are complete all the same
        later = now + timedelta(days=day)
        calls(served, [(f"new-{day}-{n}", later - timedelta(hours=6 + n), "a", "w", 1.0) for n in range(3)])
        await hours.since(served.store, later - timedelta(days=7), now=later)
        sums = await hours.since(served.store, later.replace(hour=0), now=later)
        assert (sums.complete, sum(row.calls for row in sums.rows)) == (True, 3), day


async def test_budgets_say_how_much_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARM_BUDGET_USD_PER_DAY", "10")
    async with serving(tmp_path / "home") as served:
        flow = workflow("dear", echo("say"), budget_usd=2.5)
        await start(served.store, flow, "t")
        connection = sqlite3.connect(served.settings.home / "data" / "swarm.db", timeout=60)
        connection.execute("INSERT INTO model_calls (id, status, tokens, cost_usd) VALUES ('m', 200, 10, 8.5)")
        connection.commit()
        connection.close()
        assert "No model calls" not in (shown := await page(served.viewer, "/costs"))
        assert "$8.50 of $10.00" in shown and "fill st-waiting" in shown and "$2.50" in shown


async def test_hosts_say_who_is_silent_and_what_they_wait_for(served: Served) -> None:
    assert "No engine runs" in await page(served.viewer, "/hosts")
    info = {"running": 3, "max_vms": 8, "driver": HOSTILE, "waits_for": "memory is short", "skipped": {HOSTILE: "why"}}
    await served.store.heartbeat("alive", host=HOSTILE, pid=1, info=info)
    await served.store.heartbeat("odd", host="odd", pid=2, info={"running": "?", "max_vms": [], "skipped": 7})
    connection = sqlite3.connect(served.settings.home / "data" / "swarm.db", timeout=60)
    connection.execute(
        "INSERT INTO workers (id, host, pid, started_at, seen_at, info) VALUES ('gone', 'far', 3, '', ?, '[')",
        ((datetime.now(UTC) - timedelta(minutes=3)).isoformat(timespec="milliseconds")[:-6] + "Z",),
    )
    row = "INSERT INTO hosts (id, name, draining, drained_by, labels) VALUES ('i', 'far', 1, ?, '{')"
    connection.execute(row, (HOSTILE,))
    connection.commit()
    connection.close()
    shown = await page(served.viewer, "/hosts")
    assert "Starts nothing more: drained by" in shown and HOSTILE not in shown
    assert "3 of 8" in shown and "Starts no more VMs now: memory is short" in shown
    assert shown.count("its steps go back to the queue when their leases end") == 1 and "Silent for 3 min" in shown
