"""The terminal page: who gets it, and a shell in a real browser, over a real agentd."""

from __future__ import annotations

import asyncio
import html
import re
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import pytest

from swarm.model import Sandbox
from tests.api.holding import holding
from tests.api.served import ECHO, Served, serving
from tests.dashboard.browser import Browser
from tests.dashboard.test_pages import HOSTILE

in_browser = pytest.mark.needs("netns", "browser")
SECONDS = 60.0  # of a busy machine
FULL_SCREEN = """
import curses, sys
def main(screen):
    screen.addstr(2, 4, "full screen", curses.A_BOLD)
    while screen.getch() != curses.KEY_UP:
        pass
curses.wrapper(main)
"""

PASTE = """
const data = new DataTransfer();
data.setData("text/plain", arguments[0]);
document.activeElement.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true}));
"""


async def test_who_gets_it_and_why_others_do_not(served: Served) -> None:
    await served.store.put_agent(replace(ECHO, id="keeper", name="keeper", secrets=("KEY",)))
    box = (await served.operator.post("/v1/sandboxes", json={})).json()["id"]
    kept = (await served.admin.post("/v1/sandboxes", json={"agent": "keeper"})).json()["id"]
    gone = (await served.store.add_sandbox(Sandbox(id="", state="starting"), by="x")).id
    with closing(sqlite3.connect(served.settings.data_dir / "swarm.db", timeout=60)) as database, database:
        database.execute("UPDATE sandboxes SET secret = 0, name = 'a box' WHERE id = ?", (box,))
        database.execute(
            "UPDATE sandboxes SET state = 'lost', name = ?, error = ? WHERE id = ?", (HOSTILE, HOSTILE, gone)
        )
    refused = await served.viewer.get(f"/sandboxes/{box}/terminal")
    assert refused.status_code == 403 and "the-viewer is viewer: this needs operator" in refused.text
    refused = await served.operator.get(f"/sandboxes/{kept}/terminal")
    assert refused.status_code == 403 and "secrets in this VM" in refused.text and "needs an admin" in refused.text
    assert (await served.admin.get(f"/sandboxes/{kept}/terminal")).status_code == 200
    assert (await served.nobody.get(f"/sandboxes/{box}/terminal")).status_code == 303
    page = await served.operator.get(f"/sandboxes/{box}/terminal?user=root")
    assert "swarm sandbox shell 'a box' --user root" in html.unescape(page.text)  # without JavaScript
    lost = await served.operator.get(f"/sandboxes/{gone}/terminal")
    assert "This sandbox is lost" in lost.text and "<script>alert" not in lost.text and "\u202e" not in lost.text
    others = [await served.operator.get(path) for path in ("/", "/sandboxes", f"/sandboxes/{box}")]
    assert [("xterm" in one.text) for one in (page, lost, *others)] == [True, False, False, False, False]
    policies = {one.headers["content-security-policy"] for one in (page, *others)}
    assert len(policies) == 1 and "unsafe" not in policies.pop()  # it is no looser for this page
    address = f'href="/sandboxes/{box}/terminal"'
    assert all(address in one.text for one in others[1:])
    assert address not in (await served.viewer.get("/sandboxes")).text
    assert address not in (await served.viewer.get(f"/sandboxes/{box}")).text
    script = re.findall(r'type="module" src="([^"]+)"', page.text)
    assert (await served.nobody.get(script[0])).headers["content-type"].startswith("text/javascript")


class Terminal:
    def __init__(self, chromium: Browser) -> None:
        self.chromium = chromium

    async def says(self, text: str) -> None:
        """Of the connection."""
        await self._until(f"document.querySelector('#terminal-said').textContent.includes({text!r})")

    async def shows(self, text: str) -> None:
        rows = "[...document.querySelectorAll('.xterm-rows > div')].map((one) => one.textContent.trim())"
        await self._until(f"{rows}.includes({text!r})")

    async def _until(self, condition: str) -> None:
        try:
            await self.chromium.until(condition, seconds=SECONDS)
        except TimeoutError:
            raise AssertionError(f"{condition}: {(await self.chromium.text('#main'))[-2000:]}") from None

    async def run(self, command: str, shows: str) -> None:
        await self.chromium.press(*command, "Enter")
        await self.shows(shows)


@asynccontextmanager
async def terminal(served: Served, chromium: Browser, box: str) -> AsyncIterator[Terminal]:
    await chromium.log_in(served.url, served.tokens["operator"])
    await chromium.open(f"{served.url}/sandboxes/{box}/terminal")
    one = Terminal(chromium)
    try:
        await one.says("Connected, as agent.")
        yield one
    finally:
        await chromium.look()
        await chromium.open("about:blank")


async def _box(served: Served) -> str:
    made = (await served.operator.post("/v1/sandboxes", json={"name": "box"})).json()
    assert (await served.viewer.get(f"/v1/sandboxes/{made['id']}/wait")).json()["state"] == "running"
    return str(made["id"])


@in_browser
async def test_a_shell_in_the_browser(
    served: Served, chromium: Browser, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    (tmp_path / "full.py").write_text(FULL_SCREEN)
    async with holding(served.store, tmp_path_factory.mktemp("e")):
        box = await _box(served)
        async with terminal(served, chromium, box) as one:
            await one.run("PS1=; cd; echo begun$((1+1))", "begun2")
            # colours, of which one has a style of its own; wide characters and emoji; what would be a link
            await one.run(r"printf '\e[1;38;2;200;30;30mtrue\e[0m\e[31mred\e[0m\n'", "truered")
            spans = "[...document.querySelectorAll('.xterm-rows span')]"
            of = f"getComputedStyle({spans}.find((one) => one.textContent === %r))"
            assert await chromium.run("return " + of % "true" + ".color") == "rgb(200, 30, 30)"
            red = await chromium.run("return " + of % "red" + ".color")
            await one.run(r"printf '\e[7minverse\e[0m\n'", "inverse")
            inverse = await chromium.run(f"const it = {of % 'inverse'}; return [it.color, it.backgroundColor]")
            assert inverse == ["rgb(246, 247, 249)", "rgb(27, 31, 36)"]
            await one.run(r"printf '\r\u65e5\U1F680\e[6n'; IFS=';' read -rsd R _ at; echo; echo at $at", "at 5")
            await one.run(r"printf '\e]8;;http://evil.example\e\\a link\e]8;;\e\\\n'", "a link")
            assert await chromium.run("return document.querySelector('.xterm a, .xterm-underline-5') === null")
            # keys that go to the program: Ctrl+C, arrows, `/`, `?` and Escape, which have a meaning on pages
            await chromium.press(*"echo waits; sleep 1000", "Enter")
            await one.shows("waits")
            await chromium.press_together("Control", "c")
            await one.run(f"python3 {tmp_path}/full.py; echo left", "full screen")
            await chromium.press("Up")
            await one.shows("left")
            await one.run('IFS= read -rsn3 it; echo "<${it@Q}>"', 'IFS= read -rsn3 it; echo "<${it@Q}>"')
            await chromium.press("?", "Escape", "g")
            await one.shows(r"<$'?\Eg'>")
            # its size is the window's
            await chromium.look(width=360, height=700, dark=True)
            await chromium.until("document.querySelector('.xterm-screen').clientWidth < 360", seconds=SECONDS)
            rows = await chromium.run("return document.querySelectorAll('.xterm-rows > div').length")
            await one.run("stty size | cut -d' ' -f1", str(rows))
            assert await chromium.run("return document.documentElement.scrollWidth") <= 360
            await chromium.until(of % "red" + f".color !== {red!r}", seconds=SECONDS)
            assert await chromium.axe() == []
            await chromium.look()
            await chromium.until(of % "red" + f".color === {red!r}", seconds=SECONDS)
            assert await chromium.axe() == []
            # pasted: many messages, at the pace of the program
            await one.run("stty -echo; echo counts; wc -c; stty echo", "counts")  # echo comes late, also behind output
            await chromium.run(PASTE, "\U0001f680\n" + ("x" * 999 + "\n") * 100)
            await chromium.press_together("Control", "d")
            await one.shows("100005")
            # a flood does not keep Ctrl+C waiting
            await chromium.press(*"yes flood", "Enter")
            await one.shows("flood")
            await chromium.press_together("Control", "c")
            await one.run("clear; echo after$((3+3))", "after6")
            # out by keyboard, as it is told there
            told = "document.getElementById(document.activeElement.getAttribute('aria-describedby'))"
            assert "X leaves the terminal" in await chromium.run(f"return {told}.textContent")
            await chromium.press_together("Control", "Shift", "x")
            assert await chromium.run("return document.activeElement.id") == "terminal-leave"
            assert await chromium.complaints() == []
            assert {url for url in await chromium.requested() if not url.startswith("chrome")} == {f"{served.url}/"}
        async with asyncio.timeout(SECONDS):  # the page is gone, and its shell with it
            path = f"/v1/sandboxes/{box}/processes"
            while not all(one["ended"] for one in (await served.operator.get(path)).json()):  # noqa: ASYNC110
                await asyncio.sleep(0.1)


@in_browser
async def test_how_a_shell_ends(chromium: Browser, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In one sentence each, with a button to connect again."""
    async with serving(tmp_path / "home") as served:
        async with holding(served.store, tmp_path_factory.mktemp("e")):
            box = await _box(served)
            async with terminal(served, chromium, box) as one:
                await chromium.press(*"exit 3", "Enter")
                await one.says("The shell has ended (status 3).")
                await chromium.click("#terminal-again")
                await one.says("Connected")
                await served.operator.post(f"/v1/sandboxes/{box}/pause")
                await one.says("put to sleep")
                await chromium.click("#terminal-again")
                await one.says("Connected")
                await served.operator.delete(f"/v1/sandboxes/{box}")
                await one.says("The sandbox has ended.")
                assert await chromium.run("return document.querySelector('#terminal-again').hidden")
            box = await _box(served)
            await chromium.open(f"{served.url}/sandboxes/{box}/terminal")
            await one.says("Connected")
        await one.says("The shell has ended: the")  # as the engine said, or its end
        with closing(sqlite3.connect(served.settings.data_dir / "swarm.db", timeout=60)) as database, database:
            database.execute("DELETE FROM workers")
        await chromium.click("#terminal-again")
        await one.says("No engine runs here")
    await chromium.click("#terminal-again")
    await one.says("The server does not answer.")
    await chromium.complaints()  # of the requests that failed
    await chromium.open("about:blank")
