"""The API of tickets and their events."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import sqlite3
import weakref
from contextlib import closing
from itertools import product
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from starlette.responses import Response

from swarm.api.endpoint import guarded
from swarm.api.problem import Refused
from swarm.model import Event
from swarm.store.details import MOST
from tests.api.served import Served
from tests.api.test_auth import refused
from tests.conftest import PATIENCE_SECONDS
from tests.store import flows


async def ids(client: httpx.AsyncClient, query: str = "") -> list[str]:
    """All pages."""
    found, after = [], ""
    while True:
        answer = (await client.get(f"/v1/tickets?{query}&limit=2{after}")).json()
        found += [one["id"] for one in answer["tickets"]]
        if answer["after"] is None:
            return found
        after = f"&after={answer['after']}"


async def test_a_ticket_is_submitted_once(served: Served) -> None:
    kept = {"keep_vm": "failure", "keep_vm_seconds": 60.0, "requires": {"zone": "a", "gpu": True, "rack": 7}}
    body = {"title": "x", "agent": "echo", "inputs": {"name": "world"}, **kept}
    first, again = [
        await served.operator.post("/v1/tickets", json=body, headers={"idempotency-key": "k"}) for _ in range(2)
    ]
    assert first.status_code == again.status_code == 201
    assert first.json()["id"] == again.json()["id"] and first.json()["inputs"] == {"name": "world"}
    assert first.json().items() >= kept.items()
    other = await served.operator.post("/v1/tickets", json={**body, "title": "y"}, headers={"idempotency-key": "k"})
    refused(other, 409, "another request")
    mine = await served.admin.post("/v1/tickets", json=body, headers={"idempotency-key": "k"})
    assert mine.json()["id"] != first.json()["id"]  # a key is its sender's
    assert len(await served.store.tickets()) == 2


async def test_a_search_finds_all_alphabets_in_both_cases(served: Served) -> None:
    for id, title in (("u1", "\u00c4rger im B\u00dcRO"), ("u2", "\u00e4rger")):
        await served.add(id, title=title)
    for text, found in (
        ("\u00c4rger", {"u1", "u2"}),
        ("\u00e4rger", {"u1", "u2"}),
        ("\u00c4rger im b\u00dcro", {"u1"}),
        ("b\u00fcro", {"u1"}),
    ):
        assert set(await ids(served.viewer, f"text={text}")) == found, text


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"title": "x"}, 400, "either an agent or a workflow"),
        ({"title": "x", "agent": "ecko"}, 404, "did you mean"),
        ({"title": "x", "agent": "echo", "nope": 1}, 400, "unknown field"),
        ({"title": "x", "agent": "echo", "priority": "high"}, 400, "priority"),
        ({"title": "x", "agent": "echo", "priority": 1 << 40}, 400, "priority"),
        ({"title": "x", "agent": "echo", "keep_vm": "forever"}, 400, "keep_vm: must be 'never', 'failure' or 'always'"),
        ({"title": "x", "agent": "echo", "keep_vm_seconds": 0}, 400, "keep_vm_seconds"),
        ({"title": "x", "agent": "echo", "requires": {"zone": "a b"}}, 400, "requires.zone"),
        ({"title": "x", "agent": "echo", "requires": {"a b": 1}}, 400, "requires"),
        ({"title": "x", "agent": "echo", "requires": {str(n): 1 for n in range(9)}}, 400, "requires"),
        ({"agent": "echo"}, 400, "title: is missing"),
        ([], 400, "must be an object"),
    ],
    ids=str,
)
async def test_bad_submissions(served: Served, body: Any, status: int, said: str) -> None:
    refused(await served.operator.post("/v1/tickets", json=body), status, said)
    assert await served.store.tickets() == []


@pytest.mark.parametrize(
    ("content", "headers", "status", "said"),
    [
        (b"{", {}, 400, "not JSON"),
        (b"\xff", {}, 400, "not JSON"),
        (b"[" * 100_000, {}, 400, "nested too deeply"),
        (b"{}", {"content-type": "text/plain"}, 415, "must be application/json"),
    ],
    ids=["cut", "binary", "deep", "no JSON"],
)
async def test_bad_bodies(served: Served, content: bytes, headers: dict[str, str], status: int, said: str) -> None:
    given = {"content-type": "application/json", **headers}
    refused(await served.operator.post("/v1/tickets", content=content, headers=given), status, said)


async def test_a_body_that_is_too_large_is_not_read(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
    head = f"Host: x\r\nAuthorization: Bearer {served.tokens['operator']}\r\nContent-Length: 99999999\r\n\r\n"
    writer.write(f"POST /v1/tickets HTTP/1.1\r\n{head}".encode())
    async with asyncio.timeout(PATIENCE_SECONDS):
        answer = await reader.read()  # to its end: the server closes
    assert b" 413 " in answer.partition(b"\r\n")[0] and b"the body has more than" in answer
    writer.close()


async def test_pages_and_filters(served: Served) -> None:
    for number in range(7):
        await served.add(f"t{number}", title=f"Report {number}", priority=number)
    await served.store.cancel("t3", "anna")
    newest = [f"t{number}" for number in reversed(range(7))]
    assert await ids(served.viewer) == newest
    assert await ids(served.viewer, "state=cancelled") == ["t3"]
    assert await ids(served.viewer, "state=cancelled&state=ready") == newest
    assert await ids(served.viewer, "text=report%205") == ["t5"]
    assert await ids(served.viewer, "text=by%20anna") == ["t3"]
    assert await ids(served.viewer, "text=%25") == []
    assert await ids(served.viewer, "agent=echo") == newest
    assert await ids(served.viewer, "before=2000-01-01") == []
    refused(await served.viewer.get("/v1/tickets?after=nonsense"), 400, "after")
    refused(await served.viewer.get("/v1/tickets?state=gone"), 400, "state")
    refused(await served.viewer.get("/v1/tickets?limit=501"), 400, "limit")
    refused(await served.viewer.get("/v1/tickets?sort=id"), 400, "unknown field")


async def test_filters_are_bounded(served: Served) -> None:
    """Each name is a look-up, and each value a part of a statement and of a page."""
    paths = ("/v1/tickets", "/v1/tickets/counts", "/tickets", "/tickets/bulk")
    for path, name in product(paths, ("agent", "workflow", "state")):
        value = "ready" if name == "state" else "echo"
        answer = await served.operator.get(f"{path}?do=cancel&all=1&{'&'.join([f'{name}={value}'] * 2000)}")
        said = f"{name}: must be a list of at most 20 items" if path.startswith("/v1/") else "too many parts"
        assert (answer.status_code, said in answer.text) == (400, True), answer.text
    assert (await served.operator.get("/v1/tickets?agent=echo&agent=echo&state=ready&state=ready")).status_code == 200


async def test_what_is_said_of_a_body_is_bounded(served: Served) -> None:
    for body, said in (
        ({"action": "cancel", "filter": {"agent": ["echo"] * 100_000}}, "a list of at most 20 items"),
        ({"action": "cancel", "filter": {"state": ["no"] * 100_000}}, "and 99,980 more"),
        ({"action": "cancel", "filter": {f"x{i}": 1 for i in range(60_000)}}, "and 59,980 more"),
        ({f"x{i}": 1 for i in range(60_000)}, "more than 1000 fields"),
    ):
        answer = await served.operator.post("/v1/tickets/bulk", json=body)
        assert (answer.status_code, said in answer.text) == (400, True), answer.text[:500]
        assert len(answer.text) < 10_000


async def test_large_answers_are_kept_in_bounds(served: Served) -> None:
    """Until their clients take them, or are gone."""
    await served.add("large", inputs=json.dumps({"text": "x" * (15 << 20)}))
    whole = await served.viewer.get("/v1/tickets/large")
    assert whole.headers["content-length"] == str(len(whole.content)) and len(whole.content) > 15 << 20
    async with contextlib.AsyncExitStack() as stack:
        headers = {"authorization": f"Bearer {served.tokens['viewer']}"}
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=served.url, headers=headers, timeout=60))
        for path in ("/v1/tickets/large", "/tickets/large/text/inputs") * 2:  # and nobody reads them
            answer = await stack.enter_async_context(client.stream("GET", path))
            assert answer.status_code == 200
        for path in ("/v1/tickets/large", "/tickets/large/text/inputs"):
            busy = await served.viewer.get(path)
            assert (busy.status_code, busy.headers["retry-after"]) == (503, "2")
            assert "other large answers are on their way" in busy.text
        assert (await served.viewer.get("/v1/tickets")).status_code == 200
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (await served.viewer.get("/v1/tickets/large")).status_code == 503:  # until the server sees them gone
            pass


async def test_a_refused_request_keeps_nothing() -> None:
    """What it has read is freed at once: the garbage of cycles stays for long."""

    class Read:
        pass

    kept: list[weakref.ref[Read]] = []

    async def work() -> Response:
        read = Read()
        kept.append(weakref.ref(read))
        raise Refused(503, "no room")

    gc.disable()
    try:
        assert (await guarded(work)).status_code == 503
        assert kept[0]() is None
    finally:
        gc.enable()


async def test_events_follow_live_without_gap_or_double(served: Served) -> None:
    await served.add("t")

    async def write() -> None:
        for number in range(200):
            await served.store.append([Event(ticket_id="t", kind="output", data={"text": f"{number}\n"})])
        await served.store.cancel("t", "anna")

    async def read(leave_after: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            headers = {"last-event-id": str(found[-1]["seq"])} if found else {}
            async with served.viewer.stream("GET", "/v1/tickets/t/events/live", headers=headers) as stream:
                taken = 0
                async for line in stream.aiter_lines():
                    if line == "event: end":
                        return found
                    if line.startswith("data: "):
                        found.append(json.loads(line[6:]))
                        taken += 1
                        if taken == leave_after:
                            break

    async with asyncio.timeout(PATIENCE_SECONDS):
        _, *readers = await asyncio.gather(write(), *(read(n) for n in (1, 7, 1000)))
    stored = [event.seq for event in await served.store.events("t")]
    for found in readers:
        assert [event["seq"] for event in found] == stored
        assert [e["data"]["text"] for e in found if e["kind"] == "output"] == [f"{n}\n" for n in range(200)]
    ranged = (await served.viewer.get(f"/v1/tickets/t/events?after={stored[9]}&limit=5")).json()
    assert [event["seq"] for event in ranged["events"]] == stored[10:15] and ranged["after"] == stored[14]


async def test_of_a_large_run_the_newest_steps_are_shown_and_those_that_wait(served: Served) -> None:
    await served.add("t")
    (claim,) = await flows.claims(served.store)
    small = (await served.viewer.get("/v1/tickets/t")).json()
    assert small["complete"] is True and len(small["steps"]) == len(small["attempts"]) == 1
    with closing(sqlite3.connect(served.settings.data_dir / "swarm.db", isolation_level=None, timeout=60)) as other:
        for table in ("step_executions", "attempts"):
            names = [row[1] for row in other.execute(f"PRAGMA table_info({table})")]
            new = {"id": "'z' || printf('%05d', n.value)", "step_id": "'s' || n.value", "outcome": "'ok'"}
            new |= {"status": "CASE n.value WHEN 1 THEN 'waiting' ELSE 'completed' END"}
            new |= {"step_execution_id": "'z' || printf('%05d', n.value)", "number": "n.value"}
            columns = ", ".join(new.get(name, name) for name in names)
            other.execute(
                "WITH RECURSIVE n(value) AS (SELECT 1 UNION ALL SELECT value + 1 FROM n WHERE value < 1500) "
                f"INSERT INTO {table} SELECT {columns} FROM {table} JOIN n"
            )
        large = (await served.viewer.get("/v1/tickets/t")).json()
        shown = [step["id"] for step in large["steps"]]
        assert large["complete"] is False and len(shown) == len(large["attempts"]) == MOST
        assert shown == sorted(shown) and {"z00001", "z01500", "z00502"} <= set(shown) and "z00501" not in shown
        other.execute("UPDATE step_executions SET outputs = ?", [json.dumps("x" * 60_000)])
    heavy = await served.store.details(claim.ticket.id)
    assert not heavy.complete and 100 < len(heavy.steps) < 500


@pytest.mark.parametrize("id", ["a/b", "/", "a%2Fb", "x?y#z", "ä ö", "counts/x", "%"])
async def test_a_ticket_of_another_program_has_an_address(served: Served, id: str) -> None:
    await served.add(id, title="by hand")
    name = quote(id, safe="")
    assert (await served.viewer.get(f"/v1/tickets/{name}")).json()["ticket"]["id"] == id
    assert (await served.viewer.get(f"/v1/tickets/{name}/events")).json()["events"] == []
    listed = (await served.viewer.get("/tickets")).text
    assert f'href="/tickets/{name}"' in listed
    assert "by hand" in (await served.viewer.get(f"/tickets/{name}")).text
    asked = await served.nobody.get(f"/tickets/{name}")
    assert asked.headers["location"] == f"/login?next={quote(f'/tickets/{name}', safe='')}"
    assert (await served.operator.post(f"/v1/tickets/{name}/cancel")).json()["state"] == "cancelled"


async def test_no_text_has_a_nul(served: Served) -> None:
    await served.add("t")
    assert await ids(served.viewer, "text=%00") == [] == await ids(served.viewer, "text=t%00")
