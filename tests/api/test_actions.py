"""What is done to tickets over the API: one at a time, many, and waiting."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from swarm.model import Event, Role
from swarm.store.registry.tokens import Actor, new_token
from tests.api.served import Served
from tests.api.test_auth import refused
from tests.store import flows


@asynccontextmanager
async def of_project(served: Served, project: str) -> AsyncIterator[httpx.AsyncClient]:
    token = new_token()
    await served.store.add_token(token, Actor(name=f"of-{project}", role=Role.OPERATOR, project_id=project), by="test")
    headers = {"authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=60) as client:
        yield client


def another_program(served: Served, sql: str) -> None:
    with contextlib.closing(
        sqlite3.connect(served.settings.data_dir / "swarm.db", isolation_level=None, timeout=60)
    ) as connection:
        connection.execute(sql)


async def waiting(served: Served, id: str, text: str) -> None:
    """A ticket with a step, or several, that wait for a person."""
    workflow = await flows.register(served.store, text, name=f"of-{id}")
    await served.add(id, agent_id=None, execution_mode="workflow", workflow_id=workflow)
    assert await flows.run(served.store) == []


async def test_from_draft_to_deleted(served: Served) -> None:
    post = served.operator.post
    draft = (await post("/v1/tickets", json={"title": "x", "agent": "echo", "draft": True, "id": "t"})).json()
    assert draft["state"] == "draft"
    refused(await post("/v1/tickets/t/retry"), 409, "has not ended")
    assert (await post("/v1/tickets/t/ready")).json()["state"] == "ready"
    assert (await post("/v1/tickets/t/cancel")).json()["state"] == "cancelled"
    refused(await post("/v1/tickets/t/ready"), 409, "only a draft")
    assert (await post("/v1/tickets/t/retry", json={})).json()["state"] == "ready"
    refused(await post("/v1/tickets/t/retry", json={"step": "a"}), 409, "has not ended")
    (claim,) = await flows.claims(served.store)
    refused(await served.operator.delete("/v1/tickets/t"), 409, "in_progress")
    assert (await served.operator.delete("/v1/tickets/t?force=true")).status_code == 204
    refused(await served.operator.delete("/v1/tickets/t"), 404, "no ticket")
    deleted = [event.data for event in await served.store.events(None) if event.data.get("did") == "ticket.delete"]
    assert [one["by"] for one in deleted] == ["the-operator"] and claim.ticket.id == "t"


async def test_answers(served: Served) -> None:
    post = served.operator.post
    await waiting(served, "t", "steps: [{id: a, agent: echo, approval: 'A?'}, {id: b, agent: echo, approval: 'B?'}]")
    refused(await post("/v1/tickets/t/approve", json={}), 409, "name one")
    refused(await post("/v1/tickets/t/approve", json={"step": "c"}), 409, "does not wait")
    refused(await post("/v1/tickets/t/approve", json={"step": "a", "budget_usd": 3}), 409, "not for a budget")
    refused(await post("/v1/tickets/t/reject", json={"step": "a"}), 400, "why")
    answered = (await post("/v1/tickets/t/approve", json={"step": "a", "by": "ann", "why": "fine"})).json()
    assert (answered["step"], answered["ticket"]["id"]) == ("a", "t")
    assert (await post("/v1/tickets/t/reject", json={"why": "no"})).json()["step"] == "b"
    refused(await post("/v1/tickets/t/approve", json={}), 409, "no step of it waits")
    said = [event.data for event in await served.store.events("t") if event.kind == "approval"]
    assert [(one["approved"], one["by"], one["why"]) for one in said] == [
        (True, "ann (the-operator)", "fine"),
        (False, "the-operator", "no"),
    ]


async def test_retry_from_a_step(served: Served) -> None:
    workflow = await flows.register(served.store, "steps: [{id: a, agent: echo}, {id: b, agent: echo, needs: a}]")
    await served.add("t", agent_id=None, execution_mode="workflow", workflow_id=workflow)
    assert await flows.run(served.store) == ["a", "b"]
    refused(await served.operator.post("/v1/tickets/t/retry", json={"step": "z"}), 400, "z")
    assert (await served.operator.post("/v1/tickets/t/retry", json={"step": "b"})).json()["state"] == "in_progress"
    assert await flows.run(served.store) == ["b"]
    shown = (await served.viewer.get("/v1/tickets/t")).json()
    assert len(shown["runs"]) == 2 and [one["step_id"] for one in shown["attempts"]] == ["a", "b", "b"]


async def test_waiting_for_the_end(served: Served) -> None:
    await served.add("t")
    get = served.viewer.get
    early = (await get("/v1/tickets/t/wait?timeout_seconds=0")).json()
    assert (early["ended"], early["ticket"]["state"]) == (False, "ready")
    refused(await get("/v1/tickets/t/wait?timeout_seconds=61"), 400, "timeout_seconds")
    began = time.monotonic()
    many = [asyncio.create_task(get("/v1/tickets/t/wait?timeout_seconds=60")) for _ in range(20)]
    await served.add("deleted")
    gone = asyncio.create_task(get("/v1/tickets/deleted/wait?timeout_seconds=60"))
    await get("/v1/tickets/t")  # they are on their way
    await served.store.cancel("t", "ann")
    assert {(one.json()["ended"], one.json()["ticket"]["state"]) for one in await asyncio.gather(*many)} == {
        (True, "cancelled")
    }
    await served.store.remove_tickets(["deleted"], by="ann")
    refused(await gone, 404, "no ticket")
    assert time.monotonic() - began < 30  # woken, and not at the end of its time


async def test_a_change_of_another_program_is_noticed(served: Served) -> None:
    """It writes no event; events of other tickets come all the time."""
    await served.add("t")
    await served.add("other")
    waits = asyncio.create_task(served.viewer.get("/v1/tickets/t/wait?timeout_seconds=60"))
    await served.viewer.get("/v1/tickets/t")
    await served.store._write.call(
        lambda tx: tx.connection.driver.execute("UPDATE tickets SET state = 'done'") and None
    )
    while not waits.done():
        await served.store.append([Event(ticket_id="other", kind="output", data={"text": "x"})])
        await served.viewer.get("/v1/tickets/other")
    assert (await waits).json()["ended"] is True


async def bulk(client: httpx.AsyncClient, **body: Any) -> Any:
    answer = await client.post("/v1/tickets/bulk", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_many_at_once(served: Served) -> None:
    for number in range(250):
        await served.add(f"t{number}", project_id="a" if number % 2 else "b", title=f"Report {number}")
    which = {"text": "report", "project": "a"}
    counted = await bulk(served.operator, action="cancel", filter=which)
    assert counted == {
        "matched": {"number": 125, "exact": True}, "done": 0, "skipped": 0, "reasons": [],
        "left": {"number": 125, "exact": True}, "after": None,
    }  # fmt: skip
    some = await bulk(served.operator, action="cancel", filter=which, confirm=True, count=120)
    assert (some["done"], some["skipped"], some["left"]["number"]) == (120, 0, 5) and some["after"]
    rest = await bulk(served.operator, action="cancel", filter=which, confirm=True, after=some["after"])
    assert (rest["done"], rest["left"]["number"], rest["after"]) == (5, 0, None)
    cancelled = (await served.viewer.get("/v1/tickets?state=cancelled&limit=500")).json()["tickets"]
    assert {one["error"] for one in cancelled} == {"cancelled by the-operator"} and len(cancelled) == 125
    assert (await bulk(served.operator, action="cancel", filter={"state": ["done"]}))["matched"]["number"] == 0
    again = await bulk(served.operator, action="retry", filter={}, confirm=True)
    assert (again["matched"]["number"], again["done"]) == (125, 125)
    async with of_project(served, "b") as team:
        named = await bulk(team, action="delete", ids=["t0", "t1", "t2", "t2", "nope"], confirm=True)
    assert (named["matched"]["number"], named["done"], named["skipped"]) == (2, 2, 2)
    assert {(one["id"], one["reason"]) for one in named["reasons"]} == {
        ("t1", "there is no such ticket"),
        ("nope", "there is no such ticket"),
    }
    await served.store.claim("test", limit=1, lease_seconds=60)
    left = await bulk(served.operator, action="delete", filter={}, confirm=True)
    assert (left["done"], left["skipped"]) == (247, 1) and "--force" in left["reasons"][0]["reason"]
    forced = await bulk(served.operator, action="delete", filter={}, confirm=True, force=True)
    assert (forced["done"], await served.store.tickets()) == (1, [])


async def test_a_trigger_that_refuses_one_spares_the_others(served: Served) -> None:
    for id in ("a", "b", "c"):
        await served.add(id)
    trigger = """CREATE TRIGGER mine BEFORE UPDATE OF state ON tickets WHEN NEW.id = 'b'
        BEGIN SELECT RAISE(ABORT, 'b is mine'); END"""
    another_program(served, trigger)
    done = await bulk(served.operator, action="cancel", filter={}, confirm=True)
    assert (done["done"], done["skipped"]) == (2, 1) and "b is mine" in done["reasons"][0]["reason"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"action": "cancel"}, "either `ids` or `filter`"),
        ({"action": "cancel", "ids": [], "filter": {}}, "either `ids` or `filter`"),
        ({"action": "explode", "filter": {}}, "action"),
        ({"action": "cancel", "ids": ["x"] * 1001}, "ids"),
        ({"action": "cancel", "filter": {}, "count": 0}, "count"),
        ({"action": "cancel", "filter": {"nope": 1}}, "nope"),
        ({"action": "cancel", "filter": {}, "after": "x"}, "after"),
    ],
    ids=str,
)
async def test_bad_bulk_requests(served: Served, body: dict[str, Any], said: str) -> None:
    refused(await served.operator.post("/v1/tickets/bulk", json=body), 400, said)


async def test_counts(served: Served) -> None:
    for number in range(5):
        await served.add(f"t{number}", project_id="a" if number < 2 else None)
    await served.store.cancel("t0", "ann")
    counts = (await served.viewer.get("/v1/tickets/counts")).json()
    assert {state: one["number"] for state, one in counts.items() if one["number"]} == {"ready": 4, "cancelled": 1}
    assert len(counts) == 8 and all(one["exact"] for one in counts.values())
    async with of_project(served, "a") as team:
        mine = (await team.get("/v1/tickets/counts?state=ready&since=1d")).json()
    assert mine == {"ready": {"number": 1, "exact": True}}


async def test_a_project_answers_and_waits_for_its_own(served: Served) -> None:
    await served.add("theirs", project_id="b")
    async with of_project(served, "a") as team:
        for verb in ("ready", "retry", "approve", "cancel"):
            refused(await team.post(f"/v1/tickets/theirs/{verb}", json={}), 404, "no ticket")
        refused(await team.get("/v1/tickets/theirs/wait"), 404, "no ticket")
        refused(await team.delete("/v1/tickets/theirs"), 404, "no ticket")
        after = await team.post("/v1/tickets", json={"title": "x", "agent": "echo", "after": ["theirs"]})
        refused(after, 404, "no ticket")  # nor can it find out how it ends
