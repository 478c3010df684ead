"""The pages of sandboxes: the list, and the story of one."""

from __future__ import annotations

import contextlib
import html
import re
import sqlite3

import httpx
import pytest

from swarm.model import Event, Sandbox
from tests.api.holding import holding
from tests.api.served import Served
from tests.dashboard import scene
from tests.dashboard.test_pages import HOSTILE


def _shown(page: httpx.Response) -> str:
    assert page.status_code == 200, page.text
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", page.text)))


async def test_the_list_and_a_story(served: Served) -> None:
    assert "There is no sandbox yet" in _shown(await served.viewer.get("/sandboxes"))
    await scene.fill(served)
    page = await served.viewer.get("/sandboxes")
    names = re.findall(r'data-open href="[^"]+">([^<]+)</a>', page.text)
    assert sorted(names) == ["asleep", "gone", "new", "repo-main"]
    paused = await served.viewer.get("/sandboxes?state=paused")
    assert re.findall(r'data-open href="[^"]+">([^<]+)</a>', paused.text) == ["asleep"]
    assert "No sandbox matches" in _shown(await served.viewer.get("/sandboxes?text=nothing"))
    assert "`after` must be" in _shown(await served.viewer.get("/sandboxes?after=x"))
    story = _shown(await served.viewer.get("/sandboxes/repo-main"))
    for told in (
        "git clone https://git.example/parsers.git . ok status 0 the-operator 2.3 s",
        "sh -c pytest -q tests/parser failed status 1 the-operator 48 s",
        "python3 -m http.server 8000 in the background running",
        "sh -c make -j4 all failed out of time",
        "write /work/src/dates.py, 4.0 KiB, by the-operator",
        "process p3, out of time, 10 min 0 s",
        "pypi.org:443, 420 ms",
        "cost $0.034 of $5.00",
        "claude-sonnet-5",
        "after-clone may hold secrets named",
        "team parsers",
        "build-7, VM 41",
    ):
        assert told in story, (told, story)
    assert "Pause" not in story and "End…" not in story
    operators = _shown(await served.operator.get("/sandboxes/repo-main"))
    assert "Pause" in operators and "End…" in operators
    assert "the engine died while it ran" in _shown(await served.viewer.get("/sandboxes/gone"))


async def test_one_is_paused_and_ended(served: Served, tmp_path_factory: pytest.TempPathFactory) -> None:
    async with holding(served.store, tmp_path_factory.mktemp("e")):
        made = (await served.operator.post("/v1/sandboxes", json={"name": "box"})).json()
        assert (await served.viewer.get(f"/v1/sandboxes/{made['id']}/wait")).json()["state"] == "running"
        path = f"/sandboxes/{made['id']}"
        assert (await served.viewer.post(f"{path}/end", data={"x": ""})).status_code == 403
        paused = await served.operator.post(f"{path}/pause", data={"x": ""})
        assert (paused.status_code, paused.headers["location"]) == (303, path)
        assert (await served.store.sandbox("box")).state == "paused"
        assert "End this sandbox?" in _shown(await served.operator.get(f"{path}/end"))
        assert (await served.operator.post(f"{path}/end", data={"x": ""})).status_code == 303
        assert (await served.store.sandbox("box")).state == "ended"
        assert "not possible now" in _shown(await served.operator.get(f"{path}/end"))
        assert (await served.operator.post(f"{path}/pause", data={"x": ""})).status_code == 409


async def test_hostile_text_is_only_text(served: Served) -> None:
    """From a guest, or in a row that another program wrote."""
    made = await served.store.add_sandbox(Sandbox(id="", state="starting"), by="x")
    data = {"process": HOSTILE, "argv": [HOSTILE, 1], "by": HOSTILE, "user": "root", "code": HOSTILE, "ms": HOSTILE}
    kinds = ("exec", "exit", "files", "egress", "port", "note")
    await served.store.append([Event(ticket_id="", sandbox_id=made.id, kind=kind, data=data) for kind in kinds])
    with contextlib.closing(sqlite3.connect(served.settings.data_dir / "swarm.db", timeout=60)) as database, database:
        database.execute(
            "UPDATE sandboxes SET name = ?, error = ?, labels = ?, network = ?, ends_at = 9e18, created_by = ?",
            (HOSTILE, HOSTILE, '{"<b>": "<script>"}', HOSTILE, HOSTILE),
        )
    for path in ("/sandboxes", f"/sandboxes/{made.id}", f"/sandboxes/{made.id}/end"):
        page = await served.operator.get(path)
        assert page.status_code == 200, page.text
        assert "<script>alert" not in page.text and "\u202e" not in page.text and "onload='x'" not in page.text
