"""The pages in a real browser: followed live, by keyboard, in both colour schemes, and with hostile tickets."""

from __future__ import annotations

import asyncio
import json

import pytest

from swarm.model import Event, Succeeded
from tests.api.served import Served
from tests.conftest import PATIENCE_SECONDS
from tests.dashboard import flows, scene
from tests.dashboard.browser import Browser

pytestmark = pytest.mark.needs("netns", "browser")
# What a page asks for from now on.
COUNTS = "window.asked = 0; const ask = fetch; window.fetch = (...of) => { asked++; return ask(...of); }"


async def _is_quiet(chromium: Browser, served: Served) -> None:
    """Nothing was complained of, and nothing was asked of another server."""
    assert await chromium.complaints() == []
    own = {one for one in await chromium.requested() if not one.startswith("chrome")}
    assert own <= {f"{served.url}/"}


async def test_a_ticket_is_followed_to_its_end(served: Served, chromium: Browser) -> None:
    await served.add("t", title="Live")
    await chromium.log_in(served.url, served.tokens["operator"])
    await chromium.open(f"{served.url}/tickets/t")
    assert "ready" in await chromium.text(".pill")
    [claim] = await scene.claims(served.store, 1)
    await served.store.running(claim.attempt_id, 5)
    await chromium.until("document.querySelector('.pill').textContent === 'in progress'")
    for batch in range(4):
        texts = [f"line {batch * 300 + number}\n" for number in range(300)]
        await scene.output(served.store, claim, texts)
        await chromium.until(f"document.querySelector('#log').textContent.includes('line {batch * 300 + 299}')")
    lines = await chromium.run(
        "return [...document.querySelectorAll('#log .line > span')].map((one) => one.textContent)"
    )
    assert lines == [f"line {number}" for number in range(1200)]  # each once, in order
    assert await chromium.run("const log = document.querySelector('#log'); return log.scrollTop > 0")
    assert await chromium.run("return document.querySelector('#follow').checked")
    await chromium.press("t")  # don't follow
    await chromium.run("document.querySelector('#log').scrollTop = 0")
    await scene.output(served.store, claim, ["the last \x1b[32mgreen\x1b[0m line\n"])
    await chromium.until("document.querySelector('#log .a32')?.textContent === 'green'")
    assert await chromium.run("return document.querySelector('#log').scrollTop") == 0
    await chromium.run("document.querySelector('#find').value = 'line 117'")
    await chromium.run("document.querySelector('#find').dispatchEvent(new Event('input', {bubbles: true}))")
    assert await chromium.text("#found") == "11 of 1201 lines"
    timings = {"queue": 3.0, "boot": 40.0, "agent": 900.0, "total": 943.0}
    outcome = Succeeded(outputs=json.dumps({"answer": 42}))
    await served.store.finish(claim.attempt_id, outcome, timings=timings, vm_time_ms=1.0)
    await chromium.until("document.querySelector('.pill').textContent === 'done'")
    await chromium.until("document.body.innerText.includes('\"answer\": 42')")
    assert await chromium.run("return document.querySelectorAll('#log .line').length") == 1201
    await _is_quiet(chromium, served)


async def test_a_page_in_the_background_asks_for_nothing(served: Served, chromium: Browser) -> None:
    await served.add("one")
    await chromium.log_in(served.url, served.tokens["viewer"])
    await chromium.open(f"{served.url}/")
    await chromium.until("document.querySelector('#now')?.textContent.includes('1')")
    hide = (
        "Object.defineProperty(document, 'hidden', {configurable: true, get: () => arguments[0]});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    await chromium.run(hide.replace("arguments[0]", "true"))
    await chromium.run(COUNTS)
    async with chromium.another(f"{served.url}/"):
        await chromium.until("/Ready\\s*1/.test(document.querySelector('#now')?.textContent)")
        count = 1
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await chromium.run("return /Ready\\s*1\\b/.test(document.querySelector('#now').textContent)"):
                await served.add(f"more{count}")
                count += 1
                await asyncio.sleep(0.3)
    assert await chromium.run("return window.asked") == 0
    assert await chromium.run("return /Ready\\s*1/.test(document.querySelector('#now').textContent)")
    await chromium.run(hide.replace("arguments[0]", "false"))
    await chromium.until(f"/Ready\\s*{count}\\b/.test(document.querySelector('#now').textContent)")


async def test_tickets_by_keyboard_alone(served: Served, chromium: Browser) -> None:
    for number in range(4):
        await served.add(f"t{number}", title=f"ticket {number}")
    await chromium.log_in(served.url, served.tokens["operator"])
    await chromium.press("g", "t")
    await chromium.until("location.pathname === '/tickets' && document.querySelector('[data-open]')")
    await chromium.press("j", "j", "k", "j", "x", "j", "x")
    picked = "return [...document.querySelectorAll('input[name=id]:checked')].map((one) => one.value)"
    assert await chromium.run(picked) == ["t2", "t1"]
    await chromium.press("c")
    await chromium.until("location.pathname === '/tickets/t1/cancel'")
    await chromium.press("Enter")
    await chromium.until("location.pathname === '/tickets/t1' && document.querySelector('.pill')")
    assert (await served.store.ticket("t1")).state == "cancelled"
    await chromium.press("r")
    await chromium.until("location.pathname === '/tickets/t1/retry'")
    await chromium.press("Enter")
    await chromium.until(
        "location.pathname === '/tickets/t1' && document.querySelector('.pill')?.textContent === 'ready'"
    )
    await chromium.press("g", "t")
    await chromium.until("location.pathname === '/tickets' && document.querySelector('[data-open]')")
    await chromium.press("/", *"ticket 3", "Enter")
    await chromium.until("location.search.includes('text=ticket+3')")
    await chromium.until("document.querySelectorAll('[data-open]').length === 1")
    await chromium.press("j", "Enter")
    await chromium.until("location.pathname === '/tickets/t3'")
    await chromium.press("?")
    await chromium.until("document.querySelector('dialog[open]')")
    await chromium.press("Escape")
    await chromium.until("!document.querySelector('dialog[open]')")
    await chromium.press("g", "n")
    await chromium.until("location.pathname === '/'")
    await _is_quiet(chromium, served)


async def test_many_failed_tickets_are_retried(served: Served, chromium: Browser) -> None:
    for number in range(60):
        await served.add(f"t{number}", title="flaky" if number % 2 else "other")
        await served.store.cancel(f"t{number}", "test")
    await chromium.log_in(served.url, served.tokens["operator"])
    await chromium.open(f"{served.url}/tickets?state=cancelled&text=flaky")
    await chromium.click("input[name=all]")
    await chromium.click("button[value=retry]")
    await chromium.until("document.querySelector('h1')?.textContent === 'Retry 30 tickets?'")
    await chromium.click("main button.first")
    await chromium.until("document.querySelector('h1')?.textContent === '30 to be run again'")
    await chromium.click("main a.button")
    await chromium.until("location.search === '?state=cancelled&text=flaky'")
    assert "No ticket matches" in await chromium.text()
    assert {one.title for one in await served.store.tickets(states=["ready"], limit=100)} == {"flaky"}
    await _is_quiet(chromium, served)


async def test_a_step_that_waits_is_approved_in_place(served: Served, chromium: Browser) -> None:
    await scene.approval(served, "release")
    await chromium.log_in(served.url, served.tokens["operator"])
    await chromium.open(f"{served.url}/tickets/release")
    assert "Publish 4.2 to the package index?" in await chromium.text("#state")
    await chromium.run("document.querySelector('input[name=why]').value = 'all is ready'")
    await served.store.append([Event(ticket_id="release", kind="note", data={"text": "meanwhile"})])
    await chromium.until("document.querySelector('#state').textContent.includes('meanwhile')")
    await chromium.click("button[value=approve]")
    await chromium.until("document.querySelector('#state')?.textContent.includes('approved by')")
    assert await chromium.run("return location.pathname") == "/tickets/release"
    assert "approved by the-operator, all is ready" in await chromium.text("#state")
    [claim] = await scene.claims(served.store, 1)
    assert claim.step_id == "publish"
    await chromium.until("document.querySelector('#state').textContent.includes('publish #1')")
    await _is_quiet(chromium, served)


async def test_an_answer_is_typed_while_other_things_happen(served: Served, chromium: Browser) -> None:
    ask: dict[str, object] = {"id": "ask", "approval": {"message": "Ship it?"}}
    await flows.start(served.store, flows.workflow("release", ask), "t1")
    await flows.start(served.store, flows.workflow("other", ask), "t2")
    await flows.run(served.store)
    await chromium.log_in(served.url, served.tokens["operator"])
    await chromium.press("g", "a")
    await chromium.until("location.pathname === '/approvals' && document.querySelectorAll('.card').length === 2")
    card = "[...document.querySelectorAll('.card')].find((one) => one.querySelector('a[href=\"/tickets/t2\"]'))"
    await chromium.run(f"{card}.querySelector('input[name=why]').value = 'looks good'")
    await served.store.answer("t1", approved=True, by="somebody else")
    await chromium.until("document.querySelectorAll('.card').length === 1")
    assert await chromium.run("return document.querySelector('input[name=why]').value") == "looks good"
    await chromium.click("button[value=approve]")
    await chromium.until("document.querySelector('#approvals').textContent.includes('No step waits')")
    [event] = [event for event in await served.store.events("t2") if event.kind == "approval"]
    assert event.data == {"approved": True, "by": "the-operator", "why": "looks good"}
    await _is_quiet(chromium, served)


async def test_a_graph_of_2000_steps_does_not_freeze_the_page(served: Served, chromium: Browser) -> None:
    await flows.start(served.store, flows.large("big", 2000), "t")
    await flows.run(served.store, only=("a", "s0"))
    await chromium.log_in(served.url, served.tokens["viewer"])
    await chromium.open(f"{served.url}/tickets/t/graph")
    assert await chromium.run("return document.querySelectorAll('*').length") < 3000
    assert await chromium.run("return document.querySelector('svg.graph').textContent.includes('1998 steps')")
    [claim] = [one for one in await served.store.attempts("t") if one.step_id == "s20"]
    await served.store.finish(claim.id, Succeeded(outputs="{}"), timings={}, vm_time_ms=1.0, in_workflow=True)
    await chromium.until("document.querySelector('.chips').textContent.includes('completed 3')")
    while await chromium.run("return document.querySelector('svg.graph .box + .box') !== null"):  # open what is closed
        before = await chromium.url()
        await chromium.run(
            "document.querySelector('svg.graph a:has(.box + .box)').dispatchEvent(new MouseEvent('click'))"
        )
        await chromium.until(f"location.href !== {before!r} && document.querySelector('svg.graph')")
    assert await chromium.run("return document.querySelectorAll('svg.graph a').length") > 1
    await _is_quiet(chromium, served)


async def test_what_is_selected_does_not_move(served: Served, chromium: Browser) -> None:
    await served.add("one")
    await chromium.log_in(served.url, served.tokens["operator"])
    await chromium.open(f"{served.url}/tickets")
    await served.add("two")
    await chromium.until("document.querySelectorAll('[data-row]').length === 2")
    await chromium.click("input[value=one]")
    await chromium.run(COUNTS)
    await chromium.run("document.onvisibilitychange = () => { document.title = 'hidden'; }")
    async with chromium.another(f"{served.url}/tickets"):
        await chromium.until("document.querySelectorAll('[data-row]').length === 2")
        await served.add("three")
        await chromium.until("document.querySelectorAll('[data-row]').length === 3")
    assert await chromium.run("return document.title") != "hidden", "it would not have changed anyway"
    assert await chromium.run("return window.asked") == 0
    assert await chromium.run("return document.querySelectorAll('[data-row]').length") == 2
    assert await chromium.run("return document.querySelector('input[value=one]').checked")


async def test_pages_are_accessible_in_both_schemes_and_narrow(served: Served, chromium: Browser) -> None:
    await scene.fill(served)
    await served.add("hostile", title="<img src=x onerror=alert(1)>\u202e" + "W" * 2000, description="W" * 3000)
    await chromium.log_in(served.url, served.tokens["operator"])
    grounds = set()
    dark_too = ("/tickets?state=failed", "/tickets/t07", "/tickets/release/graph")
    for path in ("/", "/tickets/release", "/tickets/hostile", "/tickets/run-1/cancel", "/tickets/bulk?do=retry&all=1",
                 "/approvals", "/agents", "/workflows", "/schedules", "/costs", "/hosts", *dark_too):  # fmt: skip
        for dark in (False, True)[: 1 + (path in dark_too)]:
            await chromium.look(width=1280, dark=dark)
            await chromium.open(served.url + path)
            assert await chromium.axe() == [], (path, dark)
            grounds.add(await chromium.run("return getComputedStyle(document.body).backgroundColor"))
        await chromium.look(width=360)
        assert await chromium.run("return document.documentElement.scrollWidth") <= 360, path
    assert len(grounds) == 2
    await _is_quiet(chromium, served)
