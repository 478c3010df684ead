"""Tickets of the SDK against a real server, with an engine that runs agents as plain processes."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swarm.client import (
    AsyncSwarm,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    Swarm,
    TicketFailed,
    TimedOut,
    Unauthorized,
)
from tests.api.served import Served
from tests.api.test_registry import book
from tests.engine.conftest import Bench

ASKS = """
name: asks
version: 1.0.0
steps:
  - {id: check, approval: "Publish ${inputs.what}?"}
  - {id: say, agent: echo, needs: check, inputs: {message: "${inputs.what}"}}
inputs: {type: object, properties: {what: {type: string}}}
"""
LOUD = r"""
import json, sys
inputs = json.load(open("input.json"))["inputs"]
for number in range(inputs["lines"]):
    print(f"line {number}", flush=True)
    print(f"oops {number}\r\n", end="", file=sys.stderr, flush=True)
print("no end", end="")
json.dump({"lines": inputs["lines"]}, open("output.json", "w"))
"""


async def test_a_ticket_from_its_submission_to_its_outputs(s: AsyncSwarm, at_work: Bench) -> None:
    await at_work.agent(LOUD, "loud")
    ticket = await s.tickets.submit("loud", prompt="Be loud\nplease", inputs={"lines": 300}, priority=3)
    assert (ticket.title, ticket.priority, ticket.inputs) == ("Be loud", 3, {"prompt": "Be loud\nplease", "lines": 300})
    lines = [line async for line in ticket.output()]
    out = [line.text for line in lines if line.stream == "stdout"]
    assert out == [*(f"line {number}" for number in range(300)), "no end"]
    assert [str(line) for line in lines if line.stream == "stderr"] == [f"oops {number}" for number in range(300)]
    assert await ticket.result(timeout=60) == {"lines": 300}
    assert ticket.state == "ready" and (await ticket.refresh()).state == "done", "a value stays as it is"
    assert [line async for line in ticket.output(follow=False)] == lines
    details = await ticket.details()
    assert [one.outcome for one in details.attempts] == ["succeeded"] and details.steps[0].outputs == {"lines": 300}
    events = [event async for event in ticket.events()]
    assert [e.seq for e in events] == sorted({e.seq for e in events}) and events[-1].data["to"] == "done"
    assert [e async for e in ticket.events(after=events[-2].seq)] == events[-1:]
    assert events == [e async for e in ticket.events(follow=False)]


async def test_a_ticket_that_fails(s: AsyncSwarm, at_work: Bench) -> None:
    await at_work.agent("raise SystemExit('no luck')", "unlucky")
    ticket = await s.tickets.submit("unlucky")
    with pytest.raises(TicketFailed, match=f"the ticket {ticket.id} is failed: ") as raised:
        await ticket.result(60)
    assert raised.value.ticket == await ticket.wait() and "no luck" in str(raised.value.ticket.error)
    again = await ticket.retry()
    assert not again.ended and (await again.wait(60)).state == "failed"
    assert len((await ticket.details()).runs) == 2
    with pytest.raises(Conflict, match="already failed"):
        await ticket.cancel()
    await ticket.delete()
    with pytest.raises(NotFound):
        await ticket.refresh()


async def test_a_ticket_that_takes_too_long(s: AsyncSwarm, at_work: Bench) -> None:
    await at_work.agent("import time; print('on', flush=True); time.sleep(600)", "slow")
    ticket = await s.tickets.submit("slow")
    async for line in ticket.output():
        assert line.text == "on"
        break
    for kind in (TimedOut, TimeoutError):
        with pytest.raises(kind, match=r"has not ended within 0\.1 s: it is in_progress"):
            await ticket.wait(0.1)
    waiting = asyncio.create_task(ticket.wait())
    assert (await ticket.cancel()).state == (await ticket.cancel()).state == "cancelled"
    assert (await waiting).state == "cancelled"


async def test_a_draft_and_one_that_waits_for_it(s: AsyncSwarm) -> None:
    first = await s.tickets.submit("echo", draft=True, title="first", requires={"kvm": False})
    second = await s.tickets.submit("echo", after=[first.id], id="second")
    assert first.requires == {"kvm": False}
    assert first.state == "draft" and (await second.details()).depends_on == (first.id,)
    await first.ready()
    assert (await second.wait(60)).state == "done"


async def test_a_person_is_asked(s: AsyncSwarm, at_work: Bench, tmp_path: Path) -> None:
    (tmp_path / "asks.yaml").write_text(ASKS)
    assert await s.workflows.validate(tmp_path / "asks.yaml") == []
    (tmp_path / "bad.yaml").write_text(ASKS.replace("echo", "ecko").replace("needs: check", "needs: chek"))
    assert {problem.line for problem in await s.workflows.validate(tmp_path / "bad.yaml")} == {6}
    with pytest.raises(Invalid, match="ecko"):
        await s.workflows.add(tmp_path / "bad.yaml")
    added = [await s.workflows.add(tmp_path / "asks.yaml") for _ in range(2)]
    assert added[0] == added[1] == await s.workflows.get("asks") and added[0] in await s.workflows.list()
    ticket, other = [await s.workflows.run("asks", what=what) for what in ("one", "two")]

    async def both_wait() -> bool:
        return len([one async for one in s.tickets.list(state="waiting")]) == 2

    await at_work.until(both_wait)
    asked = {one.question: one async for one in s.approvals.list()}
    assert asked.keys() == {"Publish one?", "Publish two?"} and asked["Publish one?"].ticket_id == ticket.id
    await asked["Publish one?"].approve("looks good")
    assert (await ticket.result(60))["echo"] == {"message": "one"}
    with pytest.raises(Conflict):
        await ticket.approve()
    await other.reject("not today")
    assert (await other.wait(60)).state == "failed"
    assert "not today" in str((await other.refresh()).error)


async def test_an_agent_of_this_computer(s: AsyncSwarm, tmp_path: Path) -> None:
    directory = tmp_path / "own"
    (directory / ".git").mkdir(parents=True)
    (directory / "main.py").write_text(LOUD)
    (directory / "agent.yaml").write_text("name: own\nversion: 1.0.0\nentry: [main.py]\n")
    (directory / ".git" / "config").write_text("secret")
    added = await s.agents.upload(directory)
    assert (added.name, added.version) == ("own", "1.0.0") and added == await s.agents.get("own@1")
    assert added in await s.agents.list() and added == await s.agents.upload(directory)
    (directory / "main.py").write_text("raise SystemExit(1)")
    with pytest.raises(Conflict):
        await s.agents.upload(directory)
    assert (await s.agents.upload(directory, dev=True)).id == added.id
    (directory / "agent.yaml").write_text("name: [")
    with pytest.raises(Invalid, match=r"agent\.yaml"):
        await s.agents.upload(directory)


async def test_what_it_costs_and_what_runs(served: Served) -> None:
    await book(served)
    async with AsyncSwarm(served.url, token=served.tokens["viewer"]) as s:
        (costs,) = await s.costs("model", since="7d")
        assert (costs.name, costs.calls, costs.input_tokens, costs.cost_usd) == ("large", 1, 10, 0.25)
        with pytest.raises(Invalid, match="by: must be"):
            await s.costs("moon")
        status = await s.status()
        assert status["queue"]["running"] == 1 and status["engines"] == []


async def test_lists(served: Served) -> None:
    for number in range(450):
        await served.add(f"t{number:03}", title="odd" if number % 2 else "even")
    await served.store.cancel("t001", "test")

    def ask() -> None:
        with Swarm(served.url, token=served.tokens["operator"]) as s:
            assert [one.id for one in s.tickets.list()] == [f"t{number:03}" for number in reversed(range(450))]
            assert len(list(s.tickets.list(text="odd", state=["ready", "draft"]))) == 224
            assert [one.id for one in s.tickets.list(state="cancelled", agent=("echo",))] == ["t001"]
            assert list(s.tickets.list(project="none", since="", before="2000-01-01T00:00:00Z")) == []
            assert next(s.tickets.list()).refresh().id == "t449"
            with pytest.raises(NotFound, match="did you mean"):
                next(s.tickets.list(agent="ecko"))
            with pytest.raises(Invalid, match="state"):
                next(s.tickets.list(state="broken"))

    await asyncio.to_thread(ask)


async def test_many_at_once(served: Served) -> None:
    """More than there are connections."""
    async with AsyncSwarm(served.url, token=served.tokens["operator"]) as s:
        tickets = await asyncio.gather(*(s.tickets.submit("echo", id=f"t{number}") for number in range(70)))
        waits = [asyncio.create_task(ticket.wait()) for ticket in tickets]
        seen = await asyncio.gather(*(s.tickets.get("t1") for _ in range(80)))
        assert len(seen) == 80 and not any(task.done() for task in waits)
        await asyncio.gather(*(ticket.cancel() for ticket in tickets))
        assert {ticket.state for ticket in await asyncio.gather(*waits)} == {"cancelled"}
    assert len(await served.store.tickets(limit=200)) == 70

    def ask(s: Swarm) -> str:
        return s.tickets.get("t1").wait().state

    loop = asyncio.get_running_loop()  # its own threads are for the server
    with Swarm(served.url, token=served.tokens["viewer"]) as other, ThreadPoolExecutor(20) as threads:
        asked = [loop.run_in_executor(threads, ask, other) for _ in range(40)]
        assert set(await asyncio.gather(*asked)) == {"cancelled"}


async def test_who_may(served: Served) -> None:
    await served.add("t")
    async with AsyncSwarm(served.url, token="wrong") as s:
        with pytest.raises(Unauthorized, match="a valid token is needed"):
            await s.tickets.get("t")
        with pytest.raises(Unauthorized):
            await s.tickets.submit("echo")
    async with AsyncSwarm(served.url, token=served.tokens["viewer"]) as s:
        ticket = await s.tickets.get("t")
        with pytest.raises(Forbidden, match="the-viewer is viewer: this needs operator"):
            await ticket.cancel()
        with pytest.raises(NotFound, match="no ticket"):
            await s.tickets.get("t?x=1#y")
        for name in ("", ".", ".."):
            with pytest.raises(NotFound, match="is no name"):
                await s.tickets.get(name)
        await served.store.revoke_token("the-viewer", by="test")
        with pytest.raises(Unauthorized):
            async for _ in ticket.events():
                pass


@pytest.mark.parametrize("key", ["", "a\nb", "ü"])
async def test_keys(served: Served, key: str) -> None:
    async with AsyncSwarm(served.url, token=served.tokens["operator"]) as s:
        if key:
            with pytest.raises(Invalid, match="printable ASCII"):
                await s.tickets.submit("echo", key=key)
        first, again = [await s.tickets.submit("echo", key="k") for _ in range(2)]
        assert first == again
        with pytest.raises(Conflict):
            await s.tickets.submit("echo", title="other", key="k")
    assert len(await served.store.tickets()) == 1
