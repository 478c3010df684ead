"""The API of agents: uploads, which may be hostile, above all."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import httpx

from swarm.model import Ticket
from tests.api.served import Served
from tests.api.test_auth import refused
from tests.api.test_workflows import changes
from tests.conftest import PATIENCE_SECONDS

GZIP = {"content-type": "application/gzip"}
MANIFEST = "name: shout\nversion: 1.0.0\nentry: [main.py]\ndescription: loud\n"
FILES = {"agent.yaml": MANIFEST, "main.py": "print('HEY')\n", "lib/words.txt": "hey\n"}


def archive(files: Mapping[str, str | tarfile.TarInfo], *, mode: Literal["w", "w:gz"] = "w:gz") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as tar:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content.encode())
            tar.addfile(member, io.BytesIO(content.encode()))
    return made.getvalue()


def bomb() -> bytes:
    """A small archive that says that it has a large file."""
    member = tarfile.TarInfo("large")
    member.size = 300 << 20
    return gzip.compress(member.tobuf() + bytes(1 << 20))


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


async def send(client: httpx.AsyncClient, data: bytes, to: str = "") -> httpx.Response:
    return await client.post(f"/v1/agents{to}", content=data, headers=GZIP)


def left(served: Served) -> list[Path]:
    return list(served.settings.data_dir.glob("uploads/*"))


async def test_from_archive_to_removal(served: Served) -> None:
    data = archive(FILES)
    assert (await send(served.admin, data, "/validate")).json() == {"valid": True, "problems": []}
    added = await send(served.admin, data)
    assert added.status_code == 201, added.text
    agent = added.json()
    path = Path(agent["path"])
    assert path.parent == served.settings.agents and (path / "lib/words.txt").read_text() == "hey\n"
    assert (await send(served.admin, archive({f"shout/{name}": text for name, text in FILES.items()}))).json() == agent
    assert agent in (await served.viewer.get("/v1/agents")).json()
    assert (await served.viewer.get("/v1/agents/shout@1")).json() == agent
    await served.store.add_ticket(Ticket(id="t", title="t", state="ready", agent_id=agent["id"]))
    await served.store.cancel("t", "test")
    package = (await served.viewer.get("/v1/agents/shout/package")).json()
    assert (package["agent"], package["manifest"]) == (agent, MANIFEST) and path.name.endswith(package["digest"])
    assert [one["id"] for one in package["tickets"]] == ["t"]
    assert (await served.viewer.get("/v1/agents/shout/check")).json() == {"runs": True, "problem": None, "layer": None}
    (path / "main.py").chmod(0o644)
    (path / "main.py").write_text("changed")
    check = (await served.viewer.get("/v1/agents/shout/check")).json()
    assert not check["runs"] and "were changed" in check["problem"]
    changed = archive({**FILES, "main.py": "print('ho')\n"})
    refused(await send(served.admin, changed), 409, "give the changed agent a new version")
    dev = await send(served.admin, changed, "?dev=true")
    assert dev.status_code == 201 and dev.json()["path"] != agent["path"] and not path.exists()
    assert (await served.admin.delete("/v1/agents/shout")).json()["name"] == "shout"
    assert not Path(dev.json()["path"]).exists()
    refused(await served.viewer.get("/v1/agents/shout"), 404, "no agent 'shout'")
    done = [(did, by) for did, by, name in await changes(served) if name == "shout@1.0.0"]
    assert done == [("agent.add", "the-admin"), ("agent.add", "the-admin"), ("agent.remove", "the-admin")]
    assert left(served) == []


BAD_ARCHIVES: Final[list[Any]] = [
    ({"main.py": ""}, "has no agent.yaml"),
    ({**FILES, "agent.yaml": MANIFEST + "nmae: x\n"}, "agent.yaml: 1 problem\nline 5, column 1: nmae: unknown"),
    ({**FILES, "agent.yaml": "name: ["}, "line 1"),
    ({**FILES, "agent.yaml": MANIFEST.replace("main.py", "other.py")}, "'other.py' is not a .py file"),
    ({**FILES, "../../evil": "x"}, "not allowed"),
    ({**FILES, "/evil": "x"}, "not allowed"),
    ({**FILES, "a": special("a", tarfile.SYMTYPE, "/etc/passwd")}, "a link or a special file"),
    ({**FILES, "a": special("a", tarfile.LNKTYPE, "main.py")}, "a link or a special file"),
    ({**FILES, "a": special("a", tarfile.CHRTYPE)}, "a link or a special file"),
    ({**FILES, "a": special("a", tarfile.FIFOTYPE)}, "a link or a special file"),
    ({**FILES, "./main.py": "print()"}, "twice"),
]


async def test_bad_archives(served: Served) -> None:
    """They leave nothing, and the errors name no place on the server."""
    for files, said in BAD_ARCHIVES:
        answer = await send(served.admin, archive(files))
        refused(answer, 400, said)
        checked = (await send(served.admin, archive(files), "/validate")).json()
        assert not checked["valid"] and checked["problems"]
        for text in (answer.text, json.dumps(checked)):
            assert tempfile.gettempdir() not in text and str(served.settings.home) not in text
        assert not served.settings.agents.exists() and left(served) == []
    assert [agent.name for agent in await served.store.agents()] == ["echo"]


NO_ARCHIVES: Final[list[Any]] = [
    (b"", "can't be unpacked"),
    (b"hello", "is not gzipped"),
    (gzip.compress(b"hello"), "can't be unpacked"),
    (archive(FILES)[:80], "can't be unpacked"),
    (bomb(), "has more than 256 MiB of files"),
]


async def test_what_is_no_archive(served: Served) -> None:
    for data, said in NO_ARCHIVES:
        refused(await send(served.admin, data), 400, said)
        assert left(served) == []


async def test_what_is_said_to_be_too_large_or_something_else(served: Served) -> None:
    refused(await served.admin.post("/v1/agents", json={}), 415, "application/gzip")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
    head = f"Host: x\r\nAuthorization: Bearer {served.tokens['admin']}\r\nContent-Type: application/gzip\r\n"
    writer.write(f"POST /v1/agents HTTP/1.1\r\n{head}Content-Length: 999999999\r\n\r\n".encode())
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert b" 413 " in (await reader.read()).partition(b"\r\n")[0]
    writer.close()
    assert left(served) == []


async def test_an_upload_that_breaks_off_leaves_nothing_and_few_are_taken_at_once(served: Served) -> None:
    port = int(served.url.rsplit(":", 1)[1])
    head = f"Host: x\r\nAuthorization: Bearer {served.tokens['admin']}\r\nContent-Type: application/gzip\r\n"
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
    async with asyncio.timeout(PATIENCE_SECONDS):
        for _, writer in opened:
            writer.write(f"POST /v1/agents HTTP/1.1\r\n{head}Content-Length: 999\r\n\r\nhalf".encode())
            await writer.drain()
        while len(left(served)) < 2:
            await served.viewer.get("/v1/whoami")
        refused(await send(served.admin, archive(FILES)), 409, "being uploaded")
        for _, writer in opened:
            writer.close()
        while (await send(served.admin, archive(FILES))).status_code != 201:
            pass
        while left(served):
            await served.viewer.get("/v1/whoami")


async def test_a_row_names_no_file_of_the_host(served: Served) -> None:
    (agent,) = await served.store.agents()
    home = served.settings.home
    (home / "agent.yaml").write_text("the key to everything")
    await served.store.put_agent(replace(agent, path=home))
    package = (await served.viewer.get("/v1/agents/echo/package")).json()
    assert (package["manifest"], package["digest"]) == (None, "")
    check = (await served.viewer.get("/v1/agents/echo/check")).json()
    assert not check["runs"] and "is no copy" in check["problem"]


async def test_an_agent_that_is_needed_stays(served: Served) -> None:
    await served.add("t")
    refused(await served.admin.delete("/v1/agents/echo"), 409, "tickets that have not ended need the agent")
    await served.store.cancel("t", "test")
    flow = b"name: f\nversion: 1.0.0\nsteps: [{id: a, agent: echo}]\n"
    headers = {"content-type": "application/yaml"}
    assert (await served.admin.post("/v1/workflows", content=flow, headers=headers)).status_code == 201
    refused(await served.admin.delete("/v1/agents/echo"), 409, "the workflow f@1.0.0 names the agent 'echo'")
    assert (await served.admin.delete("/v1/workflows/f")).status_code == 200
    answer: Any = await served.admin.delete("/v1/agents/echo")
    assert answer.status_code == 200
