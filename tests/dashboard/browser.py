"""A real browser, headless: Debian's Chromium, driven through its driver's own protocol (W3C WebDriver).

Calls run in a thread, so that the server under test, which runs in the test's event loop, can answer meanwhile."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import httpx

from swarm.base.process import which
from tests import clients_here

_ELEMENT: Final = "element-6066-11e4-a52e-4f735466cecf"  # https://www.w3.org/TR/webdriver2/#elements
_FLAGS: Final = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server",
    "--force-color-profile=srgb", "--hide-scrollbars",
)  # fmt: skip
KEYS: Final[Mapping[str, str]] = {
    "Enter": "\ue007", "Escape": "\ue00c", "Tab": "\ue004", "Control": "\ue009", "Shift": "\ue008", "Up": "\ue013",
}  # fmt: skip


def lacks() -> str:
    missing = [name for name in ("chromium", "chromedriver") if which(name) is None]
    if missing:
        return f"needs {' and '.join(missing)}: apt-get install chromium chromium-driver"
    return "" if clients_here.directory("axe").is_dir() else "needs axe: run `python -m tests.clients_here`"


class Browser:
    def __init__(self, address: str, profile: Path) -> None:
        self._http = httpx.Client(base_url=address, timeout=60, trust_env=False)
        options = {"args": [*_FLAGS, f"--user-data-dir={profile}"], "binary": which("chromium")}
        always = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": always}})
        self._session = f"/session/{made['sessionId']}"

    def close(self) -> None:
        self._call("DELETE", self._session)
        self._http.close()

    def _call(self, method: str, path: str, body: object = None) -> Any:
        sent = None if method in ("GET", "DELETE") else json.dumps(body if body is not None else {})
        answer = self._http.request(method, path, content=sent).json()["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise AssertionError(f"{answer['error']}: {answer['message'].splitlines()[0]}")
        return answer

    async def _do(self, method: str, path: str, body: object = None) -> Any:
        return await asyncio.to_thread(self._call, method, self._session + path, body)

    async def open(self, url: str) -> None:
        await self._do("POST", "/url", {"url": url})

    async def log_in(self, server: str, token: str) -> None:
        """As somebody else than before, with nothing left of the test before."""
        await self.open(f"{server}/login")
        await self._do("DELETE", "/cookie")
        await self.look()
        await self.open(f"{server}/login")
        await self.run("document.querySelector('input[name=token]').value = arguments[0]", token)
        await self.click("main form button")
        await self.until("document.querySelector('.who')")
        await self.complaints()
        await self.requested()

    @asynccontextmanager
    async def another(self, url: str) -> AsyncIterator[None]:
        """A second window, beside the one that was looked at so far: both are visible."""
        first = await self._do("GET", "/window")
        await self._do(
            "POST", "/window", {"handle": (await self._do("POST", "/window/new", {"type": "window"}))["handle"]}
        )
        try:
            await self.open(url)
            yield
        finally:
            await self._do("DELETE", "/window")
            await self._do("POST", "/window", {"handle": first})

    async def url(self) -> str:
        return str(await self._do("GET", "/url"))

    async def run(self, script: str, *arguments: object) -> Any:
        """The value of a function's body."""
        return await self._do("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    async def run_async(self, script: str) -> Any:
        """What the function's body passes to its last argument, a callback."""
        return await self._do("POST", "/execute/async", {"script": script, "args": []})

    async def until(self, condition: str, *, seconds: float = 60.0) -> Any:
        """Wait until an expression is true, and return it."""
        async with asyncio.timeout(seconds):
            while not (found := await self.run(f"return {condition}")):  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.03)
        return found

    async def text(self, selector: str = "body") -> str:
        return str(await self.run("return document.querySelector(arguments[0])?.innerText || ''", selector))

    async def click(self, selector: str) -> None:
        """As a person does: it fails for what is hidden or covered."""
        await self._loaded()
        found = await self._do("POST", "/element", {"using": "css selector", "value": selector})
        await self._do("POST", f"/element/{found[_ELEMENT]}/click")

    async def press(self, *keys: str) -> None:
        """Keys, one after the other."""
        await self._keys([(kind, key) for key in keys for kind in ("keyDown", "keyUp")])

    async def press_together(self, *keys: str) -> None:
        await self._keys([*(("keyDown", key) for key in keys), *(("keyUp", key) for key in reversed(keys))])

    async def _keys(self, done: Sequence[tuple[str, str]]) -> None:
        await self._loaded()
        actions = [{"type": kind, "value": KEYS.get(key, key)} for kind, key in done]
        await self._do("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    async def _loaded(self) -> None:
        """Until the page's own scripts have run, and it has its focus: what is pressed before is lost."""
        focused = "!document.querySelector('[autofocus]') || document.activeElement !== document.body"
        await self.until(f"document.readyState === 'complete' && ({focused})")

    async def devtools(self, command: str, **params: object) -> Any:
        return await self._do("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    async def look(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """The size of the window, and the colours that the system asks for."""
        await self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = "dark" if dark else "light"
        await self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def screenshot(self, *, whole: bool = False) -> bytes:
        options: dict[str, object] = {"captureBeyondViewport": True} if whole else {}
        if whole:
            size = (await self.devtools("Page.getLayoutMetrics"))["cssContentSize"]
            options["clip"] = {**size, "scale": 1}
        return base64.b64decode((await self.devtools("Page.captureScreenshot", format="png", **options))["data"])

    async def complaints(self) -> list[str]:
        """What the console was told since this was last asked: errors of scripts, of the CSP, of requests."""
        said = await self._do("POST", "/se/log", {"type": "browser"})
        return [f"{one['level']}: {one['message']}" for one in said if one["level"] in ("SEVERE", "WARNING")]

    async def requested(self) -> set[str]:
        """Origins that pages asked for something since this was last asked."""
        found = set()
        for entry in await self._do("POST", "/se/log", {"type": "performance"}):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.add(httpx.URL(message["params"]["request"]["url"]).copy_with(raw_path=b"/"))
        return {str(one) for one in found if one.scheme not in ("data", "blob", "about")}

    async def axe(self) -> list[str]:
        """Faults of accessibility that are serious or worse, by axe-core."""
        script = next(clients_here.directory("axe").rglob("axe.min.js")).read_text(encoding="utf-8")
        await self.run(f"{script}; window.axe = axe;")
        found = await self.run_async("const done = arguments[0]; axe.run().then((all) => done(all.violations))")
        return [
            f"{one['id']}: {one['help']}: {node['html'][:200]}"
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]


@contextmanager
def browser(place: Path) -> Iterator[Browser]:
    """``place``: a directory for its files."""
    driver = which("chromedriver")
    assert driver is not None
    environment = {**os.environ, "HOME": str(place), "XDG_CACHE_HOME": str(place), "XDG_CONFIG_HOME": str(place)}
    with subprocess.Popen(
        [driver, "--port=0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"started successfully on port (\d+)", line):
                    break
            else:
                raise AssertionError("chromedriver did not start")
            one = Browser(f"http://127.0.0.1:{found[1]}", place / "profile")
            try:
                yield one
            finally:
                one.close()
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)
