"""Pictures of the pages: `python -m tests.dashboard.shots DIR` (in tools/sandbox.py). With `--docs`, the two pictures
of the README, into docs/images."""
# ruff: noqa: T201 - a command

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.api.served import Served, serving
from tests.dashboard import scene
from tests.dashboard.browser import Browser, browser

PAGES: Final = {
    "now": "/", "tickets": "/tickets", "failed": "/tickets?state=failed&text=fix", "ticket": "/tickets/t07",
    "running": "/tickets/run-1", "waiting": "/tickets/release", "cancel": "/tickets/run-1/cancel", "login": "/login",
    "bulk": "/tickets/bulk?do=retry&all=1&state=failed", "approvals": "/approvals",
    "graph": "/tickets/release/graph", "sandboxes": "/sandboxes", "sandbox": "/sandboxes/repo-main",
    "sandbox-end": "/sandboxes/repo-main/end", "agents": "/agents", "costs": "/costs", "hosts": "/hosts",
}  # fmt: skip
DOCS: Final = Path(__file__).parent.parent.parent / "docs" / "images"


async def _all(one: Browser, served: Served, place: Path, names: list[str]) -> None:
    for name in names or PAGES:
        for dark in (False, True):
            for width in (1280, 390):
                await one.look(width=width, height=900, dark=dark)
                await one.open(served.url + PAGES[name])
                wide = await one.run("return document.documentElement.scrollWidth")
                if wide > width:
                    print(f"{name} at {width}: {wide} wide")
                shot = await one.screenshot(whole=True)
                (place / f"{name}-{width}-{'dark' if dark else 'light'}.png").write_bytes(shot)
    print(*await one.complaints(), sep="\n")


async def _docs(one: Browser, served: Served) -> None:
    DOCS.mkdir(exist_ok=True)
    await one.look(width=1180, height=640)
    for name, dark in (("now", False), ("ticket", True)):
        await one.look(width=1180, height=640 if name == "now" else 760, dark=dark)
        await one.open(served.url + PAGES[name])
        (DOCS / f"dashboard-{name}.png").write_bytes(await one.screenshot())


async def main(arguments: list[str]) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="swarm-shots-", ignore_cleanup_errors=True) as place,
        browser(Path(place) / "b") as one,
    ):
        async with serving(Path(place) / "home") as served:
            await scene.fill(served)
            await one.log_in(served.url, served.tokens["operator"])
            if arguments == ["--docs"]:
                await _docs(one, served)
            else:
                target = Path(arguments[0])
                target.mkdir(parents=True, exist_ok=True)
                await _all(one, served, target, arguments[1:])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
