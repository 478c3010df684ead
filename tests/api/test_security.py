"""What others can do to the server: other users of the host, other web sites, and whoever gets at its files.

docs/security.md names these tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
from pathlib import Path

import httpx
import pytest

from tests.api.served import Served
from tests.api.test_auth import refused
from tests.conftest import PATIENCE_SECONDS

CONNECT = """
import os, socket, sys
os.fchdir(int(sys.argv[1]))  # with it open, it doesn't matter what is above it
try:
    socket.socket(socket.AF_UNIX).connect(sys.argv[2])
except OSError as error:
    print(type(error).__name__)
else:
    print("connected")
"""


async def connected(place: Path, *, uid: int) -> str:
    directory = os.open(place.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        child = await asyncio.create_subprocess_exec(
            "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups",
            "/usr/bin/python3", "-c", CONNECT, str(directory), place.name,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, pass_fds=[directory],
        )  # fmt: skip
        out, _ = await child.communicate()
    finally:
        os.close(directory)
    return out.decode().strip()


@pytest.mark.needs("root")
async def test_another_user_of_the_host_gets_nothing(served: Served) -> None:
    """Not by the socket, even if its directory lets them through to it; and a port asks everybody for a token."""
    place = served.settings.api_socket
    place.parent.chmod(0o755)
    assert await connected(place, uid=os.geteuid()) == "connected"
    assert await connected(place, uid=65534) == "PermissionError"
    place.chmod(0o666)
    assert await connected(place, uid=65534) == "connected", "so the line before the last tests something"
    refused(await served.nobody.get("/v1/whoami"), 401, "a valid token")


async def test_whether_it_is_well_is_told_to_anybody(served: Served) -> None:
    """And how the database's files are called to nobody."""
    file = served.settings.data_dir / "swarm.db"
    with contextlib.closing(sqlite3.connect(file, isolation_level=None, timeout=60)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert (await served.nobody.get("/healthz")).json() == {"status": "ok"}
        other.execute("ROLLBACK")
    shutil.copy(file, file.with_name("older.db"))
    file.with_name("older.db").replace(file)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (answer := await served.nobody.get("/healthz")).status_code == 200:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    refused(answer, 503, "the database can't be used")
    assert str(served.settings.home) not in answer.text


async def test_a_copy_of_the_database_lets_nobody_in(served: Served) -> None:
    """What it holds of tokens and sessions is worth nothing as a token or as a cookie."""
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as browser:
        await browser.post("/login", data={"token": served.tokens["admin"]}, headers={"origin": served.url})
        assert (await browser.get("/v1/whoami")).status_code == 200
    with sqlite3.connect(served.settings.data_dir / "swarm.db", timeout=60) as database:
        rows = database.execute("SELECT id, name, hash FROM tokens").fetchall()
    assert len(rows) == 4
    for value in {str(value) for row in rows for value in row}:
        for headers in ({"authorization": f"Bearer {value}"}, {"cookie": f"swarm_session={value}"}):
            refused(await served.nobody.get("/v1/whoami", headers=headers), 401, "a valid token")


async def test_another_name_for_this_address_has_no_session(served: Served) -> None:
    """DNS rebinding: a page of another site has its own name lead to this server. A browser gives it that name's
    cookies, which are none of ours."""
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as browser:
        await browser.post("/login", data={"token": served.tokens["admin"]}, headers={"origin": served.url})
        assert (await browser.get("/v1/whoami")).status_code == 200
        evil = served.url.replace("127.0.0.1", "localhost")
        for answer in (
            await browser.get(f"{evil}/v1/whoami"),
            await browser.post(f"{evil}/v1/tickets", json={"title": "x", "agent": "echo"}, headers={"origin": evil}),
        ):
            refused(answer, 401, "a valid token")
        answer = await browser.get(f"{evil}/")
        assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=%2F")
    assert await served.store.tickets() == []


async def test_every_answer_tells_browsers_to_trust_nothing(served: Served) -> None:
    """No frame, no foreign script, no guessed type, no other site that reads it: whatever the answer is."""
    await served.operator.post("/v1/sandboxes", json={"name": "box"})
    origin = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    asked = [
        served.viewer.get("/v1/whoami", headers=origin),
        served.nobody.get("/v1/whoami", headers=origin),
        served.viewer.get("/v1/nothing", headers=origin),
        served.viewer.post("/v1/tickets", json={}, headers=origin),
        served.viewer.request("TRACE", "/v1/tickets", headers=origin),
        served.nobody.request("OPTIONS", "/v1/tickets", headers=origin),
        served.nobody.get("/login", headers=origin),
        served.operator.get("/sandboxes/box/terminal", headers=origin),
        served.nobody.post("/hooks/nothing", headers=origin),
        served.nobody.get("/healthz", headers=origin),
    ]
    for answer in await asyncio.gather(*asked):
        headers = answer.headers
        assert not [name for name in headers if name.startswith("access-control-")], answer.request.url
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == "'self'"
        assert headers["cross-origin-resource-policy"] == "same-origin" and "server" not in headers


@pytest.mark.parametrize("path", ["/v1/tickets", "/hooks/w", "/login", "/nowhere"])
async def test_what_two_servers_may_read_in_two_ways_ends_its_connection(served: Served, path: str) -> None:
    """Behind a proxy that goes by the length, the second request would be the beginning of somebody else's."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.viewer.base_url.port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 50\r\n\r\n"
    writer.write(head.encode() + b"0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1 ") == 1, answer
