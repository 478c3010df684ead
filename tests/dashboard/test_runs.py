"""Runs and approvals: what is shown, and who may change what."""

from __future__ import annotations

import re
from html import unescape

import httpx

from swarm.model import Role
from swarm.store.registry.tokens import Actor, new_token
from tests.api.served import Served
from tests.dashboard.flows import HOSTILE, echo, large, run, start, workflow

ASK: dict[str, object] = {
    "id": "ask",
    "needs": ["build"],
    "approval": {"message": f"Ship it? {HOSTILE}", "timeout_seconds": 3600},
}


async def page(client: httpx.AsyncClient, address: str, status: int = 200) -> str:
    answer = await client.get(address)
    assert answer.status_code == status, answer.text[-500:]
    assert "<script>alert" not in answer.text and not re.search("[\u202e\u2066\x1b]", answer.text)
    return answer.text


def links(text: str) -> list[str]:
    return [unescape(one) for one in re.findall(r'href="(/[^"]*)"', text)]


async def of_project(served: Served, project: str, role: Role = Role.OPERATOR) -> httpx.AsyncClient:
    token = new_token()
    await served.store.add_token(token, Actor(name=f"of-{project}", role=role, project_id=project), by="test")
    return httpx.AsyncClient(base_url=served.url, headers={"authorization": f"Bearer {token}"}, timeout=60)


async def test_an_approval_is_found_and_answered_in_place(served: Served) -> None:
    flow = workflow("release", echo("build"), ASK, echo("ship", "ask"))
    await start(served.store, flow, "t1", title=HOSTILE, project_id="mine")
    await start(served.store, flow, "t2")
    await run(served.store)
    shown = await page(served.operator, "/approvals")
    assert shown.count('value="approve"') == 2 and "Rejected by itself at" in shown and "release@1.0.0" in shown
    assert ">2</span>" in await page(served.viewer, "/agents")  # the count at the top of every page
    seen = await page(served.viewer, "/approvals")
    assert "Ship it?" in seen and 'value="approve"' not in seen
    form = {"step": "ask", "verdict": "approve", "why": "good", "back": "/tickets/t1/graph"}
    assert (await served.viewer.post("/tickets/t1/answer", data=form)).status_code == 403
    async with await of_project(served, "other") as other, await of_project(served, "mine") as mine:
        assert "No step waits" in await page(other, "/approvals")
        assert (await other.post("/tickets/t1/answer", data=form)).status_code == 404
        await page(other, "/tickets/t1/graph", 404)
        await page(other, "/tickets/t1/graph/step?step=build", 404)
        assert (await other.post("/tickets/t1/graph/retry", data=form)).status_code == 404
        assert (await page(mine, "/approvals")).count('value="approve"') == 1
    assert (await served.operator.post("/tickets/t1/answer", data={**form, "verdict": "?"})).status_code == 400
    answer = await served.operator.post("/tickets/t1/answer", data=form)
    assert (answer.status_code, answer.headers["location"]) == (303, "/tickets/t1/graph")
    assert (await served.operator.post("/tickets/t1/answer", data=form)).status_code == 409
    elsewhere = {"step": "ask", "verdict": "reject", "back": "//elsewhere"}
    answer = await served.operator.post("/tickets/t2/answer", data=elsewhere)
    assert (answer.status_code, answer.headers["location"]) == (303, "/approvals")
    await run(served.store)
    assert (await served.store.ticket("t1")).state == "done"
    told = [event.data for event in await served.store.events("t1") if event.kind == "approval"]
    assert told == [{"approved": True, "by": "the-operator", "why": "good"}]
    assert (await served.store.ticket("t2")).state == "failed"
    assert "No step waits" in await page(served.viewer, "/approvals")


async def test_a_step_that_waits_beyond_its_budget_may_get_a_larger_one(served: Served) -> None:
    await start(served.store, workflow("one", ASK | {"needs": []}), "t", budget_usd=1.0)
    await run(served.store)
    sent = {"step": "ask", "verdict": "approve", "budget_usd": "much"}
    assert (await served.operator.post("/tickets/t/answer", data=sent)).status_code == 400
    assert (await served.operator.post("/tickets/t/answer", data=sent | {"budget_usd": "5"})).status_code == 409
    assert (await served.operator.post("/tickets/t/answer", data=sent | {"budget_usd": ""})).status_code == 303


async def test_a_run_shows_what_failed_and_runs_again_from_there(served: Served) -> None:
    each = echo("each", "list", for_each={"items": [1, 2, 3]})
    await start(served.store, workflow("fan", echo("list"), each, echo("sum", "each"), on_error=[echo("tell")]), "t")
    await page(served.viewer, "/tickets/t/graph", 404)  # it has not run
    await run(served.store, failing=("each[1]",))
    shown = await page(served.operator, "/tickets/t/graph")
    assert "it broke" in shown and shown.count("<svg") == 3 and 'aria-label="each: echo' in shown
    assert {"fill st-completed", "fill st-failed"} <= set(re.findall(r'class="(fill [\w-]+)"', shown))
    found = links(shown)
    assert "/tickets/t/graph?step=each#steps" in found and "/tickets/t/graph/step?step=each%5B1%5D" in found
    some = links(await page(served.viewer, "/tickets/t/graph?step=each&state=failed"))
    assert "/tickets/t/graph/step?step=each%5B1%5D" in some and "/tickets/t/graph/step?step=each%5B0%5D" not in some
    step = await page(served.viewer, "/tickets/t/graph/step?step=each[1]")
    assert "agent failed" in step and 'id="outputs"' in step
    await page(served.viewer, "/tickets/t/graph/step?step=nowhere", 404)
    await page(served.viewer, "/tickets/t/graph?run=nowhere", 404)
    await page(served.viewer, "/tickets/t/graph?path=each[0]/", 404)
    assert "Retry from here" in shown and "Retry from here" not in await page(served.viewer, "/tickets/t/graph")
    assert (await served.viewer.post("/tickets/t/graph/retry", data={"step": "each[1]"})).status_code == 403
    assert (await served.operator.post("/tickets/t/graph/retry", data={})).status_code == 400
    assert (await served.operator.post("/tickets/t/graph/retry", data={"step": "nowhere"})).status_code == 400
    assert (await served.operator.post("/tickets/t/graph/retry", data={"step": "each[1]"})).status_code == 303
    await run(served.store)
    assert (await served.store.ticket("t")).state == "done"
    again = await page(served.operator, "/tickets/t/graph")
    assert "2 runs of this ticket" in again and "it broke" not in again
    former = (await served.store.runs("t"))[0].id
    old = await page(served.operator, f"/tickets/t/graph?run={former}")
    assert "it broke" in old and "Retry from here" not in old  # only the newest run goes on


async def test_a_nested_workflow_opens(served: Served) -> None:
    inner = {"id": "in", "workflow": {"steps": [echo("one"), echo("two", "one")]}}
    await start(served.store, workflow("outer", echo("a"), {**inner, "needs": ["a"]}), "t")
    await run(served.store)
    [link] = {one for one in links(await page(served.viewer, "/tickets/t/graph")) if "path=" in one}
    shown = await page(served.viewer, link)
    assert "in/two" in shown and 'aria-label="two: echo' in shown


async def test_a_plain_ticket_has_a_run_too(served: Served) -> None:
    await served.add("t")
    await run(served.store)
    assert "main" in await page(served.viewer, "/tickets/t/graph")
    assert "said" in await page(served.viewer, "/tickets/t/graph/step?step=main")


async def test_a_run_of_2000_steps_is_a_small_page(served: Served) -> None:
    await start(served.store, large("big", 2000), "t")
    await run(served.store, only=("a", "s0"))
    shown = await page(served.operator, "/tickets/t/graph")
    assert len(shown) < 300_000 and "Further →" in shown
    [link, *_] = [one for one in links(shown) if "open=" in one]
    assert "1998 steps" in shown and len(await page(served.operator, link)) < 300_000
    assert "← Before" in await page(served.operator, "/tickets/t/graph?page=40")
    assert "No such steps" in await page(served.operator, "/tickets/t/graph?page=99999")
