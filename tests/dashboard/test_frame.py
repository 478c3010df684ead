"""What all pages have in common."""

from __future__ import annotations

import asyncio
import hashlib
import re
from importlib import resources
from urllib.parse import urlsplit

import httpx
import pytest

from swarm.api.auth import COOKIE
from swarm.dashboard import render
from swarm.dashboard.visible import slug, visible
from tests.api.served import Served
from tests.conftest import PATIENCE_SECONDS

_PLACE = resources.files("swarm.dashboard")


def test_files_from_elsewhere_are_the_ones_that_were_looked_at() -> None:
    listed = re.findall(r"^ {4}(\w{64})  (\S+)$", (_PLACE / "static" / "VENDORED.md").read_text(), re.MULTILINE)
    assert len(listed) == 9
    for digest, name in listed:
        assert hashlib.sha256((_PLACE / "static" / name).read_bytes()).hexdigest() == digest, name
    own = {"swarm.css", "pictures.css", "swarm.js", "terminal.js", "icon.svg", "VENDORED.md"}
    assert {one.name for one in (_PLACE / "static").iterdir()} == own | {name for _, name in listed}


def test_no_template_has_what_the_policy_forbids() -> None:
    """The browser would refuse it: scripts, styles and handlers within the page, and what is of other servers."""
    script = r"<script(?!( type=.module.)? src=)"
    for one in (_PLACE / "templates").iterdir():
        text = one.read_text(encoding="utf-8")
        forbidden = rf"<style|{script}|\sstyle=|\son\w+=|hx-on|js:|https?://|\|\s*safe"
        assert not re.search(forbidden, text), one.name


async def test_a_part_of_a_page_without_a_session_reloads_the_page(served: Served) -> None:
    whole = await served.nobody.get("/?state=x")
    assert whole.status_code == 303
    assert whole.headers["location"] == "/login?next=%2F%3Fstate%3Dx"
    part = await served.nobody.get("/", headers={"hx-request": "true"})
    assert (part.status_code, part.headers["hx-refresh"]) == (401, "true")


async def test_an_open_page_is_told_of_changes_and_of_no_more(served: Served) -> None:
    await served.add("one")
    await served.add("two")

    async def told(address: str, change: str) -> int:
        """How often, until ``change`` was seen."""
        async with served.viewer.stream("GET", address) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines, count = answer.aiter_lines(), 0
            async for line in lines:
                count += line == "event: update"
                if count == 1 and change:
                    await served.operator.post(f"/v1/tickets/{change}/cancel")
                    change = ""
                elif count == 2:
                    return count
            return count

    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await told("/live", "one") == 2
        assert await told("/live?ticket=two", "two") == 2
    assert (await served.nobody.get("/live")).status_code == 401


async def test_a_ticket_s_page_is_not_told_of_other_tickets(served: Served) -> None:
    await served.add("one")
    async with asyncio.timeout(PATIENCE_SECONDS), served.viewer.stream("GET", "/live?ticket=one") as answer:
        lines = answer.aiter_lines()
        assert [await anext(lines) for _ in range(3)] == ["event: update", "data: 1", ""]
        await served.add("two")
        await served.operator.post("/v1/tickets/two/cancel")
        with pytest.raises(TimeoutError):  # on a slow machine, it could only miss a fault, not invent one
            async with asyncio.timeout(1.5):
                await anext(lines)


async def test_scripts_and_styles_are_kept_by_their_content(served: Served) -> None:
    page = (await served.viewer.get("/")).text
    for path in re.findall(r'(?:href|src)="(/static/[^"]+)"', page):
        answer = await served.nobody.get(path)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
    assert (await served.nobody.get("/static/x/..%2Fpages.py")).status_code == 404


async def test_a_form_of_another_site_changes_nothing(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as browser:
        own = {"origin": f"http://{urlsplit(served.url).netloc}"}
        await browser.post("/login", data={"token": served.tokens["operator"]}, headers=own)
        assert COOKIE in browser.cookies
        assert (await browser.post("/logout", headers={"origin": "http://elsewhere"})).status_code == 403
        assert (await browser.get("/")).status_code == 200


def test_what_is_hostile_is_shown_as_what_it_is() -> None:
    assert visible("a\x00\x1b[31m\u202eb\r\n") == "a⟨U+0000⟩⟨U+001B⟩[31m⟨U+202E⟩b⟨U+000D⟩⟨U+000A⟩"
    assert visible("\ud800") == "⟨U+D800⟩"
    assert slug('x" onload="') == "x--onload--"
    made = render.environment().from_string('{% import "macros.html" as m %}{{ m.pill(state) }}')
    assert "<b>" not in made.render(state="<b>")
