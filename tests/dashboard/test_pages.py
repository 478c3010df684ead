"""The pages Now, Tickets and Ticket as a browser without scripts gets them."""

from __future__ import annotations

import asyncio
import contextlib
import html
import json
import re
import sqlite3
from collections.abc import Mapping
from urllib.parse import urlsplit

import httpx
import pytest

from swarm.dashboard import ansi, history, text, waterfall
from swarm.model import Event, Failed, FailureReason, Role, Succeeded, Ticket
from swarm.store.registry.tokens import Actor, new_token
from tests.api.served import ECHO, Served
from tests.api.test_files import left
from tests.conftest import PATIENCE_SECONDS
from tests.dashboard import scene
from tests.store.flows import register

HOSTILE = "<script>alert(1)</script>\u202e\x00\x1b]0;x\x07 https://evil.example/ \" onload='x' &amp;"


def _shown(page: httpx.Response) -> str:
    """The text of a page, without its elements."""
    assert page.status_code == 200, page.text
    return html.unescape(re.sub(r"<[^>]*>", " ", page.text))


async def _post(served: Served, path: str, data: Mapping[str, object], *, role: str = "operator") -> httpx.Response:
    return await served.clients[role].post(path, data=data)


async def test_now_says_what_runs_what_waits_and_that_no_engine_runs(served: Served) -> None:
    await served.add("first", state="draft")
    page = await served.viewer.get("/")
    assert "No engine runs" in page.text
    assert "swarm-engine start" in page.text
    await scene.fill(served)
    shown = re.sub(r"\s+", " ", _shown(await served.viewer.get("/")))
    assert "No engine runs" not in shown
    assert "Running 2" in shown
    assert "Wait for a person 1" in shown
    assert "Attempts failed, last hour 2 17 %" in shown
    with contextlib.closing(sqlite3.connect(served.settings.data_dir / "swarm.db", timeout=60)) as database:
        [spent] = database.execute("SELECT sum(cost_usd) FROM model_calls WHERE at >= date('now')").fetchone()
    assert (f"${spent:.2f}" if spent else "$0") in shown, "of today: soon after midnight, most calls are of yesterday"
    assert "Port the worker to Python 3.14 main claude running 21" in shown
    assert "2 of 8" in shown


async def test_now_shows_nothing_old_when_the_database_can_not_be_read(served: Served) -> None:
    assert (await served.viewer.get("/")).status_code == 200
    with contextlib.closing(
        sqlite3.connect(served.settings.data_dir / "swarm.db", isolation_level=None, timeout=60)
    ) as other:
        other.execute("ALTER TABLE workers RENAME TO elsewhere")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await served.viewer.get("/")).status_code == 200:  # it is not known yet that something has changed
                await served.store.tickets()
        assert (await served.viewer.get("/")).status_code >= 500
        other.execute("ALTER TABLE elsewhere RENAME TO workers")


async def test_an_address_that_is_none_is_a_page_for_a_browser(served: Served) -> None:
    browser = {"accept": "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"}
    for client in (served.viewer, served.nobody):
        found = await client.get("/nothing/here", headers=browser)
        assert (found.status_code, found.headers["content-type"]) == (404, "text/html; charset=utf-8")
        assert "there is nothing at this address" in found.text
    for path, headers in (("/v1/nothing", browser), ("/hooks/a/b", browser), ("/nothing", {"accept": "*/*"})):
        found = await served.viewer.get(path, headers=headers)
        assert (found.status_code, found.headers["content-type"]) == (404, "application/problem+json"), path


async def test_a_token_of_a_project_sees_that_project_alone(served: Served) -> None:
    await served.add("ours", title="OURS", project_id="p")
    await served.add("theirs", title="THEIRS", project_id="q")
    token = new_token()
    await served.store.add_token(token, Actor(name="bound", role=Role.OPERATOR, project_id="p"), by="test")
    async with httpx.AsyncClient(
        base_url=served.url, headers={"authorization": f"Bearer {token}"}, timeout=60
    ) as bound:
        now, tickets = _shown(await bound.get("/")), _shown(await bound.get("/tickets?project=q"))
        assert "Spent today" not in now
        assert "Engines" not in now
        assert "OURS" in tickets
        assert "THEIRS" not in tickets
        for path in ("", "/output?after=0", "/text/inputs", "/cancel", "/retry"):
            assert (await bound.get(f"/tickets/theirs{path}")).status_code == 404, path
        for action in ("cancel", "retry", "delete", "ready"):
            assert (await bound.post(f"/tickets/theirs/{action}", data={"x": ""})).status_code == 404, action
        for given in ({"id": "theirs"}, {"all": "1", "filter": "project=q"}):
            assert (await bound.get("/live?ticket=theirs")).status_code == 404
            await bound.post("/tickets/bulk", data={"do": "cancel", "sure": "yes", **given})
    assert (await served.store.ticket("theirs")).state == "ready"


async def test_filters_are_in_the_address_and_as_chips(served: Served) -> None:
    for number in range(3):
        await served.add(f"a{number}", title=f"red {number}")
        await served.add(f"b{number}", title=f"blue {number}")
    await served.store.cancel("a0", "test")
    page = await served.viewer.get("/tickets?state=ready&text=red")
    assert re.findall(r'data-open href="/tickets/(\w+)"', page.text) == ["a2", "a1"]
    assert 'aria-label="Without state ready"' in page.text
    assert 'href="/tickets?text=red" aria-label="Without state ready"' in page.text
    assert re.search(r"ready <span>2</span></a>", re.sub(r"\s+", " ", page.text))
    assert "No ticket matches" in (await served.viewer.get("/tickets?state=failed")).text
    for wrong in ("agent=nobody", "state=nonsense", "after=x", f"text={'x' * 300}"):
        answer = await served.viewer.get(f"/tickets?{wrong}")
        assert answer.status_code == 200
        assert 'role="alert"' in answer.text, wrong


async def test_pages_lead_to_older_tickets_and_back(served: Served) -> None:
    await served.store.put_agent(ECHO)
    for number in range(120):
        await served.add(f"t{number:03d}")
    ids, path, back = [], "/tickets", []
    while True:
        page = await served.viewer.get(path)
        some = re.findall(r'data-open href="/tickets/(\w+)"', page.text)
        ids += some
        if newer := re.search(r'href="([^"]+)" rel="prev"', page.text):
            back.append((html.unescape(newer[1]), some))
        if (older := re.search(r'href="([^"]+)" rel="next"', page.text)) is None:
            break
        path = html.unescape(older[1])
    assert ids == [f"t{number:03d}" for number in reversed(range(120))]
    assert len(back) == 2
    page = await served.viewer.get(back[-1][0])
    assert re.findall(r'data-open href="/tickets/(\w+)"', page.text) == ids[50:100]
    newer = re.search(r'href="([^"]+)" rel="prev"', page.text)
    assert newer is not None
    assert html.unescape(newer[1]) == "/tickets"


async def test_many_are_counted_first_and_then_changed(served: Served) -> None:
    for number in range(5):
        await served.add(f"x{number}", title="some")
    await served.add("other")
    asked = await _post(served, "/tickets/bulk", {"do": "cancel", "all": "1", "filter": "text=some"})
    assert "Cancel 5 tickets?" in _shown(asked)
    assert (await served.store.ticket("x0")).state == "ready"
    fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', asked.text))
    assert fields == {"do": "cancel", "sure": "yes", "count": "5", "all": "1", "filter": "text=some"}
    assert "5 cancelled" in _shown(await _post(served, "/tickets/bulk", dict(fields)))
    assert {one.id for one in await served.store.tickets(states=["cancelled"])} == {f"x{n}" for n in range(5)}
    chosen = {"do": "retry", "id": ["x0", "x1", "other", "missing"]}
    assert "Retry 3 tickets?" in _shown(await _post(served, "/tickets/bulk", chosen))
    done = _shown(await _post(served, "/tickets/bulk", {**chosen, "sure": "yes"}))
    assert "2 to be run again" in done
    assert (await served.store.ticket("x1")).state == "ready"
    for wrong in ({"do": "explode", "all": "1"}, {"do": "cancel"}, {"do": "cancel", "all": "1", "filter": "state=z"}):
        assert (await _post(served, "/tickets/bulk", dict(wrong))).status_code == 400, wrong


async def test_a_viewer_is_offered_nothing_and_may_do_nothing(served: Served) -> None:
    await served.add("t")
    for path in ("/", "/tickets", "/tickets/t"):
        page = (await served.viewer.get(path)).text
        assert re.findall(r'<form[^>]* method="post" action="([^"]+)"', page) == ["/logout"], path
        assert "/cancel" not in re.sub(r"<a hidden[^>]*>", "", page), path
    for path in ("/tickets/t/cancel", "/tickets/t/retry", "/tickets/t/delete", "/tickets/t/ready", "/tickets/bulk"):
        answer = await _post(served, path, {"do": "cancel", "id": "t", "sure": "yes"}, role="viewer")
        assert answer.status_code == 403, path
    assert (await served.store.ticket("t")).state == "ready"


async def test_without_scripts_forms_cancel_retry_and_delete(served: Served) -> None:
    await served.store.add_ticket(Ticket(id="t", title="t", state="draft", agent_id=ECHO.id), by="me")
    assert "It is a draft" in _shown(await served.operator.get("/tickets/t"))
    for action, state in (("ready", "ready"), ("cancel", "cancelled"), ("retry", "ready")):
        if action != "ready":
            assert "this ticket?" in _shown(await served.operator.get(f"/tickets/t/{action}"))
        answer = await _post(served, f"/tickets/t/{action}", {"x": ""})
        assert (answer.status_code, answer.headers["location"]) == (303, "/tickets/t")
        assert (await served.store.ticket("t")).state == state
    page = _shown(await served.operator.get("/tickets/t"))
    assert "ticket.add by me" in page
    assert "No engine runs" in page
    assert (await _post(served, "/tickets/t/delete", {"x": ""})).headers["location"] == "/tickets"
    assert (await served.operator.get("/tickets/t")).status_code == 404
    assert "no ticket" in (await served.operator.get("/tickets/t")).text


async def test_a_ticket_s_page_shows_phases_calls_output_and_cost(served: Served) -> None:
    await scene.fill(served)
    page = await served.viewer.get("/tickets/t07")
    shown = re.sub(r"\s+", " ", _shown(page))
    for part in (
        "agent 24 s",
        "boot 61 ms",
        "claude-sonnet-5",
        "$0.075",
        "pypi.org:443",
        "42 passed",
        "ticket: in progress → done",
    ):
        assert part in shown, part
    kinds = re.findall(r'<rect x="[\d.]+" y="\d" width="[\d.]+" height="\d+" class="p-(\w+)"', page.text)
    assert kinds[:3] == ["queue", "template", "network"]
    assert kinds.count("call") == 3
    assert kinds.count("egress") == 1
    assert '<span class="a32">42 passed</span>' in page.text
    failed = _shown(await served.viewer.get("/tickets/t04"))
    assert "no test fails any more" in failed
    waits = _shown(await served.operator.get("/tickets/release"))
    assert "Publish 4.2 to the package index?" in waits


async def test_output_comes_in_parts_without_gap_or_double(served: Served) -> None:
    await served.add("t")
    [claim] = await scene.claims(served.store, 1)
    await scene.output(served.store, claim, [f"line {number}\n" for number in range(950)])
    page = await served.viewer.get("/tickets/t")
    parts = [page.text]
    while earlier := re.search(r'hx-get="([^"]+output\?before=\d+)"', parts[-1]):
        parts.append((await served.viewer.get(html.unescape(earlier[1]))).text)
    found = [int(one) for part in reversed(parts) for one in re.findall(r">line (\d+)<", part)]
    assert found == list(range(950))
    tail = re.search(r'hx-get="([^"]+output\?after=\d+)"', page.text)
    assert tail is not None
    assert (await served.viewer.get(tail[1])).status_code == 204
    await scene.output(served.store, claim, [f"line {number}\n" for number in range(950, 1400)])
    found, path = [], tail[1]
    while (part := await served.viewer.get(path)).status_code == 200:
        found += [int(one) for one in re.findall(r">line (\d+)<", part.text)]
        if (tail := re.search(r'hx-get="([^"]+output\?after=\d+)"', part.text)) is None:
            break
        path = tail[1]
        if len(found) == 450:  # the ticket ends: then there is nothing more to ask for
            await served.store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=1.0)
    assert found == list(range(950, 1400))
    line = re.search(r'href="(/tickets/t\?at=\d+#(L\d+-1))"[^>]*>[^·]*?</a><span>line 900<', page.text)
    assert line is not None
    assert f'id="{line[2]}"' in (await served.viewer.get(line[1].partition("#")[0])).text


async def test_a_long_output_is_bounded(served: Served) -> None:
    await served.add("t")
    [claim] = await scene.claims(served.store, 1)
    await scene.output(served.store, claim, ["x" * 16_000] * 120)
    page = await served.viewer.get("/tickets/t")
    assert len(page.content) < 400_000
    assert "Earlier lines" in page.text


async def test_the_lines_and_colours_of_a_part_are_bounded(served: Served) -> None:
    hostile = ("\n" * 16_000, "x\r" * 8000, "\x1b[31mx\x1b[32my" * 1300, "\x1b[31mx\n" * 2600)
    for number in range(len(hostile)):
        await served.add(f"t{number}")
    for claim in await scene.claims(served.store, len(hostile)):
        printed = hostile[int(claim.ticket.id[1:])]
        await scene.output(served.store, claim, [printed] * 16)
        seq = (await served.store.output(claim.ticket.id, limit=1))[0][0].seq
        for path in ("", "/output?after=0", f"/output?before={seq}", f"?at={seq}"):
            page = await served.viewer.get(f"/tickets/{claim.ticket.id}{path}")
            assert page.status_code == 200
            assert page.text.count('<div class="line') <= 4004
            assert page.text.count('<span class="a') <= 4004
            assert ("lines are left out here" in page.text) is (len(printed.splitlines()) > 1000)


async def test_what_is_hostile_stays_text_on_every_page(served: Served) -> None:
    title = HOSTILE.replace("\x00", "") + "x" * 60_000
    await served.store.put_agent(scene.CLAUDE)
    await served.add(
        "t", title=title, description=HOSTILE, inputs=json.dumps({"<b>": HOSTILE}), project_id=HOSTILE[:60]
    )
    [claim] = await scene.claims(served.store, 1)
    await scene.output(
        served.store, claim, [HOSTILE + "\n", "\x1b[31mred\x1b[0m \x1b[5mno\x1b]8;;https://evil\x07link\n"]
    )
    await served.store.append(
        [scene.event(claim, HOSTILE, **{HOSTILE: HOSTILE}), scene.event(claim, "egress", host=HOSTILE)]
    )
    await served.store.append([scene.event(claim, kind) for kind in ("transition", "change", "model_call", "approval")])
    for path in ("/", "/tickets", "/tickets/t", "/tickets/t/cancel", "/tickets?text=script"):
        page = (await served.operator.get(path)).text
        assert "<script>alert" not in page, path
        assert "\u202e" not in page, path
        assert "\x1b" not in page, path
        assert 'href="https:' not in page, path
        assert "⟨U+202E⟩" in page, path
        assert len(page) < 100_000, path
    failure = Failed(reason=FailureReason.AGENT_FAILED, message=HOSTILE)
    await served.store.finish(claim.attempt_id, failure, timings={}, vm_time_ms=1.0)
    ended = (await served.operator.get("/tickets/t")).text
    assert "<script>alert" not in ended
    assert '<span class="a31">red</span>' in ended
    whole = await served.operator.get("/tickets/t/text/title")
    assert whole.content.decode() == title
    assert whole.headers["content-disposition"].startswith("attachment; ")


async def test_rows_that_another_program_wrote_are_shown(served: Served) -> None:
    with sqlite3.connect(served.settings.data_dir / "swarm.db", timeout=60) as outside:
        outside.execute(
            "INSERT INTO tickets (id, title, state, error, inputs, created_at, priority) VALUES (?, ?, ?, ?, ?, ?, ?)",
            ("raw", HOSTILE + "x" * (1 << 20), "<b>odd</b>", b"\xff\x00\x1b", "{", "yesterday", "high"),
        )
        outside.execute(
            "INSERT INTO events (ticket_id, kind, data) VALUES ('raw', 'output', '[1]'), ('raw', '<i>', '{')"
        )
    for path in ("/", "/tickets", "/tickets/raw", "/tickets/raw/cancel", "/tickets/raw/delete"):
        page = await served.operator.get(path)
        assert page.status_code == 200, path
        assert not re.search("<script>alert|<b>odd|<i>|\x1b|\x00", page.text), path
        assert len(page.content) < 100_000, path


async def test_files_are_downloads(served: Served) -> None:
    await served.add("t")
    await left(served.store, {"a/b ü.txt": b"x", '<b>"&.html': b"<script>", "bad\udcff": b"y", "link": "a"})
    page = (await served.viewer.get("/tickets/t")).text
    links = [html.unescape(one) for one in re.findall(r'href="(/v1/tickets/t/(?:files|archive)[^"]*)"', page)]
    assert len(links) == 4
    assert "⟨U+DCFF⟩" in page
    assert "huge (not kept)" in page
    for link in links:
        if link.endswith("%FF"):
            continue  # no address can have such a name: the archive has the file
        answer = await served.viewer.get(link)
        assert answer.status_code == 200, link
        assert answer.headers["content-disposition"].startswith("attachment")


async def test_a_workflow_is_retried_from_a_step(served: Served) -> None:
    workflow = await register(served.store, "steps:\n- {id: a, agent: echo}\n- {id: b, needs: [a], agent: echo}\n")
    await served.add("w", agent_id=None, execution_mode="workflow", workflow_id=workflow)
    for _ in range(2):
        [claim] = await scene.claims(served.store, 1)
        await served.store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=1.0)
    assert await served.store.decided() in (True, False)
    assert '<option value="b">' in (await served.operator.get("/tickets/w/retry")).text
    assert (await _post(served, "/tickets/w/retry", {"step": "b"})).status_code == 303
    [claim] = await scene.claims(served.store, 1)
    assert claim.step_id == "b"
    again = "b #1" in _shown(await served.viewer.get("/tickets/w"))
    assert again
    failure = Failed(reason=FailureReason.HOST_ERROR, message="no disk", retryable=True)
    await served.store.finish(claim.attempt_id, failure, timings={}, vm_time_ms=1.0)
    await served.store.heartbeat("e", host="h", pid=1, info={})
    assert "b is tried again in" in _shown(await served.viewer.get("/tickets/w"))


async def test_what_an_engine_says_may_be_anything(served: Served) -> None:
    values: tuple[object, ...] = ("<b>", [], {"a": 1}, None, True, -1, 1e308)
    for number, value in enumerate(values):
        names = ("running", "max_vms", "waits_for", "per_minute", "driver", "memory_mb", "memory_free_mb", "stopping")
        await served.store.heartbeat(f"e{number}", host="<b>", pid=1, info=dict.fromkeys(names, value))
    page = await served.viewer.get("/")
    assert page.status_code == 200
    assert "<b>" not in page.text


async def test_a_form_that_can_t_be_read_is_the_sender_s_fault(served: Served) -> None:
    fields = "&".join(f"id={number}" for number in range(2000))
    form = {"content-type": "application/x-www-form-urlencoded"}
    answer = await served.operator.post("/tickets/bulk", content=f"do=cancel&{fields}", headers=form)
    assert answer.status_code == 400
    broken = {"content-type": "multipart/form-data"}
    assert (await served.operator.post("/tickets/bulk", content=b"x", headers=broken)).status_code == 400
    many = "&".join("text=x" for _ in range(200))
    data = {"do": "cancel", "all": "1", "filter": many}
    assert (await _post(served, "/tickets/bulk", data)).status_code == 400


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("a\nb\r\nc\rd", [[("", "a")], [("", "b")], [("", "c")], [("", "d")]]),
        ("\x1b[1;31mx\x1b[22my\x1b[39mz", [[("a1 a31", "x"), ("a31", "y"), ("", "z")]]),
        ("\x1b[31mx\ny\x1b[mz", [[("a31", "x")], [("a31", "y"), ("", "z")]]),
        ("\x1b[38;5;31mx\x1b[38;2;31;32;33my", [[("", "xy")]]),
        ("\x1b[2J\x1b[10;10Hx\x1b(B\x1bcy\x1b", [[("", "xBy")]]),
        ("\x1b]8;;https://evil\x1b\\x\x1b]8;;\x07y\x1b]never", [[("", "xy")]]),
        ("\x1b[" + "9" * 5000 + "mx", [[("", "x")]]),
        ("", []),
        ("\n", [[]]),
    ],
)  # fmt: skip
def test_of_escape_sequences_only_colours_are_left(printed: str, shown: list[list[tuple[str, str]]]) -> None:
    assert [[(part.classes, part.text) for part in line] for line in ansi.lines(printed)] == shown


def test_a_text_of_escapes_takes_no_time_that_grows_with_its_square() -> None:
    for text_ in ("\x1b[" * 50_000, "\x1b]" * 50_000, "\x1b[31mx" * 20_000, "\x1bP" * 50_000):
        assert sum(len(line) for line in ansi.lines(text_)) <= 500


def test_events_of_other_programs_break_nothing() -> None:
    for kind in ("transition", "change", "approval", "model_call", "egress", "x"):
        for data in ({}, {"from": 1, "to": [], "host": None, "ms": "x", "latency_ms": {}}, {"text": "x" * 10_000}):
            assert len(history.told(Event(ticket_id="t", kind=kind, data=data))) < 2000
    assert waterfall.chart([], [], []) is None


def test_numbers_are_short() -> None:
    assert [text.duration(ms) for ms in (None, 3, 999, 4200, 61_000, 7_300_000, 90_000_000)] == [
        "", "3 ms", "999 ms", "4.2 s", "1 min 1 s", "2 h 1 min", "1 d 1 h",
    ]  # fmt: skip
    assert [text.money(usd) for usd in (None, 0, 0.00002, 0.0123, 12.5)] == [
        "",
        "$0.00",
        "$0.00002",
        "$0.012",
        "$12.50",
    ]
    assert text.stamp("nonsense") == text.age(None) == ""
    assert urlsplit(text.stamp("2026-01-31T12:00:00.000Z")).path == "2026-01-31 12:00:00 UTC"


@pytest.mark.parametrize("value", ["CAST(X'61FF62' AS TEXT)", "9e999", "X'FFFE'", "'0001-01-01T00:00:00+14:00'"])
async def test_pages_and_lists_show_any_value_of_another_program(served: Served, value: str) -> None:
    await scene.fill(served)
    text = "schedule: [{cron: '5 5 5 5 *'}]\nsteps: [{id: one, agent: echo}]"
    await register(served.store, text, name="by-time")
    columns = {
        "agents": ("id", "name"), "workflows": ("id", "version"), "workers": ("host",), "hosts": ("name",),
        "schedules": ("workflow_id", "missed_count", "next_at"), "attempts": ("number", "vm_id", "cost_usd"),
        "workflow_runs": ("total_vm_time_ms", "total_cost_usd"),
        "step_executions": ("duration_ms", "vm_id", "agent_id"), "tickets": ("created_at", "started_at", "updated_at"),
    }  # fmt: skip
    with contextlib.closing(
        sqlite3.connect(served.settings.data_dir / "swarm.db", isolation_level=None, timeout=60)
    ) as database:
        for table, names in columns.items():
            for name in names:
                only = f"(SELECT max(rowid) FROM {table})"
                database.execute(f"UPDATE OR IGNORE {table} SET {name} = {value} WHERE rowid = {only}")
    lists = ("agents", "workflows", "schedules", "hosts", "tickets", "tickets/run-1")
    for path in ("/", "/tickets/run-1/graph", *(f"/{one}" for one in lists), *(f"/v1/{one}" for one in lists)):
        assert (await served.viewer.get(path)).status_code == 200, path
